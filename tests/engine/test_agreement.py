"""The tie rule itself: a different token is a fault, unless logits cannot tell the two apart."""

from dataclasses import replace

import agreement
import pytest
from agreement import Tally, assert_same, last_logits

import kvist
from kvist import Result, SamplingParams
from tiny_models import tiny

PROMPT = [3, 14, 15, 9, 2, 6]


def parted(params: SamplingParams) -> tuple[Result, Result, float]:
    """A sample, the same with the second-likeliest token at place 3, and how far that is behind."""
    [whole] = kvist.generate(tiny(), [PROMPT], params)
    logits, _ = last_logits(tiny(), [*PROMPT, *whole.token_ids[:3]], None, "plain")
    first, second = logits.topk(2).indices.tolist()
    assert first == whole.token_ids[3]
    other = (*whole.token_ids[:3], second, *whole.token_ids[4:])
    return whole, replace(whole, token_ids=other), float(logits[first] - logits[second])


def test_another_token_is_a_fault() -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    whole, other, _ = parted(params)
    tally = Tally()
    assert_same(tiny(), PROMPT, params.resolve({}), whole, whole, tally)
    with pytest.raises(AssertionError, match="token 3 is"):
        assert_same(tiny(), PROMPT, params.resolve({}), whole, other, tally)
    short = replace(whole, token_ids=whole.token_ids[:-1])
    with pytest.raises(AssertionError):
        assert_same(tiny(), PROMPT, params.resolve({}), whole, short, tally)
    assert tally == Tally(tokens=17)


@pytest.mark.parametrize(("share", "tie"), [(0.24, False), (0.26, True)])
def test_a_margin_within_four_times_the_noise_is_a_tie(
    share: float, tie: bool, monkeypatch: pytest.MonkeyPatch
) -> None:
    params = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)
    whole, other, margin = parted(params)
    logits, _ = last_logits(tiny(), [*PROMPT, *whole.token_ids[:3]], None, "plain")
    monkeypatch.setattr(agreement, "last_logits", lambda *_: (logits.clone(), share * margin))
    tally = Tally()
    if tie:
        assert_same(tiny(), PROMPT, params.resolve({}), whole, other, tally)
    else:
        with pytest.raises(AssertionError, match="token 3 is"):
            assert_same(tiny(), PROMPT, params.resolve({}), whole, other, tally)
    assert tally.ties == tie
    assert tally.tokens == 6
    with pytest.raises(AssertionError, match="1 ties in 999"):
        Tally(tokens=999, ties=1).check()
