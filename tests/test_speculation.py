"""Guessing ahead changes no token: greedy or sampled, alone or batched, on any layout."""

from pathlib import Path

import pytest
import torch

import kvist
from kvist.core.ngram import prompt_lookup
from kvist.runner.step import model_step

QWEN3 = Path(__file__).parent / "fixtures" / "qwen3"


@pytest.fixture(scope="module")
def model():
    return kvist.load(QWEN3 / "dense_tied")


REPEATING = [7, 8, 9, 10] * 6
PROMPTS = [REPEATING, [1, 2, 3], [5, 6, 5, 6, 5, 6], list(range(40))]


@pytest.mark.parametrize("layout", ["dynamic", "static"])
@pytest.mark.parametrize("temperature", [0.0, 0.7])
def test_guesses_change_no_token(model, layout, temperature):
    params = kvist.SamplingParams(temperature=temperature, seed=3, max_tokens=40, ignore_eos=True)
    plain = kvist.generate(model, PROMPTS, params, cache=layout)
    guessed = kvist.generate(model, PROMPTS, params, cache=layout, speculate=5)
    assert [r.token_ids for r in guessed] == [r.token_ids for r in plain]


def test_guesses_go_with_samples_penalties_stops_and_logprobs(model):
    params = kvist.SamplingParams(
        temperature=0.3, seed=1, n=3, max_tokens=30, repetition_penalty=1.1, logprobs=2
    )
    plain = kvist.generate(model, [REPEATING], params)
    guessed = kvist.generate(model, [REPEATING], params, speculate=4)
    assert [r.token_ids for r in guessed] == [r.token_ids for r in plain]
    for a, b in zip(plain, guessed, strict=True):
        torch.testing.assert_close(
            torch.tensor([x.logprob for x in a.logprobs]),
            torch.tensor([x.logprob for x in b.logprobs]),
            atol=1e-3,
            rtol=0,
        )


def test_right_guesses_save_steps(model):
    counted = []

    def counting(batch, cache):
        counted.append(batch.num_tokens)
        return model_step(model.lm)(batch, cache)

    # A bias this large makes the model repeat one token, which is then easily guessed.
    params = kvist.SamplingParams(
        temperature=0, max_tokens=24, ignore_eos=True, logit_bias={5: 1000.0}
    )
    kvist.generate(model, [[5, 5, 5, 5]], params, step=counting, speculate=5)
    # Prefill, then six tokens a step.
    assert len(counted) == 1 + 4


def test_the_latest_earlier_copy_of_the_longest_tail_is_continued():
    assert prompt_lookup([1, 2, 3, 9, 1, 2, 3, 7, 8, 1, 2], [3], 2) == [7, 8]
    assert prompt_lookup([1, 2, 3, 4], [5], 3) == []
    assert prompt_lookup([4, 4, 4], [4], 3) == [4, 4, 4]  # a copy may run into itself
    assert prompt_lookup([6, 7, 6, 7], [6, 7], 3) == [6, 7, 6]
    assert prompt_lookup([1, 2, 1, 2], [], 0) == []
