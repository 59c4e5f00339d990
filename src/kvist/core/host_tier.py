"""One group's blocks in host memory: where prefixes go when the pool needs their place.

It keeps slots and their order of use; the bytes are moved by the runner, as a plan's saves and
loads. Saving starts ahead of need, so that a block is already here when it is evicted and its place
can be reused at once. Only the block manager calls.
"""

from collections import OrderedDict
from itertools import islice

from kvist.core.plan import HostMove
from kvist.core.pool import Pool
from kvist.core.prefix import ABSENT_HOST, Node, PrefixIndex
from kvist.errors import InvariantError

_CHILDREN_TO_LOOK_AT = 16  # a bound on the work of one eviction, where many texts part


class HostTier:
    """Host blocks 0 to `num_blocks - 1` of one group; with 0 of them there is no tier.

    A host block is free, *filling* (a save to it is not committed) or filled; a filled one may be
    pinned by loads that are not committed. `leaves_first` is for groups without a window, which
    need all of a prefix: within what is least recently used, the last blocks go first.
    """

    def __init__(self, index: PrefixIndex, group: int, num_blocks: int, leaves_first: bool) -> None:
        self.num_blocks = num_blocks
        self._leaves_first = leaves_first
        self._index = index
        self._group = group
        self._free = list(range(num_blocks - 1, -1, -1))
        self._filling: dict[int, Node] = {}
        self._filled: OrderedDict[int, Node] = OrderedDict()  # least recently used first
        self._pins: dict[int, int] = {}
        # Blocks of the pool in the order in which they were published, for a while at least.
        self._published: OrderedDict[int, None] = OrderedDict()

    def note_published(self, block: int) -> None:
        """A block of the pool holds a prefix that may be worth saving."""
        if self.num_blocks:
            self._published[block] = None

    @property
    def num_used(self) -> int:
        """Host blocks that hold a prefix or are being filled."""
        return self.num_blocks - len(self._free)

    def cached(self) -> tuple[bool, ...]:
        """Of each host block whether it holds a prefix that can be hit."""
        return tuple([block in self._filled for block in range(self.num_blocks)])

    def node_of(self, host_block: int) -> Node | None:
        """The prefix that a host block holds."""
        return self._filled.get(host_block)

    def save_ahead(self, pool: Pool, target: int, step: int) -> list[HostMove]:
        """Saves to start so that `target` blocks can soon be reused without losing anything.

        The blocks next in line to be evicted are saved first. Where there are not that many idle
        ones, blocks are saved while sequences still own them: once given back they would be reused
        at once. All are held until `end_save`, but one always stays available: a sequence that
        runs alone must be able to go on.
        """
        moves: list[HostMove] = []
        ready, target = pool.num_free, min(target, self.num_blocks)
        for block in pool.oldest_idle():
            if ready >= target or pool.num_available <= 1:
                return moves
            ready += 1
            if not self._save(pool, block, step, moves):
                return moves
        while ready < target and self._published:
            block, _ = self._published.popitem(last=False)
            if pool.owners[block]:
                ready += 1
                if not self._save(pool, block, step, moves):
                    return moves
        return moves

    def _save(self, pool: Pool, block: int, step: int, moves: list[HostMove]) -> bool:
        """Start saving a block, unless that is done or under way; False if the tier is too busy."""
        node = pool.nodes[block]
        if node is None or node.hosts[self._group] != ABSENT_HOST or pool.is_held(block):
            return True
        host_block = self._take(step)
        if host_block is None:
            return False
        self._filling[host_block] = node
        pool.hold(block)
        moves.append(HostMove(block, host_block))
        return True

    def end_save(self, host_block: int) -> None:
        """The plan that saved to `host_block` is committed: it can be hit from now on."""
        node = self._filling.pop(host_block)
        self._filled[host_block] = node
        self._index.put_host(node, self._group, host_block)

    def begin_load(self, host_block: int) -> None:
        """A plan reads `host_block`: keep it, and count this as a use."""
        self._pins[host_block] = self._pins.get(host_block, 0) + 1
        self._filled.move_to_end(host_block)

    def end_load(self, host_block: int) -> None:
        """That plan is committed."""
        self._pins[host_block] -= 1
        if not self._pins[host_block]:
            del self._pins[host_block]

    def _take(self, step: int) -> int | None:
        """A free host block, or the least recently used that nobody loads."""
        if self._free:
            return self._free.pop()
        host_block = next((h for h in self._filled if h not in self._pins), None)
        if host_block is None:
            return None
        # Sequences save their blocks from the first to the last, but a child without its parent is
        # worth nothing: go down to a leaf, and leave the way there next in line, deepest first.
        while self._leaves_first:
            children = islice(self._filled[host_block].children, _CHILDREN_TO_LOOK_AT)
            places = (child.hosts[self._group] for child in children)
            below = next((h for h in places if h != ABSENT_HOST and h not in self._pins), None)
            if below is None:
                break
            host_block = below
            self._filled.move_to_end(host_block, last=False)
        self._index.drop_host(self._filled.pop(host_block), self._group, step)
        return host_block

    def check(self, expected_pins: dict[int, int], expected_filling: set[int]) -> None:
        """Raise InvariantError if a host block is lost, used twice, or wrongly pinned."""
        where = f"group {self._group}'s host tier"
        parts = (set(self._free), set(self._filling), set(self._filled))
        if len(set().union(*parts)) != self.num_blocks or (
            len(self._free) + len(self._filling) + len(self._filled) != self.num_blocks
        ):
            raise InvariantError(f"{where}: blocks are not free, filling or filled exactly once")
        if self._pins != expected_pins or set(self._filling) != expected_filling:
            raise InvariantError(f"{where}: pins or saves do not match the uncommitted plans")
        if not self._pins.keys() <= self._filled.keys():
            raise InvariantError(f"{where}: a pinned block is not filled")
        for host_block, node in self._filled.items():
            if node.hosts[self._group] != host_block:
                raise InvariantError(f"{where}: block {host_block} and its prefix disagree")
        for node in self._index:
            host_block = node.hosts[self._group]
            if host_block >= 0 and self._filled.get(host_block) is not node:
                raise InvariantError(f"{where}: prefix {node.serial} claims block {host_block}")
