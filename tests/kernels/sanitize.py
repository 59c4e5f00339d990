"""compute-sanitizer over the hand-written kernels: `python tests/kernels/sanitize.py`, on a GPU.

memcheck finds accesses out of bounds, racecheck hazards in shared memory. Each looks at the step in
one launch, by a model of one layer, at decoding of quantised planes, and at the tests of Triton's
kernels with small shapes; only kvist's own kernels are watched. About three minutes on an H200. Not
collected by pytest.
"""

import argparse
import shutil
import subprocess
import sys
import time
from pathlib import Path

ROOT = Path(__file__).parents[2]
HERE = Path(__file__).parent
TOOLS = ("memcheck", "racecheck")
# What is run, the kernels to watch in it, and its share of the time in seconds.
PARTS = {
    "one-launch": ("decode_step", 60),
    "decode": ("decode_kernel", 60),
    "triton": ("_kernel", 120),
}
TESTS = [
    "test_elementwise.py",
    "test_linear.py",
    "test_encode.py",
    "test_sampling.py",
    "test_logprobs.py",
    "test_paged_attention.py",
    "-k",
    "not compiled",
]
# racecheck ends with an internal error of its own where fp8 is converted; memcheck does not.
NOT_FOR = {"racecheck": "many_rows or fp8"}


def one_launch() -> None:
    """Three steps of a model of one layer, checked against the fused step."""
    import torch

    sys.path.insert(0, str(HERE))
    import test_one_launch as tests

    from kvist.runner import one_launch
    from kvist.runner.fused import FusedStep

    one_launch.SPIN_LIMIT = 2**32 - 1  # all is hundreds of times slower
    device = torch.device("cuda")
    tests.SMALL_MODELS["one layer"] = tests.SMALL | {"num_hidden_layers": 1, "vocab_size": 2100}
    model = tests.small("one layer", device)
    cache, other = (tests.one_row_cache(model, 64, device) for _ in range(2))
    prompt, following = list(range(40)), [5, 6, 7]
    step = one_launch.OneLaunchStep(model, cache.pool, wait=True)
    ours = tests.logits_of(step, cache, prompt, following)
    theirs = tests.logits_of(FusedStep(model), other, prompt, following)
    assert (ours - theirs).abs().max() < 0.05 * theirs.std()


def decode(without: str) -> None:
    """Sequences of lengths around those of tiles and splits; the tests compare what comes out.

    Not by those tests: racecheck does not survive what torch runs for the reference.
    """
    import torch

    sys.path.insert(0, str(ROOT / "benchmarks"))
    from gpu import random_planes

    from kvist.attention.kernels import compiled
    from kvist.attention.kernels.launch import Pages, most_splits
    from kvist.core.spec import AttentionSpec

    lens = [1, 15, 16, 17, 31, 63, 64, 65, 127, 128, 255, 256, 700, 300, 2, 3, 4, 90]
    count, size, kv_heads, heads, dim = len(lens), 32, 8, 16, 128
    width = -(-max(lens) // size)
    like = {"dtype": torch.int32, "device": "cuda"}
    for kind in {"int8", "int4", "fp8"} - set(without.split(" or ")):
        keys, values = (
            random_planes(kind, count * width + 1, size, kv_heads, dim)[0] for _ in range(2)
        )
        table = torch.arange(1, count * width + 1, **like).view(count, width)
        starts = torch.arange(count + 1, **like)
        spec = AttentionSpec(kv_heads, dim)
        pages = Pages(keys, values, spec, size, table, torch.tensor(lens, **like), starts)
        q = torch.randn(count, heads, dim, device="cuda").bfloat16()
        out = torch.empty_like(q)
        assert compiled.can_decode(q, pages, rotate=False), kind
        most = most_splits(pages, max(lens), compiled.splits_for(count))
        plan = compiled.make_plan(pages, heads, most, ragged=False)
        for _ in range(2):
            compiled.decode(q, pages, out, plan, dim**-0.5)
        torch.cuda.synchronize()
        assert out.isfinite().all(), kind


def triton(without: str) -> None:
    """The tests of single kernels."""
    import pytest

    chosen = [str(HERE / word) if word.endswith(".py") else word for word in TESTS]
    if without:
        chosen[-1] += f" and not ({without})"
    sys.exit(pytest.main(["-q", "-x", "-n0", *chosen]))


def main() -> None:
    """Run every tool on every part; end with 1 if one found something."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--part", choices=PARTS, help="run this alone, unwatched")
    parser.add_argument("--without", default="", help="tests to leave out of it")
    parser.add_argument("--only", default=",".join(PARTS), help="parts to watch")
    options = parser.parse_args()
    if options.part:
        if options.part == "one-launch":
            return one_launch()
        return (decode if options.part == "decode" else triton)(options.without)
    sanitizer = shutil.which("compute-sanitizer") or "/usr/local/cuda/bin/compute-sanitizer"
    worst = 0
    for tool in TOOLS:
        for part in options.only.split(","):
            kernels, limit = PARTS[part]
            began = time.time()
            command = [sanitizer, "--tool", tool, "--error-exitcode", "9",
                       *(["--report-api-errors", "no"] if tool == "memcheck" else []),
                       "--kernel-name", f"kernel_substring={kernels}",
                       "--kernel-name-exclude", "kernel_substring=at::",
                       "--kernel-name-exclude", "kernel_substring=cublas",
                       sys.executable, __file__, "--part", part,
                       "--without", NOT_FOR.get(tool, "")]  # fmt: skip
            try:
                done = subprocess.run(
                    command, cwd=ROOT, capture_output=True, text=True, check=False, timeout=limit
                )
                output, code = done.stdout + done.stderr, done.returncode
            except subprocess.TimeoutExpired as error:
                output, code = str(error.stdout or b"")[-2000:], 124
            summary = [line for line in output.splitlines() if "SUMMARY" in line]
            print(f"{tool:9} {part:10} exit {code:3} {time.time() - began:5.0f} s ", *summary)
            if code:
                found = [line for line in output.splitlines() if line.startswith("=========")]
                print(*found[:60], output[-1000:], sep="\n")
            worst = max(worst, code)
    sys.exit(worst > 0)


if __name__ == "__main__":
    main()
