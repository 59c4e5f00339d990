"""fp8: floating-point numbers of 8 bits (e4m3), one scale for each token and head.

Its spacing follows a number's own size, so outliers cost little and no rotation is needed: the
codec whose planes any kernel reads most simply.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.codecs.int8 import divide, half_scale
from kvist.cache.protocol import Planes, Shape

LARGEST = 448.0  # of e4m3


@dataclass(frozen=True)
class FP8:
    """e4m3 (Micikevicius et al., 2022) times a float16 scale."""

    name = "e4m3"
    rotated = False

    def planes(self, num_heads: int, head_dim: int) -> dict[str, tuple[Shape, torch.dtype]]:
        """`x` and `scale`: 8 + 16 / head_dim bits a value."""
        return {
            "x": ((num_heads, head_dim), torch.float8_e4m3fn),
            "scale": ((num_heads,), torch.float16),
        }

    def encode(self, y: Tensor) -> dict[str, Tensor]:
        """`[..., heads, head_dim]` float32 -> planes; see `Coder.encode`."""
        scale = half_scale(y.abs().amax(dim=-1), LARGEST)
        x = divide(y, scale).clamp(-LARGEST, LARGEST)  # a scale may have been rounded down
        return {"x": x.to(torch.float8_e4m3fn), "scale": scale}

    def decode(self, planes: Planes) -> Tensor:
        """Planes -> `[..., heads, head_dim]` float32."""
        return planes["x"].float() * planes["scale"].float()[..., None]
