"""The scheduler's books on one request and on each of its samples.

Data with the arithmetic that belongs to it; decisions are the scheduler's.
"""

from dataclasses import dataclass, field

from kvist.core.prefix import Namespace, PrefixKeys
from kvist.core.record import Miss, RequestRecord, SequenceSnapshot
from kvist.core.request import Request
from kvist.core.sequence import Sequence

Rank = tuple[int, int, int]
"""(priority, order of arrival, sample): lower is served first and preempted last."""


@dataclass(slots=True)
class Family:
    """A request and its samples: the first computes the prompt, the others share it."""

    request: Request
    arrival: float
    samples: list["SampleState"] = field(default_factory=list)
    prompt_done: bool = False
    targets_done: int = 0  # prompt tokens whose log-probabilities were delivered

    def next_leader(self) -> "SampleState | None":
        """The first sample that could compute the prompt, if none is about to."""
        alive = [s for s in self.samples if not s.done]
        return alive[0] if alive and not any(s.queued for s in alive) else None

    def match_limit(self, total: int) -> int:
        """How many of `total` tokens may come from the cache: the last one's logits are needed.

        Prompt log-probabilities need the logits of every token that has not been reported.
        """
        wanted = self.request.params.prompt_logprobs is not None and not self.prompt_done
        return min(total - 1, self.targets_done) if wanted else total - 1


class SampleState:
    """One sample of a request, from `add` to its end.

    `[0, computed)` is in the cache and committed, `[computed, planned)` is written by plans under
    way, `[planned, total)` is to be planned. `total` counts the tokens that are known and the
    `pending` ones that are sampled, or being sampled, but not read yet.
    """

    __slots__ = (
        "admitted_at",
        "cached_device",
        "cached_fork",
        "cached_host",
        "computed",
        "done",
        "epoch",
        "family",
        "first_token_at",
        "key",
        "keys",
        "lost_tokens",
        "max_total",
        "misses",
        "pending",
        "planned",
        "planned_step",
        "preemptions",
        "queued",
        "rank",
        "request",
        "sequence",
        "slot",
        "total",
        "unmatched",
    )

    def __init__(self, key: int, rank: Rank, family: Family, codec: str) -> None:
        request = family.request
        self.key = key
        self.rank = rank
        self.family = family
        self.request = request
        self.sequence = Sequence(
            request.prompt_ids, request.params, request.eos_token_ids, sample_index=rank[2]
        )
        self.keys = PrefixKeys(
            self.sequence.prompt_ids,
            self.sequence.output_ids,
            request.images,
            Namespace(codec, request.adapter, request.cache_salt),
        )
        self.slot: int | None = None
        self.queued = False  # waiting or running: its turn has come
        self.done = False
        self.computed = self.planned = self.pending = 0
        self.total = len(request.prompt_ids)
        self.max_total = self.total + request.params.max_tokens
        self.epoch = 0  # rows of an earlier epoch no longer speak of its blocks
        self.planned_step = -1
        self.unmatched = 0  # tokens that were computed when it was preempted
        self.preemptions = self.lost_tokens = 0
        self.cached_device = self.cached_host = self.cached_fork = 0
        self.misses: tuple[Miss, ...] = ()
        self.admitted_at: float | None = None
        self.first_token_at: float | None = None

    @property
    def todo(self) -> int:
        """Tokens that are not planned yet; 1 when decoding, 0 when only its end is awaited."""
        return self.total - self.planned if self.total < self.max_total else 0

    def resume_from(self, num_tokens: int) -> int:
        """It has this much in the cache, after a wait; returns what the preemption has lost."""
        self.computed = self.planned = num_tokens
        lost = max(0, self.unmatched - num_tokens)
        self.lost_tokens += lost
        self.unmatched = 0
        return lost

    def record(self, reason: str, now: float) -> RequestRecord:
        """How it fared; it may have ended before it was admitted or got a token."""
        arrival = self.family.arrival
        admitted = now if self.admitted_at is None else self.admitted_at
        first = now if self.first_token_at is None else self.first_token_at
        return RequestRecord(
            request_id=self.request.id,
            sample_index=self.sequence.sample_index,
            reason=reason,
            prompt_tokens=len(self.sequence.prompt_ids),
            output_tokens=len(self.sequence.output_ids),
            cached_device=self.cached_device,
            cached_host=self.cached_host,
            cached_fork=self.cached_fork,
            misses=self.misses,
            preemptions=self.preemptions,
            lost_tokens=self.lost_tokens,
            queue_time=admitted - arrival,
            prefill_time=first - admitted,
            decode_time=now - first,
        )

    def snapshot(self, blocks: tuple[int, ...]) -> SequenceSnapshot:
        """Where it stands."""
        return SequenceSnapshot(
            request_id=self.request.id,
            sample_index=self.sequence.sample_index,
            slot=self.slot,
            priority=self.request.priority,
            prompt_tokens=len(self.sequence.prompt_ids),
            output_tokens=len(self.sequence.output_ids),
            computed_tokens=self.computed,
            preemptions=self.preemptions,
            blocks=blocks,
        )


@dataclass(slots=True)
class Totals:
    """What all requests together took from the cache, computed, and lost to preemption."""

    queried_tokens: int = 0
    device_hit_tokens: int = 0
    host_hit_tokens: int = 0
    fork_tokens: int = 0
    computed_tokens: int = 0
    output_tokens: int = 0
    preemptions: int = 0
    lost_tokens: int = 0

    def count_prompt(self, state: SampleState) -> None:
        """A sample was admitted for the first time."""
        self.queried_tokens += len(state.request.prompt_ids)
        self.device_hit_tokens += state.cached_device
        self.host_hit_tokens += state.cached_host
        self.fork_tokens += state.cached_fork
