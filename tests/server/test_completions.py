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
