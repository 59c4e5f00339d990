"""The command as a process: it drains, it stops at once, and it dies with its engine."""

import json
import os
import re
import signal
import subprocess
import sys
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import httpx
import pytest
from running import LIMIT, MEMORY, SIZES

from kvist import AsyncLLM
from kvist.loading.model import Model
from kvist.server.app import create_app
from kvist.server.run import Server, serve
from kvist.server.settings import Settings
from tiny_models import FIXTURES

BODY: dict[str, Any] = {
    "model": "dense_tied",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 300,
    "ignore_eos": True,
    "stream": True,
}


@contextmanager
def command(*arguments: str) -> Iterator[tuple[subprocess.Popen[str], str, IO[str]]]:
    """`kvist serve`, where it listens, and its log."""
    model = str(FIXTURES / "qwen3" / "dense_tied")
    process = subprocess.Popen(
        [sys.executable, "-m", "kvist", "serve", model, "--port", "0", "--cache-memory", "24MiB",
         *arguments],
        stderr=subprocess.PIPE,
        text=True,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert process.stderr is not None
    try:
        line = process.stderr.readline()
        [url] = re.findall(r"http://[\d.:]+", line) or [line]
        yield process, url, process.stderr
    finally:
        process.kill()
        process.wait()


def until_refused(url: str) -> None:
    """Wait until it no longer listens."""
    for _ in range(1000):
        try:
            httpx.get(f"{url}/health", timeout=1)
        except httpx.ConnectError:
            return
    raise AssertionError("it still listens")


def test_sigterm_finishes_what_runs_refuses_what_comes_and_exits_0() -> None:
    with command() as (process, url, log), httpx.Client(base_url=url, timeout=LIMIT) as http:
        assert http.get("/ready").json() == {"status": "ready"}
        with http.stream("POST", "/v1/chat/completions", json=BODY) as answer:
            lines = answer.iter_lines()
            next(lines)
            process.send_signal(signal.SIGTERM)
            until_refused(url)
            rest = [line for line in lines if line]
        assert rest[-1] == "data: [DONE]"
        assert (
            json.loads(rest[-2].removeprefix("data: "))["choices"][0]["finish_reason"] == "length"
        )
        assert process.wait(LIMIT) == 0
        written = [json.loads(line) for line in log]
    [request] = [line for line in written if line.get("path") == "/v1/chat/completions"]
    assert request["output_tokens"] == 300
    assert any(line["message"] == "draining" for line in written)


def test_a_second_ctrl_c_stops_at_once() -> None:
    with command("--log-format", "text") as (process, url, log):
        with (
            httpx.Client(base_url=url, timeout=LIMIT) as http,
            http.stream("POST", "/v1/chat/completions", json=BODY | {"max_tokens": 1000}) as answer,
        ):
            next(answer.iter_lines())
            process.send_signal(signal.SIGINT)
            until_refused(url)
            process.send_signal(signal.SIGINT)
            assert process.wait(LIMIT) == 130
        assert "stopped at once" in log.read()


class Failing:
    """A step that works until it is told not to."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.step = engine._engine.runner.step
        self.fails = False
        engine._engine.runner.step = self

    def __call__(self, batch: Any, cache: Any) -> Any:
        if self.fails:
            raise RuntimeError("the device is gone")
        return self.step(batch, cache)


def test_a_dead_engine_is_not_ready_and_ends_the_server(
    model: Model, monkeypatch: pytest.MonkeyPatch
) -> None:
    engine = AsyncLLM(model, cache_memory=MEMORY, **SIZES)
    step = Failing(engine)
    settings = Settings(port=0, ui=False)
    started: list[Server] = []
    begin = Server.startup

    async def startup(self: Server, sockets: Any = None) -> None:
        await begin(self, sockets)
        started.append(self)

    monkeypatch.setattr(Server, "startup", startup)
    monkeypatch.setattr("kvist.server.run.WATCH", 0.5)
    codes: list[int] = []
    thread = threading.Thread(
        target=lambda: codes.append(serve(create_app(engine, settings), settings))
    )
    thread.start()
    while not started:
        thread.join(0.01)
        assert thread.is_alive()
    url = started[0].url
    with httpx.Client(base_url=url, timeout=LIMIT) as http:
        assert http.get("/ready").status_code == 200
        with http.stream("POST", "/v1/chat/completions", json=BODY) as answer:
            lines = answer.iter_lines()
            next(lines)
            step.fails = True
            last = [line for line in lines if line][-1]
        error = json.loads(last.removeprefix("data: "))["error"]
        assert error["code"] == "engine_dead"
        assert "the device is gone" in error["message"]
        refused = http.get("/ready")
        assert refused.status_code == 503
        assert "the engine has ended" in refused.json()["status"]
        assert http.get("/health").status_code == 200
        assert http.get("/metrics").status_code == 200
    thread.join(LIMIT)
    assert codes == [1]


def test_a_port_in_use_is_said_in_a_line(tmp_path: Path) -> None:
    import socket

    with socket.create_server(("127.0.0.1", 0)) as taken:
        port = str(taken.getsockname()[1])
        done = subprocess.run(
            [sys.executable, "-m", "kvist", "serve", str(FIXTURES / "qwen3" / "dense_tied"),
             "--port", port, "--cache-memory", "8MiB"],
            capture_output=True, text=True, timeout=LIMIT, check=False,
        )  # fmt: skip
    assert done.returncode == 1
    assert "Traceback" not in done.stderr
    assert "address already in use" in done.stderr


def test_an_open_page_does_not_keep_the_server_from_stopping() -> None:
    with (
        command() as (process, url, _),
        httpx.stream("GET", f"{url}/v1/cache/events", timeout=LIMIT) as events,
    ):
        next(events.iter_lines())
        process.send_signal(signal.SIGTERM)
        assert process.wait(LIMIT) == 0
