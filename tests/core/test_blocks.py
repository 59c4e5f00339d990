"""The block manager: sharing, copying, windows, eviction; and that `check` sees every defect."""

import pytest
from harness import FULL, sliding

from kvist.core.blocks import PagedBlockManager
from kvist.core.plan import BlockCopy, GroupChanges, TableChange
from kvist.core.prefix import PrefixKeys
from kvist.core.spec import AttentionSpec
from kvist.core.tables import CacheGroup
from kvist.errors import CacheError, InvariantError

TEXT = tuple(range(100, 140))


def a_manager(
    *specs: AttentionSpec, num_blocks: int = 12, block_size: int = 4, prefix_cache: bool = True
) -> PagedBlockManager:
    groups = [CacheGroup(spec, num_blocks) for spec in specs or (FULL,)]
    return PagedBlockManager(groups, block_size, prefix_cache=prefix_cache)


def begin(blocks: PagedBlockManager, key: int, tokens: tuple[int, ...], limit: int = 99) -> int:
    """Open a sequence with room for all its tokens; returns how many were cached."""
    keys = PrefixKeys(tokens)
    match = blocks.match(keys, min(limit, len(tokens) - 1))
    assert blocks.open(key, keys, match, len(tokens))
    return match.num_tokens


def run(blocks: PagedBlockManager) -> tuple[GroupChanges, ...]:
    """A plan of all that happened, committed at once."""
    changes = blocks.collect({key: key for key in blocks._tables})
    blocks.settle(blocks.step)
    blocks.step += 1
    blocks.check()
    return changes


def compute(blocks: PagedBlockManager, key: int, tokens: tuple[int, ...]) -> int:
    """Open, plan and commit a sequence; returns how many of its tokens were cached."""
    cached = begin(blocks, key, tokens)
    run(blocks)
    blocks.publish(key, len(tokens))
    return cached


def test_full_blocks_of_a_common_prefix_are_shared():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:10])
    assert compute(blocks, 2, TEXT[:9]) == 8
    assert blocks.blocks_of(1, 0)[:2] == blocks.blocks_of(2, 0)[:2]
    assert blocks.blocks_of(1, 0)[2] != blocks.blocks_of(2, 0)[2]


def test_the_last_prompt_token_is_always_left_to_compute():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:8])
    assert blocks.match(PrefixKeys(TEXT[:8]), limit=7).num_tokens == 4


def test_nothing_is_shared_before_it_is_committed():
    blocks = a_manager()
    begin(blocks, 1, TEXT[:8])
    assert begin(blocks, 2, TEXT[:8]) == 0


def test_nothing_is_shared_without_the_prefix_cache():
    blocks = a_manager(prefix_cache=False)
    compute(blocks, 1, TEXT[:8])
    blocks.free(1)
    assert compute(blocks, 2, TEXT[:8]) == 0


def test_two_that_compute_the_same_at_once_end_up_with_one_copy():
    blocks = a_manager()
    begin(blocks, 1, TEXT[:8])
    begin(blocks, 2, TEXT[:8])
    run(blocks)
    blocks.publish(1, 8)
    blocks.publish(2, 8)
    assert blocks.blocks_of(1, 0) == blocks.blocks_of(2, 0)
    (changes,) = run(blocks)
    assert changes.tables == (TableChange(2, 0, (1,)), TableChange(2, 1, (2,)))
    assert blocks.pools[0].num_free == 12 - 1 - 2


def test_allocation_is_all_or_nothing_over_all_groups():
    blocks = PagedBlockManager([CacheGroup(FULL, 9), CacheGroup(sliding(4), 4)], 4)
    begin(blocks, 1, TEXT[:8])
    before = [pool.num_available for pool in blocks.pools]
    assert not blocks.allocate(1, 20)
    assert [pool.num_available for pool in blocks.pools] == before
    assert blocks.room(1, 20) == 12
    assert blocks.allocate(1, 12)
    match = blocks.match(PrefixKeys(TEXT), 0)
    assert not blocks.open(2, PrefixKeys(TEXT), match, 1)
    blocks.check()


def test_a_matched_block_that_nobody_owns_counts_against_the_room():
    blocks = a_manager(num_blocks=4)
    compute(blocks, 1, TEXT[:8])
    blocks.free(1)
    keys = PrefixKeys(TEXT[:14])
    match = blocks.match(keys, 13)
    assert match.num_tokens == 8
    assert not blocks.open(2, keys, match, 14), "two matched blocks leave one of three"
    assert blocks.open(2, keys, match, 12)


def test_a_fork_shares_everything_until_it_writes():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:6])
    blocks.fork(1, 2, PrefixKeys(TEXT[:6]), 6)
    assert blocks.blocks_of(1, 0) == blocks.blocks_of(2, 0)
    assert blocks.allocate(1, 8), "the parent writes behind what it shares"
    assert run(blocks)[0].copies == ()
    assert blocks.allocate(2, 7)
    first, second = blocks.blocks_of(1, 0), blocks.blocks_of(2, 0)
    assert first[0] == second[0]
    assert first[1] != second[1]
    assert run(blocks)[0].copies == (BlockCopy(first[1], second[1]),)


def test_a_fork_that_outlives_its_parent_writes_in_place():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:6])
    blocks.fork(1, 2, PrefixKeys(TEXT[:6]), 6)
    blocks.free(1)
    assert blocks.allocate(2, 7)
    assert run(blocks)[0].copies == ()


def test_a_parent_that_goes_back_into_what_it_shares_copies_before_it_writes():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:6])
    blocks.fork(1, 2, PrefixKeys(TEXT[:6]), 6)
    blocks.truncate(1, 5)
    assert blocks.allocate(1, 6)
    assert len(run(blocks)[0].copies) == 1


def test_a_fork_inside_a_published_block_copies_it():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:8])
    blocks.fork(1, 2, PrefixKeys(TEXT[:8]), 7)
    blocks.free(1)
    assert blocks.allocate(2, 8), "nobody else owns the block, but anyone may hit it"
    assert len(run(blocks)[0].copies) == 1
    assert blocks.match(PrefixKeys(TEXT[:9]), 8).num_tokens == 8


def test_asking_for_room_that_is_there_copies_nothing():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:6])
    blocks.fork(1, 2, PrefixKeys(TEXT[:6]), 6)
    assert blocks.allocate(2, 6)
    assert run(blocks)[0].copies == ()


def test_there_is_no_room_for_a_copy_in_a_full_pool():
    blocks = a_manager(num_blocks=3)
    compute(blocks, 1, TEXT[:6])
    blocks.fork(1, 2, PrefixKeys(TEXT[:6]), 6)
    assert blocks.room(2, 9) == 6
    assert not blocks.allocate(2, 7)
    blocks.free(1)
    assert blocks.room(2, 9) == 8
    assert blocks.allocate(2, 7)


def test_a_copied_block_is_not_reused_before_its_plan_is_committed():
    blocks = a_manager(num_blocks=4)
    compute(blocks, 1, TEXT[:6])
    blocks.fork(1, 2, PrefixKeys(TEXT[:6]), 6)
    assert blocks.allocate(2, 7)
    source = blocks.blocks_of(1, 0)[1]
    blocks.free(1)
    blocks.collect({2: 0})
    blocks.check()
    assert not blocks.allocate(2, 9), f"the only block left, {source}, is being copied"
    blocks.settle(blocks.step)
    assert blocks.allocate(2, 9)
    assert source in blocks.blocks_of(2, 0)


def test_blocks_behind_a_window_are_freed_and_become_null():
    blocks = a_manager(sliding(4), block_size=2)
    compute(blocks, 1, TEXT[:12])
    # The query at 12 sees 9 to 11; one position of slack adds 8.
    assert blocks.blocks_of(1, 0) == (0, 0, 0, 0, 5, 6)
    (changes,) = run(blocks)
    assert changes.tables == tuple(TableChange(1, i, (0,)) for i in range(4))


def test_sinks_stay_when_the_window_moves_on():
    blocks = a_manager(sliding(4, sinks=3), block_size=2)
    compute(blocks, 1, TEXT[:12])
    assert blocks.blocks_of(1, 0) == (1, 2, 0, 0, 5, 6)


def test_a_window_moves_on_step_by_step():
    blocks = a_manager(sliding(3), block_size=2)
    keys = PrefixKeys(TEXT)
    assert blocks.open(1, keys, blocks.match(keys, 0), 1)
    for length in range(2, 30):
        blocks.publish(1, length - 1)
        assert blocks.allocate(1, length)
        run(blocks)
        assert blocks.num_blocks_of(1)[0] <= blocks.most_blocks(length, chunk=1)[0]


def test_a_block_forgotten_behind_the_window_counts_as_evicted_when_the_next_is_full():
    group = CacheGroup(sliding(3), num_blocks=4)
    blocks = PagedBlockManager([group], 4, max_forgotten=0)
    begin(blocks, 1, TEXT[:8])
    run(blocks)
    blocks.publish(1, 7)  # the first block is published and goes, the second is not full yet
    begin(blocks, 2, TEXT[20:28])  # takes the first one's place, and nobody remembers it
    run(blocks)
    blocks.publish(1, 8)
    blocks.check()
    first, second = blocks.index.known(PrefixKeys(TEXT[:9]), 2)
    assert (first.num_places, first.evicted_step) == (0, blocks.step)
    assert second.num_places == 1
    blocks.free(1)
    blocks.free(2)
    compute(blocks, 3, TEXT[28:40])
    assert len(blocks.index) == 4  # three blocks and their root: nothing of the old is left over


def test_a_windowed_group_resumes_from_its_window_and_sinks_alone():
    blocks = a_manager(FULL, sliding(4, sinks=2), block_size=2, num_blocks=20)
    compute(blocks, 1, TEXT[:20])
    blocks.free(1)
    assert compute(blocks, 2, TEXT[:21]) == 20
    assert blocks.blocks_of(2, 1)[1:8] == (0,) * 7
    assert 0 not in blocks.blocks_of(2, 0)


def test_the_match_is_the_longest_that_every_group_accepts():
    blocks = a_manager(FULL, sliding(4), block_size=2, num_blocks=20)
    compute(blocks, 1, TEXT[:20])
    blocks.free(1)
    # Drop the window's block 6: resuming at 14 or 16 reads it; at 18 and 20 nobody does.
    index, node = blocks.index, blocks.index.known(PrefixKeys(TEXT[:20]), 10)[6]
    blocks.pools[1]._idle.pop(node.blocks[1])
    blocks.pools[1].nodes[node.blocks[1]] = None
    blocks.pools[1]._free.append(node.blocks[1])
    index.drop_block(node, 1, 7)
    assert [blocks.match(PrefixKeys(TEXT), n).num_tokens for n in (20, 18, 17, 15, 12)] == [
        20,
        18,
        12,
        12,
        12,
    ]


def test_a_lost_sink_bounds_every_prefix():
    blocks = a_manager(sliding(2, sinks=2), block_size=2, num_blocks=20)
    compute(blocks, 1, TEXT[:20])
    sink = blocks.blocks_of(1, 0)[0]
    blocks.free(1)
    for block in list(blocks.pools[0].oldest_idle()):
        if block != sink:
            blocks.pools[0]._idle.move_to_end(block)
    assert blocks.match(PrefixKeys(TEXT), 20).num_tokens == 20
    compute(blocks, 2, tuple(range(30)))
    assert blocks.match(PrefixKeys(TEXT), 20).num_tokens == 0


def test_children_are_evicted_before_their_parents():
    blocks = a_manager(num_blocks=8)
    compute(blocks, 1, TEXT[:16])
    blocks.free(1)
    for evicted in range(1, 5):
        begin(blocks, 10 + evicted, (evicted, 0, 0, 0) * (4 if evicted == 1 else 1))
        left = blocks.match(PrefixKeys(TEXT[:16]), 16).num_tokens
        assert left == 16 - 4 * evicted


def test_going_back_gives_up_the_blocks_behind():
    blocks = a_manager()
    begin(blocks, 1, TEXT[:14])
    run(blocks)
    blocks.publish(1, 9)
    blocks.truncate(1, 9)
    assert len(blocks.blocks_of(1, 0)) == 3
    assert blocks.allocate(1, 12)
    assert run(blocks)[0].copies == ()


def test_going_back_behind_what_is_published_keeps_the_published_block_as_it_is():
    blocks = a_manager()
    compute(blocks, 1, TEXT[:8])
    blocks.truncate(1, 6)
    assert blocks.allocate(1, 7)
    assert len(run(blocks)[0].copies) == 1
    assert blocks.match(PrefixKeys(TEXT[:9]), 8).num_tokens == 8


def test_other_tokens_written_after_going_back_are_published_as_themselves():
    blocks = a_manager()
    keys = PrefixKeys((), list(TEXT[:12]))
    assert blocks.open(1, keys, blocks.match(keys, 11), 12)
    run(blocks)
    blocks.publish(1, 12)
    blocks.truncate(1, 6)
    keys.output_ids[6:] = [1, 2, 3, 4, 5, 6]
    assert blocks.allocate(1, 12)
    run(blocks)
    blocks.publish(1, 12)
    assert blocks.match(PrefixKeys((*TEXT[:6], 1, 2, 3, 4, 5, 6)), 12).num_tokens == 12
    assert blocks.match(PrefixKeys(TEXT[:12]), 12).num_tokens == 12, "the old ones are kept"


def test_changes_of_blocks_that_were_given_back_are_not_announced():
    blocks = a_manager()
    begin(blocks, 1, TEXT[:14])
    blocks.truncate(1, 6)
    assert run(blocks)[0].tables == (TableChange(1, 0, (1, 2)),)


def test_tables_of_sequences_without_a_slot_wait_for_one():
    blocks = a_manager()
    begin(blocks, 1, TEXT[:4])
    assert blocks.collect({})[0].tables == ()
    blocks.step += 1
    assert blocks.collect({1: 5})[0].tables == (TableChange(5, 0, (1,)),)


def test_a_window_that_has_moved_on_forbids_going_back():
    blocks = a_manager(sliding(4), block_size=2)
    compute(blocks, 1, TEXT[:12])
    assert blocks.can_fork(1, 11)
    assert not blocks.can_fork(1, 8)
    with pytest.raises(CacheError, match="12 tokens cannot go back to 8"):
        blocks.truncate(1, 8)
    with pytest.raises(CacheError, match="2 cannot share 8 tokens of sequence 1"):
        blocks.fork(1, 2, PrefixKeys(TEXT), 8)
    blocks.truncate(1, 11)
    blocks.check()


def test_a_window_moves_on_again_after_going_back():
    blocks = a_manager(sliding(4), block_size=2, prefix_cache=False)
    compute(blocks, 1, TEXT[:12])
    blocks.truncate(1, 0)
    assert blocks.allocate(1, 12)
    blocks.publish(1, 12)
    assert blocks.blocks_of(1, 0)[:4] == (0,) * 4


def test_what_is_not_computed_cannot_be_shared_or_published():
    blocks = a_manager()
    begin(blocks, 1, TEXT[:6])
    with pytest.raises(CacheError, match="cannot share 6"):
        blocks.fork(1, 2, PrefixKeys(TEXT), 6)
    with pytest.raises(CacheError, match="7 tokens cannot be computed"):
        blocks.publish(1, 7)
    with pytest.raises(CacheError, match="6 tokens cannot go back to 7"):
        blocks.truncate(1, 7)


def test_a_key_names_one_sequence():
    blocks = a_manager()
    begin(blocks, 1, TEXT[:6])
    with pytest.raises(CacheError, match="sequence 1 already has blocks"):
        begin(blocks, 1, TEXT[:6])


def test_a_prefix_can_be_exported_and_imported_block_by_block():
    here, there = a_manager(), a_manager()
    compute(here, 1, TEXT[:8])
    here.free(1)
    keys = PrefixKeys(TEXT[:8])
    assert here.open(2, keys, here.match(keys, 8), 8)
    exported = here.blocks_of(2, 0)
    here.free(2)
    assert 0 not in exported
    assert compute(there, 1, TEXT[:8]) == 0  # the importer writes these blocks before `publish`
    there.free(1)
    assert there.match(PrefixKeys(TEXT[:9]), 8).num_tokens == 8


def test_an_imported_prefix_keeps_only_what_its_windows_still_need():
    blocks = a_manager(FULL, sliding(4, sinks=2), block_size=2, num_blocks=20)
    begin(blocks, 1, TEXT[:12])
    blocks.keep_needed(1, 12)
    assert blocks.blocks_of(1, 1) == (1, 0, 0, 0, 5, 6)
    assert 0 not in blocks.blocks_of(1, 0)
    blocks.publish(1, 12)
    blocks.free(1)
    blocks.check()
    assert blocks.match(PrefixKeys(TEXT), 40).num_tokens == 12


def test_a_plans_need_is_bounded_by_window_sinks_and_chunk():
    group = CacheGroup(sliding(8, sinks=3), 100)
    assert group.most_blocks(num_tokens=1000, chunk=1, slack=1, block_size=4) == 1 + 4
    assert group.most_blocks(num_tokens=10, chunk=1, slack=1, block_size=4) == 3
    assert CacheGroup(FULL, 100).most_blocks(1000, 1, 1, 4) == 250


def own_twice(blocks: PagedBlockManager) -> None:
    blocks.pools[0].owners[1] += 1


def leak(blocks: PagedBlockManager) -> None:
    blocks.pools[0]._free.pop()


def free_twice(blocks: PagedBlockManager) -> None:
    blocks.pools[0]._free.append(blocks.pools[0]._free[0])


def own_null(blocks: PagedBlockManager) -> None:
    blocks.pools[0].owners[0] = 1


def hold_forever(blocks: PagedBlockManager) -> None:
    blocks.pools[0].hold(1)


def miscount_holds(blocks: PagedBlockManager) -> None:
    blocks.pools[0]._held_idle += 1


def claim_block(blocks: PagedBlockManager) -> None:
    blocks.pools[0].nodes[1] = None


def move_prefix(blocks: PagedBlockManager) -> None:
    next(node for node in blocks.index if node.blocks[0] == 1).blocks[0] = 3


def idle_without_prefix(blocks: PagedBlockManager) -> None:
    block = blocks.pools[0]._free.pop()
    blocks.pools[0]._idle[block] = None


def overrun(blocks: PagedBlockManager) -> None:
    blocks._tables[1].committed = 99


def shorten(blocks: PagedBlockManager) -> None:
    blocks._tables[1].capacity += 4


def lose_entry(blocks: PagedBlockManager) -> None:
    blocks.pools[0].disown(blocks._tables[1].blocks[0][1])
    blocks._tables[1].blocks[0][1] = 0


@pytest.mark.parametrize(
    ("corrupt", "said"),
    [
        (own_twice, "block 1 counts 2 owners but is in 1 tables"),
        (leak, "exactly once"),
        (free_twice, "free twice"),
        (own_null, "null block"),
        (hold_forever, "plans need"),
        (miscount_holds, "as held"),
        (claim_block, "prefix 2 claims block 1"),
        (move_prefix, "block 1 and its prefix disagree"),
        (idle_without_prefix, "idle but holds no prefix"),
        (overrun, "committed 99 <= room"),
        (shorten, "group 0 has 2 entries"),
        (lose_entry, "lacks a block that it still reads"),
    ],
)
def test_check_names_the_broken_invariant(corrupt, said):
    blocks = a_manager()
    compute(blocks, 1, TEXT[:8])
    blocks.check()
    corrupt(blocks)
    with pytest.raises(InvariantError, match=said):
        blocks.check()
