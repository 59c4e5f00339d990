"""What a model and its attention see of a paged pool for one step.

`PagedKV` reads like any other view, by gathering blocks, so every kernel works on it; kernels made
for it read planes and tables in place. Made by `PagedPool`; it allocates no blocks.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from kvist.cache.batch import Batch, int_tensor
from kvist.cache.block_pool import BlockPool
from kvist.cache.block_tables import BlockTables
from kvist.cache.protocol import KV, SIDES, Codec, Planes, Side, State
from kvist.core.plan import NULL_BLOCK
from kvist.core.retention import first_needed
from kvist.core.spec import AttentionSpec
from kvist.errors import UnknownLayer


class PagedBinding:
    """A paged pool bound to one step: the `KVCache` that a model sees."""

    def __init__(
        self,
        group_of: Mapping[int, int],
        batch: Batch,
        backend: str | None,
        views: tuple["GroupView", ...],
        kv_lens: Tensor,
        query_starts: Tensor,
        *,
        is_recorded: bool = False,
    ) -> None:
        """Made by `PagedPool.bind` and `bind_unfilled` alone."""
        self._group_of = group_of
        self.batch = batch
        self.backend = backend
        self.views = views
        self.kv_lens = kv_lens
        self.query_starts = query_starts
        self.is_recorded = is_recorded
        self.memo: dict[Any, Any] = {}
        self.written: set[int] = set()

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> KV:
        """Write this step's keys and values; see `KVCache.update`."""
        view = self._view(layer_idx)
        view.pool.write(layer_idx, "key", view.slot_mapping, key_states)
        view.pool.write(layer_idx, "value", view.slot_mapping, value_states)
        self.written.add(layer_idx)
        return PagedKV(self, view, layer_idx)

    def last_tokens(self) -> "PagedBinding":
        """What the step's last tokens alone see, behind all that it writes.

        For kernels that read planes and tables in place.
        """
        batch = self.batch.last_tokens()
        starts = torch.arange(
            batch.num_sequences + 1, dtype=torch.int32, device=self.query_starts.device
        )
        return PagedBinding(
            self._group_of,
            batch,
            self.backend,
            self.views,
            self.kv_lens,
            starts,
            is_recorded=self.is_recorded,
        )

    def put(self, layer_idx: int, planes: Mapping[Side, Planes]) -> None:
        """Write what is encoded already, each plane `[N, kv_heads, ...]`; see `update`."""
        view = self._view(layer_idx)
        for side, encoded in planes.items():
            view.pool.put(layer_idx, side, view.slot_mapping, encoded)
        self.written.add(layer_idx)

    def _view(self, layer_idx: int) -> "GroupView":
        group = self._group_of.get(layer_idx)
        if group is None:
            raise UnknownLayer(
                f"layer {layer_idx} is not one of this cache's {len(self._group_of)} layers"
            )
        return self.views[group]

    def state(self, layer_idx: int) -> State:
        """The paged layout holds no recurrent layers."""
        raise UnknownLayer(f"layer {layer_idx} is an attention layer and has no recurrent state")


@dataclass(frozen=True)
class Reach:
    """Where the keys lie that one sequence's queries may see.

    Args:
        blocks: of the pool, in the order of their positions.
        entries: those blocks' places in the table.
        length: tokens in them; behind these the last block holds nothing.
        complete: whether key i has position i.
    """

    blocks: NDArray[np.int32]
    entries: NDArray[np.int64]
    length: int
    complete: bool

    def positions(self, block_size: int) -> NDArray[np.int64]:
        """`[length]`, the position of each key."""
        places = self.entries[:, None] * block_size + np.arange(block_size)
        return places.reshape(-1)[: self.length]

    def index(self, device: torch.device) -> slice | Tensor:
        """The blocks as an index into a plane: a slice where they stand in a row, so no copy."""
        blocks = self.blocks
        first, count = (int(blocks[0]), len(blocks)) if len(blocks) else (0, 0)
        if np.array_equal(blocks, np.arange(first, first + count)):
            return slice(first, first + count)
        return torch.from_numpy(blocks).to(device)


class GroupView:
    """What the layers of one group have in common in a step."""

    def __init__(
        self,
        pool: BlockPool,
        tables: BlockTables,
        batch: Batch,
        block_table: Tensor,
        slot_mapping: Tensor,
    ) -> None:
        """Made by `PagedPool` alone; all else is computed when asked for."""
        self.pool = pool
        self.tables = tables
        self.batch = batch
        self.block_table = block_table
        self.slot_mapping = slot_mapping
        self._in_order: bool | None = None
        self._one: dict[int, tuple[slice | Tensor, int, Tensor | None]] = {}
        self._all: tuple[Tensor, Tensor, bool] | None = None

    def _entries(self, sequence: int) -> tuple[int, int, int]:
        """Entries `[0, sinks)` and `[first, end)` of the table hold all that queries may see.

        Sinks are 0 where the two meet: `[first, end)` is everything then, and first is 0.
        """
        size, spec = self.pool.block_size, self.pool.group.spec
        end = -(-self.batch.kv_lens[sequence] // size)
        first = min(first_needed(spec, self.batch.cached_lens[sequence]) // size, end)
        sinks = -(-spec.sinks // size)
        return (0, 0, end) if first <= sinks else (sinks, first, end)

    def reach(self, sequence: int) -> Reach:
        """Where the keys lie that one sequence's queries may see, on the host."""
        size = self.pool.block_size
        sinks, first, end = self._entries(sequence)
        entries = np.arange(first, end)
        if sinks:
            entries = np.concatenate([np.arange(sinks), entries])
        blocks = self.tables.host[self.batch.slots[sequence]][entries]
        held = blocks != NULL_BLOCK
        if not held.all():
            entries, blocks = entries[held], blocks[held]
        # The last block of the table may be full up to the sequence's end only.
        unused = end * size - self.batch.kv_lens[sequence]
        ends = len(entries) > 0 and entries[-1] == end - 1
        length = len(entries) * size - (unused if ends else 0)
        return Reach(blocks, entries, length, complete=len(entries) == end)

    @property
    def in_order(self) -> bool:
        """Whether for every sequence key i has position i."""
        if self._in_order is None:
            spans = [self._entries(i) for i in range(self.batch.num_sequences)]
            ends = np.array([end for _, _, end in spans])
            whole = all(first == 0 for _, first, _ in spans)
            if whole and spans:
                table = self.tables.host[list(self.batch.slots), : ends.max()]
                inside = np.arange(ends.max()) < ends[:, None]
                whole = not ((table == NULL_BLOCK) & inside).any()
            self._in_order = whole
        return self._in_order

    def one(self, sequence: int) -> tuple[slice | Tensor, int, Tensor | None]:
        """One sequence's blocks as an index into planes, its length, its key positions."""
        if sequence not in self._one:
            device = self.pool.device
            reach = self.reach(sequence)
            positions = None
            if not reach.complete:
                positions = torch.from_numpy(reach.positions(self.pool.block_size)).to(device)
            self._one[sequence] = reach.index(device), reach.length, positions
        return self._one[sequence]

    def all(self) -> tuple[Tensor, Tensor, bool]:
        """All sequences' blocks `[B, n]`, key positions `[B, T]`, and whether none is absent."""
        if self._all is None:
            self._all = self._aligned() if self.in_order else self._compacted()
        return self._all

    def _aligned(self) -> tuple[Tensor, Tensor, bool]:
        """The block table itself: place t of every sequence has position t, up to its length."""
        batch, device = self.batch, self.pool.device
        longest = max(batch.kv_lens, default=0)
        blocks = self.block_table[:, : -(-longest // self.pool.block_size)]
        places = torch.arange(longest, device=device)
        if len(set(batch.kv_lens)) <= 1:
            return blocks, places.expand(batch.num_sequences, longest), True
        lengths = int_tensor(batch.kv_lens, device)[:, None]
        return blocks, torch.where(places < lengths, places, -1), False

    def _compacted(self) -> tuple[Tensor, Tensor, bool]:
        """Without the blocks that no query may see; sequences are padded with the null block."""
        device = self.pool.device
        reaches = [self.reach(i) for i in range(self.batch.num_sequences)]
        longest = max(r.length for r in reaches)
        blocks = np.zeros((len(reaches), max(len(r.blocks) for r in reaches)), dtype=np.int32)
        positions = np.full((len(reaches), longest), -1, dtype=np.int64)
        for row, reach in enumerate(reaches):
            blocks[row, : len(reach.blocks)] = reach.blocks
            positions[row, : reach.length] = reach.positions(self.pool.block_size)
        complete = all(reach.length == longest for reach in reaches)
        return torch.from_numpy(blocks).to(device), torch.from_numpy(positions).to(device), complete


class PagedKV:
    """One layer of a paged pool, readable by attention: gathered, or in place by kernels.

    A kernel reads sequence b's token at position p from place `p % block_size` of block
    `block_table[b, p // block_size]` of each plane, masks its loads by `kv_lens[b]`, and takes a
    null entry as absent.
    """

    __slots__ = ("_binding", "_view", "layer_idx")

    def __init__(self, binding: PagedBinding, view: GroupView, layer_idx: int) -> None:
        """Made by `PagedBinding.update` alone."""
        self._binding = binding
        self._view = view
        self.layer_idx = layer_idx

    @property
    def batch(self) -> Batch:
        """The step's lengths and positions."""
        return self._binding.batch

    @property
    def backend(self) -> str | None:
        """The kernel asked for by name."""
        return self._binding.backend

    @property
    def memo(self) -> dict[Any, Any]:
        """Scratch that lives as long as the step."""
        return self._binding.memo

    @property
    def is_recorded(self) -> bool:
        """Whether later steps will run what this one starts: the batch's lengths are the most."""
        return self._binding.is_recorded

    @property
    def spec(self) -> AttentionSpec:
        """The layer's heads, window and sinks."""
        return self._view.pool.group.spec

    @property
    def codec(self) -> Codec:
        """What the planes mean."""
        return self._view.pool.codec

    @property
    def block_size(self) -> int:
        """Token places of a block."""
        return self._view.pool.block_size

    @property
    def block_table(self) -> Tensor:
        """`[B, max_blocks]` int32; entries past a sequence's length are not to be read."""
        return self._view.block_table

    @property
    def slot_mapping(self) -> Tensor:
        """`[N]` int64, the place `block * block_size + i` of each new token."""
        return self._view.slot_mapping

    @property
    def kv_lens(self) -> Tensor:
        """`[B]` int32, keys of each sequence, this step's included."""
        return self._binding.kv_lens

    @property
    def query_starts(self) -> Tensor:
        """`[B + 1]` int32, where each sequence's rows begin in the packed tensors."""
        return self._binding.query_starts

    def planes(self, side: Side) -> dict[str, Tensor]:
        """The codec's planes, each `[blocks, block_size, kv_heads, ...]`, contiguous."""
        return self._view.pool.planes[self.layer_idx][side]

    @property
    def in_order(self) -> bool:
        """Whether every sequence's key i has position i, none absent."""
        return self._view.in_order

    @property
    def dense_is_view(self) -> bool:
        """Blocks have to be gathered."""
        return False

    def dense(self) -> tuple[Tensor, Tensor, Tensor]:
        """All sequences, padded at the end; see `KV.dense`. Leaves out what no query may see."""
        if self.batch.num_sequences == 1:
            keys, values, positions = self.sequence(0)
            if positions is None:
                positions = torch.arange(keys.shape[0], device=keys.device)
            return keys[None], values[None], positions[None]
        blocks, positions, complete = self._view.all()
        keys, values = (self._gather(side, blocks, positions.shape[1]) for side in SIDES)
        if not complete:
            absent = (positions < 0)[:, :, None, None]
            keys, values = keys.masked_fill(absent, 0), values.masked_fill(absent, 0)
        return keys, values, positions

    def sequence(self, index: int) -> tuple[Tensor, Tensor, Tensor | None]:
        """One sequence, without padding; see `KV.sequence`. Leaves out what no query may see."""
        blocks, length, positions = self._view.one(index)
        keys, values = (self._read(side, blocks, length) for side in SIDES)
        return keys, values, positions

    def observe(self, q: Tensor) -> None:
        """Positional retention does not look at queries."""

    def _read(self, side: Side, blocks: slice | Tensor, length: int) -> Tensor:
        """`[length, kv_heads, head_dim]`, the first tokens of some blocks."""
        planes = {}
        for name, plane in self.planes(side).items():
            taken = plane[blocks] if isinstance(blocks, slice) else plane.index_select(0, blocks)
            planes[name] = taken.flatten(0, 1)[:length]
        return self.codec.decode(planes, side, self.layer_idx)

    def _gather(self, side: Side, blocks: Tensor, length: int) -> Tensor:
        """`[B, length, kv_heads, head_dim]`, the first tokens of each row of blocks."""
        count, width = blocks.shape
        index, places = blocks.reshape(-1), width * self.block_size
        planes = {
            name: plane.index_select(0, index).view(count, places, *plane.shape[2:])[:, :length]
            for name, plane in self.planes(side).items()
        }
        return self.codec.decode(planes, side, self.layer_idx)
