"""What a model and its attention see of a dense cache for one step; made by `DenseCache.bind`."""

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.cache.protocol import KV, SIDES, Planes, Side, State
from kvist.errors import CacheError, NotSupported, UnknownLayer

if TYPE_CHECKING:
    from kvist.cache.dense import DenseCache

Layer = dict[Side, dict[str, Tensor]]
"""One layer's planes, each `[rows, kv_heads, capacity, ...]`."""


class DenseBinding:
    """A dense cache bound to one step: the `KVCache` that a model sees."""

    def __init__(self, cache: "DenseCache", batch: Batch, backend: str | None) -> None:
        """Made by `DenseCache.bind` alone."""
        self.cache = cache
        self.batch = batch
        self.backend = backend
        self.memo: dict[Any, Any] = {}

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> KV:
        """Write this step's keys and values; see `KVCache.update`."""
        self.cache._check_layer(layer_idx)
        encode = self.cache.codec.encode
        self.put(
            layer_idx,
            {
                "key": encode(key_states, "key", layer_idx),
                "value": encode(value_states, "value", layer_idx),
            },
        )
        return self.view(layer_idx)

    def put(self, layer_idx: int, planes: Mapping[Side, Planes]) -> None:
        """Write what is encoded already, each plane `[N, kv_heads, ...]`; see `update`."""
        self._extend(layer_idx)
        layer = self.cache._layers[layer_idx]
        for side, encoded in planes.items():
            for name, tokens in encoded.items():
                self._write(layer_idx, layer[side][name], tokens)

    def view(self, layer_idx: int) -> "DenseKV":
        """The layer as this step's queries may see it."""
        return DenseKV(self, layer_idx)

    def layers_in_place(self) -> list[Layer]:
        """All layers' planes, for an executor that writes this step's tokens in place.

        Position p of sequence b lies at place p of row b, or where the layer's ring has it;
        `[rows, kv_heads, capacity, ...]`, each plane contiguous. The list is another one once the
        planes have moved.

        Raises:
            NotSupported: a layer was filled late, so that its places are not all taken.
        """
        if any(map(any, self.cache._first)):
            late = next(i for i, first in enumerate(self.cache._first) if any(first))
            raise NotSupported(f"layer {late} was filled late, and is not read in place")
        return self.cache._layers

    def ring_size(self, layer_idx: int) -> int:
        """Places that a layer's positions go around in, behind the sinks; 0 where they do not."""
        return 0

    def note_written(self) -> None:
        """All layers have this step's tokens: whoever asked for `layers_in_place` writes them."""
        cached, ends = list(self.batch.cached_lens), list(self.batch.kv_lens)
        for layer_idx, last in enumerate(self.cache._last):
            if last == cached:  # and none is late, see there
                self.cache._last[layer_idx] = ends.copy()
            else:
                self._extend(layer_idx)

    def state(self, layer_idx: int) -> State:
        """Dense layouts hold no recurrent layers."""
        raise UnknownLayer(f"layer {layer_idx} is an attention layer and has no recurrent state")

    def _extend(self, layer_idx: int) -> None:
        """Note that the layer now holds this step's positions too."""
        first, last = self.cache._first[layer_idx], self.cache._last[layer_idx]
        for row, (cached, end) in enumerate(
            zip(self.batch.cached_lens, self.batch.kv_lens, strict=True)
        ):
            if first[row] == last[row]:
                first[row] = cached
            elif last[row] not in (cached, end):
                raise CacheError(
                    f"layer {layer_idx} holds sequence {row} up to token {last[row]} and cannot go "
                    f"on at {cached}: it missed a step"
                )
            last[row] = end

    def _write(self, layer_idx: int, plane: Tensor, tokens: Tensor) -> None:
        """Put `tokens` `[N, kv_heads, ...]` at this step's positions of a layer's plane."""
        batch = self.batch
        if batch.uniform:
            # All rows write the same places [start, end): one strided copy.
            start, end = batch.cached_lens[0], batch.kv_lens[0]
            shaped = tokens.unflatten(0, (len(batch.slots), end - start))
            plane[:, :, start:end] = shaped.transpose(1, 2)
        else:
            plane[batch.sequence_index, :, batch.positions] = tokens.to(plane.dtype)


class DenseKV:
    """One layer of a dense cache, readable by attention."""

    __slots__ = ("_binding", "_layer_idx", "backend", "batch", "memo", "spec")

    def __init__(self, binding: DenseBinding, layer_idx: int) -> None:
        """Made by `DenseBinding.update` alone."""
        self._binding = binding
        self._layer_idx = layer_idx
        self.batch = binding.batch
        self.backend = binding.backend
        self.spec = binding.cache.specs[layer_idx]
        self.memo = binding.memo

    @property
    def in_order(self) -> bool:
        """Whether every sequence's key i has position i; only a layer filled late has not."""
        return not any(self._binding.cache._first[self._layer_idx])

    @property
    def dense_is_view(self) -> bool:
        """True where nothing has to be decoded."""
        return self._binding.cache.codec.lossless

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sequences, padded at the end; see `KV.dense`."""
        longest = max(self.batch.kv_lens, default=0)
        keys, values = (self._decode(side, slice(None), longest) for side in SIDES)
        positions = self._positions(longest)
        complete = self.in_order and len(set(self.batch.kv_lens)) == 1
        if not self._binding.cache.codec.lossless and not complete:
            absent = (positions < 0)[:, :, None, None]
            keys, values = (x.masked_fill(absent, 0) for x in (keys, values))
        return keys, values, positions

    def sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One sequence, without padding; see `KV.sequence`."""
        length = self.batch.kv_lens[index]
        first = self._binding.cache._first[self._layer_idx][index]
        keys, values = (self._decode(side, index, length)[first:] for side in SIDES)
        if first == 0:
            return keys, values, None
        return keys, values, torch.arange(first, length, device=keys.device)

    def observe(self, q: Tensor) -> None:
        """Positional retention does not look at queries."""

    def _decode(self, side: Side, rows: int | slice, length: int) -> Tensor:
        """`[(B,) T, kv_heads, head_dim]`, the places [0, length) of some rows."""
        cache = self._binding.cache
        heads = 0 if isinstance(rows, int) else 1  # the heads' dimension, tokens behind it
        planes = {
            name: plane[rows, :, :length].transpose(heads, heads + 1)
            for name, plane in cache._layers[self._layer_idx][side].items()
        }
        return cache.codec.decode(planes, side, self._layer_idx)

    def _positions(self, longest: int) -> Tensor:
        """`[B, T]`; -1 where row b holds nothing at place t."""
        first = self._binding.cache._first[self._layer_idx]
        key = ("key_positions", tuple(first))
        if key not in self.memo:
            device = self._binding.cache.device
            places = torch.arange(longest, device=device)
            starts = torch.tensor(first, device=device)[:, None]
            ends = torch.tensor(self.batch.kv_lens, device=device)[:, None]
            held = (places >= starts) & (places < ends)
            self.memo[key] = torch.where(held, places, -1)
        return self.memo[key]  # type: ignore[no-any-return]
