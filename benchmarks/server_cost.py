"""What the server itself costs for each token of a stream, with an engine that computes nothing.

    python benchmarks/server_cost.py [--streams 256] [--tokens 200] [--runs 5] [--json PATH]

The real application under the real uvicorn, the real engine with scheduler and detokenisation; only
the model's forward is replaced by logits that are always the same. The clients are a process of
their own. Reported: CPU time of the event loop's thread (all that HTTP costs), of the engine's
thread (all that its bookkeeping costs), and how many writes a stream took.
"""

import argparse
import asyncio
import json
import multiprocessing
import statistics
import sys
import threading
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import torch
import uvicorn
from core_overhead import machine

import kvist
from kvist.server.app import create_app
from kvist.server.settings import Settings

TINY = Path(__file__).parents[1] / "tests" / "fixtures" / "qwen3" / "dense_tied"
LIMIT = 40.0  # microseconds of the loop's thread for a token


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--streams", type=int, default=256)
    parser.add_argument("--tokens", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/server_cost.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    runs = measure(args.streams, args.tokens, args.runs)
    rows = [
        {
            "what": what,
            "best": min(run[what] for run in runs),
            "median": statistics.median(run[what] for run in runs),
            "runs": [run[what] for run in runs],
        }
        for what in runs[0]
    ]
    print(f"{'':<46}{'best':>8}{'median':>8}")
    for row in rows:
        print(f"{row['what']:<46}{row['best']:>8.2f}{row['median']:>8.2f}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": sys.argv, **machine(), "limit": LIMIT, "rows": rows}
    args.json.write_text(json.dumps(content, indent=1))
    print(f"\nwritten: {args.json}")


def measure(streams: int, tokens: int, runs: int) -> list[dict[str, float]]:
    """Figures of each run, the first of which is not counted."""
    model = kvist.load(TINY, executor="reference")
    engine = kvist.AsyncLLM(model, max_num_seqs=streams, max_batch_tokens=1 << 14)
    always = torch.zeros(1, model.config.vocab_size)
    always[0, 300] = 1.0  # a token that is a piece of a word
    engine._engine.runner.step = lambda batch, cache: always.expand(len(batch.logit_rows), -1)
    settings = Settings(max_num_seqs=streams, ui=False, log_level="warning")
    config = uvicorn.Config(create_app(engine, settings), port=0, log_config=None, access_log=False)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        time.sleep(0.01)
    port = server.servers[0].sockets[0].getsockname()[1]
    loop = server.servers[0].get_loop()
    found = []
    for _ in range(runs + 1):
        http, steps = _on(loop.call_soon_threadsafe), _asked(engine)
        with multiprocessing.get_context("spawn").Pool(1) as pool:
            pool.apply(time.time)  # it has started, and imported what it needs
            began = time.perf_counter()
            chunks, events = pool.apply(ask, (port, streams, tokens))
            took = time.perf_counter() - began
        count = streams * tokens
        assert events >= count, f"{events} events for {count} tokens"
        found.append(
            {
                "server thread, us of CPU per token": 1e6 * (_on(loop.call_soon_threadsafe) - http)
                / count,
                "engine thread, us of CPU per token": 1e6 * (_asked(engine) - steps) / count,
                "writes per token": chunks / count,
                "tokens per second": count / took,
            }
        )  # fmt: skip
    server.should_exit = True
    thread.join()
    engine.close()
    return found[1:]


def _on(call: Callable[[Callable[[], None]], Any]) -> float:
    """CPU seconds so far of the thread that carries out what is called."""
    seconds: list[float] = []
    done = threading.Event()

    def look() -> None:
        seconds.append(time.thread_time())
        done.set()

    call(look)
    done.wait()
    return seconds[0]


def _asked(engine: kvist.AsyncLLM) -> float:
    async def look() -> float:
        return await engine._ask(time.thread_time)

    return asyncio.run(look())


def ask(port: int, streams: int, tokens: int) -> tuple[int, int]:
    """Stream on so many connections at once; how many chunks HTTP had, and how many events."""
    body = json.dumps(
        {
            "model": TINY.name,
            "messages": [{"role": "user", "content": "x"}],
            "max_tokens": tokens,
            "ignore_eos": True,
            "temperature": 0,
            "stream": True,
        }
    ).encode()
    head = "POST /v1/chat/completions HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n"
    head += f"Content-Type: application/json\r\nContent-Length: {len(body)}\r\n\r\n"

    async def one() -> tuple[int, int]:
        reader, writer = await asyncio.open_connection("127.0.0.1", port, limit=1 << 24)
        writer.write(head.encode() + body)
        content = await reader.read(-1)
        writer.close()
        return content.count(b"\r\ndata: {"), content.count(b"data: {")

    async def everybody() -> list[tuple[int, int]]:
        return await asyncio.gather(*(one() for _ in range(streams)))

    counts = asyncio.run(everybody())
    return sum(chunks for chunks, _ in counts), sum(events for _, events in counts)


if __name__ == "__main__":
    main()
