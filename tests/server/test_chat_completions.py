"""Chats through OpenAI's own client: what it sends is understood, what it gets is what was said."""

import base64
import json
from typing import Any

import openai
import pytest
from openai.types.chat import ChatCompletion
from running import Running, running

import kvist
from kvist.loading.model import Model
from tiny_models import FIXTURES

MESSAGES: Any = [{"role": "user", "content": "Say something."}]
GREEDY: dict[str, Any] = {"model": "dense_tied", "messages": MESSAGES, "temperature": 0}


def offline(model: Model, **params: Any) -> list[kvist.Result]:
    return kvist.generate(model, [MESSAGES], kvist.SamplingParams(**params))


def cached_and_prompt(answer: ChatCompletion) -> tuple[int, int]:
    """Prompt tokens that were cached, and all of them."""
    assert answer.usage is not None
    assert answer.usage.prompt_tokens_details is not None
    return answer.usage.prompt_tokens_details.cached_tokens or 0, answer.usage.prompt_tokens


def test_an_answer_is_what_generate_gives(model: Model, client: openai.OpenAI) -> None:
    [expected] = offline(model, temperature=0, max_tokens=30)
    answer = client.chat.completions.create(**GREEDY, max_completion_tokens=30)
    [choice] = answer.choices
    assert choice.message.content == expected.text
    assert choice.finish_reason == expected.finish_reason
    assert answer.usage is not None
    assert answer.usage.completion_tokens == len(expected.token_ids)
    assert answer.usage.prompt_tokens == expected.usage.prompt_tokens
    assert answer.model == "dense_tied"


def test_a_stream_joins_to_the_answer_and_ends_with_its_usage(
    model: Model, client: openai.OpenAI
) -> None:
    [expected] = offline(model, temperature=0, max_tokens=30)
    chunks = list(
        client.chat.completions.create(
            **GREEDY, max_tokens=30, stream=True, stream_options={"include_usage": True}
        )
    )
    *said, last = chunks
    assert "".join(chunk.choices[0].delta.content or "" for chunk in said) == expected.text
    assert said[0].choices[0].delta.role == "assistant"
    assert [c.choices[0].finish_reason for c in said][-1] == expected.finish_reason
    assert all(chunk.usage is None for chunk in said)
    assert last.choices == []
    assert last.usage is not None
    assert last.usage.completion_tokens == len(expected.token_ids)
    assert len({chunk.id for chunk in chunks}) == 1


def test_null_is_left_out(model: Model, server: Running) -> None:
    names = ("n", "stream", "stop", "max_completion_tokens", "top_p", "tools", "logit_bias", "seed")
    nulls = dict.fromkeys((*names, "tool_choice", "response_format", "logprobs", "user"))
    answer = server.http.post("/v1/chat/completions", json=nulls | GREEDY | {"max_tokens": 5})
    [expected] = offline(model, temperature=0, max_tokens=5)
    assert answer.json()["choices"][0]["message"]["content"] == expected.text
    assert server.error("/v1/chat/completions", {"model": None, "messages": None})[0] == 400


def test_a_stream_has_no_usage_unless_asked_for(client: openai.OpenAI) -> None:
    chunks = list(client.chat.completions.create(**GREEDY, max_tokens=4, stream=True))
    assert all(chunk.usage is None and chunk.choices for chunk in chunks)


def test_the_seed_decides_and_defaults_are_the_models_own(
    model: Model, client: openai.OpenAI
) -> None:
    assert model.generation_config["do_sample"]
    expected = offline(model, seed=7, max_tokens=12, n=3)
    answer = client.chat.completions.create(
        model="dense_tied", messages=MESSAGES, seed=7, max_tokens=12, n=3
    )
    assert [choice.message.content for choice in answer.choices] == [r.text for r in expected]
    assert [choice.index for choice in answer.choices] == [0, 1, 2]


def test_samples_of_a_stream_come_under_their_index(model: Model, client: openai.OpenAI) -> None:
    expected = offline(model, seed=7, max_tokens=12, n=3)
    texts = ["", "", ""]
    for chunk in client.chat.completions.create(
        model="dense_tied", messages=MESSAGES, seed=7, max_tokens=12, n=3, stream=True
    ):
        for choice in chunk.choices:
            texts[choice.index] += choice.delta.content or ""
    assert texts == [result.text for result in expected]


def test_every_sampling_parameter_reaches_the_engine(model: Model, client: openai.OpenAI) -> None:
    ours = {"top_k": 9, "min_p": 0.02, "repetition_penalty": 1.3, "min_tokens": 3}
    theirs: dict[str, Any] = {
        "temperature": 0.8, "top_p": 0.9, "presence_penalty": 0.5, "frequency_penalty": 0.25,
        "seed": 3, "max_tokens": 20,
    }  # fmt: skip
    [expected] = offline(model, **ours, **theirs, logit_bias={65: 3.0})
    answer = client.chat.completions.create(
        model="dense_tied", messages=MESSAGES, **theirs, logit_bias={"65": 3}, extra_body=ours
    )
    assert answer.choices[0].message.content == expected.text


def test_a_stop_string_ends_it_and_is_not_shown(model: Model, client: openai.OpenAI) -> None:
    [whole] = offline(model, temperature=0, max_tokens=30)
    stop = whole.text[8:11]
    answer = client.chat.completions.create(**GREEDY, max_tokens=30, stop=[stop, "\u2603"])
    assert answer.choices[0].message.content == whole.text[: whole.text.index(stop)]
    assert answer.choices[0].finish_reason == "stop"


@pytest.mark.parametrize("stream", [False, True])
def test_log_probabilities_are_the_engines(
    model: Model, client: openai.OpenAI, stream: bool
) -> None:
    [expected] = offline(model, temperature=0, max_tokens=10, logprobs=2)
    asked: dict[str, Any] = GREEDY | {"max_tokens": 10, "logprobs": True, "top_logprobs": 2}
    found = []
    if stream:
        for chunk in client.chat.completions.create(**asked, stream=True):
            if chunk.choices[0].logprobs is not None:
                found += chunk.choices[0].logprobs.content or []
    else:
        logprobs = client.chat.completions.create(**asked).choices[0].logprobs
        assert logprobs is not None
        found = logprobs.content or []
    assert expected.logprobs is not None
    known = [one.logprob for one in expected.logprobs]
    assert [one.logprob for one in found] == pytest.approx(known, abs=1e-4)
    joined = b"".join(bytes(one.bytes or ()) for one in found)
    assert joined.decode(errors="replace") == expected.text
    assert all(len(one.top_logprobs) == 2 for one in found)
    assert found[0].top_logprobs[0].logprob == found[0].logprob


def test_a_warm_prompt_says_how_much_was_cached(client: openai.OpenAI) -> None:
    messages: Any = [
        {"role": "user", "content": "A prompt that nobody else has, and no short one."}
    ]
    asked: dict[str, Any] = {"model": "dense_tied", "messages": messages, "max_tokens": 2}
    cold, warm = (cached_and_prompt(client.chat.completions.create(**asked)) for _ in range(2))
    assert cold[1] == warm[1]
    assert warm[0] >= warm[1] - 5
    assert cold[0] < warm[1] - 10


def test_requests_of_another_salt_share_nothing(client: openai.OpenAI) -> None:
    def cached(salt: str) -> int:
        extra = {"cache_salt": salt}
        answer = client.chat.completions.create(**GREEDY, max_tokens=1, extra_body=extra)
        return cached_and_prompt(answer)[0]

    assert cached("one") == 0
    assert cached("two") == 0
    assert cached("one") > 0


def test_the_template_gets_its_variables(model: Model, client: openai.OpenAI) -> None:
    quiet = model.encode(MESSAGES, enable_thinking=False)
    [expected] = kvist.generate(
        model, [list(quiet)], kvist.SamplingParams(temperature=0, max_tokens=8)
    )
    for extra in (
        {"chat_template_kwargs": {"enable_thinking": False}},
        {"reasoning_effort": "none"},
    ):
        answer = client.chat.completions.create(**GREEDY, max_tokens=8, extra_body=extra)
        assert answer.choices[0].message.content == expected.text
        assert answer.usage is not None
        assert answer.usage.prompt_tokens == len(quiet)


def test_what_stands_in_messages_is_never_run_as_a_template(model: Model, server: Running) -> None:
    messages = [
        {"role": "user", "content": "{{ 7 * 7 }}{% for x in range(9) %}{{ cycler }}{% endfor %}"}
    ]
    answer = server.http.post("/tokenize", json={"messages": messages}).json()
    assert answer["tokens"] == list(model.encode(messages))


def test_pictures_come_as_data_urls_and_are_seen(server: Running) -> None:
    vision = kvist.load(FIXTURES / "nanovlm" / "vlm_tied")
    picture = (FIXTURES / "nanovlm" / "chelsea.png").read_bytes()

    def url_of(file: bytes) -> str:
        return f"data:image/png;base64,{base64.b64encode(file).decode()}"

    url = url_of(picture)

    def messages(picture: Any) -> Any:
        return [
            {
                "role": "user",
                "content": [
                    {"type": "image_url", "image_url": {"url": picture, "detail": "low"}},
                    {"type": "text", "text": "What is it?"},
                ],
            }
        ]

    [expected] = kvist.generate(
        vision,
        [[{"role": "user", "content": [{"type": "image", "image": picture},
           {"type": "text", "text": "What is it?"}]}]],
        kvist.SamplingParams(temperature=0, max_tokens=8),
    )  # fmt: skip
    with running(vision, ui=False, max_images=1) as other:
        client = other.client()
        asked: dict[str, Any] = {"model": "vlm_tied", "max_tokens": 8, "temperature": 0}
        answer = client.chat.completions.create(**asked, messages=messages(url))
        assert answer.choices[0].message.content == expected.text
        again = client.chat.completions.create(**asked, messages=messages(url))
        assert cached_and_prompt(again)[0] > 32
        refused = {
            "file:///etc/passwd": "data URL",
            "/etc/passwd": "data URL",
            "http://127.0.0.1:80/x.png": "not fetched",
            "https://example.com/x.png": "not fetched",
            "data:image/png;base64,AAAA": "no picture",
            url_of(picture[:3000]): "damaged",
        }
        for bad, reason in refused.items():
            with pytest.raises(openai.BadRequestError, match=reason):
                client.chat.completions.create(**asked, messages=messages(bad))
        with pytest.raises(openai.BadRequestError, match="at most 1"):
            client.chat.completions.create(**asked, messages=messages(url) * 2)
    with pytest.raises(openai.BadRequestError, match="takes no pictures"):
        server.client().chat.completions.create(**GREEDY | {"messages": messages(url)})


def test_parts_of_text_are_one_text(model: Model, server: Running) -> None:
    parts = [{"type": "text", "text": "Say "}, {"type": "text", "text": "something."}]
    answer = server.http.post("/tokenize", json={"messages": [{"role": "user", "content": parts}]})
    assert answer.json()["tokens"] == list(model.encode(MESSAGES))


def test_chunks_are_what_openai_writes(server: Running) -> None:
    body = GREEDY | {"max_tokens": 3, "stream": True}
    answer = server.http.post("/v1/chat/completions", json=body)
    assert answer.headers["content-type"].startswith("text/event-stream")
    *events, done, rest = answer.text.split("\n\n")
    assert (done, rest) == ("data: [DONE]", "")
    chunks = [json.loads(event.removeprefix("data: ")) for event in events]
    assert {chunk["object"] for chunk in chunks} == {"chat.completion.chunk"}
    assert chunks[0]["choices"][0]["delta"] == {"role": "assistant", "content": ""}
    assert chunks[-1]["choices"][0] == {
        "index": 0, "delta": {}, "logprobs": None, "finish_reason": "length",
    }  # fmt: skip
