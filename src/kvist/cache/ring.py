"""The ring layout: layers with a window keep what the window needs, however long a sequence grows.

The first positions (sinks) have places of their own; behind them lies a ring, in which position p
overwrites p - size. Layers without a window, and those whose window is no shorter than what the
sequences may reach, grow as in `DynamicCache`, side by side in one cache.

A step writes before it reads, so its first query must still find its window when its last token is
written: size >= window + max_chunk - 1. Callers cut prompts to `max_chunk`. What the ring has
beyond that (`slack`) is how far `crop` can always go back.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.cache.dense import DynamicCache
from kvist.cache.dense_view import DenseBinding, DenseKV, Layer
from kvist.cache.lengths import cropped
from kvist.cache.protocol import SIDES, Codec
from kvist.core.retention import Retention, first_needed
from kvist.core.spec import AttentionSpec, LayerSpec
from kvist.errors import CacheError

MAX_CHUNK = 256
SLACK = 32


class RingCache(DynamicCache):
    """Windows in rings, everything else growing.

    Invariant: of row b, a layer with a ring holds the positions `[0, sinks)` and `[lost, length)`,
    where lost is no less than what an aborted step may have overwritten. Places of other positions
    hold anything at all.
    """

    layout = "ring"

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        codec: Codec,
        *,
        rows: int = 1,
        retention: Retention | None = None,
        device: str | torch.device = "cpu",
        max_length: int | None = None,
        max_chunk: int = MAX_CHUNK,
        slack: int = SLACK,
    ) -> None:
        """Make an empty cache; for what is not here see `DenseCache`.

        Args:
            specs: one for each layer, as the model gives them (`model.specs`).
            codec: how tokens are written.
            rows: sequences that it holds.
            retention: which tokens stay; all by default.
            device: where the planes lie.
            max_length: tokens that a sequence may reach. A ring that would not be smaller is not
                made; None makes one for every window.
            max_chunk: most new tokens of a sequence in one step.
            slack: tokens by which `crop` can go back, whatever was written since.

        Raises:
            CacheError: a size makes no sense.
        """
        if max_chunk < 1 or slack < 0:
            raise CacheError(
                f"a ring cache needs max_chunk >= 1 and slack >= 0, not max_chunk={max_chunk}, "
                f"slack={slack}"
            )
        super().__init__(specs, codec, rows=rows, retention=retention, device=device)
        # By spec: layers of equal spec keep the same positions.
        sizes = {spec: ring_size(spec, max_length, max_chunk, slack) for spec in self.specs}
        self.ring_sizes = {spec: size for spec, size in sizes.items() if size is not None}
        if self.ring_sizes:
            self.max_chunk = max_chunk
        self._lost = {spec: [0] * rows for spec in self.ring_sizes}

    def bind(self, batch: Batch, *, backend: str | None = None) -> DenseBinding:
        """Reserve room for the batch; see `Cache.bind`.

        Raises:
            CacheError: a sequence has more than `max_chunk` new tokens.
        """
        longest = max(batch.query_lens, default=0)
        if self.max_chunk is not None and longest > self.max_chunk:
            raise CacheError(
                f"this step has {longest} new tokens of a sequence, but the ring cache takes at "
                f"most {self.max_chunk} at once; split the prompt, or make it with a larger "
                f"max_chunk"
            )
        bound = super().bind(batch, backend=backend)
        for spec, lost in self._lost.items():
            for row, (new, end) in enumerate(zip(batch.query_lens, batch.kv_lens, strict=True)):
                if new:
                    lost[row] = max(lost[row], end - self.ring_sizes[spec])
        return bound

    def _binding(self, batch: Batch, backend: str | None) -> DenseBinding:
        return RingBinding(self, batch, backend)

    def crop(self, length: int | Sequence[int]) -> None:
        """Go back to at most `length` tokens; see `Cache.crop`.

        Raises:
            CacheError: what the window would need there has been overwritten; nothing has changed.
        """
        lengths = cropped(self._lengths, length)
        for spec, lost in self._lost.items():
            for row, (n, before) in enumerate(zip(lengths, self._lengths, strict=True)):
                needed = max(first_needed(spec, n), spec.sinks)
                if n < before and needed < min(lost[row], n):
                    raise CacheError(
                        f"cannot go back to {n} of {before} tokens: layers with a window of "
                        f"{spec.window} have let go of what came before {lost[row]}; give the "
                        f"cache more slack"
                    )
        super().crop(length)
        for lost in self._lost.values():
            lost[:] = [min(a, b) for a, b in zip(lost, lengths, strict=True)]

    def reorder(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence `rows[i]` was; see `Cache.reorder`."""
        super().reorder(rows)
        for lost in self._lost.values():
            lost[:] = [lost[row] for row in rows]

    # Rings in place of rows that grow.

    def _allocate(self, layer_idx: int, rows: int, capacity: int) -> Layer:
        spec = self.specs[layer_idx]
        if spec in self.ring_sizes:
            capacity = spec.sinks + self.ring_sizes[spec]
        return super()._allocate(layer_idx, rows, capacity)

    def _moved(self, layer_idx: int, rows: int, capacity: int, index: Tensor | None) -> Layer:
        if self.specs[layer_idx] not in self.ring_sizes:
            return super()._moved(layer_idx, rows, capacity, index)
        old = self._layers[layer_idx]
        if index is None:
            return old  # a ring does not grow
        new = old if rows == self._rows else self._allocate(layer_idx, rows, capacity)
        for side in SIDES:
            for name, plane in old[side].items():
                new[side][name].copy_(plane[index])
        return new

    def _zero(self, layer_idx: int, row: int, start: int, end: int) -> None:
        if self.specs[layer_idx] not in self.ring_sizes:
            super()._zero(layer_idx, row, start, end)

    # Looking in.

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence that this layer holds."""
        self._check_layer(layer_idx)
        rows = range(len(self._lengths))
        return max(sum(map(len, self.held(layer_idx, row))) for row in rows)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """A layer's decoded keys and values, `[rows, kv_heads, T, head_dim]`.

        T tokens are held of the longest sequence, in the order of their positions; what a window
        has let go of is not among them. Shorter ones are padded with zeros at the end.
        """
        self._check_layer(layer_idx)
        if not self._layers or self.specs[layer_idx] not in self.ring_sizes:
            return super().__getitem__(layer_idx)
        self._materialise()
        batch = Batch.pack([[] for _ in self._lengths], self._lengths, device=self.device)
        keys, values, positions = self._binding(batch, None).view(layer_idx).dense()
        last = torch.iinfo(positions.dtype).max  # absent places behind all others
        order = positions.masked_fill(positions < 0, last).argsort(dim=-1)
        order = order[:, : self.get_seq_length(layer_idx), None, None]
        keys, values = (x.take_along_dim(order, dim=1).transpose(1, 2) for x in (keys, values))
        return keys, values

    def held(self, layer_idx: int, row: int) -> tuple[range, ...]:
        """Positions of a sequence that a layer holds, ascending; see `DenseCache.held`."""
        spec = self.specs[layer_idx]
        [whole] = super().held(layer_idx, row)
        if spec not in self.ring_sizes or self._lost[spec][row] <= spec.sinks:
            return (whole,)
        sinks = range(whole.start, min(spec.sinks, whole.stop))
        window = range(max(whole.start, self._lost[spec][row]), whole.stop)
        return (sinks, window) if sinks else (window,)

    def lose(self, layer_idx: int, row: int, before: int) -> None:
        """Forget what a layer's ring holds of a sequence before a position."""
        spec = self.specs[layer_idx]
        if spec in self.ring_sizes:
            self._lost[spec][row] = max(self._lost[spec][row], before)
        else:
            super().lose(layer_idx, row, before)

    def _places(self, layer_idx: int, positions: Tensor) -> Tensor:
        spec = self.specs[layer_idx]
        if spec not in self.ring_sizes:
            return positions
        return ring_places(spec, self.ring_sizes[spec], positions)


def ring_size(
    spec: AttentionSpec,
    max_length: int | None = None,
    max_chunk: int = MAX_CHUNK,
    slack: int = SLACK,
) -> int | None:
    """Places of a layer's ring, sinks apart; None where it grows instead; see `RingCache`."""
    if spec.window is None:
        return None
    size = spec.window + max_chunk - 1 + slack
    return size if max_length is None or spec.sinks + size < max_length else None


def ring_places(spec: AttentionSpec, size: int, positions: Tensor) -> Tensor:
    """Where positions lie: sinks at their own places, the others round and round behind them."""
    return torch.where(
        positions < spec.sinks, positions, spec.sinks + (positions - spec.sinks) % size
    )


class RingBinding(DenseBinding):
    """A ring cache bound to one step: the `KVCache` that a model sees."""

    cache: RingCache

    def view(self, layer_idx: int) -> DenseKV:
        """The layer as this step's queries may see it."""
        ring = self.cache.specs[layer_idx] in self.cache.ring_sizes
        return RingKV(self, layer_idx) if ring else DenseKV(self, layer_idx)

    def ring_size(self, layer_idx: int) -> int:
        """Places of the layer's ring; see `DenseBinding.ring_size`."""
        return self.cache.ring_sizes.get(self.cache.specs[layer_idx], 0)

    def _write(self, layer_idx: int, plane: Tensor, tokens: Tensor) -> None:
        spec = self.cache.specs[layer_idx]
        size = self.cache.ring_sizes.get(spec)
        if size is None or max(self.batch.kv_lens, default=0) <= spec.sinks + size:
            super()._write(layer_idx, plane, tokens)
            return
        key = ("ring places", spec)
        if key not in self.memo:
            self.memo[key] = ring_places(spec, size, self.batch.positions)
        plane[self.batch.sequence_index, :, self.memo[key]] = tokens.to(plane.dtype)


class RingKV(DenseKV):
    """One layer's rings, readable by attention. Until a ring is full it reads like a dense row."""

    __slots__ = ()

    @property
    def _cache(self) -> RingCache:
        cache = self._binding.cache
        assert isinstance(cache, RingCache)
        return cache

    @property
    def in_order(self) -> bool:
        """Whether every sequence's key i has position i: late layers and full rings have not."""
        return super().in_order and max(self._cache._lost[self.spec]) <= self.spec.sinks

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sequences, padded at the end; see `KV.dense`."""
        positions = self._positions(max(self.batch.kv_lens, default=0))
        keys, values = (self._decode(side, slice(None), positions.shape[1]) for side in SIDES)
        if not all(self._complete(row, positions.shape[1]) for row in range(len(positions))):
            absent = (positions < 0)[:, :, None, None]
            keys, values = (x.masked_fill(absent, 0) for x in (keys, values))
        return keys, values, positions

    def sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One sequence, without padding; see `KV.sequence`."""
        cache = self._cache
        if cache._lost[self.spec][index] <= self.spec.sinks:
            return super().sequence(index)
        positions = self._positions(max(self.batch.kv_lens))[index]
        keys, values = (self._decode(side, index, len(positions)) for side in SIDES)
        if not self._complete(index, len(positions)):
            absent = (positions < 0)[:, None, None]
            keys, values = (x.masked_fill(absent, 0) for x in (keys, values))
        return keys, values, positions

    def _complete(self, row: int, places: int) -> bool:
        """Whether each of a row's first places holds a token."""
        cache, end = self._cache, self.batch.kv_lens[row]
        if cache._first[self._layer_idx][row] > 0:
            return False
        lost = max(cache._lost[self.spec][row], self.spec.sinks)
        return end - lost + self.spec.sinks >= places

    def _positions(self, longest: int) -> Tensor:
        """`[B, P]`, the position that each place holds; -1 where it holds none."""
        cache, spec = self._cache, self.spec
        size, lost = cache.ring_sizes[spec], cache._lost[spec]
        first = cache._first[self._layer_idx]
        key = ("ring positions", spec, tuple(first))
        if key not in self.memo:
            ints = [self.batch.kv_lens, [max(x, spec.sinks) for x in lost], first]
            ends, held, starts = torch.tensor(ints, device=cache.device)[:, :, None]
            places = torch.arange(min(longest, spec.sinks + size), device=cache.device)
            # The last position in [0, end) that is equal to the place modulo the ring's size.
            newest = ends - 1 - (ends - 1 - places) % size
            in_ring = torch.where(newest >= held, newest, -1)
            in_sinks = torch.where(places < ends, places, -1)
            positions = torch.where(places < spec.sinks, in_sinks, in_ring)
            self.memo[key] = torch.where(positions >= starts, positions, -1)
        return self.memo[key]  # type: ignore[no-any-return]
