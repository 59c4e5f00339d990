"""nanoVLM's order of sampling gives nanoVLM's probabilities."""

from collections import Counter

import pytest
import torch
from vlm_cases import case

import kvist
from kvist.errors import RequestError
from kvist.runner.filter_first import filter_then_temperature
from kvist.runner.sampler import Sampler


@pytest.mark.parametrize(
    ("top_k", "top_p", "temperature"), [(50, 0.9, 0.5), (0, 0.8, 1.3), (5, 1.0, 1.0)]
)
def test_filters_see_the_logits_before_the_temperature(
    top_k: int, top_p: float, temperature: float
) -> None:
    reference = case("vlm_tied").ref
    probabilities = filter_then_temperature(
        reference["sampling.logits"], top_k=top_k, top_p=top_p, temperature=temperature
    )
    expected = reference[f"sampling.k{top_k}_p{top_p}_t{temperature}.probs"]
    torch.testing.assert_close(probabilities, expected, atol=1e-6, rtol=0)
    assert torch.equal(probabilities > 0, expected > 0)


def test_the_likeliest_token_always_stays() -> None:
    logits = torch.tensor([[9.0, 1.0, 0.0]])
    kept = filter_then_temperature(logits, top_k=0, top_p=0.1, temperature=1.0)
    assert kept.tolist() == [[1.0, 0.0, 0.0]]


def test_more_than_the_vocabulary_keeps_all() -> None:
    logits = torch.randn(2, 5)
    kept = filter_then_temperature(logits, top_k=50, top_p=1.0, temperature=1.0)
    torch.testing.assert_close(kept, logits.softmax(-1))


def test_the_named_option_draws_with_these_probabilities() -> None:
    logits = case("vlm_tied").ref["sampling.logits"][:1].float()
    asked = kvist.SamplingParams(
        temperature=0.5, top_k=20, top_p=0.9, max_tokens=1, seed=0, filter_first=True
    )
    vocab, draws = logits.shape[-1], 4000
    sampler = Sampler(vocab)
    sampler.admit(0, asked.resolve({}), ())
    numbers = [(i + 0.5) / draws for i in range(draws)]  # evenly spread, so counts are exact
    found = Counter(sampler.sample(logits.expand(draws, -1), [0] * draws, numbers))
    expected = filter_then_temperature(logits[0], top_k=20, top_p=0.9, temperature=0.5)
    for token in range(vocab):
        assert found[token] / draws == pytest.approx(float(expected[token]), abs=2 / draws)


def test_neighbours_in_the_usual_order_are_not_touched() -> None:
    torch.manual_seed(0)
    logits = 3 * torch.randn(2, 40)
    usual = kvist.SamplingParams(temperature=0.7, top_p=0.8, max_tokens=1)
    sampler = Sampler(40)
    for number in (0.1, 0.5, 0.9):
        sampler.admit(0, usual.resolve({}), ())
        alone = sampler.sample(logits[:1], [0], [number])
        sampler.admit(1, kvist.SamplingParams(top_p=0.5, filter_first=True).resolve({}), ())
        assert sampler.sample(logits, [0, 1], [number, number])[:1] == alone


def test_the_option_is_true_or_false() -> None:
    with pytest.raises(RequestError, match="filter_first must be True or False"):
        kvist.SamplingParams(filter_first=1)  # type: ignore[arg-type]
