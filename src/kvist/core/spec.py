"""What a layer's cache must hold, in plain numbers: known from a configuration alone.

Layers with equal specs form a group. The scheduler, the caches and the planner all read these;
nothing here knows a tensor.
"""

from dataclasses import dataclass


@dataclass(frozen=True)
class AttentionSpec:
    """One attention layer's cache.

    Args:
        num_kv_heads: key/value heads (grouped-query attention has fewer than query heads).
        head_dim: channels of a head.
        window: a query sees keys at `key_pos > query_pos - window`; None sees all.
        sinks: the first positions that stay visible behind the window.
    """

    num_kv_heads: int
    head_dim: int
    window: int | None = None
    sinks: int = 0


@dataclass(frozen=True)
class StateSpec:
    """One recurrent layer's state for a sequence: fixed shapes, no matter how long it is."""

    shapes: tuple[tuple[int, ...], ...]
    dtype: str


LayerSpec = AttentionSpec | StateSpec
