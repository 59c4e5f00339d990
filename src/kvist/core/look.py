"""What a picture of the cache shows beyond the snapshot: the prefix tree, and what a block holds.

Reads the books of prefixes and blocks, changes nothing. The scheduler calls it between two steps,
so each look is bounded, however large the cache is.
"""

from collections import deque

from kvist.core.blocks import PagedBlockManager
from kvist.core.plan import NULL_BLOCK
from kvist.core.prefix import ABSENT_HOST, Node, PrefixIndex
from kvist.core.record import BlockDetail, Branch
from kvist.core.roster import Roster
from kvist.errors import CacheError

WORDS = 32  # tokens of a branch that are told, or those of one block if it is longer


def prefix_tree(index: PrefixIndex, limit: int) -> tuple[Branch, ...]:
    """The cached prefixes as branches, parents before children, the youngest first.

    Args:
        index: where they are known.
        limit: nodes that are visited at most; what is behind the last of them is left out.
    """
    branches: list[Branch] = []
    # (first node, serial of the branch before it, serial of its root), breadth first
    todo = deque(
        (child, 0, root.serial) for root in index.roots for child in reversed(root.children)
    )
    while todo and limit > 0:
        first, parent, root = todo.popleft()
        chain = [first]
        while len(chain) < limit and len(chain[-1].children) == 1:
            chain += chain[-1].children
        limit -= len(chain)
        branches.append(
            Branch(
                serial=first.serial,
                parent=parent,
                root=root,
                tokens=_beginning(chain),
                blocks=tuple([node.blocks[0] for node in chain]),
                saved=tuple([node.hosts[0] != ABSENT_HOST for node in chain]),
            )
        )
        todo.extend((child, first.serial, root) for child in reversed(chain[-1].children))
    return _without_the_gone(branches)


def describe_block(
    blocks: PagedBlockManager, roster: Roster, group: int, block: int, *, host: bool = False
) -> BlockDetail:
    """What a block of a group's pool, or of its host tier, holds.

    Raises:
        CacheError: there is no such block.
    """
    kind = "host block" if host else "block"
    sizes = [g.host_blocks if host else g.num_blocks for g in blocks.groups]
    if not 0 <= group < len(sizes):
        raise CacheError(f"group {group} does not exist; there are {len(sizes)}, from 0 on")
    if not 0 <= block < sizes[group]:
        raise CacheError(f"{kind} {block} does not exist; group {group} has {sizes[group]}")
    if host:
        node = blocks.hosts[group].node_of(block)
        return BlockDetail() if node is None else _of_node(blocks, node, group)
    node = blocks.pools[group].nodes[block]
    detail = BlockDetail() if node is None else _of_node(blocks, node, group)
    owners: list[tuple[str, int]] = []
    if blocks.pools[group].owners[block]:
        for state in roster.running:
            table = blocks.blocks_of(state.key, group)
            if block not in table or block == NULL_BLOCK:
                continue
            owners.append((state.request.id, state.sequence.sample_index))
            if not detail.tokens:
                start = table.index(block) * blocks.block_size
                stop = min(start + blocks.block_size, state.sequence.num_tokens)
                detail = BlockDetail(state.keys.tokens(start, stop), start)
    return BlockDetail(detail.tokens, detail.start, tuple(owners), node is not None, detail.saved)


def _beginning(chain: list[Node]) -> tuple[int, ...]:
    blocks = chain[: max(1, WORDS // len(chain[0].key[1]))]
    return tuple([token for node in blocks for token in node.key[1]])


def _of_node(blocks: PagedBlockManager, node: Node, group: int) -> BlockDetail:
    depth, above = -1, node.parent
    while above is not None:
        depth, above = depth + 1, above.parent
    saved = node.hosts[group] != ABSENT_HOST
    return BlockDetail(node.key[1], depth * blocks.block_size, cached=True, saved=saved)


def _without_the_gone(branches: list[Branch]) -> tuple[Branch, ...]:
    """Leave out branches of which nothing is cached any more, unless something grows from them."""
    kept: list[Branch] = []
    needed: set[int] = set()
    for branch in reversed(branches):
        if branch.serial in needed or any(branch.blocks) or any(branch.saved):
            kept.append(branch)
            needed.add(branch.parent)
    return tuple(reversed(kept))
