"""From where a sequence can resume: the longest cached prefix that every group accepts.

A group without a window needs every block of the prefix; one with a window needs its sinks and the
blocks that the next query still sees. Questions only; the block manager asks.
"""

from collections.abc import Sequence

from kvist.core.plan import NULL_BLOCK
from kvist.core.prefix import PrefixIndex, PrefixKeys, PrefixMatch
from kvist.core.tables import CacheGroup


def longest_match(
    groups: Sequence[CacheGroup], index: PrefixIndex, keys: PrefixKeys, limit: int
) -> PrefixMatch:
    """The longest prefix of whole blocks, at most `limit` tokens, in either tier."""
    size = index.block_size
    nodes = index.known(keys, limit // size)
    hit = min(limit // size, len(nodes))
    # A group that lacks block m of what resuming at `hit` reads cannot resume anywhere in (m, hit]
    # either: the window there reaches at least as far back. So go on with m.
    group = 0
    while group < len(groups):
        retreat = _retreat(groups[group], group, keys, hit, size)
        if retreat is None:
            group += 1
        else:
            hit, group = retreat, 0
    to_load = {
        i
        for g, config in enumerate(groups)
        if config.host_blocks
        for i in config.needed(hit, size)
        if nodes[i].blocks[g] == NULL_BLOCK
    }
    return PrefixMatch(hit, hit * size, len(to_load) * size)


def _retreat(config: CacheGroup, group: int, keys: PrefixKeys, hit: int, size: int) -> int | None:
    """Where to retreat to if no tier has all that resuming at `hit` blocks reads."""
    gone = [
        i
        for i in config.needed(hit, size)
        if keys.nodes[i].blocks[group] == NULL_BLOCK and keys.nodes[i].hosts[group] < 0
    ]
    if not gone:
        return None
    # Without a window, or among the sinks, the first gap bounds every prefix. In a window the last
    # gap does: a shorter prefix may not reach back to an earlier one.
    if config.spec.window is None or gone[0] < config.sink_blocks(size):
        return gone[0]
    return gone[-1]
