"""Drives a scheduler with the null runner, as an engine would, and always checks the books."""

import os
from collections import deque
from collections.abc import Sequence
from dataclasses import dataclass, field

from null_runner import EOS, NullRunner, expected_output

from kvist.core.blocks import PagedBlockManager
from kvist.core.limits import SchedulerConfig
from kvist.core.params import ResolvedParams
from kvist.core.plan import (
    Event,
    FailedEvent,
    FinishedEvent,
    Plan,
    PromptLogprobsEvent,
    StepOutput,
    TokensEvent,
)
from kvist.core.protocols import Drafter
from kvist.core.record import RequestRecord
from kvist.core.request import Grammar, ImageSpan, Request
from kvist.core.scheduler import ContinuousScheduler
from kvist.core.spec import AttentionSpec
from kvist.core.tables import CacheGroup

FULL = AttentionSpec(num_kv_heads=1, head_dim=8)


def sliding(window: int, sinks: int = 0) -> AttentionSpec:
    """A windowed layer."""
    return AttentionSpec(num_kv_heads=1, head_dim=8, window=window, sinks=sinks)


def examples(share: float) -> int:
    """Hypothesis examples for a machine: its share of KVIST_EXAMPLES, 2,000 unless set."""
    return max(1, round(share * int(os.environ.get("KVIST_EXAMPLES", "2000"))))


def make_request(
    id: str,
    prompt: Sequence[int],
    max_tokens: int = 4,
    *,
    n: int = 1,
    temperature: float = 0.0,
    seed: int = 0,
    min_tokens: int = 0,
    prompt_logprobs: int | None = None,
    eos: bool = False,
    images: tuple[ImageSpan, ...] = (),
    priority: int = 0,
    salt: str = "",
    adapter: str = "",
    grammar: Grammar | None = None,
    arrival: float | None = None,
) -> Request:
    """A request with the parameters that matter to the scheduler."""
    params = ResolvedParams(
        temperature=temperature,
        max_tokens=max_tokens,
        min_tokens=min_tokens,
        n=n,
        seed=seed,
        prompt_logprobs=prompt_logprobs,
    )
    return Request(
        id=id,
        prompt_ids=tuple(prompt),
        params=params,
        images=images,
        priority=priority,
        arrival=arrival,
        cache_salt=salt,
        adapter=adapter,
        eos_token_ids=frozenset({EOS}) if eos else frozenset(),
        grammar=grammar,
    )


@dataclass
class Ticking:
    """A clock that stands still unless told."""

    now: float = 0.0

    def __call__(self) -> float:
        """Seconds."""
        return self.now


@dataclass
class Log:
    """What the events said of one sample."""

    tokens: list[int] = field(default_factory=list)
    reason: str | None = None
    message: str | None = None
    record: RequestRecord | None = None


class Harness:
    """Scheduler, block manager and null runner in one."""

    def __init__(
        self,
        groups: Sequence[CacheGroup],
        block_size: int = 4,
        *,
        drafter: Drafter | None = None,
        prefix_cache: bool = True,
        save_ahead: int | None = None,
        max_forgotten: int | None = None,
        checked: bool = True,
        **config: object,
    ) -> None:
        self.blocks = PagedBlockManager(
            groups,
            block_size,
            prefix_cache=prefix_cache,
            save_ahead=save_ahead,
            max_forgotten=max_forgotten,
        )
        self.clock = Ticking()
        self.config = SchedulerConfig(**config)  # type: ignore[arg-type]
        self.scheduler = ContinuousScheduler(
            self.config, self.blocks, clock=self.clock, drafter=drafter
        )
        self.runner = NullRunner([g.spec for g in groups], block_size)
        self.under_way: deque[tuple[Plan, StepOutput]] = deque()
        self.requests: dict[str, Request] = {}
        self.logs: dict[tuple[str, int], Log] = {}
        self.prompt_reports: dict[str, list[int]] = {}
        self.checked = checked
        self._expected: dict[tuple[str, int], list[int]] = {}

    def add(self, request: Request) -> None:
        """Queue a request."""
        self.scheduler.add(request)
        self.requests[request.id] = self.runner.requests[request.id] = request
        self.prompt_reports[request.id] = []
        for sample in range(request.params.n):
            self.logs[request.id, sample] = Log()

    def schedule(self) -> Plan:
        """Make a plan and run it; its output waits to be committed."""
        plan = self.scheduler.schedule()
        assert plan.num_tokens <= self.config.max_batch_tokens
        slots = [row.slot for row in plan.rows]
        assert len(slots) == len(set(slots)), "a slot has two rows"
        self.under_way.append((plan, self.runner.execute(plan).result()))
        self.check()
        self.check_tables()
        return plan

    def commit(self, check: bool = True) -> list[Event]:
        """Commit the oldest plan that is under way."""
        plan, output = self.under_way.popleft()
        events = self.scheduler.commit(plan, output)
        self.runner.committed(plan)
        self.take(events)
        if check:
            self.check()
        return events

    def step(self) -> Plan:
        """One plan, made and committed."""
        plan = self.schedule()
        self.commit()
        return plan

    def abort(self, request_id: str) -> None:
        """End a request."""
        self.take(self.scheduler.abort(request_id))
        self.check()

    def take(self, events: list[Event]) -> None:
        """Keep the events in the logs, and check what each says."""
        for event in events:
            if isinstance(event, PromptLogprobsEvent):
                reported = self.prompt_reports[event.request_id]
                assert event.start == len(reported) + 1, "prompt log-probabilities have a gap"
                reported += [int(entry.logprob) for entry in event.logprobs]
                continue
            log = self.logs[event.request_id, event.sample_index]
            assert log.reason is None, "an event after the end"
            if isinstance(event, TokensEvent):
                log.tokens += event.tokens
                assert [int(entry.logprob) for entry in event.logprobs] == list(event.tokens)
                continue
            log.record = event.record
            log.reason = event.reason if isinstance(event, FinishedEvent) else "error"
            if isinstance(event, FailedEvent):
                log.message = event.message
            self._check_record(event.record)

    def drain(self, ahead: bool = False, limit: int = 3000) -> int:
        """Run until nothing is left; returns the number of steps."""
        for step in range(limit):
            if not self.scheduler.has_unfinished:
                self.check_idle()
                return step
            if len(self.under_way) < 2:
                self.schedule()
            while len(self.under_way) > (ahead and bool(self.scheduler.slots)):
                self.commit(check=False)  # the next schedule does
        raise AssertionError("some request never ends")

    def check(self) -> None:
        """Every invariant, and that the runner's tables are the block manager's."""
        if self.checked:
            self.blocks.check()

    def expected(self, request_id: str, sample: int) -> list[int]:
        """What a sample must give, computed once."""
        key = request_id, sample
        if key not in self._expected:
            self._expected[key] = expected_output(self.requests[request_id], sample)
        return self._expected[key]

    def check_tables(self) -> None:
        """The changes in the plans so far add up to the block manager's tables."""
        slots = self.scheduler.slots
        assert len(set(slots.values())) == len(slots) <= self.config.max_num_seqs
        for key, slot in slots.items():
            for g in range(len(self.blocks.groups)):
                expected = self.blocks.blocks_of(key, g)
                table = self.runner.slots[slot].tables[g]
                assert tuple(table.get(i, 0) for i in range(len(expected))) == expected

    def check_idle(self) -> None:
        """Nothing runs: nothing may be owned or held, and every output must be as expected."""
        while self.under_way:
            self.commit()
        snapshot = self.scheduler.snapshot()
        assert not snapshot.running
        assert not snapshot.waiting
        for group, pool in zip(snapshot.groups, self.blocks.pools, strict=True):
            assert not any(group.owners), "a block is owned by nobody that lives"
            assert group.held == 0
            assert pool.num_available == group.num_blocks - 1
        for (request_id, sample), log in self.logs.items():
            expected = self.expected(request_id, sample)
            assert log.reason is not None, f"{request_id}/{sample} never ended"
            assert log.tokens == expected[: len(log.tokens)]
            if log.reason in ("stop", "length"):
                assert log.tokens == expected
        for request_id, reported in self.prompt_reports.items():
            if self.requests[request_id].params.prompt_logprobs is None:
                assert not reported
            elif self.logs[request_id, 0].reason in ("stop", "length"):
                assert tuple(reported) == self.requests[request_id].prompt_ids[1:]

    def _check_record(self, record: RequestRecord) -> None:
        # Each prompt token of a sample that was admitted is counted exactly once.
        position = record.cached_tokens
        for miss in record.misses:
            assert miss.start == position
            assert miss.stop > miss.start
            position = miss.stop
        assert position in (0, record.prompt_tokens)
        assert min(record.queue_time, record.prefill_time, record.decode_time) >= 0
