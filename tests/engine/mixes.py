"""Random traffic for the engine: what is asked, how the engine is built, and a way to run it.

Between steps every free block is filled with NaN and the block manager's books are proved, so that
whatever reads a place that is not its own shows at once.
"""

import os
import random
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

from hypothesis import strategies as st

import kvist
from kvist import SamplingParams, SlidingWindow
from kvist.cache import Codec, make_codec
from kvist.cache.groups import bytes_per_token, group_layers
from kvist.core.params import ResolvedParams
from kvist.core.results import Result
from kvist.core.retention import Retention
from kvist.core.tables import CacheGroup
from kvist.engine import Engine, EngineConfig
from kvist.loading.model import Model
from kvist.serving import Desk, Job, make_jobs
from tiny_models import reference, tiny

MODELS = ("tiny", "dense_tied", "dense_swa", "dense_untied_headdim")
LENGTH = 64  # the longest prompt and output of a mix
STEMS = 3
STEP_LIMIT = 3000


def examples(count: int) -> int:
    """Hypothesis examples: so many in an ordinary run, more where KVIST_EXAMPLES says so."""
    return max(1, count * int(os.environ.get("KVIST_EXAMPLES", "2000")) // 2000)


def model_of(name: str) -> Model:
    """One of the small models."""
    return tiny() if name == "tiny" else reference(name).model


@dataclass(frozen=True)
class Ask:
    """One request of a mix: the first `shared` tokens of a stem, then its own `tail`."""

    stem: int
    shared: int
    tail: int
    params: dict[str, Any] = field(default_factory=dict)
    arrives: int = 0
    leaves: int | None = None
    priority: int = 0
    salt: str = ""

    def prompt(self, vocab: int) -> list[int]:
        """Its token ids; requests of one stem have their beginnings in common."""
        stem, own = random.Random(self.stem), random.Random(1000 * self.stem + self.tail)
        ids = [stem.randrange(vocab) for _ in range(self.shared)]
        # A tail repeats itself, so that there is something for prompt lookup to guess.
        ids += [own.randrange(vocab) for _ in range(-(-self.tail // 2))] * 2
        return ids[: self.shared + self.tail]


@dataclass(frozen=True)
class Mix:
    """An engine and what is asked of it; `room` is in sequences of full length."""

    model: str
    asks: tuple[Ask, ...]
    options: dict[str, Any]
    room: float
    host_room: float

    def config(self) -> EngineConfig:
        """The engine's configuration, its memory in bytes."""
        one = sequence_bytes(model_of(self.model), **self.options)
        return EngineConfig(
            max_model_len=LENGTH,
            cache_memory=null_bytes(model_of(self.model), **self.options) + int(one * self.room),
            host_cache=int(one * self.host_room),
            **self.options,
        )


def _groups(model: Model, codec: str | Codec, retention: Retention | None) -> Any:
    made = make_codec(codec, model.dtype) if isinstance(codec, str) else codec
    return [(g, bytes_per_token(g, made)) for g in group_layers(model.specs, retention)]


def sequence_bytes(
    model: Model,
    *,
    block_size: int = 16,
    max_batch_tokens: int = 2048,
    codec: str | Codec = "plain",
    retention: Retention | None = None,
    length: int = LENGTH,
    **_: Any,
) -> int:
    """What one sequence of `length` tokens takes in all groups."""
    chunk = min(max_batch_tokens, length)
    return sum(
        CacheGroup(g.spec, num_blocks=2).most_blocks(length, chunk, 1, block_size) * block_size * n
        for g, n in _groups(model, codec, retention)
    )


def null_bytes(
    model: Model,
    *,
    block_size: int = 16,
    codec: str | Codec = "plain",
    retention: Retention | None = None,
    **_: Any,
) -> int:
    """What the null blocks take."""
    return sum(block_size * n for _, n in _groups(model, codec, retention))


params_ = st.fixed_dictionaries(
    {
        "temperature": st.sampled_from([0.0, 0.0, 0.8, 1.3]),
        "seed": st.integers(0, 3),
        "max_tokens": st.sampled_from([1, 5, 12, 20]),
        "n": st.sampled_from([1, 1, 1, 2, 3]),
        "ignore_eos": st.booleans(),
    },
    optional={
        "top_k": st.sampled_from([0, 5, 40]),
        "top_p": st.sampled_from([0.6, 0.95]),
        "min_p": st.sampled_from([0.0, 0.1]),
        "repetition_penalty": st.sampled_from([1.2, 0.9]),
        "presence_penalty": st.sampled_from([0.7]),
        "frequency_penalty": st.sampled_from([0.4, -0.4]),
        "logit_bias": st.dictionaries(st.integers(0, 60), st.sampled_from([-4.0, 3.0]), max_size=2),
        "stop_token_ids": st.lists(st.integers(0, 60), max_size=8),
        "logprobs": st.sampled_from([0, 2]),
        "prompt_logprobs": st.sampled_from([0, 2]),
        "stop": st.lists(st.sampled_from(["e", "th", "or", "a", "\ufffd", "s t"]), max_size=2),
    },
)


@st.composite
def asks_(draw: Any) -> Ask:
    """A request."""
    params = draw(params_)
    if draw(st.booleans()):
        params["min_tokens"] = draw(st.integers(0, params["max_tokens"]))
    shared = draw(st.sampled_from([0, 7, 16, 24, 30]))
    return Ask(
        stem=draw(st.integers(0, STEMS - 1)),
        shared=shared,
        tail=draw(st.sampled_from([1, 4, 9, 14])),
        params=params,
        arrives=draw(st.sampled_from([0, 0, 1, 4, 9, 20])),
        leaves=draw(st.sampled_from([None, None, None, 0, 1, 3, 8])),
        priority=draw(st.sampled_from([0, 0, 1])),
        salt=draw(st.sampled_from(["", "", "tenant"])),
    )


retentions_ = st.one_of(
    st.none(), st.none(), st.builds(SlidingWindow, st.integers(1, 24), st.integers(0, 5))
)


@st.composite
def mixes_(draw: Any) -> Mix:
    """Traffic and an engine that is short of everything, most of the time."""
    model = draw(st.sampled_from(MODELS))
    asks = draw(st.lists(asks_(), min_size=3, max_size=8))
    if model_of(model).tokenizer is None:
        asks = [_without_strings(ask) for ask in asks]
    return Mix(
        model,
        tuple(asks),
        options={
            "block_size": draw(st.sampled_from([1, 2, 3, 4, 8, 16])),
            "max_num_seqs": draw(st.sampled_from([1, 3, 5, 8])),
            "max_batch_tokens": draw(st.sampled_from([3, 7, 16, 64])),
            "prefix_cache": draw(st.sampled_from([True, True, True, True, False])),
            "speculate": draw(st.sampled_from([0, 0, 1, 4])),
            "overlap": draw(st.booleans()),
            "retention": draw(retentions_),
            "attention": draw(st.sampled_from(["auto", "reference"])),
        },
        room=draw(st.sampled_from([1.0, 1.2, 1.5, 2.0, 5.0])),
        host_room=draw(st.sampled_from([0.0, 0.5, 4.0])),
    )


def _without_strings(ask: Ask) -> Ask:
    params = {name: value for name, value in ask.params.items() if name != "stop"}
    return Ask(**{**vars(ask), "params": params})


def poison(engine: Engine, *, free_only: bool = False) -> None:
    """Fill blocks with ones in every bit: NaN in any floating-point type."""
    for pool, group in zip(engine.pool.pools, engine.snapshot().groups, strict=True):
        blocks = [
            block
            for block in range(pool.num_blocks)
            if not free_only or not (group.owners[block] or group.cached[block])
        ]
        for plane in pool._bytes:
            plane[blocks] = 0xFF
    if not free_only:
        for host in engine.pool.hosts:
            host._data.fill_(0xFF)


def poisoned(engine: Engine) -> Engine:
    """A new engine, with nothing but NaN in its blocks."""
    poison(engine)
    return engine


def jobs_of(model: Model, asks: Sequence[Ask], label: str) -> list[Job]:
    """A job for each request; `label` tells one pass from the next."""
    jobs = []
    for i, ask in enumerate(asks):
        jobs += make_jobs(
            model,
            [ask.prompt(model.config.vocab_size)],
            SamplingParams(**ask.params),
            [f"{label}{i}"].__getitem__,
            priority=ask.priority,
            cache_salt=ask.salt,
        )
    return jobs


def run(
    engine: Engine, jobs: Sequence[Job], asks: Sequence[Ask] | None = None
) -> list[list[Result]]:
    """Serve the jobs, each coming and leaving at its own step; the results of each, n by n."""
    desk = Desk(engine)
    arrivals = [ask.arrives for ask in asks] if asks else [0] * len(jobs)
    leaving = [ask.leaves for ask in asks] if asks else [None] * len(jobs)
    for step in range(STEP_LIMIT):
        for job, arrives, leaves in zip(jobs, arrivals, leaving, strict=True):
            if step == arrives:
                desk.add(job)
            if leaves is not None and step == arrives + leaves:
                desk.abort(job.request.id)
        desk.take(engine.step())
        engine.check()
        poison(engine, free_only=True)
        if step >= max(arrivals, default=0) and not engine.has_unfinished:
            assert not desk.jobs
            return [[sample.result() for sample in job.samples] for job in jobs]
    raise AssertionError(f"something has not ended after {STEP_LIMIT} steps")


def assert_idle(engine: Engine) -> None:
    """Nothing runs, and nobody owns or holds a block; cached ones may stay."""
    engine.check()
    snapshot = engine.snapshot()
    assert not snapshot.running
    assert not snapshot.waiting
    for group in snapshot.groups:
        assert not any(group.owners)
        assert group.held == 0
        kept = sum(group.cached)
        assert group.free == group.num_blocks - 1 - kept


def expected_of(
    model: Model, jobs: Sequence[Job], retention: Retention | None = None, codec: Any = "plain"
) -> list[list[Result]]:
    """What the readable loop says to the same prompts."""
    results = kvist.generate(
        model,
        [job.request.prompt_ids for job in jobs],
        [_asked(job.request.params) for job in jobs],
        retention=retention,
        codec=codec,
    )
    grouped: list[list[Result]] = [[] for _ in jobs]
    for result in results:
        grouped[result.prompt_index].append(result)
    return grouped


def _asked(params: ResolvedParams) -> SamplingParams:
    return SamplingParams(**{name: getattr(params, name) for name in vars(params)})
