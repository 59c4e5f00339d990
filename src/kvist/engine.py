"""The engine: scheduler, block manager, pool and runner, put together; one step at a time.

It speaks token ids and plain data only. `LLM` puts text and a blocking call around it, `AsyncLLM` a
thread; neither reaches past it. One thread calls it.
"""

from collections import deque
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from time import perf_counter
from typing import Literal

from torch import Tensor

from kvist.attention import check_backend
from kvist.cache.groups import LayerGroup, blocks_for, bytes_per_token, group_layers
from kvist.cache.paged import PagedPool
from kvist.cache.protocol import Codec
from kvist.core.blocks import PagedBlockManager
from kvist.core.limits import SchedulerConfig
from kvist.core.ngram import prompt_lookup
from kvist.core.plan import Event, Plan
from kvist.core.protocols import Ticket
from kvist.core.record import BlockDetail, Look, Snapshot
from kvist.core.request import Request
from kvist.core.retention import Retention
from kvist.core.scheduler import ContinuousScheduler
from kvist.core.tables import CacheGroup
from kvist.errors import ConfigError
from kvist.loading.model import Model
from kvist.runner.executors import choose_step, executor_of
from kvist.runner.graphs import can_record
from kvist.runner.memory import available_memory
from kvist.runner.runner import PagedRunner
from kvist.runner.step import StepFunction


@dataclass(frozen=True)
class EngineConfig:
    """How an engine is built.

    Args:
        codec: how keys and values are written, a name in `kvist.cache.CODECS` or a codec.
        retention: which tokens stay; all by default.
        block_size: token places of a block, the unit of sharing.
        max_num_seqs: sequences that run at a time.
        max_batch_tokens: new tokens of a step, decodes and prompt chunks together.
        max_model_len: longest prompt plus output; None is the model's own.
        cache_memory: bytes for the cache; None takes what all sequences at full length need, at
            most half of what is free (90 % on a GPU).
        host_cache: bytes of host memory for blocks that fall out of the pool.
        prefix_cache: whether computed blocks are found again by later requests.
        speculate: guess up to this many tokens a step from what a sequence said before.
        attention: a name in `kvist.attention.BACKENDS`, or "auto".
        overlap: plan and launch a step before the last one was read; None: on a GPU.
        graphs: record steps and replay them, on a GPU with an executor that allows it.
    """

    codec: str | Codec = "plain"
    retention: Retention | None = None
    block_size: int = 16
    max_num_seqs: int = 64
    max_batch_tokens: int = 2048
    max_model_len: int | None = None
    cache_memory: int | None = None
    host_cache: int = 0
    prefix_cache: bool = True
    speculate: int = 0
    attention: str = "auto"
    overlap: bool | None = None
    graphs: bool = True

    def __post_init__(self) -> None:
        """Refuse sizes that could hold nothing."""
        for name in ("block_size", "max_num_seqs", "max_batch_tokens", "max_model_len"):
            value = getattr(self, name)
            if value is not None and value < 1:
                raise ConfigError(f"{name} must be >= 1, not {value}")
        for name in ("host_cache", "speculate"):
            if getattr(self, name) < 0:
                raise ConfigError(f"{name} must be >= 0, not {getattr(self, name)}")


@dataclass(frozen=True, slots=True)
class StepTimes:
    """Where the seconds of a step went, and what it computed.

    Args:
        phase: decodes, parts of prompts, or both.
        schedule: deciding what to compute.
        launch: handing it to the device; on a CPU the computation itself.
        wait: for what came of it.
        commit: taking that in.
    """

    phase: Literal["prefill", "decode", "mixed"]
    schedule: float
    launch: float
    wait: float
    commit: float

    @property
    def total(self) -> float:
        """All of it; of steps that overlap, without what they waited for each other."""
        return self.schedule + self.launch + self.wait + self.commit


class Engine:
    """Continuous batching over one paged pool.

    Args:
        model: from `kvist.load`.
        config: sizes and choices.
        step: what computes a step; None takes the model's executor.
        mask_of: an allowed-token mask by its handle, for grammars.
    """

    def __init__(
        self,
        model: Model,
        config: EngineConfig | None = None,
        *,
        step: StepFunction | None = None,
        mask_of: Callable[[int], Tensor] | None = None,
    ) -> None:
        """Allocate the pool; everything that a step needs has its place from here on."""
        self.model, self.config = model, config or EngineConfig()
        config = self.config
        self.max_length = min(config.max_model_len or model.max_length, model.max_length)
        codec = model.codec(config.codec) if isinstance(config.codec, str) else config.codec
        groups = group_layers(model.specs, config.retention)
        size, chunk = config.block_size, min(config.max_batch_tokens, self.max_length)
        slack = 1 + config.speculate
        blocks = blocks_for(
            self._cache_memory(groups, codec, chunk, slack),
            groups,
            codec,
            block_size=size,
            context=self.max_length,
            chunk=chunk,
            slack=slack,
        )
        host = _host_blocks(config.host_cache, blocks, groups, codec, size)
        self.pool = PagedPool(
            model.specs,
            codec,
            num_blocks=blocks,
            block_size=size,
            max_slots=config.max_num_seqs,
            max_blocks=-(-(self.max_length + slack) // size),
            max_tokens=config.max_batch_tokens,
            host_blocks=host,
            retention=config.retention,
            device=model.device,
        )
        self._groups = [
            CacheGroup(group.spec, num_blocks=n, host_blocks=h)
            for group, n, h in zip(groups, blocks, host, strict=True)
        ]
        self._step = step or choose_step(model.executor, model, self.pool)
        self._mask_of = mask_of
        overlap = model.device.type == "cuda" if config.overlap is None else config.overlap
        self._depth = 2 if overlap else 1
        self.on_step: Callable[[StepTimes], None] | None = None
        self._open_books()
        self.runner.prepare()

    def _open_books(self) -> None:
        """Scheduler, block manager and runner over the pool: nothing runs, nothing is cached."""
        model, config = self.model, self.config
        backend = check_backend(config.attention)
        manager = PagedBlockManager(
            self._groups,
            config.block_size,
            prefix_cache=config.prefix_cache,
            slack=1 + config.speculate,
            save_ahead=_save_ahead(config),
        )
        self.scheduler = ContinuousScheduler(
            SchedulerConfig(
                max_num_seqs=config.max_num_seqs,
                max_batch_tokens=config.max_batch_tokens,
                max_model_len=self.max_length,
                max_drafts=config.speculate,
                codec=self.pool.codec.name,
            ),
            manager,
            drafter=prompt_lookup if config.speculate else None,
        )
        self.runner = PagedRunner(
            model.decoder,
            self.pool,
            vocab_size=model.config.vocab_size,
            step=self._step,
            record=config.graphs and can_record(self._step, self.pool, backend),
            backend=backend,
            encode=None if model.vision is None else self._encode,
            mask_of=self._mask_of,
        )
        self._under_way: deque[tuple[Plan, Ticket, float, float]] = deque()

    def add(self, request: Request) -> None:
        """Queue a request; raises RequestError if it can never be served."""
        self.scheduler.add(request)

    def abort(self, request_id: str) -> list[Event]:
        """End a request now; unknown or finished ids are ignored."""
        return self.scheduler.abort(request_id)

    def finish(self, request_id: str, sample_index: int) -> list[Event]:
        """End one sample from outside, as a stop string does."""
        return self.scheduler.finish(request_id, sample_index)

    @property
    def executor(self) -> str:
        """What computes decode steps now, by name (`kvist.load`'s argument)."""
        return executor_of(self._step, self.model)

    @property
    def has_unfinished(self) -> bool:
        """Whether there is anything left to do."""
        return self.scheduler.has_unfinished

    def step(self) -> list[Event]:
        """Launch what can be launched, wait for the oldest step, and say what came of it.

        Whatever is raised here (out of memory, Ctrl-C) has broken a step off, and nobody knows how
        far it came: all requests and all that was cached are gone then, and the next may be added.
        """
        try:
            return self._step_on()
        except BaseException:
            self._open_books()
            raise

    def _step_on(self) -> list[Event]:
        while len(self._under_way) < self._depth and self.scheduler.has_work:
            began = perf_counter()
            plan = self.scheduler.schedule()
            planned = perf_counter()
            ticket = self.runner.execute(plan)
            times = (planned - began, perf_counter() - planned)
            self._under_way.append((plan, ticket, *times))
        if not self._under_way:
            return []
        plan, ticket, schedule, launch = self._under_way.popleft()
        began = perf_counter()
        output = ticket.result()
        done = perf_counter()
        events = self.scheduler.commit(plan, output)
        if self.on_step is not None and plan.rows:
            wait, commit = done - began, perf_counter() - done
            self.on_step(StepTimes(_phase(plan), schedule, launch, wait, commit))
        return events

    def move_blocks(self) -> None:
        """Carry out moves of blocks that no plan will; only while nothing is under way."""
        blocks = self.scheduler.blocks
        self.pool.apply(blocks.collect({}))
        blocks.settle(blocks.step)

    def snapshot(self) -> Snapshot:
        """Block map, groups, tiers, queue and hit rates, as plain data."""
        return self.scheduler.snapshot()

    def look(self, since: int = 0, branches: int = 0) -> Look:
        """What a live picture needs: a snapshot, marks behind `since`, the tree if asked for."""
        return self.scheduler.look(since, branches)

    def block(self, group: int, block: int, *, host: bool = False) -> BlockDetail:
        """What one block holds, and for whom; raises CacheError if there is no such block."""
        return self.scheduler.block(group, block, host=host)

    def check(self) -> None:
        """Prove the block manager's books; raises CacheError that names what is broken."""
        self.scheduler.blocks.check()

    def _encode(self, pixels: Tensor) -> Tensor:
        """One picture's tile `[3, H, W]` -> `[tokens, hidden]`."""
        assert self.model.vision is not None
        return self.model.vision.encode_images(pixels[None])[0]

    def _cache_memory(
        self, groups: Sequence[LayerGroup], codec: Codec, chunk: int, slack: int
    ) -> int:
        """Bytes for the pools: all sequences at full length, within what the machine has."""
        config = self.config
        if config.cache_memory is not None:
            return config.cache_memory
        wanted = 0
        for group in groups:
            paged = CacheGroup(group.spec, num_blocks=2)
            one = paged.most_blocks(self.max_length, chunk, slack, config.block_size)
            block = config.block_size * bytes_per_token(group, codec)
            wanted += (1 + one * config.max_num_seqs) * block
        share = 0.9 if self.model.device.type == "cuda" else 0.5
        return int(min(wanted, share * available_memory(self.model.device)))


def _phase(plan: Plan) -> Literal["prefill", "decode", "mixed"]:
    """What a plan computes. Rows of one token stand first, so the two ends tell."""
    longest, shortest = (len(row.tokens) - row.num_drafts for row in (plan.rows[-1], plan.rows[0]))
    if longest == 1:
        return "decode"
    return "mixed" if shortest == 1 else "prefill"


def _save_ahead(config: EngineConfig) -> int:
    """Blocks that the host tier keeps ready to be reused: what two steps may ask for.

    A save is done when its step is committed, so what the next step takes has to be ready now.
    """
    return 2 * (-(-config.max_batch_tokens // config.block_size) + config.max_num_seqs)


def _host_blocks(
    memory: int, blocks: Sequence[int], groups: Sequence[LayerGroup], codec: Codec, size: int
) -> list[int]:
    """Host blocks of each group: the memory divided as the pools divide theirs."""
    sizes = [size * bytes_per_token(group, codec) for group in groups]
    total = sum(n * block for n, block in zip(blocks, sizes, strict=True))
    return [memory * n // total for n in blocks]
