"""kvist beside OpenVINO GenAI (and llama.cpp) on a CPU, from one GGUF, in one run.

    python benchmarks/cpu.py [--model NAME] [--cases 1 8 mix busy] [--runs 3] [--json PATH]

Cases: `1` and `8` are so many prompts of 512 tokens at once, 128 new tokens each; `mix` is 32
prompts of 16 to 320 tokens with 32 to 160 new ones, through each engine's own batching; `busy`
is `1` while another process keeps one core busy; `f32` and `bf16` are `1` with the same weights
widened to floats, where only kvist runs, beside its floor. Greedy, end-of-sequence ignored, prefix
cache and speculation off; prompts are drawn anew for each run and are the same for all contenders.

Contenders take turns, each in a process of its own and the peers in an environment of their own,
which is made on the first run: openvino-genai by wheel, llama-cpp-python only with `LLAMA=1`, since
it builds for minutes (`CMAKE_ARGS` goes with it, where its own choice of instructions fails).
Prefill is prompt tokens over time to first token, decode new tokens over the time after, `start`
the time from nothing but imported libraries to the first token. The floor is what reading a step's
bytes again and again takes, measured in the same run.
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
from contextlib import contextmanager
from pathlib import Path

PROMPT, NEW = 512, 128
PEERS = Path(os.environ.get("XDG_CACHE_HOME", Path.home() / ".cache")) / "kvist-bench-peers"
OPENVINO, LLAMA = "openvino-genai==2026.4.*", "llama-cpp-python==0.3.36"
COLUMNS = ("prefill_tok_s", "decode_tok_s", "output_tok_s", "start_s", "peak_rss_mb")


def main() -> None:
    """Run the contenders in turn, print medians, spreads and ratios, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", default="smollm2-135m", help="a pulled name or a GGUF file")
    parser.add_argument("--runs", type=int, default=3)
    parser.add_argument("--cases", nargs="+", default=["1", "8", "mix"], choices=list(CASES))
    parser.add_argument("--contenders", nargs="+", choices=list(RUNNERS))
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/cpu.json"))
    parser.add_argument("--one", nargs=2, metavar=("CONTENDER", "SEED"), help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.one:
        print(json.dumps(measure(args.one[0], args.model, args.cases[0], int(args.one[1]))))
        return
    from kvist.loading.hub import resolve

    path = resolve(args.model)
    names = args.contenders or [
        name
        for name in RUNNERS
        if name in ("kvist", "openvino") or (name == "llama.cpp" and "LLAMA" in os.environ)
    ]
    pythons = {name: environment(name) for name in names}
    rows, floors = [], []
    for case in args.cases:
        found: dict[str, list[dict[str, object]]] = {}
        weights = widened(path, case) if case in FLOATS else path
        for turn in range(args.runs):
            floors.append(read_bandwidth(weights.stat().st_size))
            for name in names:
                if name == "llama.cpp" and case in ("8", "mix"):
                    continue  # its Python binding runs one sequence
                if case in FLOATS and name != "kvist":
                    continue
                print(f"case {case}, run {turn + 1}: {name}", file=sys.stderr)
                with neighbour() if case == "busy" else nothing():
                    found.setdefault(name, []).append(
                        in_a_process(pythons[name], weights, case, name, turn)
                    )
                    found[name][-1]["floor_tok_s"] = floors[-1] / weights.stat().st_size
        rows += [{"contender": name, "case": case, "runs": runs} for name, runs in found.items()]
    report(rows)
    args.json.parent.mkdir(parents=True, exist_ok=True)
    record = {"command": sys.argv, **machine(), "read_gb_s": [f / 1e9 for f in floors]}
    args.json.write_text(json.dumps({**record, "rows": rows}, indent=1))
    print(f"\nwritten: {args.json}")


def in_a_process(python: str, path: Path, case: str, name: str, turn: int) -> dict[str, object]:
    """One contender's run, in a fresh interpreter."""
    command = [python, __file__, "--model", str(path), "--cases", case, "--one", name, str(turn)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        sys.exit(f"{name} failed:\n{done.stderr}")
    return json.loads(done.stdout.splitlines()[-1])


def environment(name: str) -> str:
    """The Python that a contender runs in; a peer's is made when it is first asked for."""
    if name.startswith("kvist"):
        return sys.executable
    python = PEERS / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", str(PEERS)], check=True)
    wanted = OPENVINO if name == "openvino" else LLAMA
    module = "openvino_genai" if name == "openvino" else "llama_cpp"
    there = [str(python), "-c", f"import importlib.util as u; assert u.find_spec('{module}')"]
    if subprocess.run(there, capture_output=True, check=False).returncode:
        subprocess.run([str(python), "-m", "pip", "install", "--quiet", wanted], check=True)
    return str(python)


def widened(path: Path, case: str) -> Path:
    """The GGUF's weights in another file, all matrices in one type of floats."""
    import gguf

    target = PEERS / f"{path.stem}-{case}.gguf"
    if target.exists():
        return target
    target.parent.mkdir(parents=True, exist_ok=True)
    reader = gguf.GGUFReader(path)
    writer = gguf.GGUFWriter(target.with_suffix(".part"), "")
    for field in reader.fields.values():
        if not field.name.startswith("GGUF.") and field.name != gguf.Keys.General.FILE_TYPE:
            kind = field.types[0]
            inner = field.types[-1] if kind == gguf.GGUFValueType.ARRAY else None
            writer.kv_data[0].pop(field.name, None)
            writer.add_key_value(field.name, field.contents(), kind, sub_type=inner)
    kind = gguf.GGMLQuantizationType.F32 if case == "f32" else gguf.GGMLQuantizationType.BF16
    for tensor in reader.tensors:
        values = gguf.dequantize(tensor.data, tensor.tensor_type)
        if values.ndim == 1 or case == "f32":
            writer.add_tensor(tensor.name, values.astype("float32"))
        else:
            writer.add_tensor(tensor.name, gguf.quantize(values, kind), raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return target.with_suffix(".part").rename(target)


@contextmanager
def neighbour():
    """Another process that keeps the first core busy."""
    core = min(os.sched_getaffinity(0))
    code = f"import os; os.sched_setaffinity(0, [{core}])\nwhile True: pass"
    busy = subprocess.Popen([sys.executable, "-c", code])
    try:
        yield
    finally:
        busy.kill()
        busy.wait()


@contextmanager
def nothing():
    """No other process."""
    yield


def read_bandwidth(size: int) -> float:
    """Bytes a second at which torch reads `size` bytes over and over, on all cores."""
    import torch

    data = torch.ones(size // 4)
    best = float("inf")
    for _ in range(12):
        begun = time.perf_counter()
        data.sum()
        best = min(best, time.perf_counter() - begun)
    return data.nbytes / best


def drawn(case: str, seed: int) -> list[tuple[list[int], int]]:
    """A run's prompts, and how many tokens each is to get."""
    draw = random.Random(1000 + seed)
    sizes = [(PROMPT, NEW)] * {"1": 1, "busy": 1, "8": 8, **FLOATS}.get(case, 0) or [
        (draw.randrange(16, 321), draw.randrange(32, 161)) for _ in range(32)
    ]
    return [([draw.randrange(1000, 40000) for _ in range(length)], new) for length, new in sizes]


def measure(name: str, path: str, case: str, seed: int) -> dict[str, object]:
    """One contender, one run, in this process."""
    requests = drawn(case, seed)
    if name.startswith("kvist"):
        import torch  # noqa: F401  its import is not counted as loading
    elif name == "openvino":
        import openvino_genai  # noqa: F401
    imported = peak_rss_mb()
    begun = time.perf_counter()
    run = RUNNERS[name](path, len(requests))
    first, _, _ = run([([5] * 16, 1)])
    started = time.perf_counter() - begun
    run([([5] * 64, 4) for _ in requests])  # warm-up
    first, rest, ids = run(requests)
    tokens = sum(len(prompt) for prompt, _ in requests)
    new = sum(count for _, count in requests)
    found: dict[str, object] = {
        "start_s": started,
        "peak_rss_mb": peak_rss_mb(),
        "rss_above_import_mb": peak_rss_mb() - imported,
        "ids": ids,
    }
    if case == "mix":
        return found | {"output_tok_s": new / (first + rest)}
    decoded = (new - len(requests)) / rest
    return found | {"prefill_tok_s": tokens / first, "decode_tok_s": decoded}


def peak_rss_mb() -> float:
    """The most memory that this process has held."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024


# Each contender: (path, requests at a time) -> run; run(requests) -> seconds to the first token of
# all, seconds after, ids.


def kvist_native(path, batch):
    """As it comes: native code on the file's own blocks."""
    return _kvist(path, batch, executor="native")


def kvist_avx512(path, batch):
    """Without matrix units: activations in 8 bits, quicker for one token, slower for prompts."""
    os.environ["KVIST_ISA"] = "avx512"
    return _kvist(path, batch, executor="native")


def kvist_exact(path, batch):
    """The model's own forward, dequantised: what ids are compared with."""
    return _kvist(path, batch, executor="reference")


def _kvist(path, batch, *, executor):
    import kvist

    model = kvist.load(path, device="cpu", executor=executor)
    if batch > 8:
        llm = kvist.LLM(model, prefix_cache=False, cache_memory=1 << 30)

        def serve(requests):
            begun = time.perf_counter()
            results = llm.generate([prompt for prompt, _ in requests], _params(requests))
            return time.perf_counter() - begun, 0.0, [list(r.token_ids) for r in results]

        return serve

    def run(requests):
        results = kvist.generate(
            model, [prompt for prompt, _ in requests], _params(requests), cache="static"
        )
        timings = results[0].timings
        return timings.prefill, timings.decode, [list(r.token_ids) for r in results]

    return run


def _params(requests):
    import kvist

    return [
        kvist.SamplingParams(temperature=0, max_tokens=new, ignore_eos=True) for _, new in requests
    ]


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

        def run_one(requests):
            [(prompt, new)] = requests
            ids = ov.Tensor(np.array([prompt], dtype=np.int64))
            given = genai.TokenizedInputs(ids, ov.Tensor(np.ones((1, len(prompt)), np.int64)))
            begun = time.perf_counter()
            out = pipe.generate(given, config(new))
            first = out.perf_metrics.get_ttft().mean / 1000
            return first, time.perf_counter() - begun - first, [list(out.tokens[0])]

        return run_one
    scheduler = genai.SchedulerConfig()
    scheduler.cache_size, scheduler.enable_prefix_caching = 1, False
    pipe = genai.ContinuousBatchingPipeline(path, scheduler, "CPU")

    def run(requests):
        begun = time.perf_counter()
        handles = [
            pipe.add_request(i, ov.Tensor(np.array([prompt], dtype=np.int64)), config(new))
            for i, (prompt, new) in enumerate(requests)
        ]
        ids, first = [[] for _ in requests], None
        while pipe.has_non_finished_requests():
            pipe.step()
            for tokens, handle in zip(ids, handles, strict=True):
                if handle.can_read():
                    for output in handle.read().values():
                        tokens.extend(output.generated_ids)
            if first is None and all(ids):
                first = time.perf_counter() - begun
        whole = time.perf_counter() - begun
        return first or whole, whole - (first or whole), ids

    return run


def llama_cpp(path, batch):
    """llama.cpp through llama-cpp-python, flash attention off."""
    from llama_cpp import Llama

    llama = Llama(
        path, n_ctx=PROMPT + NEW + 8, n_batch=512, n_threads=os.cpu_count(), verbose=False
    )

    def run(requests):
        [(prompt, new)] = requests
        llama.reset()
        begun = time.perf_counter()
        ids, first = [], None
        for token in llama.generate(prompt, temp=0.0, repeat_penalty=1.0):
            ids.append(int(token))
            first = first or time.perf_counter() - begun
            if len(ids) == new:
                break
        return first, time.perf_counter() - begun - first, [ids]

    return run


FLOATS = {"f32": 1, "bf16": 1}  # sequences
CASES = ("1", "8", "mix", "busy", *FLOATS)
RUNNERS = {
    "kvist": kvist_native,
    "kvist-avx512": kvist_avx512,
    "openvino": openvino,
    "llama.cpp": llama_cpp,
    "kvist-exact": kvist_exact,
}


def report(rows) -> None:
    """Medians with their range, kvist over each peer, and how many ids agree with float32's."""
    widths = "".join(f"{column:>26}" for column in COLUMNS)
    print(f"\n{'contender':<14}{'case':>6}{widths}  ids equal")
    for row in rows:
        cells = []
        for column in COLUMNS:
            values = sorted(run[column] for run in row["runs"] if column in run)
            cells.append(
                f"{statistics.median(values):.4g} ({values[0]:.4g}-{values[-1]:.4g})"
                if values
                else "-"
            )
        print(f"{row['contender']:<14}{row['case']:>6}" + "".join(f"{c:>26}" for c in cells)
              + f"  {agreement(row, rows)}")  # fmt: skip
    for row in rows:
        if row["contender"] == "kvist" and row["case"] in ("1", *FLOATS):
            floor, reached = _median(row, "floor_tok_s"), _median(row, "decode_tok_s")
            print(f"case {row['case']}: reading the weights alone, at this run's speed, would give "
                  f"{floor:.0f} tok/s; {reached / floor:.2f} of that is reached")  # fmt: skip
    for row in rows:
        ours = _row(rows, "kvist", row["case"])
        if ours and row is not ours:
            ratios = ", ".join(
                f"{column} x{_median(ours, column) / _median(row, column):.2f}"
                for column in COLUMNS[:3]
                if column in row["runs"][0]
            )
            print(f"kvist over {row['contender']}, case {row['case']}: {ratios}")


def agreement(row, rows) -> str:
    """Greedy ids before the first that differs from float32's, of all."""
    reference = _row(rows, "kvist-exact", row["case"])
    if reference is None:
        return "-"
    same = total = 0
    for run, wanted in zip(row["runs"], reference["runs"], strict=True):
        for ids, right in zip(run["ids"], wanted["ids"], strict=True):
            differs = (i for i, (a, b) in enumerate(zip(ids, right, strict=False)) if a != b)
            same, total = same + next(differs, len(right)), total + len(right)
    return f"{same}/{total}"


def _row(rows, name, case):
    return next((r for r in rows if (r["contender"], r["case"]) == (name, case)), None)


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
