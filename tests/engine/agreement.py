"""Whether the engine said what the readable loop says, under the tie rule.

Sums in another order move logits a little. Where two runs part, the difference counts unless it is
a tie: with the reference's own logits moved by no more than twice the difference that another order
of summing was measured to make, up for the one token and down for the other, the sampler takes the
token that the engine took.
"""

from collections.abc import Sequence
from dataclasses import dataclass

from torch import Tensor

from kvist.cache import Cache, Codec, make_cache
from kvist.core.params import ResolvedParams
from kvist.core.results import Result, TokenLogprob
from kvist.core.retention import Retention
from kvist.core.sequence import Sequence as Tokens
from kvist.loading.model import Model
from kvist.runner.sampler import Sampler
from tiny_models import forward

MOVED = 2e-4  # log-probabilities of equal tokens differ by no more than this
U_NOISE = 1e-6  # a draw this near to the border between two tokens may fall on either side


@dataclass
class Tally:
    """What was compared; more than one tie in 1,000 tokens is one too many."""

    tokens: int = 0
    ties: int = 0

    def check(self) -> None:
        assert self.ties <= self.tokens / 1000, f"{self.ties} ties in {self.tokens} tokens"


def assert_same(
    model: Model,
    prompt: Sequence[int],
    params: ResolvedParams,
    expected: Result,
    got: Result,
    tally: Tally,
    *,
    retention: Retention | None = None,
    codec: str | Codec = "plain",
    whole: bool = True,
) -> None:
    """Raise AssertionError unless both are the same sample, or parted at a tie.

    Args:
        model: what both ran.
        prompt: its token ids.
        params: its parameters, the seed that was used among them.
        expected: from the readable loop.
        got: from the engine.
        tally: counts tokens and ties.
        retention: which tokens both kept.
        codec: how both wrote them.
        whole: False if `got` was aborted, and may stop anywhere.
    """
    ours, theirs = got.token_ids, expected.token_ids
    tally.tokens += len(ours)
    for at, (mine, other) in enumerate(zip(ours, theirs, strict=False)):
        if mine != other:
            behind = [*prompt, *theirs[:at]]
            logits, noise = last_logits(model, behind, retention, codec)
            logits[mine] += 2 * noise
            logits[other] -= 2 * noise
            assert could_draw(model, prompt, params, theirs[:at], mine, got.sample_index, logits), (
                f"token {at} is {mine}, not {other}: {ours} against {theirs}"
            )
            tally.ties += 1
            return
    close(got.logprobs, expected.logprobs, whole=whole)
    if not whole:
        assert len(ours) <= len(theirs)
        return
    assert ours == theirs
    assert (got.finish_reason, got.stop_reason) == (expected.finish_reason, expected.stop_reason)
    assert got.text == expected.text
    assert got.error is None
    close(got.prompt_logprobs, expected.prompt_logprobs, whole=True)


def close(
    got: Sequence[TokenLogprob | None] | None,
    expected: Sequence[TokenLogprob | None] | None,
    *,
    whole: bool,
) -> None:
    """Equal tokens with nearly equal log-probabilities."""
    assert (got is None) == (expected is None)
    if got is None or expected is None:
        return
    assert len(got) == len(expected) or not whole
    for mine, other in zip(got, expected, strict=False):
        assert (mine is None) == (other is None)
        if mine is None or other is None:
            continue
        assert mine.token_id == other.token_id
        assert abs(mine.logprob - other.logprob) < MOVED
        assert len(mine.top) == len(other.top)
        for (_, value), (_, reference) in zip(mine.top, other.top, strict=True):
            assert abs(value - reference) < MOVED


def could_draw(
    model: Model,
    prompt: Sequence[int],
    params: ResolvedParams,
    said: Sequence[int],
    token: int,
    sample_index: int,
    logits: Tensor,
) -> bool:
    """Whether the sampler takes `token` behind `said`, give or take the noise of its draw."""
    sequence = Tokens(tuple(prompt), params, model.eos_token_ids, sample_index)
    for earlier in said:
        sequence.append(earlier)
    draw = 0.0 if params.greedy else sequence.uniform()
    for u in (draw, draw - U_NOISE, draw + U_NOISE):
        sampler = Sampler(model.config.vocab_size)
        sampler.admit(0, params, tuple(prompt), tuple(said))
        if sampler.sample(logits[None], [0], [u], [sequence.banned_ids()]) == [token]:
            return True
    return False


def last_logits(
    model: Model, ids: Sequence[int], retention: Retention | None, codec: str | Codec
) -> tuple[Tensor, float]:
    """Logits behind `ids` by reference attention, and by how much another way differs from it."""

    def fresh() -> Cache:
        return make_cache(
            model.specs,
            layout="dynamic",
            codec=codec,
            retention=retention,
            max_length=model.max_length,
            dtype=model.dtype,
        )

    whole = forward(model, fresh(), [ids], "reference")[-1]
    cache = fresh()
    single = [forward(model, cache, [[token]])[-1] for token in ids][-1]
    return whole.clone(), max(float((whole - single).abs().max()), 1e-6)
