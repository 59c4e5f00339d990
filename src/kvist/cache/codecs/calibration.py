"""The constant part of a model's keys: their mean for each layer, head and channel.

Over half of what a trained model's keys hold is the same for every token. A codec of few bits that
need not spend them on that is the better for it. The mean is taken once, when a model is first used
with such a codec, over a built-in text that nothing is measured on, and names itself in the codec's
fingerprint.

Rotation moves the mean: in channels that turn slowly it is nearly constant, in those that turn fast
it is nearly zero. So the text is cut into pieces whose positions are spread over `REACH`, and the
mean is that of all of them; a mean of early positions alone is worth nothing at late ones.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from importlib.resources import files
from typing import Protocol

import torch
from torch import Tensor

from kvist.cache.batch import Batch
from kvist.cache.codecs.plain import Plain
from kvist.cache.dense import DynamicCache
from kvist.cache.protocol import KVCache, Planes, Shape, Side
from kvist.core.spec import AttentionSpec, LayerSpec

PIECES = 8
REACH = 4096  # positions
SKIPPED = 4  # first tokens of a piece, whose keys are unlike all others (attention sinks)


@dataclass(frozen=True, eq=False)
class Calibration:
    """The mean of a model's keys, rotated by RoPE.

    Args:
        key_means: `[kv_heads, head_dim]` float32 for each layer.
        source: what they were computed from; with the model's own fingerprint it names them. (Not
            a digest of the numbers: another machine adds them up in another order, and a shift so
            small, equal for all keys, cancels in the softmax.)
    """

    key_means: tuple[Tensor, ...]
    source: str

    def key_mean(self, layer_idx: int, device: torch.device) -> Tensor:
        """`[kv_heads, head_dim]` float32, on this device."""
        return self.key_means[layer_idx].to(device)


class _Limits(Protocol):
    @property
    def max_positions(self) -> int:
        """Positions that the model knows."""


class LanguageModel(Protocol):
    """What `calibrate` asks of a model; `kvist.models.CausalLM` has it."""

    @property
    def config(self) -> _Limits:
        """The decoder's configuration."""

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What each layer's cache must hold."""

    def embed(self, token_ids: Tensor) -> Tensor:
        """`[N]` -> `[N, hidden]`."""

    def forward(self, embeddings: Tensor, positions: Tensor, cache: KVCache) -> Tensor:
        """`[N, hidden]` -> `[N, hidden]`; positions are for rotation."""


def calibration_text() -> str:
    """The built-in text: prose, code, numbers and several languages."""
    return files("kvist.cache.codecs").joinpath("calibration.txt").read_text(encoding="utf-8")


@torch.inference_mode()
def calibrate(
    lm: LanguageModel,
    token_ids: Sequence[int],
    *,
    dtype: torch.dtype,
    device: str | torch.device = "cpu",
) -> Calibration:
    """Run a text through the model, all pieces in one batch, and average its keys.

    Args:
        lm: the model.
        token_ids: the text, at least one token; a few hundred are enough.
        dtype: of the model.
        device: where it runs.
    """
    length = -(-len(token_ids) // PIECES)
    pieces = [token_ids[i : i + length] for i in range(0, len(token_ids), length)]
    batch = Batch.pack(pieces, [0] * len(pieces), device=device, logits="none")
    stride = max(min(REACH, lm.config.max_positions) - length, 0) // PIECES
    recorder = _Recorder(Plain(dtype), counted=batch.positions >= min(SKIPPED, len(pieces[-1]) - 1))
    cache = DynamicCache(lm.specs, recorder, rows=len(pieces), device=device)
    positions = batch.positions + stride * batch.sequence_index
    lm.forward(lm.embed(batch.token_ids), positions, cache.bind(batch))
    means = tuple(recorder.key_means[layer_idx] for layer_idx in range(len(lm.specs)))
    digest = sha256(repr([tuple(piece) for piece in pieces]).encode()).hexdigest()[:16]
    return Calibration(means, f"text {digest}, a piece every {stride} positions")


@dataclass
class _Recorder:
    """The plain codec, noting the mean of the keys that it is given; satisfies `Codec`."""

    plain: Plain
    counted: Tensor  # bool [N], the tokens that enter the mean
    key_means: dict[int, Tensor] = field(default_factory=dict)

    name = "recorder"
    lossless = True
    fingerprint = "recorder"

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        return self.plain.planes(spec, side, layer_idx)

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        if side == "key":
            mean = x[self.counted].float().mean(dim=0)
            with torch.inference_mode(False):  # it outlives the forward
                self.key_means[layer_idx] = mean.clone()
        return self.plain.encode(x, side, layer_idx)

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        return self.plain.decode(planes, side, layer_idx)

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        return q

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        return out
