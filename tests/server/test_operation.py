"""What an operator relies on: keys, tenants, limits, time, leaving clients, logs."""

import json
import logging
import socket
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import httpx
import openai
import pytest
from running import LIMIT, MEMORY, SIZES, Running, running

from kvist import AsyncLLM
from kvist.errors import ConfigError
from kvist.loading.model import Model
from kvist.server.logs import JSONLines, PlainLines
from kvist.server.settings import Settings
from kvist.server.tenants import KeyRing

CHAT = "/v1/chat/completions"
BODY: dict[str, Any] = {
    "model": "dense_tied",
    "messages": [{"role": "user", "content": "A question of some length, for a block or two."}],
    "max_tokens": 4,
    "temperature": 0,
}
LONG = BODY | {"max_tokens": 900, "ignore_eos": True}
ONE, TWO = {"Authorization": "Bearer key-of-one-tenant"}, {"Authorization": "Bearer key-of-another"}


class Gated:
    """A step that waits to be let through, so that a test says how far the engine is."""

    def __init__(self, engine: AsyncLLM) -> None:
        self.runner = engine._engine.runner
        self.step = self.runner.step
        self.gate = threading.Semaphore(0)
        self.calls = 0
        self.runner.step = self

    def __call__(self, batch: Any, cache: Any) -> Any:
        assert self.gate.acquire(timeout=LIMIT)
        self.calls += 1
        return self.step(batch, cache)

    def open(self) -> None:
        self.runner.step = self.step
        self.gate.release(10_000)


@contextmanager
def gated(model: Model, **settings: Any) -> Iterator[tuple[Running, Gated]]:
    """A server whose engine only steps when told to."""
    engine = AsyncLLM(model, cache_memory=MEMORY, **SIZES)
    gate = Gated(engine)
    try:
        with running(model, engine, ui=False, **settings) as server:
            yield server, gate
            gate.open()
    finally:
        gate.open()
        engine.close()


def until(reached: Callable[[], bool]) -> None:
    """Wait for something that another thread brings about."""
    end = time.monotonic() + LIMIT
    while not reached():
        assert time.monotonic() < end, "it did not happen"
        time.sleep(0.002)


def asking(
    server: Running, body: dict[str, Any], **options: Any
) -> tuple[threading.Thread, list[Any]]:
    """A request of its own thread, and what it gets."""
    answers: list[Any] = []

    def ask() -> None:
        with httpx.Client(base_url=server.url, timeout=LIMIT) as http:
            answers.append(http.post(CHAT, json=body, **options))

    thread = threading.Thread(target=ask)
    thread.start()
    return thread, answers


# Keys and tenants.


@pytest.fixture(scope="module")
def keys(tmp_path_factory: pytest.TempPathFactory) -> Path:
    file = tmp_path_factory.mktemp("keys") / "keys"
    file.write_text("# who -> key\nfirst key-of-one-tenant\n\nkey-of-another\n")
    return file


def test_without_a_key_nothing_is_told(model: Model, keys: Path) -> None:
    with running(model, ui=False, api_keys_file=keys) as server:
        http = server.http
        for path in ("/v1/models", "/metrics", "/v1/cache", "/no/such/path"):
            answer = http.get(path)
            assert (answer.status_code, answer.json()["error"]["type"]) == (
                401,
                "authentication_error",
            )
            assert answer.headers["www-authenticate"] == "Bearer"
        for wrong in (
            "Bearer key-of-one",
            "Basic key-of-one-tenant",
            "Bearer",
            "key-of-one-tenant",
        ):
            assert http.post(CHAT, json=BODY, headers={"Authorization": wrong}).status_code == 401
        assert http.get("/health").json() == {"status": "alive"}
        assert http.get("/ready").status_code == 200
        assert http.get("/v1/models", headers=ONE).status_code == 200
        with pytest.raises(openai.AuthenticationError):
            server.client("some other key").models.list()


def test_tenants_share_no_cached_token(model: Model, keys: Path) -> None:
    """Not one; and the answer takes as long as a cold one, so time tells nothing either."""

    def ask(server: Running, key: dict[str, str]) -> tuple[int, float]:
        began = time.perf_counter()
        usage = server.http.post(CHAT, json=body, headers=key).json()["usage"]
        return usage["prompt_tokens_details"]["cached_tokens"], time.perf_counter() - began

    body = BODY | {"messages": [{"role": "user", "content": "secret " * 250}], "max_tokens": 1}
    with running(model, ui=False, api_keys_file=keys) as server:
        # What only the first request has to do is done under a salt of its own.
        server.http.post(CHAT, json=body | {"cache_salt": "before"}, headers=ONE)
        first, cold = ask(server, ONE)
        again, warm = ask(server, ONE)
        other, theirs = ask(server, TWO)
        print(f"cold {cold:.4f} s, warm {warm:.4f} s, another tenant {theirs:.4f} s")
        assert (first, other) == (0, 0)
        assert again > 400
        counters = server.http.get("/v1/cache", headers=ONE).json()["counters"]
        assert counters["device_hit_tokens"] == again
    with running(model, ui=False, api_keys_file=keys, share_prefixes=True) as server:
        assert ask(server, ONE)[0] == 0
        assert ask(server, TWO)[0] == again


def test_keys_are_needed_where_others_can_reach_the_server(keys: Path, tmp_path: Path) -> None:
    assert KeyRing.from_settings(Settings()).open
    assert KeyRing.from_settings(Settings(host="0.0.0.0", auth=False)).open
    assert not KeyRing.from_settings(Settings(host="0.0.0.0", api_keys_file=keys)).open
    assert not KeyRing.from_settings(Settings(api_keys=("key-from-a-variable",))).open
    with pytest.raises(ConfigError, match="others could reach"):
        KeyRing.from_settings(Settings(host="0.0.0.0"))
    with pytest.raises(ConfigError, match="fewer than 8"):
        KeyRing.from_settings(Settings(api_keys=("short",)))
    with pytest.raises(ConfigError, match="cannot be read"):
        KeyRing.from_settings(Settings(api_keys_file=tmp_path / "none"))
    for content, reason in {"# nothing": "has no keys", "a b c": "line 1"}.items():
        (tmp_path / "bad").write_text(content)
        with pytest.raises(ConfigError, match=reason):
            KeyRing.from_settings(Settings(api_keys_file=tmp_path / "bad"))


def test_keys_are_in_no_representation() -> None:
    ring = KeyRing.from_settings(Settings(api_keys=("key-from-a-variable",)))
    tenant = ring.tenant("key-from-a-variable")
    assert tenant is not None
    assert tenant.name == "key-1"
    assert "variable" not in f"{tenant} {tenant.salt}"
    assert ring.tenant("key-from-a-variablf") is ring.tenant(None) is ring.tenant("") is None


# Limits.


def test_a_full_queue_answers_429_and_when_to_come_again(model: Model) -> None:
    with gated(model, max_num_seqs=1, max_queue=1) as (server, gate):
        waiting = [asking(server, BODY) for _ in range(2)]
        until(lambda: server.served.gate.samples == 2)
        answer = server.http.post(CHAT, json=BODY)
        assert answer.status_code == 429
        assert answer.json()["error"]["code"] == "server_overloaded"
        assert 1 <= int(answer.headers["retry-after"]) <= 60
        with pytest.raises(openai.RateLimitError):
            server.client().chat.completions.create(**BODY, stream=True)
        gate.open()
        for thread, answers in waiting:
            thread.join(LIMIT)
            assert answers[0].status_code == 200
        assert server.served.gate.samples == 0
        assert server.http.post(CHAT, json=BODY).status_code == 200


def test_limits_hold_for_each_key(model: Model, keys: Path) -> None:
    limits = {"max_requests_per_key": 1, "max_tokens_per_key": 60}
    with gated(model, api_keys_file=keys, **limits) as (server, gate):
        thread, answers = asking(server, BODY, headers=ONE)
        until(lambda: server.served.gate.samples == 1)
        status, error = server.error(CHAT, BODY, headers=ONE)
        assert (status, error["code"]) == (429, "key_limit")
        other, others = asking(server, BODY, headers=TWO)
        until(lambda: server.served.gate.samples == 2)
        gate.open()
        thread.join(LIMIT)
        other.join(LIMIT)
        assert [answer.status_code for answer in answers + others] == [200, 200]
        status, error = server.error(CHAT, BODY | {"max_tokens": 100}, headers=ONE)
        assert status == 400
        assert "a key may have 60" in error["message"]
        status, error = server.error(CHAT, BODY | {"priority": -1}, headers=ONE)
        assert (status, error["param"]) == (400, "priority")


@pytest.mark.parametrize("stream", [False, True])
def test_a_request_that_takes_too_long_is_ended(model: Model, stream: bool) -> None:
    with gated(model, request_timeout=0.2) as (server, gate):
        gate.gate.release(2)
        answer = server.http.post(CHAT, json=LONG | {"stream": stream})
        if stream:  # it had begun, so its end is an event
            assert answer.status_code == 200
            last = json.loads(answer.text.rstrip().split("\n\n")[-1].removeprefix("data: "))
            assert last["error"]["type"] == "timeout_error"
        else:
            assert answer.status_code == 504
            assert answer.json()["error"]["message"] == "the request took longer than 0.2 s"
        gate.open()
        until(lambda: not server.http.get("/v1/cache").json()["running"])
        assert server.served.gate.samples == 0


@pytest.mark.parametrize("stream", [False, True])
def test_a_client_that_leaves_frees_its_blocks_within_a_step(model: Model, stream: bool) -> None:
    with gated(model) as (server, gate):
        host, port = server.url.removeprefix("http://").split(":")
        with socket.create_connection((host, int(port))) as client:
            content = json.dumps(LONG | {"stream": stream}).encode()
            head = f"POST {CHAT} HTTP/1.1\r\nHost: {host}\r\nContent-Type: application/json\r\n"
            client.sendall(head.encode() + b"Content-Length: %d\r\n\r\n" % len(content) + content)
            gate.gate.release()
            if stream:
                assert b"200 OK" in client.recv(4096)
            until(lambda: gate.calls == 1)
        until(lambda: server.served.gate.samples == 0)  # the server has seen it leave
        gate.gate.release()  # for the step that had begun before
        after = server.http.get("/v1/cache").json()
        assert gate.calls <= 2
        assert not after["running"]
        assert not any(any(group["owners"]) for group in after["groups"])


# The log, and other sites.


def test_a_requests_line_tells_what_the_cache_did(
    server: Running, caplog: pytest.LogCaptureFixture
) -> None:
    body = BODY | {"messages": [{"role": "user", "content": "a prompt for the log " * 3}]}
    logger = logging.getLogger("kvist.server")
    with caplog.at_level(logging.INFO, logger.name):
        logger.propagate = True
        for _ in range(2):
            answer = server.http.post(CHAT, json=body, headers={"X-Request-Id": "mine-1"})
            assert answer.headers["x-request-id"] == "mine-1"
        server.http.post(CHAT, json={"model": "none"}, headers={"X-Request-Id": "bad\tname"})
        until(lambda: len(caplog.records) >= 3)
    lines = [json.loads(JSONLines().format(record)) for record in caplog.records]
    cold, warm, refused = (line for line in lines if line["message"] == "request")
    assert warm["request_id"] == "mine-1"
    assert (warm["path"], warm["status"], warm["method"]) == (CHAT, 200, "POST")
    [cache] = warm["cache"]
    assert cache["cached"]["device"] > 0
    assert cache["misses"][-1].startswith("tail[")
    assert warm["output_tokens"] == cache["output_tokens"] == 4
    assert 0 < warm["ttft_s"] <= warm["took_s"]
    assert cold["cache"][0]["prompt_tokens"] == cache["prompt_tokens"]
    assert refused["status"] == 400
    assert "\t" not in refused["request_id"]
    assert "a prompt for the log" not in json.dumps(lines)
    assert "status=200" in PlainLines().format(caplog.records[0])


def test_a_foreign_name_for_this_machine_is_refused(server: Running, model: Model) -> None:
    """A page that lets its own name point to 127.0.0.1 would otherwise read everything."""
    for host in ("evil.example", "evil.example:8000", "127.0.0.1.evil.example", ""):
        assert server.http.get("/v1/cache", headers={"Host": host}).status_code == 403
    for host in ("localhost", "LOCALHOST:8000", "127.0.0.1:1", "[::1]:8000", "[::1]"):
        assert server.http.get("/v1/models", headers={"Host": host}).status_code == 200
    with running(model, ui=False, allowed_hosts=("kvist.lan",)) as other:
        assert other.http.get("/v1/models", headers={"Host": "kvist.lan"}).status_code == 200


def test_other_sites_may_ask_only_if_they_are_listed(server: Running, model: Model) -> None:
    asked = {"Origin": "https://there.example", "Access-Control-Request-Method": "POST"}
    answer = server.http.options(CHAT, headers=asked)
    assert "access-control-allow-origin" not in answer.headers
    with running(model, ui=False, cors_origins=("https://there.example",)) as other:
        answer = other.http.options(CHAT, headers=asked)
        assert answer.headers["access-control-allow-origin"] == "https://there.example"
        stranger = other.http.options(CHAT, headers=asked | {"Origin": "https://evil.example"})
        assert "access-control-allow-origin" not in stranger.headers
