"""`AsyncLLM`: requests that come and go on one engine, and nobody who waits for ever.

Every test runs under a time limit, so that what hangs fails.
"""

import asyncio
import os
import subprocess
import sys
import threading
from collections.abc import Coroutine
from contextlib import aclosing
from pathlib import Path
from typing import Any

import pytest
from mixes import LENGTH, assert_idle, null_bytes, poison, sequence_bytes
from test_llm import MARK, PROMPTS, STEM, FailingStep, PoisonedStep, tokens

import kvist
from kvist import AsyncLLM, Delta, Result, SamplingParams
from kvist.errors import ContextTooLong, EngineDead, RequestError
from kvist.loading.model import Model
from tiny_models import tiny

LIMIT = 60
GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
LONG = SamplingParams(temperature=0, max_tokens=46, ignore_eos=True)


def serving(model: Model | None = None, *, room: float = 4.0, **options: Any) -> AsyncLLM:
    """An engine with room for so many sequences of full length, NaN in all its blocks."""
    model = model or tiny()
    sizes = {"block_size": 4, "max_batch_tokens": 16, "max_num_seqs": 4} | options
    memory = null_bytes(model, **sizes) + int(room * sequence_bytes(model, **sizes))
    llm = AsyncLLM(model, **(sizes | {"max_model_len": LENGTH, "cache_memory": memory}))
    poison(llm._engine)
    return llm


def within_limit(work: Coroutine[Any, Any, Any]) -> Any:
    """Run it, and raise TimeoutError if it hangs."""
    return asyncio.run(asyncio.wait_for(work, LIMIT))


async def everything(llm: AsyncLLM, prompt: Any, *rest: Any, **options: Any) -> list[Delta]:
    return [delta async for delta in llm.submit(prompt, *rest, **options)]


async def result_of(llm: AsyncLLM, prompt: Any, *rest: Any, **options: Any) -> Result:
    deltas = await everything(llm, prompt, *rest, **options)
    assert deltas[-1].result is not None
    return deltas[-1].result


@pytest.mark.parametrize("overlap", [False, True])
def test_concurrent_streams_say_what_they_say_alone(overlap: bool) -> None:
    params = [
        SamplingParams(temperature=0.9, seed=i, max_tokens=4 + 3 * i, ignore_eos=True)
        for i in range(len(PROMPTS))
    ]

    async def work() -> list[Result]:
        async with serving(overlap=overlap, room=1.5) as llm:
            asked = zip(PROMPTS, params, strict=True)
            return await asyncio.gather(*(result_of(llm, *one) for one in asked))

    expected = kvist.generate(tiny(), PROMPTS, params)
    assert tokens(within_limit(work())) == tokens(expected)


def test_deltas_join_to_the_whole(model: Model) -> None:
    params = SamplingParams(temperature=0.9, seed=2, max_tokens=25, n=3, logprobs=1)

    async def work() -> list[Delta]:
        async with serving(model) as llm:
            return await everything(llm, "once upon a", params)

    expected = kvist.generate(model, ["once upon a"], params)
    deltas = within_limit(work())
    for sample, wanted in enumerate(expected):
        own = [delta for delta in deltas if delta.sample_index == sample]
        assert "".join(delta.text for delta in own) == wanted.text
        assert sum((delta.token_ids for delta in own), ()) == wanted.token_ids
        assert len(sum((delta.logprobs for delta in own), ())) == len(wanted.token_ids)
        assert [delta.result is None for delta in own] == [True] * (len(own) - 1) + [False]


@pytest.mark.parametrize("overlap", [False, True])
def test_the_first_delta_of_each_sample_knows_the_whole_prompt(overlap: bool) -> None:
    params = SamplingParams(seed=2, max_tokens=5, n=2, prompt_logprobs=1, ignore_eos=True)
    prompts = [[*STEM, *STEM, 3], [5]]  # three chunks, and nothing to know but that it is the first

    async def work() -> list[list[Delta]]:
        async with serving(overlap=overlap) as llm:
            return await asyncio.gather(*(everything(llm, prompt, params) for prompt in prompts))

    for prompt, deltas in zip(prompts, within_limit(work()), strict=True):
        for sample in range(2):
            first, *rest = (delta for delta in deltas if delta.sample_index == sample)
            assert rest[-1].result is not None
            assert first.prompt_logprobs == rest[-1].result.prompt_logprobs
            assert [one and one.token_id for one in first.prompt_logprobs or ()] == [
                None,
                *prompt[1:],
            ]
            assert all(delta.prompt_logprobs is None for delta in rest)


def test_samples_that_end_in_one_step_all_say_so() -> None:
    params = SamplingParams(temperature=1, seed=1, n=4, max_tokens=5, ignore_eos=True)

    async def work() -> list[Delta]:
        async with serving() as llm:
            return await everything(llm, STEM, params)

    results = [delta.result for delta in within_limit(work()) if delta.result is not None]
    assert sorted(r.sample_index for r in results) == [0, 1, 2, 3]
    assert [len(r.token_ids) for r in results] == [5] * 4


def test_leaving_the_iterator_frees_the_blocks_within_a_step() -> None:
    async def work() -> None:
        async with serving() as llm:
            step, gate = llm._engine.runner.step, threading.Semaphore(0)
            calls = 0

            def gated(batch: Any, cache: Any) -> Any:
                nonlocal calls
                assert gate.acquire(timeout=LIMIT)
                calls += 1
                return step(batch, cache)

            llm._engine.runner.step = gated
            async with aclosing(llm.submit(STEM, LONG)) as stream:
                gate.release()
                await anext(stream)
            gate.release()  # for the step that may have begun before the iterator was left
            after = await llm.snapshot()
            assert calls <= 2
            assert not after.running
            assert not any(any(group.owners) for group in after.groups)
            gate.release(LENGTH)
            assert (await result_of(llm, [5], GREEDY)).finish_reason == "length"

    within_limit(work())


def test_a_cancelled_task_leaves_nothing_behind() -> None:
    async def work() -> None:
        async with serving() as llm:
            task = asyncio.create_task(result_of(llm, STEM, LONG))
            while not (await llm.snapshot()).running:
                await asyncio.sleep(0)
            task.cancel()
            with pytest.raises(asyncio.CancelledError):
                await task
            after = await llm.snapshot()
            assert not after.running
            assert not after.waiting
        assert_idle(llm._engine)
        assert not llm._desk.jobs
        assert not llm._streams

    within_limit(work())


@pytest.mark.parametrize("n", [1, 3])
def test_an_aborted_request_ends_with_what_it_has(n: int) -> None:
    params = SamplingParams(temperature=1, seed=1, n=n, max_tokens=40, ignore_eos=True)

    async def work() -> list[Delta]:
        found = []
        async with serving() as llm:
            async for delta in llm.submit(STEM, params, request_id="mine"):
                found.append(delta)
                if len(found) == 4:
                    llm.abort("mine")
                    llm.abort("mine")
                    llm.abort("nobody's")
        return found

    deltas = within_limit(work())
    results = [delta.result for delta in deltas if delta.result is not None]
    assert [r.finish_reason for r in results] == ["abort"] * n
    expected = kvist.generate(tiny(), [STEM], params)
    for result in results:
        whole = expected[result.sample_index].token_ids
        assert result.token_ids == whole[: len(result.token_ids)]
        assert len(result.token_ids) < 40


def test_one_failing_request_touches_no_other() -> None:
    async def work() -> list[Result]:
        async with serving() as llm:
            llm._engine.runner.step = PoisonedStep(tiny(), 2)
            prompts = [*PROMPTS[:2], [3, MARK], *PROMPTS[2:]]
            return await asyncio.gather(*(result_of(llm, p, GREEDY) for p in prompts))

    results = within_limit(work())
    bad = results.pop(2)
    assert (bad.finish_reason, len(bad.token_ids)) == ("error", 2)
    assert tokens(results) == tokens(kvist.generate(tiny(), PROMPTS, GREEDY))


def test_what_can_never_fit_is_refused_and_the_others_go_on() -> None:
    async def work() -> None:
        async with serving(room=0.5) as llm:
            others = [asyncio.create_task(result_of(llm, p, GREEDY)) for p in ([5], [6, 7])]
            with pytest.raises(ContextTooLong, match=r"need 16 blocks of 4, but the cache has 8"):
                await result_of(llm, STEM, LONG)
            with pytest.raises(RequestError, match="empty"):
                await result_of(llm, [], GREEDY)
            found = tokens([await task for task in others])
            assert found == tokens(kvist.generate(tiny(), [[5], [6, 7]], GREEDY))

    within_limit(work())


def test_a_name_in_use_is_refused_and_its_owner_goes_on() -> None:
    async def work() -> None:
        async with serving() as llm:
            owner = asyncio.create_task(result_of(llm, STEM, LONG, request_id="a"))
            while not (await llm.snapshot()).running:
                await asyncio.sleep(0)
            with pytest.raises(RequestError, match="request a is already running"):
                await result_of(llm, [5], GREEDY, request_id="a")
            # One that is cancelled before it was refused must not end the owner either.
            hasty = asyncio.create_task(result_of(llm, [5], GREEDY, request_id="a"))
            await asyncio.sleep(0)
            hasty.cancel()
            assert (await owner).finish_reason == "length"
            assert (await result_of(llm, [5], GREEDY, request_id="a")).finish_reason == "length"

    within_limit(work())


def test_snapshots_can_be_taken_while_it_runs() -> None:
    async def work() -> None:
        async with serving() as llm:
            tasks = [asyncio.create_task(result_of(llm, p, GREEDY)) for p in PROMPTS]
            steps, busy = [], 0
            while not all(task.done() for task in tasks):
                snapshot = await llm.snapshot()
                steps.append(snapshot.step)
                busy += bool(snapshot.running)
            assert steps == sorted(steps)
            assert busy
            idle = await llm.snapshot()
            assert not idle.running
            assert idle.counters.queried_tokens == sum(map(len, PROMPTS))

    within_limit(work())


def test_a_question_that_fails_fails_alone() -> None:
    async def work() -> None:
        async with serving() as llm:
            with pytest.raises(ZeroDivisionError):
                await llm._ask(lambda: 1 / 0)
            assert (await result_of(llm, [5], GREEDY)).finish_reason == "length"

    within_limit(work())


def test_steps_bring_the_news_of_all_samples_at_once() -> None:
    params = SamplingParams(temperature=1, seed=1, n=3, max_tokens=6, ignore_eos=True)

    async def work() -> list[list[Delta]]:
        async with serving() as llm:
            return [deltas async for deltas in llm.steps(STEM, params)]

    steps = within_limit(work())
    assert max(len(step) for step in steps) == 3
    assert sum(len(d.token_ids) for step in steps for d in step) == 18


def test_two_event_loops_share_one_engine() -> None:
    llm = serving()
    found: dict[int, list[tuple[int, ...]]] = {}

    async def ask() -> list[Result]:
        return await asyncio.gather(*(result_of(llm, p, GREEDY) for p in PROMPTS))

    def loop(which: int) -> None:
        found[which] = tokens(within_limit(ask()))

    threads = [threading.Thread(target=loop, args=(i,)) for i in range(2)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join(LIMIT)
    llm.close()
    expected = tokens(kvist.generate(tiny(), PROMPTS, GREEDY))
    assert found == {0: expected, 1: expected}


def test_a_loop_that_has_gone_is_served_no_longer() -> None:
    llm = serving()
    loop = asyncio.new_event_loop()
    stream = llm.submit(STEM, LONG)
    loop.run_until_complete(stream.__anext__())
    loop.close()

    async def wait() -> None:
        while (await llm.snapshot()).running:
            await asyncio.sleep(0.01)
        assert not llm._streams

    within_limit(wait())
    llm.close()
    assert_idle(llm._engine)


# The end.


@pytest.mark.parametrize("calls", [0, 5])
def test_a_dead_engine_says_so_to_everyone(calls: int) -> None:
    async def work() -> None:
        llm = serving()
        llm._engine.runner.step = FailingStep(tiny(), calls, RuntimeError("the device is gone"))
        tasks = [asyncio.create_task(result_of(llm, p, LONG)) for p in PROMPTS[:3]]
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, EngineDead)
            assert "RuntimeError: the device is gone" in str(ended)
            assert isinstance(ended.__cause__, RuntimeError)
        assert not llm.alive
        with pytest.raises(EngineDead, match="the device is gone"):
            await result_of(llm, [5], GREEDY)
        with pytest.raises(EngineDead, match="the device is gone"):
            await llm.snapshot()
        llm.abort("r0")
        llm.close()
        llm.close()

    within_limit(work())


def test_what_was_asked_of_a_dying_engine_is_answered_too() -> None:
    # The step waits until more has been asked, then dies: all of that is still in the inbox.
    async def work() -> None:
        llm = serving()
        asked = threading.Event()

        def dying(batch: Any, cache: Any) -> Any:
            asked.wait(LIMIT)
            raise RuntimeError("too late")

        llm._engine.runner.step = dying
        first = asyncio.create_task(result_of(llm, STEM, GREEDY))
        while llm._inbox.empty() and not llm._streams:
            await asyncio.sleep(0)
        await asyncio.sleep(0.05)
        late = [asyncio.create_task(result_of(llm, [5], GREEDY)) for _ in range(3)]
        look = asyncio.create_task(llm.snapshot())
        await asyncio.sleep(0.05)
        asked.set()
        for task in (first, look, *late):
            with pytest.raises(EngineDead, match="too late"):
                await task

    within_limit(work())


def test_a_defect_in_taking_a_request_in_reaches_who_asked(monkeypatch: Any) -> None:
    async def work() -> None:
        llm = serving()

        def add(request: Any) -> None:
            raise ZeroDivisionError("a defect")

        monkeypatch.setattr(llm._engine, "add", add)
        with pytest.raises(EngineDead, match="a defect"):
            await result_of(llm, STEM, GREEDY)
        assert not llm.alive

    within_limit(work())


def test_closing_ends_who_waits_and_may_be_done_twice() -> None:
    async def work() -> None:
        llm = serving()
        tasks = [asyncio.create_task(result_of(llm, p, LONG)) for p in PROMPTS]
        while not (await llm.snapshot()).running:
            await asyncio.sleep(0)
        await asyncio.to_thread(llm.close)
        for ended in await asyncio.gather(*tasks, return_exceptions=True):
            assert isinstance(ended, EngineDead)
        llm.close()
        assert not llm.alive
        with pytest.raises(EngineDead, match="make a new one"):
            await result_of(llm, [5], GREEDY)

    within_limit(work())


LEFT_OPEN = """
import asyncio
import kvist
from tiny_models import tiny

llm = kvist.AsyncLLM(tiny(), cache_memory=1 << 20)

async def begin():
    params = kvist.SamplingParams(max_tokens=200, ignore_eos=True)
    async for _ in llm.submit([1, 2, 3], params):
        break
    rest = asyncio.create_task(anext(llm.submit([1, 2, 3], params)))
    await asyncio.sleep(0.01)

asyncio.run(begin())
print("done")
"""


def test_a_program_that_forgets_to_close_ends_all_the_same() -> None:
    path = os.pathsep.join([str(Path(__file__).parents[1]), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-c", LEFT_OPEN],
        env={**os.environ, "PYTHONPATH": path},
        capture_output=True,
        text=True,
        timeout=LIMIT,
        check=False,
    )
    assert (done.returncode, done.stdout, done.stderr) == (0, "done\n", "")


def test_asking_while_it_closes_is_answered_one_way_or_the_other() -> None:
    async def work(llm: AsyncLLM) -> list[Any]:
        asked = [asyncio.create_task(result_of(llm, [i], GREEDY)) for i in range(6)]
        looks = [asyncio.create_task(llm.snapshot()) for _ in range(6)]
        closing = asyncio.create_task(asyncio.to_thread(llm.close))
        more = [asyncio.create_task(result_of(llm, [i], GREEDY)) for i in range(6)]
        ends = await asyncio.gather(*asked, *looks, *more, return_exceptions=True)
        await closing
        return ends

    for _ in range(5):
        for end in within_limit(work(serving())):
            assert isinstance(end, Result | EngineDead) or hasattr(end, "running")
