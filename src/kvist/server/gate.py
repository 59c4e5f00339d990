"""How much is let in: a bounded queue, limits per key, and nothing any more once the server drains.

Plain counting on the event loop. What is refused here has cost nothing; what is let in holds its
place until it has ended, however it ends.
"""

import asyncio
import math
import time
from collections import Counter
from collections.abc import Iterator
from contextlib import contextmanager

from kvist.server.errors import ApiError
from kvist.server.settings import Settings
from kvist.server.tenants import Tenant


class Gate:
    """Counts requests in flight."""

    def __init__(self, settings: Settings) -> None:
        """Everything is empty and open."""
        self._capacity = settings.max_num_seqs + settings.max_queue
        self._slots = settings.max_num_seqs
        self._max_requests = settings.max_requests_per_key
        self._max_tokens = settings.max_tokens_per_key
        self._requests: Counter[str] = Counter()
        self._tokens: Counter[str] = Counter()
        self._usual = 1.0  # seconds of a request, forgetting slowly
        self.samples = 0
        self.draining = asyncio.Event()

    @contextmanager
    def admit(self, tenant: Tenant, samples: int, tokens: int) -> Iterator[None]:
        """Hold a place while the block runs.

        Args:
            tenant: whose limits count.
            samples: outputs that were asked for, each a sequence of the engine's.
            tokens: of prompts, and the most that may be given.

        Raises:
            ApiError: 429 with Retry-After, or 503 while draining.
        """
        self.check(samples)
        name = tenant.name
        self._within(self._max_requests, self._requests[name], 1, "requests")
        self._within(self._max_tokens, self._tokens[name], tokens, "tokens")
        self.samples += samples
        self._requests[name] += 1
        self._tokens[name] += tokens
        began = time.perf_counter()
        try:
            yield
        finally:
            self.samples -= samples
            self._requests[name] -= 1
            self._tokens[name] -= tokens
            self._usual += 0.1 * (time.perf_counter() - began - self._usual)

    def check(self, samples: int = 1) -> None:
        """Whether so many outputs would be let in: asked before a prompt is worked at.

        Raises:
            ApiError: as `admit`.
        """
        if self.draining.is_set():
            raise closing()
        if self.samples + samples > self._capacity and self.samples:
            wait = self._wait()
            raise ApiError(
                429,
                f"{self.samples} outputs are running or waiting, and the server takes "
                f"{self._capacity}; try again in {wait} s",
                code="server_overloaded",
                headers={"Retry-After": str(wait)},
            )

    def _within(self, limit: int | None, now: int, more: int, what: str) -> None:
        if limit is None or now + more <= limit:
            return
        if more > limit:
            raise ApiError(
                400, f"the request needs {more} {what}, and a key may have {limit} in flight"
            )
        raise ApiError(
            429,
            f"this key has {now} {what} in flight, and may have {limit}",
            code="key_limit",
            headers={"Retry-After": str(self._wait())},
        )

    def _wait(self) -> int:
        """Seconds until a place is likely to be free: whole turns of all slots."""
        turns = max(1.0, (self.samples - self._slots) / self._slots)
        return max(1, min(60, math.ceil(turns * self._usual)))


def closing() -> ApiError:
    """What is said to those who come while the server drains."""
    return ApiError(
        503,
        "the server is about to stop and takes no more requests",
        code="draining",
        headers={"Retry-After": "5", "Connection": "close"},
    )
