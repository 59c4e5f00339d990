"""Sampling behind guesses: go on along a row's drafted tokens as long as they are what was drawn.

Each draw is the one that would have been made without guesses, from the same uniform number, so
guesses change no token, greedy or sampled; they only bring it sooner. The loop and the runner both
sample through here.
"""

from collections.abc import Mapping, Sequence
from typing import NamedTuple

from torch import Tensor

from kvist.runner.sampler import Sampler


class Guessed(NamedTuple):
    """A sequence's rows of logits: `[first, first + 1 + len(drafts))`.

    Args:
        slot: where the sampler keeps what it knows of the sequence.
        first: the row behind its last certain token; the next are behind its guesses.
        drafts: the guessed tokens.
        uniforms: a draw for each of the rows; empty where sampling is greedy.
        banned: ids that the first `num_banned` of the rows must not take.
        num_banned: see there.
    """

    slot: int
    first: int
    drafts: Sequence[int] = ()
    uniforms: Sequence[float] = ()
    banned: frozenset[int] = frozenset()
    num_banned: int = 0


def follow(
    sampler: Sampler,
    logits: Tensor,
    rows: Sequence[Guessed],
    allowed: Mapping[int, Tensor] | None = None,
) -> list[list[int]]:
    """The tokens of each sequence: one, and one more for each guess that was right.

    Args:
        sampler: counts every token that is returned.
        logits: `[R, vocab]`.
        rows: which of them are whose.
        allowed: by index in `rows`, the only tokens that a sequence's first draw may take.
    """
    drawn: list[list[int]] = [[] for _ in rows]
    going, depth = list(range(len(rows))), 0
    while going:
        here = [rows[i] for i in going]
        places = [row.first + depth for row in here]
        scores = logits if places == list(range(len(logits))) else logits[places]
        masks = {
            k: allowed[i] for k, i in enumerate(going) if allowed and depth == 0 and i in allowed
        }
        tokens = sampler.choose(
            scores,
            [row.slot for row in here],
            [row.uniforms[depth] if row.uniforms else 0.0 for row in here],
            [row.banned if depth < row.num_banned else frozenset() for row in here],
            masks,
        ).tolist()
        for i, token in zip(going, tokens, strict=True):
            drawn[i].append(token)
        going = [
            i
            for i, token in zip(going, tokens, strict=True)
            if depth < len(rows[i].drafts) and rows[i].drafts[depth] == token
        ]
        depth += 1
    return drawn
