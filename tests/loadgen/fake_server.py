"""A server that speaks as much of OpenAI's API as a load generator asks, slow as it is told."""

import asyncio
import json
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any


@dataclass
class Behaviour:
    """How it answers.

    Args:
        first: seconds until the first token.
        gap: seconds between tokens.
        tokens: of an answer at most; None: as many as are asked for.
        status: of every answer.
        break_off: close the connection after so many tokens.
        cached: tokens of the prompt that count as cached.
        usage: whether the last chunk tells it.
        one_at_a_time: whether requests wait for each other.
        close: whether a connection serves one request only.
    """

    first: float = 0.0
    gap: float = 0.0
    tokens: int | None = None
    status: int = 200
    break_off: int | None = None
    cached: int = 0
    usage: bool = True
    one_at_a_time: bool = False
    close: bool = False


@dataclass
class FakeServer:
    """Where it is, and what it was asked."""

    url: str
    behaviour: Behaviour
    asked: list[dict[str, Any]] = field(default_factory=list)
    headers: list[dict[str, str]] = field(default_factory=list)
    connections: int = 0


class _Broken(Exception):
    pass


@contextmanager
def serving(**behaviour: Any) -> Iterator[FakeServer]:
    """Run one on a thread of its own."""
    loop = asyncio.new_event_loop()
    fake = FakeServer("", Behaviour(**behaviour))
    ready = threading.Event()

    async def begin() -> asyncio.Server:
        lock = asyncio.Lock()
        server = await asyncio.start_server(lambda r, w: _serve(fake, lock, r, w), "127.0.0.1", 0)
        fake.url = f"http://127.0.0.1:{server.sockets[0].getsockname()[1]}"
        ready.set()
        return server

    def work() -> None:
        asyncio.set_event_loop(loop)
        server = loop.run_until_complete(begin())
        loop.run_forever()
        server.close()
        for task in asyncio.all_tasks(loop):
            task.cancel()
        loop.run_until_complete(asyncio.sleep(0))
        loop.close()

    thread = threading.Thread(target=work)
    thread.start()
    assert ready.wait(10)
    try:
        yield fake
    finally:
        loop.call_soon_threadsafe(loop.stop)
        thread.join()


async def _serve(
    fake: FakeServer, lock: asyncio.Lock, reader: asyncio.StreamReader, writer: asyncio.StreamWriter
) -> None:
    fake.connections += 1
    try:
        while True:
            head = (await reader.readuntil(b"\r\n\r\n")).decode().split("\r\n")
            pairs = [line.split(": ", 1) for line in head[1:] if line]
            headers = {name.lower(): value for name, value in pairs}
            body = await reader.readexactly(int(headers.get("content-length", 0)))
            fake.headers.append(headers)
            path = head[0].split()[1]
            if path == "/v1/models":
                _whole(writer, 200, {"data": [{"id": "fake-1"}]})
                continue
            asked = json.loads(body)
            fake.asked.append(asked | {"path": path})
            if fake.behaviour.status != 200:
                _whole(writer, fake.behaviour.status, {"error": {"message": "too much"}})
                continue
            if fake.behaviour.one_at_a_time:
                async with lock:
                    await _answer(fake.behaviour, writer, asked, "chat" in path)
            else:
                await _answer(fake.behaviour, writer, asked, "chat" in path)
            if fake.behaviour.close:
                return
    except (asyncio.IncompleteReadError, ConnectionError, _Broken):
        pass
    finally:
        writer.close()


def _whole(writer: asyncio.StreamWriter, status: int, told: dict[str, Any]) -> None:
    body = json.dumps(told).encode()
    writer.write(f"HTTP/1.1 {status} X\r\nContent-Length: {len(body)}\r\n\r\n".encode() + body)


async def _answer(
    how: Behaviour, writer: asyncio.StreamWriter, asked: dict[str, Any], chat: bool
) -> None:
    async def send(told: dict[str, Any] | str) -> None:
        data = told if isinstance(told, str) else json.dumps(told)
        part = f"data: {data}\n\n".encode()
        writer.write(f"{len(part):x}\r\n".encode() + part + b"\r\n")
        await writer.drain()

    connection = "close" if how.close else "keep-alive"
    head = f"HTTP/1.1 200 OK\r\nTransfer-Encoding: chunked\r\nConnection: {connection}\r\n\r\n"
    writer.write(head.encode())
    count = min(how.tokens or asked["max_tokens"], asked["max_tokens"])
    if chat:
        await send({"choices": [{"delta": {"role": "assistant", "content": ""}}]})
    await asyncio.sleep(how.first)
    for i in range(count):
        if i == how.break_off:
            raise _Broken
        piece = {"delta": {"content": f"w{i} "}} if chat else {"text": f"w{i} "}
        await send({"choices": [piece]})
        if i + 1 < count:
            await asyncio.sleep(how.gap)
    end = {"delta": {}} if chat else {"text": ""}
    await send({"choices": [end | {"finish_reason": "length"}]})
    if how.usage:
        text = asked.get("prompt") or " ".join(m["content"] for m in asked["messages"])
        usage = {"prompt_tokens": len(text.split()), "completion_tokens": count}
        details = {"prompt_tokens_details": {"cached_tokens": how.cached}}
        await send({"choices": [], "usage": usage | details})
    await send("[DONE]")
    writer.write(b"0\r\n\r\n")
