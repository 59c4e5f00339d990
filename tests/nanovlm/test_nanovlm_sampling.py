"""nanoVLM's order of sampling gives nanoVLM's probabilities."""

import pytest
import torch
from vlm_cases import case

from kvist.runner.filter_first import filter_then_temperature


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
