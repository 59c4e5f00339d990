"""The sampling kernels take the tokens that the sampler takes."""

import pytest
import torch

from kvist.core.params import SamplingParams
from kvist.kernels.sampling import PARAMS, sample
from kvist.runner.sampler import Sampler

VOCAB = 700
FILTERS = {
    "none": {},
    "k": {"top_k": 5},
    "large k": {"top_k": 400},
    "p": {"top_p": 0.8},
    "p of nearly all": {"top_p": 0.9999},
    "p of the likeliest": {"top_p": 1e-6},
    "min-p": {"min_p": 0.05},
    "k and p": {"top_k": 40, "top_p": 0.7},
    "all three": {"top_k": 100, "top_p": 0.95, "min_p": 0.01},
}


def logits_of(rows: int, device: torch.device, spread: float = 3.0) -> torch.Tensor:
    torch.manual_seed(rows)
    return torch.randn(rows, VOCAB, device=device) * spread


def both(logits, params: list[SamplingParams], uniforms: list[float], chunk: int = 128):
    """What the kernels take, and what the sampler takes."""
    device = logits.device
    sampler = Sampler(VOCAB, "cpu")
    resolved = [p.resolve({}) for p in params]
    for slot, p in enumerate(resolved):
        sampler.admit(slot, p, (1,))
    expected = sampler.sample(logits.cpu(), range(len(params)), uniforms)
    given = torch.zeros(PARAMS, len(params), dtype=torch.float64)
    for row, (p, u) in enumerate(zip(resolved, uniforms, strict=True)):
        k = p.top_k if p.top_k < VOCAB else 0
        given[:, row] = torch.tensor([p.temperature, k, p.top_p, p.min_p, u], dtype=torch.float64)
    out = torch.full((len(params),), -7, device=device)
    sample(logits, given.to(device), out, chunk=chunk)
    return out.tolist(), expected


@pytest.mark.parametrize("name", FILTERS)
def test_filtered_draws_equal_the_samplers(name, device):
    params = SamplingParams(temperature=0.8, **FILTERS[name])
    uniforms = [0.0, 0.1, 0.37, 0.5, 0.81, 0.999999]
    ours, expected = both(logits_of(len(uniforms), device), [params] * len(uniforms), uniforms)
    assert ours == expected


def test_rows_of_different_parameters_do_not_mind_each_other(device):
    params = [
        SamplingParams(temperature=0),
        SamplingParams(temperature=1.3, top_k=7),
        SamplingParams(temperature=0.6),
        SamplingParams(temperature=1, top_p=0.5, min_p=0.2),
    ]
    ours, expected = both(logits_of(4, device), params, [0.0, 0.3, 0.6, 0.9])
    assert ours == expected


def test_equal_logits_share_their_fate(device):
    logits = logits_of(3, device).round()
    params = SamplingParams(temperature=1, top_k=20, top_p=0.9)
    ours, expected = both(logits, [params] * 3, [0.2, 0.6, 0.95])
    assert ours == expected


def test_greedy_takes_the_first_of_the_likeliest_and_keeps_it(device):
    logits = logits_of(3, device)
    logits[0, 300] = logits[0, 650] = 50.0
    slots, last = torch.tensor([2, 0, 1], device=device), torch.full((4,), 9, device=device)
    out = torch.empty(3, dtype=torch.long, device=device)
    sample(logits, None, out, slots=slots, last=last, chunk=128)
    assert out.tolist() == logits.argmax(-1).tolist()
    assert out[0] == 300
    assert last.tolist() == [out[1], out[2], out[0], 9]


@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
def test_rows_that_are_not_finite_have_no_token(bad, device):
    logits = logits_of(3, device)
    logits[1, 77] = bad
    logits[2] = -torch.inf
    params = torch.tensor([[0.7, 0, 1, 0, 0.5]] * 3, dtype=torch.float64, device=device).T
    for given in (None, params.contiguous()):
        last = torch.full((3,), 5, device=device)
        out = torch.empty(3, dtype=torch.long, device=device)
        slots = torch.arange(3, device=device)
        sample(logits, given, out, slots=slots, last=last, chunk=128)
        assert out[0] >= 0
        assert out[1:].tolist() == [-1, -1]
        assert last.tolist() == [out[0], 0, 0]
