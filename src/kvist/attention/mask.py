"""Who sees whom: the one rule that every kernel follows, as a mask for those that take one."""

import torch
from torch import Tensor

from kvist.cache.protocol import KV
from kvist.core.spec import AttentionSpec


def visible(query_positions: Tensor, key_positions: Tensor, spec: AttentionSpec) -> Tensor:
    """Which queries see which keys.

    `0 <= key_pos <= query_pos and (key_pos > query_pos - window or key_pos < sinks)`: ring order,
    padding, freed and evicted places need no other rule.

    Args:
        query_positions: `[L]`.
        key_positions: `[T]` or `[kv_heads, T]`, -1 = absent.
        spec: window and sinks.

    Returns:
        bool `[L, T]` or `[kv_heads, L, T]`.
    """
    queries, keys = query_positions[:, None], key_positions[..., None, :]
    seen = (keys >= 0) & (keys <= queries)
    if spec.window is not None:
        near = keys > queries - spec.window
        seen &= near | (keys < spec.sinks) if spec.sinks else near
    return seen


def sequence_mask(kv: KV, index: int, length: int, key_positions: Tensor | None) -> Tensor | None:
    """`visible` for one sequence of a view, or None where every query sees every key.

    Layers of equal spec share it through `kv.memo`.
    """
    batch, spec = kv.batch, kv.spec
    start, end = batch.query_spans[index]
    if key_positions is None:
        if end - start == 1 and (spec.window is None or length <= spec.window):
            return None
        key = ("mask", spec, index)
        if key not in kv.memo:
            places = torch.arange(length, device=batch.positions.device)
            kv.memo[key] = visible(batch.positions[start:end], places, spec)
        return kv.memo[key]  # type: ignore[no-any-return]
    return visible(batch.positions[start:end], key_positions, spec)
