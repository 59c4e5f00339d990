"""A codec for each layer: `int4,0-1=int8` writes the first two layers in int8, the rest in int4."""

from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.protocol import Codec, Planes, Shape, Side
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError


@dataclass(frozen=True)
class Layered:
    """One codec for some layers, another for the rest; satisfies `Codec`.

    Args:
        name: the text that it was made from.
        default: for layers that are not named.
        layers: layer -> its own codec.
    """

    name: str
    default: Codec
    layers: dict[int, Codec]

    @property
    def lossless(self) -> bool:
        """Whether every layer's is."""
        return all(codec.lossless for codec in (self.default, *self.layers.values()))

    @property
    def fingerprint(self) -> str:
        """That of every layer's codec."""
        parts = [f"{layer}={codec.fingerprint}" for layer, codec in sorted(self.layers.items())]
        return ",".join([self.default.fingerprint, *parts])

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """The layer's own."""
        return self._of(layer_idx).planes(spec, side, layer_idx)

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        """By the layer's own codec."""
        return self._of(layer_idx).encode(x, side, layer_idx)

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        """By the layer's own codec."""
        return self._of(layer_idx).decode(planes, side, layer_idx)

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        """By the layer's own codec."""
        return self._of(layer_idx).to_basis(q, layer_idx)

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        """By the layer's own codec."""
        return self._of(layer_idx).from_basis(out, layer_idx)

    def _of(self, layer_idx: int) -> Codec:
        return self.layers.get(layer_idx, self.default)


def parse_layers(text: str, make: Callable[[str], Codec]) -> Layered:
    """`int4,0-1=int8,5=plain` -> the codec.

    Raises:
        CacheError: a part is not `layer=codec` or `first-last=codec`, or two parts name one layer.
    """
    default, *parts = text.split(",")
    layers: dict[int, Codec] = {}
    for part in parts:
        span, equals, name = part.partition("=")
        first, dash, last = span.partition("-")
        if not equals or not first.strip().isdecimal() or (dash and not last.strip().isdecimal()):
            raise CacheError(
                f"codec {text!r}: {part!r} is not layer=codec or first-last=codec; "
                "write for example int4,0-1=int8"
            )
        codec = make(name.strip())
        for layer in range(int(first), int(last if dash else first) + 1):
            if layer in layers:
                raise CacheError(f"codec {text!r} names layer {layer} twice")
            layers[layer] = codec
    return Layered(text, make(default.strip()), layers)
