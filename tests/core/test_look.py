"""What a live picture shows: marks of what happened, the prefix tree, and what a block holds."""

import json
from dataclasses import asdict

import pytest
from harness import FULL, Harness, make_request, sliding

from kvist.core.record import Branch, Mark
from kvist.core.tables import CacheGroup
from kvist.errors import CacheError

TEXT = list(range(100, 140))


def an_engine(num_blocks: int = 60, host_blocks: int = 0, **options: object) -> Harness:
    defaults: dict[str, object] = {"max_batch_tokens": 64}
    return Harness([CacheGroup(FULL, num_blocks, host_blocks)], 4, **(defaults | options))


def serve(harness: Harness, id: str, prompt: list[int], **options: object) -> None:
    harness.add(make_request(id, prompt, **options))  # type: ignore[arg-type]
    harness.drain()


def marks_of(harness: Harness, id: str, since: int = 0) -> list[Mark]:
    return [m for m in harness.scheduler.look(since).marks if m.request_id == id]


def kinds(marks: list[Mark]) -> list[str]:
    return [mark.kind for mark in marks]


# -- marks ---------------------------------------------------------------------------------------


def test_a_request_leaves_a_mark_for_each_chunk_of_its_prompt_but_none_for_decoding():
    harness = an_engine(max_batch_tokens=5)
    serve(harness, "a", TEXT[:12], max_tokens=6)
    marks = marks_of(harness, "a")
    assert kinds(marks) == ["arrived", "admitted", *["computed"] * 3, "first_token", "ended"]
    assert [(m.start, m.stop) for m in marks if m.kind == "computed"] == [(0, 5), (5, 10), (10, 12)]
    assert (marks[-1].reason, marks[-1].stop) == ("length", 18)


def test_marks_carry_the_clock_of_the_records():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:8], max_tokens=2))
    harness.clock.now = 3.0
    harness.step()
    harness.clock.now = 7.0
    harness.drain()
    times = {m.kind: m.time for m in marks_of(harness, "a")}
    record = harness.logs["a", 0].record
    assert record is not None
    assert times["admitted"] - times["arrived"] == record.queue_time == 3.0
    assert times["first_token"] - times["admitted"] == record.prefill_time
    assert times["ended"] - times["first_token"] == record.decode_time


def test_admission_says_what_came_from_the_cache():
    harness = an_engine()
    serve(harness, "a", TEXT[:18])
    serve(harness, "b", TEXT[:18])
    [admitted] = [m for m in marks_of(harness, "b") if m.kind == "admitted"]
    assert admitted.stop == 16


def test_a_preempted_request_is_admitted_again_and_computes_what_it_lost():
    harness = an_engine(num_blocks=9, max_batch_tokens=64, prefix_cache=False)
    harness.add(make_request("a", TEXT[:8], max_tokens=20))
    harness.add(make_request("b", TEXT[20:28], max_tokens=20))
    harness.drain()
    told = kinds(marks_of(harness, "b"))
    first = told.index("preempted")
    assert told[first : first + 3] == ["preempted", "admitted", "computed"]
    assert told.count("preempted") == harness.scheduler.snapshot().preemptions
    assert told[-1] == "ended"


def test_only_new_marks_are_told_and_their_number_is_bounded():
    harness = an_engine()
    serve(harness, "a", TEXT[:4])
    last = harness.scheduler.look().marks[-1].serial
    assert harness.scheduler.look(last).marks == ()
    assert harness.scheduler.look(last + 100).marks == ()
    serve(harness, "b", TEXT[4:8])
    fresh = harness.scheduler.look(last).marks
    assert {m.request_id for m in fresh} == {"b"}
    assert [m.serial for m in fresh] == list(range(last + 1, last + 1 + len(fresh)))
    for i in range(600):
        serve(harness, f"{i}", TEXT[:4], max_tokens=1)
    assert len(harness.scheduler.look().marks) == 2048


def test_the_snapshot_counts_what_was_computed_and_what_came_out():
    harness = an_engine(max_batch_tokens=16)
    serve(harness, "a", TEXT[:18], max_tokens=5)
    serve(harness, "b", TEXT[:18], max_tokens=5)
    snapshot = harness.scheduler.snapshot()
    assert snapshot.output_tokens == 10
    # 18 and then 2 prompt tokens, and each output but its last goes through the model.
    assert snapshot.computed_tokens == 18 + 4 + 2 + 4


# -- the tree ------------------------------------------------------------------------------------


def tree(harness: Harness, limit: int = 1000) -> tuple[Branch, ...]:
    found = harness.scheduler.look(branches=limit).tree
    assert found is not None
    return found


def test_texts_that_part_become_branches_of_a_common_stem():
    harness = an_engine()
    serve(harness, "a", TEXT[:8] + [1] * 9, max_tokens=1)
    serve(harness, "b", TEXT[:8] + [2] * 5, max_tokens=1)
    stem, *branches = tree(harness)
    assert (stem.parent, len(stem.blocks), stem.tokens) == (0, 2, tuple(TEXT[:8]))
    assert [(b.parent, b.tokens, len(b.blocks)) for b in branches] == [
        (stem.serial, (2,) * 4, 1),
        (stem.serial, (1,) * 8, 2),
    ]
    assert all(block > 0 for branch in (stem, *branches) for block in branch.blocks)


def test_the_tree_is_left_out_unless_asked_for_and_bounded_when_it_is():
    harness = an_engine()
    serve(harness, "a", TEXT[:32], max_tokens=1)
    assert harness.scheduler.look().tree is None
    assert [len(branch.blocks) for branch in tree(harness, 3)] == [3]


def test_a_branch_tells_what_it_begins_with_but_not_all_of_it():
    harness = an_engine()
    serve(harness, "a", list(range(60)), max_tokens=1)
    [branch] = tree(harness)
    assert (len(branch.blocks), branch.tokens) == (15, tuple(range(32)))


def test_tenants_grow_from_roots_of_their_own():
    harness = an_engine()
    serve(harness, "a", TEXT[:8], salt="one", max_tokens=1)
    serve(harness, "b", TEXT[:8], salt="two", max_tokens=1)
    first, second = tree(harness)
    assert first.tokens == second.tokens
    assert first.root != second.root


def test_what_is_gone_leaves_the_tree_and_what_the_host_keeps_stays():
    without = an_engine(num_blocks=8)
    host = an_engine(num_blocks=8, host_blocks=30)
    for harness in (without, host):
        serve(harness, "a", TEXT[:24], max_tokens=3)
        for other in range(3):
            serve(harness, f"{other}", [other] * 24, max_tokens=3)
    assert 100 not in [branch.tokens[0] for branch in tree(without)]
    [kept] = [branch for branch in tree(host) if branch.tokens[0] == 100]
    assert any(kept.saved)
    assert not any(kept.blocks)


def test_a_look_is_plain_data():
    harness = an_engine()
    serve(harness, "a", TEXT[:12])
    look = harness.scheduler.look(branches=10)
    told = json.loads(json.dumps(asdict(look)))
    assert told["snapshot"]["known_prefixes"] == 4
    assert told["tree"][0]["blocks"] == list(look.tree[0].blocks if look.tree else ())
    assert look.seconds >= 0


# -- blocks --------------------------------------------------------------------------------------


def test_a_block_tells_its_tokens_where_they_stand_and_who_owns_it():
    harness = an_engine()
    serve(harness, "a", TEXT[:12], max_tokens=1)
    harness.add(make_request("b", TEXT[:13], max_tokens=9))
    harness.add(make_request("c", TEXT[:13], max_tokens=9))
    harness.add(make_request("other", TEXT[20:33], max_tokens=9))
    harness.step()
    shared = next(b for b in tree(harness) if b.tokens[0] == 100).blocks[1]
    detail = harness.scheduler.block(0, shared)
    assert (detail.tokens, detail.start) == (tuple(TEXT[4:8]), 4)
    assert detail.owners == (("b", 0), ("c", 0))
    assert detail.cached


def test_a_block_that_is_being_written_tells_what_is_in_it_so_far():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:6], max_tokens=9))
    harness.step()
    [last] = [
        block
        for block, owners in enumerate(harness.scheduler.snapshot().groups[0].owners)
        if owners and not harness.scheduler.block(0, block).cached
    ]
    detail = harness.scheduler.block(0, last)
    assert detail.tokens[:2] == (104, 105)
    assert (detail.start, detail.owners) == (4, (("a", 0),))


def test_a_free_block_holds_nothing():
    detail = an_engine().scheduler.block(0, 5)
    assert (detail.tokens, detail.owners, detail.cached) == ((), (), False)


def test_host_blocks_are_mapped_and_described():
    harness = an_engine(num_blocks=8, host_blocks=6)
    serve(harness, "a", TEXT[:24], max_tokens=1)
    harness.step()
    [group] = harness.scheduler.snapshot().groups
    assert sum(group.host_cached) > 0
    block = group.host_cached.index(True)
    detail = harness.scheduler.block(0, block, host=True)
    assert detail.saved
    assert detail.tokens == tuple(TEXT[detail.start : detail.start + 4])


@pytest.mark.parametrize(("group", "block"), [(0, -1), (0, 60), (1, 0), (-1, 0), (0, 10**30)])
def test_a_block_that_does_not_exist_is_refused(group: int, block: int):
    with pytest.raises(CacheError, match="does not exist"):
        an_engine().scheduler.block(group, block)


def test_a_windowed_group_shows_the_blocks_that_it_still_owns():
    harness = Harness([CacheGroup(sliding(4), 40)], 4, max_batch_tokens=64)
    harness.add(make_request("a", TEXT[:30], max_tokens=9))
    harness.step()
    owners = harness.scheduler.snapshot().groups[0].owners
    for block, count in enumerate(owners):
        assert len(harness.scheduler.block(0, block).owners) == count
