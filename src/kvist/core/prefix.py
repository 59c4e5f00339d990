"""The prefix index: which leading blocks of tokens have been computed before, and where they are.

Keys are exact: a block is known by (its parent's serial number, its tokens, what else its content
depends on), so two prefixes are equal only if every token is. A node is a key's identity and
outlives its bytes: it says in which pool block and which host block each group of layers keeps
them, and, when they are gone, since which step. The block manager is the only caller.
"""

from bisect import bisect_right
from collections import OrderedDict
from collections.abc import Hashable, Iterable, Iterator, Sequence
from itertools import islice, takewhile
from typing import NamedTuple

from kvist.core.request import ImageSpan
from kvist.errors import InvariantError

ABSENT_BLOCK = 0  # block 0 of a pool is the null block, so it never holds a prefix
ABSENT_HOST = -1

NodeKey = tuple[int, tuple[int, ...], Hashable]


class Namespace(NamedTuple):
    """What separates prefixes of equal tokens: precision, weights' variant, tenant."""

    codec: str = ""
    adapter: str = ""
    salt: str = ""


DEFAULT_NAMESPACE = Namespace()


class PrefixMatch(NamedTuple):
    """A cached prefix that every group can resume from.

    Args:
        num_blocks: its whole blocks.
        num_tokens: their tokens.
        host_tokens: those of them that some group has to load from the host tier.
    """

    num_blocks: int = 0
    num_tokens: int = 0
    host_tokens: int = 0


class Node:
    """One block's worth of tokens behind one prefix.

    Args:
        serial: never given twice, so a child's key cannot meet another parent's.
        key: where the index keeps it; a root's is `(0, (), namespace)`.
        parent: None for a root.
        num_groups: groups of layers, each with its own place for these tokens.
    """

    __slots__ = (
        "alive",
        "blocks",
        "children",
        "evicted_step",
        "hosts",
        "key",
        "num_places",
        "parent",
        "serial",
    )

    def __init__(self, serial: int, key: NodeKey, parent: "Node | None", num_groups: int) -> None:
        self.serial = serial
        self.key = key
        self.parent = parent
        self.children: dict[Node, None] = {}
        self.blocks = [ABSENT_BLOCK] * num_groups
        self.hosts = [ABSENT_HOST] * num_groups
        self.num_places = 0  # entries of `blocks` and `hosts` that are not absent
        self.evicted_step: int | None = None
        self.alive = True


class PrefixKeys:
    """A sequence's tokens as the index sees them, with the nodes found or made so far.

    Keys are therefore computed once for each block, however often a sequence is matched, resumed
    or extended. `output_ids` is the sequence's own list, read as it grows.
    """

    __slots__ = ("_stops", "images", "namespace", "nodes", "output_ids", "prompt_ids")

    def __init__(
        self,
        prompt_ids: tuple[int, ...],
        output_ids: Sequence[int] = (),
        images: tuple[ImageSpan, ...] = (),
        namespace: Namespace = DEFAULT_NAMESPACE,
    ) -> None:
        self.prompt_ids = prompt_ids
        self.output_ids = output_ids
        self.images = images
        self.namespace = namespace
        self.nodes: list[Node] = []
        self._stops = [span.stop for span in images]

    def truncate(self, num_blocks: int) -> None:
        """Tokens behind the first `num_blocks` blocks are no longer what they were."""
        del self.nodes[num_blocks:]

    def tokens(self, start: int, stop: int) -> tuple[int, ...]:
        """Token ids at positions `[start, stop)`."""
        length = len(self.prompt_ids)
        if stop <= length:
            return self.prompt_ids[start:stop]
        outputs = tuple(self.output_ids[max(0, start - length) : stop - length])
        return self.prompt_ids[start:] + outputs if start < length else outputs

    def extra(self, start: int, stop: int) -> Hashable:
        """The images under `[start, stop)`: each digest, length, and where in it `start` lies."""
        if not self.images:
            return None
        behind = islice(self.images, bisect_right(self._stops, start), None)
        under = takewhile(lambda span: span.start < stop, behind)
        return tuple((span.digest, span.length, start - span.start) for span in under) or None


class PrefixIndex:
    """All nodes by key. It owns no blocks; whoever moves bytes tells it.

    Args:
        block_size: tokens of a block.
        num_groups: groups of layers.
        max_forgotten: how many nodes without any bytes are remembered, oldest dropped first; they
            are what lets a record say "evicted at step s".
    """

    def __init__(self, block_size: int, num_groups: int, max_forgotten: int) -> None:
        self.block_size = block_size
        self.num_groups = num_groups
        self.max_forgotten = max_forgotten
        self._nodes: dict[NodeKey, Node] = {}
        self._roots: dict[Node, None] = {}
        self._forgotten: OrderedDict[Node, None] = OrderedDict()
        # Children of the roots by tokens and extra alone, to recognise another tenant's prefix.
        self._firsts: dict[tuple[tuple[int, ...], Hashable], dict[Node, None]] = {}
        self._last_serial = 0

    def __len__(self) -> int:
        """Nodes, roots included."""
        return len(self._nodes)

    def __iter__(self) -> Iterator[Node]:
        """Every node, roots included."""
        return iter(self._nodes.values())

    @property
    def roots(self) -> Iterable[Node]:
        """A node without tokens for each namespace that has any."""
        return self._roots.keys()

    def known(self, keys: PrefixKeys, num_blocks: int) -> list[Node]:
        """The nodes of the first `num_blocks` blocks, as far as they are known; changes nothing.

        The list is the keys' own and may be longer than `num_blocks`.
        """
        nodes = self._still_alive(keys)
        parent = nodes[-1] if nodes else self._nodes.get((0, (), keys.namespace))
        get = self._nodes.get
        for index in range(len(nodes), num_blocks):
            parent = None if parent is None else get(self._key(parent, keys, index))
            if parent is None:
                break
            nodes.append(parent)
        return nodes

    def intern(self, keys: PrefixKeys, num_blocks: int, step: int) -> list[Node]:
        """The nodes of the first `num_blocks` blocks, made where they are not known.

        The caller has bytes for most of them. One that gets none, because its block went behind a
        window and was forgotten meanwhile, counts as evicted by `step`.
        """
        nodes = self._still_alive(keys)
        if len(nodes) >= num_blocks:
            return nodes
        parent = nodes[-1] if nodes else self._root(keys.namespace)
        get = self._nodes.get
        for index in range(len(nodes), num_blocks):
            key = self._key(parent, keys, index)
            node = get(key)
            if node is None:
                node = self._add(key, parent)
                node.evicted_step = step
                self._forgotten[node] = None
            nodes.append(node)
            parent = node
        return nodes

    def namesakes(self, keys: PrefixKeys) -> list[tuple[Node, Namespace]]:
        """Nodes of the first block's tokens under other namespaces."""
        found = self._firsts.get((keys.tokens(0, self.block_size), keys.extra(0, self.block_size)))
        return [(node, _namespace(node)) for node in found or ()]

    def child(self, parent: Node, keys: PrefixKeys, index: int) -> Node | None:
        """The node behind `parent` with the tokens of block `index`."""
        return self._nodes.get(self._key(parent, keys, index))

    def closest(self, keys: PrefixKeys, index: int, most: int = 64) -> int:
        """How many of block `index`'s tokens some cached continuation of its parent shares.

        Only the `most` youngest continuations are compared; -1 if there is none at all.
        """
        parent = keys.nodes[index - 1] if index else self._nodes.get((0, (), keys.namespace))
        tokens = keys.tokens(index * self.block_size, (index + 1) * self.block_size)
        best = -1
        for node in islice(reversed(parent.children), most) if parent else ():
            best = max(best, _common_prefix(tokens, node.key[1]))
        return best

    def put_block(self, node: Node, group: int, block: int) -> None:
        """The group's bytes of this node are in `block` of its pool."""
        node.blocks[group] = block
        self._gained(node)

    def put_host(self, node: Node, group: int, host_block: int) -> None:
        """The group's bytes of this node are in `host_block` of its host tier."""
        node.hosts[group] = host_block
        self._gained(node)

    def drop_block(self, node: Node, group: int, step: int) -> None:
        """The pool's block was given to someone else."""
        node.blocks[group] = ABSENT_BLOCK
        self._lost(node, group, step)

    def drop_host(self, node: Node, group: int, step: int) -> None:
        """The host tier's block was given to someone else."""
        node.hosts[group] = ABSENT_HOST
        self._lost(node, group, step)

    def check(self) -> None:
        """Raise InvariantError if the nodes do not form a tree, or the forgotten are not those."""
        for key, node in self._nodes.items():
            places = sum(b != ABSENT_BLOCK for b in node.blocks)
            places += sum(h != ABSENT_HOST for h in node.hosts)
            if places != node.num_places:
                raise InvariantError(f"prefix node {node.serial} counts {node.num_places} places")
            if len(key[1]) != (self.block_size if node.parent else 0):
                raise InvariantError(f"prefix node {node.serial} stands for {len(key[1])} tokens")
            if node.key != key or not node.alive:
                raise InvariantError(f"prefix node {node.serial} is filed under a wrong key")
            if node.parent is not None and (
                self._nodes.get(node.parent.key) is not node.parent
                or node not in node.parent.children
            ):
                raise InvariantError(f"prefix node {node.serial} has lost its parent")
            if node.parent is None and not node.children:
                raise InvariantError(f"root {node.serial} has no children and should be gone")
            if (node in self._forgotten) != (node.parent is not None and places == 0):
                raise InvariantError(f"prefix node {node.serial}: forgotten iff it has no bytes")
        firsts = sum(len(nodes) for nodes in self._firsts.values())
        if firsts != sum(n.parent is not None and n.parent.parent is None for n in self):
            raise InvariantError("the table of first blocks does not list the roots' children")
        if set(self._roots) != {node for node in self if node.parent is None}:
            raise InvariantError("the list of roots is not that of the nodes without a parent")
        if not all(node.alive for node in self._forgotten):
            raise InvariantError("a forgotten prefix node is no longer in the index")

    def _still_alive(self, keys: PrefixKeys) -> list[Node]:
        # A node is dropped only after its children, so the dropped ones are at the end.
        nodes = keys.nodes
        while nodes and not nodes[-1].alive:
            nodes.pop()
        return nodes

    def _key(self, parent: Node, keys: PrefixKeys, index: int) -> NodeKey:
        start = index * self.block_size
        stop = start + self.block_size
        extra = keys.extra(start, stop) if keys.images else None
        return (parent.serial, keys.tokens(start, stop), extra)

    def _root(self, namespace: Namespace) -> Node:
        key: NodeKey = (0, (), namespace)
        return self._nodes.get(key) or self._add(key, None)

    def _add(self, key: NodeKey, parent: Node | None) -> Node:
        self._last_serial += 1
        node = self._nodes[key] = Node(self._last_serial, key, parent, self.num_groups)
        if parent is None:
            self._roots[node] = None
        else:
            parent.children[node] = None
            if parent.parent is None:
                self._firsts.setdefault(key[1:], {})[node] = None
        return node

    def _gained(self, node: Node) -> None:
        if node.num_places == 0:
            self._forgotten.pop(node, None)
        node.num_places += 1

    def _lost(self, node: Node, group: int, step: int) -> None:
        node.num_places -= 1
        if node.blocks[group] == ABSENT_BLOCK and node.hosts[group] == ABSENT_HOST:
            node.evicted_step = step
        if node.num_places == 0:
            self._forgotten[node] = None
            self._forget()

    def _forget(self) -> None:
        # A node with children stays, to keep them reachable: it goes to the back of the queue, and
        # two looks for each newcomer keep the queue near its limit without ever scanning it.
        for _ in range(2):
            if len(self._forgotten) <= self.max_forgotten:
                return
            node = next(iter(self._forgotten))
            if node.children:
                self._forgotten.move_to_end(node)
            else:
                del self._forgotten[node]
                self._drop(node)

    def _drop(self, node: Node | None) -> None:
        """Take a childless node out, and the parents that only it kept."""
        while node is not None:
            del self._nodes[node.key]
            node.alive = False
            parent = node.parent
            if parent is None:
                del self._roots[node]
                return
            del parent.children[node]
            if parent.parent is None:
                same = self._firsts[node.key[1:]]
                del same[node]
                if not same:
                    del self._firsts[node.key[1:]]
            too_many = len(self._forgotten) > self.max_forgotten
            useless = parent.parent is None or (too_many and parent in self._forgotten)
            node = parent if useless and not parent.children else None
            if node is not None:
                self._forgotten.pop(node, None)


def _namespace(node: Node) -> Namespace:
    root = node.parent
    assert root is not None
    assert isinstance(root.key[2], Namespace)
    return root.key[2]


def _common_prefix(a: tuple[int, ...], b: tuple[int, ...]) -> int:
    for i, (x, y) in enumerate(zip(a, b, strict=False)):
        if x != y:
            return i
    return min(len(a), len(b))
