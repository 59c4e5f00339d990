"""What the engine can say of itself: a record for every request, a snapshot of the whole.

Plain frozen data for results, logs and pages; it explains and never decides. The block manager and
the scheduler fill it in.
"""

from dataclasses import dataclass
from typing import Literal, NamedTuple

MissKind = Literal[
    "never_seen",  # no request has had these tokens behind this prefix
    "differs",  # a cached sequence goes on differently from token `at`
    "evicted",  # it was cached and had to give way at step `at`
    "stranded",  # still cached, but something before it (or inside a window) is gone
    "other_salt",  # cached for another tenant only
    "other_adapter",  # cached for other weights only
    "other_codec",  # cached in another precision only
    "tail",  # not a full block, or the last token, whose logits are needed
    "bypassed",  # the prefix cache is off, or prompt log-probabilities need every token's logits
]


@dataclass(frozen=True, slots=True)
class Miss:
    """Why the prompt's tokens `[start, stop)` had to be computed.

    `at` is a token's index for "differs", a step for "evicted", else None.
    """

    start: int
    stop: int
    kind: MissKind
    at: int | None = None


@dataclass(frozen=True, slots=True)
class RequestRecord:
    """How one sample of a request fared.

    Every prompt token is counted once: from the pool (`cached_device`), from the host tier
    (`cached_host`), from a sibling sample (`cached_fork`), or in one of `misses`. Times are in
    seconds on the scheduler's clock: waiting until first admitted, until the first token, until the
    end; preemptions after the first token count as decoding.
    """

    request_id: str
    sample_index: int
    reason: str
    prompt_tokens: int
    output_tokens: int
    cached_device: int
    cached_host: int
    cached_fork: int
    misses: tuple[Miss, ...]
    preemptions: int
    lost_tokens: int
    queue_time: float
    prefill_time: float
    decode_time: float

    @property
    def cached_tokens(self) -> int:
        """Prompt tokens that did not have to be computed."""
        return self.cached_device + self.cached_host + self.cached_fork


@dataclass(frozen=True, slots=True)
class GroupSnapshot:
    """One pool, block by block.

    `owners[i]` is how many sequences hold block i: 0 with `cached[i]` is a prefix waiting to be
    hit again, 0 without is free. Block 0, the null block, is always 0 and False. `host_cached[i]`
    tells whether host block i holds a prefix.
    """

    window: int | None
    sinks: int
    num_blocks: int
    free: int
    owners: tuple[int, ...]
    cached: tuple[bool, ...]
    held: int
    host_blocks: int
    host_used: int
    host_cached: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class CacheCounters:
    """Totals since the start; `queried_tokens` counts prompts of requests first admitted."""

    queried_tokens: int = 0
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    fork_tokens: int = 0
    evicted_blocks: int = 0
    unsaved_evictions: int = 0
    saved_blocks: int = 0
    loaded_blocks: int = 0
    copied_blocks: int = 0

    @property
    def hit_rate(self) -> float:
        """Part of the queried prompt tokens that was in either tier."""
        hits = self.device_hit_tokens + self.host_hit_tokens
        return hits / self.queried_tokens if self.queried_tokens else 0.0


@dataclass(frozen=True, slots=True)
class SequenceSnapshot:
    """One unfinished sample; `blocks` counts its non-null blocks per group."""

    request_id: str
    sample_index: int
    slot: int | None
    priority: int
    prompt_tokens: int
    output_tokens: int
    computed_tokens: int
    preemptions: int
    blocks: tuple[int, ...]


@dataclass(frozen=True, slots=True)
class Snapshot:
    """The whole engine between two steps; `dataclasses.asdict` makes it JSON.

    `now` is in seconds on the scheduler's clock. `computed_tokens` went through the model, prompts
    and outputs alike, again after a preemption too; `output_tokens` were sampled.
    """

    step: int
    now: float
    block_size: int
    groups: tuple[GroupSnapshot, ...]
    counters: CacheCounters
    running: tuple[SequenceSnapshot, ...]
    waiting: tuple[SequenceSnapshot, ...]
    known_prefixes: int
    computed_tokens: int
    output_tokens: int
    preemptions: int
    lost_tokens: int


MarkKind = Literal[
    "arrived",
    "admitted",  # `[0, stop)` came from the cache; again after each preemption
    "computed",  # a chunk `[start, stop)` of the prompt, or of what a preemption has lost
    "first_token",
    "preempted",
    "ended",
]


class Mark(NamedTuple):
    """One moment of one sample's life; serial numbers go up by one.

    `time` is in seconds on the scheduler's clock; `reason` says why it ended.
    """

    serial: int
    time: float
    request_id: str
    sample_index: int
    kind: MarkKind
    start: int = 0
    stop: int = 0
    reason: str = ""


@dataclass(frozen=True, slots=True)
class Branch:
    """Cached blocks of tokens that follow each other without a fork: a twig of the prefix tree.

    Args:
        serial: of its first node; names the branch as long as it grows there.
        parent: serial of the branch that it grows from, 0 at a root.
        root: what separates it from equal tokens (precision, weights, tenant), as a number.
        tokens: of its first nodes, enough to tell it by.
        blocks: for each node the block of the first group's pool, 0 where it is not in the pool.
        saved: for each node whether the host tier has it.
    """

    serial: int
    parent: int
    root: int
    tokens: tuple[int, ...]
    blocks: tuple[int, ...]
    saved: tuple[bool, ...]


@dataclass(frozen=True, slots=True)
class BlockDetail:
    """What one block holds, and for whom.

    Args:
        tokens: those that are written or about to be; none if the block is free.
        start: position of the first of them in their sequence.
        owners: (request id, sample) of each sequence whose table points at it.
        cached: whether it can be hit by later requests.
        saved: whether the host tier has a copy.
    """

    tokens: tuple[int, ...] = ()
    start: int = 0
    owners: tuple[tuple[str, int], ...] = ()
    cached: bool = False
    saved: bool = False


@dataclass(frozen=True, slots=True)
class Look:
    """Everything that a live picture of the engine needs, taken between two steps.

    Taking it kept the engine for `seconds`; `tree` is None unless it was asked for.
    """

    snapshot: Snapshot
    marks: tuple[Mark, ...]
    tree: tuple[Branch, ...] | None
    seconds: float
