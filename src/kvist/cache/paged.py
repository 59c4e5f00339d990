"""The paged layout: tokens lie in blocks, and tables say which block holds which of them.

`PagedPool` is the storage of all layers and sequences of an engine, one pool and one set of tables
for each group of layers; `bind` gives the view that a model and its attention see for one step
(`paged_view.py`). Who gets which block is decided elsewhere: by core's block manager in the engine,
by `PagedCache` in the readable loop.
"""

from collections.abc import Iterable, Sequence

import torch

from kvist.cache.batch import Batch, fill_ints
from kvist.cache.block_pool import BlockPool
from kvist.cache.block_tables import BlockTables
from kvist.cache.groups import group_layers
from kvist.cache.host import HostPool
from kvist.cache.paged_view import GroupView, PagedBinding
from kvist.cache.protocol import Codec
from kvist.core.plan import GroupChanges
from kvist.core.retention import Retention
from kvist.core.spec import LayerSpec
from kvist.errors import CacheError


class PagedPool:
    """Blocks and block tables of all groups of layers.

    A plan is carried out by `apply` and `bind`, in this order, and needs no commit: the pool knows
    no lengths, so a step that was aborted is simply written over.

    Args:
        specs: one for each layer (`model.specs`).
        codec: how tokens are written.
        num_blocks: of each group (or of every one), the null block included; see `blocks_for`.
        block_size: token places of a block.
        max_slots: sequences at a time; slot `max_slots` (`null_slot`) is for padding a batch.
        max_blocks: blocks of the longest sequence.
        max_tokens: most new tokens of a step.
        host_blocks: blocks of each group's (or of every) host tier.
        retention: which tokens stay; all by default.
        device: where the planes lie.
    """

    def __init__(
        self,
        specs: Sequence[LayerSpec],
        codec: Codec,
        *,
        num_blocks: int | Sequence[int],
        block_size: int,
        max_slots: int,
        max_blocks: int,
        max_tokens: int,
        host_blocks: int | Sequence[int] = 0,
        retention: Retention | None = None,
        device: str | torch.device = "cpu",
    ) -> None:
        """Allocate everything that a step will need."""
        self.codec = codec
        self.block_size = block_size
        self.device = torch.device(device)
        self.groups = group_layers(specs, retention)
        self.group_of = {i: g for g, group in enumerate(self.groups) for i in group.layers}
        self.pools = tuple(
            BlockPool(group, codec, num_blocks=n, block_size=block_size, device=device)
            for group, n in zip(self.groups, self._for_each_group(num_blocks), strict=True)
        )
        self.hosts = tuple(
            HostPool(pool, n)
            for pool, n in zip(self.pools, self._for_each_group(host_blocks), strict=True)
        )
        self._make_tables(max_slots, max_blocks, max_tokens)

    def _for_each_group(self, count: int | Sequence[int]) -> Sequence[int]:
        return [count] * len(self.groups) if isinstance(count, int) else count

    @torch.inference_mode(False)
    def _make_tables(self, max_slots: int, max_blocks: int, max_tokens: int) -> None:
        self.max_slots, self.max_blocks, self.max_tokens = max_slots, max_blocks, max_tokens
        self.tables = tuple(
            BlockTables(max_slots, max_blocks, max_tokens, self.device) for _ in self.groups
        )
        # Rows: slots, kv_lens, query starts; rewritten by each step, always at one address.
        self._per_sequence = torch.zeros(3, max_slots + 1, dtype=torch.int32, device=self.device)

    @property
    def null_slot(self) -> int:
        """The slot without blocks: rows that only pad a batch name it, with one key."""
        return self.max_slots

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks on the device, used or free."""
        return sum(pool.nbytes for pool in self.pools)

    def apply(self, changes: Sequence[GroupChanges], admitted: Iterable[int] = ()) -> None:
        """Do what a plan asks for before its forward pass.

        Args:
            changes: one for each group, or none at all.
            admitted: slots that new sequences take; their tables start out null.
        """
        admitted = list(admitted)
        for tables in self.tables:
            tables.clear(admitted)
        for g, change in enumerate(changes):
            self.hosts[g].save(change.saves)
            self.hosts[g].load(change.loads)
            self.pools[g].copy_blocks(change.copies)
            self.tables[g].apply(change.tables)

    def bind(self, batch: Batch, *, backend: str | None = None) -> PagedBinding:
        """The view of one step. Fills buffers that stay where they are; asks the device nothing.

        Args:
            batch: its `slots` are rows of the tables, which have blocks for all its tokens.
            backend: the attention kernel by name; None lets `attend` choose.

        Raises:
            CacheError: more sequences, tokens or blocks than the pool was made for.
        """
        count, longest = batch.num_sequences, max(batch.kv_lens, default=0)
        width = -(-longest // self.block_size)
        for what, n, limit in (
            ("sequences", count, self.max_slots),
            ("new tokens", batch.num_tokens, self.max_tokens),
            (f"blocks of {self.block_size} tokens for a sequence", width, self.max_blocks),
        ):
            if n > limit:
                raise CacheError(f"this step has {n} {what}; the pool was made for {limit}")
        starts = [start for start, _ in batch.query_spans]
        # Three rows of max_slots + 1, so that one copy of constant size carries them all.
        padding = [0] * (self.max_slots - count)
        rows = [*batch.slots, 0, *padding, *batch.kv_lens, 0, *padding]
        rows += [*starts, batch.num_tokens, *padding]
        fill_ints(self._per_sequence, rows)
        slots = self._per_sequence[0, :count]
        views = tuple(
            GroupView(
                pool,
                tables,
                batch,
                *tables.bind(slots, width, batch.sequence_index, batch.positions, self.block_size),
            )
            for pool, tables in zip(self.pools, self.tables, strict=True)
        )
        kv_lens, query_starts = self._per_sequence[1, :count], self._per_sequence[2, : count + 1]
        return PagedBinding(self.group_of, batch, backend, views, kv_lens, query_starts)

    def bind_unfilled(self, batch: Batch, *, backend: str | None = None) -> PagedBinding:
        """The view of a step whose lengths, tables and places somebody else fills on the device.

        For recordings of a step: those buffers, each a prefix of the pool's own, are the same for
        every step of as many sequences and tokens.
        """
        count = batch.num_sequences
        views = tuple(
            GroupView(pool, tables, batch, *tables.buffers(count, batch.num_tokens))
            for pool, tables in zip(self.pools, self.tables, strict=True)
        )
        kv_lens, query_starts = self._per_sequence[1, :count], self._per_sequence[2, : count + 1]
        return PagedBinding(
            self.group_of, batch, backend, views, kv_lens, query_starts, is_recorded=True
        )

    def reserve(
        self, num_blocks: Sequence[int], max_slots: int, max_blocks: int, max_tokens: int
    ) -> bool:
        """Grow to at least these sizes; returns whether the tables were made anew, all null.

        Moves what it grows: for caches that grow between steps, not for a pool that serves.
        """
        for pool, needed in zip(self.pools, num_blocks, strict=True):
            if needed > pool.num_blocks:
                pool.grow(needed)
        asked = (max_slots, max_blocks, max_tokens)
        have = (self.max_slots, self.max_blocks, self.max_tokens)
        if all(n <= limit for n, limit in zip(asked, have, strict=True)):
            return False
        self._make_tables(*map(max, asked, have))
        return True
