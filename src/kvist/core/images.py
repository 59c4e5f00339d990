"""Which images the runner has encoded, and which it may encode in this step.

Books only: the runner keeps the embeddings, told by the plan what to encode and what to drop. An
image is encoded once for all requests that carry its digest; it stays while a sequence still has
placeholders of it to compute, and after that until its room is needed. The scheduler calls.
"""

from collections import OrderedDict
from collections.abc import Sequence

from kvist.core.plan import ImageEncode
from kvist.core.request import ImageSpan

Holder = tuple[int, int]
"""A sequence's key and the start of the span in its prompt."""


class EncoderCache:
    """Encoded images by digest, least recently used first.

    Args:
        step_budget: image tokens encoded in one step at most.
        capacity: image tokens kept at most; at least `step_budget`.
    """

    def __init__(self, step_budget: int, capacity: int) -> None:
        self.step_budget = step_budget
        self.capacity = capacity
        self._lengths: OrderedDict[str, int] = OrderedDict()
        self._holders: dict[str, set[Holder]] = {}
        self._left = 0
        self._encodes: list[ImageEncode] = []
        self._dropped: list[str] = []

    def begin_step(self) -> None:
        """Renew the budget."""
        self._left = self.step_budget

    def claim(self, key: int, spans: Sequence[ImageSpan], start: int, stop: int) -> int:
        """Make the images under positions `[start, stop)` ready; return how far they are.

        Where an image cannot be encoded in this step the chunk has to end before it: the result is
        then that image's start (or `start`, if it is under the first token).
        """
        for span in spans:
            if span.stop <= start or span.start >= stop:
                continue
            if span.digest in self._lengths:
                self._lengths.move_to_end(span.digest)
            elif not self._encode(span):
                return max(start, span.start)
            self._holders.setdefault(span.digest, set()).add((key, span.start))
        return stop

    def release(self, key: int, spans: Sequence[ImageSpan], upto: int) -> None:
        """The sequence needs no image any more that ends at or before position `upto`."""
        for span in spans:
            holders = self._holders.get(span.digest)
            if span.stop <= upto and holders is not None:
                holders.discard((key, span.start))
                if not holders:
                    del self._holders[span.digest]

    def collect(self) -> tuple[tuple[ImageEncode, ...], tuple[str, ...]]:
        """What the runner has to encode, and what to drop before that."""
        result = tuple(self._encodes), tuple(self._dropped)
        self._encodes.clear()
        self._dropped.clear()
        return result

    def _encode(self, span: ImageSpan) -> bool:
        # Drop the images that nobody holds, oldest first, until this one has room.
        used = sum(self._lengths.values())
        idle = [digest for digest in self._lengths if digest not in self._holders]
        spare = self.capacity - used + sum(self._lengths[digest] for digest in idle)
        if span.length > self._left or span.length > spare:
            return False
        for digest in idle:
            if used + span.length <= self.capacity:
                break
            used -= self._lengths.pop(digest)
            kept = [encode for encode in self._encodes if encode.digest != digest]
            if len(kept) == len(self._encodes):
                self._dropped.append(digest)
            self._encodes = kept  # what this step's plan does not encode need not be dropped
        self._lengths[span.digest] = span.length
        self._encodes.append(ImageEncode(span.digest, span.pixels, span.length))
        self._left -= span.length
        return True
