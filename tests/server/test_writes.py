"""One write for each request and step, however many prompts and samples it has."""

import asyncio
import json
from typing import Any

import pytest
from running import MEMORY, SIZES

from kvist import AsyncLLM
from kvist.loading.model import Model
from kvist.server.app import create_app
from kvist.server.settings import Settings

ASKED = {
    "/v1/chat/completions": {"n": 5, "messages": [{"role": "user", "content": "x"}]},
    "/v1/completions": {"prompt": ["a", "b", "c", "d", "e"]},
}


@pytest.mark.parametrize("path", ASKED)
def test_a_stream_is_written_once_a_step(model: Model, path: str) -> None:
    steps = 0

    def step(times: object) -> None:
        nonlocal steps
        steps += 1

    async def ask() -> list[bytes]:
        written: list[bytes] = []
        more = {"stream": True, "max_tokens": 20, "seed": 1, "ignore_eos": True}
        body = {"model": "dense_tied", **more, **ASKED[path]}
        messages = [{"type": "http.request", "body": json.dumps(body).encode()}]
        gone = asyncio.Event()

        async def receive() -> Any:
            if not messages:
                await gone.wait()
            return messages.pop()

        async def send(message: Any) -> None:
            if message.get("body"):
                written.append(message["body"])

        headers = [(b"host", b"localhost"), (b"content-type", b"application/json")]
        scope: dict[str, Any] = {
            "type": "http", "http_version": "1.1", "method": "POST", "scheme": "http",
            "path": path, "raw_path": path.encode(), "root_path": "", "query_string": b"",
            "headers": headers,
        }  # fmt: skip
        async with AsyncLLM(model, cache_memory=MEMORY, **SIZES) as engine:
            app = create_app(engine, Settings(ui=False))
            engine.on_step(step)
            await app(scope, receive, send)
        return written

    written = asyncio.run(asyncio.wait_for(ask(), 30))
    assert 20 <= steps <= 24
    assert len(written) <= steps + 1  # and the end
    events = b"".join(written).count(b"data: {")
    assert events > 3 * steps  # of several outputs each
