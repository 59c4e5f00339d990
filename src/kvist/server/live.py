"""The cache as it changes, for any number of pages: one look at the engine a tick, sent as deltas.

Nothing is looked at while nobody listens, all listeners share one look and one encoding, and a tick
waits until looking has taken at most a fiftieth of the time. `page.py` serves the frames; it knows
nothing of how they are made, and this module nothing of HTTP.
"""

import asyncio
import json
import logging
import time
from collections import deque
from collections.abc import AsyncGenerator, Callable, Iterable
from contextlib import suppress
from itertools import islice
from typing import Any

from kvist.async_engine import AsyncLLM
from kvist.core.record import Branch, GroupSnapshot, Look, Mark, SequenceSnapshot, Snapshot
from kvist.errors import EngineDead

INTERVAL = 0.25  # seconds between two frames, at least
SHARE = 0.02  # of the time may be spent on looking
TREE_EVERY = 4  # frames
TREE_NODES = 1500  # of the prefix tree that are shown at most
MARKS = 800  # that a new listener is told of
ROWS = 64  # running and waiting samples that are listed, each
BACKLOG = 16  # frames that a slow listener may lag behind before it starts anew
HEARTBEAT = 15.0  # seconds of silence, after which proxies might hang up

# A block's state as one character, by twice its owners (none, one, several) plus whether it is
# published: free, published, used, used and published, shared, shared and published.
STATES = b"012345"
_BY_OWNERS = bytes(STATES[2 * min(owners, 2)] for owners in range(256))
_BY_CACHED = bytes(STATES[min(cached, 1)] for cached in range(256))


class LiveCache:
    """Watches an engine while somebody listens.

    Args:
        engine: what is watched.
        show_text: whether frames tell what the cached tokens say.
        ended: asked every tick; once it is true all listeners are sent away, for good.
        interval: seconds between two frames, at least.
    """

    def __init__(
        self,
        engine: AsyncLLM,
        *,
        show_text: bool = True,
        ended: Callable[[], bool] = lambda: False,
        interval: float = INTERVAL,
    ) -> None:
        self.looks = 0  # how often the engine was looked at
        self._engine = engine
        self._show_text = show_text
        self._ended = ended
        self._interval = interval
        self._listeners: set[asyncio.Queue[bytes | None]] = set()
        self._task: asyncio.Task[None] | None = None
        self._forget()

    async def frames(self) -> AsyncGenerator[bytes, None]:
        """Server-sent events: first everything there is, then what changes.

        Ends when the engine has.
        """
        queue: asyncio.Queue[bytes | None] = asyncio.Queue(BACKLOG)
        self._listeners.add(queue)
        if self._task is None or self._task.done():
            self._forget()
            self._task = asyncio.create_task(self._watch())
        elif self._snapshot is not None:
            queue.put_nowait(self._whole())
        try:
            while True:
                try:
                    frame = await asyncio.wait_for(queue.get(), HEARTBEAT)
                except TimeoutError:
                    frame = b": nothing new\n\n"
                if frame is None:
                    return
                yield frame
        finally:
            self._listeners.discard(queue)
            if not self._listeners and self._task is not None:
                self._task.cancel()
                self._task = None

    # -- watching ----------------------------------------------------------------------------

    async def _watch(self) -> None:
        ticks = 0
        try:
            while not self._ended():
                look = await self._engine.look(
                    self._serial, 0 if ticks % TREE_EVERY else TREE_NODES
                )
                self.looks += 1
                ticks += 1
                began = time.perf_counter()
                self._tell(look)
                cost = look.seconds + time.perf_counter() - began
                await asyncio.sleep(max(self._interval, cost / SHARE))
        except asyncio.CancelledError:
            return  # nobody listens any more
        except EngineDead:
            pass
        except Exception:  # a defect here must neither hang pages nor touch what the server is for
            logging.getLogger("kvist.server").exception("the live picture broke off")
        for queue in self._listeners:
            _put(queue, None)

    def _tell(self, look: Look) -> None:
        """Send everybody what is new."""
        before = self._snapshot
        # An engine that broke down opens new books, in which steps and marks begin again.
        begun_anew = before is None or look.snapshot.step < before.step
        if begun_anew:
            self._forget()
        frame = self._take_in(look)
        if begun_anew:
            data = self._whole()
        elif frame:
            data = _event("delta", {"v": _values(look.snapshot), **frame})
        else:
            return
        for queue in self._listeners:
            if queue.full():
                _put(queue, self._whole())
            else:
                queue.put_nowait(data)

    def _forget(self) -> None:
        self._snapshot: Snapshot | None = None
        self._serial = 0
        self._marks: deque[Mark] = deque(maxlen=MARKS)
        self._maps: list[tuple[bytes, bytes]] = []
        self._tree: tuple[Branch, ...] = ()
        self._texts: dict[tuple[int, int], str] = {}

    def _take_in(self, look: Look) -> dict[str, Any]:
        """Make this the latest look; returns what is new in it, by the names of `_whole`."""
        before, now = self._snapshot, look.snapshot
        self._snapshot = now
        frame: dict[str, Any] = {}
        if before is None or before.groups != now.groups:
            maps = [(_pool_map(group), _host_map(group)) for group in now.groups]
            if self._maps and maps != self._maps:
                frame["map"] = [
                    [list(_changes(old, new)) for old, new in zip(was, group, strict=True)]
                    for was, group in zip(self._maps, maps, strict=True)
                ]
            self._maps = maps
        if look.marks:
            self._marks.extend(look.marks)
            self._serial = look.marks[-1].serial
            frame["marks"] = list(look.marks)
        if before is None or (before.running, before.waiting) != (now.running, now.waiting):
            frame["rows"] = _rows(now)
        if look.tree is not None and look.tree != self._tree:
            self._tree = look.tree
            frame["tree"] = self._branches()
        return frame

    # -- frames ------------------------------------------------------------------------------

    def _whole(self) -> bytes:
        """Everything that is known, for who knows nothing yet."""
        snapshot = self._snapshot
        assert snapshot is not None
        groups = [
            {"window": g.window, "sinks": g.sinks, "map": pool.decode(), "host": host.decode()}
            for g, (pool, host) in zip(snapshot.groups, self._maps, strict=True)
        ]
        return _event(
            "whole",
            {
                "model": self._engine.model.name,
                "block_size": snapshot.block_size,
                "text": self._show_text,
                "v": _values(snapshot),
                "groups": groups,
                "marks": list(self._marks),
                "rows": _rows(snapshot),
                "tree": self._branches(),
            },
        )

    def _branches(self) -> list[dict[str, Any]]:
        texts = {(b.serial, len(b.tokens)): self._text(b) for b in self._tree}
        self._texts = texts
        return [
            {
                "id": b.serial,
                "from": b.parent,
                "root": b.root,
                "text": texts[b.serial, len(b.tokens)],
                "blocks": b.blocks,
                "saved": "".join("1" if saved else "0" for saved in b.saved),
            }
            for b in self._tree
        ]

    def _text(self, branch: Branch) -> str:
        tokenizer = self._engine.model.tokenizer
        if tokenizer is None or not self._show_text:
            return ""
        known = self._texts.get((branch.serial, len(branch.tokens)))
        return tokenizer.decode(branch.tokens)[:160] if known is None else known


def _put(queue: "asyncio.Queue[bytes | None]", item: bytes | None) -> None:
    """Put it in place of all that is still in the queue."""
    with suppress(asyncio.QueueEmpty):
        while True:
            queue.get_nowait()
    queue.put_nowait(item)


def _event(name: str, data: dict[str, Any]) -> bytes:
    text = json.dumps(data, separators=(",", ":"), ensure_ascii=False)
    return f"event: {name}\ndata: {text}\n\n".encode()


def _pool_map(group: GroupSnapshot) -> bytes:
    owned = bytes([min(n, 2) for n in group.owners] if max(group.owners) > 255 else group.owners)
    # One addition of two long numbers, digit by digit without a carry: a cache may be large.
    states = int.from_bytes(owned.translate(_BY_OWNERS)) + int.from_bytes(bytes(group.cached))
    return states.to_bytes(len(owned))


def _host_map(group: GroupSnapshot) -> bytes:
    return bytes(group.host_cached).translate(_BY_CACHED)


def _changes(old: bytes, new: bytes, stride: int = 256) -> Iterable[tuple[int, str]]:
    """Runs of blocks that changed: the first of them, and the new states."""
    start = 0
    while start < len(new):
        stop = min(start + stride, len(new))
        if old[start:stop] == new[start:stop]:
            start = stop
            continue
        while old[start] == new[start]:
            start += 1
        stop = start
        while stop < len(new) and old[stop] != new[stop]:
            stop += 1
        yield start, new[start:stop].decode()
        start = stop


def _values(snapshot: Snapshot) -> dict[str, Any]:
    """The numbers of the moment."""
    counters = snapshot.counters
    return {
        "now": round(snapshot.now, 4),
        "step": snapshot.step,
        "running": len(snapshot.running),
        "waiting": len(snapshot.waiting),
        "computed": snapshot.computed_tokens,
        "output": snapshot.output_tokens,
        "queried": counters.queried_tokens,
        "hit": counters.device_hit_tokens,
        "host_hit": counters.host_hit_tokens,
        "fork": counters.fork_tokens,
        "evicted": counters.evicted_blocks,
        "preemptions": snapshot.preemptions,
        "prefixes": snapshot.known_prefixes,
    }


def _rows(snapshot: Snapshot) -> dict[str, list[list[Any]]]:
    """The samples that run and wait: id, sample, prompt, output and computed tokens, blocks."""

    def row(one: SequenceSnapshot) -> list[Any]:
        tokens = (one.prompt_tokens, one.output_tokens, one.computed_tokens)
        return [one.request_id, one.sample_index, *tokens, max(one.blocks, default=0)]

    return {
        "running": [row(one) for one in islice(snapshot.running, ROWS)],
        "waiting": [row(one) for one in islice(snapshot.waiting, ROWS)],
    }
