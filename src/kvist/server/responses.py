"""`/v1/responses`: OpenAI's newer API, as far as it keeps no state.

A request becomes a chat; what the chat's output brings becomes items and events. Nothing is stored,
so earlier turns come with each request, as `store=False` clients send them.
"""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from typing import Any

from fastapi import APIRouter, Request
from fastapi.exceptions import RequestValidationError
from fastapi.responses import Response
from pydantic import ValidationError

from kvist.server.chat import Chat, begin, new_call_id
from kvist.server.errors import ApiError
from kvist.server.generation import generate
from kvist.server.hermes import Part
from kvist.server.served import Served, request_id_of, served_by
from kvist.server.sse import STREAMED, EventStream, Work
from kvist.server.wire.responses import ResponsesRequest

router = APIRouter(tags=["responses"])


@router.post(
    "/v1/responses", response_model=dict[str, Any], responses=STREAMED, operation_id="respond"
)
async def create(body: ResponsesRequest, request: Request) -> Response:
    """Answer, without remembering."""
    served = served_by(request)
    try:
        chat = await begin(served, body.as_chat(), request_id_of(request, "resp"))
    except ValidationError as error:
        raise RequestValidationError(error.errors()) from error
    answer = _Answer(body, chat)
    if body.stream:
        return EventStream(_stream(served, request, answer))

    async def whole() -> str:
        async with aclosing(_events(served, request, answer)) as events:
            async for _ in events:
                pass
        return json.dumps(answer.body(), ensure_ascii=False)

    return Work(whole)


async def _stream(
    served: Served, request: Request, answer: "_Answer"
) -> AsyncGenerator[bytes, None]:
    number = 0
    try:
        async with aclosing(_events(served, request, answer)) as steps:
            async for events in steps:
                written = []
                for event in events:
                    event["sequence_number"] = number
                    number += 1
                    data = json.dumps(event, ensure_ascii=False)
                    written.append(f"event: {event['type']}\ndata: {data}\n\n")
                if written:
                    yield "".join(written).encode()
    except ApiError as error:
        if not number:
            raise
        event = {"type": "error", "message": str(error), "code": error.code, "param": error.param}
        data = json.dumps(event | {"sequence_number": number})
        yield f"event: error\ndata: {data}\n\n".encode()


async def _events(
    served: Served, request: Request, answer: "_Answer"
) -> AsyncGenerator[list[dict[str, Any]], None]:
    """What each step brings, as events."""
    chat = answer.chat
    [output] = chat.outputs
    async with aclosing(generate(served, request, chat.id, [chat.asked], chat.tally)) as steps:
        async for news in steps:
            events: list[dict[str, Any]] = answer.opening()
            for _, delta in news:
                for part in output.take(delta):
                    events += answer.take(part)
            if output.result is not None:
                events += answer.closing(output.finish_reason)
            yield events


class _Answer:
    """A response in the making: its items, the last of which may still grow."""

    def __init__(self, body: ResponsesRequest, chat: Chat) -> None:
        self.chat = chat
        self._asked = body
        self._status = "in_progress"
        self._begun = False
        self._items: list[dict[str, Any]] = []
        self._part: dict[str, Any] | None = None  # of the last item, growing

    def body(self) -> dict[str, Any]:
        """The response, as it stands."""
        asked, usage = self._asked, self.chat.usage()
        return {
            "id": self.chat.id,
            "object": "response",
            "created_at": self.chat.created,
            "completed_at": None if self._status == "in_progress" else int(time.time()),
            "status": self._status,
            "error": None,
            "incomplete_details": {"reason": "max_output_tokens"}
            if self._status == "incomplete"
            else None,
            "instructions": asked.instructions,
            "max_output_tokens": asked.max_output_tokens,
            "model": self.chat.model,
            "output": self._items,
            "parallel_tool_calls": asked.parallel_tool_calls is not False,
            "previous_response_id": None,
            "reasoning": {"effort": asked.reasoning and asked.reasoning.effort, "summary": None},
            "store": False,
            "temperature": asked.temperature,
            "text": {"format": {"type": "text"}}
            if asked.text is None
            else asked.text.model_dump(exclude_none=True, by_alias=True),
            "tool_choice": "auto"
            if asked.tool_choice is None
            else asked.tool_choice
            if isinstance(asked.tool_choice, str)
            else asked.tool_choice.model_dump(),
            "tools": [tool.model_dump() for tool in asked.tools or ()],
            "top_p": asked.top_p,
            "truncation": "disabled",
            "usage": {
                "input_tokens": usage.prompt_tokens,
                "input_tokens_details": usage.prompt_tokens_details.model_dump(),
                "output_tokens": usage.completion_tokens,
                "output_tokens_details": {
                    "reasoning_tokens": sum(o.reasoning_tokens for o in self.chat.outputs)
                },
                "total_tokens": usage.total_tokens,
            },
            "user": asked.user,
            "metadata": asked.metadata or {},
        }

    def opening(self) -> list[dict[str, Any]]:
        """Events before the first; none later."""
        if self._begun:
            return []
        self._begun = True
        started = self.body() | {"usage": None}
        return [
            {"type": "response.created", "response": started},
            {"type": "response.in_progress", "response": started},
        ]

    def take(self, part: Part) -> list[dict[str, Any]]:
        """A part's events: its item and place are opened if need be."""
        match part.kind:
            case "content":
                events = self._open("message")
                self._grow(part.text)
                return [*events, self._event("response.output_text.delta", part, logprobs=[])]
            case "reasoning":
                events = self._open("reasoning")
                self._grow(part.text)
                return [*events, self._event("response.reasoning_text.delta", part)]
            case "call":
                return self._close() + self._open_call(part)
            case "arguments":
                self._items[-1]["arguments"] += part.text
                return [self._event("response.function_call_arguments.delta", part)]

    def closing(self, reason: str) -> list[dict[str, Any]]:
        """The last events."""
        events = self._close()
        self._status = "incomplete" if reason == "length" else "completed"
        return [*events, {"type": f"response.{self._status}", "response": self.body()}]

    def _open(self, kind: str) -> list[dict[str, Any]]:
        if self._items and self._part is not None and self._items[-1]["type"] == kind:
            return []
        events = self._close()
        item: dict[str, Any] = {"id": f"{_PREFIXES[kind]}_{len(self._items)}_{self.chat.id[5:]}"}
        item |= {"type": kind, "status": "in_progress", "content": []}
        if kind == "message":
            item["role"] = "assistant"
            part: dict[str, Any] = {
                "type": "output_text", "text": "", "annotations": [], "logprobs": [],
            }  # fmt: skip
        else:
            item["summary"] = []
            part = {"type": "reasoning_text", "text": ""}
        self._items.append(item)
        place = {"output_index": len(self._items) - 1, "item": _copy(item)}
        events.append({"type": "response.output_item.added", **place})
        self._part = part
        item["content"].append(part)
        events.append(self._placed("response.content_part.added", part=dict(part)))
        return events

    def _open_call(self, part: Part) -> list[dict[str, Any]]:
        self._items.append(
            {
                "id": f"fc_{len(self._items)}_{self.chat.id[5:]}",
                "type": "function_call",
                "status": "in_progress",
                "call_id": new_call_id(),
                "name": part.text,
                "arguments": "",
            }
        )
        place = {"output_index": len(self._items) - 1, "item": _copy(self._items[-1])}
        return [{"type": "response.output_item.added", **place}]

    def _close(self) -> list[dict[str, Any]]:
        """The last item has all that it gets."""
        if not self._items or self._items[-1]["status"] == "completed":
            return []
        item, events = self._items[-1], []
        item["status"] = "completed"
        if item["type"] == "function_call":
            done = {"arguments": item["arguments"], "name": item["name"]}
            events.append(self._placed("response.function_call_arguments.done", **done))
        else:
            assert self._part is not None
            kind = self._part["type"]
            rest: dict[str, Any] = {"logprobs": []} if kind == "output_text" else {}
            text = self._part["text"]
            events.append(self._placed(f"response.{kind}.done", text=text, **rest))
            events.append(self._placed("response.content_part.done", part=dict(self._part)))
        place = {"output_index": len(self._items) - 1, "item": _copy(item)}
        events.append({"type": "response.output_item.done", **place})
        self._part = None
        return events

    def _grow(self, text: str) -> None:
        assert self._part is not None
        self._part["text"] += text

    def _event(self, kind: str, part: Part, **rest: Any) -> dict[str, Any]:
        return self._placed(kind, delta=part.text, **rest)

    def _placed(self, kind: str, **rest: Any) -> dict[str, Any]:
        item = self._items[-1]
        event = {"type": kind, "item_id": item["id"], "output_index": len(self._items) - 1}
        if item["type"] != "function_call":
            event["content_index"] = 0
        return event | rest


_PREFIXES = {"message": "msg", "reasoning": "rs"}


def _copy(item: dict[str, Any]) -> dict[str, Any]:
    """An item as it is now: events are written after it may have grown."""
    copied = dict(item)
    if "content" in copied:
        copied["content"] = [dict(part) for part in copied["content"]]
    return copied
