"""Attention whose every sum has the same order, however the step was cut and batched.

Queries stand in tiles of fixed size at the place that their position gives them, keys in spans of
fixed size that begin at fixed positions, and spans are combined in order with a running softmax
(Milakov & Gimelshein, 2018). A query's result then depends on nothing but its own row, its keys and
shapes that never change: the same bits alone or in a batch, in one chunk or many, in any layout.
Slower than it could be, and asked for by name: `runner.deterministic` runs a whole step this way.
"""

import torch
from torch import Tensor

from kvist.attention.mask import visible
from kvist.cache.protocol import KV

QUERIES = 16
"""Queries of a tile."""

KEYS = 128
"""Keys of a span."""


def fixed_attention(q: Tensor, kv: KV, scale: float) -> Tensor:
    """Shapes as in `attend`; float32 on the way."""
    out = torch.empty_like(q)
    for index, (start, end) in enumerate(kv.batch.query_spans):
        if start == end:
            continue
        keys, values, places = _by_position(*kv.sequence(index))
        first = kv.batch.kv_lens[index] - (end - start)
        for low in range(first - first % QUERIES, first + end - start, QUERIES):
            # The tile's rows are positions low, low + 1, ...; those of this step are filled.
            rows = slice(max(low, first) - low, min(low + QUERIES, first + end - start) - low)
            here = slice(start + low + rows.start - first, start + low + rows.stop - first)
            tile = q.new_zeros(QUERIES, *q.shape[1:], dtype=torch.float32)
            tile[rows] = q[here]
            positions = torch.arange(low, low + QUERIES, device=q.device)
            mask = visible(positions, places, kv.spec)
            out[here] = _tile(tile * scale, keys, values, mask)[rows].to(q.dtype)
    return out


def _by_position(
    keys: Tensor, values: Tensor, positions: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Keys and values `[kv_heads, T, head_dim]`, number i at position i, T whole spans, zero where
    nothing is; and the positions `[T]` or `[kv_heads, T]`, -1 = absent.
    """
    count, heads, head_dim = keys.shape
    last = count if positions is None else int(positions.max()) + 1
    total = max(-(-last // KEYS), 1) * KEYS
    ordered = [x.new_zeros(heads, total, head_dim, dtype=torch.float32) for x in (keys, values)]
    if positions is None:
        positions = torch.arange(count, device=keys.device)
    of_head = positions.expand(heads, count)  # [kv_heads, count]
    head, token = (of_head >= 0).nonzero(as_tuple=True)
    place = of_head[head, token]
    for there, x in zip(ordered, (keys, values), strict=True):
        there[head, place] = x[token, head].float()
    places = positions.new_full((heads, total), -1)
    places[head, place] = place
    return ordered[0], ordered[1], places if positions.dim() == 2 else places[0]


def _tile(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor) -> Tensor:
    """`q [QUERIES, heads, D]` over all spans that any of its queries sees -> the same shape.

    A span that a query does not see changes nothing of it, not even in the last bit, so it does not
    matter which spans the other queries of a tile bring with them.
    """
    heads = keys.shape[0]
    grouped = q.unflatten(1, (heads, -1)).permute(1, 2, 0, 3)  # [H, G, Q, D]
    rows = grouped.flatten(1, 2)  # [H, G * Q, D]
    best = rows.new_full((*rows.shape[:2], 1), -torch.inf)
    total, mixed = torch.zeros_like(best), torch.zeros_like(rows)
    seen = mask if mask.dim() == 3 else mask[None]
    for low in range(0, keys.shape[1], KEYS):
        span = slice(low, low + KEYS)
        here = seen[:, :, span]
        if not here.any():
            continue
        scores = rows @ keys[:, span].transpose(1, 2)  # [H, G * Q, KEYS]
        hidden = ~here[:, None].expand(heads, grouped.shape[1], *here.shape[1:]).flatten(1, 2)
        scores = scores.masked_fill(hidden, -torch.inf)
        higher = torch.maximum(best, scores.amax(-1, keepdim=True))
        finite = higher.masked_fill(higher == -torch.inf, 0.0)
        weights, kept = torch.exp(scores - finite), torch.exp(best - finite)
        total = total * kept + weights.sum(-1, keepdim=True)
        mixed = mixed * kept + weights @ values[:, span]
        best = higher
    whole = mixed / total.masked_fill(total == 0, 1.0)
    out: Tensor = whole.unflatten(1, grouped.shape[1:3]).permute(2, 0, 1, 3).flatten(1, 2)
    return out
