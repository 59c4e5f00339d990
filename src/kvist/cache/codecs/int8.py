"""int8: a byte for each number, one scale for each token and head."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.protocol import Planes, Shape

LARGEST = 127
_LARGEST_HALF = 65504.0


@dataclass(frozen=True)
class Int8:
    """Whole numbers from -127 to 127 times a float16 scale."""

    name = "int8"
    rotated = True

    def planes(self, num_heads: int, head_dim: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """`x` and `scale`: 8 + 16 / head_dim bits a value."""
        return {
            "x": ((num_heads, head_dim), torch.int8),
            "scale": ((num_heads,), torch.float16),
        }

    def encode(self, y: Tensor) -> dict[str, Tensor]:
        """`[..., heads, head_dim]` float32 -> planes; see `Coder.encode`."""
        scale = half_scale(y.abs().amax(dim=-1), LARGEST)
        x = divide(y, scale).round().clamp(-LARGEST, LARGEST)
        return {"x": x.to(torch.int8), "scale": scale}

    def decode(self, planes: Planes) -> Tensor:
        """Planes -> `[..., heads, head_dim]` float32."""
        return planes["x"].float() * planes["scale"].float()[..., None]


def half_scale(largest: Tensor, limit: float) -> Tensor:
    """What brings `largest` to `limit`, as it is stored: float16 and finite unless it is NaN."""
    return divided(largest, limit).clamp(max=_LARGEST_HALF).half()


def divided(x: Tensor, number: float) -> Tensor:
    """`x / number`, the same bits on every device: by a plain number a GPU multiplies."""
    return x / x.new_full((), number)


def divide(y: Tensor, scale: Tensor) -> Tensor:
    """`y / scale` for `[..., head_dim]` by the stored scale `[...]`; 0 where that is 0 or NaN."""
    wide = scale.float()[..., None]
    return torch.where(wide > 0, y / wide, 0.0)
