"""Why a prompt's tokens were not in the cache: reads the prefix index, changes nothing.

Called once for each request, when it is first admitted, before its own blocks are published.
"""

from collections.abc import Sequence

from kvist.core.prefix import Namespace, Node, PrefixIndex, PrefixKeys
from kvist.core.record import Miss, MissKind

_Found = tuple[MissKind, int | None]


def explain_misses(
    index: PrefixIndex, keys: PrefixKeys, hit_blocks: int, prompt_tokens: int, limit: int
) -> tuple[Miss, ...]:
    """Cover `[hit, prompt_tokens)` with intervals, each with one reason.

    Args:
        index: the prefix index that was asked.
        keys: the prompt's keys; their nodes are known as far as the index knows them.
        hit_blocks: blocks that were used from the cache.
        prompt_tokens: length of the prompt.
        limit: the most tokens that the request would have taken from the cache.
    """
    size = index.block_size
    hit = hit_blocks * size
    # [hit, allowed) could have been cached; [allowed, usual) was not wanted from the cache though a
    # request usually takes that much; [usual, prompt_tokens) is never taken.
    usual = (prompt_tokens - 1) // size * size
    allowed = max(hit, min(usual, limit // size * size))
    nodes = index.known(keys, allowed // size)[: allowed // size]
    found = [_gone(node) for node in nodes[hit_blocks:]]
    rest = allowed // size - max(hit_blocks, len(nodes))
    if rest:
        found += _unknown(index, keys, len(nodes), rest)
    bounds = [(hit + i * size, hit + (i + 1) * size, why) for i, why in enumerate(found)]
    bounds.append((allowed, usual, ("bypassed", None)))
    bounds.append((max(usual, hit), prompt_tokens, ("tail", None)))
    return _merged(bounds)


def _gone(node: Node) -> _Found:
    if all(b or h >= 0 for b, h in zip(node.blocks, node.hosts, strict=True)):
        return ("stranded", None)
    return ("evicted", node.evicted_step)


def _unknown(index: PrefixIndex, keys: PrefixKeys, first: int, count: int) -> list[_Found]:
    """Reasons for `count` blocks from block `first` on, which no request of this kind has had."""
    others = index.namesakes(keys) if first == 0 else []
    if others:
        other, namespace = others[0]
        length, node = 0, other
        while length < count:
            length += 1
            following = index.child(node, keys, length)
            if following is None:
                break
            node = following
        same: list[_Found] = [(_other(keys.namespace, namespace), None)]
        return same * length + [("never_seen", None)] * (count - length)
    shared = index.closest(keys, first)
    if first * index.block_size + shared > 0 and shared >= 0:
        return [("differs", first * index.block_size + shared)] * count
    return [("never_seen", None)] * count


def _other(mine: Namespace, theirs: Namespace) -> MissKind:
    if mine.codec != theirs.codec:
        return "other_codec"
    return "other_adapter" if mine.adapter != theirs.adapter else "other_salt"


def _merged(bounds: Sequence[tuple[int, int, _Found]]) -> tuple[Miss, ...]:
    misses: list[Miss] = []
    for start, stop, (kind, at) in bounds:
        if start >= stop:
            continue
        last = misses[-1] if misses else None
        if last is not None and (last.kind, last.at) == (kind, at):
            start = misses.pop().start
        misses.append(Miss(start, stop, kind, at))
    return tuple(misses)
