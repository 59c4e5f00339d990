"""Which positions a layer still needs: all of them, or a sliding window with sinks.

A policy is a function from a layer's spec to the spec that the cache and the mask then follow, so
that what is kept and what is visible cannot disagree. Scored eviction will add policies that look
at queries (`KV.observe`). Standard library only; layouts, block manager and planner read it.
"""

from dataclasses import dataclass, replace
from typing import Protocol

from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError


class Retention(Protocol):
    """Decides which positions stay."""

    name: str

    def apply(self, spec: AttentionSpec) -> AttentionSpec:
        """The spec that a layer gets under this policy."""


@dataclass(frozen=True)
class KeepAll:
    """Every position that the model itself looks at stays; output is the model's own."""

    name = "all"

    def apply(self, spec: AttentionSpec) -> AttentionSpec:
        """The model's spec, untouched."""
        return spec


@dataclass(frozen=True)
class SlidingWindow:
    """The last `window` positions and the first `sinks` stay, in every layer (StreamingLLM, 2023).

    Layers that already slide keep the shorter window. This evicts: what is longer than the window
    is no longer seen, and output may differ from the model's own.
    """

    window: int
    sinks: int = 0

    name = "sliding"

    def __post_init__(self) -> None:
        """Refuse windows that hold nothing."""
        if self.window < 1 or self.sinks < 0:
            raise CacheError(
                f"a sliding window needs window >= 1 and sinks >= 0, not window={self.window}, "
                f"sinks={self.sinks}"
            )

    def apply(self, spec: AttentionSpec) -> AttentionSpec:
        """The spec with this window, or the model's own where that is shorter."""
        if spec.window is not None and spec.window <= self.window:
            return spec
        return replace(spec, window=self.window, sinks=self.sinks)


def first_needed(spec: AttentionSpec, next_position: int) -> int:
    """The first position, sinks apart, that the query at `next_position` or a later one sees.

    Everything in `[spec.sinks, first_needed)` can be given back.
    """
    if spec.window is None:
        return 0
    return max(0, next_position - spec.window + 1)
