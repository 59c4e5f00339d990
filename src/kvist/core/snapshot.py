"""Takes the engine's snapshot: reads the books of scheduler and block manager, changes nothing."""

from kvist.core.blocks import PagedBlockManager
from kvist.core.record import CacheCounters, GroupSnapshot, Snapshot
from kvist.core.roster import Roster
from kvist.core.state import Totals


def take_snapshot(
    step: int, now: float, blocks: PagedBlockManager, roster: Roster, totals: Totals
) -> Snapshot:
    """The whole engine, as plain data."""
    groups = tuple(
        GroupSnapshot(
            window=config.spec.window,
            sinks=config.spec.sinks,
            num_blocks=config.num_blocks,
            free=pool.num_free,
            owners=tuple(pool.owners),
            cached=tuple([node is not None for node in pool.nodes]),
            held=pool.num_held,
            host_blocks=config.host_blocks,
            host_used=host.num_used,
            host_cached=host.cached(),
        )
        for config, pool, host in zip(blocks.groups, blocks.pools, blocks.hosts, strict=True)
    )
    counters = CacheCounters(
        queried_tokens=totals.queried_tokens,
        device_hit_tokens=totals.device_hit_tokens,
        host_hit_tokens=totals.host_hit_tokens,
        fork_tokens=totals.fork_tokens,
        evicted_blocks=sum(pool.evicted for pool in blocks.pools),
        unsaved_evictions=sum(pool.unsaved_evictions for pool in blocks.pools),
        saved_blocks=blocks.num_saved,
        loaded_blocks=blocks.num_loaded,
        copied_blocks=blocks.num_copied,
    )
    nothing = (0,) * len(groups)
    return Snapshot(
        step=step,
        now=now,
        block_size=blocks.block_size,
        groups=groups,
        counters=counters,
        running=tuple(s.snapshot(tuple(blocks.num_blocks_of(s.key))) for s in roster.running),
        waiting=tuple(s.snapshot(nothing) for s in roster.waiting),
        known_prefixes=len(blocks.index),
        computed_tokens=totals.computed_tokens,
        output_tokens=totals.output_tokens,
        preemptions=totals.preemptions,
        lost_tokens=totals.lost_tokens,
    )
