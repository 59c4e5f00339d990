"""Where a bound cache's planes lie, for an executor that reads and writes them in place.

Both layouts come out alike: a token at position p of sequence b lies at place `p % block_size` of
block `table[b, p // block_size]`. A dense cache is one block for each row. What only the model's
own forward can serve (quantised planes, sinks, layers that were filled late) is refused.
"""

import ctypes
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.cache.codecs import Plain
from kvist.cache.dense_view import DenseBinding
from kvist.cache.paged_view import PagedBinding
from kvist.cache.protocol import KVCache, Planes
from kvist.core.spec import AttentionSpec
from kvist.errors import NotSupported

__all__ = ["BoundPlanes", "bound_planes"]

ELEMENTS = {torch.float32: 0, torch.bfloat16: 1}


@dataclass(frozen=True)
class BoundPlanes:
    """A step's planes by address, and the tensors that keep the addresses true.

    Args:
        element: the library's number of the planes' dtype.
        keys, values: an address for each layer.
        tables: for each layer the address of `[sequences, table_width]` int32.
        windows: for each layer how many positions are seen, 0 for all.
        table_width: entries of a sequence in a table.
        block_size: token places of a block.
        strides: elements from block to block, token to token, head to head.
        kept: what the addresses point into.
    """

    element: int
    keys: ctypes.Array[ctypes.c_void_p]
    values: ctypes.Array[ctypes.c_void_p]
    tables: ctypes.Array[ctypes.c_void_p]
    windows: ctypes.Array[ctypes.c_int32]
    table_width: int
    block_size: int
    strides: tuple[int, int, int]
    kept: tuple[object, ...]


def bound_planes(cache: KVCache) -> tuple[Batch, BoundPlanes]:
    """The batch that a cache is bound to and its planes; the layers now count as written.

    Raises:
        NotSupported: a layout, codec or retention that the executor does not read in place.
    """
    named = getattr(cache, "backend", None)
    if named is not None:
        raise NotSupported(f"the native executor has its own attention, not {named!r}")
    if isinstance(cache, DenseBinding):
        return cache.batch, _dense(cache)
    if isinstance(cache, PagedBinding):
        return cache.batch, _paged(cache)
    raise NotSupported(f"the native executor does not read a {type(cache).__name__} in place")


def _dense(binding: DenseBinding) -> BoundPlanes:
    cache = binding.cache
    _check_codec(cache.codec)
    windows = [_window(spec) for spec in cache.specs]
    layers = binding.planes_to_write()
    key = layers[0]["key"]["x"]
    rows, _, capacity, _ = key.shape
    table = torch.arange(rows, dtype=torch.int32)
    block, head, token, _ = key.stride()
    return BoundPlanes(
        element=_element(key),
        keys=_addresses([layer["key"]["x"].data_ptr() for layer in layers]),
        values=_addresses([layer["value"]["x"].data_ptr() for layer in layers]),
        tables=_addresses([table.data_ptr()] * len(layers)),
        windows=(ctypes.c_int32 * len(windows))(*windows),
        table_width=1,
        block_size=capacity,
        strides=(block, token, head),
        kept=(layers, table),
    )


def _paged(binding: PagedBinding) -> BoundPlanes:
    view_of = {i: view for view in binding.views for i in view.pool.group.layers}
    views = [view_of[i] for i in range(len(view_of))]
    keys: list[Planes] = []
    values: list[Planes] = []
    for i, view in enumerate(views):
        _check_codec(view.pool.codec)
        keys.append(view.pool.planes[i]["key"])
        values.append(view.pool.planes[i]["value"])
    windows = [_window(view.pool.group.spec) for view in views]
    binding.written.update(range(len(views)))
    key = keys[0]["x"]
    block, token, head, _ = key.stride()
    return BoundPlanes(
        element=_element(key),
        keys=_addresses([planes["x"].data_ptr() for planes in keys]),
        values=_addresses([planes["x"].data_ptr() for planes in values]),
        tables=_addresses([view.block_table.data_ptr() for view in views]),
        windows=(ctypes.c_int32 * len(windows))(*windows),
        table_width=views[0].block_table.stride(0),
        block_size=key.shape[1],
        strides=(block, token, head),
        kept=(views, keys, values),
    )


def _addresses(pointers: list[int]) -> ctypes.Array[ctypes.c_void_p]:
    return (ctypes.c_void_p * len(pointers))(*pointers)


def _element(plane: Tensor) -> int:
    if plane.dtype not in ELEMENTS or plane.device.type != "cpu":
        raise NotSupported(
            f"the native executor reads float32 and bfloat16 caches on the CPU, not {plane.dtype} "
            f"on {plane.device}"
        )
    return ELEMENTS[plane.dtype]


def _check_codec(codec: object) -> None:
    if not isinstance(codec, Plain):
        name = getattr(codec, "name", type(codec).__name__)
        raise NotSupported(f"the native executor reads plain caches, not the codec {name!r}")


def _window(spec: AttentionSpec) -> int:
    if spec.sinks and spec.window is not None:
        raise NotSupported("the native executor does not keep sinks in front of a window")
    return spec.window or 0
