"""`kvist verify`: the promise of exactness, on the user's own model and machine.

The reference is the readable loop with the reference attention (or the native executor, where the
model was loaded for it): one prompt alone, its prefill in one piece, a dynamic cache. Every other
way of computing the same greedy tokens is held against it. Sums in another order move logits a
little, so a token that differs counts only where the reference's top-2 margin exceeds four times
the difference that was measured at that place; below that it is a tie, and is listed.
"""

import random
from collections.abc import Callable, Iterator, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

from kvist.cache import CODECS, LAYOUTS
from kvist.cache.groups import bytes_per_token, group_layers
from kvist.core.params import SamplingParams
from kvist.core.results import Result, Timings, TokenLogprob
from kvist.generate import generate
from kvist.llm import LLM
from kvist.loading.model import Model

TOP = 5  # alternatives by which log-probabilities are compared
NOISE_FACTOR = 4
TIES_PER_THOUSAND = 1


@dataclass(frozen=True)
class Tie:
    """A token that differs where the reference itself could not tell: below the noise."""

    prompt: int
    token: int
    margin: float
    noise: float


@dataclass(frozen=True)
class Check:
    """How one way of computing compares with the reference.

    Args:
        path: what was done differently.
        tokens: output tokens that were compared (up to a sequence's first difference).
        max_delta: largest difference of a log-probability, over the likeliest tokens.
        ties: differences below the noise.
        divergence: the first that counts: (prompt, output position, expected, found).
        note: what was seen on the way, such as cached tokens or preemptions.
        exact: whether equal bits were promised, so that any difference at all counts.
    """

    path: str
    tokens: int
    max_delta: float
    ties: tuple[Tie, ...] = ()
    divergence: tuple[int, int, int, int] | None = None
    note: str = ""
    exact: bool = False

    @property
    def passed(self) -> bool:
        """No divergence, and no more ties than one in a thousand tokens (one is always allowed).

        Where equal bits were promised, no difference at all.
        """
        if self.exact:
            return self.divergence is None and not self.ties and self.max_delta == 0
        allowed = max(1, self.tokens * TIES_PER_THOUSAND // 1000)
        return self.divergence is None and len(self.ties) <= allowed

    def as_json(self) -> dict[str, Any]:
        """Plain data."""
        return asdict(self) | {"passed": self.passed}


def verify(
    model: Model,
    prompts: Sequence[Sequence[int]] | None = None,
    *,
    new_tokens: int = 24,
    seed: int = 0,
    codecs: Sequence[str] | None = None,
) -> Iterator[Check]:
    """Compare every way that this build has with the reference, one after the other.

    Args:
        model: best loaded in float32; in narrower types the noise is larger. With the executor
            "deterministic", every way must give the same bits.
        prompts: token ids; a mix of lengths drawn from `seed` unless given.
        new_tokens: greedy tokens for each.
        seed: of the prompts and of the neighbours.
        codecs: lossy codecs to hold against themselves; None: all.
    """
    rng = random.Random(seed)
    prompts = prompts or draw_prompts(model, rng)
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True, logprobs=TOP)
    # Attention asked for by name is computed by the model's own forward: other arithmetic.
    attention = "reference" if model.native is None else "auto"
    for name in ("plain", *(n for n in (codecs if codecs is not None else CODECS) if n != "plain")):
        lossless = model.codec(name).lossless
        expected = [
            generate(model, [prompt], params, codec=name, attention=attention)[0]
            for prompt in prompts
        ]
        label = "" if lossless else f"{name}: "
        exact = model.executor == "deterministic"
        # Whoever wants tokens alone may be served without most of the logits.
        bare = replace(params, logprobs=None)
        alone = [
            generate(model, [prompt], bare, codec=name, attention=attention)[0]
            for prompt in prompts
        ]
        yield replace(compare(f"{label}tokens alone", expected, alone), exact=exact)
        for path, run in _paths(model, prompts, params, name, lossless, rng):
            results, note = run()
            yield replace(compare(label + path, expected, results, note), exact=exact)
        whole, alone = (_in_turn(model, prompts, p, name)()[0] for p in (params, bare))
        yield replace(compare(f"{label}engine, tokens alone", whole, alone), exact=exact)


@dataclass(frozen=True)
class Cost:
    """What equal bits cost, in seconds for the same prompts and tokens.

    Args:
        prefill: all prompts as one batch, by the model's own forward.
        decode: the tokens after each first one.
        fixed_prefill: the same by the deterministic executor.
        fixed_decode: likewise.
    """

    prefill: float
    decode: float
    fixed_prefill: float
    fixed_decode: float


def cost(model: Model, *, new_tokens: int = 24, seed: int = 0) -> Cost:
    """Time the deterministic executor beside the model's own forward; each runs twice."""
    prompts = draw_prompts(model, random.Random(seed))
    params = SamplingParams(temperature=0, max_tokens=new_tokens, ignore_eos=True)
    found: dict[str, list[Timings]] = {"reference": [], "deterministic": []}
    for _ in range(2):
        for name, timings in found.items():
            timings.append(generate(replace(model, executor=name), prompts, params)[0].timings)
    plain, fixed = (
        (min(t.prefill for t in timings), min(t.decode for t in timings))
        for timings in found.values()
    )
    return Cost(*plain, *fixed)


def draw_prompts(model: Model, rng: random.Random) -> list[list[int]]:
    """Prompts of several lengths, two of which share a beginning."""
    vocab, limit = model.config.vocab_size, model.max_length // 2
    lengths = [min(n, limit) for n in (1, 5, 17, 40, 97)]
    prompts = [[rng.randrange(vocab) for _ in range(n)] for n in lengths]
    shared = prompts[-1][: lengths[-1] * 2 // 3]
    return [*prompts, [*shared, *(rng.randrange(vocab) for _ in range(9))]]


Run = Callable[[], tuple[list[Result], str]]


def _paths(
    model: Model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    codec: str,
    lossless: bool,
    rng: random.Random,
) -> Iterator[tuple[str, Run]]:
    """(what is done differently, how); lossy codecs take the ways that matter for the cache."""

    def loop(**options: Any) -> Run:
        return lambda: (generate(model, prompts, params, codec=codec, **options), "")

    for layout in LAYOUTS:
        yield f"{layout} cache, one batch", loop(cache=layout)
    for chunk in (1, 7, 64):
        yield f"prefill in chunks of {chunk}", loop(chunk=chunk)
    if lossless:
        yield "without a cache", loop(use_cache=False)
    yield "guessing ahead by 4", loop(speculate=4)

    def engine(rounds: int = 1, **options: Any) -> Run:
        def run() -> tuple[list[Result], str]:
            llm = LLM(model, codec=codec, **options)
            for _ in range(rounds):
                results = llm.generate(prompts, params)
            llm.engine.check()
            return results, _note(llm, results)

        return run

    yield "engine, cold", engine()
    yield "engine, warm", engine(rounds=2)
    yield "engine, alone in turn", _in_turn(model, prompts, params, codec)
    yield "engine, with neighbours", _crowded(model, prompts, params, codec, rng)
    yield "engine, steps of 16 tokens", engine(max_batch_tokens=16, block_size=4)
    yield "engine, planning ahead", engine(overlap=True)
    yield "engine, guessing ahead by 4", engine(speculate=4)
    tight = _tight(model, prompts, params, codec)
    yield (
        "engine, preempted",
        engine(cache_memory=tight, block_size=4, prefix_cache=False),
    )
    yield (
        "engine, host tier",
        engine(rounds=3, cache_memory=tight, block_size=4, host_cache=8 * tight),
    )
    yield "engine, imported prefix", _imported(model, prompts, params, codec)


def _imported(
    model: Model, prompts: Sequence[Sequence[int]], params: SamplingParams, codec: str
) -> Run:
    def run() -> tuple[list[Result], str]:
        first, second = (LLM(model, codec=codec, block_size=4) for _ in range(2))
        first.generate(prompts, params)
        with TemporaryDirectory() as directory:
            for index, prompt in enumerate(prompts):
                if len(prompt) >= 4:
                    path = Path(directory) / f"{index}.safetensors"
                    first.export_prefix(prompt, path)
                    second.import_prefix(path)
        results = second.generate(prompts, params)
        second.engine.check()
        return results, _note(second, results)

    return run


def _in_turn(
    model: Model, prompts: Sequence[Sequence[int]], params: SamplingParams, codec: str
) -> Run:
    def run() -> tuple[list[Result], str]:
        llm = LLM(model, codec=codec, prefix_cache=False)
        return [llm.generate([prompt], params)[0] for prompt in prompts], ""

    return run


def _crowded(
    model: Model,
    prompts: Sequence[Sequence[int]],
    params: SamplingParams,
    codec: str,
    rng: random.Random,
) -> Run:
    vocab = model.config.vocab_size

    def run() -> tuple[list[Result], str]:
        others = [
            [rng.randrange(vocab) for _ in range(rng.randrange(1, 60))] for _ in range(len(prompts))
        ]
        free = SamplingParams(temperature=1, max_tokens=params.max_tokens, seed=1)
        llm = LLM(model, codec=codec)
        mixed = [p for pair in zip(prompts, others, strict=True) for p in pair]
        return llm.generate(mixed, [params, free] * len(prompts))[::2], ""

    return run


def _tight(
    model: Model, prompts: Sequence[Sequence[int]], params: SamplingParams, codec: str
) -> int:
    """Cache memory that holds the longest request and little more, so that others must give way."""
    made = model.codec(codec)
    groups = group_layers(model.specs)
    longest = max(map(len, prompts)) + (params.max_tokens or 0)
    per_token = sum(bytes_per_token(group, made) for group in groups)
    return per_token * (longest + 24)


def _note(llm: LLM, results: Sequence[Result]) -> str:
    """What the cache did, where it did anything."""
    counters, facts = llm.snapshot().counters, []
    hits = sum(r.record.cached_tokens for r in results if r.record)
    lost = sum(r.record.preemptions for r in results if r.record)
    for count, what in (
        (hits, "prompt tokens cached"),
        (lost, "preemptions"),
        (counters.loaded_blocks, "blocks back from the host"),
    ):
        if count:
            facts.append(f"{count} {what}")
    return ", ".join(facts)


def compare(
    path: str, expected: Sequence[Result], found: Sequence[Result], note: str = ""
) -> Check:
    """Hold greedy results against the reference's; those without log-probabilities exactly."""
    tokens, delta = 0, 0.0
    ties: list[Tie] = []
    divergence = None
    for index, (ours, theirs) in enumerate(zip(expected, found, strict=True)):
        assert ours.logprobs is not None
        for place, (a, token) in enumerate(zip(ours.logprobs, theirs.token_ids, strict=True)):
            noise = 0.0 if theirs.logprobs is None else difference(a, theirs.logprobs[place])
            if a.token_id == token:
                tokens, delta = tokens + 1, max(delta, noise)
                continue
            margin = a.top[0][1] - a.top[1][1]
            if margin > NOISE_FACTOR * noise:
                divergence = divergence or (index, place, a.token_id, token)
                delta = max(delta, noise)
            else:
                ties.append(Tie(index, place, margin, noise))
            break  # from here on the two have different pasts
    return Check(path, tokens, delta, tuple(ties), divergence, note)


def difference(a: TokenLogprob, b: TokenLogprob) -> float:
    """The largest difference of a log-probability, over the tokens that both list."""
    left, right = dict(a.top), dict(b.top)
    return max((abs(left[t] - right[t]) for t in left.keys() & right.keys()), default=float("inf"))
