"""The stream behind the page: true to the engine, shared by all pages, and no load without one."""

import asyncio
from collections.abc import AsyncGenerator, Coroutine
from contextlib import aclosing
from typing import Any

import pytest
from picture import Picture

from kvist import AsyncLLM, SamplingParams
from kvist.core.record import GroupSnapshot, Snapshot
from kvist.loading.model import Model
from kvist.server.live import BACKLOG, LiveCache, _changes, _host_map, _pool_map
from tiny_models import tiny

LIMIT = 60
TICK = 0.005
PROMPT = list(range(3, 25))
SHORT = SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


def serving(model: Model | None = None, **options: Any) -> AsyncLLM:
    sizes = {"block_size": 4, "max_batch_tokens": 8, "max_num_seqs": 4, "max_model_len": 64}
    return AsyncLLM(model or tiny(), **(sizes | {"cache_memory": 1 << 18} | options))


def within_limit(work: Coroutine[Any, Any, Any]) -> Any:
    return asyncio.run(asyncio.wait_for(work, LIMIT))


async def ask(llm: AsyncLLM, prompt: Any = PROMPT, params: SamplingParams = SHORT) -> None:
    async for _ in llm.submit(prompt, params):
        pass


async def watch(frames: AsyncGenerator[bytes, None], picture: Picture, until: Any) -> None:
    """Take frames in until the picture is as wanted."""
    while not until(picture):
        picture.take(await anext(frames))


def states(group: GroupSnapshot) -> str:
    pairs = zip(group.owners, group.cached, strict=True)
    return "".join(str(2 * min(owners, 2) + cached) for owners, cached in pairs)


def ended(number: int) -> Any:
    return lambda picture: sum(mark[4] == "ended" for mark in picture.marks) == number


def same(picture: Picture, snapshot: Snapshot) -> bool:
    maps = [["".join(states(g)), "".join("01"[c] for c in g.host_cached)] for g in snapshot.groups]
    return picture.maps == maps


def test_what_changes_adds_up_to_what_the_engine_says() -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=TICK)
            picture = Picture()
            async with aclosing(live.frames()) as frames:
                await watch(frames, picture, lambda p: p.kinds)
                await asyncio.gather(*(ask(llm, PROMPT[:9] + [i] * 9) for i in range(5)))
                snapshot = await llm.snapshot()
                await watch(frames, picture, lambda p: same(p, snapshot))
                await watch(frames, picture, lambda p: p.tree)
            assert picture.kinds[0] == "whole"
            assert set(picture.kinds[1:]) == {"delta"}
            assert picture.values["output"] == snapshot.output_tokens == 30
            assert picture.values["queried"] == snapshot.counters.queried_tokens
            assert picture.rows == {"running": [], "waiting": []}
            assert [len(branch["blocks"]) for branch in picture.tree if not branch["from"]] == [2]

    within_limit(work())


def test_a_page_that_comes_later_is_told_everything() -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=TICK)
            first, second = Picture(), Picture()
            async with aclosing(live.frames()) as frames:
                await watch(frames, first, lambda p: p.kinds)
                await ask(llm)
                await watch(frames, first, lambda p: ended(1)(p) and p.tree)
                async with aclosing(live.frames()) as later:
                    await watch(later, second, lambda p: p.kinds)
            assert second.kinds == ["whole"]
            assert (second.maps, second.marks, second.tree) == (
                first.maps,
                first.marks,
                first.tree,
            )

    within_limit(work())


def test_many_pages_share_one_look_a_tick_and_nobody_means_none() -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=0.05)
            assert live.looks == 0
            everybody = [live.frames() for _ in range(20)]
            for frames in everybody:
                await anext(frames)
            looks = live.looks
            await asyncio.sleep(0.3)
            assert looks <= 2
            assert live.looks - looks <= 7
            for frames in everybody:
                await frames.aclose()
            rest = live.looks
            await asyncio.sleep(0.2)
            assert live.looks == rest
            async with aclosing(live.frames()) as again:
                assert (await anext(again)).startswith(b"event: whole"), "it goes on"

    within_limit(work())


def test_an_engine_at_rest_sends_nothing() -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=TICK)
            async with aclosing(live.frames()) as frames:
                await anext(frames)
                with pytest.raises(TimeoutError):
                    await asyncio.wait_for(anext(frames), 0.2)

    within_limit(work())


def test_a_page_that_is_too_slow_starts_anew() -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=0)
            async with aclosing(live.frames()) as slow, aclosing(live.frames()) as quick:
                await anext(slow)
                seen, picture = Picture(), Picture()
                while len(seen.kinds) < 3 * BACKLOG:
                    await asyncio.gather(ask(llm), anext(quick))
                    seen.kinds.append("")
                snapshot = await llm.snapshot()
                await watch(slow, picture, lambda p: same(p, snapshot))
            assert picture.kinds[0] == "whole"
            assert len(picture.kinds) <= BACKLOG + 2

    within_limit(work())


def test_looking_takes_a_small_part_of_the_time_however_large_the_cache_is() -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=0)
            look = llm.look

            async def dear(*arguments: Any) -> Any:
                from dataclasses import replace

                return replace(await look(*arguments), seconds=0.01)

            llm.look = dear  # type: ignore[method-assign]
            async with aclosing(live.frames()) as frames:
                await anext(frames)
                await asyncio.sleep(0.8)
                assert live.looks <= 3

    within_limit(work())


def test_pages_are_sent_away_when_the_server_wants_to_go() -> None:
    async def work() -> None:
        async with serving() as llm:
            going = asyncio.Event()
            live = LiveCache(llm, interval=TICK, ended=going.is_set)
            frames = [live.frames() for _ in range(2)]
            for one in frames:
                await anext(one)
            going.set()
            for one in frames:
                assert [frame async for frame in one] == []
            async with aclosing(live.frames()) as late:
                assert [frame async for frame in late] == []

    within_limit(work())


def test_a_defect_of_the_picture_hangs_no_page(caplog: pytest.LogCaptureFixture) -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=TICK)
            async with aclosing(live.frames()) as frames:
                await anext(frames)
                live._maps = [(b"", b"")] * 3
                await ask(llm)
                assert not [frame async for frame in frames if b"whole" in frame]

    within_limit(work())
    assert "the live picture broke off" in caplog.text


def test_pages_are_sent_away_when_the_engine_has_ended() -> None:
    async def work() -> None:
        llm = serving()
        live = LiveCache(llm, interval=TICK)
        async with aclosing(live.frames()) as frames:
            await anext(frames)
            await asyncio.to_thread(llm.close)
            assert [frame async for frame in frames] == []

    within_limit(work())


def test_an_engine_that_broke_down_and_began_anew_is_shown_anew() -> None:
    async def work() -> None:
        async with serving() as llm:
            live = LiveCache(llm, interval=TICK)
            picture = Picture()
            async with aclosing(live.frames()) as frames:
                await watch(frames, picture, lambda p: p.kinds)
                await ask(llm)
                await watch(frames, picture, ended(1))
                await llm._ask(llm._engine._open_books)
                await watch(frames, picture, lambda p: p.kinds.count("whole") == 2)
                assert picture.marks == []
                assert set(picture.maps[0][0]) == {"0"}

    within_limit(work())


def test_branches_say_their_text_unless_told_not_to(model: Model) -> None:
    async def work(show_text: bool) -> list[str]:
        async with serving(model) as llm:
            live = LiveCache(llm, show_text=show_text, interval=TICK)
            await ask(llm, "once upon a time there was a twig")
            picture = Picture()
            async with aclosing(live.frames()) as frames:
                await watch(frames, picture, lambda p: p.tree)
            assert picture.whole["text"] is show_text
            return [branch["text"] for branch in picture.tree]

    [text] = within_limit(work(True))
    assert "once upon a time there was a twig".startswith(text.strip()[:8])
    assert within_limit(work(False)) == [""]


def test_the_host_tier_has_a_map_of_its_own() -> None:
    async def work() -> None:
        async with serving(cache_memory=1 << 15, host_cache=1 << 16) as llm:
            live = LiveCache(llm, interval=TICK)
            picture = Picture()
            async with aclosing(live.frames()) as frames:
                for i in range(6):
                    await ask(llm, [i + 3] * 24)
                snapshot = await llm.snapshot()
                await watch(frames, picture, lambda p: same(p, snapshot))
            assert "1" in picture.maps[0][1]

    within_limit(work())


@pytest.mark.parametrize(
    ("old", "new", "runs"),
    [
        (b"", b"", []),
        (b"000", b"000", []),
        (b"000", b"123", [(0, "123")]),
        (b"0000", b"0120", [(1, "12")]),
        (b"000000", b"100011", [(0, "1"), (4, "11")]),
        (b"0" * 300, b"0" * 255 + b"11" + b"0" * 43, [(255, "11")]),
        (b"0" * 600, b"0" * 599 + b"5", [(599, "5")]),
    ],
)
def test_changes_are_runs(old: bytes, new: bytes, runs: list[tuple[int, str]]) -> None:
    assert list(_changes(old, new)) == runs


def test_a_block_of_many_owners_is_shared_like_any_other() -> None:
    owners = (0, 0, 1, 1, 2, 2, 300, 300)
    cached = (False, True) * 4
    group = GroupSnapshot(None, 0, 8, 0, owners, cached, 0, 2, 1, (False, True))
    assert _pool_map(group) == b"01234545"
    assert _host_map(group) == b"01"
