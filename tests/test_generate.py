"""generate() gives the reference's tokens however they are computed, and stops as it was told."""

import json
import math
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

import kvist
from kvist import SamplingParams
from kvist.cache.dense import DynamicCache
from kvist.core.rng import uniform
from kvist.errors import NumericalError
from kvist.generate import decode, open_cache
from kvist.prepare import prepare
from slow_sampler import distribution, draw
from tiny_models import (
    CHECKPOINTS,
    CONFIG,
    CountingStep,
    Reference,
    build,
    reference,
    tiny,
    whole_logits,
)

GREEDY = SamplingParams(temperature=0, max_tokens=64, ignore_eos=True)


def ids_of(results: list[kvist.Result]) -> list[tuple[int, ...]]:
    return [result.token_ids for result in results]


# --- the reference's tokens


@pytest.mark.parametrize("attention", ["auto", "sdpa", "reference"])
@pytest.mark.parametrize("layout", ["dynamic", "static"])
def test_a_ragged_batch_gives_transformers_greedy_tokens(
    checkpoint: Reference, layout: str, attention: str
) -> None:
    results = kvist.generate(
        checkpoint.model, checkpoint.prompts, GREEDY, cache=layout, attention=attention
    )
    assert ids_of(results) == checkpoint.greedy


def test_each_prompt_alone_gives_transformers_greedy_tokens(checkpoint: Reference) -> None:
    for prompt, expected in zip(checkpoint.prompts, checkpoint.greedy, strict=True):
        assert ids_of(kvist.generate(checkpoint.model, [prompt], GREEDY)) == [expected]


def test_transformers_own_padded_batch_had_these_tokens_too(checkpoint: Reference) -> None:
    padded = checkpoint.tensors["leftpad.input_ids"]
    mask = checkpoint.tensors["leftpad.attention_mask"].bool()
    prompts = [row[kept].tolist() for row, kept in zip(padded, mask, strict=True)]
    expected = [tuple(row) for row in checkpoint.tensors["leftpad.greedy_ids"].tolist()]
    assert ids_of(kvist.generate(checkpoint.model, prompts, GREEDY)) == expected


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_5s_style_of_config_gives_the_same_tokens(
    name: str, copy_of: Callable[[str], Path]
) -> None:
    directory = copy_of(name)
    (directory / "config.saved_by_transformers.json").rename(directory / "config.json")
    model = kvist.load(directory)
    assert ids_of(kvist.generate(model, reference(name).prompts, GREEDY)) == reference(name).greedy


@pytest.mark.parametrize("chunk", [1, 2, 3, 7, 15, 16, 17, 64, 119, 120])
def test_any_chunk_of_the_prefill_gives_the_same_tokens(checkpoint: Reference, chunk: int) -> None:
    few = SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    results = kvist.generate(checkpoint.model, checkpoint.prompts, few, chunk=chunk)
    assert ids_of(results) == [ids[:12] for ids in checkpoint.greedy]


def test_a_prompt_is_computed_in_chunks_and_each_token_once(model: kvist.Model) -> None:
    step = CountingStep(model)
    params = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)
    kvist.generate(model, [[1] * 10, [2] * 3], params, chunk=4, step=step)
    assert step.tokens == [4 + 3, 4, 2, 2, 2, 2]


def test_without_a_cache_the_tokens_are_the_same_and_all_are_computed_anew(
    checkpoint: Reference,
) -> None:
    step = CountingStep(checkpoint.model)
    params = SamplingParams(temperature=0, max_tokens=20, ignore_eos=True)
    results = kvist.generate(
        checkpoint.model, checkpoint.prompts[:3], params, use_cache=False, step=step
    )
    assert ids_of(results) == [ids[:20] for ids in checkpoint.greedy[:3]]
    assert step.tokens == [1 + 5 + 17 + 3 * i for i in range(20)]


def test_sequences_that_end_early_leave_the_others_as_they_were(checkpoint: Reference) -> None:
    lengths = [3, 64, 1, 20, 21]
    params = [SamplingParams(temperature=0, max_tokens=n, ignore_eos=True) for n in lengths]
    step = CountingStep(checkpoint.model)
    results = kvist.generate(checkpoint.model, checkpoint.prompts, params, step=step)
    assert ids_of(results) == [ids[:n] for ids, n in zip(checkpoint.greedy, lengths, strict=True)]
    assert sum(step.tokens[1:]) == sum(lengths) - len(lengths)  # none is computed for nothing


# --- prompts


def test_a_chat_is_templated_encoded_and_answered_as_transformers_does(
    checkpoint: Reference,
) -> None:
    model, chat = checkpoint.model, checkpoint.facts["chat"]
    assert model.render_chat(chat["messages"]) == chat["text"]
    assert model.render_chat(chat["messages"], enable_thinking=False) == chat["text_no_think"]
    assert list(model.encode(chat["messages"])) == chat["ids"]
    params = SamplingParams(temperature=0, max_tokens=len(chat["greedy_ids"]), logprobs=5)
    [result] = kvist.generate(model, [chat["messages"]], params)
    assert list(result.token_ids) == chat["greedy_ids"]
    assert result.usage.prompt_tokens == len(chat["ids"])
    assert result.logprobs is not None
    for entry, logprob, top in zip(result.logprobs, chat["logprobs"], chat["top5"], strict=True):
        assert entry.logprob == pytest.approx(logprob, abs=1e-3)
        assert [token for token, _ in entry.top] == [token for token, _ in top]
        assert [p for _, p in entry.top] == pytest.approx([p for _, p in top], abs=1e-3)
    # The reference's text has special tokens written out; a result's has not.
    decoded = model.require_tokenizer().decode(result.token_ids, skip_special_tokens=False)
    assert decoded == chat["greedy_text"]
    assert result.text == model.require_tokenizer().decode(result.token_ids)


def test_text_token_ids_and_chats_may_be_mixed(model: kvist.Model) -> None:
    parts = [{"role": "user", "content": [{"type": "text", "text": "Hello"}]}]
    prompts: list[Any] = ["Hello, who art thou?", [5, 6, 7], (8, 9), parts]
    params = SamplingParams(temperature=0, max_tokens=8)
    together = kvist.generate(model, prompts, params)
    alone = [kvist.generate(model, [prompt], params)[0] for prompt in prompts]
    assert ids_of(together) == ids_of(alone)
    assert [result.prompt_index for result in together] == [0, 1, 2, 3]
    assert [r.usage.prompt_tokens for r in together] == [len(model.encode(p)) for p in prompts]


# --- endings


def test_the_models_own_end_tokens_end_it_and_are_kept(copy_of: Callable[[str], Path]) -> None:
    expected = reference("dense_tied").greedy[2]
    for eos in (expected[9], [511, expected[9]]):
        directory = copy_of("dense_tied")
        path = directory / "generation_config.json"
        path.write_text(json.dumps({"eos_token_id": eos}))
        model = kvist.load(directory)
        end = expected.index(expected[9]) + 1
        [result] = kvist.generate(model, [reference("dense_tied").prompts[2]])
        assert result.token_ids == expected[:end]
        assert (result.finish_reason, result.stop_reason) == ("stop", None)
        [result] = kvist.generate(model, [reference("dense_tied").prompts[2]], GREEDY)
        assert result.token_ids == expected
        assert result.finish_reason == "length"
        for file in directory.iterdir():
            file.unlink()
        directory.rmdir()


def test_a_stop_token_ends_it_and_is_named(checkpoint: Reference) -> None:
    expected = checkpoint.greedy[3]
    stop = expected[20]
    params = SamplingParams(temperature=0, max_tokens=64, stop_token_ids=[stop], ignore_eos=True)
    [result] = kvist.generate(checkpoint.model, [checkpoint.prompts[3]], params)
    assert result.token_ids == expected[: expected.index(stop) + 1]
    assert (result.finish_reason, result.stop_reason) == ("stop", stop)


@pytest.mark.parametrize("least", [0, 1, 6])
def test_no_end_and_no_stop_token_before_the_least_tokens(least: int) -> None:
    """They are ruled out, not ignored; as soon as they may come, the bias makes them come."""
    kinds: list[dict[str, Any]] = [{"stop_token_ids": [7]}, {}]
    for kind in kinds:
        model = tiny() if kind else build(CONFIG | {"eos_token_id": 7})
        params = SamplingParams(
            temperature=0, max_tokens=30, min_tokens=least, logit_bias={7: 100.0}, **kind
        )
        [result] = kvist.generate(model, [[1, 2, 3]], params)
        ids = [1, 2, 3]
        for _ in range(least):
            scores = whole_logits(model, ids)[-1]
            scores[7] = -math.inf
            ids.append(int(scores.argmax()))
        assert result.token_ids == (*ids[3:], 7)
        assert result.finish_reason == "stop"


def test_at_most_the_most_tokens_and_the_last_reason_is_length() -> None:
    for most in (1, 2, 17):
        params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True)
        [result] = kvist.generate(tiny(), [[1]], params)
        assert len(result.token_ids) == result.usage.completion_tokens == most
        assert (result.finish_reason, result.stop_reason) == ("length", None)
        assert result.usage.total_tokens == most + 1


def test_without_a_limit_it_stops_where_the_models_context_does() -> None:
    model = build(CONFIG | {"max_position_embeddings": 40, "eos_token_id": None})
    [result] = kvist.generate(model, [[1] * 30], SamplingParams(temperature=0))
    assert len(result.token_ids) == 10
    assert result.finish_reason == "length"


# --- sampling


def slow_generation(
    model: kvist.Model, prompt: list[int], count: int, seed: int, sample: int, **given: Any
) -> tuple[int, ...]:
    """Token by token, the whole sequence anew each time, by definition."""
    output: list[int] = []
    for position in range(count):
        logits = whole_logits(model, [*prompt, *output])[-1].tolist()
        probabilities = distribution(logits, **given, prompt=prompt, output=output)
        output.append(draw(probabilities, uniform(seed, sample, position)))
    return tuple(output)


WAYS: list[dict[str, Any]] = [
    {"temperature": 1.0},
    {"temperature": 0.7, "top_k": 7, "top_p": 0.9, "min_p": 0.02},
    {"temperature": 1.3, "repetition_penalty": 1.3, "frequency_penalty": 0.5},
    {"temperature": 0.0, "presence_penalty": 1.5, "logit_bias": {3: 2.0, 8: -4.0}},
]


@pytest.mark.parametrize("given", WAYS, ids=str)
def test_samples_of_one_prompt_are_each_what_their_definition_gives(given: dict[str, Any]) -> None:
    prompt = [3, 1, 4, 1, 5]
    params = SamplingParams(n=3, seed=11, max_tokens=15, ignore_eos=True, **given)
    results = kvist.generate(tiny(), [prompt], params)
    expected = [slow_generation(tiny(), prompt, 15, 11, i, **given) for i in range(3)]
    assert ids_of(results) == expected
    assert [(r.prompt_index, r.sample_index) for r in results] == [(0, 0), (0, 1), (0, 2)]
    if given["temperature"]:
        assert len(set(expected)) == 3


def test_samples_of_one_prompt_share_its_prefill() -> None:
    step = CountingStep(tiny())
    params = SamplingParams(temperature=1.0, n=4, seed=0, max_tokens=5, ignore_eos=True)
    kvist.generate(tiny(), [[1] * 9, [2] * 2], params, step=step)
    assert step.tokens == [9 + 2, 8, 8, 8, 8]


@pytest.mark.parametrize("layout", ["dynamic", "static"])
def test_a_seed_gives_the_same_tokens_alone_in_any_batch_and_in_any_order(layout: str) -> None:
    prompts = [[1, 2, 3], [4], [5, 6, 7, 8, 9, 10], [1, 2, 3]]
    params = [
        SamplingParams(seed=5, max_tokens=20, ignore_eos=True, **given, n=1 + i % 2)
        for i, given in enumerate(WAYS)
    ]
    alone = [
        ids_of(kvist.generate(tiny(), [prompt], one, cache=layout))
        for prompt, one in zip(prompts, params, strict=True)
    ]
    for order in ([0, 1, 2, 3], [3, 1, 0, 2], [2, 2, 0, 3, 1]):
        together = kvist.generate(
            tiny(), [prompts[i] for i in order], [params[i] for i in order], cache=layout
        )
        assert ids_of(together) == [ids for i in order for ids in alone[i]]


def test_without_a_seed_two_runs_differ() -> None:
    params = SamplingParams(temperature=2.0, max_tokens=20, ignore_eos=True)
    first, second = (kvist.generate(tiny(), [[1]], params)[0] for _ in range(2))
    assert first.token_ids != second.token_ids


def test_the_models_own_defaults_hold_where_nothing_is_given(model: kvist.Model) -> None:
    own = {name: model.generation_config[name] for name in ("temperature", "top_k", "top_p")}
    assert model.generation_config["do_sample"] is True
    [default] = kvist.generate(model, [[1, 2, 3]], SamplingParams(seed=4, max_tokens=20))
    [spelled] = kvist.generate(model, [[1, 2, 3]], SamplingParams(seed=4, max_tokens=20, **own))
    [greedy] = kvist.generate(model, [[1, 2, 3]], SamplingParams(temperature=0, max_tokens=20))
    assert default.token_ids == spelled.token_ids != greedy.token_ids


# --- log-probabilities


def test_log_probabilities_are_those_of_one_forward_over_everything(checkpoint: Reference) -> None:
    prompt = checkpoint.prompts[2]
    for chunk in (2048, 5):
        params = SamplingParams(
            temperature=0.8, seed=2, max_tokens=10, ignore_eos=True, logprobs=3, prompt_logprobs=2
        )
        results = kvist.generate(
            checkpoint.model, [prompt, checkpoint.prompts[3]], [params, GREEDY], chunk=chunk
        )
        assert results[1].logprobs is results[1].prompt_logprobs is None
        assert results[0].logprobs is not None
        assert results[0].prompt_logprobs is not None
        assert results[0].prompt_logprobs[0] is None
        ids = [*prompt, *results[0].token_ids]
        expected = whole_logits(checkpoint.model, ids).log_softmax(-1)
        entries = [*results[0].prompt_logprobs[1:], *results[0].logprobs]
        assert len(entries) == len(ids) - 1
        for i, entry in enumerate(entries):
            assert entry is not None
            assert entry.token_id == ids[i + 1]
            assert entry.logprob == pytest.approx(expected[i, ids[i + 1]].item(), abs=1e-3)
            best = expected[i].topk(2 if i < len(prompt) - 1 else 3)
            assert [p for _, p in entry.top] == pytest.approx(best.values.tolist(), abs=1e-3)


def test_every_sample_has_the_prompts_log_probabilities() -> None:
    params = SamplingParams(temperature=1.0, seed=0, n=3, max_tokens=2, prompt_logprobs=1)
    results = kvist.generate(tiny(), [[1, 2, 3], [4, 5]], params)
    assert [len(r.prompt_logprobs or ()) for r in results] == [3, 3, 3, 2, 2, 2]
    assert results[0].prompt_logprobs == results[1].prompt_logprobs == results[2].prompt_logprobs


def test_penalties_and_filters_do_not_change_log_probabilities() -> None:
    params = SamplingParams(
        temperature=0.1, top_k=2, logit_bias={7: 50.0}, seed=0, max_tokens=3, logprobs=0
    )
    [result] = kvist.generate(tiny(), [[1, 2]], params)
    expected = whole_logits(tiny(), [1, 2])[-1].log_softmax(-1)
    assert result.token_ids[0] == 7
    assert result.logprobs is not None
    assert result.logprobs[0].logprob == pytest.approx(expected[7].item(), abs=1e-4)


# --- what else


def test_results_say_what_they_took(model: kvist.Model) -> None:
    [result] = kvist.generate(model, [[1, 2, 3]], GREEDY)
    assert (result.usage.prompt_tokens, result.usage.completion_tokens) == (3, 64)
    assert result.timings.prefill > 0
    assert result.timings.decode > 0


def test_a_cache_lives_on_after_the_loop_that_filled_it(model: kvist.Model) -> None:
    """Chat and speculation go back in a cache between two runs of the loop."""
    params = SamplingParams(temperature=0, max_tokens=100, ignore_eos=True)
    samples = prepare(model, [[1, 2, 3]], params)
    cache = open_cache(model, samples, "dynamic", "plain", None)
    for _ in decode(model, samples, cache):
        pass
    first = samples[0].result().token_ids
    assert isinstance(cache, DynamicCache)
    cache.crop(2)
    again = prepare(model, [[1, 2, 3]], params)
    for _ in decode(model, again, cache):
        pass
    assert again[0].result().token_ids == first
    assert not any(keys.is_inference() for pair in cache for keys in pair)


def test_nan_weights_are_an_error_that_names_prompt_and_step() -> None:
    model = build(CONFIG)
    model.lm.get_parameter("model.layers.1.mlp.down_proj.weight")[3, 5] = torch.nan
    with pytest.raises(NumericalError, match=r"prompt 0 .* step 0"):
        kvist.generate(model, [[1, 2]], GREEDY)


def test_logits_that_turn_nan_later_are_an_error_that_names_that_step() -> None:
    """A damaged embedding is harmless until its token comes up."""
    model = build(CONFIG | {"tie_word_embeddings": False})
    prompts = [[5, 6], [1, 2]]
    params = SamplingParams(temperature=0, max_tokens=30, ignore_eos=True)
    healthy = ids_of(kvist.generate(model, prompts, params))
    step, token = next(
        (i, token)
        for i, token in enumerate(healthy[1])
        if i > 0 and token not in (*healthy[0][: i + 1], *healthy[1][:i], 5, 6, 1, 2)
    )
    model.lm.model.embed_tokens.weight[token] = torch.nan
    with pytest.raises(NumericalError, match=rf"prompt 1 .* step {step + 1}\b"):
        kvist.generate(model, prompts, params)
