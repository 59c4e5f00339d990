"""`kvist roofline`: what bounds prefill and decode on this machine, measured.

Counts the least bytes and operations that a step needs, measures how fast this machine reads and
multiplies, times the steps through the engine, and says which of the two a step waits for and how
near it comes. Knows nothing of kernels: whatever executor the model was loaded with is measured.
"""

import random
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvist.cache.groups import bytes_per_token, group_layers
from kvist.core.params import SamplingParams
from kvist.core.plan import FailedEvent, TokensEvent
from kvist.core.request import Request
from kvist.engine import Engine, EngineConfig
from kvist.errors import KvistError, NotSupported, RequestError
from kvist.kernels import can_run, can_run_fp8
from kvist.kernels.fp8 import Fp8Weight, quantize
from kvist.loading.model import Model
from kvist.reports.sizes import bytes_text

OVERHEAD = 2.0  # a step that takes so many times its floor waits for something else


@dataclass(frozen=True)
class Work:
    """The least that a step has to do.

    Args:
        weights: bytes of weights, each read once.
        cache: bytes of keys and values, read and written.
        operations: multiplications and additions of matrix products and attention.
    """

    weights: int
    cache: int
    operations: int

    @property
    def nbytes(self) -> int:
        """All bytes."""
        return self.weights + self.cache

    @property
    def intensity(self) -> float:
        """Operations for each byte."""
        return self.operations / self.nbytes


@dataclass(frozen=True)
class Point:
    """One kind of step, measured.

    Args:
        name: what it does.
        tokens: that come of it, or enter the cache.
        seconds: that it takes.
        work: what it has to do.
        bandwidth: bytes a second that this machine reads from a working set of this size.
        rate: operations a second that this machine does.
    """

    name: str
    tokens: int
    seconds: float
    work: Work
    bandwidth: float
    rate: float

    @property
    def memory_seconds(self) -> float:
        """The time that its bytes take at least."""
        return self.work.nbytes / self.bandwidth

    @property
    def arithmetic_seconds(self) -> float:
        """The time that its operations take at least."""
        return self.work.operations / self.rate

    @property
    def bound(self) -> str:
        """What takes longer at least: "memory" or "arithmetic"."""
        return "memory" if self.memory_seconds >= self.arithmetic_seconds else "arithmetic"

    @property
    def reached(self) -> float:
        """The part of that ceiling that it reaches."""
        return max(self.memory_seconds, self.arithmetic_seconds) / self.seconds

    @property
    def verdict(self) -> str:
        """The limiting term, in a sentence."""
        if self.bound == "memory":
            share = 100 * self.work.cache / self.work.nbytes
            why = (
                f"it moves {bytes_text(self.work.nbytes)} ({share:.0f} % of it cache) and "
                f"reaches {100 * self.reached:.0f} % of {self.bandwidth / 1e9:,.0f} GB/s"
            )
        else:
            why = (
                f"it does {self.work.operations / 1e9:,.1f} billion operations and reaches "
                f"{100 * self.reached:.0f} % of {self.rate / 1e9:,.0f} billion a second"
            )
        sentence = f"{self.name} is bound by {self.bound}: {why}"
        if self.reached < 1 / OVERHEAD:
            sentence += "; most of its time goes elsewhere (launches, waiting, small products)"
        return sentence + "."

    def as_json(self) -> dict[str, Any]:
        """Plain data, derived figures included."""
        return asdict(self) | {
            "tokens_per_second": self.tokens / self.seconds,
            "bytes": self.work.nbytes,
            "intensity": self.work.intensity,
            "bytes_per_second": self.work.nbytes / self.seconds,
            "operations_per_second": self.work.operations / self.seconds,
            "floor_seconds": max(self.memory_seconds, self.arithmetic_seconds),
            "bound": self.bound,
            "reached": self.reached,
            "verdict": self.verdict,
        }


@dataclass(frozen=True)
class Roofline:
    """What was measured of a model on a machine.

    Args:
        model: its name.
        device: where.
        executor: what computed the steps.
        bandwidth: bytes a second from memory, far more than any cache holds.
        rate: operations a second of a large product in the type that weights are multiplied in.
        rate_type: that type.
        points: prefill first.
    """

    model: str
    device: str
    executor: str
    bandwidth: float
    rate: float
    rate_type: str
    points: tuple[Point, ...]

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"points": [point.as_json() for point in self.points]}


def count(
    model: Model, *, codec: str, tokens: Sequence[int], contexts: Sequence[int], logits: int
) -> Work:
    """The least that a step has to do.

    Args:
        model: a dense decoder.
        codec: of its cache.
        tokens: new tokens of each sequence.
        contexts: tokens of each that are cached before.
        logits: rows whose logits are wanted.

    Raises:
        NotSupported: a mixture of experts, of which each step reads other weights.
    """
    config = model.config
    if any("experts" in name for name, _ in model.decoder.named_parameters()):
        raise NotSupported("the roofline of a mixture of experts; it counts dense decoders only")
    embedding = config.vocab_size * config.hidden_size  # looked up, not multiplied
    parameters = sum(p.numel() for p in model.decoder.parameters())
    layers = parameters - embedding * (1 if config.tie_word_embeddings else 2)
    if model.unread is not None:  # native code: as the file has them
        weights = model.unread.path.stat().st_size
    else:
        weights = sum(p.nbytes for p in model.decoder.parameters())
        if not config.tie_word_embeddings:
            weights -= embedding * model.dtype.itemsize
    per_token = sum(bytes_per_token(g, model.codec(codec)) for g in group_layers(model.specs))
    # Keys that the queries of a sequence look at: i + 1 + context for the i-th.
    pairs = sum(n * c + n * (n + 1) // 2 for n, c in zip(tokens, contexts, strict=True))
    attention = 4 * config.num_layers * config.num_heads * config.head_dim * pairs
    held = sum(tokens) + sum(contexts)
    return Work(
        weights,
        per_token * (held + sum(tokens)),
        2 * layers * sum(tokens) + 2 * embedding * logits + attention,
    )


def measure(
    model: Model,
    *,
    codec: str = "plain",
    prompt: int = 512,
    new_tokens: int = 32,
    batches: Sequence[int] = (1, 8),
    seed: int = 0,
) -> Roofline:
    """Measure the machine, then the model's steps on it.

    Args:
        model: from `kvist.load`.
        codec: of its cache.
        prompt: tokens of each prompt.
        new_tokens: decode steps that are timed.
        batches: sequences that decode at a time.
        seed: of the prompts' token ids.

    Raises:
        RequestError: prompts and new tokens that the model cannot hold.
    """
    most = prompt + new_tokens + max(batches) + 2
    if most > model.max_length:
        raise RequestError(
            f"prompts of {prompt} tokens grow to {most} here, and the model's limit is "
            f"{model.max_length}; take a shorter prompt"
        )
    device = model.device
    rate, rate_type = multiply_rate(
        device,
        model.dtype,
        whole=model.native is not None,
        rounded=model.weights == "fp8-dynamic",
    )
    timed: list[tuple[str, int, float, Work]] = []
    for rows in sorted(set(batches)):
        first, step = _time(model, codec, prompt, new_tokens, rows, seed)
        if not timed:
            work = count(model, codec=codec, tokens=[prompt], contexts=[0], logits=1)
            timed.append((f"Prefill of {prompt:,} tokens", prompt, first, work))
        middle = prompt + (rows + new_tokens) // 2
        work = count(model, codec=codec, tokens=[1] * rows, contexts=[middle] * rows, logits=rows)
        who = "a sequence" if rows == 1 else f"{rows:,} sequences"
        timed.append((f"Decode of {who} at {middle:,} tokens", rows, step, work))
    points = [
        Point(name, tokens, seconds, work, read_rate(device, work.nbytes), rate)
        for name, tokens, seconds, work in timed
    ]
    return Roofline(
        model.name,
        _device_name(device),
        model.executor if model.native is None else "native",
        read_rate(device, _LARGE[device.type == "cuda"]),
        rate,
        rate_type,
        tuple(points),
    )


def _time(
    model: Model, codec: str, prompt: int, new_tokens: int, rows: int, seed: int
) -> tuple[float, float]:
    """Seconds to the first token of one prompt, and of a decode step of so many sequences."""
    rng = random.Random(seed)
    # Prompts come in one after the other, so the first has to go on until the last is there.
    most = new_tokens + rows + 2
    config = EngineConfig(
        codec=codec,
        max_num_seqs=rows,
        max_batch_tokens=max(prompt, rows),
        max_model_len=prompt + most,
        prefix_cache=False,
    )
    engine = Engine(model, config)
    params = SamplingParams(temperature=0, max_tokens=most, ignore_eos=True).resolve({})
    first = step = float("inf")
    for turn in range(3):  # the first compiles, records and warms up
        names = [f"{turn}.{row}" for row in range(rows)]
        for name in names:
            ids = [rng.randrange(model.config.vocab_size) for _ in range(prompt)]
            engine.add(Request(name, tuple(ids), params))
        marks: list[float] = []
        began, answered = time.perf_counter(), None
        while engine.has_unfinished and len(marks) <= new_tokens:
            count = 0
            for event in engine.step():
                if isinstance(event, FailedEvent):
                    raise KvistError(f"a step of this model failed: {event.message}")
                count += isinstance(event, TokensEvent)
            answered = answered or (time.perf_counter() if count else None)
            if count == rows:
                marks.append(time.perf_counter())
        for name in names:
            engine.abort(name)
        while engine.has_unfinished:
            engine.step()
        assert answered is not None
        if turn:
            first = min(first, answered - began)
            step = min(step, (marks[-1] - marks[0]) / (len(marks) - 1))
    return first, step


_LARGE = {False: 256 << 20, True: 4 << 30}  # bytes, on a CPU and on a GPU


def read_rate(device: torch.device, nbytes: int) -> float:
    """Bytes a second, of reading a working set of this size again and again."""
    size = max(1 << 20, min(nbytes, _LARGE[device.type == "cuda"]))
    data = torch.ones(size // 4, dtype=torch.float32, device=device)
    best = _best(lambda: data.sum(), device)
    rate = data.nbytes / best
    if device.type == "cuda":
        # A copy reads and writes; the better of the two is nearer to what memory can do.
        half = torch.empty_like(data)
        rate = max(rate, 2 * data.nbytes / _best(lambda: half.copy_(data), device))
    return rate


def multiply_rate(
    device: torch.device, dtype: torch.dtype, *, whole: bool = False, rounded: bool = False
) -> tuple[float, str]:
    """Operations a second of a large product, and its type.

    With `whole` of 8-bit integers; with `rounded` of fp8, activations' rounding included, where
    kernels do that.
    """
    size = 8192 if device.type == "cuda" else 1024
    if whole:
        a, b = (torch.randint(-9, 9, (size, size), dtype=torch.int8) for _ in range(2))
        return 2 * size**3 / _best(lambda: torch._int_mm(a, b), device), "int8"
    x, y = (torch.randn(size, size, device=device).to(dtype) for _ in range(2))
    if rounded and device.type == "cuda" and can_run(device) and can_run_fp8(device):
        from kvist.kernels.linear import many_rows

        w = Fp8Weight(*quantize(y), rounds_activations=True)
        return 2 * size**3 / _best(lambda: many_rows(x, w), device), "fp8"
    seconds = _best(lambda: x @ y, device)
    return 2 * size**3 / seconds, str(dtype).removeprefix("torch.")


def _best(call: Callable[[], Tensor], device: torch.device) -> float:
    """Least seconds of a call among those that a moment allows."""
    best, ends = float("inf"), time.perf_counter() + 0.3
    turn = 0
    while turn < 3 or time.perf_counter() < ends:
        began = time.perf_counter()
        call()
        if device.type == "cuda":
            torch.cuda.synchronize(device)
        best = min(best, time.perf_counter() - began) if turn else best
        turn += 1
    return best


def _device_name(device: torch.device) -> str:
    if device.type == "cuda":
        return str(torch.cuda.get_device_name(device))
    return f"CPU, {torch.get_num_threads()} threads"


def plot(found: Sequence[Roofline], path: Path) -> None:
    """Operations a second over operations a byte: the roof of the machine, and every step under it.

    Args:
        found: of one machine; the first one's ceilings are drawn.
        path: where the picture goes.
    """
    from kvist.reports.plots import pyplot

    plt = pyplot()
    figure, axes = plt.subplots(figsize=(7.5, 4.6), dpi=140)
    machine = found[0]
    points = [point for one in found for point in one.points]
    ridge = machine.rate / machine.bandwidth
    low = min(0.5, *(p.work.intensity / 2 for p in points))
    high = max(ridge * 8, *(p.work.intensity * 3 for p in points))
    axes.plot(
        [low, ridge, high], [low * machine.bandwidth, machine.rate, machine.rate], color="0.35"
    )
    for i, one in enumerate(found):
        for kind, marker in (("Prefill", "s"), ("Decode", "o")):
            mine = [p for p in one.points if p.name.startswith(kind)]
            axes.plot(
                [p.work.intensity for p in mine],
                [p.work.operations / p.seconds for p in mine],
                marker,
                color=f"C{i}",
                label=f"{one.model}: {kind.lower()}",
            )
        for p in one.points:
            left = p.bound == "arithmetic"
            axes.annotate(
                f"{p.name.split(' at ')[0].lower()}, {100 * p.reached:.0f} %",
                (p.work.intensity, p.work.operations / p.seconds),
                xytext=(-8, -3) if left else (8, -3),
                ha="right" if left else "left",
                textcoords="offset points",
                fontsize=7,
            )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.margins(y=0.1)
    axes.set_xlabel(f"operations per byte (memory below {ridge:,.0f}, arithmetic above)")
    axes.set_ylabel("operations per second")
    axes.set_title(
        f"{machine.device}: {machine.bandwidth / 1e9:,.0f} GB/s, "
        f"{machine.rate / 1e12:,.2f} TFLOP/s {machine.rate_type}",
        fontsize=10,
    )
    axes.legend(fontsize=8)
    axes.grid(alpha=0.25)
    figure.tight_layout()
    figure.savefig(path)
    plt.close(figure)
