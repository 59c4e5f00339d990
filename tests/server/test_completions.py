"""Texts, token ids and lists of them; tokens, models and embeddings."""

import math
from typing import Any

import openai
import pytest
from running import Running

import kvist
from kvist.loading.model import Model

GREEDY: dict[str, Any] = {"model": "dense_tied", "temperature": 0, "max_tokens": 9}


def offline(model: Model, prompts: list[Any], **params: Any) -> list[kvist.Result]:
    return kvist.generate(model, prompts, kvist.SamplingParams(**params))


@pytest.mark.parametrize(
    "prompt",
    ["one text", ["a first", "and a second one"], [5, 6, 7, 8], [[5, 6, 7], [9], [300, 2]]],
    ids=["text", "texts", "ids", "lists of ids"],
)
@pytest.mark.parametrize("stream", [False, True])
def test_prompts_of_every_shape_are_continued(
    model: Model, client: openai.OpenAI, prompt: Any, stream: bool
) -> None:
    prompts = [prompt] if isinstance(prompt, str) or isinstance(prompt[0], int) else prompt
    expected = offline(model, prompts, temperature=0, max_tokens=9)
    if stream:
        texts = [""] * len(prompts)
        for chunk in client.completions.create(**GREEDY, prompt=prompt, stream=True):
            for choice in chunk.choices:
                texts[choice.index] += choice.text
    else:
        answer = client.completions.create(**GREEDY, prompt=prompt)
        texts = [choice.text for choice in answer.choices]
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == sum(r.usage.prompt_tokens for r in expected)
        assert answer.usage.completion_tokens == sum(len(r.token_ids) for r in expected)
    assert texts == [result.text for result in expected]


def test_samples_are_numbered_prompt_by_prompt(model: Model, client: openai.OpenAI) -> None:
    expected = offline(model, ["a first", "a second"], seed=4, max_tokens=6, n=2)
    answer = client.completions.create(
        model="dense_tied", prompt=["a first", "a second"], seed=4, max_tokens=6, n=2
    )
    assert [choice.text for choice in answer.choices] == [r.text for r in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2, 3]


def test_echo_brings_the_prompt_with_its_log_probabilities(
    model: Model, client: openai.OpenAI
) -> None:
    prompt = "once upon a time"
    [expected] = offline(
        model, [prompt], temperature=0, max_tokens=4, logprobs=2, prompt_logprobs=2
    )
    answer = client.completions.create(
        model="dense_tied", prompt=prompt, temperature=0, max_tokens=4, echo=True, logprobs=2
    )
    [choice] = answer.choices
    assert choice.text == prompt + expected.text
    logprobs = choice.logprobs
    assert logprobs is not None
    assert logprobs.token_logprobs is not None
    assert len(logprobs.top_logprobs or ()) == len(logprobs.token_logprobs)
    assert expected.prompt_logprobs is not None
    assert expected.logprobs is not None
    assert logprobs.token_logprobs[0] is None
    known = [*expected.prompt_logprobs[1:], *expected.logprobs]
    assert logprobs.token_logprobs[1:] == [one.logprob for one in known if one is not None]
    assert "".join((logprobs.tokens or [])[: expected.usage.prompt_tokens]) == prompt
    assert logprobs.text_offset is not None
    assert logprobs.text_offset[expected.usage.prompt_tokens] == len(prompt)


ECHOED = [
    "once upon a time, 日本 and é",
    ["the cat<|im_end|>\n", "日"],
    [5, 6, 7, 8],
    [[5], [300, 2, 0, 44]],
]


@pytest.mark.parametrize("n", [1, 2])
@pytest.mark.parametrize("prompt", ECHOED, ids=["text", "texts", "ids", "lists of ids"])
@pytest.mark.parametrize("top", [0, 2])
def test_an_echo_with_log_probabilities_streams_to_what_it_is_as_a_whole(
    client: openai.OpenAI, prompt: Any, n: int, top: int
) -> None:
    asked: dict[str, Any] = {
        "model": "dense_tied", "prompt": prompt, "seed": 7, "max_tokens": 9, "n": n, "echo": True,
        "logprobs": top,
    }  # fmt: skip
    whole = client.completions.create(**asked)
    pieces: dict[int, list[Any]] = {}
    for chunk in client.completions.create(**asked, stream=True):
        for piece in chunk.choices:
            pieces.setdefault(piece.index, []).append(piece)
    assert sorted(pieces) == [choice.index for choice in whole.choices]
    for choice in whole.choices:
        stream = pieces[choice.index]
        assert len(stream) > 1
        assert stream[0].logprobs.token_logprobs[0] is None
        assert "".join(piece.text for piece in stream) == choice.text
        assert stream[-1].finish_reason == choice.finish_reason
        expected = choice.logprobs
        assert expected is not None
        for name in ("tokens", "text_offset", "token_logprobs"):
            together = [one for piece in stream for one in getattr(piece.logprobs, name)]
            assert together == pytest.approx(getattr(expected, name), abs=1e-4)
        if not top:
            assert expected.top_logprobs is None
            assert all(piece.logprobs.top_logprobs is None for piece in stream)
            continue
        tops = [one for piece in stream for one in piece.logprobs.top_logprobs]
        for one, alike in zip(tops, expected.top_logprobs or (), strict=True):
            assert one == (alike and pytest.approx(alike, abs=1e-4))


def test_the_first_chunk_of_an_echo_has_the_whole_prompt(
    model: Model, client: openai.OpenAI
) -> None:
    for prompt in ("once upon a time, 日本 and é", "<|im_end|>the cat", [5, 0, 7, 8, 300]):
        [first, second, *_] = client.completions.create(
            **GREEDY, prompt=prompt, echo=True, logprobs=1, stream=True
        )
        ids = model.encode(prompt)
        text = model.require_tokenizer().decode(ids, skip_special_tokens=False)
        [one], [after] = first.choices, second.choices
        assert one.text.startswith(text)
        assert one.logprobs is not None
        assert after.logprobs is not None
        tokens, offsets = one.logprobs.tokens or [], one.logprobs.text_offset or []
        assert len(tokens) == len(offsets) == len(ids) + 1
        assert offsets[0] == 0
        assert offsets[len(ids)] == len(text)
        for token, offset in zip(tokens[: len(ids)], offsets, strict=False):
            assert "\ufffd" in token or text.startswith(token, offset)
        assert (after.logprobs.text_offset or [])[0] >= len(text)


def test_defaults_to_sixteen_tokens(client: openai.OpenAI) -> None:
    answer = client.completions.create(
        model="dense_tied", prompt="x", extra_body={"ignore_eos": True}
    )
    assert answer.usage is not None
    assert answer.usage.completion_tokens == 16


def test_tokens_go_there_and_back(model: Model, server: Running) -> None:
    text = "Hello there, 日本 \n<|im_end|>"
    there = server.http.post("/tokenize", json={"prompt": text, "return_token_strs": True}).json()
    assert there["tokens"] == list(model.encode(text))
    assert there["count"] == len(there["tokens"]) == len(there["token_strs"])
    back = server.http.post("/detokenize", json={"tokens": there["tokens"]}).json()
    assert back == {"prompt": text}
    assert server.error("/detokenize", {"tokens": [9999]})[0] == 400


def test_models_are_listed(client: openai.OpenAI) -> None:
    assert [model.id for model in client.models.list()] == ["dense_tied"]
    assert client.models.retrieve("dense_tied").owned_by == "kvist"
    with pytest.raises(openai.NotFoundError, match="not served here"):
        client.models.retrieve("gpt-4")


def test_embeddings_are_unit_vectors_of_the_text(client: openai.OpenAI) -> None:
    answer = client.embeddings.create(model="dense_tied", input=["a text", "a text", "another"])
    first, same, other = (one.embedding for one in answer.data)
    assert len(first) == 64
    assert math.isclose(sum(x * x for x in first), 1, rel_tol=1e-4)
    assert first == same != other
    plain = client.embeddings.create(model="dense_tied", input="a text", encoding_format="float")
    assert plain.data[0].embedding == pytest.approx(first, abs=1e-6)
    with pytest.raises(openai.BadRequestError, match="64 dimensions"):
        client.embeddings.create(model="dense_tied", input="a text", dimensions=8)
