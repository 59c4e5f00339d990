"""Random traffic on tiny pools: whatever happens, every request ends with its own tokens.

The null runner checks every place that a row attends to, the block manager checks its books after
every step, and what is left at the end is nothing. `KVIST_EXAMPLES=20000` makes a long run of it.
"""

import re
from collections.abc import Callable, Sequence
from typing import Any

import pytest
from harness import FULL, Harness, examples, make_request, sliding
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    precondition,
    rule,
    run_state_machine_as_test,
)

from kvist.core.request import ImageSpan, Request
from kvist.core.spec import AttentionSpec
from kvist.core.tables import CacheGroup
from kvist.errors import ContextTooLong, RequestError

Draw = Callable[[st.SearchStrategy[Any]], Any]

TEXT = [1, 2, 3, 1, 2, 4, 5, 1, 2, 3, 4, 5, 2, 2, 1, 3, 3, 1, 4, 2]

SPECS: list[list[AttentionSpec]] = [
    [FULL],
    [sliding(3)],
    [FULL, sliding(4)],
    [FULL, sliding(1)],
    [sliding(5, sinks=2), sliding(9)],
]


class CountingGrammar:
    """A constraint that depends on the output so far; it breaks down where it is told to."""

    def __init__(self, fails_at: int | None) -> None:
        self.fails_at = fails_at

    def mask(self, output_ids: Sequence[int]) -> int:
        """A handle."""
        if len(output_ids) == self.fails_at:
            raise ValueError("no token is allowed")
        return 1 + len(output_ids) % 3


class SchedulerMachine(RuleBasedStateMachine):
    """Adds, plans ahead, commits, aborts, fails; the rest happens by itself."""

    def __init__(self) -> None:
        super().__init__()
        self.count = 0

    @initialize(data=st.data())
    def configure(self, data: st.DataObject) -> None:
        """A tiny engine."""
        draw = data.draw
        specs = draw(st.sampled_from(SPECS))
        block_size = draw(st.integers(1, 4))
        places = draw(st.integers(12, 48))  # token places of a pool, about
        with_host = draw(st.booleans())
        groups = [
            CacheGroup(
                spec,
                num_blocks=2 + places // block_size,
                host_blocks=draw(st.integers(1, 8)) if with_host else 0,
            )
            for spec in specs
        ]
        drafts = draw(st.sampled_from([0, 0, 2, 3]))
        batch = draw(st.sampled_from([1, 3, 5, 8, 12, 24]))
        self.ahead = draw(st.booleans())
        self.harness = Harness(
            groups,
            block_size,
            drafter=self.guess,
            prefix_cache=draw(st.sampled_from([True, True, True, False])),
            save_ahead=draw(st.integers(1, 8)),
            max_forgotten=draw(st.integers(0, 12)),
            max_num_seqs=draw(st.integers(1, 4)),
            max_batch_tokens=batch,
            max_chunk_tokens=draw(st.one_of(st.none(), st.integers(1, 6))),
            max_model_len=40,
            watermark=draw(st.sampled_from([0.0, 0.1, 0.3])),
            max_image_tokens=4,
            encoder_cache_tokens=draw(st.sampled_from([4, 6])),
            max_drafts=drafts,
        )
        self.add(data=data, count=draw(st.integers(1, 4)))

    def guess(self, prompt: Sequence[int], output: Sequence[int], limit: int) -> Sequence[int]:
        """Guesses that are often right: the true continuation, wrong from somewhere on."""
        for request in self.harness.requests.values():
            if request.prompt_ids != prompt:
                continue
            truth = self.harness.expected(request.id, 0)
            if truth[: len(output)] == list(output):
                right = (len(output) * 7 + len(prompt)) % (limit + 2)
                guesses = truth[len(output) :][:right] + [0] * limit
                return guesses[:limit]
        return [0][:limit]

    @rule(data=st.data(), count=st.integers(1, 4))
    def add(self, data: st.DataObject, count: int) -> None:
        """Requests that are likely to share a prefix with others."""
        for _ in range(count):
            request = self.some_request(data.draw)
            self.count += 1
            try:
                self.harness.add(request)
            except (ContextTooLong, RequestError) as refusal:
                numbers = re.findall(r"\b\d+\b", str(refusal))
                assert len(numbers) >= 2, "a refusal names both numbers"

    def some_request(self, draw: Draw) -> Request:
        """Two texts to begin with, a place to leave them, a tail."""
        text = draw(st.sampled_from([TEXT, TEXT, TEXT[::-1]]))
        prompt = [*text[: draw(st.integers(1, 20))], *draw(st.sampled_from([[], [9], [9, 8, 9]]))]
        images: tuple[ImageSpan, ...] = ()
        if draw(st.integers(0, 4)) == 4:
            size = draw(st.integers(1, min(5, len(prompt))))
            start = draw(st.integers(0, len(prompt) - size))
            images = (ImageSpan(start, size, draw(st.sampled_from(["cat", "dog"])) + str(size)),)
        grammar = None
        if draw(st.integers(0, 7)) == 7:
            grammar = CountingGrammar(draw(st.sampled_from([None, None, 0, 2])))
        max_tokens = draw(st.integers(1, 6))
        return make_request(
            f"r{self.count}",
            prompt,
            max_tokens,
            n=draw(st.sampled_from([1, 1, 1, 2, 3])),
            temperature=draw(st.sampled_from([0.0, 1.0])),
            seed=draw(st.integers(0, 3)),
            min_tokens=draw(st.sampled_from([0, 0, max_tokens])),
            prompt_logprobs=draw(st.sampled_from([None, None, None, None, 0])),
            eos=draw(st.booleans()),
            images=images,
            priority=draw(st.sampled_from([0, 0, 0, 1, -1])),
            salt=draw(st.sampled_from(["", "", "", "tenant"])),
            grammar=grammar,
        )

    @precondition(lambda self: len(self.harness.under_way) < 2)
    @rule()
    def schedule(self) -> None:
        """Plan, perhaps one ahead."""
        self.harness.schedule()

    @precondition(lambda self: self.harness.under_way)
    @rule()
    def commit(self) -> None:
        """Take in the oldest output."""
        self.harness.clock.now += 1
        self.harness.commit()

    @rule(steps=st.integers(1, 12))
    def run(self, steps: int) -> None:
        """Several steps, as an engine would."""
        for _ in range(steps):
            if len(self.harness.under_way) < 2:
                self.harness.schedule()
            while len(self.harness.under_way) > self.ahead:
                self.harness.commit()

    @precondition(lambda self: self.harness.logs)
    @rule(data=st.data(), what=st.sampled_from(["abort", "finish", "fault"]))
    def trouble(self, data: st.DataObject, what: str) -> None:
        """A request is ended, or breaks down: waiting, planned, running or gone."""
        request_id, sample = data.draw(st.sampled_from(sorted(self.harness.logs)))
        if what == "abort":
            self.harness.abort(request_id)
        elif what == "finish":  # as a stop string does
            self.harness.take(self.harness.scheduler.finish(request_id, sample, "told"))
            self.harness.check()
        else:
            self.harness.runner.faulty.add(request_id)

    def teardown(self) -> None:
        """Everything ends, and nothing is left."""
        if hasattr(self, "harness"):
            self.harness.drain(ahead=self.ahead)


@pytest.mark.parametrize("steps", [12, 40])
def test_whatever_happens_every_request_ends_with_its_own_tokens(steps: int) -> None:
    """Short runs find small counterexamples, long ones rare states."""
    run_state_machine_as_test(
        SchedulerMachine,
        settings=settings(
            max_examples=examples(0.5 if steps == 12 else 0.06),
            stateful_step_count=steps,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        ),
    )
