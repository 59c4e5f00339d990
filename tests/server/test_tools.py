"""Tools, formats and thoughts: what a model is told, held to, and how its words are read."""

import json
from collections.abc import Iterable
from typing import Any

import openai
import pytest
from jsonschema_rs import is_valid
from running import Running
from scripted import Scripted, scripted

import kvist
from kvist.loading.model import Model
from kvist.server.hermes import CallParser
from kvist.server.outputs import Output
from kvist.text.thinking import ThinkingParser

MESSAGES: Any = [{"role": "user", "content": "What is the weather in Oslo?"}]
WEATHER: Any = {
    "type": "function",
    "function": {
        "name": "get_weather",
        "description": "The weather of a city.",
        "parameters": {
            "type": "object",
            "properties": {
                "city": {"enum": ["Oslo", "Bergen"]},
                "days": {"type": "integer", "minimum": 1, "maximum": 9},
            },
            "required": ["city"],
            "additionalProperties": False,
        },
    },
}
CLOCK: Any = {
    "type": "function",
    "function": {
        "name": "clock",
        "parameters": {
            "type": "object",
            "properties": {"zone": {"$ref": "#/$defs/zone"}},
            "required": ["zone"],
            "additionalProperties": False,
            "$defs": {"zone": {"type": "boolean"}},
        },
    },
}
ASKED: dict[str, Any] = {"model": "dense_tied", "messages": MESSAGES, "tools": [WEATHER, CLOCK]}
PLAIN = {"chat_template_kwargs": {"enable_thinking": False}}
CALLS = (
    "Let me see.\n"
    '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>\n'
    '<tool_call>\n{"name": "clock", "arguments": {"zone": true}}\n</tool_call>'
)
THOUGHT = f"<think>\nThe user wants\nweather.\n</think>\n\n{CALLS}"


def call_of(message: Any) -> list[tuple[str, Any]]:
    return [(c.function.name, json.loads(c.function.arguments)) for c in message.tool_calls or ()]


def joined(chunks: Iterable[Any]) -> tuple[str, str, list[tuple[str, str]], str]:
    """A stream's words, thought, calls and end."""
    words = thought = end = ""
    calls: dict[int, list[str]] = {}
    for chunk in chunks:
        [choice] = chunk.choices
        delta = choice.delta
        words += delta.content or ""
        thought += getattr(delta, "reasoning_content", None) or ""
        for call in delta.tool_calls or ():
            if call.id is not None:
                assert call.index == len(calls)
                calls[call.index] = [call.function.name, ""]
            calls[call.index][1] += call.function.arguments
        end = choice.finish_reason or end
    return words, thought, [(name, arguments) for name, arguments in calls.values()], end


# What a model says, as it would: scripted.


@pytest.fixture(scope="module")
def actor(model: Model) -> Iterable[Scripted]:
    with scripted(model) as started:
        yield started


def test_calls_thoughts_and_words_are_told_apart(actor: Scripted) -> None:
    actor.says(THOUGHT)
    [choice] = actor.client().chat.completions.create(**ASKED).choices
    assert choice.message.content == "Let me see."
    assert choice.message.reasoning_content == "The user wants\nweather."  # type: ignore[attr-defined]
    assert call_of(choice.message) == [("get_weather", {"city": "Oslo"}), ("clock", {"zone": True})]
    assert choice.finish_reason == "tool_calls"
    ids = [call.id for call in choice.message.tool_calls or ()]
    assert len(set(ids)) == 2


def test_a_stream_tells_the_same_apart(actor: Scripted) -> None:
    actor.says(THOUGHT)
    words, thought, calls, end = joined(
        actor.client().chat.completions.create(**ASKED, stream=True)
    )
    assert (words, thought, end) == ("Let me see.", "The user wants\nweather.", "tool_calls")
    assert [(name, json.loads(arguments)) for name, arguments in calls] == [
        ("get_weather", {"city": "Oslo"}),
        ("clock", {"zone": True}),
    ]


def test_without_tools_a_call_is_only_text(actor: Scripted) -> None:
    for extra in ({"tools": None}, {"tool_choice": "none"}):
        actor.says(CALLS)
        [choice] = actor.client().chat.completions.create(**(ASKED | extra)).choices
        assert choice.message.content == CALLS
        assert choice.message.tool_calls is None
        assert choice.finish_reason == "stop"


def test_thoughts_count_as_reasoning_tokens(actor: Scripted) -> None:
    actor.says(f"<think>{'hm ' * 20}</think>Yes.")
    usage = actor.client().chat.completions.create(model="dense_tied", messages=MESSAGES).usage
    assert usage is not None
    assert usage.completion_tokens_details is not None
    reasoning = usage.completion_tokens_details.reasoning_tokens or 0
    assert 20 <= reasoning < usage.completion_tokens


def test_the_template_is_told_of_tools_and_of_what_came_of_them(
    model: Model, actor: Scripted
) -> None:
    call = {
        "id": "call_1",
        "type": "function",
        "function": {"name": "get_weather", "arguments": '{"city": "Oslo"}'},
    }
    messages = [
        *MESSAGES,
        {"role": "assistant", "content": None, "tool_calls": [call], "reasoning_content": "hm"},
        {"role": "tool", "tool_call_id": "call_1", "content": "rain"},
    ]
    body = {"messages": messages, "tools": [WEATHER]}
    tokens = actor.http.post("/tokenize", json=body).json()["tokens"]
    text = model.require_tokenizer().decode(tokens, skip_special_tokens=False)
    assert '{"type": "function", "function": {"name": "get_weather"' in text
    assert (
        '<tool_call>\n{"name": "get_weather", "arguments": {"city": "Oslo"}}\n</tool_call>' in text
    )
    assert "<think>\nhm\n</think>" in text
    assert "<tool_response>\nrain\n</tool_response>" in text


def test_every_cut_of_an_output_is_read_alike() -> None:
    def read(pieces: list[str]) -> list[tuple[str, int, str]]:
        output = Output(ThinkingParser(), CallParser())
        parts = [part for text in pieces for part in output.take(kvist.Delta(text))]
        parts += output._rest()
        whole: list[tuple[str, int, str]] = []
        for part in parts:
            if whole and whole[-1][:2] == (part.kind, part.call) and part.kind != "call":
                whole[-1] = (*whole[-1][:2], whole[-1][2] + part.text)
            else:
                whole.append((part.kind, part.call, part.text))
        return whole

    expected = read([THOUGHT])
    assert [kind for kind, _, _ in expected] == ["reasoning", "content", *["call", "arguments"] * 2]
    assert read(list(THOUGHT)) == expected
    for place in range(len(THOUGHT)):
        assert read([THOUGHT[:place], THOUGHT[place:]]) == expected


# What a model has to say: a random one, which would say anything, is held to it.


def test_a_required_call_is_made(client: openai.OpenAI) -> None:
    for seed in range(3):
        [choice] = client.chat.completions.create(
            **ASKED, tool_choice="required", parallel_tool_calls=False, seed=seed, max_tokens=120,
            extra_body=PLAIN,
        ).choices  # fmt: skip
        [(name, arguments)] = call_of(choice.message)
        [tool] = [t["function"] for t in (WEATHER, CLOCK) if t["function"]["name"] == name]
        assert is_valid(tool["parameters"], arguments)
        assert choice.finish_reason == "tool_calls"
        assert choice.message.content is None


@pytest.mark.parametrize("name", ["get_weather", "clock"])
def test_a_named_call_is_made(client: openai.OpenAI, name: str) -> None:
    choice: Any = {"type": "function", "function": {"name": name}}
    stream = client.chat.completions.create(
        **ASKED, tool_choice=choice, parallel_tool_calls=False, max_tokens=120, stream=True,
        extra_body=PLAIN,
    )  # fmt: skip
    words, _, [(called, arguments)], end = joined(stream)
    assert (words, called, end) == ("", name, "tool_calls")
    json.loads(arguments)


SCHEMA: Any = {
    "type": "object",
    "properties": {
        "kind": {"enum": ["a", "b"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
        "tags": {"type": "array", "items": {"type": "string", "pattern": "^[a-z]{2,4}$"},
                 "maxItems": 2},
    },
    "required": ["kind", "size", "tags"],
    "additionalProperties": False,
}  # fmt: skip


@pytest.mark.parametrize("stream", [False, True])
def test_an_answer_fits_its_schema(client: openai.OpenAI, stream: bool) -> None:
    shape: Any = {
        "type": "json_schema",
        "json_schema": {"name": "thing", "schema": SCHEMA, "strict": True},
    }
    asked: dict[str, Any] = {
        "model": "dense_tied", "messages": MESSAGES, "response_format": shape, "max_tokens": 200,
        "extra_body": PLAIN,
    }  # fmt: skip
    for seed in range(3):
        if stream:
            text = joined(client.chat.completions.create(**asked, seed=seed, stream=True))[0]
        else:
            answer = client.chat.completions.create(**asked, seed=seed, n=3)
            assert {choice.finish_reason for choice in answer.choices} == {"stop"}
            assert len({choice.message.content for choice in answer.choices}) > 1
            for choice in answer.choices:
                assert is_valid(SCHEMA, json.loads(choice.message.content or ""))
            text = answer.choices[0].message.content or ""
        assert is_valid(SCHEMA, json.loads(text))


def test_any_json_object_begins_as_one(client: openai.OpenAI) -> None:
    answer = client.chat.completions.create(
        model="dense_tied", messages=MESSAGES, response_format={"type": "json_object"},
        max_tokens=40, extra_body=PLAIN,
    )  # fmt: skip
    assert (answer.choices[0].message.content or "").startswith("{")


def test_pydantic_models_are_parsed_by_the_client(client: openai.OpenAI) -> None:
    from typing import Literal

    from pydantic import BaseModel

    class Thing(BaseModel):
        kind: Literal["a", "b"]
        yes: bool

    answer = client.chat.completions.parse(
        model="dense_tied", messages=MESSAGES, response_format=Thing, max_tokens=100,
        extra_body=PLAIN,
    )  # fmt: skip
    assert isinstance(answer.choices[0].message.parsed, Thing)


def test_a_completion_may_be_held_to_a_schema_too(server: Running) -> None:
    body = {
        "model": "dense_tied", "prompt": "JSON:", "max_tokens": 60,
        "response_format": {"type": "json_schema", "json_schema": {"schema": {"enum": [1, "two"]}}},
    }  # fmt: skip
    text = server.http.post("/v1/completions", json=body).json()["choices"][0]["text"]
    assert json.loads(text) in (1, "two")


def test_a_thought_may_come_before_what_is_held_to_a_format(actor: Scripted) -> None:
    """The script is obeyed as far as the grammar allows it."""
    shape: Any = {"type": "json_schema", "json_schema": {"name": "x", "schema": {"const": "yes"}}}
    actor.says('<think>\nwell {"a"</think>\n\n"yes"')
    [choice] = (
        actor.client()
        .chat.completions.create(model="dense_tied", messages=MESSAGES, response_format=shape)
        .choices
    )
    assert choice.message.content == '"yes"'
    assert choice.message.reasoning_content == 'well {"a"'  # type: ignore[attr-defined]


def test_a_grammar_allows_what_fits_and_nothing_else(model: Model) -> None:
    """Held to a schema, a fitting text is allowed token by token, and its end only at the end."""
    from kvist.grammar import Grammars

    tokenizer = model.require_tokenizer()
    grammars = Grammars(model)
    grammar = grammars.begin(grammars.compile(f"start: %json {json.dumps(SCHEMA)}"))
    ids = tokenizer.encode('{"kind":"a","size":7,"tags":["xy"]}')
    for place, token in enumerate(ids):
        mask = grammars.mask_of(grammar.mask(ids[:place]))
        assert mask[token]
        assert not mask[list(model.eos_token_ids)].any()
    end = grammars.mask_of(grammar.mask(ids))
    assert set(end.nonzero().flatten().tolist()) == model.eos_token_ids
    # Two samples of one request, and one that goes back as a preempted one does.
    assert grammars.mask_of(grammar.mask(ids[:3])).any()
    assert not grammars._masks
    with pytest.raises(kvist.KvistError):
        grammar.mask([*ids[:3], ids[0]])
