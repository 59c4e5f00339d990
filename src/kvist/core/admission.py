"""Whether a waiting sample may start beside those that run, and with what of the cache.

The scheduler asks, and then acts on slots; of all that is here only `open_blocks` has an effect.
"""

from typing import NamedTuple

from kvist.core.blocks import PagedBlockManager
from kvist.core.explain import explain_misses
from kvist.core.record import Miss
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


class Opening(NamedTuple):
    """What an admitted sample has of the cache.

    Args:
        cached: tokens that need not be computed.
        fork: those of them that it shares with a sibling.
        host: those of them that are loaded from the host tier.
        misses: why the prompt's other tokens have to be computed.
    """

    cached: int
    fork: int
    host: int
    misses: tuple[Miss, ...]


def open_blocks(state: SampleState, blocks: PagedBlockManager) -> Opening | None:
    """Own what the cache has of it; None if there is no room even for that."""
    prompt_tokens = len(state.request.prompt_ids)
    sibling = _sibling_to_share_with(state, blocks)
    if sibling is not None:
        shared = prompt_tokens - 1
        blocks.fork(sibling.key, state.key, state.keys, shared)
        return Opening(shared, shared, 0, (Miss(shared, prompt_tokens, "tail"),))
    limit = state.family.match_limit(state.total)
    match = blocks.match(state.keys, limit)
    misses: tuple[Miss, ...] = ()
    if state.admitted_at is None:
        wanted = limit if blocks.prefix_cache else 0
        misses = explain_misses(blocks.index, state.keys, match.num_blocks, prompt_tokens, wanted)
    if not blocks.open(state.key, state.keys, match, match.num_tokens):
        return None
    return Opening(match.num_tokens, 0, match.host_tokens, misses)


def _sibling_to_share_with(state: SampleState, blocks: PagedBlockManager) -> SampleState | None:
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
