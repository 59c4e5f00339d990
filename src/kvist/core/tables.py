"""One sequence's block tables, and what one plan does to blocks. Data of the block manager.

Indices are absolute: entry i of a table is the block of positions `[i * block_size, (i + 1) *
block_size)`, in every group, or the null block where a window no longer needs it.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from kvist.core.plan import BlockCopy, HostMove
from kvist.core.prefix import PrefixKeys
from kvist.core.retention import first_needed
from kvist.core.spec import AttentionSpec


@dataclass(frozen=True, slots=True)
class CacheGroup:
    """Layers of equal spec, which share one pool and one table per sequence.

    Args:
        spec: what each of the layers keeps.
        num_blocks: blocks of the pool, the null block included.
        host_blocks: blocks of the host tier.
    """

    spec: AttentionSpec
    num_blocks: int
    host_blocks: int = 0

    def sink_blocks(self, block_size: int) -> int:
        """Leading blocks that stay for good, because they hold attention sinks."""
        return -(-self.spec.sinks // block_size) if self.spec.window is not None else 0

    def window_start(self, position: int, block_size: int) -> int:
        """The first block behind the sinks that a query at `position`, or a later one, reads."""
        return first_needed(self.spec, position) // block_size

    def needed(self, num_blocks: int, block_size: int) -> Sequence[int]:
        """The blocks that resuming behind `num_blocks` whole blocks reads, in order."""
        start = self.window_start(num_blocks * block_size, block_size)
        sinks = self.sink_blocks(block_size)
        if start <= sinks:
            return range(num_blocks)
        return [*range(sinks), *range(start, num_blocks)]

    def most_blocks(self, num_tokens: int, chunk: int, slack: int, block_size: int) -> int:
        """The most blocks that a sequence owns on its way to `num_tokens` in such chunks."""
        whole = -(-num_tokens // block_size)
        if self.spec.window is None:
            return whole
        # Before it is freed, the window reaches from the first query's oldest key, `slack` further
        # back, over a chunk that is not committed yet, to the end of the chunk being planned.
        span = self.spec.window - 1 + slack + 2 * chunk
        return min(whole, self.sink_blocks(block_size) + -(-(span - 1) // block_size) + 1)


class BlockTable:
    """One sequence's blocks in every group.

    Positions `[0, committed)` are computed; `[committed, num_tokens)` are written by plans under
    way; the last block may reach further. `[sink blocks, freed[g])` are null in group g.
    """

    __slots__ = (
        "blocks",
        "capacity",
        "changes",
        "committed",
        "freed",
        "keys",
        "next_event",
        "num_tokens",
        "published",
        "tail_may_be_shared",
    )

    def __init__(self, keys: PrefixKeys, blocks: list[list[int]], num_tokens: int, size: int):
        self.keys = keys
        self.blocks = blocks
        self.num_tokens = num_tokens
        self.committed = num_tokens
        self.capacity = len(blocks[0]) * size
        self.published = num_tokens // size  # leading blocks that `publish` has dealt with
        self.freed = [0] * len(blocks)
        self.next_event = 0  # the committed length at which `publish` has something to do
        self.tail_may_be_shared = False
        # Since the last plan: (group, index, blocks) runs of entries that changed.
        self.changes: list[tuple[int, int, tuple[int, ...]]] = [
            (group, 0, tuple(row)) for group, row in enumerate(blocks) if row
        ]

    def put(self, group: int, index: int, block: int) -> None:
        """Replace one entry."""
        self.blocks[group][index] = block
        self.changes.append((group, index, (block,)))


@dataclass(slots=True)
class Moves:
    """What one plan copies, saves and loads, per group; its blocks are held until the commit."""

    saves: list[list[HostMove]]
    loads: list[list[HostMove]]
    copies: list[list[BlockCopy]]

    @classmethod
    def of(cls, num_groups: int) -> "Moves":
        """Nothing yet."""
        groups = range(num_groups)
        return cls([[] for _ in groups], [[] for _ in groups], [[] for _ in groups])
