"""`LLM`: many prompts in one call, each with its own parameters, end, failure and record."""

from dataclasses import asdict
from typing import Any

import pytest
import torch
from mixes import LENGTH, assert_idle, null_bytes, poison, sequence_bytes
from torch import Tensor

import kvist
from kvist import LLM, SamplingParams, SlidingWindow
from kvist.cache import Batch, KVCache
from kvist.errors import ConfigError, ContextTooLong, NotSupported, RequestError
from kvist.loading.model import Model
from kvist.runner.runner import PagedRunner
from kvist.runner.step import model_step
from tiny_models import CountingStep, reference, tiny

GREEDY = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
STEM = [7, 3, 11, 5, 2, 19, 23, 4, 9, 1, 30, 17, 8, 8, 6, 40]
PROMPTS = [[*STEM, 12], [5], [*STEM, 13, 14], [2, 3] * 9, STEM[:9]]
MARK = 59


def small(model: Model | None = None, *, room: float = 4.0, **options: Any) -> LLM:
    """An engine with room for so many sequences of full length, NaN in all its blocks."""
    model = model or tiny()
    sizes = {"block_size": 4, "max_batch_tokens": 16, "max_num_seqs": 4} | options
    options = sizes | {
        "max_model_len": LENGTH,
        "cache_memory": null_bytes(model, **sizes) + int(room * sequence_bytes(model, **sizes)),
    }
    llm = LLM(model, **options)
    poison(llm.engine)
    return llm


def tokens(results: list[kvist.Result]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


class FailingStep:
    """The model's own step, until it is called once too often."""

    def __init__(self, model: Model, calls: int, error: BaseException) -> None:
        self.step, self.left, self.error = model_step(model.lm), calls, error

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        if not self.left:
            raise self.error
        self.left -= 1
        return self.step(batch, cache)


class PoisonedStep:
    """The model's own step, but a sequence with the token MARK has NaN for logits soon after."""

    def __init__(self, model: Model, after: int) -> None:
        self.step, self.after = model_step(model.lm), after
        self.seen: dict[int, int] = {}  # slot -> steps since MARK

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        logits = self.step(batch, cache).clone()
        owners = batch.sequence_index[batch.logit_rows].tolist()
        for i, (start, stop) in enumerate(batch.query_spans):
            slot = batch.slots[i]
            if batch.cached_lens[i] == 0:
                self.seen.pop(slot, None)
            if MARK in batch.token_ids[start:stop].tolist():
                self.seen.setdefault(slot, 0)
            if slot in self.seen:
                if self.seen[slot] >= self.after:
                    logits[[row for row, owner in enumerate(owners) if owner == i]] = torch.nan
                self.seen[slot] += 1
        return logits


# What comes out.


@pytest.mark.parametrize("overlap", [False, True])
def test_results_come_in_the_order_of_the_prompts(overlap: bool) -> None:
    params = [
        SamplingParams(temperature=0, max_tokens=n, n=k, ignore_eos=True)
        for n, k in ((9, 1), (1, 3), (5, 2), (12, 1), (2, 1))
    ]
    llm = small(overlap=overlap, max_num_seqs=3)
    expected = kvist.generate(tiny(), PROMPTS, params)
    results = llm.generate(PROMPTS, params)
    assert [(r.prompt_index, r.sample_index) for r in results] == [
        (r.prompt_index, r.sample_index) for r in expected
    ]
    assert tokens(results) == tokens(expected)
    assert [r.finish_reason for r in results] == ["length"] * 8
    assert_idle(llm.engine)


def test_the_longest_outputs_are_begun_first() -> None:
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in (2, 9, 4)]
    results = small(max_num_seqs=1).generate(PROMPTS[:3], params)
    waited = [result.record.queue_time for result in results]
    assert sorted(range(3), key=waited.__getitem__) == [1, 2, 0]


@pytest.mark.parametrize("name", ["dense_tied", "dense_swa", "dense_untied_headdim"])
def test_greedy_tokens_are_those_of_transformers(name: str) -> None:
    known = reference(name)
    llm = LLM(known.model, max_batch_tokens=32, cache_memory=4 << 20, max_num_seqs=3)
    params = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)
    assert tokens(llm.generate(known.prompts, params)) == known.greedy
    assert tokens(llm.generate(known.prompts, params)) == known.greedy


def test_text_in_text_out(model: Model) -> None:
    params = SamplingParams(temperature=0.8, seed=5, max_tokens=20, logprobs=1)
    prompts = ["the cat", "once upon a time", "the cat"]
    expected = kvist.generate(model, prompts, params)
    llm = LLM(model, cache_memory=1 << 20)
    results = llm.generate(prompts, params)
    assert [r.text for r in results] == [r.text for r in expected]
    assert [len(r.logprobs or ()) for r in results] == [len(r.token_ids) for r in results]
    assert results[0].text == results[2].text


def test_one_conversation_or_a_list_of_them(model: Model) -> None:
    llm = LLM(model, cache_memory=1 << 20)
    texts = ("hello, who is there?", "hello, who is there now?")
    talks = [[{"role": "user", "content": text}] for text in texts]
    expected = kvist.generate(model, talks, GREEDY)
    assert tokens(llm.chat(talks, GREEDY)) == tokens(expected)
    [alone] = llm.chat(talks[1], GREEDY)
    assert alone.token_ids == expected[1].token_ids
    assert alone.usage.cached_tokens > 0


def test_samples_share_their_prompt(model: Model) -> None:
    params = SamplingParams(temperature=1.0, seed=1, n=4, max_tokens=6, ignore_eos=True)
    llm = small(model, prefix_cache=False, room=8)
    results = llm.generate([STEM], params)
    assert tokens(results) == tokens(kvist.generate(model, [STEM], params))
    assert len(set(tokens(results))) > 1
    forked = [r.record.cached_fork for r in results if r.record]
    assert forked == [0, *[len(STEM) - 1] * 3]


def test_a_stop_string_ends_a_sample_and_frees_its_slot(model: Model) -> None:
    [free] = kvist.generate(model, [STEM], GREEDY)
    stop = free.text[5:8]
    params = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True, stop=stop)
    [expected] = kvist.generate(model, [STEM], params)
    for overlap in (False, True):
        llm = small(model, overlap=overlap)
        [result] = llm.generate([STEM], params)
        assert (result.text, result.token_ids) == (expected.text, expected.token_ids)
        assert (result.finish_reason, result.stop_reason) == ("stop", stop)
        assert result.record is not None
        assert result.record.reason == "stop"
        assert_idle(llm.engine)


def test_max_tokens_left_open_goes_as_far_as_the_engine_does() -> None:
    llm = small()
    [result] = llm.generate([STEM], SamplingParams(temperature=0, ignore_eos=True))
    assert len(result.token_ids) == LENGTH - len(STEM)
    assert result.finish_reason == "length"


def test_the_bar_counts_every_sample(monkeypatch: pytest.MonkeyPatch) -> None:
    import rich.progress

    shown: list[tuple[str, float]] = []

    class Recorded(rich.progress.Progress):
        def add_task(self, *given: Any, **named: Any) -> Any:
            shown.append(("total", named["total"]))
            return super().add_task(*given, **named)

        def advance(self, task: Any, advance: float = 1) -> None:
            shown.append(("advance", advance))
            super().advance(task, advance)

    monkeypatch.setattr(rich.progress, "Progress", Recorded)
    params = [SamplingParams(temperature=0, max_tokens=2, n=n) for n in (1, 3, 2)]
    small().generate(PROMPTS[:3], params, progress=True)
    assert shown[0] == ("total", 6)
    assert sum(count for what, count in shown if what == "advance") == 6


def test_the_bar_stays_off_standard_output(capsys: pytest.CaptureFixture[str]) -> None:
    small().generate(PROMPTS[:2], GREEDY, progress=True)
    assert capsys.readouterr().out == ""
    small().generate(PROMPTS[:2], GREEDY)
    assert capsys.readouterr().err == ""


# What the cache did.


def test_a_record_accounts_for_every_prompt_token() -> None:
    llm = small(max_num_seqs=1, room=6)
    first, other, alike, *_ = llm.generate(PROMPTS, GREEDY)
    assert first.record is not None
    assert [asdict(miss) for miss in first.record.misses] == [
        {"start": 0, "stop": 16, "kind": "never_seen", "at": None},
        {"start": 16, "stop": 17, "kind": "tail", "at": None},
    ]
    assert other.record is not None
    assert other.record.cached_tokens == 0
    assert alike.record is not None
    assert alike.record.cached_device == alike.usage.cached_tokens == 16
    assert [miss.kind for miss in alike.record.misses] == ["tail"]
    for result in llm.generate(PROMPTS, GREEDY):
        assert result.record is not None
        missed = sum(miss.stop - miss.start for miss in result.record.misses)
        assert result.record.cached_tokens + missed == result.record.prompt_tokens
        assert missed <= 4


def test_only_what_is_not_cached_is_computed() -> None:
    llm = small(max_num_seqs=1, room=6)
    counted = CountingStep(tiny())
    llm.engine.runner.step = counted
    one = SamplingParams(temperature=0, max_tokens=1)
    llm.generate([[*STEM, 1]], one)
    llm.generate([[*STEM, 2, 3]], one)
    assert counted.tokens == [16, 1, 2]


def test_a_salt_keeps_tenants_apart() -> None:
    llm = small(room=8)
    llm.generate([[*STEM, 1]], GREEDY, cache_salt="red")
    [other] = llm.generate([[*STEM, 1]], GREEDY, cache_salt="blue")
    [same] = llm.generate([[*STEM, 1]], GREEDY, cache_salt="red")
    assert other.record is not None
    assert other.record.cached_tokens == 0
    assert other.record.misses[0].kind == "other_salt"
    assert same.usage.cached_tokens == 16
    assert other.token_ids == same.token_ids


def test_without_a_prefix_cache_nothing_is_found_again() -> None:
    llm = small(prefix_cache=False)
    for _ in range(2):
        [result] = llm.generate([STEM], GREEDY)
        assert result.record is not None
        assert result.record.cached_tokens == 0
        assert result.record.misses[0].kind == "bypassed"
    assert not any(any(group.cached) for group in llm.snapshot().groups)


def test_prompt_logprobs_are_whole_on_a_warm_cache() -> None:
    llm = small(room=8)
    params = SamplingParams(temperature=0, max_tokens=3, prompt_logprobs=2)
    [expected] = kvist.generate(tiny(), [STEM], params)
    llm.generate([STEM], GREEDY)
    [result] = llm.generate([STEM], params)
    assert result.prompt_logprobs is not None
    assert expected.prompt_logprobs is not None
    assert len(result.prompt_logprobs) == len(STEM)
    assert result.prompt_logprobs[0] is None
    for got, want in zip(result.prompt_logprobs[1:], expected.prompt_logprobs[1:], strict=True):
        assert got is not None
        assert want is not None
        assert got.token_id == want.token_id
        assert got.logprob == pytest.approx(want.logprob, abs=1e-4)


@pytest.mark.parametrize("overlap", [False, True])
def test_preempted_requests_give_the_same_tokens(overlap: bool) -> None:
    params = SamplingParams(temperature=0.9, seed=3, max_tokens=30, ignore_eos=True)
    expected = kvist.generate(tiny(), PROMPTS, params)
    llm = small(room=1.3, overlap=overlap)
    results = llm.generate(PROMPTS, params)
    assert tokens(results) == tokens(expected)
    assert llm.snapshot().preemptions > 0
    assert sum(r.record.preemptions for r in results if r.record) == llm.snapshot().preemptions
    assert_idle(llm.engine)


def test_what_falls_out_of_the_pool_comes_back_from_the_host() -> None:
    model = tiny()
    one = sequence_bytes(model, block_size=4, max_batch_tokens=16)
    llm = small(room=1.2, host_cache=20 * one)
    prompts = [[i, *STEM, *STEM, i] for i in range(8)]
    cold = llm.generate(prompts, GREEDY)
    warm = llm.generate(prompts, GREEDY)
    assert tokens(cold) == tokens(warm) == tokens(kvist.generate(model, prompts, GREEDY))
    assert llm.snapshot().counters.loaded_blocks > 0
    assert max(r.record.cached_host for r in warm if r.record) > 0
    without = small(room=1.2)
    without.generate(prompts, GREEDY)
    again = without.generate(prompts, GREEDY)
    assert sum(r.usage.cached_tokens for r in again) < sum(r.usage.cached_tokens for r in warm)


def test_a_window_that_evicts_gives_what_the_loop_gives() -> None:
    kept = SlidingWindow(6, sinks=2)
    llm = small(retention=kept, room=1.5)
    expected = kvist.generate(tiny(), PROMPTS, GREEDY, retention=kept)
    for _ in range(2):
        assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(expected)
    assert tokens(expected) != tokens(kvist.generate(tiny(), PROMPTS, GREEDY))


def test_the_snapshot_is_plain_data() -> None:
    import json

    llm = small()
    llm.generate(PROMPTS, GREEDY)
    told = json.loads(json.dumps(asdict(llm.snapshot())))
    assert told["counters"]["queried_tokens"] == sum(map(len, PROMPTS))
    assert [len(group["owners"]) for group in told["groups"]] == [
        group["num_blocks"] for group in told["groups"]
    ]


# What goes wrong.


@pytest.mark.parametrize("after", [0, 1, 4])
@pytest.mark.parametrize("overlap", [False, True])
def test_a_request_with_nan_logits_fails_alone(overlap: bool, after: int) -> None:
    llm = small(overlap=overlap)
    llm.engine.runner.step = PoisonedStep(tiny(), after)
    prompts = [*PROMPTS[:2], [3, 1, MARK], *PROMPTS[2:]]
    good = [r for r in llm.generate(prompts, GREEDY) if r.prompt_index != 2]
    assert tokens(good) == tokens(kvist.generate(tiny(), PROMPTS, GREEDY))
    [bad] = llm.generate([[3, 1, MARK]], GREEDY)
    assert bad.finish_reason == "error"
    assert "NaN" in (bad.error or "")
    assert len(bad.token_ids) == after
    assert_idle(llm.engine)


@pytest.mark.parametrize("overlap", [False, True])
def test_what_came_with_nan_logits_is_not_found_by_others(overlap: bool) -> None:
    llm = small(overlap=overlap, max_batch_tokens=8)
    prompt = [MARK, *STEM[:15], *STEM[:3]]  # three chunks, of which only the last one samples
    healthy, llm.engine.runner.step = llm.engine.runner.step, PoisonedStep(tiny(), 0)
    [bad] = llm.generate([prompt], GREEDY)
    assert bad.finish_reason == "error"
    llm.engine.runner.step = healthy
    [good] = llm.generate([prompt], GREEDY)
    assert good.usage.cached_tokens == 0
    assert tokens([good]) == tokens(kvist.generate(tiny(), [prompt], GREEDY))
    assert_idle(llm.engine)


def test_a_request_that_can_never_fit_is_refused_before_anything_is_computed() -> None:
    llm = small(room=0.5)
    counted = CountingStep(tiny())
    llm.engine.runner.step = counted
    long = SamplingParams(temperature=0, max_tokens=40, ignore_eos=True)
    with pytest.raises(ContextTooLong, match=r"need 14 blocks of 4, but the cache has \d+"):
        llm.generate([STEM[:5], STEM], [GREEDY, long])
    assert counted.tokens == []
    assert_idle(llm.engine)
    assert tokens(llm.generate([STEM[:5]], GREEDY)) == tokens(
        kvist.generate(tiny(), [STEM[:5]], GREEDY)
    )


def test_a_prompt_longer_than_the_engine_takes_is_refused_with_both_numbers() -> None:
    with pytest.raises(ContextTooLong, match=r"60 .*65.* 64"):
        small().generate([[1] * 60], SamplingParams(max_tokens=5))


@pytest.mark.parametrize("error", [KeyboardInterrupt(), RuntimeError("out of memory")])
@pytest.mark.parametrize("overlap", [False, True])
def test_after_a_step_was_broken_off_the_next_call_is_served(
    overlap: bool, error: BaseException, monkeypatch: pytest.MonkeyPatch
) -> None:
    rehearsed: list[PagedRunner] = []
    monkeypatch.setattr(PagedRunner, "prepare", lambda runner: rehearsed.append(runner))
    llm = small(overlap=overlap, room=1.3, host_cache=1 << 16)
    expected = kvist.generate(tiny(), PROMPTS, GREEDY)
    for calls in (0, 1, 4, 9):
        llm.engine.runner.step = FailingStep(tiny(), calls, error)
        with pytest.raises(type(error)):
            llm.generate(PROMPTS, GREEDY)
        assert not llm.engine.has_unfinished
        assert_idle(llm.engine)
        poison(llm.engine, free_only=True)
        assert tokens(llm.generate(PROMPTS, GREEDY)) == tokens(expected)
    assert len(rehearsed) == 1, "memory may have run out: nothing is tried but what is asked for"


def test_bad_input_is_refused_before_anything_runs(model: Model) -> None:
    llm = LLM(model, cache_memory=1 << 20)
    with pytest.raises(RequestError, match="prompts is empty"):
        llm.generate([])
    with pytest.raises(RequestError, match="list"):
        llm.generate("a prompt")
    with pytest.raises(RequestError, match="2 sampling parameters for 1 prompts"):
        llm.generate(["a"], [GREEDY, GREEDY])
    with pytest.raises(NotSupported, match="num_beams=2"):
        llm.generate(["a"], SamplingParams(temperature=0, num_beams=2))
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    ("option", "value"),
    [
        ("block_size", 0),
        ("max_num_seqs", 0),
        ("max_batch_tokens", 0),
        ("max_model_len", 0),
        ("host_cache", -1),
        ("speculate", -1),
        ("cache_memory", -5),
    ],
)
def test_a_size_that_could_hold_nothing_is_refused(option: str, value: int) -> None:
    options: dict[str, Any] = {"cache_memory": 1 << 20, option: value}
    with pytest.raises(kvist.KvistError, match=option if option != "cache_memory" else "-5"):
        LLM(tiny(), **options)


def test_a_wrong_option_is_refused_before_the_model_is_loaded() -> None:
    for make in (LLM, kvist.AsyncLLM):
        with pytest.raises(TypeError, match="blok_size"):
            make("no such model", blok_size=4)
        with pytest.raises(ConfigError, match="block_size must be >= 1, not 0"):
            make("no such model", block_size=0)
