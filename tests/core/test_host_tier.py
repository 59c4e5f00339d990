"""Blocks that fall out of the pool go to host memory ahead of need, and come back on a hit."""

import pytest
from harness import FULL, Harness, make_request, sliding

from kvist.core.blocks import PagedBlockManager
from kvist.core.tables import CacheGroup
from kvist.errors import InvariantError

TEXT = list(range(100, 124))


def an_engine(num_blocks: int = 8, host_blocks: int = 30, **options: object) -> Harness:
    return Harness([CacheGroup(FULL, num_blocks, host_blocks)], 4, max_batch_tokens=64, **options)


def serve(harness: Harness, id: str, prompt: list[int]) -> None:
    harness.add(make_request(id, prompt, max_tokens=3))
    harness.drain()


def test_a_prefix_that_fell_out_of_the_pool_comes_back_from_the_host():
    harness = an_engine()
    serve(harness, "first", TEXT)
    for other in range(3):
        serve(harness, f"other {other}", [other] * 24)
    serve(harness, "again", TEXT)
    record = harness.logs["again", 0].record
    assert record is not None
    assert record.cached_host > 0
    assert record.cached_device + record.cached_host == 20
    counters = harness.scheduler.snapshot().counters
    assert counters.loaded_blocks == record.cached_host // 4
    assert counters.host_hit_tokens == record.cached_host
    assert 0 < counters.hit_rate < 1


def test_without_a_host_tier_it_is_gone():
    harness = an_engine(host_blocks=0)
    serve(harness, "first", TEXT)
    for other in range(3):
        serve(harness, f"other {other}", [other] * 24)
    serve(harness, "again", TEXT)
    record = harness.logs["again", 0].record
    assert record is not None
    assert record.cached_tokens == 0
    assert {miss.kind for miss in record.misses} == {"evicted", "tail"}


def test_saving_ahead_of_need_loses_nothing():
    harness = an_engine()
    for text in range(4):
        serve(harness, f"{text}", [text] * 24)
        harness.step()
        harness.step()
    counters = harness.scheduler.snapshot().counters
    assert counters.evicted_blocks > 0
    assert counters.unsaved_evictions == 0


def test_a_full_tier_gives_up_the_end_of_the_oldest_prefix():
    harness = an_engine(host_blocks=20)
    serve(harness, "first", TEXT)
    for other in range(3):
        serve(harness, f"other {other}", [other] * 24)
    serve(harness, "again", TEXT)
    record = harness.logs["again", 0].record
    assert record is not None
    assert record.cached_host == 8
    assert [(miss.start, miss.kind) for miss in record.misses] == [(8, "evicted"), (20, "tail")]


def test_the_host_tier_keeps_what_was_used_last():
    harness = an_engine(num_blocks=8, host_blocks=6)
    for text in range(5):
        serve(harness, f"{text}", [text] * 24)
        harness.step()
        harness.step()
    serve(harness, "young", [4] * 24)
    serve(harness, "old", [0] * 24)
    young, old = (harness.logs[id, 0].record for id in ("young", "old"))
    assert young is not None
    assert old is not None
    assert young.cached_tokens == 20
    assert old.cached_tokens == 0
    snapshot = harness.scheduler.snapshot()
    assert snapshot.groups[0].host_used == 6


def test_a_hit_may_need_the_host_in_one_group_only():
    groups = [CacheGroup(FULL, 8, 20), CacheGroup(sliding(4), 20, 0)]
    harness = Harness(groups, 4, max_batch_tokens=64)
    serve(harness, "first", TEXT)
    serve(harness, "other", [1] * 24)
    serve(harness, "again", TEXT)
    record = harness.logs["again", 0].record
    assert record is not None
    assert record.cached_host > 0


def test_a_block_that_is_being_saved_is_not_reused_before_the_commit():
    harness = an_engine(num_blocks=7)
    harness.add(make_request("r", TEXT, max_tokens=1))
    harness.step()
    assert harness.blocks.pools[0].num_available == 6
    plan = harness.schedule()
    assert len(plan.groups[0].saves) == 5, "of six idle blocks one stays available"
    assert harness.blocks.pools[0].num_available == 1
    harness.commit()
    assert harness.blocks.pools[0].num_available == 6


def test_blocks_are_saved_while_they_are_owned_where_few_are_idle():
    harness = an_engine(num_blocks=8)
    harness.add(make_request("r", TEXT, max_tokens=3))
    harness.step()
    plan = harness.step()
    assert [move.block for move in plan.groups[0].saves] == [1, 2, 3, 4, 5, 6]
    assert harness.step().groups[0].saves == ()
    harness.drain()


@pytest.mark.parametrize("owned", [False, True])
def test_a_full_tier_whose_blocks_are_all_being_loaded_takes_no_more(owned):
    harness = an_engine(num_blocks=7, host_blocks=4)
    serve(harness, "first", TEXT[:20])
    host, pool = harness.blocks.hosts[0], harness.blocks.pools[0]
    assert host.num_used == 4
    for host_block in list(host._filled):
        host.begin_load(host_block)
    if owned:
        harness.checked = False
        harness.add(make_request("r", [1] * 22, max_tokens=3))
        harness.step()
    assert len(list(pool.oldest_idle())) == (0 if owned else 5)
    assert host.save_ahead(pool, 4, step=99) == []


def test_a_hit_waits_while_the_blocks_to_load_it_into_are_under_way():
    harness = an_engine(num_blocks=5)
    for text in (TEXT[:13], [1] * 13):
        serve(harness, str(text[0]), text)
        harness.step()
        harness.step()
    harness.add(make_request("a", TEXT[:13], max_tokens=1))
    assert len(harness.schedule().groups[0].loads) == 3
    harness.abort("a")
    harness.add(make_request("b", [1] * 13, max_tokens=1))
    assert harness.schedule().rows == ()
    harness.commit()
    harness.commit()
    harness.drain()
    record = harness.logs["b", 0].record
    assert record is not None
    assert record.cached_host == 12


def a_filled_tier() -> PagedBlockManager:
    harness = an_engine()
    serve(harness, "first", TEXT)
    harness.step()
    harness.step()
    assert harness.blocks.hosts[0].num_used == 6
    return harness.blocks


def lose(blocks: PagedBlockManager) -> None:
    blocks.hosts[0]._free.pop()


def pin(blocks: PagedBlockManager) -> None:
    blocks.hosts[0].begin_load(next(iter(blocks.hosts[0]._filled)))


def misplace(blocks: PagedBlockManager) -> None:
    first, second = list(blocks.hosts[0]._filled)[:2]
    filled = blocks.hosts[0]._filled
    filled[first], filled[second] = filled[second], filled[first]


def drop(blocks: PagedBlockManager) -> None:
    host_block, _ = blocks.hosts[0]._filled.popitem()
    blocks.hosts[0]._free.append(host_block)


@pytest.mark.parametrize(
    ("corrupt", "said"),
    [
        (lose, "exactly once"),
        (pin, "do not match the uncommitted plans"),
        (misplace, "and its prefix disagree"),
        (drop, "claims block"),
    ],
)
def test_check_names_what_is_wrong_with_the_host_tier(corrupt, said):
    blocks = a_filled_tier()
    corrupt(blocks)
    with pytest.raises(InvariantError, match=said):
        blocks.check()


def test_check_sees_a_load_from_a_block_that_holds_nothing():
    blocks = a_filled_tier()
    host = blocks.hosts[0]
    free = host._free[-1]
    host._pins[free] = 1
    with pytest.raises(InvariantError, match="a pinned block is not filled"):
        host.check({free: 1}, set())
