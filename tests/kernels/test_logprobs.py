"""The log-probability kernels give torch's numbers, ranks and alternatives."""

import pytest
import torch

from kvist.kernels.logprobs import logprobs
from kvist.runner.sampler import logprobs_later

VOCAB = 700


@pytest.mark.parametrize("top", [0, 1, 5, 20])
@pytest.mark.parametrize("spread", [0.1, 3.0, 40.0])
def test_they_are_the_samplers(top, spread, device):
    torch.manual_seed(0)
    logits = torch.randn(4, VOCAB, device=device) * spread
    rows, tokens = torch.tensor([2, 0, 3, 2, 1]), torch.tensor([5, 699, 0, 128, 301])
    expected = logprobs_later(logits.cpu(), tokens, [top] * 5, rows)()
    found = logprobs(logits, rows.to(device), tokens.to(device), top, chunk=128)
    for i, one in enumerate(expected):
        assert float(found.own[i]) == pytest.approx(one.logprob, abs=1e-4)
        assert int(found.ranks[i]) == one.rank
        assert found.ids[i].tolist() == [token for token, _ in one.top]
        assert found.values[i].tolist() == pytest.approx([value for _, value in one.top], abs=1e-4)


def test_equal_tokens_share_a_rank_and_the_lower_id_comes_first(device):
    logits = torch.zeros(1, VOCAB, device=device)
    logits[0, 600] = logits[0, 130] = 2.0
    found = logprobs(logits, *torch.tensor([[0, 0], [600, 5]], device=device), 3, chunk=128)
    assert found.ids.tolist() == [[130, 600, 0]] * 2
    assert found.ranks.tolist() == [1, 3]


def test_a_chunk_that_is_ruled_out_altogether_adds_nothing(device):
    torch.manual_seed(0)
    logits = torch.randn(1, VOCAB, device=device)
    logits[0, 128:256] = -torch.inf
    found = logprobs(logits, *torch.tensor([[0], [7]], device=device), 4, chunk=128)
    expected = torch.log_softmax(logits[0], -1)
    assert float(found.own[0]) == pytest.approx(float(expected[7]), abs=1e-4)
    assert found.values[0].tolist() == pytest.approx(expected.topk(4).values.tolist(), abs=1e-4)


def test_half_precision_logits_are_read_as_they_are(device):
    torch.manual_seed(0)
    logits = torch.randn(2, VOCAB, device=device).bfloat16()
    rows = tokens = torch.tensor([0, 1], device=device)
    expected = torch.log_softmax(logits.float(), -1).gather(1, tokens[:, None])[:, 0]
    found = logprobs(logits, rows, tokens, 2, chunk=128)
    assert (found.own - expected).abs().max() < 1e-4
