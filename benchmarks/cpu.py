"""kvist's native step beside OpenVINO GenAI (and llama.cpp) on a CPU, from one GGUF, in one run.

    python benchmarks/cpu.py [--model smollm2-135m] [--runs 3] [--json benchmarks/results/cpu.json]

Workload: prompts of 512 tokens, 128 new tokens, greedy, end-of-sequence ignored, prefix cache and
speculation off; prompts differ from run to run and are the same for all contenders. Contenders take
turns, each in a process of its own and the peers in an environment of their own, which is made on
the first run: openvino-genai by wheel, llama-cpp-python only with `LLAMA=1`, since it builds for
minutes. Prefill is prompt tokens over time to first token, decode new tokens over the time after.
"""

import argparse
import json
import os
import platform
import random
import resource
import statistics
import subprocess
import sys
import time
from pathlib import Path

PROMPT, NEW = 512, 128
PEERS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvist-bench-peers"
OPENVINO, LLAMA = "openvino-genai==2026.4.*", "llama-cpp-python==0.3.36"
COLUMNS = ("prefill_tok_s", "decode_tok_s", "load_s", "peak_rss_mb")


def main() -> None:
    """Run the contenders in turn, print medians, spreads and ratios, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a pulled name or a GGUF file")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--batch", type=int, nargs="+", default=[1, 8])
    parser.add_argument("--contenders", nargs="+", choices=list(RUNNERS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cpu.json"))
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], args.model, args.batch[0], int(args.one[1]))))
        return
    from kvist.loading.hub import resolve

    path = resolve(args.model)
    names = args.contenders or [n for n in RUNNERS if n != "llama.cpp" or "LLAMA" in os.environ]
    pythons = {name: environment(name) for name in names}
    rows = []
    for batch in args.batch:
        found: dict[str, list[dict[str, float]]] = {}
        for turn in range(args.runs):
            for name in names:
                if name == "llama.cpp" and batch > 1:
                    continue  # its Python binding runs one sequence
                print(f"batch {batch}, run {turn + 1}: {name}", file=sys.stderr)
                command = [pythons[name], __file__, "--model", str(path), "--batch", str(batch)]
                done = subprocess.run(
                    [*command, "--one", name, str(turn)],
                    capture_output=True,
                    text=True,
                    check=False,
                )
                if done.returncode:
                    sys.exit(f"{name} failed:\n{done.stderr}")
                found.setdefault(name, []).append(json.loads(done.stdout.splitlines()[-1]))
        rows += [{"contender": name, "batch": batch, "runs": runs} for name, runs in found.items()]
    report(rows)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({"command": sys.argv, **machine(), "rows": rows}, indent=1))
    print(f"\nwritten: {args.json}")


def environment(name: str) -> str:
    """The Python that a contender runs in; a peer's is made when it is first asked for."""
    if name.startswith("kvist"):
        return sys.executable
    python = PEERS / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    wanted = OPENVINO if name == "openvino" else LLAMA
    pip = [str(python), "-m", "pip", "install", "--quiet", wanted]
    subprocess.run(pip, check=True)
    return str(python)


def measure(name: str, path: str, batch: int, seed: int) -> dict[str, object]:
    """One contender, one run, in this process."""
    draw = random.Random(1000 + seed)
    prompts = [[draw.randrange(1000, 40000) for _ in range(PROMPT)] for _ in range(batch)]
    if name.startswith("kvist"):
        import torch  # noqa: F401  its import is not counted as loading
    begun = time.perf_counter()
    run = RUNNERS[name](path, batch)
    loaded = time.perf_counter() - begun
    run([[5] * 64 for _ in prompts], 4)  # warm-up
    first, rest, ids = run(prompts, NEW)
    return {
        "prefill_tok_s": batch * PROMPT / first,
        "decode_tok_s": batch * (NEW - 1) / rest,
        "load_s": loaded,
        "peak_rss_mb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024,
        "ids": ids,
    }


def kvist_native(path, batch):
    """The compiled library, through the ordinary loop and cache."""
    return _kvist(path, native=True)


def kvist_torch(path, batch):
    """The model's own forward, dequantised: what `ids` are compared with."""
    return _kvist(path, native=False)


def _kvist(path, *, native):
    import kvist
    from kvist.loading.checkpoint import open_checkpoint
    from kvist.native import native_step

    model = kvist.load(path, dtype="float32", device="cpu")
    step = native_step(model, open_checkpoint(Path(path))) if native else None

    def run(prompts, new):
        params = kvist.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True)
        results = kvist.generate(model, prompts, params, cache="static", step=step)
        timings = results[0].timings
        return timings.prefill, timings.decode, [list(r.token_ids) for r in results]

    return run


def openvino(path, batch):
    """OpenVINO GenAI: LLMPipeline for one prompt, ContinuousBatchingPipeline for more."""
    import numpy as np
    import openvino as ov
    import openvino_genai as genai

    def config(new):
        made = genai.GenerationConfig()
        made.max_new_tokens, made.ignore_eos, made.do_sample = new, True, False
        return made

    if batch == 1:
        pipe = genai.LLMPipeline(path, "CPU")

        def run_one(prompts, new):
            times = []

            def note(_):
                times.append(time.perf_counter())
                return False

            ids = ov.Tensor(np.array(prompts, dtype=np.int64))
            given = genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(prompts[0])), np.int64)))
            begun = time.perf_counter()
            out = pipe.generate(given, config(new), note)
            m = out.perf_metrics
            first = m.get_ttft().mean / 1000
            return first, time.perf_counter() - begun - first, [list(out.tokens[0])]

        return run_one
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    pipe = genai.ContinuousBatchingPipeline(path, scheduler, "CPU")

    def run(prompts, new):
        begun = time.perf_counter()
        handles = [
            pipe.add_request(i, ov.Tensor(np.array([p], dtype=np.int64)), config(new))
            for i, p in enumerate(prompts)
        ]
        ids, first = [[] for _ in prompts], None
        while pipe.has_non_finished_requests():
            pipe.step()
            for tokens, handle in zip(ids, handles, strict=True):
                if handle.can_read():
                    for output in handle.read().values():
                        tokens.extend(output.generated_ids)
            if first is None and all(ids):
                first = time.perf_counter() - begun
        return first, time.perf_counter() - begun - first, ids

    return run


def llama_cpp(path, batch):
    """llama.cpp through llama-cpp-python, flash attention off."""
    from llama_cpp import Llama

    llama = Llama(
        path, n_ctx=PROMPT + NEW + 8, n_batch=512, n_threads=os.cpu_count(), verbose=False
    )

    def run(prompts, new):
        llama.reset()
        begun = time.perf_counter()
        ids, first = [], None
        for token in llama.generate(prompts[0], temp=0.0, repeat_penalty=1.0):
            ids.append(int(token))
            first = first or time.perf_counter() - begun
            if len(ids) == new:
                break
        return first, time.perf_counter() - begun - first, [ids]

    return run


RUNNERS = {
    "kvist-native": kvist_native,
    "openvino": openvino,
    "llama.cpp": llama_cpp,
    "kvist-torch": kvist_torch,
}


def report(rows) -> None:
    """Medians with their range, kvist over each peer, and how many ids agree with float32's."""
    print(
        f"\n{'contender':<14}{'batch':>6}  " + "".join(f"{c:>26}" for c in COLUMNS) + "  ids equal"
    )
    for row in rows:
        cells = []
        for column in COLUMNS:
            values = sorted(run[column] for run in row["runs"])
            cells.append(f"{statistics.median(values):.4g} ({values[0]:.4g}-{values[-1]:.4g})")
        print(f"{row['contender']:<14}{row['batch']:>6}  " + "".join(f"{c:>26}" for c in cells)
              + f"  {agreement(row, rows)}")  # fmt: skip
    for row in rows:
        ours = _row(rows, "kvist-native", row["batch"])
        if ours and row is not ours:
            ratios = ", ".join(
                f"{column} x{_median(ours, column) / _median(row, column):.2f}"
                for column in COLUMNS[:2]
            )
            print(f"kvist-native over {row['contender']}, batch {row['batch']}: {ratios}")


def agreement(row, rows) -> str:
    """Greedy ids before the first that differs from float32's, of all."""
    reference = _row(rows, "kvist-torch", row["batch"])
    if reference is None:
        return "-"
    same = total = 0
    for run, wanted in zip(row["runs"], reference["runs"], strict=True):
        for ids, right in zip(run["ids"], wanted["ids"], strict=True):
            differs = (i for i, (a, b) in enumerate(zip(ids, right, strict=False)) if a != b)
            same, total = same + next(differs, len(right)), total + len(right)
    return f"{same}/{total}"


def _row(rows, name, batch):
    return next((r for r in rows if (r["contender"], r["batch"]) == (name, batch)), None)


def _median(row, column) -> float:
    return statistics.median(run[column] for run in row["runs"])


def machine() -> dict[str, object]:
    """What the figures were measured on."""
    return {
        "date": time.strftime("%Y-%m-%d"),
        "python": platform.python_version(),
        "cpus": os.cpu_count(),
        "machine": platform.machine(),
        "load": os.getloadavg() if hasattr(os, "getloadavg") else None,
    }


if __name__ == "__main__":
    main()
