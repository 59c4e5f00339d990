"""The kernels on a GPU: checked against references, then timed in many variants, in one call.

    PYTHONPATH=src python benchmarks/gpu.py --out gpu.json [--seconds 400] [--only steps-0.6b,short]

`--warm` only compiles and checks: several such calls at a time, each with its own stages, fill
Triton's cache before the one that measures. Times are medians over replays of CUDA graphs, so
launches cost nothing; inputs are random and larger than the L2 cache. Every figure stands in the
JSON with its variant.
"""

# ruff: noqa: B023  (closures are timed before their loop goes on)

import argparse
import copy
import json
import statistics
import sys
import time
import traceback
from collections.abc import Callable, Iterable
from functools import partial
from itertools import pairwise
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

START = time.time()
RESULTS: list[dict[str, Any]] = []
PEAK_GB = 4300.0
HEADS = {"0.6b": (16, 8), "8b": (32, 8)}
CONFIGS: dict[str, dict[str, Any]] = {
    "0.6b": {"hidden_size": 1024, "intermediate_size": 3072, "num_hidden_layers": 28,
             "num_attention_heads": 16, "tie_word_embeddings": True},
    "8b": {"hidden_size": 4096, "intermediate_size": 12288, "num_hidden_layers": 36,
           "num_attention_heads": 32, "tie_word_embeddings": False},
}  # fmt: skip
COMMON = {"model_type": "qwen3", "vocab_size": 151936, "num_key_value_heads": 8, "head_dim": 128,
          "max_position_embeddings": 40960, "rope_theta": 1e6}  # fmt: skip


def note(**fields: Any) -> None:
    """Keep a result and print it."""
    row = {k: float(f"{v:.5g}") if isinstance(v, float) else v for k, v in fields.items()}
    RESULTS.append(row)
    print(json.dumps(row), flush=True)


def graph_ms(call: Callable[[], Any], repeats: int = 20, inner: int = 1) -> float:
    """Median milliseconds of one call, from replays of a graph of `inner` calls."""
    if WARM:
        call()
        return 1.0
    stream = torch.cuda.Stream()
    stream.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(stream):
        call()
    torch.cuda.current_stream().wait_stream(stream)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        for _ in range(inner):
            call()
    return replay_ms(graph.replay, repeats) / inner


def replay_ms(call: Callable[[], Any], repeats: int = 20) -> float:
    """Median milliseconds of a call, by events."""
    if WARM:
        call()
        return 1.0
    for _ in range(3):
        call()
    events = [torch.cuda.Event(enable_timing=True) for _ in range(repeats + 1)]
    events[0].record()
    for event in events[1:]:
        call()
        event.record()
    torch.cuda.synchronize()
    pairs = pairwise(events)
    return statistics.median(a.elapsed_time(b) for a, b in pairs)


def relative(ours: Tensor, theirs: Tensor) -> float:
    """Norm of the difference over norm of the reference."""
    return float((ours.double() - theirs.double()).norm() / theirs.double().norm())


# Paged decode attention


def random_planes(kind: str, blocks: int, size: int, heads: int, dim: int) -> Any:
    """A Format of random planes, and what one head's numbers are: `(format, decode)`."""
    from kvist.attention.kernels.formats import FP8, INT4, INT8, PLAIN, Format

    shape = (blocks, size, heads)
    if kind == "bf16":
        x = torch.empty(*shape, dim, device="cuda", dtype=torch.bfloat16).normal_()
        return Format(PLAIN, x), lambda b: x[b].double()
    if kind == "int4":
        codes = torch.randint(0, 256, (*shape, dim // 2), device="cuda", dtype=torch.uint8)
        scale = (torch.rand(*shape, 4, device="cuda") * 0.2 + 0.1).half()
        zero = scale * -7.5

        def decode(b: Tensor) -> Tensor:
            numbers = torch.cat((codes[b] & 15, codes[b] >> 4), -1).double().unflatten(-1, (4, -1))
            return (numbers * scale[b].double()[..., None] + zero[b].double()[..., None]).flatten(
                -2
            )

        return Format(INT4, codes, scale, zero, 4), decode
    scale = (torch.rand(*shape, device="cuda") * 0.02 + 0.01).half()
    numbers = torch.empty(*shape, dim, device="cuda", dtype=torch.bfloat16).normal_(0, 40)
    limit, dtype = (127, torch.int8) if kind == "int8" else (448, torch.float8_e4m3fn)
    x = numbers.clamp_(-limit, limit).to(dtype)
    made = Format(INT8 if kind == "int8" else FP8, x, scale)
    return made, lambda b: x[b].double() * scale[b].double()[..., None]


def bench_decode(kind: str, batch: int = 64, context: int = 8192, block_size: int = 32) -> None:
    """Paged decode attention of one format, in many tilings."""
    from kvist.attention.kernels.launch import Pages, Tuning, Workspace, decode, splits_for
    from kvist.core.spec import AttentionSpec

    kv_heads, dim = 8, 128
    width = context // block_size
    blocks = batch * width + 1
    table = (
        (torch.randperm(blocks - 1, device="cuda")[: batch * width] + 1).int().view(batch, width)
    )
    lens = torch.full((batch,), context, dtype=torch.int32, device="cuda")
    lens[1] = context - 333
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    tilings = {
        "bf16": ((64, 4, 3), (64, 4, 5), (128, 4, 3), (32, 1, 5)),
        "fp8": ((64, 4, 5), (64, 4, 4), (128, 4, 3), (128, 4, 5), (32, 1, 5), (64, 2, 5)),
        "int8": ((64, 4, 5), (32, 1, 5), (64, 2, 5)),
        "int4": ((32, 1, 5), (16, 1, 5), (32, 1, 3), (16, 1, 7)),
    }[kind]
    wide = [Tuning(*numbers) for numbers in tilings]
    good: list[Any] = []
    keys, decode_keys = random_planes(kind, blocks, block_size, kv_heads, dim)
    values, decode_values = random_planes(kind, blocks, block_size, kv_heads, dim)
    size = sum(p.numel() * p.element_size() for f in (keys, values)
               for p in (f.values, f.scales, f.zeros) if p is not None)  # fmt: skip
    size = size * (batch * width) / blocks
    pages = Pages(keys, values, AttentionSpec(kv_heads, dim), block_size, table, lens, starts)
    for model, (heads, _) in HEADS.items():
        q = torch.randn(batch, heads, dim, device="cuda").bfloat16()
        found: list[tuple[float, Any]] = []
        variants = [(t, splits_for(batch)) for t in (wide if model == "0.6b" else good)]
        for tuning, splits in variants:
            out = torch.full_like(q, torch.nan)
            work = Workspace.make(pages, heads, splits.most(context))
            work.partial.fill_(torch.nan)

            def call(t: Any = tuning, s: Any = splits, w: Any = work, o: Any = out) -> None:
                decode(q, pages, o, w, dim**-0.5, ragged=False, splits=s, tuning=t)

            name = {"tile": tuning.tile, "warps": tuning.warps, "stages": tuning.stages,
                    "split": splits.length(context)}  # fmt: skip
            try:
                call()
                error = max(
                    relative(out[b], one_sequence(q[b], table[b].long(), int(lens[b]),
                                                  decode_keys, decode_values))
                    for b in (0, 1, batch - 1)
                )  # fmt: skip
                ms = graph_ms(call, 10)
            except Exception as error_:
                note(what="decode attention", kind=kind, model=model, **name,
                     error=repr(error_)[:300])  # fmt: skip
                continue
            note(what="decode attention", kind=kind, model=model, **name, ms=ms, error=error,
                 gb_s=size / ms / 1e6, fraction=size / ms / 1e6 / PEAK_GB)  # fmt: skip
            if error < 2e-2:
                found.append((ms, tuning))
        found.sort(key=lambda pair: pair[0])
        good = list(dict.fromkeys(tuning for _, tuning in found))[:2]
        if found:
            note(what="decode attention, best", kind=kind, model=model, ms=found[0][0])


def bench_compiled(kind: str, block_size: int = 32) -> None:
    """The same by the kernel in CUDA C++, of equal long contexts and of unequal short ones."""
    from kvist.attention.kernels import compiled
    from kvist.attention.kernels.launch import Pages, Workspace, decode, most_splits, splits_for
    from kvist.core.spec import AttentionSpec

    kv_heads, dim = 8, 128
    uneven = torch.randint(100, 2000, (256,), generator=torch.Generator().manual_seed(0)).tolist()
    for what, lengths in (("64 x 8192", [8192] * 63 + [7859]), ("256 of 100 to 2000", uneven)):
        batch, width = len(lengths), -(-max(lengths) // block_size)
        table = (torch.randperm(batch * width, device="cuda") + 1).int().view(batch, width)
        lens = torch.tensor(lengths, dtype=torch.int32, device="cuda")
        starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
        keys, decode_keys = random_planes(kind, batch * width + 1, block_size, kv_heads, dim)
        values, decode_values = random_planes(kind, batch * width + 1, block_size, kv_heads, dim)
        size = sum(p[0, 0].numel() * p.element_size() for f in (keys, values)
                   for p in (f.values, f.scales, f.zeros) if p is not None)  # fmt: skip
        size *= sum(lengths)
        pages = Pages(keys, values, AttentionSpec(kv_heads, dim), block_size, table, lens, starts)
        for model, (heads, _) in HEADS.items():
            q = torch.randn(batch, heads, dim, device="cuda").bfloat16()
            out = torch.full_like(q, torch.nan)
            splits = splits_for(batch)
            work = Workspace.make(pages, heads, most_splits(pages, max(lengths), splits))
            calls: dict[str, Callable[[], None]] = {
                "Triton": lambda: decode(q, pages, out, work, dim**-0.5, ragged=False)
            }
            if compiled.can_decode(q, pages, rotate=False):
                most = most_splits(pages, max(lengths), compiled.splits_for(batch))
                plan = compiled.make_plan(pages, heads, most, ragged=False)
                calls["CUDA C++"] = lambda: compiled.decode(q, pages, out, plan, dim**-0.5)
            for by, call in calls.items():
                call()
                error = max(
                    relative(out[b], one_sequence(q[b], table[b].long(), lengths[b],
                                                  decode_keys, decode_values))
                    for b in (0, 1, batch - 1)
                )  # fmt: skip
                ms = graph_ms(call, 10)
                note(what="decode attention", of=what, kind=kind, model=model, by=by, ms=ms,
                     error=error, fraction=size / ms / 1e6 / PEAK_GB)  # fmt: skip


def one_sequence(q: Tensor, blocks: Tensor, n: int, keys: Any, values: Any) -> Tensor:
    """Attention of one query in float64."""
    k, v = (decode(blocks).flatten(0, 1)[:n] for decode in (keys, values))
    grouped = q.double().unflatten(0, (k.shape[1], -1))
    weights = (torch.einsum("hgd,thd->hgt", grouped, k) * q.shape[-1] ** -0.5).softmax(-1)
    return torch.einsum("hgt,thd->hgd", weights, v).flatten(0, 1)


def bench_short(kind: str, block_size: int = 32) -> None:
    """256 contexts of 100 to 2,000 tokens: where to split, how many programs."""
    from kvist.attention.kernels import launch
    from kvist.attention.kernels.launch import Pages, Splits, Workspace, decode
    from kvist.core.spec import AttentionSpec

    heads, kv_heads, dim, batch = 16, 8, 128, 256
    usual = launch.WARPS
    lengths = torch.randint(100, 2000, (batch,), generator=torch.Generator().manual_seed(0))
    width = -(-int(lengths.max()) // block_size)
    order = (torch.randperm(batch * width, device="cuda") + 1).int().view(batch, width)
    lens = lengths.int().cuda()
    starts = torch.arange(batch + 1, dtype=torch.int32, device="cuda")
    q = torch.randn(batch, heads, dim, device="cuda").bfloat16()
    out = torch.empty_like(q)
    keys, _ = random_planes(kind, batch * width + 1, block_size, kv_heads, dim)
    values, _ = random_planes(kind, batch * width + 1, block_size, kv_heads, dim)
    pages = Pages(keys, values, AttentionSpec(kv_heads, dim), block_size, order, lens, starts)
    for splits in (Splits(), Splits(128), Splits(256), Splits(512)):
        # As a recording for contexts of up to 4,096 tokens has it.
        work = Workspace.make(pages, heads, splits.most(4096))
        for warps in (4096, 8192, 16384, 1 << 22):
            launch.WARPS = warps

            def call(s: Any = splits, w: Any = work) -> None:
                decode(q, pages, out, w, dim**-0.5, ragged=False, splits=s)

            note(what="short contexts", kind=kind, shortest=splits.shortest, warps=warps,
                 us=1e3 * graph_ms(call, 20, inner=4))  # fmt: skip
    launch.WARPS = usual


def bench_prefill(length: int = 8192, block_size: int = 32) -> None:
    """Paged prefill attention of one prompt against torch's, both causal."""
    from torch.nn.attention import SDPBackend, sdpa_kernel

    from kvist.attention.kernels.launch import Pages, Tuning, list_runs, prefill, run_length
    from kvist.core.spec import AttentionSpec

    kv_heads, dim = 8, 128
    width = length // block_size
    lens = torch.tensor([length], dtype=torch.int32, device="cuda")
    starts = torch.tensor([0, length], dtype=torch.int32, device="cuda")
    table = (torch.randperm(width, device="cuda") + 1).int().view(1, width)
    for model, (heads, _) in HEADS.items():
        q = torch.randn(length, heads, dim, device="cuda").bfloat16()
        flops = 4 * heads * dim * length**2 / 2
        for kind in ("bf16", "fp8", "int8", "int4"):
            keys, decode_keys = random_planes(kind, width + 1, block_size, kv_heads, dim)
            values, decode_values = random_planes(kind, width + 1, block_size, kv_heads, dim)
            k, v = (d(table[0].long()).flatten(0, 1).bfloat16().transpose(0, 1)[None]
                    for d in (decode_keys, decode_values))  # fmt: skip
            spread = q.transpose(0, 1)[None]
            expected = torch.nn.functional.scaled_dot_product_attention(
                spread, k, v, is_causal=True, enable_gqa=True
            )[0].transpose(0, 1)
            if kind == "bf16":
                for backend in (SDPBackend.CUDNN_ATTENTION, SDPBackend.FLASH_ATTENTION):
                    try:
                        with sdpa_kernel(backend):
                            ms = graph_ms(lambda k=k, v=v, spread=spread: torch.nn.functional
                                          .scaled_dot_product_attention(
                                spread, k, v, is_causal=True, enable_gqa=True), 5)  # fmt: skip
                        note(what="prefill attention", model=model, kind=str(backend), ms=ms,
                             tflops=flops / ms / 1e9)  # fmt: skip
                    except Exception as error:
                        note(what="prefill attention", kind=str(backend), error=repr(error)[:200])
            spec = AttentionSpec(kv_heads, dim)
            pages = Pages(keys, values, spec, block_size, table, lens, starts)
            variants = [(Tuning(64, 4, 3), 128), (Tuning(64, 4, 2), 64), (Tuning(128, 4, 2), 64),
                        (Tuning(128, 4, 3), 64), (Tuning(128, 8, 3), 128)]  # fmt: skip
            for tuning, rows in variants:
                queries = run_length(heads, kv_heads, rows)
                runs = list_runs(pages, queries, -(-length // queries))
                out = torch.full_like(q, torch.nan)
                name = {"tile": tuning.tile, "warps": tuning.warps, "stages": tuning.stages,
                        "rows": rows}  # fmt: skip
                try:

                    def call(
                        t: Any = tuning, r: Any = runs, o: Any = out, n: Any = queries
                    ) -> None:
                        prefill(q, pages, o, r, dim**-0.5, tuning=t, queries=n)

                    call()
                    error = relative(out, expected)
                    ms = graph_ms(call, 5)
                    note(what="prefill attention", model=model, kind=kind, **name, ms=ms,
                         error=error, tflops=flops / ms / 1e9)  # fmt: skip
                except Exception as error_:
                    note(what="prefill attention", model=model, kind=kind, **name,
                         error=repr(error_)[:200])  # fmt: skip


# Products of a decode step


def shapes(model: str) -> dict[str, tuple[int, int, str]]:
    """Name -> (N of the output, K, epilogue)."""
    c = CONFIGS[model]
    hidden, mlp = c["hidden_size"], c["intermediate_size"]
    q = c["num_attention_heads"] * 128
    return {
        "qkv": (q + 2048, hidden, "store"),
        "o": (hidden, q, "add"),
        "gate_up": (mlp, hidden, "silu"),
        "down": (hidden, mlp, "add"),
    }


def weight_copies(n: int, k: int) -> list[Tensor]:
    """Enough random matrices that the L2 cache cannot hold them."""
    count = min(32, max(4, (400 << 20) // (n * k * 2)))
    return [torch.empty(n, k, device="cuda", dtype=torch.bfloat16).normal_(0, k**-0.5)
            for _ in range(count)]  # fmt: skip


def bench_gemv(models: Iterable[str]) -> None:
    """One row: tilings of each product, checked against float32."""
    from kvist.kernels.linear import GemvTuning, gemv

    for model in models:
        cases = dict(shapes(model))
        cases["lm_head"] = (151936, CONFIGS[model]["hidden_size"], "store")
        for name, (n, k, epilogue) in cases.items():
            rows = 2 * n if epilogue == "silu" else n
            weights = weight_copies(rows, k)
            x = torch.randn(1, k, device="cuda")
            x = x if epilogue != "add" else x.bfloat16()
            norm = None if epilogue == "add" else torch.rand(k, device="cuda").bfloat16()
            dtype = torch.float32 if epilogue == "add" or n > 100000 else torch.bfloat16
            product = x.float() if norm is None else torch.nn.functional.rms_norm(
                x, (k,), norm.float(), 1e-6)  # fmt: skip
            product = product @ weights[0].float().T
            if epilogue == "silu":
                product = torch.nn.functional.silu(product[:, :n]) * product[:, n:]
            tunings = [GemvTuning(r, b, w) for r, b, w in (
                (2, 1024, 2), (4, 1024, 2), (4, 1024, 4), (8, 1024, 4), (8, 1024, 8),
                (8, 512, 4), (16, 512, 4), (16, 1024, 8), (2, 1024, 4), (2, 2048, 4),
                (4, 2048, 8), (1, 1024, 4))]  # fmt: skip
            for tuning in tunings[1:] if n > 100000 else tunings:
                out = torch.zeros(1, n, device="cuda", dtype=dtype)
                fixed = {"norm": norm, "eps": 1e-6, "epilogue": epilogue, "tuning": tuning}
                try:
                    gemv(x, weights[0], out, **fixed)
                    error = relative(out, product)

                    def call(o: Tensor = out, f: Any = fixed) -> None:
                        for w in weights:
                            gemv(x, w, o, **f)

                    us = graph_ms(call, 10) / len(weights) * 1e3
                except Exception as error_:
                    note(what="gemv", model=model, product=name, tuning=str(tuning),
                         error=repr(error_)[:200])  # fmt: skip
                    continue
                note(what="gemv", model=model, product=name, rows=tuning.rows,
                     block_k=tuning.block_k, warps=tuning.warps, us=us, error=error,
                     gb_s=rows * k * 2 / us / 1e3)  # fmt: skip


def bench_gemm() -> None:
    """8 and 64 rows: tilings of each product against cuBLAS."""
    from kvist.kernels.linear import GemmTuning, gemm

    for name, (n, k, epilogue) in shapes("0.6b").items():
        rows = 2 * n if epilogue == "silu" else n
        weights = weight_copies(rows, k)
        for m in (8, 64):
            x = torch.randn(m, k, device="cuda").bfloat16()
            product = x.float() @ weights[0].float().T
            if epilogue == "silu":
                product = torch.nn.functional.silu(product[:, :n]) * product[:, n:]
            us = graph_ms(
                lambda x=x, ws=weights: [torch.nn.functional.linear(x, w) for w in ws], 10
            )
            note(what="gemm", product=name, m=m, tuning="cuBLAS", us=us / len(weights) * 1e3)
            if epilogue == "add":
                options = [(32, 128, 8, 4, 3), (32, 128, 4, 4, 3), (16, 256, 4, 4, 3),
                           (16, 256, 8, 4, 2), (64, 128, 8, 4, 3)]  # fmt: skip
            else:
                options = [(32, 128, 1, 4, 4), (16, 256, 1, 4, 4), (16, 128, 1, 4, 5),
                           (64, 128, 1, 4, 3), (32, 256, 1, 8, 3)]  # fmt: skip
            for numbers in options:
                tuning = GemmTuning(*numbers)
                shape = (tuning.splits, m, n) if epilogue == "add" else (m, n)
                dtype = torch.float32 if epilogue == "add" else torch.bfloat16
                out = torch.full(shape, torch.nan, device="cuda", dtype=dtype)
                silu = epilogue == "silu"
                try:
                    gemm(x, weights[0], out, silu=silu, tuning=tuning)
                    error = relative(out.sum(0) if epilogue == "add" else out, product)

                    def call(o: Tensor = out, t: Any = tuning, x: Tensor = x,
                             s: bool = silu, ws: Any = weights) -> None:  # fmt: skip
                        for w in ws:
                            gemm(x, w, o, silu=s, tuning=t)

                    us = graph_ms(call, 10) / len(weights) * 1e3
                    note(what="gemm", product=name, m=m, tuning=str(numbers), us=us, error=error)
                except Exception as error_:
                    note(what="gemm", product=name, m=m, tuning=str(numbers),
                         error=repr(error_)[:200])  # fmt: skip


# Whole steps


def make_model(name: str) -> Any:
    """A random bfloat16 Qwen3 of the published shape."""
    from kvist.models import family_of

    config = COMMON | CONFIGS[name]
    family = family_of(config)
    with torch.device("meta"):
        lm = family.build(family.read(config))
    lm = lm.to(torch.bfloat16).to_empty(device="cuda").eval().requires_grad_(False)
    for key, weight in lm.named_parameters():
        if "norm" in key:
            weight.data.normal_(1.0, 0.1)
        else:
            weight.data.normal_(0.0, weight.shape[-1] ** -0.5)
    if config["tie_word_embeddings"]:
        lm.lm_head.weight = lm.model.embed_tokens.weight
    return lm


def bind_step(pool: Any, rows: int, context: int) -> Any:
    """A decode batch of `rows` sequences at `context - 1` cached tokens, and its binding."""
    from kvist.cache import Batch

    tokens = torch.randint(0, 10000, (rows,)).tolist()
    batch = Batch.pack([[t] for t in tokens], [context - 1] * rows, device="cuda")
    return batch, pool.bind(batch)


def make_pool(
    lm: Any, rows: int, context: int, tokens: int, dtype: torch.dtype = torch.bfloat16
) -> Any:
    """A pool with full tables for `rows` sequences of up to `context` tokens, random contents."""
    from kvist.cache import make_codec
    from kvist.cache.paged import PagedPool
    from kvist.core.plan import GroupChanges, TableChange

    size = 32
    width = -(-context // size)
    pool = PagedPool(lm.specs, make_codec("plain", dtype), num_blocks=rows * width + 1,
                     block_size=size, max_slots=max(rows, 8), max_blocks=width,
                     max_tokens=max(tokens, 8), device="cuda")  # fmt: skip
    for sides in pool.pools[0].planes.values():
        for planes in sides.values():
            planes["x"].normal_()
    order = (torch.randperm(rows * width, generator=torch.Generator().manual_seed(0)) + 1).tolist()
    tables = tuple(TableChange(i, 0, tuple(order[i * width : (i + 1) * width]))
                   for i in range(rows))  # fmt: skip
    pool.apply([GroupChanges(tables=tables)])
    return pool


def in_float32(lm: Any, pool: Any, batch: Any, rows: int, context: int) -> Tensor:
    """Logits of the same step from the same weights and keys, all in float32."""
    from kvist.runner.step import model_step

    exact = copy.deepcopy(lm).float()
    wide = make_pool(exact, rows, context, rows, torch.float32)
    for layer, sides in pool.pools[0].planes.items():
        for side, planes in sides.items():
            wide.pools[0].planes[layer][side]["x"].copy_(planes["x"])
    return model_step(exact)(batch, wide.bind(batch, backend="sdpa"))


@torch.inference_mode()
def bench_steps(names: Iterable[str]) -> None:
    """Decode steps and an 8192-token prefill, whole: checked against the model's own step."""
    from kvist.cache import Batch
    from kvist.runner.fused import FusedStep
    from kvist.runner.step import model_step

    for name in names:
        lm = make_model(name)
        nbytes = 2 * sum(
            p.numel() for k, p in lm.named_parameters() if name == "0.6b" or "embed" not in k
        )
        reference = model_step(lm)
        for rows, context in ((1, 512), (8, 512), (64, 512), (256, 576)):
            pool = make_pool(lm, rows, context, rows)
            kv_bytes = 4 * rows * context * 8 * 128 * len(lm.specs)
            floor = (nbytes + kv_bytes) / PEAK_GB / 1e6
            batch, binding = bind_step(pool, rows, context)
            expected = reference(batch, binding).float()
            exact = in_float32(lm, pool, batch, rows, context) if rows <= 8 else expected
            note(what="model's own step", model=name, rows=rows, error=relative(expected, exact))
            for dependent in (False, True):
                try:
                    step = FusedStep(lm, dependent=dependent)
                    logits, again = step(batch, binding), step(batch, binding)
                    gpu_ms = graph_ms(lambda s=step, b=batch, c=binding: s(b, c), 30)
                    note(what="decode step", model=name, rows=rows, context=context,
                         dependent=dependent, gpu_ms=gpu_ms, tok_s=rows / gpu_ms * 1e3,
                         floor_ms=floor, error=relative(logits, exact),
                         same_argmax=float((logits.argmax(-1) == exact.argmax(-1)).float().mean()),
                         same_bits=bool(logits.equal(again)))  # fmt: skip
                except Exception as error:
                    traceback.print_exc()
                    note(what="decode step", model=name, rows=rows, error=repr(error)[:300])
            del pool, binding
            torch.cuda.empty_cache()
            if time.time() - START > LIMIT:
                return
        pool = make_pool(lm, 1, 8192, 8192)
        batch = Batch.pack([torch.randint(0, 10000, (8192,)).tolist()], [0], device="cuda")
        expected = reference(batch, pool.bind(batch)).float()
        step = FusedStep(lm)
        for attention in ("triton", "sdpa"):
            binding = pool.bind(batch, backend=attention)
            logits = step(batch, binding)
            ms = replay_ms(lambda s=step, b=batch, c=binding: s(b, c), 5)
            note(what="prefill", model=name, tokens=8192, attention=attention, ms=ms,
                 error=relative(logits, expected))  # fmt: skip
        del lm, pool, step, binding, reference
        torch.cuda.empty_cache()


def bench_ceilings() -> None:
    """A large copy and a large product."""
    a = torch.empty(1 << 31, dtype=torch.uint8, device="cuda").random_()
    b = torch.empty_like(a)
    note(what="copy", gb_s=2 * a.numel() / graph_ms(lambda: b.copy_(a), 10) / 1e6)


KINDS = ("bf16", "fp8", "int8", "int4")
STAGES: dict[str, Callable[[], None]] = {
    "ceilings": bench_ceilings,
    **{f"decode-{kind}": partial(bench_decode, kind) for kind in KINDS},
    **{f"compiled-{kind}": partial(bench_compiled, kind) for kind in KINDS},
    "steps-0.6b": partial(bench_steps, ("0.6b",)),
    **{f"short-{kind}": partial(bench_short, kind) for kind in KINDS},
    "prefill": bench_prefill,
    "gemv-0.6b": partial(bench_gemv, ("0.6b",)),
    "gemm": bench_gemm,
    "steps-8b": partial(bench_steps, ("8b",)),
    "gemv-8b": partial(bench_gemv, ("8b",)),
}
LIMIT = 420.0
WARM = False


def main() -> None:
    """Run the stages until the time is up; write what there is."""
    global LIMIT, WARM
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="start no stage after this")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, in this order")
    parser.add_argument("--warm", action="store_true", help="compile and check only")
    options = parser.parse_args()
    LIMIT, WARM = options.seconds, options.warm
    import triton

    note(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__,
         triton=triton.__version__, command=" ".join(sys.argv))  # fmt: skip
    for name in options.only.split(","):
        if time.time() - START > LIMIT:
            note(what="out of time", stage=name)
            continue
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
