"""`plain`: keys and values as they are, in a floating-point type."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.protocol import Planes, Shape, Side
from kvist.core.spec import AttentionSpec


@dataclass(frozen=True)
class Plain:
    """Keys and values in a floating-point dtype, unchanged when it is the model's own.

    Args:
        dtype: what they are given and read in.
        stored: what they are kept in, None for the same. An executor that rounds them to it before
            it multiplies loses nothing by their being kept so.
    """

    dtype: torch.dtype
    stored: torch.dtype | None = None

    name = "plain"
    lossless = True

    @property
    def fingerprint(self) -> str:
        """The stored dtype is all that decides what the bytes mean."""
        return f"plain({str(self.stored or self.dtype).removeprefix('torch.')})"

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """One plane, `x`."""
        return {"x": ((spec.num_kv_heads, spec.head_dim), self.stored or self.dtype)}

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        """Nothing to do but to round, where less is stored."""
        return {"x": x.to(self.stored or self.dtype)}

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        """Nothing to do; the plane itself, not a copy, unless less is stored."""
        return planes["x"] if self.stored is None else planes["x"].to(self.dtype)

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        """The planes' basis is the model's."""
        return q

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        """The planes' basis is the model's."""
        return out
