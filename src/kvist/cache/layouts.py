"""The registry of layouts and `make_cache`, which puts layout, codec and retention together.

A new layout is a file of its own and a line in `LAYOUTS` (docs/recipes/layout.md); the contract
suite then runs it with every codec and retention.
"""

from collections.abc import Callable, Sequence

import torch

from kvist.cache.codecs import Layered, make_codec
from kvist.cache.dense import DynamicCache, StaticCache
from kvist.cache.paged_cache import PagedCache
from kvist.cache.protocol import Cache, Codec
from kvist.cache.ring import RingCache
from kvist.core.retention import Retention
from kvist.core.spec import LayerSpec
from kvist.errors import CacheError

# name -> make(specs, codec, rows, max_length, retention, device)
LayoutFactory = Callable[
    [Sequence[LayerSpec], Codec, int, int, Retention | None, torch.device], Cache
]


def _dynamic(
    specs: Sequence[LayerSpec],
    codec: Codec,
    rows: int,
    max_length: int,
    retention: Retention | None,
    device: torch.device,
) -> Cache:
    return DynamicCache(specs, codec, rows=rows, retention=retention, device=device)


def _static(
    specs: Sequence[LayerSpec],
    codec: Codec,
    rows: int,
    max_length: int,
    retention: Retention | None,
    device: torch.device,
) -> Cache:
    return StaticCache(
        specs, codec, max_length=max_length, rows=rows, retention=retention, device=device
    )


def _ring(
    specs: Sequence[LayerSpec],
    codec: Codec,
    rows: int,
    max_length: int,
    retention: Retention | None,
    device: torch.device,
) -> Cache:
    return RingCache(
        specs, codec, max_length=max_length, rows=rows, retention=retention, device=device
    )


def _paged(
    specs: Sequence[LayerSpec],
    codec: Codec,
    rows: int,
    max_length: int,
    retention: Retention | None,
    device: torch.device,
) -> Cache:
    return PagedCache(specs, codec, rows=rows, retention=retention, device=device)


LAYOUTS: dict[str, LayoutFactory] = {
    "dynamic": _dynamic,
    "static": _static,
    "ring": _ring,
    "paged": _paged,
}


def make_cache(
    specs: Sequence[LayerSpec],
    *,
    layout: str = "dynamic",
    codec: str | Codec = "plain",
    retention: Retention | None = None,
    rows: int = 1,
    max_length: int,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Cache:
    """An empty cache for a model's layers.

    Args:
        specs: one for each layer (`model.specs`).
        layout: where tokens lie, a name in `LAYOUTS`.
        codec: how they are written, a name in `CODECS` or a codec.
        retention: which of them stay; all by default.
        rows: sequences that it holds.
        max_length: tokens that a sequence may reach; layouts of fixed size reserve it.
        dtype: the model's, in which a codec by name decodes.
        device: where the planes lie.

    Raises:
        CacheError: no layout or codec of this name, or a codec for a layer that there is not.
    """
    if layout not in LAYOUTS:
        raise CacheError(f"no cache layout named {layout!r}; there are: {', '.join(LAYOUTS)}")
    made = make_codec(codec, dtype) if isinstance(codec, str) else codec
    if isinstance(made, Layered):
        made.check_layers(len(specs))
    return LAYOUTS[layout](specs, made, rows, max_length, retention, torch.device(device))
