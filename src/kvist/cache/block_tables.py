"""One group's block tables: which block of the pool holds which positions of which slot.

Kept on the device from step to step and changed entry by entry as plans say: sending whole tables
costs milliseconds. A host copy serves what runs on the host. Entry i of a row is the block of the
positions `[i * block_size, (i + 1) * block_size)`, 0 where there is none: not yet, or no longer.
"""

from collections.abc import Iterable, Sequence

import numpy as np
import torch
from torch import Tensor

from kvist.cache.batch import int_tensor
from kvist.core.plan import NULL_BLOCK, TableChange


class BlockTables:
    """`[max_slots + 1, max_blocks]` int32 on the device; the last row stays null, for padding.

    Args:
        max_slots: sequences at a time.
        max_blocks: blocks of the longest sequence.
        max_tokens: most new tokens of a step.
        device: where kernels read.
    """

    def __init__(
        self, max_slots: int, max_blocks: int, max_tokens: int, device: torch.device
    ) -> None:
        """All entries null."""
        self.max_blocks = max_blocks
        self.host = np.zeros((max_slots + 1, max_blocks), dtype=np.int32)
        self._on_host = device.type == "cpu"
        # On a CPU the two are one piece of memory.
        shared = torch.from_numpy(self.host)
        self.device_table = shared if self._on_host else shared.to(device)
        # What a step sees, rewritten by each: a prefix of these serves every size of batch, always
        # at the same address.
        self._table = torch.zeros(max_slots, max_blocks, dtype=torch.int32, device=device)
        self._slot_mapping = torch.zeros(max_tokens, dtype=torch.long, device=device)

    def apply(self, changes: Sequence[TableChange]) -> None:
        """Change some entries, later changes over earlier ones."""
        entries: dict[int, int] = {}
        for slot, index, blocks in changes:
            self.host[slot, index : index + len(blocks)] = blocks
            if not self._on_host:
                start = slot * self.max_blocks + index
                entries.update(zip(range(start, start + len(blocks)), blocks, strict=True))
        if entries:
            table = self.device_table
            both = int_tensor([*entries, *entries.values()], table.device)
            places, values = both.split(len(entries))
            table.view(-1).index_put_((places,), values.int())

    def clear(self, slots: Iterable[int]) -> None:
        """Make all entries of some slots null, before other sequences take them."""
        rows = list(slots)
        if rows:
            self.host[rows] = NULL_BLOCK
            if not self._on_host:
                self.device_table.index_fill_(0, int_tensor(rows, self.device_table.device), 0)

    def bind(
        self, slots: Tensor, width: int, rows: Tensor, positions: Tensor, block_size: int
    ) -> tuple[Tensor, Tensor]:
        """Fill this step's table and slot mapping.

        Args:
            slots: `[B]`, each sequence's slot.
            width: entries that the longest sequence of the step has.
            rows: `[N]` int64, which sequence each new token belongs to.
            positions: `[N]` int64, its position there.
            block_size: token places of a block.

        Returns:
            the block table `[B, max_blocks]` int32, of which the first `width` columns count, and
            the slot mapping `[N]` int64: the place in the pool that each new token is written to.
        """
        table, slot_mapping = self.buffers(slots.shape[0], positions.shape[0])
        table[:, :width] = self.device_table[:, :width].index_select(0, slots)
        blocks = table[rows, positions // block_size].long()
        torch.add(blocks * block_size, positions % block_size, out=slot_mapping)
        return table, slot_mapping

    def buffers(self, sequences: int, tokens: int) -> tuple[Tensor, Tensor]:
        """What `bind` fills: a table `[sequences, max_blocks]` and a slot mapping `[tokens]`."""
        return self._table[:sequences], self._slot_mapping[:tokens]
