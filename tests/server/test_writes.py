"""One write for each request and step, however many samples it has and however late it is read."""

import asyncio
import json
from typing import Any

from running import MEMORY, SIZES

from kvist import AsyncLLM
from kvist.loading.model import Model
from kvist.server.app import create_app
from kvist.server.settings import Settings


def test_a_stream_is_written_once_a_step(model: Model) -> None:
    steps = 0

    def step(times: object) -> None:
        nonlocal steps
        steps += 1

    async def ask() -> list[bytes]:
        written: list[bytes] = []
        body = {
            "model": "dense_tied", "stream": True, "n": 5, "max_tokens": 20, "seed": 1,
            "ignore_eos": True, "messages": [{"role": "user", "content": "x"}],
        }  # fmt: skip
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if not messages:
                await gone.wait()
            return messages.pop()

        async def send(message: Any) -> None:
            if message.get("body"):
                written.append(message["body"])

        scope: dict[str, Any] = {
            "type": "http", "method": "POST", "path": "/v1/chat/completions", "query_string": b"",
            "raw_path": b"/v1/chat/completions", "root_path": "", "scheme": "http",
            "headers": [(b"content-type", b"application/json")], "http_version": "1.1",
        }  # fmt: skip
        async with AsyncLLM(model, cache_memory=MEMORY, **SIZES) as engine:
            app = create_app(engine, Settings(ui=False))
            engine.on_step(step)
            await app(scope, receive, send)
        return written

    written = asyncio.run(asyncio.wait_for(ask(), 30))
    assert 20 <= steps <= 22
    assert len(written) <= steps + 1  # and the end
    events = b"".join(written).count(b"data: {")
    assert events > 3 * steps  # of several samples each
