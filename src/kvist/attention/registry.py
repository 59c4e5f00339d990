"""Which attention runs: by argument, view and device; the reference where nothing else fits.

A kernel is a function `(q, kv, scale) -> out` with a `supports(kv)` beside it, registered under a
name (docs/recipes/kernel.md). Every kernel is an optional specialisation of `reference`, and the
contract suite tests each against it.
"""

from collections.abc import Callable
from dataclasses import dataclass

from torch import Tensor

from kvist.attention.fixed import fixed_attention
from kvist.attention.kernels import supports as triton_supports
from kvist.attention.kernels import triton_attention
from kvist.attention.reference import reference_attention
from kvist.attention.sdpa import sdpa_attention
from kvist.cache.protocol import KV
from kvist.errors import NotSupported

Kernel = Callable[[Tensor, KV, float], Tensor]


@dataclass(frozen=True)
class Backend:
    """A registered kernel and what it can read."""

    kernel: Kernel
    supports: Callable[[KV], bool]


# In order of preference; the reference supports everything, so what stands behind it runs only when
# it is asked for.
BACKENDS: dict[str, Backend] = {
    "triton": Backend(triton_attention, triton_supports),
    "sdpa": Backend(sdpa_attention, lambda kv: True),
    "reference": Backend(reference_attention, lambda kv: True),
    "fixed": Backend(fixed_attention, lambda kv: True),
}


def register(name: str, kernel: Kernel, supports: Callable[[KV], bool]) -> None:
    """Add a kernel, preferred to those registered before it.

    Args:
        name: what users write as `attention=name`.
        kernel: `(q [N, heads, head_dim], kv, scale) -> [N, heads, head_dim]`.
        supports: whether it can read this view; without side effects.
    """
    others = {other: backend for other, backend in BACKENDS.items() if other != name}
    BACKENDS.clear()
    BACKENDS.update({name: Backend(kernel, supports), **others})


def check_backend(name: str | None) -> str | None:
    """The backend's name, None for "auto".

    Raises:
        NotSupported: no backend of this name.
    """
    if name is None or name == "auto":
        return None
    if name not in BACKENDS:
        raise NotSupported(f"no attention named {name!r}; there are: auto, {', '.join(BACKENDS)}")
    return name


def attend(q: Tensor, kv: KV, *, scale: float) -> Tensor:
    """Causal attention of this step's queries over what the cache shows them.

    Args:
        q: `[N, heads, head_dim]`, packed, rotated, in the model's basis; heads is a multiple of
            the view's kv_heads.
        kv: the layer's view, with the batch's lengths and the layer's window.
        scale: factor of the scores.

    Returns:
        `[N, heads, head_dim]`.

    Raises:
        NotSupported: `kv.backend` names a kernel that cannot read this view.
    """
    kv.observe(q)
    if kv.backend is not None:
        backend = BACKENDS[kv.backend]
        if not backend.supports(kv):
            raise NotSupported(f"attention {kv.backend!r} cannot read this cache; try 'auto'")
        return backend.kernel(q, kv, scale)
    chosen = next(backend for backend in BACKENDS.values() if backend.supports(kv))
    return chosen.kernel(q, kv, scale)
