"""Whatever else the engine has to do, each request gets the tokens that the readable loop gives it.

`KVIST_EXAMPLES=100000` makes a long run of it.
"""

from collections.abc import Sequence

from agreement import Tally, assert_same
from hypothesis import HealthCheck, event, given, settings
from mixes import (
    Mix,
    assert_idle,
    examples,
    expected_of,
    jobs_of,
    mixes_,
    model_of,
    poison,
    poisoned,
    run,
)

from kvist.core.results import Result
from kvist.engine import Engine

TALLY = Tally()


def assert_records(mix: Mix, results: Sequence[Sequence[Result]]) -> None:
    """Every prompt token is accounted for once, in a record whose times run forwards."""
    for samples in results:
        for result in samples:
            record = result.record
            assert record is not None
            position = record.cached_tokens
            for miss in record.misses:
                assert miss.start == position
                position = miss.stop
            if result.finish_reason != "abort":
                assert position == record.prompt_tokens
            assert record.output_tokens >= len(result.token_ids)
            assert record.cached_tokens == result.usage.cached_tokens
            assert min(record.queue_time, record.prefill_time, record.decode_time) >= 0
            if not mix.options["prefix_cache"]:
                assert record.cached_device == record.cached_host == 0


@settings(
    max_examples=examples(24),
    deadline=None,
    suppress_health_check=list(HealthCheck),
)
@given(mix=mixes_())
def test_every_request_gets_the_tokens_of_the_readable_loop(mix: Mix) -> None:
    model = model_of(mix.model)
    engine = poisoned(Engine(model, mix.config()))
    retention = mix.options["retention"]
    jobs = jobs_of(model, mix.asks, "cold")
    expected = expected_of(model, jobs, retention)
    cold = run(engine, jobs, mix.asks)
    assert_idle(engine)
    # Everything once more, all at once and nobody leaves, on whatever the cache has now.
    poison(engine, free_only=True)
    warm = run(engine, jobs_of(model, mix.asks, "warm"))
    assert_idle(engine)
    for ask, job, wanted, first, second in zip(mix.asks, jobs, expected, cold, warm, strict=True):
        for want, got, again in zip(wanted, first, second, strict=True):
            prompt, params = job.request.prompt_ids, job.request.params
            left = ask.leaves is not None and got.finish_reason == "abort"
            for one, whole in ((got, not left), (again, True)):
                assert_same(
                    model, prompt, params, want, one, TALLY, retention=retention, whole=whole
                )
    assert_records(mix, cold + warm)
    event(f"preempted: {engine.snapshot().preemptions > 0}")
    event(f"loaded from the host tier: {engine.snapshot().counters.loaded_blocks > 0}")
    event(f"hit: {any(r.usage.cached_tokens for samples in warm for r in samples)}")


def test_ties_among_them_are_rare() -> None:
    TALLY.check()
