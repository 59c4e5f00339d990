"""A sequence: one sample's tokens so far, prompt and output, and the rule by which it ends.

Both the readable `generate()` loop and the scheduler append tokens here, so that "when does it
stop" has one answer. It knows token ids only: stop strings belong to the text side, which ends a
sequence from outside.
"""

from collections.abc import Iterable
from typing import Literal

from kvist.core.params import ResolvedParams
from kvist.core.rng import Purpose, sample_key, uniform_at

FinishReason = Literal["stop", "length"]
"""How a sequence ends by itself: a token that ends it, or its limit of new tokens."""

_NOTHING: frozenset[int] = frozenset()


class Sequence:
    """One sample of one request.

    Args:
        prompt_ids: the prompt's token ids; kept as a tuple.
        params: its sampling parameters, resolved.
        eos_token_ids: the model's end-of-sequence ids.
        sample_index: which of the request's n samples this is; part of every random draw.
    """

    __slots__ = ("_ending_ids", "_key", "output_ids", "params", "prompt_ids", "sample_index")

    def __init__(
        self,
        prompt_ids: Iterable[int],
        params: ResolvedParams,
        eos_token_ids: frozenset[int] = _NOTHING,
        sample_index: int = 0,
    ) -> None:
        self.prompt_ids = tuple(prompt_ids)
        self.output_ids: list[int] = []
        self.params = params
        self.sample_index = sample_index
        self._key = sample_key(params.seed, sample_index)
        stops = frozenset(params.stop_token_ids)
        self._ending_ids = stops if params.ignore_eos else stops | eos_token_ids

    @property
    def num_tokens(self) -> int:
        """Tokens so far, prompt and output."""
        return len(self.prompt_ids) + len(self.output_ids)

    def append(self, token_id: int) -> FinishReason | None:
        """Add one output token; return why the sequence ends with it, or None if it goes on.

        The ending token itself is kept in `output_ids`. "stop" wins where both reasons hold.
        """
        self.output_ids.append(token_id)
        count = len(self.output_ids)
        if token_id in self._ending_ids and count > self.params.min_tokens:
            return "stop"
        return "length" if count >= self.params.max_tokens else None

    @property
    def ending_ids(self) -> frozenset[int]:
        """Ids that end the sequence: its stop tokens, and the model's unless it ignores them."""
        return self._ending_ids

    def banned_ids(self) -> frozenset[int]:
        """Ids that must not be sampled next: those that would end it before `min_tokens`."""
        return self._ending_ids if len(self.output_ids) < self.params.min_tokens else _NOTHING

    def uniform(self, purpose: Purpose = Purpose.SAMPLE, ahead: int = 0) -> float:
        """The draw in [0, 1) for the next output position; the same alone or in any batch.

        `ahead` > 0 asks for a later position: tokens that are sampled but not read yet, or drafted.
        """
        return uniform_at(self._key, len(self.output_ids) + ahead, purpose)
