"""`/v1/chat/completions`: a chat to its answer, whole or streamed."""

import json
import time
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any
from uuid import uuid4

from fastapi import APIRouter, Request
from fastapi.responses import Response

from kvist.core.results import Delta, TokenLogprob
from kvist.grammar import CompiledGrammar
from kvist.loading.model import Model
from kvist.server.formats import Thinking, calls_source, check_tools, format_source
from kvist.server.generation import Asked, Tally, asked_for, generate
from kvist.server.hermes import CallParser, Part
from kvist.server.outputs import Output, TokenText, token_text, visible
from kvist.server.prompts import chat_prompt, thinking_of
from kvist.server.served import Served, request_id_of, served_by
from kvist.server.sse import DONE, STREAMED, EventStream, Work
from kvist.server.wire.chat import (
    AnswerMessage,
    CallBody,
    ChatAnswer,
    ChatChoice,
    ChatLogprob,
    ChatLogprobs,
    ChatRequest,
    Tool,
    ToolCallBody,
    TopLogprob,
)
from kvist.server.wire.common import UsageBody
from kvist.text.thinking import ThinkingParser

router = APIRouter(tags=["chat"])


@router.post(
    "/v1/chat/completions", response_model=ChatAnswer, responses=STREAMED, operation_id="chat"
)
async def create(body: ChatRequest, request: Request) -> Response:
    """Continue a chat."""
    served = served_by(request)
    chat = await begin(served, body, request_id_of(request, "chatcmpl"))
    if body.stream:
        return EventStream(_stream(served, request, body, chat))

    async def whole() -> str:
        return (await _whole(served, request, chat)).model_dump_json()

    return Work(whole)


@dataclass
class Chat:
    """A chat that is about to be continued."""

    id: str
    model: str
    asked: Asked
    outputs: list[Output]
    tally: Tally
    created: int = field(default_factory=lambda: int(time.time()))

    def usage(self) -> UsageBody:
        """What it has taken so far."""
        return self.tally.usage(sum(output.reasoning_tokens for output in self.outputs))


async def begin(served: Served, body: ChatRequest, name: str) -> Chat:
    """Check everything, and make of a request what the engine takes.

    Raises:
        ApiError: naming the parameter.
    """
    model = served.check_model(body.model)
    served.gate.check(body.n)
    tools = [] if body.tool_choice == "none" else body.tools or []
    check_tools(tools)
    variables = dict(body.chat_template_kwargs or {})
    if body.reasoning_effort == "none":
        variables.setdefault("enable_thinking", False)
    prompt = await chat_prompt(served, body.messages, tools=tools, template=variables)
    thinking = thinking_of(served, prompt)
    grammar = await _grammar(served, body, tools, thinking)
    params = body.sampling_params(
        max_tokens=body.max_completion_tokens or body.max_tokens,
        logprobs=(body.top_logprobs or 0) if body.logprobs else None,
    )
    asked = asked_for(
        served,
        prompt,
        params,
        grammar=grammar,
        priority=body.priority,
        cache_salt=body.cache_salt,
    )
    outputs = [
        Output(ThinkingParser(inside=thinking == "begun"), CallParser() if tools else None)
        for _ in range(body.n)
    ]
    return Chat(name, model, asked, outputs, Tally(len(prompt.token_ids)))


async def _grammar(
    served: Served, body: ChatRequest, tools: list[Tool], thinking: Thinking
) -> CompiledGrammar | None:
    """What the output is held to, made on a worker thread."""
    grammars, several = served.engine.grammars, body.parallel_tool_calls is not False

    def make() -> CompiledGrammar | None:
        source = calls_source(tools, body.tool_choice, thinking, grammars.tag, several=several)
        source = source or format_source(body.response_format, thinking, grammars.tag)
        return None if source is None else grammars.compile(source)

    return await served.aside(make)


async def _whole(served: Served, request: Request, chat: Chat) -> ChatAnswer:
    said: list[list[Part]] = [[] for _ in chat.outputs]
    logprobs: list[list[TokenLogprob]] = [[] for _ in chat.outputs]
    async with aclosing(generate(served, request, chat.id, [chat.asked], chat.tally)) as steps:
        async for news in steps:
            for index, delta in news:
                said[index] += chat.outputs[index].take(delta)
                logprobs[index] += visible(served.model, delta.logprobs)
    with_logprobs = chat.asked.params.logprobs is not None
    return ChatAnswer(
        id=chat.id,
        created=chat.created,
        model=chat.model,
        choices=[
            ChatChoice.model_construct(
                index=index,
                message=message_of(parts),
                logprobs=chat_logprobs(served.model, found) if with_logprobs else None,
                finish_reason=output.finish_reason,
            )
            for index, (output, parts, found) in enumerate(
                zip(chat.outputs, said, logprobs, strict=True)
            )
        ],
        usage=chat.usage(),
    )


def message_of(parts: list[Part]) -> AnswerMessage:
    """The message that an output's parts make."""
    content = "".join(part.text for part in parts if part.kind == "content")
    reasoning = "".join(part.text for part in parts if part.kind == "reasoning")
    calls = [
        ToolCallBody(
            id=new_call_id(),
            function=CallBody(
                name=part.text,
                arguments="".join(
                    p.text for p in parts if p.kind == "arguments" and p.call == part.call
                ),
            ),
        )
        for part in parts
        if part.kind == "call"
    ]
    return AnswerMessage(
        content=None if calls and not content else content,
        reasoning_content=reasoning or None,
        tool_calls=calls or None,
    )


def new_call_id() -> str:
    """A call's name, by which its result comes back."""
    return f"call_{uuid4().hex[:24]}"


def chat_logprobs(model: Model, found: list[TokenLogprob]) -> ChatLogprobs:
    """Log-probabilities in the newer shape."""

    def entry(token: TokenText, logprob: float) -> dict[str, Any]:
        return {"token": token.text, "logprob": max(logprob, -9999.0), "bytes": token.bytes}

    return ChatLogprobs(
        content=[
            ChatLogprob(
                **entry(token_text(model, one.token_id), one.logprob),
                top_logprobs=[
                    TopLogprob(**entry(token_text(model, token), logprob))
                    for token, logprob in one.top
                ],
            )
            for one in found
        ]
    )


async def _stream(
    served: Served, request: Request, body: ChatRequest, chat: Chat
) -> AsyncGenerator[bytes, None]:
    """The answer's chunks: everything that one step brings in one piece."""
    usage = body.stream_options is not None and body.stream_options.include_usage
    chunks = Chunks(chat.id, chat.created, chat.model, usage=usage)
    begun: set[int] = set()
    with_logprobs = chat.asked.params.logprobs is not None
    async with aclosing(generate(served, request, chat.id, [chat.asked], chat.tally)) as steps:
        async for news in steps:
            pieces: list[str] = []
            for index, delta in news:
                if index not in begun:
                    begun.add(index)
                    pieces.append(chunks.one(index, '{"role":"assistant","content":""}'))
                output = chat.outputs[index]
                logprobs = _logprobs_json(served.model, delta) if with_logprobs else "null"
                for part in output.take(delta):
                    pieces.append(chunks.one(index, delta_json(part), logprobs))
                    logprobs = "null"
                if logprobs != "null":
                    pieces.append(chunks.one(index, '{"content":""}', logprobs))
                if delta.result is not None:
                    pieces.append(chunks.one(index, "{}", finish=output.finish_reason))
            if pieces:
                yield "".join(pieces).encode()
    last = chunks.usage(chat.usage()) if usage else ""
    yield last.encode() + DONE


def delta_json(part: Part) -> str:
    """A part as the delta of a chunk."""
    text = json.dumps(part.text, ensure_ascii=False)
    if part.kind == "content":
        return f'{{"content":{text}}}'
    if part.kind == "reasoning":
        return f'{{"reasoning_content":{text}}}'
    if part.kind == "call":
        return (
            f'{{"tool_calls":[{{"index":{part.call},"id":"{new_call_id()}","type":"function",'
            f'"function":{{"name":{text},"arguments":""}}}}]}}'
        )
    return f'{{"tool_calls":[{{"index":{part.call},"function":{{"arguments":{text}}}}}]}}'


def _logprobs_json(model: Model, delta: Delta) -> str:
    found = visible(model, delta.logprobs)
    return chat_logprobs(model, found).model_dump_json() if found else "null"


class Chunks:
    """Writes a stream's chunks: all but a few characters of each are the same."""

    def __init__(
        self,
        name: str,
        created: int,
        model: str,
        *,
        usage: bool,
        kind: str = "chat.completion.chunk",
    ) -> None:
        """With `usage`, every chunk has the field, as OpenAI's have."""
        self._head = (
            f'data: {{"id":{json.dumps(name)},"object":"{kind}","created":{created},'
            f'"model":{json.dumps(model)},"system_fingerprint":null,"choices":['
        )
        self._tail = '],"usage":null}\n\n' if usage else "]}\n\n"

    def one(self, index: int, delta: str, logprobs: str = "null", finish: str | None = None) -> str:
        """A chunk of one choice."""
        reason = "null" if finish is None else f'"{finish}"'
        return (
            f'{self._head}{{"index":{index},"delta":{delta},"logprobs":{logprobs},'
            f'"finish_reason":{reason}}}{self._tail}'
        )

    def text(self, index: int, text: str, logprobs: str, finish: str | None) -> str:
        """A chunk of a completion, which has text instead of a delta."""
        reason = "null" if finish is None else f'"{finish}"'
        return (
            f'{self._head}{{"index":{index},"text":{json.dumps(text, ensure_ascii=False)},'
            f'"logprobs":{logprobs},"finish_reason":{reason}}}{self._tail}'
        )

    def usage(self, usage: UsageBody) -> str:
        """The last chunk, which has no choices."""
        return f'{self._head}],"usage":{usage.model_dump_json()}}}\n\n'
