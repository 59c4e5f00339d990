"""Everything that clients do, at once and for long; the server must come out as it went in.

`python tests/server/soak.py --requests 10000 --clients 64` is the long form; the suite runs a short
one. Random aborts, stops, pictures, tools and schemas on a tiny model; at the end no error but
intended ones, every block free or published, memory flat, and a sample equal to the offline engine.
"""

import argparse
import asyncio
import base64
import json
import random
import sys
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import httpx

sys.path.insert(0, str(Path(__file__).parents[1]))

from running import Running, running

import kvist
from kvist.loading.model import Model
from tiny_models import FIXTURES

CHAT, TEXT = "/v1/chat/completions", "/v1/completions"
WORDS = ["the", "of", "cache", "key", "value", "token", "block", "prefix", "query", "plan", "slot"]
TOOLS = [
    {"type": "function", "function": {"name": name, "parameters": {
        "type": "object", "properties": {"a": {"enum": [1, 2]}}, "required": ["a"],
        "additionalProperties": False}}}
    for name in ("first", "second")
]  # fmt: skip
SCHEMA = {"type": "json_schema", "json_schema": {"schema": {"enum": ["yes", "no", 3]}}}


@dataclass
class Report:
    """What came of it."""

    requests: int = 0
    left: int = 0
    compared: int = 0
    evicted: int = 0
    preempted: int = 0
    kinds: dict[str, int] = field(default_factory=dict)
    wrong: list[str] = field(default_factory=list)
    memory: list[float] = field(default_factory=list)  # MiB, as it went on
    seconds: float = 0.0


def resident() -> float:
    """Memory of this process, in MiB."""
    pages = int(Path("/proc/self/statm").read_text().split()[1])
    return pages * 4096 / (1 << 20)


class Soak:
    """Clients that do as they please."""

    def __init__(self, server: Running, model: Model, requests: int, seed: int = 0) -> None:
        self.server = server
        self.model = model
        self.name = server.served.names[0]
        self.left = requests
        self.total = requests
        self.random = random.Random(seed)
        self.report = Report()
        picture = (FIXTURES / "nanovlm" / "chelsea.png").read_bytes()
        self.picture = f"data:image/png;base64,{base64.b64encode(picture).decode()}"
        self.known: dict[str, str] = {}
        prompts = [self._text(3) for _ in range(8)]
        params = kvist.SamplingParams(temperature=0, max_tokens=8)
        for prompt, result in zip(prompts, kvist.generate(model, prompts, params), strict=True):
            self.known[prompt] = result.text

    def _text(self, most: int = 12) -> str:
        return " ".join(self.random.choices(WORDS, k=self.random.randint(1, most)))

    async def run(self, clients: int) -> Report:
        """All requests, so many at a time."""
        began = time.perf_counter()
        limits = httpx.Limits(max_connections=clients)
        async with httpx.AsyncClient(base_url=self.server.url, timeout=120, limits=limits) as http:
            await asyncio.gather(*(self._client(http) for _ in range(clients)))
        self.report.seconds = time.perf_counter() - began
        await self._settled()
        return self.report

    async def _client(self, http: httpx.AsyncClient) -> None:
        while self.left > 0:
            self.left -= 1
            if self.left % max(1, self.total // 10) == 0:
                self.report.memory.append(resident())
            kinds = (self._known, self._chat, self._tools, self._schema, self._stop, self._leave)
            kind = self.random.choice((*kinds, self._wrong, self._picture, self._samples))
            self.report.requests += 1
            name = kind.__name__
            self.report.kinds[name] = self.report.kinds.get(name, 0) + 1
            try:
                await kind(http)
            except Exception as error:
                self.report.wrong.append(f"{name}: {error!r}")

    def _body(self, **more: Any) -> dict[str, Any]:
        said = [{"role": "user", "content": self._text()}]
        return {
            "model": self.name,
            "messages": said,
            "max_tokens": self.random.randint(1, 12),
        } | more

    async def _post(self, http: httpx.AsyncClient, path: str, body: Any) -> Any:
        answer = await http.post(path, json=body)
        assert answer.status_code == 200, answer.text[:200]
        return answer.json()

    async def _known(self, http: httpx.AsyncClient) -> None:
        prompt = self.random.choice(list(self.known))
        body = {"model": self.name, "prompt": prompt, "temperature": 0, "max_tokens": 8}
        answer = await self._post(http, TEXT, body)
        assert answer["choices"][0]["text"] == self.known[prompt], "another output than offline"
        self.report.compared += 1

    async def _chat(self, http: httpx.AsyncClient) -> None:
        body = self._body(stream=True, temperature=1.0)
        async with http.stream("POST", CHAT, json=body) as answer:
            lines = [line async for line in answer.aiter_lines() if line]
        assert lines[-1] == "data: [DONE]", lines[-1]
        assert json.loads(lines[-2][6:])["choices"][0]["finish_reason"] in ("stop", "length")

    async def _tools(self, http: httpx.AsyncClient) -> None:
        body = self._body(
            tools=TOOLS, tool_choice="required", parallel_tool_calls=False, max_tokens=80
        )
        answer = await self._post(http, CHAT, body)
        [call] = answer["choices"][0]["message"]["tool_calls"]
        assert json.loads(call["function"]["arguments"])["a"] in (1, 2)

    async def _schema(self, http: httpx.AsyncClient) -> None:
        answer = await self._post(http, CHAT, self._body(response_format=SCHEMA, max_tokens=20))
        assert json.loads(answer["choices"][0]["message"]["content"]) in ("yes", "no", 3)

    async def _stop(self, http: httpx.AsyncClient) -> None:
        body = self._body(stop=["e", "a"], temperature=1.0, max_tokens=40)
        content = (await self._post(http, CHAT, body))["choices"][0]["message"]["content"]
        assert "e" not in content
        assert "a" not in content

    async def _leave(self, http: httpx.AsyncClient) -> None:
        body = self._body(stream=self.random.random() < 0.5, ignore_eos=True, max_tokens=200)
        try:
            async with asyncio.timeout(self.random.uniform(0.0, 0.2)):
                await http.post(CHAT, json=body)
        except TimeoutError:
            self.report.left += 1

    async def _wrong(self, http: httpx.AsyncClient) -> None:
        bad = self.random.choice(
            [{"temperature": -1}, {"max_tokens": 10**6}, {"model": "none"}, {"nonsense": 1}]
        )
        answer = await http.post(CHAT, json=self._body() | bad)
        assert answer.status_code in (400, 404), answer.status_code

    async def _picture(self, http: httpx.AsyncClient) -> None:
        part = {"type": "image_url", "image_url": {"url": self.picture}}
        said = [{"role": "user", "content": [part, {"type": "text", "text": self._text()}]}]
        await self._post(http, CHAT, self._body(messages=said))

    async def _samples(self, http: httpx.AsyncClient) -> None:
        answer = await self._post(http, CHAT, self._body(n=3, temperature=1.0, logprobs=True))
        assert len(answer["choices"]) == 3

    async def _settled(self) -> None:
        """Nothing is left behind."""
        engine, served = self.server.engine, self.server.served
        for _ in range(500):
            snapshot = await engine.snapshot()
            if not (snapshot.running or snapshot.waiting or served.gate.samples):
                break
            await asyncio.sleep(0.01)
        assert not snapshot.running
        assert not snapshot.waiting
        assert served.gate.samples == 0
        assert not any(any(group.owners) for group in snapshot.groups)
        assert not engine._streams
        assert not engine._desk.jobs
        assert not engine.grammars._masks
        engine._engine.check()
        self.report.evicted = snapshot.counters.evicted_blocks
        self.report.preempted = snapshot.preemptions


def soak(requests: int, clients: int, seed: int = 0) -> Report:
    """Serve, and let clients do as they please."""
    model = kvist.load(FIXTURES / "nanovlm" / "vlm_tied")
    # Little room: blocks are evicted and sequences preempted all the time.
    engine = kvist.AsyncLLM(model, cache_memory=4 << 20, max_num_seqs=24, max_batch_tokens=512)
    try:
        with running(model, engine, ui=False, max_queue=1000) as server:
            return asyncio.run(Soak(server, model, requests, seed).run(clients))
    finally:
        engine.close()


def main() -> None:
    """The long form."""
    import torch

    torch.set_num_threads(1)
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--requests", type=int, default=10_000)
    parser.add_argument("--clients", type=int, default=64)
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    report = soak(args.requests, args.clients, args.seed)
    print(f"{report.requests} requests in {report.seconds:.0f} s, {report.left} left early")
    print(f"{report.compared} outputs compared with the offline loop")
    print(f"{report.evicted} blocks evicted, {report.preempted} preemptions")
    print("kinds:", report.kinds)
    print("memory, MiB:", " ".join(f"{value:.0f}" for value in report.memory))
    print(f"{len(report.wrong)} wrong", *report.wrong[:20], sep="\n  ")
    sys.exit(bool(report.wrong))


if __name__ == "__main__":
    main()
