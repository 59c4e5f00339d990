"""Sends every call when it is due and takes down when what came back.

Nothing here waits for the server before the next call goes out, but for later turns of the same
conversation, which need the answer before them. How late the generator itself was is measured too:
a machine that is too slow to send on time measures itself.
"""

import asyncio
import json
import time
from collections.abc import Sequence
from contextlib import aclosing
from dataclasses import dataclass, field
from typing import Any, Literal

from kvist.loadgen.client import Client, HttpError
from kvist.loadgen.workload import Call, by_conversation

Api = Literal["chat", "completions"]
HEAD_START = 0.05  # seconds from the beginning to the first due time, for tasks to get ready


@dataclass(frozen=True)
class Target:
    """How a server is asked.

    Args:
        model: the name that it goes by.
        api: chat completions, or completions of plain text.
        ignore_eos: ask for answers of full length; kvist, vLLM and SGLang understand it.
        timeout: seconds after which a request counts as failed.
        extra: further fields of every request's body.
    """

    model: str
    api: Api = "chat"
    ignore_eos: bool = False
    timeout: float = 600.0
    extra: dict[str, Any] = field(default_factory=dict)


@dataclass(slots=True)
class Outcome:
    """What came of one call; times are in seconds after the start.

    Args:
        due: when it was to be sent: as planned, or when the answer that it follows was there.
        sent: when it was.
        events: when each piece of the answer arrived.
        end: when it was over, well or not.
        prompt_tokens: as the server counts; 0 if it does not say.
        cached_tokens: those of them that the server had already.
        output_tokens: as the server counts, else the pieces.
        status: 200, another HTTP status, or 0 for no (whole) answer.
        error: why it failed.
    """

    conversation: int
    turn: int
    due: float
    sent: float = 0.0
    events: list[float] = field(default_factory=list)
    end: float = 0.0
    prompt_tokens: int = 0
    cached_tokens: int = 0
    output_tokens: int = 0
    status: int = 0
    error: str | None = None

    @property
    def ok(self) -> bool:
        """Whether an answer came, whole."""
        return self.error is None


async def drive(client: Client, target: Target, calls: Sequence[Call]) -> list[Outcome]:
    """Send all calls, each when it is due; returns what came of them in order of due time."""
    start = time.perf_counter() + HEAD_START
    conversations = [
        asyncio.create_task(_converse(client, target, turns, start))
        for turns in by_conversation(calls)
    ]
    try:
        done = await asyncio.gather(*conversations)
    finally:
        for task in conversations:
            task.cancel()
    return sorted((one for turns in done for one in turns), key=lambda one: one.due)


async def find_model(client: Client) -> str:
    """The first model that the server lists; raises HttpError."""
    listed = await client.get("/v1/models")
    try:
        return str(listed["data"][0]["id"])
    except (KeyError, IndexError, TypeError):
        raise HttpError(200, "the server lists no model; name one with --model") from None


async def _converse(
    client: Client, target: Target, turns: Sequence[Call], start: float
) -> list[Outcome]:
    """All turns of one conversation; what follows a failed one is not sent."""
    said: list[dict[str, str]] = []
    if turns[0].system:
        said.append({"role": "system", "content": turns[0].system})
    outcomes: list[Outcome] = []
    free = 0.0  # when the answer before was there
    for call in turns:
        outcome = Outcome(call.conversation, call.turn, due=max(call.at, free))
        await asyncio.sleep(start + outcome.due - time.perf_counter())
        said.append({"role": "user", "content": call.text})
        outcome.sent = time.perf_counter() - start
        text: list[str] = []
        try:
            async with asyncio.timeout(target.timeout):
                await _one(client, target, call, said, outcome, text, start)
            outcome.status = 200
        except TimeoutError:
            outcome.error = f"no whole answer within {target.timeout:g} s"
        except HttpError as error:
            outcome.status, outcome.error = error.status, str(error)
        outcome.end = free = time.perf_counter() - start
        outcomes.append(outcome)
        if not outcome.ok:
            break
        said.append({"role": "assistant", "content": "".join(text)})
    return outcomes


async def _one(
    client: Client,
    target: Target,
    call: Call,
    said: list[dict[str, str]],
    outcome: Outcome,
    text: list[str],
    start: float,
) -> None:
    body: dict[str, Any] = {
        "model": target.model,
        "max_tokens": call.max_tokens,
        "stream": True,
        "stream_options": {"include_usage": True},
        **({"ignore_eos": True} if target.ignore_eos else {}),
        **target.extra,
    }
    if target.api == "chat":
        path = "/v1/chat/completions"
        body["messages"] = said
    else:
        path = "/v1/completions"
        body["prompt"] = "\n".join(message["content"] for message in said)
    async with aclosing(client.events(path, body)) as events:
        async for data in events:
            now = time.perf_counter() - start
            if data == "[DONE]":
                continue
            try:
                piece = _piece(json.loads(data), outcome)
            except (ValueError, AttributeError, KeyError, TypeError) as error:
                raise HttpError(0, f"an event that is not OpenAI's: {data[:120]}") from error
            if piece is not None:
                outcome.events.append(now)
                text.append(piece)
    if not outcome.output_tokens:
        outcome.output_tokens = len(outcome.events)
    if not outcome.events:
        raise HttpError(0, "an answer without a token")


def _piece(chunk: dict[str, Any], outcome: Outcome) -> str | None:
    """The text that a chunk adds, None if it adds no token; takes down the usage."""
    if "error" in chunk:
        raise HttpError(0, str(chunk["error"].get("message", chunk["error"])))
    if usage := chunk.get("usage"):
        outcome.prompt_tokens = usage.get("prompt_tokens", 0)
        outcome.output_tokens = usage.get("completion_tokens", 0)
        details = usage.get("prompt_tokens_details") or {}
        outcome.cached_tokens = details.get("cached_tokens") or 0
    for choice in chunk.get("choices", ()):
        delta = choice.get("delta")
        if delta is None:
            text = choice.get("text")
            # A last chunk that only says why it ended brings no token.
            return None if not text and choice.get("finish_reason") else text
        thought = delta.get("reasoning_content")
        content = delta.get("content")
        if content or thought or delta.get("tool_calls"):
            return content or ""
    return None
