"""Dense layouts: one tensor `[rows, kv_heads, capacity, ...]` for each plane of each layer.

`DynamicCache` grows geometrically as sequences do; `StaticCache` takes all its room at once and
never moves. Position p of sequence b lies at place p of row b. Which queries may see it is the
mask's business, what the planes mean the codec's. What a step sees of it is in `dense_view.py`.
"""

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.cache.dense_view import DenseBinding, Layer
from kvist.cache.lengths import cropped
from kvist.cache.protocol import SIDES, Codec, Side
from kvist.core.retention import KeepAll, Retention
from kvist.core.spec import AttentionSpec, LayerSpec
from kvist.errors import CacheError, CacheFull, UnknownLayer


class DenseCache:
    """What the dense layouts have in common; a layout says how capacity grows.

    Invariant: at rest, every place that holds no token is zero. So padding can be read without
    selecting, and what an aborted step or a cropped turn left behind can never leak.
    """

    max_chunk: int | None = None
    layout: str

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        codec: Codec,
        *,
        rows: int = 1,
        retention: Retention | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Make an empty cache.

        Args:
            specs: one for each layer, as the model gives them (`model.specs`).
            codec: how tokens are written.
            rows: sequences that it holds.
            retention: which tokens stay; all by default.
            device: where the planes lie.

        Raises:
            CacheError: a layer is recurrent, or there are no rows.
        """
        if rows < 1:
            raise CacheError(f"a cache needs at least one row, not {rows}")
        self.codec = codec
        self.retention = retention or KeepAll()
        self.device = torch.device(device)
        self.specs = tuple(self._attention_spec(spec) for spec in specs)
        # Allocated: `_rows` x `capacity` places; `_lengths` may be ahead of it by a reorder.
        self._rows = rows
        self.capacity = 0
        self._lengths = [0] * rows
        self._layers: list[Layer] = []
        # A layer may be filled late: its row b holds the positions [first[b], last[b]).
        self._first = [[0] * rows for _ in self.specs]
        self._last = [[0] * rows for _ in self.specs]
        # Rows that `reorder` promised and the next `bind` copies: row i is a copy of source[i].
        self._sources: list[int] | None = None
        # Places of each row that an uncommitted step may have written: [length, dirty).
        self._dirty = [0] * rows

    def _attention_spec(self, spec: LayerSpec) -> AttentionSpec:
        if not isinstance(spec, AttentionSpec):
            raise CacheError(f"{type(self).__name__} holds attention layers only, not {spec}")
        return self.retention.apply(spec)

    # The life of a step: bind, update for each layer, commit.

    def bind(self, batch: Batch, *, backend: str | None = None) -> DenseBinding:
        """Reserve room for the batch; see `Cache.bind`."""
        if batch.slots != tuple(range(len(self._lengths))):
            raise CacheError(
                f"the batch has the slots {list(batch.slots)}, but this cache's rows are "
                f"0..{len(self._lengths) - 1}, in order; use reorder() to drop or repeat rows"
            )
        batch.check_cached(self._lengths)
        capacity = self._capacity_for(max(batch.kv_lens, default=0))
        self._settle(capacity)
        for row, kv_len in enumerate(batch.kv_lens):
            self._dirty[row] = kv_len
        return self._binding(batch, backend)

    def _binding(self, batch: Batch, backend: str | None) -> DenseBinding:
        return DenseBinding(self, batch, backend)

    def commit(self, batch: Batch) -> None:
        """Advance the lengths; see `Cache.commit`."""
        batch.check_cached(self._lengths)
        self._lengths = list(batch.kv_lens)

    def _capacity_for(self, length: int) -> int:
        """The capacity that a step up to `length` tokens needs; raises CacheFull."""
        raise NotImplementedError

    def _settle(self, capacity: int) -> None:
        """Clear what an aborted step left, carry out a pending reorder, grow to `capacity`."""
        self._clear(self._lengths)
        rows, sources = len(self._lengths), self._sources
        if not self._layers:
            self._layers = [self._allocate(i, rows, capacity) for i in range(len(self.specs))]
        elif sources is not None or capacity > self.capacity:
            index = None if sources is None else torch.tensor(sources, device=self.device)
            self._layers = [self._moved(i, rows, capacity, index) for i in range(len(self._layers))]
        self._sources = None
        self._rows, self.capacity = rows, capacity

    def _moved(self, layer_idx: int, rows: int, capacity: int, index: Tensor | None) -> Layer:
        """A layer with the rows that `index` names (None: as they are) and this capacity."""
        old, kept = self._layers[layer_idx], max(self._lengths, default=0)
        # Beams permute rows at every step: where nothing changes size, addresses stay.
        in_place = capacity == self.capacity and rows == self._rows
        new = old if in_place else self._allocate(layer_idx, rows, capacity)
        for side in SIDES:
            for name, plane in old[side].items():
                held = plane[:, :, :kept]
                new[side][name][:, :, :kept] = held if index is None else held[index]
        return new

    # A cache outlives the step that made it grow: tensors made in inference mode could not be
    # cropped or cleared outside it.
    @torch.inference_mode(False)
    def _allocate(self, layer_idx: int, rows: int, capacity: int) -> Layer:
        spec = self.specs[layer_idx]
        return {
            side: {
                name: torch.zeros(
                    (rows, shape[0], capacity, *shape[1:]), dtype=dtype, device=self.device
                )
                for name, (shape, dtype) in self.codec.planes(spec, side, layer_idx).items()
            }
            for side in SIDES
        }

    def _clear(self, lengths: Sequence[int]) -> None:
        """Zero the places `[lengths[row], dirty[row])` of each row."""
        for row, (length, dirty) in enumerate(zip(lengths, self._dirty, strict=True)):
            if dirty > length:
                for i in range(len(self._layers)):
                    self._zero(i, row, length, dirty)
                    self._last[i][row] = min(self._last[i][row], length)
                    self._first[i][row] = min(self._first[i][row], self._last[i][row])
            self._dirty[row] = length

    def _zero(self, layer_idx: int, row: int, start: int, end: int) -> None:
        """Zero the places of the positions `[start, end)`."""
        for side in SIDES:
            for plane in self._layers[layer_idx][side].values():
                plane[row, :, start:end].zero_()

    # Going back, forking, forgetting.

    def crop(self, length: int | Sequence[int]) -> None:
        """Go back to at most `length` tokens; see `Cache.crop`."""
        lengths = cropped(self._lengths, length)
        self._materialise()
        self._clear(self._lengths)
        self._dirty, self._lengths = self._lengths, lengths
        self._clear(lengths)

    def reorder(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence `rows[i]` was; nothing is copied before the next step."""
        count = len(self._lengths)
        if not rows or any(not 0 <= r < count for r in rows):
            raise CacheError(
                f"reorder takes rows in 0..{count - 1}, at least one, not {list(rows)}"
            )
        self._clear(self._lengths)
        before = self._sources if self._sources is not None else list(range(count))
        self._sources = [before[r] for r in rows]
        self._lengths = [self._lengths[r] for r in rows]
        self._dirty = list(self._lengths)
        for bounds in (self._first, self._last):
            bounds[:] = [[layer[r] for r in rows] for layer in bounds]

    def reset(self) -> None:
        """Forget all tokens; memory is kept."""
        self.crop(0)

    def _materialise(self) -> None:
        if self._sources is not None:
            self._settle(self.capacity)

    # Looking in.

    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed tokens of each sequence."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all planes, used or free."""
        return sum(
            plane.nbytes
            for layer in self._layers
            for side in SIDES
            for plane in layer[side].values()
        )

    def get_seq_length(self, layer_idx: int = 0) -> int:
        """Tokens of the longest sequence that this layer holds."""
        self._check_layer(layer_idx)
        bounds = zip(self._first[layer_idx], self._last[layer_idx], self._lengths, strict=True)
        return max((min(last, n) - min(first, n) for first, last, n in bounds), default=0)

    # As it is written: for saving.

    def held(self, layer_idx: int, row: int) -> tuple[range, ...]:
        """Positions of a sequence that a layer holds, ascending."""
        end = min(self._last[layer_idx][row], self._lengths[row])
        return (range(min(self._first[layer_idx][row], end), end),)

    def read(self, layer_idx: int, row: int, positions: Tensor) -> dict[Side, dict[str, Tensor]]:
        """Planes of these positions `[T]`, encoded: each `[T, kv_heads, ...]`."""
        self._materialise()
        places = self._places(layer_idx, positions)
        return {
            side: {name: plane[row, :, places].transpose(0, 1) for name, plane in planes.items()}
            for side, planes in self._layers[layer_idx].items()
        }

    def lose(self, layer_idx: int, row: int, before: int) -> None:
        """Forget what a layer holds of a sequence before a position."""
        self._first[layer_idx][row] = min(before, self._last[layer_idx][row])

    def _places(self, layer_idx: int, positions: Tensor) -> Tensor:
        """Where positions lie in a row."""
        return positions

    def __len__(self) -> int:
        """How many layers it has."""
        return len(self.specs)

    def __getitem__(self, layer_idx: int) -> tuple[Tensor, Tensor]:
        """A layer's decoded keys and values, `[rows, kv_heads, length, head_dim]`.

        Shorter sequences are padded with zeros at the end.
        """
        self._check_layer(layer_idx)
        if not self._layers:
            spec = self.specs[layer_idx]
            empty = torch.zeros(len(self._lengths), spec.num_kv_heads, 0, spec.head_dim)
            return empty, empty.clone()
        self._materialise()
        self._clear(self._lengths)
        batch = Batch.pack([[] for _ in self._lengths], self._lengths, device=self.device)
        keys, values, _ = self._binding(batch, None).view(layer_idx).dense()
        return keys.transpose(1, 2), values.transpose(1, 2)

    def __iter__(self) -> Iterator[tuple[Tensor, Tensor]]:
        """Each layer's keys and values."""
        return (self[i] for i in range(len(self)))

    def __repr__(self) -> str:
        """Layers, lengths, bytes."""
        return (
            f"{type(self).__name__}(layers={len(self)}, codec={self.codec.name!r}, "
            f"retention={self.retention.name!r}, lengths={self._lengths}, nbytes={self.nbytes:,})"
        )

    def _check_layer(self, layer_idx: int) -> None:
        if not 0 <= layer_idx < len(self.specs):
            raise UnknownLayer(
                f"layer {layer_idx} is not one of this cache's {len(self.specs)} layers"
            )


class DynamicCache(DenseCache):
    """Grows geometrically: an append costs a constant amortised, never a copy for every token."""

    layout = "dynamic"

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        codec: Codec,
        *,
        rows: int = 1,
        retention: Retention | None = None,
        device: str | torch.device = "cpu",
        initial: int = 64,
    ) -> None:
        """See `DenseCache`; `initial` is the capacity of the first allocation."""
        super().__init__(specs, codec, rows=rows, retention=retention, device=device)
        self._initial = initial

    def _capacity_for(self, length: int) -> int:
        if length <= self.capacity:
            return self.capacity
        return max(length + length // 2, self._initial)


class StaticCache(DenseCache):
    """Takes `max_length` places for each row at once; addresses never change."""

    layout = "static"

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        codec: Codec,
        *,
        max_length: int,
        rows: int = 1,
        retention: Retention | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """See `DenseCache`; `max_length` is the capacity of a row in tokens."""
        super().__init__(specs, codec, rows=rows, retention=retention, device=device)
        self.max_length = max_length
        self._settle(max_length)

    def _capacity_for(self, length: int) -> int:
        if length > self.max_length:
            raise CacheFull(
                f"this step needs {length} tokens in a row, but the static cache has room for "
                f"{self.max_length}; make it with a larger max_length"
            )
        return self.max_length
