"""The host tier's bytes: blocks that fell out of the pool, kept in host memory until they are hit.

Which blocks move and when is decided in core; here they are only moved. Moves are queued on the
device's current stream and in its order, so a later step may read or reuse a block without waiting
for anything on the host.
"""

from collections.abc import Sequence

import torch

from kvist.cache.block_pool import BlockPool
from kvist.core.plan import HostMove


class HostPool:
    """Host blocks of one group, each the bytes of one block of its pool in one piece.

    Args:
        pool: the group's pool on the device.
        num_blocks: host blocks.
    """

    def __init__(self, pool: BlockPool, num_blocks: int) -> None:
        """Allocate; pinned where the pool is on a GPU, so that copies need not be waited for."""
        self.pool = pool
        self.num_blocks = num_blocks
        self._data = torch.empty(
            (num_blocks, pool.bytes_per_block),
            dtype=torch.uint8,
            pin_memory=pool.device.type == "cuda",
        )

    @property
    def nbytes(self) -> int:
        """Bytes of all host blocks, used or free."""
        return self._data.nbytes

    def save(self, moves: Sequence[HostMove]) -> None:
        """Copy blocks of the pool to host blocks."""
        if moves:
            packed = self.pool.read_blocks([move.block for move in moves])
            for row, move in zip(packed, moves, strict=True):
                self._data[move.host_block].copy_(row, non_blocking=True)

    def load(self, moves: Sequence[HostMove]) -> None:
        """Copy host blocks to blocks of the pool."""
        if moves:
            shape = (len(moves), self.pool.bytes_per_block)
            packed = torch.empty(shape, dtype=torch.uint8, device=self.pool.device)
            for row, move in zip(packed, moves, strict=True):
                row.copy_(self._data[move.host_block], non_blocking=True)
            self.pool.write_blocks([move.block for move in moves], packed)
