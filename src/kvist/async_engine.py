"""`AsyncLLM`: requests that come and go, streamed, on one engine with a thread of its own.

Everything that crosses between the event loop and the engine's thread is plain data in a queue, so
that the engine may become a process of its own. The server is built on this.
"""

import asyncio
import queue
import threading
from collections.abc import AsyncIterator, Callable, Sequence
from contextlib import suppress
from dataclasses import dataclass
from itertools import count
from pathlib import Path
from types import TracebackType
from typing import Any

from kvist.core.params import SamplingParams
from kvist.core.record import Snapshot
from kvist.core.results import Delta
from kvist.engine import Engine, EngineConfig
from kvist.errors import EngineDead, KvistError
from kvist.loading.model import Model, Prompt, load
from kvist.sample import Sample
from kvist.serving import Desk, Job, make_jobs


@dataclass(frozen=True)
class _Stream:
    """Where the deltas of one request go: a queue of the event loop that asked."""

    job: Job
    loop: asyncio.AbstractEventLoop
    deltas: "asyncio.Queue[Delta | Exception]"

    def put(self, item: Delta | Exception) -> None:
        """Hand over from the engine's thread; a loop that has gone no longer listens."""
        with suppress(RuntimeError):
            self.loop.call_soon_threadsafe(self.deltas.put_nowait, item)


class AsyncLLM:
    """An engine that serves many requests at once.

        >>> async with kvist.AsyncLLM("smollm2-135m") as llm:
        ...     async for delta in llm.submit("Hello", params):
        ...         print(delta.text, end="")

    Args:
        model: a `kvist.Model`, or what `kvist.load` takes.
        dtype: as in `kvist.load`.
        device: as in `kvist.load`.
        options: the fields of `EngineConfig`.
    """

    def __init__(
        self,
        model: Model | str | Path,
        *,
        dtype: str = "auto",
        device: str = "auto",
        **options: Any,
    ) -> None:
        """Load the model if need be, allocate the cache, start the engine's thread."""
        self.model = model if isinstance(model, Model) else load(model, dtype, device)
        self._engine = Engine(self.model, EngineConfig(**options))
        self._desk = Desk(self._engine)
        self._streams: dict[str, _Stream] = {}
        self._inbox: queue.SimpleQueue[Callable[[], None] | None] = queue.SimpleQueue()
        self._ids = count()
        self._death: BaseException | None = None
        self._closed = threading.Event()
        self._thread = threading.Thread(target=self._run, name="kvist-engine", daemon=True)
        self._thread.start()

    # What callers use, from any event loop.

    async def submit(
        self,
        prompt: Prompt,
        params: SamplingParams | None = None,
        *,
        request_id: str | None = None,
        priority: int = 0,
        cache_salt: str = "",
    ) -> AsyncIterator[Delta]:
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
        )
        stream = _Stream(job, asyncio.get_running_loop(), asyncio.Queue())
        self._send(lambda: self._begin(stream))
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
                self.abort(name)

    def abort(self, request_id: str) -> None:
        """End a request now; unknown or finished ids are ignored."""
        if self.alive:
            self._inbox.put(lambda: self._tell(self._desk.abort(request_id)))

    async def snapshot(self) -> Snapshot:
        """What the engine is doing, as plain data."""
        loop = asyncio.get_running_loop()
        answer: asyncio.Future[Snapshot] = loop.create_future()

        def ask() -> None:
            taken = self._engine.snapshot()
            with suppress(RuntimeError):
                loop.call_soon_threadsafe(_settle, answer, taken)

        self._send(ask)
        return await answer

    @property
    def alive(self) -> bool:
        """Whether the engine still serves."""
        return self._thread.is_alive() and not self._closed.is_set() and self._death is None

    def close(self) -> None:
        """End all requests and the thread; safe to call twice."""
        if not self._closed.is_set():
            self._closed.set()
            self._inbox.put(None)
        self._thread.join()

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

    def _send(self, call: Callable[[], None]) -> None:
        if not self.alive:
            raise EngineDead(f"the engine has ended{self._reason()}; make a new one")
        self._inbox.put(call)

    def _reason(self) -> str:
        return "" if self._death is None else f" ({type(self._death).__name__}: {self._death})"

    # What happens on the engine's thread.

    def _run(self) -> None:
        try:
            while self._receive():
                if self._engine.has_unfinished:
                    self._tell(self._desk.take(self._engine.step()))
        except BaseException as error:  # whatever it is, nobody may wait for ever
            self._death = error
        finally:
            ended = EngineDead(f"the engine has ended{self._reason()}; make a new one")
            for stream in self._streams.values():
                stream.put(ended)
            self._streams.clear()

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
            call()
            wait = False

    def _begin(self, stream: _Stream) -> None:
        try:
            self._desk.add(stream.job)
        except KvistError as error:
            stream.put(error)
        else:
            self._streams[stream.job.request.id] = stream

    def _tell(self, touched: Sequence[Sample]) -> None:
        """Hand each sample's news to whoever listens."""
        for sample in touched:
            stream = self._streams.get(sample.request_id)
            if stream is None:
                continue
            stream.put(sample.delta())
            if stream.job.finished:
                self._streams.pop(sample.request_id, None)


def _settle(answer: "asyncio.Future[Snapshot]", taken: Snapshot) -> None:
    """Answer, unless who asked has given up."""
    if not answer.done():
        answer.set_result(taken)
