"""A plan in the making, and how "this sequence's next tokens" become one of its rows.

The scheduler has decided and reserved everything before; making a row draws the randomness that it
samples with, cannot fail and changes nothing.
"""

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

from kvist.core.plan import LAST_SAMPLED, ImageSlice, PlanRow
from kvist.core.protocols import Drafter
from kvist.core.request import ImageSpan
from kvist.core.state import Family, SampleState

_LAST = (LAST_SAMPLED,)


class Entry(NamedTuple):
    """A planned row and whose it is; the epoch tells whether that was preempted since."""

    row: PlanRow
    state: SampleState
    epoch: int


@dataclass(slots=True)
class Build:
    """A plan in the making."""

    step: int
    budget: int
    short: list[Entry] = field(default_factory=list)  # rows of one token
    long: list[Entry] = field(default_factory=list)
    lacks_blocks: bool = False
    failures: list[tuple[Family, str]] = field(default_factory=list)

    def add(self, row: PlanRow, state: SampleState) -> None:
        """One more row, for the whole of which there is budget."""
        length = len(row.tokens)
        self.budget -= length
        (self.short if length == 1 else self.long).append(Entry(row, state, state.epoch))


def draft(state: SampleState, drafter: Drafter, limit: int) -> tuple[int, ...]:
    """Up to `limit` guesses for the tokens behind the last one."""
    # The row's own sample is one of the tokens that may still come; guesses are the others.
    limit = min(limit, state.max_total - state.total - 1)
    if limit < 1:
        return ()
    sequence = state.sequence
    return tuple(drafter(sequence.prompt_ids, sequence.output_ids, limit))[:limit]


def make_row(state: SampleState, stop: int, drafts: tuple[int, ...] = (), mask: int = 0) -> PlanRow:
    """The row of tokens `[state.planned, stop)`, and guesses behind them.

    Args:
        state: a running sample.
        stop: at most `state.total`; the row samples if it gets there.
        drafts: guesses for the tokens from `stop` on; only with `stop == state.total`.
        mask: handle of an allowed-token mask.
    """
    slot, start, sequence = state.slot, state.planned, state.sequence
    assert slot is not None
    # A sampled token that is not read yet is always the last one, and alone still to be planned.
    tokens = _LAST if state.pending else state.keys.tokens(start, stop) + drafts
    request, params = state.request, sequence.params
    images = _slices(request.images, start, stop) if request.images else ()
    targets: tuple[int, ...] = ()
    if params.prompt_logprobs is not None and not state.family.prompt_done:
        # The tokens behind the row's own, as far as they are prompt.
        targets = sequence.prompt_ids[start + 1 : stop + 1]
    if stop < state.total:
        return PlanRow(slot, tokens, start, False, prompt_targets=targets, images=images)
    num_drafts, ahead = len(drafts), state.pending
    uniforms: tuple[float, ...] = ()
    if params.temperature:
        uniforms = tuple([sequence.uniform(ahead=ahead + i) for i in range(1 + num_drafts)])
    ban = 0
    if params.min_tokens:
        left = params.min_tokens - len(sequence.output_ids) - ahead
        ban = min(1 + num_drafts, max(0, left))
    return PlanRow(slot, tokens, start, True, num_drafts, uniforms, ban, mask, targets, images)


def _slices(images: Sequence[ImageSpan], start: int, stop: int) -> tuple[ImageSlice, ...]:
    slices = []
    for span in images:
        # [low, high) is the part of the span under the row [start, stop).
        low, high = max(span.start, start), min(span.stop, stop)
        if low < high:
            slices.append(ImageSlice(span.digest, low - span.start, low - start, high - low))
    return tuple(slices)
