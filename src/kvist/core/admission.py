"""Whether a waiting sample may start beside those that run, and with what of the cache.

Questions about blocks, no effects; the scheduler asks them and acts.
"""

from kvist.core.blocks import PagedBlockManager
from kvist.core.roster import Roster
from kvist.core.state import SampleState


def has_headroom(
    state: SampleState, roster: Roster, blocks: PagedBlockManager, watermarks: list[int]
) -> bool:
    """Whether all its tokens fit beside what the running prompts still need, with some spare.

    Alone, a sample is always let in: it takes what there is, chunk by chunk.
    """
    if not roster.running:
        return True
    rooms = zip(_spare(roster, blocks), _costs(state, blocks), watermarks, strict=True)
    return all(spare - cost >= watermark for spare, cost, watermark in rooms)


def worth_preempting(
    head: SampleState, roster: Roster, blocks: PagedBlockManager
) -> list[SampleState]:
    """Running samples of strictly worse priority, if their blocks would be enough for `head`.

    The last of the list is the first to go.
    """
    priority = head.request.priority
    if not roster.running or roster.running[-1].request.priority <= priority:
        return []
    worse = [state for state in roster.running if state.request.priority > priority]
    rooms = _spare(roster, blocks)
    for state in worse:
        for g, has in enumerate(blocks.num_blocks_of(state.key)):
            rooms[g] += has
    enough = all(room >= cost for room, cost in zip(rooms, _costs(head, blocks), strict=True))
    return worse if enough else []


def sibling_to_share_with(state: SampleState, blocks: PagedBlockManager) -> SampleState | None:
    """A running sample of the same request that has all of the prompt but its last token."""
    shared = len(state.request.prompt_ids) - 1
    if state.sequence.output_ids or not shared or not state.family.prompt_done:
        return None
    for sibling in state.family.samples:
        if sibling.slot is not None and blocks.can_fork(sibling.key, shared):
            return sibling
    return None


def _spare(roster: Roster, blocks: PagedBlockManager) -> list[int]:
    """Per group, blocks that nobody owns and no running prompt still needs."""
    spare = [pool.num_available for pool in blocks.pools]
    for state in roster.running:
        if state.todo > 1:
            needs = blocks.most_blocks(state.total, blocks.block_size)
            for g, has in enumerate(blocks.num_blocks_of(state.key)):
                spare[g] -= max(0, needs[g] - has)
    return spare


def _costs(state: SampleState, blocks: PagedBlockManager) -> list[int]:
    """Per group, the blocks that it would take from the pool."""
    match = blocks.match(state.keys, state.family.match_limit(state.total))
    return blocks.opening_costs(state.keys, match, state.total)
