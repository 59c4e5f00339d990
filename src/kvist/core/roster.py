"""Who waits, who runs, and in which runner slot; what of that the next plan has to say.

Books only: the scheduler decides who goes where. Both lists are ordered by rank, so that the first
is served first and the last gives way first.
"""

from bisect import bisect_left, insort
from heapq import heappop, heappush
from operator import attrgetter

from kvist.core.plan import Admission
from kvist.core.state import SampleState

_by_rank = attrgetter("rank")


class Roster:
    """Samples whose turn has come: each is in `waiting`, or in `running` with a slot."""

    def __init__(self, max_num_seqs: int) -> None:
        self.waiting: list[SampleState] = []
        self.running: list[SampleState] = []
        self.slots: dict[int, int] = {}  # key -> slot
        self._free = list(range(max_num_seqs))  # a heap: the lowest slot is given first
        self._admitted: list[Admission] = []
        self._released: list[int] = []

    @property
    def has_free_slot(self) -> bool:
        """Whether one more could run."""
        return bool(self._free)

    def enqueue(self, state: SampleState) -> None:
        """Its turn has come: it waits behind those of better rank."""
        state.queued = True
        insort(self.waiting, state, key=_by_rank)

    def leave_queue(self, state: SampleState) -> None:
        """It waits no longer."""
        del self.waiting[bisect_left(self.waiting, state.rank, key=_by_rank)]

    def take_slot(self, state: SampleState) -> None:
        """From the queue to a free slot; the next plan admits it."""
        self.leave_queue(state)
        insort(self.running, state, key=_by_rank)
        state.slot = self.slots[state.key] = heappop(self._free)
        sequence = state.sequence
        self._admitted.append(
            Admission(
                slot=state.slot,
                request_id=state.request.id,
                sample_index=sequence.sample_index,
                params=sequence.params,
                prompt_ids=sequence.prompt_ids,
                output_ids=tuple(sequence.output_ids),
                ending_ids=tuple(sorted(sequence.ending_ids)),
            )
        )

    def leave_slot(self, state: SampleState) -> None:
        """Its slot is free for the next; the next plan releases it."""
        del self.running[bisect_left(self.running, state.rank, key=_by_rank)]
        slot = self.slots.pop(state.key)
        heappush(self._free, slot)
        self._released.append(slot)
        state.slot = None
        state.epoch += 1

    def collect(self) -> tuple[tuple[int, ...], tuple[Admission, ...]]:
        """Slots released and sequences admitted since the last plan."""
        changes = tuple(self._released), tuple(self._admitted)
        self._released.clear()
        self._admitted.clear()
        return changes
