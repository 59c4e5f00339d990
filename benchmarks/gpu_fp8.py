"""Products with fp8 weights on a GPU beside bfloat16's, and log-probabilities beside torch's.

    PYTHONPATH=src python benchmarks/gpu_fp8.py --out fp8.json [--only gemv-8b,many]

Every tiling is checked against float32 and timed on more copies of the weights than the L2 cache
holds. `--warm` only compiles and checks; several such calls at a time fill Triton's cache.
"""

# ruff: noqa: B023  (closures are timed before their loop goes on)

import argparse
import json
import time
import traceback
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

import gpu
import torch
from gpu import COMMON, CONFIGS, RESULTS, graph_ms, note, relative, shapes
from torch import Tensor
from torch.nn import functional as F

from kvist.kernels import linear
from kvist.kernels.fp8 import Fp8Weight, quantize
from kvist.kernels.linear import GemmTuning, GemvTuning, gemm, gemv, many_rows

START = time.time()
LIMIT = 300.0


def copies(n: int, k: int) -> list[Fp8Weight]:
    """Enough random matrices that the L2 cache cannot hold them."""
    count = min(32, max(3, (300 << 20) // (n * k)))
    one = Fp8Weight(*quantize(torch.empty(n, k, device="cuda").normal_(0, k**-0.5)))
    return [one, *(Fp8Weight(one.values.clone(), one.scale) for _ in range(count - 1))]


def timed(call: Callable[[Any], Any], weights: list[Any]) -> float:
    """Microseconds of one call, over all copies."""
    return graph_ms(lambda: [call(w) for w in weights], 10) / len(weights) * 1e3


def attempt(what: dict[str, Any], check: Callable[[], float], us: Callable[[], float]) -> None:
    """Note error and time of a variant, or why it has none."""
    try:
        note(**what, error=check(), us=us())
    except Exception as error:
        note(**what, failed=repr(error)[:200])


def bench_gemv(model: str) -> None:
    """One row."""
    for name, (n, k, epilogue) in shapes(model).items():
        rows = 2 * n if epilogue == "silu" else n
        weights = copies(rows, k)
        x = torch.randn(1, k, device="cuda")
        norm = torch.rand(k, device="cuda").bfloat16() if epilogue != "add" else None
        x = x if epilogue != "add" else x.bfloat16()
        y = x.float() if norm is None else F.rms_norm(x, (k,), norm.float(), 1e-6)
        expected = y @ weights[0].dequantize(torch.float32).T
        if epilogue == "silu":
            expected = F.silu(expected[:, :n]) * expected[:, n:]
        dtype = torch.float32 if epilogue == "add" else torch.bfloat16
        for numbers in ((2, 1024, 4), (4, 1024, 4), (8, 1024, 4), (4, 1024, 2), (2, 2048, 4),
                        (4, 2048, 4), (4, 2048, 8), (8, 1024, 8), (2, 4096, 4), (16, 512, 4),
                        (8, 2048, 8)):  # fmt: skip
            if numbers[1] > 2 * k:
                continue
            out, tuning = torch.zeros(1, n, device="cuda", dtype=dtype), GemvTuning(*numbers)

            def call(w: Any, o: Tensor = out, t: GemvTuning = tuning) -> None:
                gemv(x, w, o, norm=norm, eps=1e-6, epilogue=epilogue, tuning=t)

            def check(o: Tensor = out, c: Any = call) -> float:
                c(weights[0])
                return relative(o, expected)

            attempt({"what": "gemv", "model": model, "product": name, "tuning": numbers},
                    check, lambda c=call: timed(c, weights))  # fmt: skip


def bench_gemm(model: str, m: int) -> None:
    """A few rows, up to as many as a large batch of decodes has; beside bfloat16 by cuBLAS."""
    for name, (n, k, epilogue) in shapes(model).items():
        rows = 2 * n if epilogue == "silu" else n
        weights = copies(rows, k)
        x = torch.randn(m, k, device="cuda").bfloat16()
        expected = x.float() @ weights[0].dequantize(torch.float32).T
        if epilogue == "silu":
            expected = F.silu(expected[:, :n]) * expected[:, n:]
        here = {"what": "gemm", "model": model, "product": name, "m": m}
        whole = [w.dequantize(torch.bfloat16) for w in weights[: len(weights) // 2 + 1]]
        attempt(here | {"tuning": "bf16 cuBLAS"}, lambda: 0.0,
                lambda: timed(lambda w: F.linear(x, w), whole))  # fmt: skip
        if m > 64:
            for fast in (False, True):
                values, scale = linear.quantize(x)

                def scaled(w: Any, f: bool = fast, v: Tensor = values, s: Tensor = scale) -> Any:
                    return torch._scaled_mm(v, w.values.t(), scale_a=s[:, None],
                                            scale_b=w.scale[None], out_dtype=torch.bfloat16,
                                            use_fast_accum=f)  # fmt: skip

                attempt(here | {"tuning": f"scaled_mm, fast {fast}"}, lambda: 0.0,
                        lambda s=scaled: timed(s, weights))  # fmt: skip
            attempt(here | {"tuning": "rounding activations"}, lambda: 0.0,
                    lambda: timed(lambda w: linear.quantize(x), weights))  # fmt: skip
        split = (4, 8) if k // n >= 1 or n <= 2048 else (1, 2)
        if m > 64:
            options = [(128, 64, 1, 8, 4, 128), (64, 64, 1, 4, 4, 128), (128, 128, 1, 8, 3, 128),
                       (64, 128, 1, 4, 3, 128), (128, 64, 1, 8, 4, 256), (64, 128, 1, 4, 4, 64),
                       (128, 64, 1, 4, 4, 64)]  # fmt: skip
            split = (2, 4) if epilogue == "add" else (1,)
        else:
            options = [(64, 128, 1, 4, 4, 128), (64, 256, 1, 4, 3, 128), (32, 128, 1, 4, 4, 128),
                       (32, 256, 1, 4, 3, 128), (128, 128, 1, 8, 3, 128)]  # fmt: skip
            split = split if epilogue == "add" else (1,)
        for numbers in options:
            for splits in split:
                tuning = GemmTuning(numbers[0], numbers[1], splits, *numbers[3:])
                add = epilogue == "add"
                out = torch.full((splits, m, n) if add else (m, n), torch.nan, device="cuda",
                                 dtype=torch.float32 if add else torch.bfloat16)  # fmt: skip

                def call(w: Any, o: Tensor = out, t: Any = tuning) -> None:
                    gemm(x, w, o, silu=epilogue == "silu", tuning=t)

                def check(o: Tensor = out, c: Any = call, add: bool = add) -> float:
                    c(weights[0])
                    return relative(o.sum(0) if add else o, expected)

                attempt(here | {"tuning": (*numbers[:2], splits, *numbers[3:])},
                        check, lambda c=call: timed(c, weights))  # fmt: skip


def bench_many(m: int = 8192) -> None:
    """A prompt's rows: bfloat16, weights widened first, activations rounded too."""
    for model in CONFIGS:
        if model not in ("0.6b", "8b"):
            continue
        for name, (n, k, epilogue) in shapes(model).items():
            rows = 2 * n if epilogue == "silu" else n
            w = copies(rows, k)[0]
            dynamic = Fp8Weight(w.values, w.scale, rounds_activations=True)
            whole = w.dequantize(torch.bfloat16)
            x = torch.randn(m, k, device="cuda").bfloat16()
            expected = F.linear(x, whole)
            for label, weight in (("bf16", whole), ("fp8", w), ("fp8-dynamic", dynamic)):
                attempt({"what": "many", "model": model, "product": name, "m": m, "way": label},
                        lambda y=weight: relative(many_rows(x, y), expected),
                        lambda y=weight: timed(lambda z: many_rows(x, z), [y]))  # fmt: skip


def bench_logprobs() -> None:
    """Log-probabilities and the 20 likeliest of 256 rows."""
    from kvist.kernels.logprobs import logprobs

    logits = torch.randn(256, COMMON["vocab_size"], device="cuda") * 3
    rows = torch.arange(256, device="cuda")
    tokens = torch.randint(0, COMMON["vocab_size"], (256,), device="cuda")

    def torchs(top: int) -> Tensor:
        normalised = torch.log_softmax(logits, -1)
        return normalised.topk(top, dim=-1).values

    for top in (0, 5, 20):
        here = {"what": "logprobs", "top": top}
        expected = torchs(max(top, 1))
        attempt(here | {"way": "kernels"},
                lambda: relative(logprobs(logits, rows, tokens, max(top, 1)).values, expected),
                lambda: 1e3 * graph_ms(lambda: logprobs(logits, rows, tokens, top)))  # fmt: skip
        attempt(here | {"way": "torch"}, lambda: 0.0,
                lambda: graph_ms(lambda: torchs(top), 5) * 1e3)  # fmt: skip


STAGES: dict[str, Callable[[], None]] = {
    "gemv-0.6b": partial(bench_gemv, "0.6b"),
    "gemv-8b": partial(bench_gemv, "8b"),
    "gemm-0.6b-256": partial(bench_gemm, "0.6b", 256),
    "gemm-8b-256": partial(bench_gemm, "8b", 256),
    "gemm-0.6b-16": partial(bench_gemm, "0.6b", 16),
    "gemm-8b-16": partial(bench_gemm, "8b", 16),
    "gemm-0.6b-64": partial(bench_gemm, "0.6b", 64),
    "gemm-8b-64": partial(bench_gemm, "8b", 64),
    "many": bench_many,
    "logprobs": bench_logprobs,
}


def main() -> None:
    """Run the stages; write what there is after each."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="start no stage after this")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, in this order")
    parser.add_argument("--warm", action="store_true", help="compile and check only")
    options = parser.parse_args()
    gpu.WARM = options.warm
    note(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__)
    for name in options.only.split(","):
        if time.time() - START > options.seconds:
            note(what="out of time", stage=name)
            continue
        torch.manual_seed(0)
        try:
            STAGES[name]()
        except Exception as error:
            traceback.print_exc()
            note(what="failed", stage=name, error=repr(error)[:300])
        torch.cuda.empty_cache()
        note(what="stage", name=name, seconds=time.time() - START)
        options.out.write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
