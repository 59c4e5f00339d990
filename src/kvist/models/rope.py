"""Rotary position embeddings (Su et al., 2021) and how families stretch them over longer contexts.

Frequencies are computed once from the configuration; cosines and sines once for each forward and
handed to every layer. Types: default, linear, llama3, yarn (Peng et al., 2023); others are refused.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn

from kvist.errors import ConfigError, NotSupported

Rotation = tuple[Tensor, Tensor]  # cos and signed sin, each [N, 1, head_dim]


@dataclass(frozen=True)
class RopeConfig:
    """Rotation of `head_dim` channels.

    Args:
        head_dim: channels of a head, all rotated.
        theta: base of the geometric series of wavelengths.
        kind: "default", "linear", "llama3" or "yarn".
        factor: how many times the original context is stretched.
        original: the context that the model was trained on before stretching.
        low, high: llama3's low_freq_factor and high_freq_factor; yarn's beta_slow and beta_fast.
        truncate: yarn rounds its correction range to whole channels.
        attention_factor: yarn's factor on cosines and sines.
    """

    head_dim: int
    theta: float
    kind: str = "default"
    factor: float = 1.0
    original: int = 0
    low: float = 1.0
    high: float = 1.0
    truncate: bool = True
    attention_factor: float = 1.0


def read_rope(
    config: Mapping[str, Any], *, head_dim: int, max_positions: int, default_theta: float
) -> RopeConfig:
    """Read `rope_parameters` (transformers 5) or `rope_theta` + `rope_scaling` (transformers 4).

    Raises:
        NotSupported: a rope type, partial rotation, or a rotation for each type of layer, which
            kvist does not run.
        ConfigError: a field that the type needs is missing or makes no sense.
    """
    given = config.get("rope_scaling") or config.get("rope_parameters") or {}
    if not isinstance(given, Mapping):
        raise ConfigError(f"config.json: rope parameters must be an object, not {given!r}")
    if nested := [name for name, value in given.items() if isinstance(value, Mapping)]:
        raise NotSupported(f"rope parameters by layer type ({', '.join(nested)})")
    kind = given.get("rope_type") or given.get("type") or "default"
    default_theta = positive_number(config, "rope_theta", default_theta)
    theta = positive_number(given, "rope_theta", default_theta)
    partial = given.get("partial_rotary_factor", config.get("partial_rotary_factor"))
    if partial not in (None, 1, 1.0):
        raise NotSupported(f"partial_rotary_factor {partial}; kvist rotates whole heads")
    if kind == "default":
        return RopeConfig(head_dim, theta)

    if kind not in ("linear", "llama3", "yarn"):
        raise NotSupported(f"rope type {kind!r}; kvist runs default, linear, llama3 and yarn")

    def need(name: str, default: float | None = None) -> float:
        return positive_number(given, name, default, of=f"rope type {kind!r}")

    if kind == "linear":
        return RopeConfig(head_dim, theta, kind, need("factor"))
    original = int(need("original_max_position_embeddings", max_positions))
    if kind == "llama3":
        low, high = need("low_freq_factor"), need("high_freq_factor")
        if low >= high:
            raise ConfigError(
                f"config.json: low_freq_factor {low:g} must be below high_freq_factor {high:g}"
            )
        return RopeConfig(head_dim, theta, kind, need("factor"), original, low, high)
    factor = need("factor", max_positions / original)
    low, high = need("beta_slow", 1.0), need("beta_fast", 32.0)
    if theta <= 1 or low >= high:
        raise ConfigError(
            f"config.json: yarn needs rope_theta > 1 and beta_slow < beta_fast, not {theta:g}, "
            f"{low:g} and {high:g}"
        )
    # YaRN's temperature, unless the file states it.
    mscales = (need(name) if given.get(name) else None for name in ("mscale", "mscale_all_dim"))
    usual = _yarn_scale(factor, *mscales)
    attention = need("attention_factor", usual)
    truncate = given.get("truncate") is not False
    return RopeConfig(head_dim, theta, kind, factor, original, low, high, truncate, attention)


def positive_number(
    fields: Mapping[str, Any], name: str, default: float | None = None, *, of: str = "it"
) -> float:
    """A field of config.json that must be a number over zero; null and missing are the default."""
    value = fields.get(name)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json: {of} lacks {name!r}")
    usable = isinstance(value, int | float) and not isinstance(value, bool)
    if not usable or not 0 < value < math.inf:
        raise ConfigError(f"config.json: {name} must be a number over zero, not {value!r}")
    return float(value)


def _yarn_scale(factor: float, mscale: float | None, mscale_all_dim: float | None) -> float:
    """YaRN's temperature, section 3.4 of the paper (with DeepSeek's two multipliers)."""

    def scale(multiplier: float) -> float:
        return 1.0 if factor <= 1 else 0.1 * multiplier * math.log(factor) + 1.0

    if mscale and mscale_all_dim:
        return scale(mscale) / scale(mscale_all_dim)
    return scale(1.0)


def rope_frequencies(rope: RopeConfig) -> Tensor:
    """`[head_dim / 2]` float32: radians per position of each pair of channels."""
    exponents = torch.arange(0, rope.head_dim, 2, dtype=torch.float32) / rope.head_dim
    plain = 1.0 / rope.theta**exponents
    if rope.kind == "linear":
        return plain / rope.factor
    if rope.kind == "llama3":
        # Wavelengths over original/low are stretched, those under original/high are kept, and
        # between the two the frequencies go over smoothly.
        turns = rope.original * plain / (2 * math.pi)
        keep = ((turns - rope.low) / (rope.high - rope.low)).clamp(0, 1)
        return (1 - keep) * plain / rope.factor + keep * plain
    if rope.kind == "yarn":
        stretch = _yarn_ramp(rope)
        return plain / rope.factor * stretch + plain * (1 - stretch)
    return plain


def _yarn_ramp(rope: RopeConfig) -> Tensor:
    """`[head_dim / 2]`, from 0 (keep the frequency) to 1 (stretch it by the factor)."""

    def channel(turns: float) -> float:
        """The pair of channels that makes this many turns over the original context."""
        ratio = rope.original / (turns * 2 * math.pi)
        return rope.head_dim * math.log(ratio) / (2 * math.log(rope.theta))

    first, last = channel(rope.high), channel(rope.low)
    if rope.truncate:
        first, last = math.floor(first), math.ceil(last)
    first, last = max(first, 0), min(last, rope.head_dim - 1)
    pairs = torch.arange(rope.head_dim // 2, dtype=torch.float32)
    # A range turned over by the clamping above keeps every frequency, as in transformers.
    width = (last - first) or 0.001
    return ((pairs - first) / width).clamp(0, 1)


class RotaryEmbedding(nn.Module):
    """Cosines and sines of positions, once for all layers of a forward."""

    def __init__(self, rope: RopeConfig) -> None:
        """Keep the configuration; frequencies are computed where the first positions lie."""
        super().__init__()
        self.rope = rope
        self._frequencies: Tensor | None = None

    def forward(self, positions: Tensor, dtype: torch.dtype) -> Rotation:
        """Compute the rotation of each position.

        Args:
            positions: `[N]`.
            dtype: of the result; the angles themselves are float32.

        Returns:
            cos and sin, `[N, 1, head_dim]`, the first half of sin negated (see `rotate`).
        """
        frequencies = self._frequencies
        if frequencies is None or frequencies.device != positions.device:
            frequencies = rope_frequencies(self.rope).to(positions.device)
            self._frequencies = frequencies
        angles = positions[:, None].float() * frequencies  # [N, head_dim / 2]
        cos, sin = angles.cos(), angles.sin()
        scale = self.rope.attention_factor
        cos = torch.cat((cos, cos), dim=-1) * scale
        sin = torch.cat((-sin, sin), dim=-1) * scale
        return cos[:, None].to(dtype), sin[:, None].to(dtype)


def rotate(x: Tensor, rotation: Rotation) -> Tensor:
    """Rotate the pairs of channels (i, i + head_dim/2) of `x` `[N, heads, head_dim]`."""
    cos, sin = rotation
    swapped = x.roll(x.shape[-1] // 2, dims=-1)  # (x2, x1); sin carries the sign
    return torch.addcmul(x * cos, swapped, sin)
