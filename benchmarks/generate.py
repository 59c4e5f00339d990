"""Prefill and decode speed, time to first token and memory, against transformers in the same run.

    python benchmarks/generate.py [--batch 1 8] [--runs 3] [--json results.json]

Workload: prompts of 512 tokens, 128 new tokens, greedy, end-of-sequence ignored. Each contender
runs in a process of its own, so that peak memory is its own, and contenders take turns, so that a
machine whose speed drifts treats them alike. Prefill is prompt tokens over time to first token;
decode is new tokens over the time after it. All compute in float32 from the dequantised weights,
but for `kvist-native`, what `kvist.load` gives by default: 4-bit weights, activations in 8 bits.
"""

import argparse
import json
import os
import platform
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW = 512, 128
CONTENDERS = (
    "kvist",
    "kvist-static",
    "kvist-no-cache",
    "kvist-native",
    "transformers-dynamic",
    "transformers-static",
)


def main() -> None:
    """Run the contenders in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/generate.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one, args.model, args.batch[0], args.runs)))
        return
    rows = []
    for batch in args.batch:
        found: dict[str, list[dict[str, float]]] = {}
        for turn in range(args.runs):
            for name in args.contenders:
                if name == "kvist-no-cache" and (batch > 1 or turn > 0):
                    continue
                command = [sys.executable, __file__, "--one", name, "--model", args.model]
                command += ["--batch", str(batch), "--runs", str(turn)]
                print(f"batch {batch}, run {turn + 1}: {name}", file=sys.stderr)
                done = subprocess.run(command, capture_output=True, text=True, check=False)
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr}")
                found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
        for name, runs in found.items():
            median = {k: statistics.median(run[k] for run in runs) for k in runs[0]}
            rows.append({"contender": name, "batch": batch, "runs": runs, "median": median})
    report(rows)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"command": sys.argv, **machine(), "rows": rows}, indent=1))
    print(f"\nwritten: {args.json}")


def measure(name: str, model: str, batch: int, turn: int) -> dict[str, float]:
    """One contender, one run, in this process."""
    import torch

    generator = torch.Generator().manual_seed(1000 + turn)  # prompts differ from run to run
    prompts = torch.randint(1000, 40000, (batch, PROMPT), generator=generator).tolist()
    after_torch = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    begun = time.perf_counter()
    run = with_kvist(name, model) if name.startswith("kvist") else with_transformers(name, model)
    loaded = time.perf_counter() - begun
    run([p[:64] for p in prompts], 4)  # warm-up
    new = 16 if name == "kvist-no-cache" else NEW
    prefill, decode = run(prompts, new)
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return {
        "load_s": loaded,
        "ttft_s": prefill,
        "prefill_tok_s": batch * PROMPT / prefill,
        "decode_tok_s": batch * (new - 1) / decode,
        "peak_rss_mb": peak / 1024,
        "above_torch_mb": (peak - after_torch) / 1024,
    }


def with_kvist(name, model):
    """A function (prompts, new tokens) -> (seconds to first token, seconds after it)."""
    import kvist

    executor = "native" if name == "kvist-native" else "reference"
    loaded = kvist.load(model, dtype="float32", executor=executor)

    def run(prompts, new):
        results = kvist.generate(
            loaded,
            prompts,
            kvist.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True),
            cache="static" if name == "kvist-static" else "dynamic",
            use_cache=name != "kvist-no-cache",
        )
        timings = results[0].timings
        return timings.prefill, timings.decode

    return run


def with_transformers(name, model):
    """The same for transformers, from the same dequantised weights."""
    import torch
    from transformers import DynamicCache, LlamaConfig, LlamaForCausalLM, StaticCache

    from kvist.loading.checkpoint import open_checkpoint
    from kvist.loading.hub import resolve

    checkpoint = open_checkpoint(resolve(model))
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    weights = {n: checkpoint.tensor(n, dtype=torch.float32) for n in checkpoint.names()}
    lm.load_state_dict(weights, assign=True, strict=False)
    lm.tie_weights()
    lm.model.rotary_emb = type(lm.model.rotary_emb)(lm.config)  # its frequencies were on meta
    lm.eval()

    @torch.inference_mode()
    def run(prompts, new):
        ids = torch.tensor(prompts)
        begun = time.perf_counter()
        if name == "transformers-static":
            cache = StaticCache(config=lm.config, max_cache_len=ids.shape[1] + new)
        else:
            cache = DynamicCache(config=lm.config)
        token = lm(ids, past_key_values=cache, logits_to_keep=1).logits[:, -1].argmax(-1)
        first = time.perf_counter()
        for _ in range(new - 1):
            token = lm(token[:, None], past_key_values=cache).logits[:, -1].argmax(-1)
            token.tolist()
        return first - begun, time.perf_counter() - first

    return run


def report(rows) -> None:
    """A table of medians, with each contender's decode beside transformers' StaticCache."""
    columns = ("TTFT s", "prefill", "decode", "x static", "RSS MB")
    print(f"\n{'contender':<22}{'batch':>6}" + "".join(f"{column:>10}" for column in columns))
    for row in rows:
        m = row["median"]
        beside = [r for r in rows if r["batch"] == row["batch"]]
        static = [r["median"] for r in beside if r["contender"] == "transformers-static"]
        ratio = f"{m['decode_tok_s'] / static[0]['decode_tok_s']:.2f}" if static else "-"
        print(
            f"{row['contender']:<22}{row['batch']:>6}{m['ttft_s']:>10.2f}"
            f"{m['prefill_tok_s']:>10.0f}{m['decode_tok_s']:>10.1f}{ratio:>10}"
            f"{m['peak_rss_mb']:>10.0f}"
        )


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    import torch

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
        "torch": torch.__version__,
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "threads": torch.get_num_threads(),
    }


if __name__ == "__main__":
    main()
