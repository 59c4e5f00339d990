"""The last moments of requests' lives, for whoever draws them: arrived, admitted, computed, ended.

The scheduler adds marks as it decides; it never reads them. Decoding adds none: between its first
token and its end (or a preemption) a sample gets a token a step.
"""

from collections import deque

from kvist.core.protocols import Clock
from kvist.core.record import Mark, MarkKind
from kvist.core.state import SampleState


class Timeline:
    """A bounded log; the oldest marks go first.

    Args:
        clock: seconds, the scheduler's.
        limit: marks that are kept.
    """

    def __init__(self, clock: Clock, limit: int = 2048) -> None:
        self._clock = clock
        self._marks: deque[Mark] = deque(maxlen=limit)
        self._last = 0

    def add(
        self,
        state: SampleState,
        kind: MarkKind,
        start: int = 0,
        stop: int = 0,
        reason: str = "",
    ) -> None:
        """Something happened to a sample, now."""
        self._last += 1
        self._marks.append(
            Mark(
                self._last,
                self._clock(),
                state.request.id,
                state.sequence.sample_index,
                kind,
                start,
                stop,
                reason,
            )
        )

    def since(self, serial: int) -> tuple[Mark, ...]:
        """The marks behind the one of this serial number, as far as they are kept; oldest first."""
        count = min(self._last - serial, len(self._marks))
        return tuple(self._marks[i] for i in range(-count, 0))
