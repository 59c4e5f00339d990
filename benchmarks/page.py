"""What it costs that somebody looks: pages on a running engine, and looks at caches of any size.

    python benchmarks/page.py [MODEL] [--pages 20] [--tokens 96] [--runs 4] [--json PATH]

First the live picture alone, on books without a model: CPU time of one look and its encoding, and
the bytes of a frame, while all requests write. Then an engine that writes for sixteen requests with
no page and with many in turn: tokens a second.
"""

import argparse
import asyncio
import json
import statistics
import sys
import time
from contextlib import aclosing
from pathlib import Path
from typing import Any

import torch
from core_overhead import machine

import kvist
from kvist.core.blocks import PagedBlockManager
from kvist.core.limits import SchedulerConfig
from kvist.core.params import ResolvedParams
from kvist.core.plan import RowOutput, StepOutput
from kvist.core.request import Request
from kvist.core.scheduler import ContinuousScheduler
from kvist.core.spec import AttentionSpec
from kvist.core.tables import CacheGroup
from kvist.server.live import TREE_EVERY, TREE_NODES, LiveCache

SIZES = ((1_000, 16), (10_000, 64), (100_000, 256))  # blocks, requests


def main() -> None:
    """Measure, print, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="smollm2-135m")
    parser.add_argument("--pages", type=int, default=20)
    parser.add_argument("--tokens", type=int, default=96)
    parser.add_argument("--runs", type=int, default=4)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/page.json"))
    args = parser.parse_args()
    torch.set_num_threads(1)
    looks = [look_cost(*size) for size in SIZES]
    for row in looks:
        print(
            f"{row['blocks']:>8,} blocks, {row['requests']:>3} requests: "
            f"a look {row['look_ms']:.2f} ms, a frame {row['frame_bytes']:,.0f} bytes, "
            f"the first {row['whole_bytes']:,}"
        )
    rates = asyncio.run(throughput(args.model, args.pages, args.tokens, args.runs))
    alone, watched = (statistics.median(rates[pages]) for pages in (0, args.pages))
    print(
        f"{alone:,.1f} tokens/s with no page, {watched:,.1f} with {args.pages} "
        f"({100 * (watched / alone - 1):+.1f} %)"
    )
    args.json.parent.mkdir(parents=True, exist_ok=True)
    content = {"command": sys.argv, **machine(), "looks": looks, "tokens_per_second": rates}
    args.json.write_text(json.dumps(content, indent=1))
    print(f"\nwritten: {args.json}")


class NoEngine:
    """As much of an engine as frames ask for."""

    class model:  # noqa: N801
        name, tokenizer = "none", None


def look_cost(blocks: int, requests: int, looks: int = 24) -> dict[str, Any]:
    """Means over some looks, several steps apart, without the first."""
    manager = PagedBlockManager([CacheGroup(AttentionSpec(1, 8), blocks)], 16)
    config = SchedulerConfig(max_num_seqs=requests, max_batch_tokens=1 << 20)
    scheduler = ContinuousScheduler(config, manager)
    own = max(1, min(4000, blocks * 16 // requests * 8 // 10) - 300)
    params = ResolvedParams(temperature=0.0, max_tokens=400)
    for i in range(requests):
        prompt = (*range(100, 400), *[1000 + i] * own)
        scheduler.add(Request(f"{i:032x}", prompt, params))

    def steps(count: int) -> None:
        for _ in range(count):
            plan = scheduler.schedule()
            rows = tuple(RowOutput((7,) if row.sample else ()) for row in plan.rows)
            scheduler.commit(plan, StepOutput(plan.step, rows))

    steps(2)
    live: Any = LiveCache(NoEngine())  # type: ignore[arg-type]
    frames: asyncio.Queue[bytes | None] = asyncio.Queue()
    live._listeners.add(frames)
    took = []
    for number in range(looks):
        began = time.thread_time()
        nodes = 0 if number % TREE_EVERY else TREE_NODES
        live._tell(scheduler.look(live._serial, nodes))
        took.append(time.thread_time() - began)
        steps(5)
    whole, *rest = (len(frames.get_nowait() or b"") for _ in range(frames.qsize()))
    return {
        "blocks": blocks,
        "requests": requests,
        "look_ms": 1000 * statistics.mean(took[1:]),
        "whole_bytes": whole,
        "frame_bytes": statistics.mean(rest),
    }


async def throughput(model: str, pages: int, tokens: int, runs: int) -> dict[int, list[float]]:
    """Tokens a second of sixteen requests, by the number of pages, in turn."""
    params = kvist.SamplingParams(temperature=0, max_tokens=tokens, ignore_eos=True)
    prompts = [[100 + i] * 48 for i in range(16)]
    rates: dict[int, list[float]] = {0: [], pages: []}
    async with kvist.AsyncLLM(model, max_model_len=512, cache_memory=1 << 29) as llm:
        live = LiveCache(llm)

        async def look() -> None:
            async with aclosing(live.frames()) as frames:
                async for _ in frames:
                    pass

        async def write(prompt: list[int]) -> None:
            async for _ in llm.submit(prompt, params):
                pass

        for run in range(2 * runs + 1):  # the first warms up
            listeners = [asyncio.create_task(look()) for _ in range(pages if run % 2 else 0)]
            await asyncio.sleep(0.5)
            began = time.perf_counter()
            await asyncio.gather(*map(write, prompts))
            rate = len(prompts) * tokens / (time.perf_counter() - began)
            for listener in listeners:
                listener.cancel()
            await asyncio.gather(*listeners, return_exceptions=True)
            if run:
                rates[len(listeners)].append(rate)
    return rates


if __name__ == "__main__":
    main()
