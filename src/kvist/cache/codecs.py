"""Codecs: how a token's keys and values are written. `plain` writes them as they are.

A codec knows nothing of where planes lie or which tokens stay. A new one is a class in a file of
its own and a line in `CODECS` (docs/recipes/codec.md); the contract suite then tests it on every
layout.
"""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.protocol import Codec, Planes, Shape, Side
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError


@dataclass(frozen=True)
class Plain:
    """Keys and values in a floating-point dtype, unchanged when it is the model's own."""

    dtype: torch.dtype

    name = "plain"
    lossless = True

    def planes(self, spec: AttentionSpec, side: Side) -> dict[str, tuple[Shape, torch.dtype]]:
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


CODECS: dict[str, Callable[[torch.dtype], Codec]] = {"plain": Plain}


def make_codec(name: str, dtype: torch.dtype) -> Codec:
    """The codec of this name for a model that computes in `dtype`.

    Raises:
        CacheError: no codec of this name.
    """
    if name not in CODECS:
        raise CacheError(f"no codec named {name!r}; there are: {', '.join(CODECS)}")
    return CODECS[name](dtype)
