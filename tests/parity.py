"""The tie rule: when two computations of the same logits count as the same greedy tokens.

Sums in another order move logits a little. A token that differs counts as a divergence where the
reference's top-2 margin exceeds four times the difference measured at that place; below that it is
a tie. The rule alone would forgive anything whose logits are far enough off, so the difference
itself is bounded, too.
"""

from dataclasses import dataclass

from torch import Tensor

NOISE_FACTOR = 4


@dataclass
class Tally:
    """What was compared; more than one tie in 1,000 tokens is one too many."""

    tokens: int = 0
    ties: int = 0

    def check(self) -> None:
        assert self.ties <= max(1, self.tokens / 1000), f"{self.ties} ties in {self.tokens} tokens"


def assert_same_greedy(
    reference: Tensor, logits: Tensor, tally: Tally | None = None, *, within: float = 1e-3
) -> None:
    """Raise AssertionError unless both choose the same tokens, ties apart.

    Args:
        reference: `[N, vocab]`.
        logits: alike, of the same tokens.
        tally: counts tokens and ties; None allows no tie.
        within: how far any logit may be off.
    """
    assert logits.shape == reference.shape
    assert logits.isfinite().all()
    noise = (logits - reference).abs().amax(dim=-1)
    assert noise.numel() == 0 or noise.max() <= within, f"a logit is {noise.max():.2e} off"
    first, second = reference.topk(2, dim=-1).values.unbind(dim=-1)
    differ = (logits.argmax(dim=-1) != reference.argmax(dim=-1)).nonzero()[:, 0].tolist()
    for i in differ:
        margin = float(first[i] - second[i])
        assert margin <= NOISE_FACTOR * noise[i], (
            f"token {i}: {int(logits[i].argmax())} instead of {int(reference[i].argmax())}, "
            f"margin {margin:.2e}, noise {noise[i]:.2e}"
        )
    if tally is None:
        assert not differ, f"tokens {differ} are ties"
    else:
        tally.tokens += len(logits)
        tally.ties += len(differ)
