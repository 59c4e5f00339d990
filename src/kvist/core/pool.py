"""One group's pool of blocks: who owns each, which wait to be hit again, which goes next.

A block is *owned* (some table points at it), *idle* (published, owned by nobody, oldest first in
line to be evicted) or *free*. Apart from that it may be *held*: a copy, a save or a load of a plan
that is not committed touches it, and it is not given away until then. Only the block manager calls.
"""

from collections import OrderedDict
from collections.abc import Iterator

from kvist.core.prefix import Node, PrefixIndex
from kvist.errors import InvariantError


class Pool:
    """Blocks 1 to `num_blocks - 1` of one group; block 0 is the null block and never moves.

    Evicting by recency alone never strands a child: a table that owns a block owns every block
    before it (or, behind a window, no longer needs it), and gives them back last block first.
    """

    def __init__(self, index: PrefixIndex, group: int, num_blocks: int) -> None:
        self.num_blocks = num_blocks
        self.owners = [0] * num_blocks
        self.nodes: list[Node | None] = [None] * num_blocks
        self.evicted = 0
        self.unsaved_evictions = 0
        self._index = index
        self._group = group
        self._free = list(range(num_blocks - 1, 0, -1))
        self._idle: OrderedDict[int, None] = OrderedDict()
        self._holds: dict[int, int] = {}
        self._held_idle = 0

    @property
    def num_available(self) -> int:
        """Blocks that `take` could give right now: free ones, and idle ones that are not held."""
        return len(self._free) + len(self._idle) - self._held_idle

    @property
    def num_free(self) -> int:
        """Blocks that hold nothing anyone could hit."""
        return len(self._free)

    @property
    def num_returning(self) -> int:
        """Blocks that nobody owns and that come back when the plans under way are committed."""
        return sum(not self.owners[block] for block in self._holds)

    @property
    def num_held(self) -> int:
        """Blocks that an uncommitted plan copies, saves or loads."""
        return len(self._holds)

    def oldest_idle(self) -> Iterator[int]:
        """Idle blocks in the order in which they would be evicted."""
        return iter(self._idle)

    def is_held(self, block: int) -> bool:
        """Whether an uncommitted plan copies, saves or loads `block`."""
        return block in self._holds

    def is_spare(self, block: int) -> bool:
        """Whether owning this published block would take it from `num_available`."""
        return not self.owners[block] and block not in self._holds

    def take(self, count: int, step: int) -> list[int]:
        """Own `count` blocks, evicting the oldest idle ones where none is free.

        The caller has looked at `num_available`.
        """
        taken = []
        for _ in range(count):
            block = self._free.pop() if self._free else self._evict(step)
            self.owners[block] = 1
            taken.append(block)
        return taken

    def own(self, block: int) -> None:
        """One more table points at `block`."""
        if not self.owners[block]:
            del self._idle[block]
            self._held_idle -= block in self._holds
        self.owners[block] += 1

    def disown(self, block: int) -> None:
        """One table less points at `block`."""
        self.owners[block] -= 1
        if self.owners[block]:
            return
        if self.nodes[block] is not None:
            self._idle[block] = None
            self._held_idle += block in self._holds
        elif block not in self._holds:
            self._free.append(block)

    def hold(self, block: int) -> None:
        """Keep `block`'s bytes where they are until `release`; holds add up."""
        held = self._holds.get(block, 0)
        self._holds[block] = held + 1
        self._held_idle += not held and block in self._idle

    def release(self, block: int) -> None:
        """Undo one `hold`."""
        self._holds[block] -= 1
        if self._holds[block]:
            return
        del self._holds[block]
        if block in self._idle:
            self._held_idle -= 1
        elif not self.owners[block]:
            self._free.append(block)

    def publish(self, block: int, node: Node) -> None:
        """An owned block now holds this node's bytes and may be shared."""
        self.nodes[block] = node
        self._index.put_block(node, self._group, block)

    def writable(self, block: int) -> bool:
        """Whether its one owner may write to it: nobody shares it, or might."""
        return self.owners[block] == 1 and self.nodes[block] is None

    def check(self, expected_owners: list[int], expected_holds: dict[int, int]) -> None:
        """Raise InvariantError if a block is leaked, owned twice, or in two places at once."""
        where = f"group {self._group}"
        if self.owners[0] or self.nodes[0] is not None:
            raise InvariantError(f"{where}: the null block is owned or published")
        if self.owners != expected_owners:
            pairs = enumerate(zip(self.owners, expected_owners, strict=True))
            block, (counted, found) = next((b, pair) for b, pair in pairs if pair[0] != pair[1])
            raise InvariantError(
                f"{where}: block {block} counts {counted} owners but is in {found} tables"
            )
        if self._holds != expected_holds:
            raise InvariantError(f"{where}: holds {self._holds}, but plans need {expected_holds}")
        free = set(self._free)
        owned = {block for block in range(1, self.num_blocks) if self.owners[block]}
        limbo = {b for b in self._holds if not self.owners[b] and self.nodes[b] is None}
        if len(free) != len(self._free):
            raise InvariantError(f"{where}: a block is free twice")
        parts = (free, set(self._idle), owned, limbo)
        if sum(map(len, parts)) != self.num_blocks - 1 or len(set().union(*parts)) != sum(
            map(len, parts)
        ):
            raise InvariantError(f"{where}: blocks are not free, idle, owned or held exactly once")
        if self._held_idle != len(self._holds.keys() & self._idle.keys()):
            raise InvariantError(f"{where}: counts {self._held_idle} idle blocks as held")
        for block in self._idle:
            if self.nodes[block] is None:
                raise InvariantError(f"{where}: block {block} is idle but holds no prefix")
        for block, node in enumerate(self.nodes):
            if node is not None and (node.blocks[self._group] != block or block in free):
                raise InvariantError(f"{where}: block {block} and its prefix disagree")
        for node in self._index:
            block = node.blocks[self._group]
            if block and self.nodes[block] is not node:
                raise InvariantError(f"{where}: prefix {node.serial} claims block {block}")

    def _evict(self, step: int) -> int:
        block = next(b for b in self._idle if b not in self._holds)
        del self._idle[block]
        node = self.nodes[block]
        assert node is not None
        self.nodes[block] = None
        self.evicted += 1
        self.unsaved_evictions += node.hosts[self._group] < 0
        self._index.drop_block(node, self._group, step)
        return block
