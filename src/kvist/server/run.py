"""Running the application: uvicorn, signals, and exit codes.

SIGTERM or Ctrl-C drains: what runs is finished, what comes is refused, exit code 0. A second one
stops at once. An engine that has died takes the process with it, exit code 1, so that whoever
supervises it can start another.
"""

import asyncio
import logging
import os
import signal
import socket
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType
from typing import Any

import uvicorn
from fastapi import FastAPI

from kvist.server.logs import FIELDS
from kvist.server.served import Served
from kvist.server.settings import Settings

log = logging.getLogger("kvist.server")

WATCH = 0.2  # seconds between looks at the engine
FAREWELL = 5.0  # seconds for clients of a dead engine to be told


class Server(uvicorn.Server):
    """uvicorn's, with signals of our own and an eye on the engine."""

    def __init__(self, app: FastAPI, settings: Settings) -> None:
        """Prepare to serve; nothing listens yet."""
        super().__init__(_config(app, settings))
        served = app.state.served
        assert isinstance(served, Served)
        self.served = served
        self._drain_timeout = settings.drain_timeout

    @property
    def url(self) -> str:
        """Where it listens."""
        host, port = self.servers[0].sockets[0].getsockname()[:2]
        scheme = "https" if self.config.is_ssl else "http"
        return f"{scheme}://{f'[{host}]' if ':' in host else host}:{port}"

    async def startup(self, sockets: list[socket.socket] | None = None) -> None:
        """Begin to listen, and say where."""
        await super().startup(sockets)
        if self.started:
            fields = {"url": self.url, "model": self.served.names[0]}
            log.info("listening", extra={FIELDS: fields})

    def drain(self) -> None:
        """Finish what runs and refuse what comes, then end."""
        self.served.gate.draining.set()
        self.should_exit = True

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """SIGTERM and Ctrl-C end well the first time; uvicorn's own way would raise them again."""
        try:
            before = {
                number: signal.signal(number, self.handle_exit)
                for number in (signal.SIGINT, signal.SIGTERM)
            }
        except ValueError:  # not the main thread: whoever runs us has the signals
            yield
            return
        try:
            yield
        finally:
            for number, handler in before.items():
                signal.signal(number, handler)

    def handle_exit(self, sig: int, frame: FrameType | None) -> None:
        """What a signal does."""
        if self.should_exit:
            log.warning("stopped at once")
            sys.stderr.flush()
            os._exit(130)
        self.drain()

    async def main_loop(self) -> None:
        """Uvicorn's loop, which also ends when the engine does."""
        watch = asyncio.create_task(self._watch())
        try:
            await super().main_loop()
        finally:
            watch.cancel()
        log.info("draining", extra={FIELDS: {"outputs": self.served.gate.samples}})

    async def _watch(self) -> None:
        while self.served.engine.alive:
            await asyncio.sleep(WATCH)
        log.critical("the engine has ended; the server ends with it")
        self.config.timeout_graceful_shutdown = int(FAREWELL)
        self.drain()


def serve(app: FastAPI, settings: Settings) -> int:
    """Serve until told to stop; returns the exit code."""
    server = Server(app, settings)
    engine = server.served.engine
    try:
        server.run()
    except SystemExit:  # it could not start, and has said why
        engine.close()
        return 1
    died = not engine.alive
    engine.close()
    return 1 if died or not server.started else 0


def _config(app: FastAPI, settings: Settings) -> uvicorn.Config:
    options: dict[str, Any] = {
        name: getattr(settings, name)
        for name in ("ssl_certfile", "ssl_keyfile", "ssl_keyfile_password")
        if getattr(settings, name) is not None
    }
    if settings.ssl_ca_certs is not None:
        import ssl

        options |= {"ssl_ca_certs": str(settings.ssl_ca_certs), "ssl_cert_reqs": ssl.CERT_REQUIRED}
    return uvicorn.Config(
        app,
        host=settings.host,
        port=settings.port,
        root_path=settings.root_path,
        log_config=None,
        access_log=False,
        server_header=False,
        timeout_keep_alive=30,
        lifespan="on",
        timeout_graceful_shutdown=int(settings.drain_timeout),
        **options,
    )
