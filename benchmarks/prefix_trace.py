"""How much of a real conversation trace the prefix cache reuses, and what that takes in memory.

    python benchmarks/prefix_trace.py mooncake_conversation.jsonl [--requests 500] [--plot PNG]
    python benchmarks/prefix_trace.py mooncake_conversation.jsonl --model smollm2-135m

The trace (Mooncake, FAST 2025) names each 512 tokens of a prompt by a hash of them and of all
before them. Here 512 tokens become one block of 16, prompts and outputs are 1/32 of their length,
and each hash stands for 16 token ids of its own. So many requests at a time go through the
scheduler and the block manager, in the trace's order; a runner that computes nothing stands in
for the model, unless one is named. What the trace allows is counted apart from both: the leading
whole blocks of each prompt that an earlier prompt began with too, less than the whole prompt.

With a cache that is large enough, reuse has to be within 2 % of that; then the cache is made
smaller, with a host tier behind it and without one.
"""

import argparse
import json
import os
import platform
import random
import subprocess
import sys
import time
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache
from itertools import islice
from pathlib import Path

from kvist.core.blocks import PagedBlockManager
from kvist.core.limits import SchedulerConfig
from kvist.core.params import ResolvedParams
from kvist.core.plan import FinishedEvent, RowOutput, StepOutput
from kvist.core.record import Snapshot
from kvist.core.request import Request
from kvist.core.scheduler import ContinuousScheduler
from kvist.core.spec import AttentionSpec
from kvist.core.tables import CacheGroup

HASHED = 512  # tokens of the trace that one hash stands for
BLOCK = 16  # tokens here
SCALE = HASHED // BLOCK
VOCAB = 512
FULL = AttentionSpec(num_kv_heads=1, head_dim=8)
HOST = 4  # the host tier's size, in pools
NEVER_SAID = VOCAB  # what the null runner samples; no prompt holds it


@dataclass(frozen=True)
class Turn:
    """One request of the trace, scaled: prompt ids and the number of new tokens."""

    prompt: tuple[int, ...]
    new: int


def main() -> None:
    """Replay the trace, print the figures, draw the plot, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("trace", type=Path, help="a .jsonl of Mooncake's traces")
    parser.add_argument("--requests", type=int, default=500)
    parser.add_argument("--concurrency", type=int, default=8)
    parser.add_argument("--batch-tokens", type=int, default=512)
    parser.add_argument("--model", help="also run this model, once with and once without the cache")
    parser.add_argument("--plot", type=Path, help="write a PNG (needs matplotlib)")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/prefix_trace.json"))
    args = parser.parse_args()
    turns = read_trace(args.trace, args.requests)
    prompt_tokens = sum(len(turn.prompt) for turn in turns)
    allowed, working_set = what_the_trace_allows(turns)
    print(
        f"{len(turns)} requests, {prompt_tokens:,} prompt tokens, "
        f"{len(working_set):,} different whole blocks; reuse allowed: {allowed:,} tokens "
        f"({allowed / prompt_tokens:.1%})"
    )
    rows = []
    print(f"\n{'blocks':>8}{'host':>8}{'reused':>10}{'of allowed':>12}{'hit rate':>10}", end="")
    print(f"{'host hits':>11}{'preempted':>11}{'unsaved':>9}{'ms/req':>8}")
    for host in (0, HOST):
        for blocks in sizes(turns, len(working_set), args.concurrency):
            row = replay(turns, blocks, blocks * host, args.concurrency, args.batch_tokens)
            row |= {"of_allowed": row["reused"] / allowed}
            rows.append(row)
            print(
                f"{row['blocks']:>8}{row['host_blocks']:>8}{row['reused']:>10,}"
                f"{row['of_allowed']:>12.2%}{row['hit_rate']:>10.1%}{row['host_hits']:>11,}"
                f"{row['preemptions']:>11}{row['unsaved']:>9}{row['ms_per_request']:>8.2f}"
            )
    ample = max((row for row in rows if not row["host_blocks"]), key=lambda row: row["blocks"])
    verdict = ample["of_allowed"] >= 0.98
    print(f"\nmemory not short: {ample['of_allowed']:.2%} of what the trace allows is reused")
    found = {
        "requests": len(turns),
        "prompt_tokens": prompt_tokens,
        "allowed": allowed,
        "different_blocks": len(working_set),
        "rows": rows,
    }
    if args.model:
        found["model"] = with_model(args.model, turns, args.concurrency, args.batch_tokens)
    if args.plot:
        draw(rows, allowed / prompt_tokens, len(working_set), args.plot)
        print(f"drawn: {args.plot}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"command": sys.argv, **machine(), **found}, indent=1))
    print(f"written: {args.json}")
    if not verdict:
        sys.exit("less than 98 % of what the trace allows was reused though memory was not short")


def read_trace(path: Path, count: int) -> list[Turn]:
    """The first requests of the trace, scaled."""
    with path.open() as lines:
        entries = [json.loads(line) for line in islice(lines, count)]
    return [
        Turn(
            expand(entry["hash_ids"], -(-entry["input_length"] // SCALE)),
            max(1, round(entry["output_length"] / SCALE)),
        )
        for entry in entries
    ]


def expand(hashes: Sequence[int], length: int) -> tuple[int, ...]:
    """Token ids in place of hashes; the last block may be cut short."""
    return tuple(token for name in hashes for token in block_of(name))[:length]


@cache
def block_of(name: int) -> tuple[int, ...]:
    """The token ids that a hash stands for."""
    generator = random.Random(name)
    return tuple(generator.randrange(VOCAB) for _ in range(BLOCK))


def what_the_trace_allows(turns: Sequence[Turn]) -> tuple[int, set[tuple[int, ...]]]:
    """Tokens that a cache without limit could reuse, and all whole blocks with what is before them.

    The last token of a prompt is always computed, for its logits.
    """
    seen: set[tuple[int, ...]] = set()
    allowed = 0
    for turn in turns:
        prefixes = [turn.prompt[:end] for end in range(BLOCK, len(turn.prompt) + 1, BLOCK)]
        hits = 0
        while hits < (len(turn.prompt) - 1) // BLOCK and prefixes[hits] in seen:
            hits += 1
        allowed += hits * BLOCK
        seen.update(prefixes)
    return allowed, seen


def sizes(turns: Sequence[Turn], working_set: int, concurrency: int) -> list[int]:
    """Pool sizes to try: from what the longest request needs to more than all requests together."""
    longest = max(-(-(len(turn.prompt) + turn.new) // BLOCK) for turn in turns)
    outputs = sum(-(-turn.new // BLOCK) + 1 for turn in turns)
    ample = 1 + working_set + outputs + concurrency * longest
    found, blocks = [], 1 + longest
    while blocks < ample:
        found.append(blocks)
        blocks = int(blocks * 1.6)
    return [*found, ample]


def replay(
    turns: Sequence[Turn], num_blocks: int, host_blocks: int, concurrency: int, batch_tokens: int
) -> dict[str, float]:
    """Serve the trace, so many requests at a time, without a model."""
    blocks = PagedBlockManager(
        [CacheGroup(FULL, num_blocks, host_blocks)],
        BLOCK,
        save_ahead=2 * (-(-batch_tokens // BLOCK) + concurrency),  # as the engine does
    )
    config = SchedulerConfig(max_num_seqs=concurrency, max_batch_tokens=batch_tokens)
    scheduler = ContinuousScheduler(config, blocks)
    waiting, running, reused, begun = list(enumerate(turns))[::-1], 0, 0, time.process_time()
    while waiting or running:
        while waiting and running < concurrency:
            index, turn = waiting.pop()
            params = ResolvedParams(max_tokens=turn.new)
            scheduler.add(Request(str(index), turn.prompt, params))
            running += 1
        plan = scheduler.schedule()
        rows = tuple(RowOutput((NEVER_SAID,) if row.sample else ()) for row in plan.rows)
        for event in scheduler.commit(plan, StepOutput(plan.step, rows)):
            if isinstance(event, FinishedEvent):
                running -= 1
                reused += event.record.cached_tokens
    took = time.process_time() - begun
    blocks.check()
    return {
        "blocks": num_blocks,
        "host_blocks": host_blocks,
        "reused": reused,
        "ms_per_request": 1e3 * took / len(turns),
        **counted(scheduler.snapshot()),
    }


def counted(snapshot: Snapshot) -> dict[str, float]:
    """The engine's own counters."""
    counters = snapshot.counters
    return {
        "hit_rate": counters.hit_rate,
        "host_hits": counters.host_hit_tokens,
        "preemptions": snapshot.preemptions,
        "unsaved": counters.unsaved_evictions if snapshot.groups[0].host_blocks else 0,
        "steps": snapshot.step,
    }


def with_model(
    name: str, turns: Sequence[Turn], concurrency: int, batch_tokens: int
) -> dict[str, object]:
    """The same requests through the engine with a model, with the prefix cache and without it."""
    import kvist

    model = kvist.load(name)
    fitting = [turn for turn in turns if len(turn.prompt) + turn.new <= model.max_length]
    allowed, _ = what_the_trace_allows(fitting)
    prompts = [list(turn.prompt) for turn in fitting]
    params = [
        kvist.SamplingParams(temperature=0, max_tokens=turn.new, ignore_eos=True)
        for turn in fitting
    ]
    found: dict[str, object] = {"name": name, "requests": len(fitting), "allowed": allowed}
    tokens = []
    for prefix_cache in (True, False):
        llm = kvist.LLM(
            model,
            block_size=BLOCK,
            max_num_seqs=concurrency,
            max_batch_tokens=batch_tokens,
            prefix_cache=prefix_cache,
        )
        begun = time.perf_counter()
        results = llm.generate(prompts, params, progress=True)
        took = time.perf_counter() - begun
        reused = sum(result.usage.cached_tokens for result in results)
        tokens.append([result.token_ids for result in results])
        found["with" if prefix_cache else "without"] = {"seconds": took, "reused": reused}
        print(
            f"{name}, prefix cache {'on' if prefix_cache else 'off'}: {took:.1f} s, "
            f"{reused:,} of {allowed:,} tokens reused"
        )
    found["same_tokens"] = tokens[0] == tokens[1]
    return found


def draw(rows: Sequence[dict[str, float]], allowed: float, working_set: int, path: Path) -> None:
    """Hit rate against cache size, with and without the host tier."""
    import matplotlib as mpl

    mpl.use("Agg")
    from matplotlib import pyplot as plt

    figure, axes = plt.subplots(figsize=(7, 4), dpi=110, layout="constrained")
    axes.axhline(100 * allowed, color="0.6", linestyle="--", linewidth=1)
    axes.text(
        0.01,
        100 * allowed,
        "all that the trace allows",
        color="0.4",
        fontsize=9,
        va="bottom",
        transform=axes.get_yaxis_transform(),
    )
    styles = (
        (False, "pool alone", "#1f6f5c", "o"),
        (True, f"with a host tier of {HOST} x the pool", "#c8742b", "s"),
    )
    for host, label, colour, marker in styles:
        line = [row for row in rows if bool(row["host_blocks"]) == host]
        axes.plot(
            [row["blocks"] * BLOCK / 1000 for row in line],
            [100 * row["hit_rate"] for row in line],
            color=colour,
            marker=marker,
            markersize=5,
            label=label,
        )
    axes.axvline(working_set * BLOCK / 1000, color="0.85", linewidth=1, zorder=0)
    axes.text(
        working_set * BLOCK / 1000,
        0.03,
        "all prompts ",
        color="0.5",
        fontsize=9,
        ha="right",
        transform=axes.get_xaxis_transform(),
    )
    axes.set_xscale("log")
    axes.xaxis.set_major_formatter(lambda x, _: f"{x:g}k")
    axes.set_ylim(0, 115 * allowed)
    axes.set_xlabel("pool size, tokens")
    axes.set_ylabel("prompt tokens found in the cache, %")
    axes.set_title("Prefix reuse on a conversation trace", loc="left", fontsize=11)
    axes.legend(frameon=False, loc="upper left", bbox_to_anchor=(0, 0.8))
    axes.spines[["top", "right"]].set_visible(False)
    path.parent.mkdir(parents=True, exist_ok=True)
    figure.savefig(path)


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    try:
        commit = subprocess.run(
            ["git", "rev-parse", "--short", "HEAD"], capture_output=True, text=True, check=True
        ).stdout.strip()
    except (OSError, subprocess.CalledProcessError):
        commit = "unknown"
    return {
        "commit": commit,
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
    }


if __name__ == "__main__":
    main()
