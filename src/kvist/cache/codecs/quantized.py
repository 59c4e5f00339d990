"""A lossy codec is two coders, one a side, and the basis in which each of them works.

`Quantized` brings keys and values into that basis and back; a `Coder` (int8.py, int4.py, fp8.py)
only writes numbers in few bits. What a codec by name is made of stands in registry.py.
"""

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor

from kvist.cache.codecs.calibration import Calibration
from kvist.cache.codecs.rotation import rotate_exactly, unrotate
from kvist.cache.protocol import Planes, Shape, Side
from kvist.core.spec import AttentionSpec


class Coder(Protocol):
    """How numbers are written in few bits: each token and head by itself, in planes.

    Kernels read the planes in place where they are `x` (the numbers), `scale` and `zero` (float16),
    with number * scale + zero as the value; see `kvist.attention.kernels.formats`.
    """

    @property
    def name(self) -> str:
        """Names the format; another name for every change of what the bytes mean."""

    @property
    def rotated(self) -> bool:
        """Whether it wants the Hadamard basis."""

    def planes(self, num_heads: int, head_dim: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """Name -> (`[num_heads, ...]` for one token, dtype)."""

    def encode(self, y: Tensor) -> dict[str, Tensor]:
        """Float32 `[..., heads, head_dim]` -> planes `[..., heads, ...]`.

        The result for a token must not depend on the tokens beside it, to the bit: no sums whose
        order could change, but those of whole numbers. NaN must stay NaN.
        """

    def decode(self, planes: Planes) -> Tensor:
        """Planes -> float32 `[..., heads, head_dim]`; zero planes give finite numbers."""


@dataclass(frozen=True, eq=False)
class Quantized:
    """A codec of two coders.

    Where keys are centred, their constant mean per layer, head and channel (`Calibration`) is taken
    away before they are encoded and added again by `decode`. A kernel that reads planes leaves it
    out: with k = y + mean, q.k = q.y + q.mean, and q.mean is the same for all keys of a query, so
    it cancels in the softmax. (Not for a score that is used otherwise, such as a log-sum-exp that
    is merged with one over uncentred keys.)

    Args:
        name: as users write it.
        key: writes the keys.
        value: writes the values.
        dtype: the model's, in which `decode` answers.
        centre: the keys' means; None takes zero.
    """

    name: str
    key: Coder
    value: Coder
    dtype: torch.dtype
    centre: Calibration | None = None

    lossless = False

    @property
    def fingerprint(self) -> str:
        """Coders, basis and centre: all that decides what the bytes mean."""
        sides = (
            f"{side}={coder.name}{' rotated' if coder.rotated else ''}"
            for side, coder in (("key", self.key), ("value", self.value))
        )
        centre = "" if self.centre is None else f", centred on {self.centre.source}"
        return f"{self.name}({', '.join(sides)}{centre})"

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """The side's coder's."""
        return self._coder(side).planes(spec.num_kv_heads, spec.head_dim)

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        """Centre, rotate, write; float32 on the way, whatever the model's dtype."""
        coder, y = self._coder(side), x.float()
        if side == "key" and self.centre is not None:
            y = y - self.centre.key_mean(layer_idx, y.device)
        return coder.encode(rotate_exactly(y) if coder.rotated else y)

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        """Read, rotate back, add the centre."""
        coder = self._coder(side)
        y = coder.decode(planes)
        if coder.rotated:
            y = unrotate(y)
        if side == "key" and self.centre is not None:
            y = y + self.centre.key_mean(layer_idx, y.device)
        return y.to(self.dtype)

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        """Queries whose products with the keys' planes are those with the keys, less q.mean."""
        # With y = k H and q' = q H^-1 (H symmetric): q'.y = q.k.
        return unrotate(q) if self.key.rotated else q

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        """Sums of the values' planes as sums of the values."""
        return unrotate(out) if self.value.rotated else out

    def _coder(self, side: Side) -> Coder:
        return self.key if side == "key" else self.value

    def __str__(self) -> str:
        """Its name."""
        return self.name
