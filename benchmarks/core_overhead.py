"""What the engine's own bookkeeping costs, with a runner that computes nothing.

    python benchmarks/core_overhead.py [--sequences 256] [--steps 200] [--runs 5] [--json PATH]

CPU time of `schedule()` plus `commit()` per running sequence while all of them decode, and of the
prefix keys of a long prompt: cold (every key is made and published) and warm (every key is found).
The best of the runs is reported beside the median: other processes can only add.
"""

import argparse
import json
import os
import platform
import statistics
import subprocess
import sys
import time
from pathlib import Path

from kvist.core.blocks import PagedBlockManager
from kvist.core.limits import SchedulerConfig
from kvist.core.params import ResolvedParams
from kvist.core.plan import Plan, RowOutput, StepOutput
from kvist.core.prefix import PrefixKeys
from kvist.core.request import Request
from kvist.core.scheduler import ContinuousScheduler
from kvist.core.spec import AttentionSpec
from kvist.core.tables import CacheGroup

FULL = AttentionSpec(num_kv_heads=8, head_dim=128)
SLIDING = AttentionSpec(num_kv_heads=8, head_dim=128, window=512)
BLOCK_SIZE, PROMPT, LONG_PROMPT = 16, 96, 100_000

# name -> (specs, temperature, plan one step ahead, host blocks)
CASES = {
    "greedy": ([FULL], 0.0, False, 0),
    "greedy, one plan ahead": ([FULL], 0.0, True, 0),
    "sampled": ([FULL], 1.0, False, 0),
    "full and sliding layers": ([FULL, SLIDING], 0.0, False, 0),
    "host tier": ([FULL], 0.0, False, 4096),
}
TOKEN = RowOutput((7,))
NOTHING = RowOutput()


def main() -> None:
    """Measure every case in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--sequences", type=int, default=256)
    parser.add_argument("--steps", type=int, default=200)
    parser.add_argument("--runs", type=int, default=5)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/core_overhead.json"))
    args = parser.parse_args()
    found: dict[str, list[float]] = {}
    for _ in range(args.runs):
        for name, case in CASES.items():
            cost = step_cost(*case, args.sequences, args.steps)
            found.setdefault(f"{name}: us per sequence", []).append(1e6 * cost)
        cold, warm = key_costs()
        found.setdefault(f"keys of {LONG_PROMPT:,} tokens, cold: ms", []).append(1e3 * cold)
        found.setdefault(f"keys of {LONG_PROMPT:,} tokens, warm: ms", []).append(1e3 * warm)
    rows = [
        {"what": what, "best": min(runs), "median": statistics.median(runs), "runs": runs}
        for what, runs in found.items()
    ]
    print(f"{'':<46}{'best':>8}{'median':>8}")
    for row in rows:
        print(f"{row['what']:<46}{row['best']:>8.2f}{row['median']:>8.2f}")
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"command": sys.argv, **machine(), "rows": rows}, indent=1))
    print(f"\nwritten: {args.json}")


def step_cost(
    specs: list[AttentionSpec],
    temperature: float,
    ahead: bool,
    host_blocks: int,
    sequences: int,
    steps: int,
) -> float:
    """Seconds of CPU per decoding sequence: the median over the steps."""
    per_sequence = -(-(PROMPT + steps + 8) // BLOCK_SIZE) + 2
    blocks = PagedBlockManager(
        [CacheGroup(spec, 2 + sequences * per_sequence, host_blocks) for spec in specs], BLOCK_SIZE
    )
    scheduler = ContinuousScheduler(
        SchedulerConfig(max_num_seqs=sequences, max_batch_tokens=8192), blocks
    )
    params = ResolvedParams(temperature=temperature, max_tokens=steps + 8, seed=1)
    for i in range(sequences):
        scheduler.add(Request(str(i), (i,) * PROMPT, params))
    under_way: list[tuple[Plan, StepOutput]] = []

    def step() -> None:
        plan = scheduler.schedule()
        rows = tuple([TOKEN if row.sample else NOTHING for row in plan.rows])
        under_way.append((plan, StepOutput(plan.step, rows)))
        if len(under_way) > ahead:
            scheduler.commit(*under_way.pop(0))

    while scheduler.snapshot().waiting or any(
        s.output_tokens == 0 for s in scheduler.snapshot().running
    ):
        step()
    times = []
    for _ in range(steps):
        begun = time.process_time()
        step()
        times.append(time.process_time() - begun)
    return statistics.median(times) / sequences


def key_costs() -> tuple[float, float]:
    """Seconds of CPU to publish a long prompt's blocks, and to match them again."""
    num_blocks = LONG_PROMPT // BLOCK_SIZE
    blocks = PagedBlockManager([CacheGroup(FULL, num_blocks + 2)], BLOCK_SIZE)
    prompt = tuple(i * 2654435761 % 150_000 for i in range(LONG_PROMPT))
    keys = PrefixKeys(prompt)
    assert blocks.open(0, keys, blocks.match(keys, LONG_PROMPT - 1), LONG_PROMPT)
    begun = time.process_time()
    blocks.publish(0, LONG_PROMPT)
    cold = time.process_time() - begun
    begun = time.process_time()
    match = blocks.match(PrefixKeys(prompt), LONG_PROMPT)
    warm = time.process_time() - begun
    assert match.num_tokens == LONG_PROMPT
    return cold, warm


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
