"""`PagedCache`: paged storage for the readable loop, with the smallest block manager there is.

It shows what an engine does with blocks: take them as a sequence grows, share them when it forks,
copy on write, give them back behind a window. Nothing is found again by its content; that, and many
users, are the business of core's `PagedBlockManager`.
"""

from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from heapq import heappop, heappush

import torch
from torch import Tensor

from kvist.cache.batch import Batch, int_tensor
from kvist.cache.groups import LayerGroup
from kvist.cache.lengths import cropped
from kvist.cache.paged import PagedPool
from kvist.cache.paged_view import PagedBinding
from kvist.cache.protocol import SIDES, Codec, Side
from kvist.core.plan import NULL_BLOCK, BlockCopy, GroupChanges, TableChange
from kvist.core.retention import KeepAll, Retention, first_needed
from kvist.core.spec import AttentionSpec, LayerSpec
from kvist.errors import CacheError, CacheFull


class Blocks:
    """How many rows use each block of one group; block 0 is the null block and never given away."""

    def __init__(self, num_blocks: int) -> None:
        """All free."""
        self.users = [0] * num_blocks
        self._free = list(
            range(1, num_blocks)
        )  # a heap: low numbers first, so blocks stand in rows

    @property
    def num_free(self) -> int:
        """Blocks that nobody uses."""
        return len(self._free)

    def take(self) -> int:
        """A free block, used once from now on."""
        block = heappop(self._free)
        self.users[block] = 1
        return block

    def share(self, blocks: Iterable[int]) -> None:
        """One more row uses these."""
        for block in blocks:
            if block != NULL_BLOCK:
                self.users[block] += 1

    def drop(self, blocks: Iterable[int]) -> None:
        """One row less uses these."""
        for block in blocks:
            if block != NULL_BLOCK:
                self.users[block] -= 1
                if not self.users[block]:
                    heappush(self._free, block)

    def grow(self, num_blocks: int) -> None:
        """Free blocks behind those there are."""
        for block in range(len(self.users), num_blocks):
            self.users.append(0)
            heappush(self._free, block)


@dataclass(frozen=True)
class Write:
    """A table entry that gets a new block before a step writes there."""

    row: int
    index: int
    shared: bool  # what others see there stays with them: the new block begins as a copy


class PagedCache:
    """Blocks from a pool that all rows share; a fork costs no copy before it writes.

    Invariant: row b's table holds the blocks of the positions `[0, length)` that its layers may
    still look at; entries behind a window are null. A block with several users is never written.
    """

    layout = "paged"
    max_chunk: int | None = None

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        codec: Codec,
        *,
        rows: int = 1,
        block_size: int = 16,
        num_blocks: int | None = None,
        slack: int = 16,
        retention: Retention | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Make an empty cache.

        Args:
            specs: one for each layer, as the model gives them (`model.specs`).
            codec: how tokens are written.
            rows: sequences that it holds.
            block_size: tokens of a block.
            num_blocks: blocks of each group of layers; None grows the pool geometrically.
            slack: tokens that stay behind a window, so that `crop` can go back so far
                (drafted tokens that were not accepted).
            retention: which tokens stay; all by default.
            device: where the planes lie.

        Raises:
            CacheError: a layer is recurrent, or a size makes no sense.
        """
        if rows < 1 or (num_blocks is not None and num_blocks < 1) or slack < 0:
            raise CacheError(
                f"a paged cache needs rows >= 1, num_blocks >= 1 and slack >= 0, not rows={rows}, "
                f"num_blocks={num_blocks}, slack={slack}"
            )
        self.codec = codec
        self.retention = retention or KeepAll()
        self.slack = slack
        self._fixed = num_blocks is not None
        self.pool = PagedPool(
            specs,
            codec,
            num_blocks=2 if num_blocks is None else num_blocks + 1,  # and the null block
            block_size=block_size,
            max_slots=rows,
            max_blocks=1,
            max_tokens=1,
            retention=self.retention,
            device=device,
        )
        self.blocks = [Blocks(pool.num_blocks) for pool in self.pool.pools]
        # tables[group][row] is a list of blocks; `_changes` are not in the pool's tables yet, and
        # with `_stale` none of its entries count.
        self.tables: list[list[list[int]]] = [[[] for _ in range(rows)] for _ in self.pool.groups]
        self._changes: list[list[TableChange]] = [[] for _ in self.pool.groups]
        self._stale = False
        self._lengths = [0] * rows
        self._bound: PagedBinding | None = None

    # The life of a step: bind, update for each layer, commit.

    def bind(self, batch: Batch, *, backend: str | None = None) -> PagedBinding:
        """Give every new token a place that nobody shares; see `Cache.bind`."""
        rows = len(self._lengths)
        if batch.slots != tuple(range(rows)):
            raise CacheError(
                f"the batch has the slots {list(batch.slots)}, but this cache's rows are "
                f"0..{rows - 1}, in order; use reorder() to drop or repeat rows"
            )
        batch.check_cached(self._lengths)
        writes = [self._writes(g, batch) for g in range(len(self.blocks))]
        self._make_room(batch, writes)
        changes = []
        for g, wanted in enumerate(writes):
            copies = [copy for write in wanted if (copy := self._give(g, write)) is not None]
            changes.append(GroupChanges(copies=tuple(copies), tables=self._take_changes(g)))
        self.pool.apply(changes, admitted=range(rows) if self._stale else ())
        self._stale = False
        self._bound = self.pool.bind(batch, backend=backend)
        return self._bound

    def commit(self, batch: Batch) -> None:
        """Advance the lengths and give back what lies behind windows; see `Cache.commit`.

        Raises:
            CacheError: a layer wrote nothing, so its places hold what was there before.
        """
        batch.check_cached(self._lengths)
        written = self._bound.written if self._bound else set()
        missing = sorted(self.pool.group_of.keys() - written)
        if missing and batch.num_tokens:
            raise CacheError(f"layers {missing} wrote nothing in this step, so it cannot count")
        self._lengths = list(batch.kv_lens)
        self._bound = None
        for g, group in enumerate(self.pool.groups):
            for row, length in enumerate(self._lengths):
                self._slide(g, group, row, length)

    def _writes(self, g: int, batch: Batch) -> list[Write]:
        """Entries that need a block of their own for the places that this step writes."""
        size, users = self.pool.block_size, self.blocks[g].users
        left: Counter[int] = Counter()  # users that will have let go of a shared block
        writes = []
        for row, (start, end) in enumerate(zip(batch.cached_lens, batch.kv_lens, strict=True)):
            table = self.tables[g][row]
            for index in range(start // size, -(-end // size) if end > start else 0):
                block = table[index] if index < len(table) else NULL_BLOCK
                shared = users[block] - left[block] > 1
                if shared:
                    left[block] += 1
                if shared or block == NULL_BLOCK:
                    writes.append(Write(row, index, shared))
        return writes

    def _make_room(self, batch: Batch, writes: Sequence[Sequence[Write]]) -> None:
        """Grow the pool, or raise CacheFull before anything has changed."""
        counts = []
        for blocks, wanted in zip(self.blocks, writes, strict=True):
            have, missing = len(blocks.users), len(wanted) - blocks.num_free
            if missing > 0 and self._fixed:
                raise CacheFull(
                    f"this step needs {len(wanted)} more blocks of {self.pool.block_size} tokens, "
                    f"but the paged cache has {blocks.num_free} of {have - 1} free; make it with "
                    f"more num_blocks"
                )
            counts.append(have + max(missing, have // 2) if missing > 0 else have)
        longest = -(-max(batch.kv_lens, default=0) // self.pool.block_size)
        if longest > self.pool.max_blocks:
            longest += longest // 2
        self._stale |= self.pool.reserve(
            counts, batch.num_sequences, longest, 1 << batch.num_tokens.bit_length()
        )
        for blocks, count in zip(self.blocks, counts, strict=True):
            blocks.grow(count)

    def _give(self, g: int, write: Write) -> BlockCopy | None:
        """Put a new block into a table; the copy that it has to begin with, if any."""
        blocks, table = self.blocks[g], self.tables[g][write.row]
        new = blocks.take()
        old = table[write.index] if write.index < len(table) else NULL_BLOCK
        table[write.index : write.index + 1] = [new]
        self._changes[g].append(TableChange(write.row, write.index, (new,)))
        if not write.shared:
            return None
        blocks.drop([old])
        return BlockCopy(old, new)

    def _take_changes(self, g: int) -> tuple[TableChange, ...]:
        changes, self._changes[g] = self._changes[g], []
        if self._stale:
            changes = [TableChange(row, 0, tuple(t)) for row, t in enumerate(self.tables[g])]
        return tuple(changes)

    def _slide(self, g: int, group: LayerGroup, row: int, length: int) -> None:
        """Give back the blocks that no later query of this row looks at."""
        size = self.pool.block_size
        sinks = -(-group.spec.sinks // size)
        # [sinks, first) is not needed; what was given back before lies at its beginning.
        first = first_needed(group.spec, max(length - self.slack, 0)) // size
        self._let_go(g, row, sinks, first)

    def _let_go(self, g: int, row: int, begin: int, end: int) -> None:
        """Give back a row's blocks `[begin, end)`, of which a beginning may have gone already."""
        table = self.tables[g][row]
        for index in range(min(end, len(table)) - 1, begin - 1, -1):
            if table[index] == NULL_BLOCK:
                break
            self.blocks[g].drop([table[index]])
            table[index] = NULL_BLOCK
            self._changes[g].append(TableChange(row, index, (NULL_BLOCK,)))

    # Going back, forking, forgetting.

    def crop(self, length: int | Sequence[int]) -> None:
        """Go back to at most `length` tokens; see `Cache.crop`.

        Raises:
            CacheError: a window has moved on, so what is kept could not be gone on with.
        """
        lengths = cropped(self._lengths, length)
        for g, group in enumerate(self.pool.groups):
            for row, n in enumerate(lengths):
                self._check_reach(g, group, row, n)
        for g, tables in enumerate(self.tables):
            for table, n in zip(tables, lengths, strict=True):
                end = -(-n // self.pool.block_size)
                self.blocks[g].drop(table[end:])
                del table[end:]
        self._lengths = lengths

    def _check_reach(self, g: int, group: LayerGroup, row: int, length: int) -> None:
        """Raise unless row `row` still has all that the query at `length` looks at."""
        size, table = self.pool.block_size, self.tables[g][row]
        needed = table[first_needed(group.spec, length) // size : -(-length // size)]
        if length < self._lengths[row] and NULL_BLOCK in needed:
            raise CacheError(
                f"cannot go back to {length} of {self._lengths[row]} tokens: layers with a window "
                f"of {group.spec.window} have let go of what came before; give the cache more slack"
            )

    def reorder(self, rows: Sequence[int]) -> None:
        """Make sequence i what sequence `rows[i]` was; repeated rows share their blocks."""
        count = len(self._lengths)
        if not rows or any(not 0 <= r < count for r in rows):
            raise CacheError(
                f"reorder takes rows in 0..{count - 1}, at least one, not {list(rows)}"
            )
        for g, before in enumerate(self.tables):
            after = [list(before[r]) for r in rows]
            for table in after:
                self.blocks[g].share(table)
            for table in before:
                self.blocks[g].drop(table)
            self.tables[g] = after
        self._lengths = [self._lengths[r] for r in rows]
        self._stale = True

    def reset(self) -> None:
        """Forget all tokens; memory is kept."""
        self.crop(0)

    # As it is written: for saving.

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """What each layer keeps."""
        groups, group_of = self.pool.groups, self.pool.group_of
        return tuple(groups[group_of[layer_idx]].spec for layer_idx in range(len(group_of)))

    def held(self, layer_idx: int, row: int) -> tuple[range, ...]:
        """Positions of a sequence that a layer holds, ascending."""
        size, length = self.pool.block_size, self._lengths[row]
        found: list[range] = []
        for index, block in enumerate(self.tables[self.pool.group_of[layer_idx]][row]):
            if block != NULL_BLOCK and index * size < length:
                start = index * size
                if found and found[-1].stop == start:
                    start = found.pop().start
                found.append(range(start, min((index + 1) * size, length)))
        return tuple(found)

    def read(self, layer_idx: int, row: int, positions: Tensor) -> dict[Side, dict[str, Tensor]]:
        """Planes of these positions `[T]`, encoded: each `[T, kv_heads, ...]`."""
        g, size = self.pool.group_of[layer_idx], self.pool.block_size
        table = int_tensor(self.tables[g][row], self.pool.device)
        places = table[positions // size] * size + positions % size
        return {side: self.pool.pools[g].read(layer_idx, side, places) for side in SIDES}

    def lose(self, layer_idx: int, row: int, before: int) -> None:
        """Forget the blocks behind the sinks that hold nothing from position `before` on."""
        g, size = self.pool.group_of[layer_idx], self.pool.block_size
        sinks = -(-self.pool.groups[g].spec.sinks // size)
        self._let_go(g, row, sinks, before // size)

    # Looking in.

    @property
    def lengths(self) -> tuple[int, ...]:
        """Committed tokens of each sequence."""
        return tuple(self._lengths)

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, used or free."""
        return self.pool.nbytes

    def __repr__(self) -> str:
        """Layers, lengths, blocks, bytes."""
        used = [sum(n > 0 for n in blocks.users) for blocks in self.blocks]
        total = [len(blocks.users) - 1 for blocks in self.blocks]
        return (
            f"PagedCache(layers={len(self.pool.group_of)}, codec={self.codec.name!r}, "
            f"retention={self.retention.name!r}, lengths={self._lengths}, blocks={used} of "
            f"{total} x {self.pool.block_size}, nbytes={self.nbytes:,})"
        )
