"""The block manager: which sequence owns which block, in every group of layers.

It shares published blocks between sequences, copies on write, frees behind windows, evicts by
recency and keeps the host tier. It sees no bytes: what has to move goes into the plan. The
scheduler calls it; `check` proves its books.
"""

from collections.abc import Mapping, Sequence

from kvist.core.audit import check_books
from kvist.core.host_tier import HostTier
from kvist.core.matching import longest_match
from kvist.core.plan import NULL_BLOCK, BlockCopy, GroupChanges, HostMove, TableChange
from kvist.core.pool import Pool
from kvist.core.prefix import PrefixIndex, PrefixKeys, PrefixMatch
from kvist.core.tables import BlockTable, CacheGroup, Moves
from kvist.errors import CacheError


class PagedBlockManager:
    """Blocks of several groups under one set of sequences; implements `protocols.BlockManager`.

    A step goes `step = n`, any number of `open`, `allocate`, `fork`, ..., then `collect`, and
    `settle(n)` once the plan is committed. Exporting a prefix is `open`, read `blocks_of`, `free`;
    importing one is `open`, write `blocks_of`, `publish`, `free`.

    Args:
        groups: one pool each; equal specs belong in one group.
        block_size: token places of a block, the same in every group.
        prefix_cache: whether computed blocks are found again by later sequences.
        slack: how far behind the committed length windows are kept, for `fork` and `truncate`.
        save_ahead: with a host tier, how many blocks should be ready to be reused without a loss;
            better more than two steps take. None: a quarter of the pool.
        max_forgotten: prefixes without bytes that are remembered, to explain misses.
    """

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        block_size: int,
        *,
        prefix_cache: bool = True,
        slack: int = 1,
        save_ahead: int | None = None,
        max_forgotten: int | None = None,
    ) -> None:
        if not groups or block_size < 1 or any(g.num_blocks < 2 for g in groups):
            raise CacheError(
                f"a block manager needs a group, block_size >= 1 (not {block_size}) and at least "
                f"2 blocks a group (not {[g.num_blocks for g in groups]}): block 0 holds nothing"
            )
        self.groups = tuple(groups)
        self.block_size = block_size
        self.prefix_cache = prefix_cache
        self.slack = slack
        most = max(g.num_blocks for g in groups)
        self.save_ahead = max(16, most // 4) if save_ahead is None else save_ahead
        self.step = 0
        if max_forgotten is None:
            max_forgotten = 4 * max(g.num_blocks + g.host_blocks for g in groups)
        self.index = PrefixIndex(block_size, len(groups), max_forgotten)
        self.pools = [Pool(self.index, i, g.num_blocks) for i, g in enumerate(groups)]
        self.hosts = [
            HostTier(self.index, i, g.host_blocks, leaves_first=g.spec.window is None)
            for i, g in enumerate(groups)
        ]
        self.num_saved = self.num_loaded = self.num_copied = 0
        self._tables: dict[int, BlockTable] = {}
        self._changed: dict[int, BlockTable] = {}
        self._moves = Moves.of(len(groups))
        self._in_flight: dict[int, Moves] = {}

    # -- questions ---------------------------------------------------------------------------

    def match(self, keys: PrefixKeys, limit: int) -> PrefixMatch:
        """The longest cached prefix of at most `limit` tokens that all groups can resume from.

        A question: nothing is owned, kept alive or moved by it. Whole blocks only.
        """
        if not self.prefix_cache:
            return PrefixMatch()
        return longest_match(self.groups, self.index, keys, limit)

    def room(self, key: int, limit: int) -> int:
        """The longest length, at most `limit`, that `allocate` would accept now."""
        table = self._tables[key]
        for g, pool in enumerate(self.pools):
            copies = self._tail_to_copy(table, g) is not None
            spare = pool.num_available - copies
            limit = min(limit, table.capacity + spare * self.block_size)
            if spare < 0:
                limit = min(limit, table.num_tokens)
        return max(limit, table.num_tokens)

    def can_fork(self, parent: int, num_tokens: int) -> bool:
        """Whether the parent has computed, and still has, what resuming at `num_tokens` reads."""
        table = self._tables[parent]
        return num_tokens <= table.committed and self._reaches_back_to(table, num_tokens)

    def most_blocks(self, num_tokens: int, chunk: int) -> list[int]:
        """Per group, the most blocks a sequence owns on its way to `num_tokens` in such chunks."""
        return [g.most_blocks(num_tokens, chunk, self.slack, self.block_size) for g in self.groups]

    def opening_costs(self, keys: PrefixKeys, match: PrefixMatch, num_tokens: int) -> list[int]:
        """Per group, blocks a sequence takes from the pool on its way to `num_tokens`.

        Matched blocks that others own already cost nothing.
        """
        costs = self.most_blocks(num_tokens, self.block_size)
        for config, pool, g in self._each():
            for i in config.needed(match.num_blocks, self.block_size):
                block = keys.nodes[i].blocks[g]
                costs[g] -= block != NULL_BLOCK and pool.owners[block] > 0
        return costs

    def num_blocks_of(self, key: int) -> list[int]:
        """Per group, how many blocks the sequence's table points at."""
        table = self._tables[key]
        return [len(row) - row.count(NULL_BLOCK) for row in table.blocks]

    def blocks_of(self, key: int, group: int) -> tuple[int, ...]:
        """The sequence's block table in one group."""
        return tuple(self._tables[key].blocks[group])

    # -- a sequence's life -------------------------------------------------------------------

    def open(self, key: int, keys: PrefixKeys, match: PrefixMatch, num_tokens: int) -> bool:
        """Own the matched blocks, and room for `num_tokens >= match.num_tokens` in all.

        `match` must be fresh: nothing may have happened since it was asked for. Blocks in the host
        tier get a block in the pool and are loaded by the plan being made. All or nothing.
        """
        if key in self._tables:
            raise CacheError(f"sequence {key} already has blocks; free it first")
        size = self.block_size
        hit = match.num_blocks
        num_new = -(-num_tokens // size) - hit
        wanted: list[Sequence[int]] = []
        for config, pool, g in self._each():
            needed = config.needed(hit, size)
            here = [keys.nodes[i].blocks[g] for i in needed]
            # Matched blocks that nobody owns stop being available when this sequence owns them.
            cost = num_new + here.count(NULL_BLOCK)
            cost += sum(pool.is_spare(block) for block in here if block != NULL_BLOCK)
            if cost > pool.num_available:
                return False
            wanted.append(needed)
        rows = []
        for (_, pool, g), needed in zip(self._each(), wanted, strict=True):
            row = [NULL_BLOCK] * hit
            absent = []
            for i in needed:
                block = row[i] = keys.nodes[i].blocks[g]
                if block == NULL_BLOCK:
                    absent.append(i)
                else:
                    pool.own(block)
            for i, block in zip(absent, pool.take(len(absent), self.step), strict=True):
                self._load(g, keys.nodes[i].hosts[g], block)
                pool.publish(block, keys.nodes[i])
                row[i] = block
            row += pool.take(num_new, self.step)
            rows.append(row)
        table = BlockTable(keys, rows, match.num_tokens, size)
        table.num_tokens = num_tokens
        self._tables[key] = self._changed[key] = table
        return True

    def allocate(self, key: int, num_tokens: int) -> bool:
        """Room for `num_tokens` in all, and the right to write behind those it had; or nothing.

        A last block that others share, or might, is replaced by a copy.
        """
        table = self._tables[key]
        if num_tokens <= table.capacity and not table.tail_may_be_shared:
            table.num_tokens = max(num_tokens, table.num_tokens)
            return True
        if num_tokens <= table.num_tokens:
            return True
        num_new = max(0, -(-(num_tokens - table.capacity) // self.block_size))
        tails = [self._tail_to_copy(table, g) for g in range(len(self.pools))]
        for pool, tail in zip(self.pools, tails, strict=True):
            if num_new + (tail is not None) > pool.num_available:
                return False
        for g, (pool, tail) in enumerate(zip(self.pools, tails, strict=True)):
            if tail is not None:
                copy = pool.take(1, self.step)[0]
                self._copy(g, tail, copy)
                pool.disown(tail)
                table.put(g, table.num_tokens // self.block_size, copy)
            if num_new:
                fresh = pool.take(num_new, self.step)
                table.changes.append((g, len(table.blocks[g]), tuple(fresh)))
                table.blocks[g] += fresh
        table.capacity += num_new * self.block_size
        table.num_tokens = num_tokens
        table.tail_may_be_shared = False
        self._changed[key] = table
        return True

    def publish(self, key: int, num_tokens: int) -> None:
        """The first `num_tokens` are computed: share full blocks, free those behind windows."""
        table = self._tables[key]
        if not table.committed <= num_tokens <= table.num_tokens:
            raise CacheError(
                f"sequence {key}: {num_tokens} tokens cannot be computed, {table.committed} were "
                f"and {table.num_tokens} have room"
            )
        table.committed = num_tokens
        if num_tokens < table.next_event:
            return
        size = self.block_size
        full = num_tokens // size
        if self.prefix_cache:
            self._share(table, full)
        table.published = full
        # The next block to be full ends at (full + 1) * size. Block b of a window goes when
        # window_start(length - slack) > b, so at length (b + 1) * size + slack + window - 1.
        table.next_event = (full + 1) * size
        for config, pool, g in self._each():
            if config.spec.window is None:
                continue
            sinks = config.sink_blocks(size)
            start = config.window_start(num_tokens - self.slack, size)
            for i in range(max(sinks, table.freed[g]), start):
                if table.blocks[g][i] != NULL_BLOCK:
                    pool.disown(table.blocks[g][i])
                    table.put(g, i, NULL_BLOCK)
            table.freed[g] = max(table.freed[g], start)
            next_free = max(sinks, start) + 1
            event = next_free * size + self.slack + config.spec.window - 1
            table.next_event = min(table.next_event, event)
        if table.changes:
            self._changed[key] = table

    def keep_needed(self, key: int, num_tokens: int) -> None:
        """Give back the blocks that resuming behind `num_tokens` does not read.

        For a sequence whose cache comes from a file, which lacks what was behind a window: called
        after `open` and before `publish`.
        """
        table, full = self._tables[key], num_tokens // self.block_size
        for config, pool, g in self._each():
            needed = set(config.needed(full, self.block_size))
            for i in range(full):
                if i not in needed and table.blocks[g][i] != NULL_BLOCK:
                    pool.disown(table.blocks[g][i])
                    table.put(g, i, NULL_BLOCK)
            table.freed[g] = max(table.freed[g], config.window_start(num_tokens, self.block_size))

    def fork(self, parent: int, child: int, keys: PrefixKeys, num_tokens: int) -> None:
        """The child shares the parent's first `num_tokens`; it copies when it writes its own.

        Raises:
            CacheError: they are not computed yet, or a window has moved on; see `can_fork`.
        """
        if child in self._tables or not self.can_fork(parent, num_tokens):
            raise CacheError(
                f"sequence {child} cannot share {num_tokens} tokens of sequence {parent}"
            )
        source = self._tables[parent]
        count = -(-num_tokens // self.block_size)
        rows = [row[:count] for row in source.blocks]
        for pool, row in zip(self.pools, rows, strict=True):
            for block in row:
                if block != NULL_BLOCK:
                    pool.own(block)
        keys.nodes = source.keys.nodes[: num_tokens // self.block_size]
        table = BlockTable(keys, rows, num_tokens, self.block_size)
        table.published = min(table.published, source.published)
        # The parent may write on in place: what the child shares lies before that.
        table.tail_may_be_shared = True
        self._tables[child] = self._changed[child] = table

    def truncate(self, key: int, num_tokens: int) -> None:
        """Go back to `num_tokens`; what was computed of them stays.

        Raises:
            CacheError: more than it has, or a window has freed what resuming there would read.
        """
        table = self._tables[key]
        if num_tokens > table.num_tokens or not self._reaches_back_to(table, num_tokens):
            raise CacheError(
                f"sequence {key} of {table.num_tokens} tokens cannot go back to {num_tokens}"
            )
        count = -(-num_tokens // self.block_size)
        for g, pool in enumerate(self.pools):
            for block in reversed(table.blocks[g][count:]):
                if block != NULL_BLOCK:
                    pool.disown(block)
            del table.blocks[g][count:]
            table.freed[g] = min(table.freed[g], count)
        # Runs that reach past the new end would name blocks that are given back: cut them.
        table.changes = [(g, i, run[: count - i]) for g, i, run in table.changes if i < count]
        table.num_tokens = num_tokens
        table.capacity = count * self.block_size
        if num_tokens < table.committed:
            table.committed = num_tokens
            table.published = min(table.published, num_tokens // self.block_size)
            table.next_event = 0
            table.keys.truncate(table.published)
        table.tail_may_be_shared = True

    def free(self, key: int) -> None:
        """Give everything back, last block first; what is published stays until room is needed."""
        table = self._tables.pop(key)
        self._changed.pop(key, None)
        for pool, row in zip(self.pools, table.blocks, strict=True):
            for block in reversed(row):
                if block != NULL_BLOCK:
                    pool.disown(block)

    # -- a plan's life -----------------------------------------------------------------------

    def collect(self, slots: Mapping[int, int]) -> tuple[GroupChanges, ...]:
        """All that the plan of `step` has to do to blocks; starts saves to the host tier.

        Args:
            slots: key -> runner slot; the tables of sequences without one wait for a later plan.
        """
        for pool, host, saves in zip(self.pools, self.hosts, self._moves.saves, strict=True):
            saves += host.save_ahead(pool, self.save_ahead, self.step)
            self.num_saved += len(saves)
        tables: list[list[TableChange]] = [[] for _ in self.groups]
        waiting = {}
        for key, table in self._changed.items():
            if key in slots:
                for g, index, blocks in table.changes:
                    tables[g].append(TableChange(slots[key], index, blocks))
                table.changes.clear()
            else:
                waiting[key] = table
        self._changed = waiting
        moves, self._moves = self._moves, Moves.of(len(self.groups))
        self._in_flight[self.step] = moves
        return tuple(
            GroupChanges(tuple(saves), tuple(loads), tuple(copies), tuple(changes))
            for saves, loads, copies, changes in zip(
                moves.saves, moves.loads, moves.copies, tables, strict=True
            )
        )

    def settle(self, step: int) -> None:
        """The plan of `step` is committed: its blocks may be reused, its saves can be hit."""
        moves = self._in_flight.pop(step)
        for g, (pool, host) in enumerate(zip(self.pools, self.hosts, strict=True)):
            for block, host_block in moves.saves[g]:
                host.end_save(host_block)
                pool.release(block)
            for block, host_block in moves.loads[g]:
                host.end_load(host_block)
                pool.release(block)
            for source, destination in moves.copies[g]:
                pool.release(source)
                pool.release(destination)

    def check(self) -> None:
        """Raise InvariantError, naming the first invariant that does not hold."""
        plans = [self._moves, *self._in_flight.values()]
        check_books(self.groups, self.index, self.pools, self.hosts, self._tables, plans)

    # -- inside ------------------------------------------------------------------------------

    def _each(self) -> list[tuple[CacheGroup, Pool, int]]:
        return [(config, self.pools[g], g) for g, config in enumerate(self.groups)]

    def _reaches_back_to(self, table: BlockTable, num_tokens: int) -> bool:
        # The query at `num_tokens` reads the sinks and the window; its own block, if there is one
        # already, must be there to be written.
        size = self.block_size
        end = -(-num_tokens // size)
        for g, config in enumerate(self.groups):
            if config.spec.window is not None:
                start = config.window_start(num_tokens, size)
                if NULL_BLOCK in table.blocks[g][start:end]:
                    return False
        return True

    def _tail_to_copy(self, table: BlockTable, group: int) -> int | None:
        """The partly filled last block if the sequence may not write to it."""
        if not table.tail_may_be_shared or table.num_tokens % self.block_size == 0:
            return None
        tail = table.blocks[group][table.num_tokens // self.block_size]
        return None if self.pools[group].writable(tail) else tail

    def _share(self, table: BlockTable, full: int) -> None:
        nodes = self.index.intern(table.keys, full, self.step)
        for i in range(table.published, full):
            node = nodes[i]
            for g, pool in enumerate(self.pools):
                block = table.blocks[g][i]
                shared = node.blocks[g]
                if block in (shared, NULL_BLOCK):
                    continue
                if shared == NULL_BLOCK:
                    pool.publish(block, node)
                    self.hosts[g].note_published(block)
                else:
                    # Somebody else computed the same tokens at the same time: one copy will do.
                    pool.own(shared)
                    pool.disown(block)
                    table.put(g, i, shared)

    def _load(self, group: int, host_block: int, block: int) -> None:
        self.hosts[group].begin_load(host_block)
        self.pools[group].hold(block)
        self._moves.loads[group].append(HostMove(block, host_block))
        self.num_loaded += 1

    def _copy(self, group: int, source: int, destination: int) -> None:
        self.pools[group].hold(source)
        self.pools[group].hold(destination)
        self._moves.copies[group].append(BlockCopy(source, destination))
        self.num_copied += 1
