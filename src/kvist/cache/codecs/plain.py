"""`plain`: keys and values as they are, in a floating-point type."""

from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.protocol import Planes, Shape, Side
from kvist.core.spec import AttentionSpec


@dataclass(frozen=True)
class Plain:
    """Keys and values in a floating-point dtype, unchanged when it is the model's own."""

    dtype: torch.dtype

    name = "plain"
    lossless = True

    @property
    def fingerprint(self) -> str:
        """The dtype is all that decides what the bytes mean."""
        return f"plain({str(self.dtype).removeprefix('torch.')})"

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """One plane, `x`."""
        return {"x": ((spec.num_kv_heads, spec.head_dim), self.dtype)}

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        """Nothing to do."""
        return {"x": x}

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        """Nothing to do; the plane itself, not a copy."""
        return planes["x"]

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        """The planes' basis is the model's."""
        return q

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        """The planes' basis is the model's."""
        return out
