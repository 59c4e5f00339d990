"""int4: half a byte for each number, a scale and a zero for each group of channels.

A group's 16 levels go from its smallest to its largest value. Then scale and zero are stretched by
one factor, such that the product of the group with what is read back equals that with itself. A key
matters where a query looks its way, and there the error along the key itself is what moves the
score; this takes it away for one multiplication at encoding and none at reading.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import pad

from kvist.cache.codecs.int8 import divided
from kvist.cache.protocol import Planes, Shape
from kvist.errors import CacheError

LEVELS = 16
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Int4:
    """Whole numbers from 0 to 15, two a byte, times a float16 scale plus a float16 zero.

    Byte i has channel i in its low and channel i + head_dim / 2 in its high four bits.

    Args:
        group: consecutive channels that share scale and zero; the last group may have fewer.
    """

    group: int = 32

    rotated = True

    @property
    def name(self) -> str:
        """Format and group."""
        return f"int4 g{self.group}"

    def planes(self, num_heads: int, head_dim: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """`x`, `scale` and `zero`: 4 + 32 / group bits a value."""
        if head_dim % 2:
            raise CacheError(f"int4 packs two channels a byte, but head_dim {head_dim} is odd")
        groups = (num_heads, -(-head_dim // self.group))
        return {
            "x": ((num_heads, head_dim // 2), torch.uint8),
            "scale": (groups, torch.float16),
            "zero": (groups, torch.float16),
        }

    def encode(self, y: Tensor) -> dict[str, Tensor]:
        """`[..., heads, head_dim]` float32, from `rotate_exactly` -> planes; see `Coder.encode`."""
        head_dim = y.shape[-1]
        size = min(self.group, head_dim)
        missing = -head_dim % size
        low, high = self._bounds(y, size, missing)  # [..., heads, groups, 1]
        groups = pad(y, (0, missing)).unflatten(-1, (-1, size))  # [..., heads, groups, size]
        step = divided(high - low, LEVELS - 1)
        numbers = torch.where(step > 0, (groups - low) / step, 0.0).round_()
        numbers.clamp_(0, LEVELS - 1)
        # Sums of products of whole numbers (see `rotate_exactly`), at most 2**24 each, over at most
        # 32 channels: float64 holds them exactly, so their order does not matter. Padding is zero.
        wide = groups.double()
        itself = (wide * wide).sum(dim=-1, keepdim=True)
        read_back = step * (wide * numbers).sum(dim=-1, keepdim=True)
        read_back += low * wide.sum(dim=-1, keepdim=True)
        stretch = torch.where(read_back > 0, itself / read_back, 1.0)
        low_half, high_half = (
            numbers.flatten(-2)[..., :head_dim].to(torch.uint8).unflatten(-1, (2, -1)).unbind(-2)
        )
        return {
            "x": low_half | (high_half << 4),
            "scale": _half(step * stretch),
            "zero": _half(low * stretch),
        }

    def decode(self, planes: Planes) -> Tensor:
        """Planes -> `[..., heads, head_dim]` float32."""
        x, scale, zero = planes["x"], planes["scale"].float(), planes["zero"].float()
        numbers = torch.cat((x & 15, x >> 4), dim=-1).float()
        head_dim = numbers.shape[-1]
        size = min(self.group, head_dim)
        if head_dim % size == 0:
            groups = numbers.unflatten(-1, (-1, size))
            return torch.addcmul(zero[..., None], groups, scale[..., None]).flatten(-2)
        scale, zero = (s.repeat_interleave(size, dim=-1)[..., :head_dim] for s in (scale, zero))
        return torch.addcmul(zero, numbers, scale)

    def _bounds(self, y: Tensor, size: int, missing: int) -> tuple[Tensor, Tensor]:
        """Each group's smallest and largest value; a short group is filled with its own last."""
        if missing:
            y = torch.cat((y, y[..., -1:].expand(*y.shape[:-1], missing)), dim=-1)
        low, high = y.unflatten(-1, (-1, size)).aminmax(dim=-1, keepdim=True)
        return low, high


def _half(x: Tensor) -> Tensor:
    """`[..., groups, 1]` -> `[..., groups]` float16, finite unless it is NaN."""
    return x[..., 0].clamp(-_LARGEST_HALF, _LARGEST_HALF).half()
