"""Time of a decode step against the length of the context, for several codecs of the cache.

    python benchmarks/context.py [--model NAME] [--contexts 512 ...] [--codecs plain int8 int4]

One sequence, the native step alone, codecs in turn at each length, the median of some steps. With
`OMP_NUM_THREADS=1` it is the thread's own time, which other programs disturb less. The cache is not
computed but filled with one number: time does not depend on its content.
"""

import argparse
import json
import statistics
import time
from pathlib import Path

import torch

import kvist
from kvist.cache import Batch, make_cache
from kvist.cache.dense_view import DenseBinding
from kvist.cache.groups import bytes_per_token, group_layers
from kvist.runner.executors import choose_step

STEPS = 12


def main() -> None:
    """Measure, print a table, write JSON and a picture."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--contexts", nargs="+", type=int, default=[512, 2048, 4096, 8000])
    parser.add_argument("--codecs", nargs="+", default=["plain", "int8", "int4"])
    parser.add_argument("--rounds", type=int, default=3)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/context.json"))
    parser.add_argument("--png", type=Path, default=Path("docs/images/cpu_context.png"))
    args = parser.parse_args()
    model = kvist.load(args.model, device="cpu", executor="native")
    groups = group_layers(model.specs)
    rows = []
    for context in args.contexts:
        times: dict[str, list[float]] = {codec: [] for codec in args.codecs}
        for _ in range(args.rounds):
            for codec in args.codecs:
                times[codec] += steps(model, codec, context)
        for codec, taken in times.items():
            width = sum(bytes_per_token(group, model.codec(codec)) for group in groups)
            row = {
                "codec": codec,
                "context": context,
                "ms": 1000 * statistics.median(taken),
                "spread_ms": [1000 * min(taken), 1000 * max(taken)],
                "cache_mb": width * context / 1e6,
            }
            rows.append(row)
            print(f"{codec:>6} {context:>6} tokens: {row['ms']:.2f} ms, {row['cache_mb']:.0f} MB")
    facts = {"date": time.strftime("%Y-%m-%d"), "step": repr(model.native)}
    args.json.write_text(json.dumps({**facts, "rows": rows}, indent=1))
    draw(rows, args.png, f"{args.model}, {model.native}")


@torch.inference_mode()
def steps(model: kvist.Model, codec: str, context: int) -> list[float]:
    """Seconds of some decode steps behind `context` tokens."""
    cache = make_cache(
        model.specs,
        layout="static",
        codec=model.codec(codec),
        max_length=context + STEPS + 2,
        dtype=model.dtype,
    )
    filled = Batch.pack([[0] * context], [0])
    bound = cache.bind(filled)
    assert isinstance(bound, DenseBinding)
    bound.note_written()
    for layer in bound.layers_in_place():  # zeros that nobody wrote are one page, always cached
        for planes in layer.values():
            for plane in planes.values():
                plane.view(torch.uint8).fill_(0x3C)  # 0.01 as floats, 1.06 as halves
    cache.commit(filled)
    step = choose_step("native", model)
    clock = time.thread_time if torch.get_num_threads() == 1 else time.perf_counter
    taken = []
    for _ in range(STEPS + 2):
        batch = Batch.pack([[7]], cache.lengths)
        begun = clock()
        step(batch, cache.bind(batch))
        taken.append(clock() - begun)
        cache.commit(batch)
    return taken[2:]


def draw(rows: list[dict[str, object]], path: Path, title: str) -> None:
    """Time against context, a line for each codec."""
    from matplotlib.figure import Figure

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.add_subplot()
    for codec in dict.fromkeys(str(row["codec"]) for row in rows):
        own = [row for row in rows if row["codec"] == codec]
        axes.plot([r["context"] for r in own], [r["ms"] for r in own], marker="o", label=codec)
    axes.set_title(title, fontsize=9)
    axes.set_xlabel("tokens in the cache")
    axes.set_ylabel("ms a decode step")
    axes.set_xlim(left=0)
    axes.set_ylim(bottom=0)
    axes.grid(alpha=0.25)
    axes.legend(title="codec", frameon=False)
    for side in ("top", "right"):
        axes.spines[side].set_visible(False)
    figure.savefig(path, dpi=140)


if __name__ == "__main__":
    main()
