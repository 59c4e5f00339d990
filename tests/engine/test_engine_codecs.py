"""Within each codec the engine's tokens do not depend on how they were computed.

What attention sees is always decoded from what was written, also for a step's own tokens, so warm
equals cold and chunked equals whole in a lossy codec too.
"""

from typing import Any

import pytest
import torch
from agreement import Tally, assert_same
from mixes import LENGTH, assert_idle, null_bytes, poison, sequence_bytes
from test_llm import PROMPTS
from torch import Tensor

import kvist
from kvist import LLM, SamplingParams
from kvist.cache import CODECS, Codec
from kvist.cache.protocol import Planes, Shape, Side
from kvist.core.spec import AttentionSpec
from tiny_models import tiny

GREEDY = SamplingParams(temperature=0, max_tokens=16, ignore_eos=True)


class Coarse:
    """Each token and head in 15 steps of its largest value: as lossy as a cache may get."""

    name = fingerprint = "coarse"
    lossless = False

    def planes(
        self, spec: AttentionSpec, side: Side, layer_idx: int
    ) -> dict[str, tuple[Shape, torch.dtype]]:
        return {
            "steps": ((spec.num_kv_heads, spec.head_dim), torch.int8),
            "scale": ((spec.num_kv_heads, 1), torch.float32),
        }

    def encode(self, x: Tensor, side: Side, layer_idx: int) -> dict[str, Tensor]:
        scale = x.abs().amax(-1, keepdim=True) / 7
        return {"steps": (x / scale).round().to(torch.int8), "scale": scale}

    def decode(self, planes: Planes, side: Side, layer_idx: int) -> Tensor:
        return planes["steps"] * planes["scale"]

    def to_basis(self, q: Tensor, layer_idx: int) -> Tensor:
        return q

    def from_basis(self, out: Tensor, layer_idx: int) -> Tensor:
        return out


def engine(codec: str | Codec, *, room: float = 6.0, host_room: float = 0, **options: Any) -> LLM:
    sizes = {"block_size": 4, "max_batch_tokens": 64, "max_num_seqs": 4, "codec": codec} | options
    one = sequence_bytes(tiny(), **sizes)
    llm = LLM(
        tiny(),
        max_model_len=LENGTH,
        cache_memory=null_bytes(tiny(), **sizes) + int(room * one),
        host_cache=int(host_room * one),
        **sizes,
    )
    poison(llm.engine)
    return llm


@pytest.fixture(params=[*CODECS, Coarse()], ids=lambda codec: getattr(codec, "name", codec))
def codec(request: pytest.FixtureRequest) -> str | Codec:
    """Every codec there is, and one that loses more than any of them."""
    chosen: str | Codec = request.param
    return chosen


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 5},
        {"max_num_seqs": 1},
        {"room": 1.2},
        {"room": 1.2, "host_room": 20},
        {"speculate": 3},
        {"overlap": True, "room": 1.2},
    ],
    ids=lambda options: "-".join(f"{name}={value}" for name, value in options.items()) or "plenty",
)
def test_tokens_are_those_of_the_loop_with_the_same_codec(codec: str | Codec, options: Any) -> None:
    expected = kvist.generate(tiny(), PROMPTS, GREEDY, codec=codec)
    llm, tally, params = engine(codec, **options), Tally(), GREEDY.resolve({})
    for _ in range(2):
        results = llm.generate(PROMPTS, GREEDY)
        for prompt, want, got in zip(PROMPTS, expected, results, strict=True):
            assert_same(tiny(), prompt, params, want, got, tally, codec=codec)
        poison(llm.engine, free_only=True)
    assert_idle(llm.engine)
    snapshot = llm.snapshot()
    if options.get("room"):
        assert snapshot.preemptions > 0
    if options.get("host_room"):
        assert snapshot.counters.loaded_blocks > 0


def test_a_lossy_codec_is_not_the_plain_one() -> None:
    plain, coarse = (kvist.generate(tiny(), PROMPTS, GREEDY, codec=c) for c in ("plain", Coarse()))
    assert [r.token_ids for r in plain] != [r.token_ids for r in coarse]


def test_a_smaller_codec_holds_more_blocks() -> None:
    plain, coarse = (
        LLM(tiny(), codec=c, cache_memory=1 << 18).snapshot().groups[0].num_blocks
        for c in ("plain", Coarse())
    )
    # 8 channels of a head: 32 bytes, or 8 and a scale of 4.
    assert coarse / plain == pytest.approx(32 / 12, rel=0.05)
