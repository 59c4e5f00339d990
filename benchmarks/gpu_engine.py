"""The engine on a GPU: the workloads of the field, through `kvist.LLM` itself, in one call.

    python benchmarks/gpu_engine.py --out engine.json [--seconds 200] [--only decode-0.6b,…]

Qwen3 of the published shapes with random bfloat16 weights, token ids in and out. `decode`: one
sequence, 128 tokens of context, 256 new ones, greedy. `prefill`: one prompt of 8,192. `batch`: 256
sequences, prompts and outputs uniform from 100 to 1,024 (`random.seed(0)`, prompts drawn first, ids
0..10000), temperature 0.6. `start`: a fresh process from safetensors to its first token. Every
stage is timed by the host, around what a user calls; stages stop when the time is up.
"""

import argparse
import gc
import json
import os
import random
import subprocess
import sys
import tempfile
import time
import traceback
from collections import defaultdict
from collections.abc import Callable
from functools import partial
from pathlib import Path
from typing import Any

START = time.time()
LIMIT = 200.0
PROFILE: Path | None = None
# What 4.3 TB/s and 780 TFLOP/s allow: least milliseconds, or most tokens a second.
FLOORS = {
    ("0.6b", "decode"): 3600, ("8b", "decode"): 263,
    ("0.6b", "prefill"): 19, ("8b", "prefill"): 169,
    ("0.6b", "batch plain"): 36500, ("0.6b", "batch fp8"): 65000, ("0.6b", "batch int4"): 99000,
    ("8b", "batch plain"): 13000, ("8b", "batch fp8"): 16300,
    ("0.6b, fp8", "decode"): 5700, ("8b, fp8", "decode"): 525,
}  # fmt: skip
# Tokens of a step of the batch: prompts are spread over steps that decode, beside which they cost
# less, since products of a few hundred rows wait for their weights as well.
STEP = {"0.6b": 512, "8b": 384}
_MODELS: dict[str, Any] = {}


def left() -> float:
    """Seconds until no new work is begun."""
    return LIMIT - (time.time() - START)


def loaded(name: str) -> Any:
    """A random model of this shape, made once; "0.6b, fp8" with such weights."""
    import torch
    from gpu import make_model

    from kvist.loading.model import Model
    from kvist.models.fp8 import Fp8Linear, use_fp8

    if name not in _MODELS:
        _MODELS.clear()
        gc.collect()
        torch.cuda.empty_cache()
        torch.manual_seed(0)
        shape, _, weights = name.partition(", ")
        lm = make_model(shape)
        use_fp8(lm, weights or "auto")
        for module in lm.modules():
            if isinstance(module, Fp8Linear):
                module.take(module.weight.data)
        device = torch.device("cuda:0")
        _MODELS[name] = Model(name, lm, None, torch.bfloat16, device, weights=weights or "auto")
    return _MODELS[name]


def report(model: str, what: str, value: float, unit: str, **more: Any) -> None:
    """Note a figure beside its floor."""
    from gpu import note

    floor = FLOORS.get((model, what))
    part = None
    if floor is not None:
        part = value / floor if unit == "tok/s" else floor / value
    note(model=model, what=what, value=value, unit=unit, of_floor=part, **more)


def spent(llm: Any) -> dict[str, float]:
    """Count, from now on, the seconds that the host spends in each part of a step."""
    seconds: dict[str, float] = defaultdict(float)

    def timed(owner: Any, name: str, label: str) -> None:
        call = getattr(owner, name)

        def counted(*args: Any, **options: Any) -> Any:
            began = time.perf_counter()
            try:
                return call(*args, **options)
            finally:
                seconds[label] += time.perf_counter() - began

        setattr(owner, name, counted)

    engine = llm.engine
    timed(engine.scheduler, "schedule", "schedule")
    timed(engine.scheduler, "commit", "commit")
    timed(llm._desk, "take", "take")
    execute = engine.runner.execute

    def launched(plan: Any) -> Any:
        began = time.perf_counter()
        ticket = execute(plan)
        seconds["execute"] += time.perf_counter() - began
        seconds["steps"] += 1
        timed(ticket, "result", "wait")
        return ticket

    engine.runner.execute = launched
    return seconds


def bench_decode(name: str) -> None:
    """One sequence."""
    import kvist

    llm = kvist.LLM(loaded(name), max_num_seqs=1, max_model_len=1024, prefix_cache=False)
    params = kvist.SamplingParams(temperature=0, max_tokens=256, ignore_eos=True)
    rng = random.Random(0)
    prompts = [[rng.randrange(10000) for _ in range(128)] for _ in range(5)]
    began = time.time()
    llm.generate(prompts[:1], params)
    first = time.time() - began
    settled(llm)
    llm.generate(prompts[:1], params)
    rates = []
    for i, prompt in enumerate(prompts[1:]):
        parts = spent(llm) if i == 3 else {}
        [result] = llm.generate([prompt], params)
        rates.append(255 / result.timings.decode)
    report(name, "decode", sorted(rates)[-2], "tok/s", runs=[round(r, 1) for r in rates],
           executor=llm.engine.executor, first_s=first, parts_ms=per_step(parts))  # fmt: skip


def settled(llm: Any) -> None:
    """Wait for what is compiled beside serving."""
    from kvist.runner.one_launch import OneLaunchStep

    if isinstance(step := llm.engine.runner.step, OneLaunchStep):
        step.settle()


def per_step(parts: dict[str, float]) -> dict[str, float]:
    """Milliseconds of a step in each part."""
    steps = max(parts.get("steps", 0), 1)
    return {k: round(1e3 * v / steps, 3) for k, v in parts.items() if k != "steps"} | {
        "steps": steps
    }


def bench_prefill(name: str) -> None:
    """One prompt of 8,192 tokens, to its first token."""
    import kvist

    llm = kvist.LLM(loaded(name), max_num_seqs=1, max_model_len=8200, max_batch_tokens=8192,
                    prefix_cache=False)  # fmt: skip
    params = kvist.SamplingParams(temperature=0, max_tokens=1, ignore_eos=True)
    rng = random.Random(0)
    times = []
    for i in range(6):
        prompt = [rng.randrange(10000) for _ in range(8192)]
        with profiled(f"prefill-{name}", on=i == 5):
            began = time.perf_counter()
            llm.generate([prompt], params)
            times.append(1e3 * (time.perf_counter() - began))
    report(name, "prefill", sorted(times[1:])[1], "ms", runs=[round(t, 2) for t in times])


def workload() -> tuple[list[list[int]], list[int]]:
    """The 256 prompts, and how many tokens each is to be answered with."""
    rng = random.Random(0)
    prompts = [[rng.randint(0, 10000) for _ in range(rng.randint(100, 1024))] for _ in range(256)]
    return prompts, [rng.randint(100, 1024) for _ in range(256)]


def bench_batch(name: str, codec: str, **options: Any) -> None:
    """256 sequences at a time."""
    import kvist

    model = loaded(name)
    step = STEP[name.partition(",")[0]]
    settings: dict[str, Any] = {"max_num_seqs": 256, "max_model_len": 2048, "codec": codec,
                                "max_batch_tokens": step, "prefix_cache": False,
                                "block_size": 32} | options  # fmt: skip
    llm = kvist.LLM(model, **settings)
    prompts, lengths = workload()
    params = [
        kvist.SamplingParams(temperature=0.6, seed=i, max_tokens=n, ignore_eos=True)
        for i, n in enumerate(lengths)
    ]
    began = time.time()
    llm.generate(prompts, params)  # once, so that all is compiled and recorded
    warm = time.time() - began
    runs: list[float] = []
    parts: dict[str, float] = {}
    while len(runs) < 2 and (not runs or left() > 2 * runs[0]):
        parts = spent(llm) if runs else {}
        began = time.perf_counter()
        results = llm.generate(prompts, params)
        runs.append(time.perf_counter() - began)
        assert sum(len(r.token_ids) for r in results) == sum(lengths)
    seconds = min(runs)
    report(name, f"batch {codec}", sum(lengths) / seconds, "tok/s", seconds=seconds, warm_s=warm,
           runs=[round(sum(lengths) / s) for s in runs], options=options,
           parts_ms=per_step(parts))  # fmt: skip
    # A few steps of the whole batch, seen by the profiler.
    if PROFILE is not None:
        few = [kvist.SamplingParams(temperature=0.6, max_tokens=6, ignore_eos=True)] * 256
        with profiled(f"batch-{name}-{codec}", on=True):
            llm.generate([p[:64] for p in prompts], few)


class profiled:  # noqa: N801
    """Write what the GPU did, by kernel, where a profile is asked for."""

    def __init__(self, name: str, *, on: bool) -> None:
        """Do nothing unless `on` and a folder was given."""
        self.name, self.on = name, on and PROFILE is not None

    def __enter__(self) -> None:
        """Begin."""
        if self.on:
            from torch.profiler import ProfilerActivity, profile

            self.profile = profile(activities=[ProfilerActivity.CUDA])
            self.profile.__enter__()

    def __exit__(self, *_: object) -> None:
        """End, and write the table."""
        if self.on and PROFILE is not None:
            import torch

            torch.cuda.synchronize()
            self.profile.__exit__(None, None, None)
            table = self.profile.key_averages().table(
                sort_by="self_device_time_total", row_limit=24, max_name_column_width=60
            )
            (PROFILE / f"{self.name}.txt").write_text(table)


def bench_equal(name: str) -> None:
    """The same greedy tokens overlapped or not, replayed or launched."""
    from gpu import note

    import kvist

    rng = random.Random(1)
    prompts = [[rng.randrange(10000) for _ in range(rng.randrange(4, 300))] for _ in range(8)]
    params = kvist.SamplingParams(temperature=0, max_tokens=48, ignore_eos=True)
    found: dict[str, Any] = {}
    for label, options in (
        ("overlapped, replayed", {}),
        ("plain, replayed", {"overlap": False}),
        ("overlapped, launched", {"graphs": False}),
        ("plain, launched", {"graphs": False, "overlap": False}),
    ):
        llm = kvist.LLM(loaded(name), max_num_seqs=8, max_model_len=1024, prefix_cache=False,
                        **options)  # fmt: skip
        found[label] = [r.token_ids for r in llm.generate(prompts, params)]
    first = found["overlapped, replayed"]
    for label, tokens in found.items():
        same = sum(a == b for x, y in zip(first, tokens, strict=True)
                   for a, b in zip(x, y, strict=True))  # fmt: skip
        note(model=name, what="equal tokens", way=label, same=same, of=8 * 48)


def bench_verify() -> None:
    """`kvist verify` on a small float32 model."""
    import torch
    from gpu import CONFIGS, make_model, note

    from kvist.loading.model import Model
    from kvist.reports.verify import verify

    CONFIGS["small"] = {"hidden_size": 256, "intermediate_size": 512, "num_hidden_layers": 4,
                        "num_attention_heads": 16, "tie_word_embeddings": True}  # fmt: skip
    model = Model("small", make_model("small").float(), None, torch.float32, torch.device("cuda:0"))
    for check in verify(model, new_tokens=16, codecs=["fp8", "int4"]):
        note(what="verify", **check.as_json())
        if left() < 5:
            break


def bench_roofline(*names: str) -> None:
    """What bounds prefill and decode of each model, as `kvist roofline` says it; with a picture."""
    from dataclasses import replace

    from gpu import note

    from kvist.reports.roofline import measure, plot

    found = []
    for name in names:
        model = loaded(name)
        long = measure(model, prompt=8192, new_tokens=16, batches=(1,))
        short = measure(model, prompt=512, new_tokens=16, batches=(8, 64))
        found.append(replace(long, model=name, points=(*long.points, *short.points[1:])))
        for point in found[-1].points:
            note(model=name, **point.as_json())
        if PROFILE is not None:
            plot(found, PROFILE / "roofline.png")


CHILD = """
import sys, time
import kvist
llm = kvist.LLM({path!r}, device="cuda", max_num_seqs=8, max_model_len=1024)
made = time.time()
params = kvist.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)
first = llm.generate([list(range(5, 133))], kvist.SamplingParams(temperature=0, max_tokens=1))
done = time.time()
llm.generate([list(range(5, 133))], params)
names = ("gguf", "huggingface_hub", "tokenizers", "jinja2", "transformers", "fastapi", "rich")
print(made, done, time.time(), *[n for n in names if n in sys.modules])
"""


def bench_start() -> None:
    """A fresh process: safetensors, first token; with and without Triton's cache of kernels."""
    from gpu import COMMON, CONFIGS, note
    from safetensors.torch import save_file

    model = loaded("0.6b")
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / "model"
        path.mkdir()
        (path / "config.json").write_text(json.dumps(COMMON | CONFIGS["0.6b"] | {
            "dtype": "bfloat16"}))  # fmt: skip
        tensors = dict(model.lm.named_parameters())
        save_file({k: v.contiguous() for k, v in tensors.items()}, path / "model.safetensors")
        for label in ("no kernels cached", "kernels cached"):
            if left() < 20:
                break
            environment = os.environ | {"TRITON_CACHE_DIR": f"{folder}/triton"}
            began = time.time()
            child = subprocess.run(
                [sys.executable, "-c", CHILD.format(path=str(path))],
                env=environment, capture_output=True, text=True, check=False,
            )  # fmt: skip
            if child.returncode:
                note(what="start", error=child.stderr[-800:])
                return
            made, done, end, *heavy = child.stdout.split()
            note(what="start", label=label, engine_s=float(made) - began,
                 first_token_s=float(done) - began, nine_tokens_s=float(end) - began,
                 heavy_imports=heavy)  # fmt: skip


STAGES: dict[str, Callable[[], None]] = {
    "equal": partial(bench_equal, "0.6b"),
    "decode-0.6b": partial(bench_decode, "0.6b"),
    "prefill-0.6b": partial(bench_prefill, "0.6b"),
    "batch-0.6b": partial(bench_batch, "0.6b", "plain"),
    "batch-0.6b-fp8": partial(bench_batch, "0.6b", "fp8"),
    "batch-0.6b-int4": partial(bench_batch, "0.6b", "int4"),
    "start": bench_start,
    "decode-8b": partial(bench_decode, "8b"),
    "prefill-8b": partial(bench_prefill, "8b"),
    "batch-8b": partial(bench_batch, "8b", "plain"),
    "batch-8b-fp8": partial(bench_batch, "8b", "fp8"),
    "decode-0.6b-weights": partial(bench_decode, "0.6b, fp8"),
    "batch-0.6b-weights": partial(bench_batch, "0.6b, fp8", "plain"),
    "batch-0.6b-dynamic": partial(bench_batch, "0.6b, fp8-dynamic", "plain"),
    "decode-8b-weights": partial(bench_decode, "8b, fp8"),
    "batch-8b-weights": partial(bench_batch, "8b, fp8", "plain"),
    "prefill-8b-dynamic": partial(bench_prefill, "8b, fp8-dynamic"),
    "batch-8b-dynamic": partial(bench_batch, "8b, fp8-dynamic", "plain"),
    "verify": bench_verify,
    "roofline": partial(bench_roofline, "0.6b", "8b"),
}


def main() -> None:
    """Run the stages until the time is up; write what there is after each."""
    global LIMIT, PROFILE
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--out", type=Path, required=True, help="where the JSON goes")
    parser.add_argument("--seconds", type=float, default=LIMIT, help="start no stage after this")
    parser.add_argument("--only", default=",".join(STAGES), help="stages, in this order")
    parser.add_argument("--profile", type=Path, help="folder for tables of what the GPU did")
    options = parser.parse_args()
    LIMIT, PROFILE = options.seconds, options.profile
    import torch
    import triton
    from gpu import RESULTS, note

    note(what="machine", gpu=torch.cuda.get_device_name(), torch=torch.__version__,
         triton=triton.__version__, command=" ".join(sys.argv))  # fmt: skip
    for name in options.only.split(","):
        if left() < 0:
            note(what="out of time", stage=name)
            continue
        try:
            STAGES[name]()
        except Exception as error:
            traceback.print_exc()
            note(what="failed", stage=name, error=repr(error)[:300])
        gc.collect()
        torch.cuda.empty_cache()
        note(what="stage", name=name, seconds=time.time() - START)
        options.out.parent.mkdir(parents=True, exist_ok=True)
        options.out.write_text(json.dumps(RESULTS, indent=1))


if __name__ == "__main__":
    main()
