"""The real SmolLM2-135M, from its GGUF, gives transformers' tokens and log-probabilities."""

import json
from dataclasses import dataclass
from functools import cache
from typing import Any

import pytest
import torch

import kvist
from kvist import SamplingParams
from tiny_models import FIXTURES, forward, new_cache

pytestmark = pytest.mark.smollm2

# The reference's weights went through float16 on their way, ours did not. Of the five likeliest
# tokens the last may be as unlikely as e^-11, and further off.
LOGPROB, UNLIKELY = 0.02, 0.05


@cache
def facts() -> dict[str, Any]:
    found: dict[str, Any] = json.loads((FIXTURES / "smollm2" / "reference.json").read_text())
    return found


@dataclass(frozen=True)
class Answered:
    """A case of the reference, and what kvist made of it."""

    case: dict[str, Any]
    result: kvist.Result


@pytest.fixture(scope="module")
def answered(smollm2: kvist.Model) -> list[Answered]:
    """All of the reference's prompts as one ragged batch."""
    cases = [case for case in facts()["cases"] if case["greedy_ids"]]
    params = [
        SamplingParams(temperature=0, max_tokens=len(case["greedy_ids"]), logprobs=5)
        for case in cases
    ]
    results = kvist.generate(smollm2, [case["prompt_ids"] for case in cases], params)
    return [Answered(*pair) for pair in zip(cases, results, strict=True)]


def test_prompts_have_transformers_ids(smollm2: kvist.Model) -> None:
    for case in facts()["cases"]:
        chat = [{"role": "user", "content": case["prompt"]}]
        prompt = chat if case["kind"] == "chat" else case["prompt"]
        assert list(smollm2.encode(prompt)) == case["prompt_ids"]


def test_greedy_tokens_are_transformers(answered: list[Answered]) -> None:
    assert len(answered) >= 5
    for one in answered:
        assert list(one.result.token_ids) == one.case["greedy_ids"]


def test_texts_and_endings_are_transformers(answered: list[Answered]) -> None:
    for one in answered:
        assert one.result.text == one.case["text"].removesuffix("<|im_end|>")
        stopped = one.case["stopped_at_eos"]
        assert one.result.finish_reason == ("stop" if stopped else "length")


def test_log_probabilities_are_transformers(answered: list[Answered]) -> None:
    for one in answered:
        assert one.result.logprobs is not None
        own = [entry.logprob for entry in one.result.logprobs]
        assert own == pytest.approx(one.case["logprobs"], abs=LOGPROB)
        for entry, ids, values in zip(
            one.result.logprobs, one.case["top5_ids"], one.case["top5_logprobs"], strict=True
        ):
            assert entry.top[0][0] == ids[0]
            assert [value for _, value in entry.top] == pytest.approx(values, abs=UNLIKELY)


def test_a_stream_alone_is_the_answer_in_the_batch(
    smollm2: kvist.Model, answered: list[Answered]
) -> None:
    shortest = min(answered, key=lambda one: len(one.case["greedy_ids"]))
    chat = [{"role": "user", "content": shortest.case["prompt"]}]
    params = SamplingParams(temperature=0, max_tokens=len(shortest.case["greedy_ids"]))
    deltas = list(kvist.stream(smollm2, chat, params, cache="static", attention="reference"))
    assert "".join(delta.text for delta in deltas) == shortest.result.text
    assert deltas[-1].result is not None
    assert deltas[-1].result.token_ids == shortest.result.token_ids


def test_perplexity_of_real_text_is_transformers(smollm2: kvist.Model) -> None:
    """In chunks, so that the cache is part of what is measured."""
    ids = facts()["ppl"]["ids"]
    store, losses = new_cache(smollm2), []
    for start in range(0, len(ids), 256):
        part, following = ids[start : start + 256], ids[start + 1 : start + 257]
        logits = forward(smollm2, store, [part])[: len(following)]
        losses.append(
            torch.nn.functional.cross_entropy(logits, torch.tensor(following), reduction="none")
        )
    assert torch.cat(losses).mean().item() == pytest.approx(facts()["ppl"]["nll_mean"], abs=0.01)
