"""A decode step in one launch beside the fused kernels: checked, then timed, at several contexts.

    PYTHONPATH=src python benchmarks/one_launch.py --out one.json [--model 0.6b]
        [--contexts 128,512] [--variant "warps=8 KVIST_TELL=1"]…

GPU time of the step alone, from a token id to logits: medians over replays of graphs, so launches
cost nothing. Random weights and keys; errors are relative to the same step in float32. A variant is
a number of warps and macros of the source.
"""

import argparse
import json
import time
from concurrent.futures import ThreadPoolExecutor
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
from kvist.errors import NotSupported
from kvist.kernels.cuda.build import compiled
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
SHAPE_OF = one_launch.shape_of


class Variant(Shape):
    """A shape with further macros."""

    macros: dict[str, str] = {}  # noqa: RUF012

    def defines(self) -> dict[str, Any]:
        """The shape's, and those."""
        return Shape.defines(self) | self.macros


def variant_of(lm: Any, text: str) -> Shape:
    """The shape of a model, changed as a variant says."""
    pairs = dict(pair.split("=") for pair in text.split())
    sizes = {name: int(pairs.pop(name)) for name in ("warps",) if name in pairs}
    kind = type("Variant", (Variant,), {"macros": pairs})
    return kind(**vars(replace(SHAPE_OF(lm), **sizes)))


def measure(name: str, options: Any) -> None:
    """All contexts of one model with each arrangement of blocks."""
    one_launch.SPIN_LIMIT = 1 << 18
    torch.manual_seed(0)
    lm = make_model(name)
    shapes = {text: variant_of(lm, text) for text in options.variant or [""]}
    with ThreadPoolExecutor() as compilers:
        began = time.time()
        list(compilers.map(lambda s: compiled(one_launch.SOURCE, s.defines(), "sm_90"),
                           shapes.values()))  # fmt: skip
        note(what="compiled", seconds=time.time() - began)
    pool = make_pool(lm, 1, max(options.contexts), 8)
    nbytes = 2 * sum(p.numel() for p in lm.parameters())
    bound, exact = {}, {}
    for context in options.contexts:
        batch = Batch.pack([[77]], [context - 1], device="cuda")
        if context <= 2048:
            exact[context] = in_float32(lm, pool, batch, 1, max(options.contexts))
        bound[context] = batch
    steps = ({} if options.alone else {"fused": None}) | shapes
    for text, shape in steps.items():
        if shape is None:
            step = FusedStep(lm)
        else:
            one_launch.shape_of = lambda lm, s=shape: s
            try:
                step = one_launch.OneLaunchStep(lm, pool, wait=True)
            except NotSupported as error:
                note(model=name, step=text, error=str(error))
                continue
        for context, batch in bound.items():
            binding = pool.bind(batch)
            floor = (nbytes + 4 * context * 8 * 128 * len(lm.specs)) / PEAK_GB / 1e6
            logits = step(batch, binding).clone()
            torch.cuda.synchronize()
            again = [step(batch, binding).clone() for _ in range(3)]
            error = relative(logits, exact[context]) if context in exact else None
            ms = graph_ms(lambda s=step, b=batch, c=binding: s(b, c), 40)
            note(model=name, step=text, context=context, ms=ms, tok_s=1e3 / ms,
                 of_floor=floor / ms, error=error, same_bits=all(logits.equal(a) for a in again),
                 finite=bool(logits.isfinite().all()))  # fmt: skip


def main() -> None:
    """Measure, and write what there is."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--model", default="0.6b", choices=[*CONFIGS])
    parser.add_argument("--contexts", default="128,512,2048,8192")
    parser.add_argument("--variant", action="append", help="warps and macros, NAME=VALUE …")
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
