"""Beam search: keep the few likeliest continuations instead of one, and return the best of them.

The search is that of transformers at its defaults (length penalty 1, no early stopping), so that
hypotheses are equal. Beams are rows of one cache: a step permutes them with `cache.reorder`.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache import Cache
from kvist.core.params import ResolvedParams
from kvist.errors import NotSupported, RequestError
from kvist.sample import Sample


@dataclass(frozen=True)
class Beam:
    """A continuation and the sum of its tokens' log-probabilities."""

    tokens: tuple[int, ...]
    score: float

    @property
    def normalised(self) -> float:
        """The score for each token, by which finished beams compete."""
        return self.score / len(self.tokens)


def beam_search(
    forward: Callable[[Sequence[Sequence[int]]], Tensor],
    logits: Tensor,
    cache: Cache,
    family: Sequence[Sample],
) -> None:
    """Search behind one prompt and push the best hypothesis into each of its samples.

    Args:
        forward: `[[token], …]`, one for each row of the cache -> `[rows, vocab]`.
        logits: `[vocab]`, what follows the prompt.
        cache: holds the prompt in its only row.
        family: the prompt's samples; the i-th gets the i-th best hypothesis.
    """
    sample = family[0]
    params, ending = sample.params, sorted(sample.sequence.ending_ids)
    width, limit = params.num_beams, params.max_tokens
    live, finished = [Beam((), 0.0)], list[Beam]()
    scores = logits[None]
    while True:
        # Enough candidates that `width` of them go on even if every beam's best end here.
        new = len(live[0].tokens) + 1
        candidates = _best(scores, live, max(2, 1 + len(ending)) * width, params, ending)
        ended = [b.tokens[-1] in ending or new == limit for _, b in candidates]
        # A beam may only end if it is among the likeliest `width`; the others are substitutes.
        finished += [b for (_, b), end in zip(candidates[:width], ended, strict=False) if end]
        finished = sorted(finished, key=lambda b: -b.normalised)[:width]
        going = [c for c, end in zip(candidates, ended, strict=True) if not end][:width]
        if not going:
            break
        # Could the likeliest of those that go on still come in among the finished?
        hope = going[0][1].normalised
        if len(finished) == width and hope <= finished[-1].normalised:
            break
        cache.reorder([row for row, _ in going])
        live = [beam for _, beam in going]
        scores = forward([beam.tokens[-1:] for beam in live])
    for member, beam in zip(family, finished, strict=False):
        for token in beam.tokens:
            member.push(token)


def check_beams(params: ResolvedParams) -> None:
    """Raise for what beam search does not go together with."""
    for name, asked in (
        ("temperature > 0", not params.greedy),
        ("stop strings", bool(params.stop)),
        ("logprobs", params.logprobs is not None or params.prompt_logprobs is not None),
        ("penalties", params.repetition_penalty != 1.0),
        ("penalties", bool(params.presence_penalty or params.frequency_penalty)),
    ):
        if asked:
            raise NotSupported(
                f"num_beams={params.num_beams} does not go with {name}; leave it out"
            )
    if params.n > params.num_beams:
        raise RequestError(f"n={params.n} is more than num_beams={params.num_beams}")


def _best(
    logits: Tensor, live: Sequence[Beam], count: int, params: ResolvedParams, ending: Sequence[int]
) -> list[tuple[int, Beam]]:
    """The likeliest continuations of all beams: (the beam's row, the longer beam), best first."""
    steps = torch.log_softmax(logits.float(), dim=-1)
    for token, bias in params.logit_bias.items():
        steps[:, token] += bias
    if len(live[0].tokens) < params.min_tokens:
        steps[:, list(ending)] = -torch.inf
    totals = steps + torch.tensor([beam.score for beam in live], device=steps.device)[:, None]
    vocab = steps.shape[-1]
    best = totals.flatten().topk(min(count, totals.numel()))
    return [
        (index // vocab, Beam((*live[index // vocab].tokens, index % vocab), score))
        for index, score in zip(best.indices.tolist(), best.values.tolist(), strict=True)
        if score > -torch.inf
    ]
