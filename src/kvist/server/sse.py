"""Answers that take their time: they are made while the client waits, and left when it goes.

`Work` runs a coroutine to its answer, `EventStream` an iterator of server-sent events. Both watch
for the client's leaving and cancel what they run, so that the engine frees its blocks within a
step. What is raised before the first byte becomes a proper error; after it, an event.
"""

import asyncio
import json
import logging
from collections.abc import AsyncGenerator, Awaitable, Callable, Coroutine
from contextlib import aclosing, suppress
from typing import Any

from starlette.responses import Response
from starlette.types import Receive, Scope, Send

from kvist.errors import KvistError
from kvist.server.errors import ApiError, refused

log = logging.getLogger("kvist.server")

DONE = b"data: [DONE]\n\n"
# For an endpoint's description: what it answers where a stream was asked for.
STREAMED: dict[int | str, dict[str, Any]] = {200: {"content": {"text/event-stream": {}}}}


async def while_connected(receive: Receive, work: Coroutine[Any, Any, None]) -> None:
    """Run until it is done or nobody listens any more; what it raises is raised here."""
    task = asyncio.ensure_future(work)
    leaving = asyncio.ensure_future(_disconnected(receive))
    try:
        await asyncio.wait((task, leaving), return_when=asyncio.FIRST_COMPLETED)
    finally:
        leaving.cancel()
        if not task.done():
            task.cancel()
            with suppress(asyncio.CancelledError):
                await task
    if not task.cancelled():
        task.result()


async def _disconnected(receive: Receive) -> None:
    while (await receive())["type"] != "http.disconnect":
        pass


class Work(Response):
    """A JSON answer that `make` still has to come up with."""

    def __init__(self, make: Callable[[], Awaitable[str | bytes]]) -> None:
        """Nothing is done before the server calls the response."""
        super().__init__()
        self._make = make

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Make the answer and send it."""

        async def work() -> None:
            answer = await self._make()
            done = Response(answer, media_type="application/json")
            await done(scope, receive, send)

        await while_connected(receive, work())


class EventStream(Response):
    """Server-sent events: each item of `events` is written at once, as it is."""

    media_type = "text/event-stream"

    def __init__(self, events: AsyncGenerator[bytes, None]) -> None:
        """Take events that are encoded already."""
        super().__init__(headers={"Cache-Control": "no-store", "X-Accel-Buffering": "no"})
        del self.headers["content-length"]
        self._events = events

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """Send until the events or the client end."""
        await while_connected(receive, self._write(send))

    async def _write(self, send: Send) -> None:
        started = False
        try:
            async with aclosing(self._events) as events:
                async for event in events:
                    if not started:
                        started = True
                        await self._start(send)
                    await send({"type": "http.response.body", "body": event, "more_body": True})
        except Exception as error:
            if not started:
                raise
            await send(
                {"type": "http.response.body", "body": _error_event(error), "more_body": True}
            )
        if not started:
            await self._start(send)
        await send({"type": "http.response.body", "body": b"", "more_body": False})

    async def _start(self, send: Send) -> None:
        await send(
            {
                "type": "http.response.start",
                "status": self.status_code,
                "headers": self.raw_headers,
            }
        )


def _error_event(error: Exception) -> bytes:
    if isinstance(error, KvistError):
        error = refused(error)
    if not isinstance(error, ApiError):
        log.error("a stream has failed", exc_info=error)
        error = ApiError(500, "the server has failed at this; its log says how")
    return b"data: " + json.dumps(error.body()).encode() + b"\n\n"
