"""One group's blocks: for each plane of each layer a tensor `[blocks, block_size, kv_heads, ...]`.

Bytes and nothing else. Who owns a block is the block manager's business, which positions it holds
the tables', what the planes mean the codec's. Block 0 is the null block: table entries without a
block point at it, padding is written to it, and nobody looks at what it holds.
"""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.cache.batch import int_tensor
from kvist.cache.groups import LayerGroup, bytes_per_token
from kvist.cache.protocol import SIDES, Codec, Planes, Side
from kvist.core.plan import BlockCopy
from kvist.errors import CacheError

LayerPlanes = dict[Side, dict[str, Tensor]]


class BlockPool:
    """The planes of one group of layers.

    Args:
        group: the layers, and what each keeps.
        codec: how tokens are written.
        num_blocks: blocks, the null block included.
        block_size: token places of a block.
        device: where the planes lie.
    """

    def __init__(
        self,
        group: LayerGroup,
        codec: Codec,
        *,
        num_blocks: int,
        block_size: int,
        device: str | torch.device = "cpu",
    ) -> None:
        """Allocate all blocks; zeroed, so that memory is touched only as blocks are used."""
        if num_blocks < 2 or block_size < 1:
            raise CacheError(
                f"a pool needs num_blocks >= 2, not {num_blocks}, since block 0 holds nothing, and "
                f"block_size >= 1, not {block_size}"
            )
        self.group = group
        self.codec = codec
        self.block_size = block_size
        self.device = torch.device(device)
        self.bytes_per_block = block_size * bytes_per_token(group, codec)
        self._hold(num_blocks, self._allocate(num_blocks))

    # Blocks outlive the step in which a pool grew: what is made in inference mode could not be
    # written outside it.
    @torch.inference_mode(False)
    def _allocate(self, num_blocks: int) -> dict[int, LayerPlanes]:
        return {
            layer_idx: {
                side: {
                    name: torch.zeros(
                        (num_blocks, self.block_size, *shape), dtype=dtype, device=self.device
                    )
                    for name, (shape, dtype) in self.codec.planes(
                        self.group.spec, side, layer_idx
                    ).items()
                }
                for side in SIDES
            }
            for layer_idx in self.group.layers
        }

    def _hold(self, num_blocks: int, planes: dict[int, LayerPlanes]) -> None:
        self.num_blocks = num_blocks
        self.planes = planes
        # The same memory twice more: by token place, and as bytes by block.
        self._places = {
            (layer_idx, side): {name: plane.flatten(0, 1) for name, plane in held.items()}
            for layer_idx, sides in planes.items()
            for side, held in sides.items()
        }
        self._bytes = [
            plane.view(num_blocks, -1).view(torch.uint8)
            for sides in planes.values()
            for held in sides.values()
            for plane in held.values()
        ]

    @property
    def nbytes(self) -> int:
        """Bytes of all blocks, used or free."""
        return self.num_blocks * self.bytes_per_block

    def write(self, layer_idx: int, side: Side, places: Tensor, tokens: Tensor) -> None:
        """Encode `tokens` `[N, kv_heads, head_dim]` into `places` `[N]` int64.

        Place `block * block_size + i` is the i-th of a block.
        """
        self.put(layer_idx, side, places, self.codec.encode(tokens, side, layer_idx))

    def put(self, layer_idx: int, side: Side, places: Tensor, planes: Planes) -> None:
        """Write what is encoded already, each plane `[N, kv_heads, ...]`, into `places` `[N]`."""
        for name, encoded in planes.items():
            plane = self._places[layer_idx, side][name]
            plane.index_put_((places,), encoded.to(plane.dtype))

    def read(self, layer_idx: int, side: Side, places: Tensor) -> dict[str, Tensor]:
        """The planes at `places` `[N]`, as they are written: each `[N, kv_heads, ...]`."""
        planes = self._places[layer_idx, side]
        return {name: plane.index_select(0, places) for name, plane in planes.items()}

    def grow(self, num_blocks: int) -> None:
        """Move to a larger pool; blocks keep their numbers, addresses change."""
        old, kept = self._bytes, self.num_blocks
        self._hold(num_blocks, self._allocate(num_blocks))
        for new, plane in zip(self._bytes, old, strict=True):
            new[:kept] = plane

    # Whole blocks, as bytes: `[n, bytes_per_block]` uint8, plane behind plane, layer behind layer.

    def copy_blocks(self, copies: Sequence[BlockCopy]) -> None:
        """Copy blocks within the pool, as if one after the other."""
        pending: list[BlockCopy] = []
        written: set[int] = set()
        for copy in copies:
            if copy.source in written:  # it reads what an earlier copy writes
                self._copy_at_once(pending)
                pending, written = [], set()
            pending.append(copy)
            written.add(copy.destination)
        if pending:
            self._copy_at_once(pending)

    def _copy_at_once(self, copies: Sequence[BlockCopy]) -> None:
        sources = int_tensor([copy.source for copy in copies], self.device)
        destinations = int_tensor([copy.destination for copy in copies], self.device)
        for plane in self._bytes:
            plane.index_copy_(0, destinations, plane.index_select(0, sources))

    def read_blocks(self, blocks: Sequence[int]) -> Tensor:
        """The bytes of some blocks, `[n, bytes_per_block]` uint8 on the pool's device."""
        index = int_tensor(blocks, self.device)
        return torch.cat([plane.index_select(0, index) for plane in self._bytes], dim=1)

    def write_blocks(self, blocks: Sequence[int], data: Tensor) -> None:
        """Put back what `read_blocks` of a pool of equal group, codec and block size gave."""
        index = int_tensor(blocks, self.device)
        widths = [plane.shape[1] for plane in self._bytes]
        for plane, part in zip(self._bytes, data.split(widths, dim=1), strict=True):
            plane.index_copy_(0, index, part)
