"""Pictures in the engine: found again by what they show, encoded once, cut anywhere by a chunk."""

from typing import Any

import pytest
import torch
from mixes import assert_idle, null_bytes, poison, sequence_bytes
from PIL import Image

import kvist
from kvist import LLM, SamplingParams
from kvist.loading.model import Model
from tiny_models import FIXTURES

LENGTH = 96
GREEDY = SamplingParams(temperature=0, max_tokens=10, ignore_eos=True)
CAT = Image.open(FIXTURES / "nanovlm" / "chelsea.png")
TAC = CAT.transpose(Image.Transpose.FLIP_LEFT_RIGHT)


@pytest.fixture(scope="module")
def seeing() -> Model:
    return kvist.load(FIXTURES / "nanovlm" / "vlm_tied")


def talk(text: str, *pictures: Image.Image) -> list[dict[str, Any]]:
    content = [{"type": "image", "image": picture} for picture in pictures]
    return [{"role": "user", "content": [*content, {"type": "text", "text": text}]}]


TALKS = [
    talk("what is it?", CAT),
    talk("what is it?", TAC),
    talk("who?", CAT),
    talk("only words"),
    talk("and both?", CAT, TAC),
]


def engine(model: Model, *, room: float = 5.0, **options: Any) -> LLM:
    sizes = {"block_size": 8, "max_batch_tokens": 64, "max_num_seqs": 3} | options
    one = sequence_bytes(model, length=LENGTH, **sizes)
    memory = null_bytes(model, **sizes) + int(room * one)
    llm = LLM(model, max_model_len=LENGTH, cache_memory=memory, **sizes)
    poison(llm.engine)
    return llm


@pytest.mark.parametrize(
    "options",
    [
        {},
        {"max_batch_tokens": 3},
        {"block_size": 1, "max_batch_tokens": 17},
        {"room": 1.1, "overlap": True},
        {"room": 1.1, "host_cache": 1 << 22},
        {"speculate": 3},
    ],
    ids=str,
)
def test_tokens_are_those_of_the_loop(seeing: Model, options: dict[str, Any]) -> None:
    expected = kvist.generate(seeing, TALKS, GREEDY)
    llm = engine(seeing, **options)
    for _ in range(2):
        results = llm.chat(TALKS, GREEDY)
        assert [r.token_ids for r in results] == [r.token_ids for r in expected]
        poison(llm.engine, free_only=True)
    assert_idle(llm.engine)


def test_a_picture_is_found_again_and_another_is_not_taken_for_it(seeing: Model) -> None:
    llm = engine(seeing, max_num_seqs=1)
    cat, tac, again, *_ = llm.chat([*TALKS[:2], TALKS[0]], GREEDY)
    assert cat.usage.cached_tokens == tac.usage.cached_tokens == 0
    assert again.usage.cached_tokens == 40
    assert cat.token_ids == again.token_ids


def test_a_picture_that_several_ask_about_is_encoded_once(seeing: Model) -> None:
    llm = engine(seeing, prefix_cache=False)
    encode, seen = llm.engine.runner.encode, []
    assert encode is not None

    def counted(pixels: Any) -> torch.Tensor:
        seen.append(pixels)
        return encode(pixels)

    llm.engine.runner.encode = counted
    llm.chat([talk(text, CAT) for text in ("what?", "who?", "where?")], GREEDY)
    tiles = len(seeing.prepare(talk("what?", CAT)).spans)
    assert len(seen) == tiles


def test_placeholders_without_a_picture_are_another_prompt(seeing: Model) -> None:
    prepared = seeing.prepare(TALKS[0])
    llm = engine(seeing)
    [shown] = llm.chat(TALKS[0], GREEDY)
    [told] = llm.generate([prepared.token_ids], GREEDY)
    assert told.usage.cached_tokens == 0
    assert told.usage.prompt_tokens == shown.usage.prompt_tokens
