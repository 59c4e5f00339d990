"""`AsyncLLM`: requests that come and go, streamed, on one engine with a thread of its own.

Everything that crosses between the event loop and the engine's thread is plain data in a queue, so
that the engine may become a process of its own. The server is built on this.
"""

import asyncio
import atexit
import queue
import threading
from collections.abc import AsyncGenerator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any, NamedTuple, TypeVar

from kvist.core.params import SamplingParams
from kvist.core.record import BlockDetail, Look, Snapshot
from kvist.core.results import Delta
from kvist.engine import Engine, EngineConfig
from kvist.errors import EngineDead, KvistError
from kvist.loading.model import Model, Prompt, load
from kvist.sample import Sample
from kvist.serving import Desk, Job, make_jobs

T = TypeVar("T")


@dataclass(frozen=True)
class _Stream:
    """Where the deltas of one request go: a queue of the event loop that asked."""

    job: Job
    loop: asyncio.AbstractEventLoop
    deltas: "asyncio.Queue[Delta | Exception]"

    def put(self, item: Delta | Exception) -> bool:
        """Hand over from the engine's thread; False if the loop has gone and nobody listens."""
        try:
            self.loop.call_soon_threadsafe(self.deltas.put_nowait, item)
        except RuntimeError:
            return False
        return True


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
        options: the fields of `EngineConfig`.
    """

    def __init__(
        self,
        model: Model | str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        executor: str = "auto",
        **options: Any,
    ) -> None:
        """Load the model if need be, allocate the cache, start the engine's thread."""
        config = EngineConfig(**options)  # first: a wrong option costs no loading
        if not isinstance(model, Model):
            model = load(model, dtype, device, executor=executor)
        self.model = model
        self._engine = Engine(self.model, config)
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
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncGenerator[Delta, None]:
        """Stream one request.

        Leaving the iterator early, or cancelling it, aborts the request within one step.

        Args:
            prompt: text, token ids, or chat messages.
            params: None takes the model's defaults.
            request_id: unique among the unfinished; one is made up if need be.
            priority: lower goes first, where others wait.
            cache_salt: cached prefixes are shared only among requests of the same salt.

        Yields:
            What each step adds to one of the samples (`delta.sample_index`); each sample's last
            delta carries its result.

        Raises:
            RequestError: the request makes no sense or can never fit.
            EngineDead: the engine has ended.
        """
        name = request_id if request_id is not None else f"r{next(self._ids)}"
        (job,) = make_jobs(
            self.model,
            [prompt],
            params,
            lambda index: name,
            priority=priority,
            cache_salt=cache_salt,
            max_length=self._engine.max_length,
        )
        stream = _Stream(job, asyncio.get_running_loop(), asyncio.Queue())
        self._send(_Call(lambda: self._begin(stream), stream.put))
        left = len(job.samples)
        try:
            while left:
                item = await stream.deltas.get()
                if isinstance(item, Exception):
                    left = 0
                    raise item
                left -= item.result is not None
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
        """Put a question to the engine between two of its steps; its refusal is raised here."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[T] = loop.create_future()

        def settle(given: T | Exception) -> None:
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, answer, given)

        def reply() -> None:
            try:
                settle(question())
            except KvistError as refusal:
                settle(refusal)

        self._send(_Call(reply, settle))
        return await answer

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
            while self._receive():
                if self._engine.has_unfinished:
                    self._tell(self._desk.take(self._engine.step()))
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._death = error
        finally:
            with self._gate:
                self._closed = True
            for stream in self._streams.values():
                stream.put(self._dead())
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
            stream.put(error)
        else:
            self._streams[stream.job.request.id] = stream

    def _leave(self, stream: _Stream) -> None:
        """Nobody listens to this stream any more; another may have taken its name since."""
        request_id = stream.job.request.id
        if self._streams.get(request_id) is stream:
            del self._streams[request_id]
            self._desk.abort(request_id)

    def _tell(self, touched: Sequence[Sample]) -> None:
        """Hand each sample's news to whoever listens."""
        for sample in touched:
            stream = self._streams.get(sample.request_id)
            if stream is None:
                continue
            if not stream.put(sample.delta()):
                self._leave(stream)
        # Only now: several samples of one request may have ended in one step.
        for sample in touched:
            stream = self._streams.get(sample.request_id)
            if stream is not None and stream.job.finished:
                del self._streams[sample.request_id]


def _settle(answer: "asyncio.Future[T]", given: T | Exception) -> None:
    """Answer, unless who asked has given up."""
    if answer.done():
        return
    if isinstance(given, Exception):
        answer.set_exception(given)
    else:
        answer.set_result(given)
