"""Where a bound cache's planes lie, for an executor that reads and writes them in place.

All layouts come out alike: a token at position p of sequence b lies at place `p % block_size` of
block `table[b, p // block_size]`, or at its place in a ring. A dense cache is one block for each
row. What only the model's own forward can serve (fp8, layers that were filled late) is refused.
"""

import ctypes
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.cache.codecs import Layered, Plain, Quantized
from kvist.cache.codecs.int4 import Int4
from kvist.cache.codecs.int8 import Int8
from kvist.cache.dense_view import DenseBinding
from kvist.cache.paged_view import PagedBinding
from kvist.cache.protocol import Codec, KVCache, Planes, Side
from kvist.core.spec import AttentionSpec
from kvist.errors import NotSupported
from kvist.native.library import LayerInput, PlaneInput

__all__ = ["BoundLayers", "BoundPlanes"]

FLOATS = {torch.float32: 0, torch.bfloat16: 1}
INT8, INT4 = 2, 3


@dataclass(frozen=True)
class BoundLayers:
    """All layers' planes by address, and the tensors that keep the addresses true."""

    inputs: ctypes.Array[LayerInput]
    sources: tuple[object, ...]
    """What was described: while a cache has the same, the description holds."""
    kept: tuple[object, ...]


class BoundPlanes:
    """Describes bound caches; remembers each as long as its planes stay where they are."""

    def __init__(self) -> None:
        """Nothing is known yet."""
        self._known: WeakKeyDictionary[Any, BoundLayers] = WeakKeyDictionary()

    def of(self, cache: KVCache) -> tuple[Batch, BoundLayers]:
        """The batch that a cache is bound to and its planes; the layers now count as written.

        Raises:
            NotSupported: a layout or codec that the executor does not read in place, or attention
                asked for by name; nothing has changed.
        """
        if isinstance(cache, DenseBinding):
            self._check_backend(cache.backend)
            layers = cache.layers_in_place()
            found = self._remembered(cache.cache, (layers,))
            if found is None:
                found = self._known[cache.cache] = _dense(cache)
            cache.note_written()
            return cache.batch, found
        if isinstance(cache, PagedBinding):
            self._check_backend(cache.backend)
            planes = tuple(view.pool.planes for view in cache.views)
            tables = [
                number
                for view in cache.views
                for number in (view.block_table.data_ptr(), view.block_table.stride(0))
            ]
            found = self._remembered(cache.views[0].pool, (*planes, *tables))
            if found is None:
                found = self._known[cache.views[0].pool] = _paged(cache, (*planes, *tables))
            cache.written.update(range(len(found.inputs)))
            return cache.batch, found
        raise NotSupported(f"the native executor does not read a {type(cache).__name__} in place")

    def _remembered(self, owner: object, sources: tuple[object, ...]) -> BoundLayers | None:
        found = self._known.get(owner)
        if found is None or len(found.sources) != len(sources):
            return None
        same = all(
            a is b or (isinstance(a, int) and a == b)
            for a, b in zip(found.sources, sources, strict=True)
        )
        return found if same else None

    def _check_backend(self, backend: str | None) -> None:
        if backend is not None:
            raise NotSupported(f"the native executor has its own attention, not {backend!r}")


def _dense(binding: DenseBinding) -> BoundLayers:
    cache = binding.cache
    layers = binding.layers_in_place()
    table = torch.arange(len(cache.lengths), dtype=torch.int32)
    inputs = (LayerInput * len(layers))()
    kept: list[object] = [table]
    for i, (layer, spec) in enumerate(zip(layers, cache.specs, strict=True)):
        # [rows, kv_heads, capacity, ...]: a row is a block
        order = (0, 2, 1)
        inputs[i] = LayerInput(
            key=_plane(cache.codec, layer["key"], "key", i, spec, order, kept),
            value=_plane(cache.codec, layer["value"], "value", i, spec, order, kept),
            table=table.data_ptr(),
            table_width=1,
            block_size=layer["key"]["x"].shape[2],
            window=spec.window or 0,
            sinks=spec.sinks,
            ring=binding.ring_size(i),
        )
    return BoundLayers(inputs, (layers,), tuple(kept))


def _paged(binding: PagedBinding, sources: tuple[object, ...]) -> BoundLayers:
    view_of = {i: view for view in binding.views for i in view.pool.group.layers}
    inputs = (LayerInput * len(view_of))()
    kept: list[object] = []
    for i in range(len(view_of)):
        view = view_of[i]
        pool, spec = view.pool, view.pool.group.spec
        order = (0, 1, 2)  # [blocks, block_size, kv_heads, ...]
        inputs[i] = LayerInput(
            key=_plane(pool.codec, pool.planes[i]["key"], "key", i, spec, order, kept),
            value=_plane(pool.codec, pool.planes[i]["value"], "value", i, spec, order, kept),
            table=view.block_table.data_ptr(),
            table_width=view.block_table.stride(0),
            block_size=pool.block_size,
            window=spec.window or 0,
            sinks=spec.sinks,
            ring=0,
        )
    return BoundLayers(inputs, sources, tuple(kept))


def _plane(
    codec: Codec,
    planes: Planes,
    side: Side,
    layer_idx: int,
    spec: AttentionSpec,
    order: tuple[int, int, int],
    kept: list[object],
) -> PlaneInput:
    """One side of one layer.

    Args:
        codec: wrote it.
        planes: its planes.
        side: which it is.
        layer_idx: the layer's.
        spec: the layer's.
        order: the planes' dimensions of blocks, tokens and heads.
        kept: what addresses point into is put here.
    """
    if isinstance(codec, Layered):
        codec = next((one for span, one in codec.spans if layer_idx in span), codec.default)
    x = planes["x"]
    if x.device.type != "cpu":
        raise NotSupported(f"the native executor reads caches on the CPU, not on {x.device}")
    strides = [x.stride(d) for d in order]
    if isinstance(codec, Plain):
        if x.dtype not in FLOATS:
            raise NotSupported(
                f"the native executor reads float32 and bfloat16 caches, not {x.dtype}"
            )
        return PlaneInput(x=x.data_ptr(), strides=tuple(strides), element=FLOATS[x.dtype])
    coder = None
    if isinstance(codec, Quantized):
        coder = codec.key if side == "key" else codec.value
    if not isinstance(coder, Int4 | Int8):
        raise NotSupported(f"the native executor does not read the codec {codec.name!r} in place")
    group = min(coder.group, spec.head_dim) if isinstance(coder, Int4) else spec.head_dim
    if isinstance(coder, Int4) and group not in (16, 32, 64, 128):
        raise NotSupported(f"the native executor reads groups of 16 to 128 channels, not {group}")
    scale, zero = planes["scale"], planes.get("zero")
    centre: Tensor | None = None
    if side == "key" and isinstance(codec, Quantized) and codec.centre is not None:
        centre = codec.centre.key_mean(layer_idx, x.device).float().contiguous()
        kept.append(centre)
    return PlaneInput(
        x=x.data_ptr(),
        scale=scale.data_ptr(),
        zero=None if zero is None else zero.data_ptr(),
        centre=None if centre is None else centre.data_ptr(),
        strides=tuple(strides),
        scale_strides=tuple(scale.stride(d) for d in order),
        element=INT4 if isinstance(coder, Int4) else INT8,
        group=group,
    )
