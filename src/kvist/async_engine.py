"""`AsyncLLM`: requests that come and go, streamed, on one engine with a thread of its own.

What is asked crosses to the engine's thread in one queue, and news come back through the event loop
that asked; nothing else touches the engine. The server is built on this.
"""

import asyncio
import atexit
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import aclosing, suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from kvist.core.garbage import rare_full_collections
from kvist.core.params import SamplingParams
from kvist.core.record import BlockDetail, Look, Snapshot
from kvist.core.results import Delta
from kvist.embed import Pooling, embed
from kvist.engine import Engine, EngineConfig, StepTimes
from kvist.errors import EngineDead, KvistError
from kvist.grammar import CompiledGrammar, Grammars
from kvist.loading.image_prompt import PreparedPrompt
from kvist.loading.model import Model, Prompt, load
from kvist.sample import Sample
from kvist.serving import Desk, Job, make_jobs

T = TypeVar("T")


@dataclass(frozen=True, eq=False)
class _Stream:
    """Where the news of one request go: a queue of the event loop that asked."""

    job: Job
    loop: asyncio.AbstractEventLoop
    news: "asyncio.Queue[list[Delta] | Exception]"

    def refuse(self, error: Exception) -> None:
        """Tell it the end, from the engine's thread; nobody listens if the loop has gone."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.news.put_nowait, error)


class _Call(NamedTuple):
    """Something to do on the engine's thread; one of the two is called, once."""

    do: Callable[[], object]
    refuse: Callable[[Exception], object] = lambda error: None


class AsyncLLM:
    """An engine that serves many requests at once.

        >>> async with kvist.AsyncLLM("smollm2-135m") as llm:
        ...     async for delta in llm.submit("Hello", params):
        ...         print(delta.text, end="")

    Args:
        model: a `kvist.Model`, or what `kvist.load` takes.
        dtype: as in `kvist.load`.
        device: as in `kvist.load`.
        executor: as in `kvist.load`.
        weights: as in `kvist.load`.
        options: the fields of `EngineConfig`.
    """

    def __init__(
        self,
        model: Model | str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        executor: str = "auto",
        weights: str = "auto",
        **options: Any,
    ) -> None:
        """Load the model if need be, allocate the cache, start the engine's thread."""
        config = EngineConfig(**options)  # first: a wrong option costs no loading
        if not isinstance(model, Model):
            model = load(model, dtype, device, executor=executor, weights=weights)
        self.model = model
        self.grammars = Grammars(model)
        self._engine = Engine(self.model, config, mask_of=self.grammars.mask_of)
        self._desk = Desk(self._engine)
        self._streams: dict[str, _Stream] = {}
        self._inbox: queue.SimpleQueue[_Call | None] = queue.SimpleQueue()
        self._ids = count()
        self._death: BaseException | None = None
        # Nothing enters the inbox once `_closed` is set, so that what is in it can be answered.
        self._gate = threading.Lock()
        self._closed = False
        self._thread = threading.Thread(target=self._run, name="kvist-engine", daemon=True)
        self._thread.start()
        # An interpreter that ends under a running step would abort instead of exit.
        atexit.register(self.close)

    # What callers use, from any event loop.

    async def submit(
        self,
        prompt: Prompt | PreparedPrompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        grammar: CompiledGrammar | None = None,
    ) -> AsyncGenerator[Delta, None]:
        """Stream one request.

        Leaving the iterator early, or cancelling it, aborts the request within one step.

        Args:
            prompt: text, token ids, chat messages, or what `Model.prepare` has made of them.
            params: None takes the model's defaults.
            request_id: unique among the unfinished; one is made up if need be.
            priority: lower goes first, where others wait.
            cache_salt: cached prefixes are shared only among requests of the same salt.
            grammar: what the output is held to, from `self.grammars`.

        Yields:
            What each step adds to one of the samples (`delta.sample_index`); each sample's last
            delta carries its result.

        Raises:
            RequestError: the request makes no sense or can never fit.
            EngineDead: the engine has ended.
        """
        steps = self.steps(
            prompt,
            params,
            request_id=request_id,
            priority=priority,
            cache_salt=cache_salt,
            grammar=grammar,
        )
        async with aclosing(steps):
            async for deltas in steps:
                for delta in deltas:
                    yield delta

    async def steps(
        self,
        prompt: Prompt | PreparedPrompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
        grammar: CompiledGrammar | None = None,
    ) -> AsyncGenerator[list[Delta], None]:
        """`submit`, but with all that a step adds to the request's samples in one piece."""
        name = request_id if request_id is not None else f"r{next(self._ids)}"
        (job,) = make_jobs(
            self.model,
            [prompt],
            params,
            lambda index: name,
            priority=priority,
            cache_salt=cache_salt,
            grammar=grammar,
            grammars=self.grammars,
            max_length=self.max_length,
        )
        stream = _Stream(job, asyncio.get_running_loop(), asyncio.Queue())
        self._send(_Call(lambda: self._begin(stream), stream.refuse))
        left = len(job.samples)
        try:
            while left:
                item = await stream.news.get()
                if isinstance(item, Exception):
                    left = 0
                    raise item
                left -= sum(delta.result is not None for delta in item)
                yield item
        finally:
            if left:
                with suppress(EngineDead):
                    self._send(_Call(lambda: self._leave(stream)))

    def abort(self, request_id: str) -> None:
        """End a request now; unknown or finished ids are ignored."""
        with suppress(EngineDead):
            self._send(_Call(lambda: self._tell(self._desk.abort(request_id))))

    async def snapshot(self) -> Snapshot:
        """What the engine is doing, as plain data."""
        return await self._ask(self._engine.snapshot)

    async def look(self, since: int = 0, branches: int = 0) -> Look:
        """What a live picture needs: a snapshot, what happened to requests, the prefix tree.

        Args:
            since: serial number of the last mark that is known already.
            branches: nodes of the prefix tree to visit at most; 0 leaves the tree out.
        """
        return await self._ask(lambda: self._engine.look(since, branches))

    async def block(self, group: int, block: int, *, host: bool = False) -> BlockDetail:
        """What one block holds, and for whom; raises CacheError if there is no such block."""
        return await self._ask(lambda: self._engine.block(group, block, host=host))

    async def _ask(self, question: Callable[[], T]) -> T:
        """Put a question to the engine between two of its steps; what it raises is raised here."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(given: T | Exception) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, answer, given)

        def reply() -> None:
            try:
                settle(question())
            except Exception as failure:  # of the question alone: it changes nothing
                settle(failure)

        self._send(_Call(reply, settle))
        return await answer

    @property
    def max_length(self) -> int:
        """The longest prompt plus output that the engine takes."""
        return self._engine.max_length

    async def embed(self, token_ids: Sequence[int], pooling: Pooling = "last") -> list[float]:
        """A prompt's last hidden states, pooled to a unit vector; see `kvist.embed`.

        It is computed between two steps, so that others wait for it as for a long prompt.
        """
        ids = self.model.encode(token_ids)
        return await self._ask(lambda: embed(self.model, ids, pooling))

    def on_step(self, observe: Callable[[StepTimes], None] | None) -> None:
        """Have each step's times told; `observe` is called on the engine's thread."""
        self._engine.on_step = observe

    @property
    def alive(self) -> bool:
        """Whether the engine still serves."""
        return not self._closed

    def close(self) -> None:
        """End all requests and the thread; safe to call twice."""
        with self._gate:
            if not self._closed:
                self._closed = True
                self._inbox.put(None)
        self._thread.join()
        atexit.unregister(self.close)

    async def __aenter__(self) -> "AsyncLLM":
        """Use with `async with`, which closes it."""
        return self

    async def __aexit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        trace: TracebackType | None,
    ) -> None:
        """Close without blocking the event loop."""
        await asyncio.to_thread(self.close)

    def _send(self, call: _Call) -> None:
        with self._gate:
            if not self._closed:
                self._inbox.put(call)
                return
        raise self._dead()

    def _dead(self) -> EngineDead:
        death = self._death
        reason = "" if death is None else f" ({type(death).__name__}: {death})"
        error = EngineDead(f"the engine has ended{reason}; make a new one")
        error.__cause__ = death
        return error

    # What happens on the engine's thread.

    def _run(self) -> None:
        try:
            with rare_full_collections():
                while self._receive():
                    if self._engine.has_unfinished:
                        self._tell(self._desk.take(self._engine.step()))
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._death = error
        finally:
            with self._gate:
                self._closed = True
            for stream in self._streams.values():
                stream.refuse(self._dead())
            self._streams.clear()
            with suppress(queue.Empty):
                while True:
                    call = self._inbox.get_nowait()
                    if call is not None:
                        call.refuse(self._dead())

    def _receive(self) -> bool:
        """Carry out what was asked; waits for it only if there is nothing else to do."""
        wait = not self._engine.has_unfinished
        while True:
            try:
                call = self._inbox.get(block=wait)
            except queue.Empty:
                return True
            if call is None:
                return False
            try:
                call.do()
            except BaseException as error:
                self._death = error
                self._inbox.put(call)  # who asked is told with the others, once it is over
                raise
            wait = False

    def _begin(self, stream: _Stream) -> None:
        try:
            self._desk.add(stream.job)
        except KvistError as error:
            stream.refuse(error)
        else:
            self._streams[stream.job.request.id] = stream

    def _leave(self, stream: _Stream) -> None:
        """Nobody listens to this stream any more; another may have taken its name since."""
        request_id = stream.job.request.id
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._desk.abort(request_id)

    def _tell(self, touched: Sequence[Sample]) -> None:
        """Hand each request what is new of its samples, and wake each event loop once."""
        heard: dict[_Stream, list[Delta]] = {}
        for sample in touched:
            stream = self._streams.get(sample.request_id)
            if stream is not None:
                heard.setdefault(stream, []).append(sample.delta())
        by_loop: dict[asyncio.AbstractEventLoop, list[tuple[_Stream, list[Delta]]]] = {}
        for stream, deltas in heard.items():
            by_loop.setdefault(stream.loop, []).append((stream, deltas))
        for loop, news in by_loop.items():
            try:
                loop.call_soon_threadsafe(_deliver, news)
            except RuntimeError:  # the loop has gone, and nobody listens
                for stream, _ in news:
                    self._leave(stream)
        for stream in heard:
            if stream.job.finished:
                self._streams.pop(stream.job.request.id, None)


def _deliver(news: Sequence[tuple[_Stream, list[Delta]]]) -> None:
    """Put what a step has brought where each reader waits; on the readers' event loop."""
    for stream, deltas in news:
        stream.news.put_nowait(deltas)


def _settle(answer: "asyncio.Future[T]", given: T | Exception) -> None:
    """Answer, unless who asked has given up."""
    if answer.done():
        return
    if isinstance(given, Exception):
        answer.set_exception(given)
    else:
        answer.set_result(given)
