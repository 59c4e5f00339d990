"""Output speed on mixed traffic, against other engines with continuous batching in the same run.

    python benchmarks/engine_mix.py prompts.json [--runs 3] [--json results.json]
    python benchmarks/engine_mix.py prompts.json --python openvino=/path/to/venv/bin/python

`prompts.json` holds `{"mix": [[token ids, number of new tokens], ...]}`; greedy, end-of-sequence
ignored, prefix caches off, all requests there from the start. Each contender runs in a process of
its own, in an environment of its own where one is named, and contenders take turns, so that a
machine whose speed drifts treats them alike. One that is not installed, or fails, is left out and
said so. Reported are new tokens over the time from the first request to the last token.
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
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

Asked = Sequence[tuple[list[int], int]]  # token ids, number of new tokens
Run = Callable[[Asked], list[list[int]]]

NOT_INSTALLED = 3  # exit status of a contender whose package is absent


def main() -> None:
    """Run the contenders in turn, print a table, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("prompts", type=Path)
    parser.add_argument("--model", default="smollm2-135m", help="a pulled name, GGUF or directory")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--threads", type=int, default=os.cpu_count())
    parser.add_argument("--limit", type=int, help="only so many prompts")
    parser.add_argument("--new", type=int, help="at most so many new tokens each")
    parser.add_argument("--contenders", nargs="+", default=list(CONTENDERS), choices=CONTENDERS)
    parser.add_argument("--python", nargs="+", default=[], metavar="NAME=PATH")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/engine_mix.json"))
    parser.add_argument("--one", help=argparse.SUPPRESS)
    args = parser.parse_args()
    asked = read_prompts(args.prompts, args.limit, args.new)
    if args.one:
        print(json.dumps(measure(args.one, args.model, asked, args.threads)))
        return
    pythons = dict(pair.split("=", 1) for pair in args.python)
    model = args.model
    if not Path(model).exists():
        from kvist.loading.hub import resolve

        found_at = resolve(model)
        inside = [] if found_at.is_file() else list(found_at.glob("*.gguf"))
        model = str(inside[0] if len(inside) == 1 else found_at)
    options = [arg for name in ("limit", "new") for arg in given(name, getattr(args, name))]
    options += ["--model", model, "--threads", str(args.threads)]
    found: dict[str, list[dict[str, Any]]] = {}
    left_out: dict[str, str] = {}
    for turn in range(args.runs):
        for name in args.contenders:
            if name in left_out:
                continue
            print(f"run {turn + 1}: {name}", file=sys.stderr)
            command = [pythons.get(name, sys.executable), __file__, str(args.prompts)]
            done = subprocess.run(
                [*command, "--one", name, *options],
                env={**os.environ, "OMP_NUM_THREADS": str(args.threads)},
                capture_output=True,
                text=True,
                check=False,
            )
            if done.returncode:
                lines = done.stderr.strip().splitlines() or ["no message"]
                left_out[name] = lines[-1]
                found.pop(name, None)
                continue
            found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
    rows = [summary(name, runs) for name, runs in found.items()]
    report(rows, left_out)
    results = {
        "command": sys.argv,
        **machine(),
        "threads": args.threads,
        "requests": len(asked),
        "prompt_tokens": sum(len(ids) for ids, _ in asked),
        "new_tokens": sum(new for _, new in asked),
        "rows": rows,
        "ratios": ratios(rows),
        "left_out": left_out,
    }
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps(results, indent=1))
    print(f"\nwritten: {args.json}")


def given(name: str, value: int | None) -> list[str]:
    """An option as a contender's process gets it."""
    return [] if value is None else [f"--{name}", str(value)]


def read_prompts(path: Path, limit: int | None, most: int | None) -> Asked:
    """Token ids and number of new tokens of each request."""
    mix = json.loads(path.read_text())["mix"][:limit]
    return [(ids, new if most is None else min(new, most)) for ids, new in mix]


def measure(name: str, model: str, asked: Asked, threads: int) -> dict[str, Any]:
    """One contender, one run, in this process."""
    begun = time.perf_counter()
    try:
        run = CONTENDERS[name](model, asked, threads)
    except ImportError as error:
        print(f"not installed: {error}", file=sys.stderr)
        sys.exit(NOT_INSTALLED)
    loaded = time.perf_counter() - begun
    run([(ids[:32], 4) for ids, _ in asked[:4]])  # warm-up
    begun = time.perf_counter()
    outputs = run(asked)
    took = time.perf_counter() - begun
    for i, (output, (_, new)) in enumerate(zip(outputs, asked, strict=True)):
        if len(output) != new:
            sys.exit(f"{name} gave request {i} {len(output)} tokens, not {new}")
    new_tokens = sum(map(len, outputs))
    return {
        "load_s": loaded,
        "seconds": took,
        "output_tok_s": new_tokens / took,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "outputs": outputs,
    }


def with_kvist(model: str, asked: Asked, threads: int, executor: str = "auto") -> Run:
    """`kvist.LLM` as it comes: for 4-bit weights native code, whose activations have 8 bits."""
    import torch

    import kvist

    torch.set_num_threads(threads)
    llm = kvist.LLM(
        model,
        dtype="float32",
        executor=executor,
        prefix_cache=False,
        max_num_seqs=len(asked),
        max_model_len=max(len(ids) + new for ids, new in asked),
    )

    def run(asked: Asked) -> list[list[int]]:
        params = [
            kvist.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _, new in asked
        ]
        results = llm.generate([ids for ids, _ in asked], params)
        return [list(result.token_ids) for result in results]

    return run


def with_openvino(model: str, asked: Asked, threads: int) -> Run:
    """openvino-genai's ContinuousBatchingPipeline, on the same GGUF or on an exported directory."""
    import numpy as np
    import openvino
    import openvino_genai

    config = openvino_genai.SchedulerConfig()
    config.cache_size = 1  # GiB
    config.enable_prefix_caching = False
    config.max_num_seqs = len(asked)
    pipeline = openvino_genai.ContinuousBatchingPipeline(
        model, config, "CPU", {"INFERENCE_NUM_THREADS": threads}
    )

    def run(asked: Asked) -> list[list[int]]:
        configs = []
        for _, new in asked:
            one = openvino_genai.GenerationConfig()
            one.max_new_tokens, one.ignore_eos, one.do_sample = new, True, False
            configs.append(one)
        inputs = [openvino.Tensor(np.array([ids], dtype=np.int64)) for ids, _ in asked]
        return [list(one.m_generation_ids[0]) for one in pipeline.generate(inputs, configs)]

    return run


def with_transformers(model: str, asked: Asked, threads: int) -> Run:
    """Transformers' continuous batching, float32, from the same weights."""
    import torch
    from transformers import ContinuousBatchingConfig, GenerationConfig

    torch.set_num_threads(threads)
    lm = load_in_transformers(model)
    pages = sum(-(-(len(ids) + new) // 32) + 1 for ids, new in asked)
    config = ContinuousBatchingConfig(
        page_size=32,
        num_blocks=max(pages, 64),
        max_batch_tokens=2048,
        max_requests_per_batch=len(asked),
        allow_block_sharing=False,
    )

    def run(asked: Asked) -> list[list[int]]:
        outputs: dict[str, list[int]] = {}
        with lm.continuous_batching_context_manager(
            generation_config=GenerationConfig(do_sample=False, eos_token_id=-1),
            continuous_batching_config=config,
            block=True,
            timeout=5,
            warmup=False,
        ) as manager:
            names = [
                manager.add_request(list(ids), max_new_tokens=new, eos_token_id=-1)
                for ids, new in asked
            ]
            while len(outputs) < len(names):
                result = manager.get_result(timeout=1)
                if result is None and not manager.is_running():
                    raise RuntimeError("transformers' generation thread has ended")
                if result is not None and result.is_finished():
                    if result.error:
                        raise RuntimeError(result.error)
                    outputs[result.request_id] = list(result.generated_tokens)
        return [outputs[name] for name in names]

    return run


def load_in_transformers(model: str) -> Any:
    """A hub directory as it is; a GGUF through kvist's own reader, dequantised."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig, LlamaForCausalLM

    if (Path(model) / "config.json").exists():
        return AutoModelForCausalLM.from_pretrained(model, dtype=torch.float32).eval()
    from kvist.loading.checkpoint import open_checkpoint

    checkpoint = open_checkpoint(Path(model))
    with torch.device("meta"):
        lm = LlamaForCausalLM(LlamaConfig(**checkpoint.config))
    weights = {name: checkpoint.tensor(name, dtype=torch.float32) for name in checkpoint.names()}
    lm.load_state_dict(weights, assign=True, strict=False)
    lm.tie_weights()
    lm.model.rotary_emb = type(lm.model.rotary_emb)(lm.config)  # its frequencies were on meta
    return lm.eval()


CONTENDERS: dict[str, Callable[[str, Asked, int], Run]] = {
    "kvist": with_kvist,
    "kvist-float32": partial(with_kvist, executor="reference"),
    "openvino": with_openvino,
    "transformers": with_transformers,
}


def summary(name: str, runs: list[dict[str, Any]]) -> dict[str, Any]:
    """Medians of a contender's runs; its outputs once."""
    outputs = runs[0]["outputs"]
    figures = [{k: v for k, v in run.items() if k != "outputs"} for run in runs]
    median = {k: statistics.median(run[k] for run in figures) for k in figures[0]}
    return {"contender": name, "median": median, "runs": figures, "outputs": outputs}


def ratios(rows: Sequence[dict[str, Any]]) -> dict[str, dict[str, float]]:
    """Kvist's output speed over each peer's, and how many tokens in a row are equal."""
    own = next((row for row in rows if row["contender"] == "kvist"), None)
    if own is None:
        return {}
    return {
        row["contender"]: {
            "speed": own["median"]["output_tok_s"] / row["median"]["output_tok_s"],
            "equal_tokens": equal_tokens(own["outputs"], row["outputs"]),
        }
        for row in rows
        if row is not own
    }


def equal_tokens(ours: Sequence[Sequence[int]], theirs: Sequence[Sequence[int]]) -> float:
    """The part of all new tokens that stand before the first difference of their request."""
    same = 0
    for mine, other in zip(ours, theirs, strict=True):
        differ = (i for i, (a, b) in enumerate(zip(mine, other, strict=True)) if a != b)
        same += next(differ, len(mine))
    return same / sum(map(len, ours))


def report(rows: Sequence[dict[str, Any]], left_out: dict[str, str]) -> None:
    """A table of medians."""
    found = ratios(rows)
    print(
        f"\n{'contender':<16}{'output tok/s':>14}{'seconds':>9}{'kvist x':>9}{'equal':>8}", end=""
    )
    print(f"{'load s':>8}{'RSS MB':>8}")
    for row in rows:
        m, ratio = row["median"], found.get(row["contender"])
        speed = f"{ratio['speed']:.2f}" if ratio else "-"
        equal = f"{ratio['equal_tokens']:.0%}" if ratio else "-"
        print(
            f"{row['contender']:<16}{m['output_tok_s']:>14.1f}{m['seconds']:>9.2f}{speed:>9}"
            f"{equal:>8}{m['load_s']:>8.1f}{m['peak_rss_mb']:>8.0f}"
        )
    for name, why in left_out.items():
        print(f"{name:<16}left out: {why}")


def machine() -> dict[str, Any]:
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
