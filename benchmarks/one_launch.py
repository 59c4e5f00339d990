"""A decode step in one launch beside the fused kernels: checked, then timed, at several contexts.

    PYTHONPATH=src python benchmarks/one_launch.py --out one.json [--model 0.6b] [--warps 16]
        [--clusters 8] [--contexts 128,512] [--define KVIST_TELL=1]

GPU time of the step alone, from a token id to logits: medians over replays of graphs, so launches
cost nothing. Random weights and keys; errors are relative to the same step in float32.
"""

import argparse
import json
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from gpu import (
    COMMON,
    CONFIGS,
    RESULTS,
    graph_ms,
    in_float32,
    make_model,
    make_pool,
    note,
    relative,
)

from kvist.cache import Batch
from kvist.kernels.cuda.one_launch import Shape
from kvist.runner import one_launch
from kvist.runner.fused import FusedStep

PEAK_GB = 4300.0
CONFIGS |= {
    "1.7b": {"hidden_size": 2048, "intermediate_size": 6144, "num_hidden_layers": 28,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "4b": {"hidden_size": 2560, "intermediate_size": 9728, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": True},
}  # fmt: skip
LONGEST = 8192


def measure(name: str, options: Any) -> None:
    """All contexts of one model with one arrangement of blocks."""
    plain = one_launch.shape_of

    def arranged(lm: Any) -> Shape:
        return replace(plain(lm), clusters=options.clusters, cluster=128 // options.clusters,
                       warps=options.warps)  # fmt: skip

    class WithMacros(Shape):
        """A shape with further macros."""

    extra = dict(pair.split("=") for pair in options.define)
    WithMacros.defines = lambda self: Shape.defines(self) | extra  # type: ignore[method-assign]
    one_launch.shape_of = lambda lm: WithMacros(**vars(arranged(lm)))
    one_launch.LONGEST = LONGEST
    one_launch.SPIN_LIMIT = 1 << 18
    torch.manual_seed(0)
    lm = make_model(name)
    nbytes = 2 * sum(p.numel() for p in lm.parameters())
    pool = make_pool(lm, 1, max(options.contexts), 8)
    began = time.time()
    ours = one_launch.OneLaunchStep(lm, pool, wait=True)
    note(what="compiled", seconds=time.time() - began)
    steps = {"one launch": ours} | ({} if options.alone else {"fused": FusedStep(lm)})
    for context in options.contexts:
        batch = Batch.pack([[77]], [context - 1], device="cuda")
        binding = pool.bind(batch)
        floor = (nbytes + 4 * context * 8 * 128 * len(lm.specs)) / PEAK_GB / 1e6
        exact = None
        if context in options.contexts[:2]:
            exact = in_float32(lm, pool, batch, 1, max(options.contexts))
        for label, step in steps.items():
            logits = step(batch, binding).clone()
            torch.cuda.synchronize()
            again = [step(batch, binding).clone() for _ in range(3)]
            error = None if exact is None else relative(logits, exact)
            ms = graph_ms(lambda s=step, b=batch, c=binding: s(b, c), 40)
            note(model=name, step=label, warps=options.warps, clusters=options.clusters,
                 macros=extra, context=context, ms=ms, tok_s=1e3 / ms, of_floor=floor / ms,
                 error=error, same_bits=all(logits.equal(a) for a in again),
                 finite=bool(logits.isfinite().all()))  # fmt: skip


def main() -> None:
    """Measure, and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--model", default="0.6b", choices=[*CONFIGS])
    parser.add_argument("--warps", type=int, default=16)
    parser.add_argument("--clusters", type=int, default=8)
    parser.add_argument("--contexts", default="128,512,2048,8192")
    parser.add_argument("--define", action="append", default=[], help="a macro, NAME=VALUE")
    parser.add_argument("--alone", action="store_true", help="without the fused step")
    options = parser.parse_args()
    options.contexts = [int(n) for n in options.contexts.split(",")]
    note(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__, **COMMON)
    try:
        measure(options.model, options)
    finally:
        options.out.write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
