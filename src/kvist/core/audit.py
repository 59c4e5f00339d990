"""Proves the block manager's books: every block is where the tables, plans and prefixes say.

For tests and for debugging; it reads everything, changes nothing and takes time with every block.
"""

from collections import Counter
from collections.abc import Mapping, Sequence

from kvist.core.host_tier import HostTier
from kvist.core.plan import NULL_BLOCK
from kvist.core.pool import Pool
from kvist.core.prefix import PrefixIndex
from kvist.core.tables import BlockTable, CacheGroup, Moves
from kvist.errors import InvariantError


def check_books(
    groups: Sequence[CacheGroup],
    index: PrefixIndex,
    pools: Sequence[Pool],
    hosts: Sequence[HostTier],
    tables: Mapping[int, BlockTable],
    plans: Sequence[Moves],
) -> None:
    """Raise InvariantError, naming the first invariant that does not hold.

    Args:
        groups: the layers' groups.
        index: the prefix index.
        pools: one per group.
        hosts: one per group.
        tables: every sequence's, by key.
        plans: what the plan in the making and the uncommitted ones move.
    """
    index.check()
    for key, table in tables.items():
        _check_table(key, table, groups, index.block_size)
    for g, (pool, host) in enumerate(zip(pools, hosts, strict=True)):
        owners = [0] * pool.num_blocks
        for table in tables.values():
            for block in table.blocks[g]:
                owners[block] += block != NULL_BLOCK
        saves = [move for plan in plans for move in plan.saves[g]]
        loads = [move for plan in plans for move in plan.loads[g]]
        copies = [block for plan in plans for copy in plan.copies[g] for block in copy]
        holds = Counter([move.block for move in (*saves, *loads)] + copies)
        pool.check(owners, dict(holds))
        host.check(
            dict(Counter(move.host_block for move in loads)),
            {move.host_block for move in saves},
        )


def _check_table(key: int, table: BlockTable, groups: Sequence[CacheGroup], size: int) -> None:
    where = f"sequence {key}"
    if not table.committed <= table.num_tokens <= table.capacity:
        raise InvariantError(
            f"{where}: committed {table.committed} <= room for {table.num_tokens} <= capacity "
            f"{table.capacity} does not hold"
        )
    for g, (config, row) in enumerate(zip(groups, table.blocks, strict=True)):
        if len(row) * size != table.capacity:
            raise InvariantError(f"{where}: group {g} has {len(row)} entries of {size} places")
        sinks, start = config.sink_blocks(size), config.window_start(table.committed, size)
        if NULL_BLOCK in row[:sinks] or NULL_BLOCK in row[max(sinks, start) :]:
            raise InvariantError(f"{where}: group {g} lacks a block that it still reads")
