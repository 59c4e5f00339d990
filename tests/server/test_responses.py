"""OpenAI's newer API: the same answers in items, with the events that its client expects."""

import json
from typing import Any

import openai
import pytest
from openai.types.responses import Response
from running import Running
from scripted import scripted

import kvist
from kvist.loading.model import Model

TOOL: Any = {
    "type": "function",
    "name": "clock",
    "parameters": {"type": "object", "properties": {"zone": {"type": "string"}}},
    "strict": False,
}
SAID = (
    "<think>\nhm, hm\n</think>\n\nLet me see.\n"
    '<tool_call>\n{"name": "clock", "arguments": {"zone": "CET"}}\n</tool_call>'
)


def test_an_answer_is_what_generate_gives(model: Model, client: openai.OpenAI) -> None:
    messages = [
        {"role": "system", "content": "Be brief."},
        {"role": "user", "content": "Say something."},
    ]
    [expected] = kvist.generate(
        model, [messages], kvist.SamplingParams(temperature=0, max_tokens=9)
    )
    answer = client.responses.create(
        model="dense_tied", instructions="Be brief.", input="Say something.", temperature=0,
        max_output_tokens=9,
    )  # fmt: skip
    assert answer.output_text == expected.text
    assert (answer.status, answer.object) == ("incomplete", "response")
    assert answer.incomplete_details is not None
    assert answer.incomplete_details.reason == "max_output_tokens"
    assert answer.usage is not None
    assert answer.usage.input_tokens == expected.usage.prompt_tokens
    assert answer.usage.output_tokens == 9


def test_turns_may_come_as_items(model: Model, server: Running) -> None:
    from kvist.server.wire.responses import ResponsesRequest

    asked = ResponsesRequest.model_validate(
        {
            "model": "x",
            "input": [
                {"role": "user", "content": [{"type": "input_text", "text": "What time is it?"}]},
                {"type": "reasoning", "id": "r", "summary": [],
                 "content": [{"type": "reasoning_text", "text": "hm"}]},
                {"type": "function_call", "id": "f", "call_id": "c", "name": "clock",
                 "arguments": "{}", "status": "completed"},
                {"type": "function_call_output", "call_id": "c", "output": "noon"},
                {"type": "message", "role": "assistant", "status": "completed",
                 "content": [{"type": "output_text", "text": "Noon.", "annotations": []}]},
                {"role": "user", "content": "Thanks."},
            ],
        }
    )  # fmt: skip
    found = [m.model_dump(exclude_none=True) for m in asked.as_chat().messages]
    call = {"id": "c", "type": "function", "function": {"name": "clock", "arguments": "{}"}}
    assert found == [
        {"role": "user", "content": [{"type": "text", "text": "What time is it?"}]},
        {"role": "assistant", "content": "", "reasoning_content": "hm", "tool_calls": [call]},
        {"role": "tool", "content": "noon", "tool_call_id": "c"},
        {"role": "assistant", "content": "Noon."},
        {"role": "user", "content": "Thanks."},
    ]


@pytest.mark.parametrize("stream", [False, True])
def test_thoughts_words_and_calls_are_items(model: Model, stream: bool) -> None:
    with scripted(model) as actor:
        actor.says(SAID)
        asked: dict[str, Any] = {"model": "dense_tied", "input": "Time?", "tools": [TOOL]}
        if not stream:
            answer = actor.client().responses.create(**asked)
        else:
            events = list(actor.client().responses.create(**asked, stream=True))
            assert [event.sequence_number for event in events] == list(range(len(events)))
            kinds = [event.type.removeprefix("response.") for event in events]
            assert [kind for i, kind in enumerate(kinds) if kind != kinds[i - 1]] == [
                "created", "in_progress",
                "output_item.added", "content_part.added", "reasoning_text.delta",
                "reasoning_text.done", "content_part.done", "output_item.done",
                "output_item.added", "content_part.added", "output_text.delta",
                "output_text.done", "content_part.done", "output_item.done",
                "output_item.added", "function_call_arguments.delta",
                "function_call_arguments.done", "output_item.done",
                "completed",
            ]  # fmt: skip
            texts: dict[str, str] = {}
            for event in events:
                if event.type.endswith(".delta"):
                    texts[event.item_id] = texts.get(event.item_id, "") + event.delta  # type: ignore[union-attr]
            last: Any = events[-1]
            answer = last.response
            assert list(texts) == [item.id for item in answer.output]
            assert list(texts.values()) == ["hm, hm", "Let me see.", '{"zone": "CET"}']
    assert isinstance(answer, Response)
    thought, words, call = answer.output
    assert thought.type == "reasoning"
    assert words.type == "message"
    assert call.type == "function_call"
    assert answer.output_text == "Let me see."
    assert json.loads(call.arguments) == {"zone": "CET"}
    assert answer.status == "completed"


def test_an_output_may_be_held_to_a_schema(client: openai.OpenAI) -> None:
    answer = client.responses.create(
        model="dense_tied", input="x", max_output_tokens=80,
        text={"format": {"type": "json_schema", "name": "x", "schema": {"enum": [1, 2]}}},
        extra_body={"chat_template_kwargs": {"enable_thinking": False}},
    )  # fmt: skip
    assert json.loads(answer.output_text) in (1, 2)


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"previous_response_id": "resp_1"}, "previous_response_id"),
        ({"input": []}, "input"),
        ({"input": [{"type": "web_search_call"}]}, "input[0]"),
        ({"tool_choice": {"type": "function", "name": "f"}}, None),
        ({"background": True}, "background"),
        ({"tools": [{"type": "web_search"}]}, "tools[0].type"),
    ],
    ids=str,
)
def test_what_needs_a_memory_or_a_service_is_refused(
    server: Running, body: dict[str, Any], param: str | None
) -> None:
    status, error = server.error("/v1/responses", {"model": "dense_tied", "input": "x"} | body)
    assert status == 400
    assert (error["param"] or "").startswith(param or "")
