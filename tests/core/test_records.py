"""The explainable cache: where each prompt token came from, why the rest did not, what it took."""

import dataclasses
import json

import pytest
from harness import FULL, Harness, make_request, sliding

from kvist.core.prefix import Namespace, PrefixKeys
from kvist.core.record import CacheCounters, Miss, RequestRecord
from kvist.core.tables import CacheGroup

TEXT = list(range(100, 140))


def an_engine(num_blocks: int = 60, **options: object) -> Harness:
    defaults: dict[str, object] = {"max_batch_tokens": 64}
    return Harness([CacheGroup(FULL, num_blocks)], 4, **(defaults | options))  # type: ignore[arg-type]


def serve(harness: Harness, prompt: list[int], **options: object) -> RequestRecord:
    id = f"r{len(harness.requests)}"
    harness.add(make_request(id, prompt, **({"max_tokens": 1} | options)))  # type: ignore[arg-type]
    harness.drain()
    record = harness.logs[id, 0].record
    assert record is not None
    return record


def test_the_first_request_of_all_was_never_seen():
    record = serve(an_engine(), TEXT[:10])
    assert record.misses == (Miss(0, 8, "never_seen"), Miss(8, 10, "tail"))
    assert record.cached_tokens == 0


def test_a_repeated_prompt_computes_its_tail_only():
    harness = an_engine()
    serve(harness, TEXT[:12])
    record = serve(harness, TEXT[:12])
    assert record.cached_device == 8
    assert record.misses == (Miss(8, 12, "tail"),)


def test_a_prompt_that_parts_from_a_cached_one_says_at_which_token():
    harness = an_engine()
    serve(harness, TEXT[:16])
    record = serve(harness, [*TEXT[:10], 7, *TEXT[11:20]])
    assert record.cached_device == 8
    assert record.misses == (Miss(8, 16, "differs", at=10), Miss(16, 20, "tail"))


def test_going_on_behind_a_cached_prompt_was_never_seen():
    harness = an_engine()
    serve(harness, TEXT[:16])
    assert serve(harness, TEXT[:30]).misses == (
        Miss(16, 28, "never_seen"),
        Miss(28, 30, "tail"),
    )


def test_what_had_to_give_way_says_when():
    harness = an_engine(num_blocks=7)
    serve(harness, TEXT[:16])
    serve(harness, [1] * 20)
    record = serve(harness, TEXT[:16])
    # Leaves go first: three of the four blocks went when the second request was planned.
    assert record.misses[0].kind == "evicted"
    assert record.misses[0].at == 2
    assert record.cached_device == record.misses[0].start == 4


def test_another_tenants_prefix_is_told_from_one_never_seen():
    harness = an_engine()
    serve(harness, TEXT[:10], salt="a")
    record = serve(harness, TEXT[:16], salt="b")
    assert record.misses == (
        Miss(0, 8, "other_salt"),
        Miss(8, 12, "never_seen"),
        Miss(12, 16, "tail"),
    )


def test_another_adapters_prefix_is_named_as_such():
    harness = an_engine()
    serve(harness, TEXT[:9])
    assert serve(harness, TEXT[:9], adapter="x").misses[0] == Miss(0, 8, "other_adapter")


def test_a_prefix_in_another_precision_is_named_as_such():
    harness = an_engine(codec="int8")
    imported = PrefixKeys(tuple(TEXT[:8]), namespace=Namespace(codec="fp8"))
    assert harness.blocks.open(-1, imported, harness.blocks.match(imported, 8), 8)
    harness.blocks.publish(-1, 8)
    harness.blocks.free(-1)
    assert serve(harness, TEXT[:9]).misses[0] == Miss(0, 8, "other_codec")


def test_without_a_prefix_cache_every_prompt_bypasses_it():
    harness = an_engine(prefix_cache=False)
    serve(harness, TEXT[:9])
    assert serve(harness, TEXT[:9]).misses == (Miss(0, 8, "bypassed"), Miss(8, 9, "tail"))


def test_blocks_behind_a_lost_window_are_stranded():
    harness = Harness([CacheGroup(FULL, 40), CacheGroup(sliding(4), 9)], 2, max_batch_tokens=64)
    serve(harness, TEXT[:12])
    serve(harness, TEXT[20:34])
    record = serve(harness, TEXT[:13])
    # Of the first prompt's window, blocks 4 and 5, the second has left block 4 alone.
    assert [(miss.start, miss.stop, miss.kind) for miss in record.misses] == [
        (0, 8, "evicted"),
        (8, 10, "stranded"),
        (10, 12, "evicted"),
        (12, 13, "tail"),
    ]


def test_a_second_admission_does_not_change_what_the_first_found():
    harness = an_engine(num_blocks=8, watermark=0.0)
    harness.add(make_request("a", TEXT[:10], max_tokens=12))
    harness.add(make_request("b", TEXT[20:30], max_tokens=12))
    harness.drain()
    record = harness.logs["b", 0].record
    assert record is not None
    assert record.preemptions == 1
    assert record.misses == (Miss(0, 8, "never_seen"), Miss(8, 10, "tail"))


def test_times_are_told_apart():
    harness = an_engine(max_num_seqs=1, max_batch_tokens=4)
    harness.add(make_request("a", TEXT[:4], max_tokens=2))
    harness.add(make_request("b", TEXT[10:18], max_tokens=3))
    while harness.scheduler.has_unfinished:
        harness.clock.now += 1
        harness.schedule()
        harness.clock.now += 2
        harness.commit()
    first, second = (harness.logs[id, 0].record for id in "ab")
    assert first is not None
    assert second is not None
    assert (first.queue_time, first.prefill_time, first.decode_time) == (1, 2, 3)
    assert (second.queue_time, second.prefill_time, second.decode_time) == (7, 5, 6)


def test_a_request_that_was_never_admitted_only_waited():
    harness = an_engine(max_num_seqs=1)
    harness.add(make_request("a", TEXT[:4]))
    harness.add(make_request("b", TEXT[:4], arrival=-5.0))
    harness.step()
    harness.clock.now = 2
    harness.abort("b")
    record = harness.logs["b", 0].record
    assert record is not None
    assert (record.queue_time, record.prefill_time, record.decode_time) == (7, 0, 0)
    assert (record.misses, record.output_tokens, record.reason) == ((), 0, "abort")


def test_a_snapshot_draws_the_block_map_and_is_json():
    harness = an_engine(num_blocks=12, max_num_seqs=2)
    serve(harness, [1, 2, 3, 4, 5])
    for id in "abc":
        harness.add(make_request(id, TEXT[:9], max_tokens=4))
    harness.step()
    harness.step()
    snapshot = harness.scheduler.snapshot()
    (group,) = snapshot.groups
    assert sorted(group.owners, reverse=True)[:2] == [2, 2], "two sequences share two blocks"
    assert [owner for owner, cached in zip(group.owners, group.cached, strict=True) if cached] == [
        0,
        2,
        2,
    ]
    assert group.free == 12 - 1 - 5
    assert [s.request_id for s in snapshot.running] == ["a", "b"]
    assert snapshot.running[0].blocks == (3,)
    assert [s.slot for s in snapshot.waiting] == [None]
    assert json.loads(json.dumps(dataclasses.asdict(snapshot)))["step"] == snapshot.step
    harness.drain()


def test_nothing_asked_is_no_hit():
    assert CacheCounters().hit_rate == 0.0
    assert CacheCounters(queried_tokens=8, device_hit_tokens=3, host_hit_tokens=1).hit_rate == 0.5


@pytest.mark.parametrize("prompt", [1, 4, 5, 8, 9])
def test_every_prompt_token_is_accounted_for_once(prompt):
    harness = an_engine()
    for _ in range(2):
        record = serve(harness, TEXT[:prompt])
        missed = sum(miss.stop - miss.start for miss in record.misses)
        assert record.cached_tokens + missed == prompt
