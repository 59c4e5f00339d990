"""What the scheduler decided for one step, and what came of it: plain ints, no tensors.

A plan is frozen and picklable, so that scheduler and runner may live in two processes. The
scheduler makes plans, the runner executes them in order, the scheduler commits the outputs.

A runner applies a plan's parts in this order, which the block manager's arithmetic relies on:

1. `released` slots, then `admitted` slots (a slot may be given to another sequence in one plan);
2. per group: `saves` to the host, `loads` from the host, `copies`, then `tables`;
3. `dropped_images`, then `encodes`;
4. `rows`: one forward pass over all their tokens.

Plans take effect one after the other. A block that a plan frees may therefore be written by the
next plan although that one is made before this one has run; only blocks that are copied, saved or
loaded wait for the commit. Likewise a row may belong to a sequence that turns out to have ended, or
failed, in the plan before: it is computed like any other, and its output is ignored.
"""

from dataclasses import dataclass, field
from typing import Any, NamedTuple

from kvist.core.params import ResolvedParams
from kvist.core.record import RequestRecord

LAST_SAMPLED = -1
"""In a row's tokens: the token last sampled in that slot, which may still be on the device only."""

NULL_BLOCK = 0
"""In a table: no block. Padding, freed places behind a window; its content is never looked at."""


class ImageSlice(NamedTuple):
    """An image's embeddings from `offset` on stand for the row's tokens from `row_offset` on."""

    digest: str
    offset: int
    row_offset: int
    length: int


class ImageEncode(NamedTuple):
    """Run the encoder on `pixels` and keep the `length` embeddings under `digest`."""

    digest: str
    pixels: Any
    length: int


class PlanRow(NamedTuple):
    """Some consecutive new tokens of one sequence.

    The row's tokens take positions `[start, start + len(tokens))`; what is before is in the cache.

    Args:
        slot: the sequence's slot in the runner.
        tokens: ids, drafts included; `LAST_SAMPLED` stands for a token that is not read yet.
        start: position of the first of them.
        sample: whether a token follows the last one (a chunk inside the prompt samples nothing).
        num_drafts: how many tokens at the end are guesses. The runner samples behind the last
            `1 + num_drafts` tokens and keeps samples as long as each equals the next guess, so
            that it returns between 1 and `1 + num_drafts` tokens.
        uniforms: a draw for each of these `1 + num_drafts` samples; empty where sampling is greedy.
        ban_ending: the slot's `ending_ids` are forbidden at this row's first `ban_ending` samples.
        mask: handle of an allowed-token mask; 0 for none.
        prompt_targets: the runner reports the log-probability of `prompt_targets[i]` behind the
            row's token i; empty unless prompt log-probabilities were asked for.
        images: image embeddings that replace some of the row's tokens' own.
    """

    slot: int
    tokens: tuple[int, ...]
    start: int
    sample: bool
    num_drafts: int = 0
    uniforms: tuple[float, ...] = ()
    ban_ending: int = 0
    mask: int = 0
    prompt_targets: tuple[int, ...] = ()
    images: tuple[ImageSlice, ...] = ()


@dataclass(frozen=True, slots=True)
class Admission:
    """A sequence takes a slot: everything that sampling needs to know of it.

    `output_ids` is not empty when a preempted sequence comes back. The slot's tables start out as
    null blocks; the same plan's `tables` fill them.
    """

    slot: int
    request_id: str
    sample_index: int
    params: ResolvedParams
    prompt_ids: tuple[int, ...]
    output_ids: tuple[int, ...]
    ending_ids: tuple[int, ...]


class TableChange(NamedTuple):
    """Entries `[first, first + len(blocks))` of a slot's block table become `blocks`."""

    slot: int
    first: int
    blocks: tuple[int, ...]


class BlockCopy(NamedTuple):
    """All places of block `source` are copied to block `destination`."""

    source: int
    destination: int


class HostMove(NamedTuple):
    """A block of the pool and the host block that it is saved to or loaded from."""

    block: int
    host_block: int


class GroupChanges(NamedTuple):
    """What one group of layers (equal specs, one pool) has to do before the forward pass."""

    saves: tuple[HostMove, ...] = ()
    loads: tuple[HostMove, ...] = ()
    copies: tuple[BlockCopy, ...] = ()
    tables: tuple[TableChange, ...] = ()


@dataclass(frozen=True, slots=True)
class Plan:
    """One step. Rows of one token stand first, so that decodes are a prefix of the batch."""

    step: int
    rows: tuple[PlanRow, ...] = ()
    released: tuple[int, ...] = ()
    admitted: tuple[Admission, ...] = ()
    groups: tuple[GroupChanges, ...] = ()
    encodes: tuple[ImageEncode, ...] = ()
    dropped_images: tuple[str, ...] = ()

    @property
    def num_tokens(self) -> int:
        """Tokens in the forward pass."""
        return sum(len(row.tokens) for row in self.rows)


class TokenLogprobs(NamedTuple):
    """As `core.results.TokenLogprob`, for a token that is known."""

    logprob: float
    top: tuple[tuple[int, float], ...] = ()
    rank: int | None = None


class RowOutput(NamedTuple):
    """What came of one row; `fault` says in a sentence why nothing did."""

    tokens: tuple[int, ...] = ()
    logprobs: tuple[TokenLogprobs, ...] = ()
    prompt_logprobs: tuple[TokenLogprobs, ...] = ()
    fault: str | None = None


@dataclass(frozen=True, slots=True)
class StepOutput:
    """What came of a plan: one row each, in the plan's order."""

    step: int
    rows: tuple[RowOutput, ...] = field(default=())


class TokensEvent(NamedTuple):
    """A sample got tokens (several with speculation)."""

    request_id: str
    sample_index: int
    tokens: tuple[int, ...]
    logprobs: tuple[TokenLogprobs, ...] = ()


class PromptLogprobsEvent(NamedTuple):
    """Log-probabilities of the prompt's tokens `[start, start + len(logprobs))`."""

    request_id: str
    start: int
    logprobs: tuple[TokenLogprobs, ...]


class FinishedEvent(NamedTuple):
    """A sample ended: "stop", "length", "abort", or what `finish` was told."""

    request_id: str
    sample_index: int
    reason: str
    record: RequestRecord


class FailedEvent(NamedTuple):
    """A sample ended by a fault of its own request; no other request is touched."""

    request_id: str
    sample_index: int
    message: str
    record: RequestRecord


Event = TokensEvent | PromptLogprobsEvent | FinishedEvent | FailedEvent
