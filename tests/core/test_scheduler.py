"""What the scheduler decides: who goes first, what is shared, who gives way, what the plan says."""

from collections.abc import Sequence

import pytest
from harness import FULL, Harness, make_request, sliding
from null_runner import expected_output

from kvist.core.plan import (
    LAST_SAMPLED,
    FailedEvent,
    Plan,
    RowOutput,
    StepOutput,
    TokensEvent,
)
from kvist.core.prefix import PrefixKeys
from kvist.core.request import Request
from kvist.core.rng import uniform
from kvist.core.tables import CacheGroup
from kvist.errors import KvistError

TEXT = list(range(100, 140))


def an_engine(num_blocks: int = 60, **options: object) -> Harness:
    return Harness([CacheGroup(FULL, num_blocks)], 4, **options)  # type: ignore[arg-type]


def lengths(plan: Plan) -> list[int]:
    return [len(row.tokens) for row in plan.rows]


def who(plan: Plan, harness: Harness) -> list[str]:
    return [harness.runner.slots[row.slot].admission.request_id for row in plan.rows]


# -- one step ------------------------------------------------------------------------------------


def test_decodes_come_first_and_prompts_fill_the_rest_of_the_budget():
    harness = an_engine(max_batch_tokens=10)
    harness.add(make_request("a", TEXT[:4], max_tokens=9))
    harness.step()
    harness.add(make_request("b", TEXT[10:34], max_tokens=2))
    plan = harness.step()
    assert lengths(plan) == [1, 9]
    assert [row.sample for row in plan.rows] == [True, False]
    assert lengths(harness.step()) == [1, 9]
    plan = harness.step()
    assert lengths(plan) == [1, 6]
    assert plan.rows[1].sample
    harness.drain()


def test_a_chunk_is_no_longer_than_the_configuration_allows():
    harness = an_engine(max_batch_tokens=100, max_chunk_tokens=5)
    harness.add(make_request("a", TEXT[:12]))
    assert [lengths(harness.step()) for _ in range(3)] == [[5], [5], [2]]
    harness.drain()


def test_a_last_chunk_of_one_token_stands_with_the_decodes():
    harness = an_engine(max_batch_tokens=8)
    harness.add(make_request("a", TEXT[:5]))
    harness.add(make_request("b", TEXT[10:14]))
    assert lengths(harness.step()) == [5, 3]
    assert lengths(harness.step()) == [1, 1]
    harness.drain()


def test_admission_is_first_come_first_served_and_nobody_is_overtaken():
    harness = an_engine(num_blocks=8, max_batch_tokens=64)
    harness.add(make_request("a", TEXT[:16], max_tokens=2))
    harness.add(make_request("big", TEXT[20:36], max_tokens=2))
    harness.add(make_request("small", TEXT[5:7], max_tokens=2))
    assert who(harness.step(), harness) == ["a"], "small would have fitted beside a"
    assert who(harness.step(), harness) == ["a"]
    assert who(harness.step(), harness) == ["big", "small"]
    harness.drain()


def test_a_lower_priority_number_goes_first():
    harness = an_engine(max_num_seqs=1)
    for id, priority in (("late", 1), ("usual", 0), ("urgent", -1)):
        harness.add(make_request(id, TEXT[:4], max_tokens=1, priority=priority))
    order = [who(harness.step(), harness)[0] for _ in range(3)]
    assert order == ["urgent", "usual", "late"]
    harness.drain()


def test_an_urgent_request_takes_the_slot_of_a_less_urgent_one():
    harness = an_engine(max_num_seqs=2)
    for id in ("a", "b"):
        harness.add(make_request(id, TEXT[:6], max_tokens=8))
    harness.step()
    harness.add(make_request("urgent", TEXT[20:26], max_tokens=2, priority=-1))
    plan = harness.step()
    assert who(plan, harness) == ["a", "urgent"]
    assert plan.released == (1,)
    harness.drain()
    record = harness.logs["b", 0].record
    assert record is not None
    assert record.preemptions == 1


def test_equal_priority_preempts_nobody_who_runs():
    harness = an_engine(max_num_seqs=1)
    harness.add(make_request("a", TEXT[:6], max_tokens=4))
    harness.step()
    harness.add(make_request("b", TEXT[:6], max_tokens=4))
    assert who(harness.step(), harness) == ["a"]
    harness.drain()


def test_nobody_gives_way_to_an_urgent_request_that_would_still_not_fit():
    harness = an_engine(num_blocks=11, max_batch_tokens=64, watermark=0.0)
    harness.add(make_request("urgent", TEXT[:24], max_tokens=9, priority=-1))
    harness.add(make_request("a", TEXT[30:34], max_tokens=9))
    harness.step()
    harness.add(make_request("urgent too", TEXT[5:29], max_tokens=9, priority=-1))
    assert len(harness.step().rows) == 2
    harness.drain()
    record = harness.logs["a", 0].record
    assert record is not None
    assert record.preemptions == 0


def test_a_waiting_request_whose_last_token_is_not_read_yet_claims_nothing():
    harness = an_engine(max_num_seqs=1)
    harness.add(make_request("a", TEXT[:6], max_tokens=5, priority=1))
    harness.add(make_request("b", TEXT[6:12], max_tokens=5, priority=2))
    harness.schedule()
    harness.add(make_request("urgent", TEXT[12:18], max_tokens=1))
    plan = harness.schedule()  # a's first token is sampled, but not committed
    assert who(plan, harness) == ["urgent"]
    harness.abort("urgent")
    harness.commit()
    harness.commit()
    assert who(harness.step(), harness) == ["a"]
    harness.drain()


def test_the_watermark_keeps_room_for_those_that_run():
    def admitted(watermark: float) -> int:
        harness = an_engine(num_blocks=11, watermark=watermark, max_batch_tokens=64)
        for i in range(3):
            harness.add(make_request(f"{i}", TEXT[10 * i : 10 * i + 10], max_tokens=9))
        return len(harness.step().rows)

    assert admitted(0.0) == 3
    assert admitted(0.3) == 2


def test_room_that_a_running_prompt_still_needs_is_not_given_away():
    harness = an_engine(num_blocks=10, max_batch_tokens=8, watermark=0.0)
    harness.add(make_request("a", TEXT[:24], max_tokens=2))
    harness.step()
    harness.add(make_request("b", TEXT[24:40], max_tokens=2))
    assert who(harness.step(), harness) == ["a"]
    harness.drain()


# -- giving way ----------------------------------------------------------------------------------


def test_the_last_that_came_gives_way_and_gives_the_same_tokens_later():
    harness = an_engine(num_blocks=8, watermark=0.0, max_batch_tokens=64)
    harness.add(make_request("a", TEXT[:10], max_tokens=12))
    harness.add(make_request("b", TEXT[20:30], max_tokens=12))
    harness.drain()
    first, second = (harness.logs[id, 0].record for id in "ab")
    assert first is not None
    assert second is not None
    assert (first.preemptions, second.preemptions) == (0, 1)
    assert second.lost_tokens > 0
    snapshot = harness.scheduler.snapshot()
    assert (snapshot.preemptions, snapshot.lost_tokens) == (1, second.lost_tokens)


def test_a_preempted_sequence_comes_back_with_what_it_said():
    harness = an_engine(num_blocks=8, watermark=0.0, max_batch_tokens=64)
    harness.add(make_request("a", TEXT[:10], max_tokens=12))
    harness.add(make_request("b", TEXT[20:30], max_tokens=12))
    admissions = []
    while harness.scheduler.has_unfinished:
        admissions += harness.step().admitted
    assert [a.request_id for a in admissions] == ["a", "b", "b"]
    assert (
        list(admissions[2].output_ids)
        == expected_output(harness.requests["b"], 0)[: len(admissions[2].output_ids)]
    )
    assert len(admissions[2].output_ids) > 1


@pytest.mark.parametrize("ahead", [False, True])
def test_a_sequence_that_cannot_take_blocks_from_anyone_waits_with_its_own(ahead):
    harness = an_engine(num_blocks=7, watermark=0.0, max_batch_tokens=64)
    harness.add(make_request("a", TEXT[:8], max_tokens=12))
    harness.add(make_request("b", TEXT[20:27], max_tokens=2, priority=-1))
    harness.drain(ahead=ahead)
    assert harness.scheduler.snapshot().preemptions == 0


def test_nobody_is_preempted_for_blocks_that_are_on_their_way_back():
    harness = an_engine(num_blocks=8, watermark=0.0, max_batch_tokens=64, checked=False)
    for id in "ab":
        harness.add(make_request(id, TEXT[:7] if id == "a" else TEXT[20:27], max_tokens=9))
    harness.step()
    harness.schedule()
    pool = harness.blocks.pools[0]
    under_way = pool.take(3, step=2)  # a plan copies from these; their owner is gone
    for block in under_way:
        pool.hold(block)
        pool.disown(block)
    assert harness.schedule().rows == ()
    harness.commit()
    for block in under_way:
        pool.release(block)
    harness.commit()
    harness.checked = True
    assert len(harness.step().rows) == 2
    assert harness.scheduler.snapshot().preemptions == 0
    harness.drain()


def test_a_step_that_could_do_nothing_gives_up_the_last_in_rank():
    harness = an_engine(num_blocks=8, watermark=0.0)
    harness.add(make_request("a", TEXT[:8], max_tokens=4))
    harness.step()
    # Somebody exports a prefix and has taken all other blocks meanwhile.
    keys = PrefixKeys(tuple(range(20)))
    assert harness.blocks.open(-1, keys, harness.blocks.match(keys, 0), 20)
    assert harness.step().rows == ()
    assert harness.step().released == (0,)
    assert harness.scheduler.snapshot().preemptions == 2, "it takes what there is, and is stuck"
    harness.blocks.free(-1)
    harness.drain()


def test_a_lone_sequence_that_needs_a_copy_in_a_full_pool_starts_over():
    # Two samples of a prompt that fills the pool: the second has to copy a published block.
    harness = an_engine(num_blocks=2, watermark=0.0)
    harness.add(make_request("a", TEXT[:4], max_tokens=1, n=2))
    harness.drain()


# -- planning ahead ------------------------------------------------------------------------------


def test_a_plan_made_ahead_names_the_token_that_was_not_read_yet():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:4], max_tokens=3, temperature=1.0, seed=5))
    first, second = harness.schedule(), harness.schedule()
    assert second.rows[0].tokens == (LAST_SAMPLED,)
    assert (first.rows[0].start, second.rows[0].start) == (0, 4)
    assert first.rows[0].uniforms == (uniform(5, 0, 0),)
    assert second.rows[0].uniforms == (uniform(5, 0, 1),)
    harness.commit()
    assert harness.schedule().rows[0].uniforms == (uniform(5, 0, 2),)
    harness.commit()
    harness.commit()
    harness.check_idle()


def test_at_most_one_plan_is_made_ahead():
    harness = an_engine()
    harness.schedule()
    harness.schedule()
    with pytest.raises(KvistError, match="two plans are uncommitted"):
        harness.scheduler.schedule()


def test_nothing_is_planned_beyond_the_last_token_that_may_come():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:4], max_tokens=1))
    harness.schedule()
    assert harness.schedule().rows == ()
    harness.commit()
    harness.commit()
    harness.check_idle()


def test_an_end_that_was_not_foreseen_discards_the_row_planned_ahead():
    request = make_request("a", TEXT[:4], max_tokens=9, eos=True)
    for first in range(200):
        request = make_request("a", [first, *TEXT[:3]], max_tokens=9, eos=True)
        if len(expected_output(request, 0)) == 2:
            break
    harness = an_engine()
    harness.add(request)
    harness.schedule()
    harness.schedule()
    harness.commit()
    assert len(harness.schedule().rows) == 1
    harness.commit()
    assert harness.logs["a", 0].reason == "stop"
    harness.commit()
    harness.check_idle()


def test_an_aborted_request_is_gone_at_once_planned_or_not():
    harness = an_engine(max_num_seqs=1)
    harness.add(make_request("a", TEXT[:4], max_tokens=9))
    harness.add(make_request("b", TEXT[:4], max_tokens=9))
    harness.schedule()
    harness.schedule()
    harness.abort("a")
    harness.abort("b")
    assert harness.logs["a", 0].reason == harness.logs["b", 0].reason == "abort"
    assert harness.scheduler.abort("a") == []
    assert harness.scheduler.finish("a", 0) == []
    harness.commit()
    harness.commit()
    assert harness.step().released == (0,)
    harness.check_idle()


def test_a_stop_string_ends_one_sample_and_not_the_others():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:6], max_tokens=6, n=2))
    harness.step()
    harness.step()
    harness.take(harness.scheduler.finish("a", 0, "stop string"))
    harness.step()
    assert harness.scheduler.has_work
    harness.abort("a")
    assert [harness.logs["a", sample].reason for sample in (0, 1)] == ["stop string", "abort"]
    assert not harness.scheduler.has_work
    assert harness.scheduler.finish("a", 1) == []


# -- several samples -----------------------------------------------------------------------------


def test_samples_share_the_prompts_blocks():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:11], max_tokens=4, n=3, temperature=1.0))
    first = harness.step()
    assert lengths(first) == [11]
    second = harness.step()
    assert lengths(second) == [1, 1, 1]
    assert [row.start for row in second.rows] == [11, 10, 10]
    assert len(second.groups[0].copies) == 3 - 1, "the first writes on, the others copy"
    counters = harness.scheduler.snapshot().counters
    assert counters.fork_tokens == 20
    harness.drain()
    record = harness.logs["a", 2].record
    assert record is not None
    assert (record.cached_fork, record.cached_tokens) == (10, 10)


def test_samples_differ_by_their_index_and_not_by_their_neighbours():
    harness = an_engine()
    request = make_request("a", TEXT[:6], max_tokens=8, n=3, temperature=1.0)
    harness.add(request)
    harness.drain()
    outputs = [harness.logs["a", sample].tokens for sample in range(3)]
    assert outputs == [expected_output(request, sample) for sample in range(3)]
    assert len({tuple(output) for output in outputs}) > 1


def test_samples_without_a_slot_find_the_prompt_in_the_prefix_cache():
    harness = an_engine(max_num_seqs=1)
    harness.add(make_request("a", TEXT[:11], max_tokens=2, n=2))
    harness.drain()
    record = harness.logs["a", 1].record
    assert record is not None
    assert (record.cached_fork, record.cached_device) == (0, 8)


def test_a_prompt_of_one_token_has_nothing_to_share():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:1], max_tokens=2, n=2))
    harness.drain()
    assert harness.scheduler.snapshot().counters.fork_tokens == 0


def test_if_the_first_sample_ends_before_the_prompt_is_computed_the_next_computes_it():
    harness = an_engine(max_batch_tokens=4)
    harness.add(make_request("a", TEXT[:11], max_tokens=2, n=3))
    harness.step()
    harness.take(harness.scheduler.finish("a", 0, "told"))
    harness.drain()
    assert [harness.logs["a", sample].reason for sample in range(3)] == ["told", "length", "length"]


def test_a_sample_shares_with_a_sibling_only_as_far_as_windows_reach_back():
    harness = Harness([CacheGroup(sliding(4), 40)], 2, max_num_seqs=2)
    harness.add(make_request("other", TEXT[20:30], max_tokens=5))
    harness.add(make_request("a", TEXT[:11], max_tokens=9, n=2))
    harness.drain()
    record = harness.logs["a", 1].record
    assert record is not None
    assert record.cached_fork == 0


# -- faults --------------------------------------------------------------------------------------


def test_a_faulty_row_fails_one_request_and_touches_no_other():
    harness = an_engine()
    harness.add(make_request("bad", TEXT[:6], max_tokens=4, n=2))
    harness.add(make_request("good", TEXT[:6], max_tokens=4))
    harness.step()
    harness.runner.faulty.add("bad")
    harness.drain()
    for sample in (0, 1):
        log = harness.logs["bad", sample]
        assert (log.reason, log.message) == ("error", "NaN logits")
    assert harness.logs["good", 0].reason == "length"


class FailsAtTwo:
    """A grammar with a defect."""

    def mask(self, output_ids: Sequence[int]) -> int:
        """Handles, until they end."""
        if len(output_ids) == 2:
            raise KeyError("state 7")
        return 3 + len(output_ids)


def test_a_failing_grammar_fails_one_request_with_its_own_words():
    harness = an_engine()
    harness.add(make_request("bad", TEXT[:6], max_tokens=4, grammar=FailsAtTwo()))
    harness.add(make_request("good", TEXT[:6], max_tokens=4))
    masks = [harness.step().rows[0].mask for _ in range(2)]
    assert masks == [3, 4]
    harness.drain()
    assert harness.logs["bad", 0].message == "the grammar failed: KeyError('state 7')"
    assert harness.logs["good", 0].reason == "length"


def test_a_sequence_with_a_grammar_waits_for_its_last_token():
    class Anything:
        def mask(self, output_ids: Sequence[int]) -> int:
            return 0

    harness = an_engine()
    harness.add(make_request("a", TEXT[:6], max_tokens=4, grammar=Anything()))
    harness.schedule()
    assert harness.schedule().rows == ()
    harness.commit()
    harness.commit()
    harness.drain(ahead=True)


@pytest.mark.parametrize(
    ("row", "said"),
    [
        (RowOutput((1, 2)), "returned 2 tokens for a row of at most 1"),
        (RowOutput(()), "returned 0 tokens"),
        (RowOutput((1,), (), ((0.0, ()),)), "returned 1 prompt log-probabilities"),  # type: ignore
    ],
)
def test_a_runner_that_returns_the_wrong_number_fails_the_request(row, said):
    harness = an_engine()
    harness.scheduler.add(make_request("a", TEXT[:3]))
    plan = harness.scheduler.schedule()
    (event,) = harness.scheduler.commit(plan, StepOutput(plan.step, (row,)))
    assert isinstance(event, FailedEvent)
    assert said in event.message


def test_outputs_are_committed_in_order_and_whole():
    harness = an_engine()
    harness.scheduler.add(make_request("a", TEXT[:3]))
    plan = harness.scheduler.schedule()
    with pytest.raises(KvistError, match="with 0 rows does not belong to plan 1 with 1"):
        harness.scheduler.commit(plan, StepOutput(1))
    ahead = harness.scheduler.schedule()
    with pytest.raises(KvistError, match="plan 2 is not the oldest"):
        harness.scheduler.commit(ahead, StepOutput(2, (RowOutput((1,)),)))
    harness.scheduler.commit(plan, StepOutput(1, (RowOutput((1,)),)))


# -- sampling ------------------------------------------------------------------------------------


def test_ending_tokens_are_banned_until_min_tokens():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:3], max_tokens=4, min_tokens=2, eos=True))
    bans = [row.ban_ending for _ in range(3) for row in harness.step().rows]
    assert bans[:2] == [1, 1]
    assert bans[2:] in ([0], [])
    harness.drain()
    assert len(harness.logs["a", 0].tokens) >= 2


def test_greedy_rows_carry_no_draws():
    harness = an_engine()
    harness.add(make_request("a", TEXT[:3]))
    assert harness.step().rows[0].uniforms == ()
    harness.drain()


def test_prompt_log_probabilities_cover_each_prompt_token_once_and_skip_the_cache():
    harness = an_engine(max_batch_tokens=6)
    harness.add(make_request("warm", TEXT[:12], max_tokens=1))
    harness.drain()
    harness.add(make_request("a", TEXT[:12], max_tokens=2, prompt_logprobs=0, n=2))
    plan = harness.step()
    assert plan.rows[0].prompt_targets == tuple(TEXT[1:7])
    harness.drain()
    assert harness.prompt_reports["a"] == TEXT[1:12]
    record = harness.logs["a", 0].record
    assert record is not None
    assert [miss.kind for miss in record.misses] == ["bypassed", "tail"]


def test_prompt_log_probabilities_go_on_after_a_preemption():
    harness = an_engine(num_blocks=9, max_batch_tokens=5, watermark=0.0)
    harness.add(make_request("first", TEXT[:9], max_tokens=14, priority=-1))
    for _ in range(2):
        harness.step()
    harness.add(make_request("a", TEXT[20:36], max_tokens=2, prompt_logprobs=0))
    harness.drain()
    assert harness.prompt_reports["a"] == TEXT[21:36]


# -- speculation ---------------------------------------------------------------------------------


def an_oracle(wrong_from: int = 99):
    """A drafter that knows the answer, up to a position."""

    def draft(prompt: Sequence[int], output: Sequence[int], limit: int) -> Sequence[int]:
        request = make_request("a", prompt, max_tokens=12)
        truth = expected_output(request, 0)
        right = truth[len(output) : wrong_from]
        return ([*right, *[99] * limit])[:limit]

    return draft


def test_confirmed_guesses_come_several_at_once():
    harness = an_engine(drafter=an_oracle(), max_drafts=3)
    harness.add(make_request("a", TEXT[:5], max_tokens=12))
    assert harness.drain() == 1 + 3, "a prompt, then 4 + 4 + 3 tokens"


def test_guesses_that_are_not_confirmed_cost_nothing_but_their_places():
    harness = an_engine(drafter=an_oracle(wrong_from=0), max_drafts=3)
    harness.add(make_request("a", TEXT[:5], max_tokens=12))
    harness.step()
    plan = harness.step()
    assert (plan.rows[0].num_drafts, lengths(plan)) == (3, [4])
    assert harness.scheduler.snapshot().running[0].computed_tokens == 6
    harness.drain()


def test_guesses_never_exceed_budget_limit_or_room():
    harness = an_engine(drafter=an_oracle(), max_drafts=8, max_batch_tokens=6)
    harness.add(make_request("a", TEXT[:5], max_tokens=12))
    plans = [harness.step() for _ in range(4)]
    assert [plan.num_tokens for plan in plans] == [5, 6, 5, 0]
    tight = an_engine(num_blocks=5, drafter=an_oracle(), max_drafts=8)
    tight.add(make_request("a", TEXT[:5], max_tokens=12))
    tight.drain()


def test_guesses_that_the_pool_has_no_room_for_are_left_out():
    harness = an_engine(num_blocks=5, drafter=an_oracle(), max_drafts=8, watermark=0.0)
    harness.add(make_request("a", TEXT[:7], max_tokens=10))
    harness.add(make_request("b", TEXT[20:27], max_tokens=2, priority=1))
    harness.step()
    plan = harness.step()
    assert [row.num_drafts for row in plan.rows] == [0, 0]
    harness.drain()


def test_a_stop_inside_confirmed_guesses_ends_the_sequence_there():
    def draft(prompt: Sequence[int], output: Sequence[int], limit: int) -> Sequence[int]:
        request = make_request("a", prompt, max_tokens=12)
        return expected_output(request, 0)[len(output) :][:limit]

    for first in range(400):
        request: Request = make_request("a", [first, 1, 2], max_tokens=12, eos=True)
        if len(expected_output(request, 0)) == 3:
            break
    harness = an_engine(drafter=draft, max_drafts=6)
    harness.add(request)
    assert harness.drain() == 2
    assert harness.logs["a", 0].reason == "stop"
    assert len(harness.logs["a", 0].tokens) == 3


def test_with_a_drafter_a_sequence_waits_for_its_last_token():
    harness = an_engine(drafter=an_oracle(), max_drafts=3)
    harness.add(make_request("a", TEXT[:5], max_tokens=12))
    harness.schedule()
    assert harness.schedule().rows == ()
    harness.commit()
    harness.commit()
    harness.drain(ahead=True)


# -- events --------------------------------------------------------------------------------------


def test_tokens_come_as_events_with_their_log_probabilities():
    harness = an_engine()
    harness.scheduler.add(make_request("a", TEXT[:3], max_tokens=1))
    plan = harness.scheduler.schedule()
    output = StepOutput(plan.step, (RowOutput((5,), ((-0.5, ()),)),))  # type: ignore[arg-type]
    events = harness.scheduler.commit(plan, output)
    assert events[0] == TokensEvent("a", 0, (5,), ((-0.5, ()),))  # type: ignore[arg-type]
    assert [type(event).__name__ for event in events] == ["TokensEvent", "FinishedEvent"]
