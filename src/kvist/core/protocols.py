"""The engine's contracts: who decides, who keeps the blocks, who runs.

Only signatures. `core.scheduler` and `core.blocks` hold the implementations, `runner/` the real
runner, the tests a null runner that checks every place it would attend to.
"""

from collections.abc import Callable, Sequence
from typing import Protocol

from kvist.core.plan import Event, Plan, StepOutput
from kvist.core.prefix import PrefixKeys, PrefixMatch
from kvist.core.request import Request

Clock = Callable[[], float]
"""Seconds, monotonic; injected so that records are exact in tests."""

Drafter = Callable[[Sequence[int], Sequence[int], int], Sequence[int]]
"""`drafter(prompt_ids, output_ids, limit)` guesses up to `limit` next tokens; each may be wrong."""


class Ticket(Protocol):
    """A step under way."""

    def result(self) -> StepOutput:
        """Wait for the step and return what came of it; may be called once or more."""


class Runner(Protocol):
    """Executes plans in order. It knows slots and blocks, never requests."""

    def execute(self, plan: Plan) -> Ticket:
        """Start a step; it need not have ended when this returns."""


class Scheduler(Protocol):
    """Turns requests into plans and outputs into events; deterministic, sees no tensor."""

    def add(self, request: Request) -> None:
        """Queue a request.

        Raises:
            ContextTooLong: it could never fit, with both numbers.
            RequestError: anything else that is wrong with it.
        """

    def abort(self, request_id: str) -> list[Event]:
        """End a request now, planned or not; unknown or finished ids are ignored."""

    def finish(self, request_id: str, sample_index: int, reason: str = "stop") -> list[Event]:
        """End one sample from outside, as a stop string does; ignored if it has ended."""

    def schedule(self) -> Plan:
        """Decide the next step; at most one earlier plan may still be uncommitted."""

    def commit(self, plan: Plan, output: StepOutput) -> list[Event]:
        """Take in what came of the oldest uncommitted plan."""


class BlockManager(Protocol):
    """Who owns which block of each group. `key` names a sequence as long as it holds blocks."""

    def match(self, keys: PrefixKeys, limit: int) -> PrefixMatch:
        """The longest cached prefix of at most `limit` tokens that all groups can resume from.

        A question: nothing is owned, kept alive or moved by it.
        """

    def open(self, key: int, keys: PrefixKeys, match: PrefixMatch, num_tokens: int) -> bool:
        """Take the matched blocks and room for `num_tokens` in all; all or nothing."""

    def allocate(self, key: int, num_tokens: int) -> bool:
        """Room for `num_tokens` in all, and the right to write behind those it had; or nothing."""

    def publish(self, key: int, num_tokens: int) -> None:
        """The first `num_tokens` are computed: share full blocks, free those behind windows."""

    def fork(self, parent: int, child: int, keys: PrefixKeys, num_tokens: int) -> None:
        """The child shares the parent's first `num_tokens`; it copies when it writes its own."""

    def truncate(self, key: int, num_tokens: int) -> None:
        """Go back to `num_tokens`; raises CacheError where a window no longer allows it."""

    def free(self, key: int) -> None:
        """Give everything back; what is published stays until the room is needed."""

    def check(self) -> None:
        """Raise InvariantError, naming the invariant that does not hold."""
