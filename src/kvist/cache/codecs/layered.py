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
        spans: ranges of layers, none of them twice, and the codec of each.
    """

    name: str
    default: Codec
    spans: tuple[tuple[range, Codec], ...]

    @property
    def lossless(self) -> bool:
        """Whether every layer's is."""
        return all(codec.lossless for codec in (self.default, *(codec for _, codec in self.spans)))

    @property
    def fingerprint(self) -> str:
        """That of every layer's codec."""
        parts = [f"{_text(span)}={codec.fingerprint}" for span, codec in self.spans]
        return ",".join([self.default.fingerprint, *parts])

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        """The layer's own."""
        return self.of(layer_idx).planes(spec, side, layer_idx)

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        """By the layer's own codec."""
        return self.of(layer_idx).encode(x, side, layer_idx)

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        """By the layer's own codec."""
        return self.of(layer_idx).decode(planes, side, layer_idx)

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        """By the layer's own codec."""
        return self.of(layer_idx).to_basis(q, layer_idx)

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        """By the layer's own codec."""
        return self.of(layer_idx).from_basis(out, layer_idx)

    def check_layers(self, count: int) -> None:
        """Raise CacheError if a layer is named that a model of `count` layers does not have."""
        for span, _ in self.spans:
            if span[-1] >= count:
                raise CacheError(
                    f"codec {self.name!r} names layer {span[-1]}, but the model has {count} layers"
                )

    def of(self, layer_idx: int) -> Codec:
        """The layer's own codec."""
        return next((codec for span, codec in self.spans if layer_idx in span), self.default)

    def __str__(self) -> str:
        """Its name."""
        return self.name


def parse_layers(text: str, make: Callable[[str], Codec]) -> Layered:
    """`int4,0-1=int8,5=plain` -> the codec.

    Raises:
        CacheError: a part is not `layer=codec` or `first-last=codec`, or two parts name one layer.
    """
    default, *parts = text.split(",")
    spans: list[tuple[range, Codec]] = []
    for part in parts:
        layers, equals, name = part.partition("=")
        first, dash, last = (piece.strip() for piece in layers.partition("-"))
        last = last if dash else first
        if not (equals and first.isdecimal() and last.isdecimal() and int(first) <= int(last)):
            raise CacheError(
                f"codec {text!r}: {part!r} is not layer=codec or first-last=codec; "
                f"write for example int4,0-1=int8"
            )
        span = range(int(first), int(last) + 1)
        for other, _ in spans:
            if span.start < other.stop and other.start < span.stop:
                layer = max(span.start, other.start)
                raise CacheError(f"codec {text!r} names layer {layer} twice")
        spans.append((span, make(name.strip())))
    spans.sort(key=lambda one: one[0].start)
    return Layered(text, make(default.strip()), tuple(spans))


def _text(span: range) -> str:
    return f"{span[0]}-{span[-1]}" if len(span) > 1 else f"{span[0]}"
