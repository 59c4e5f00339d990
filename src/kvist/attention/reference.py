"""Eager attention with a float32 softmax: the definition that every other kernel is tested against.

Reads any view through `kv.sequence`, so that every combination of layout, codec and retention is
right on a CPU from its first day. Not fast, and not meant to be.
"""

import torch
from torch import Tensor

from kvist.attention.mask import sequence_mask
from kvist.cache.protocol import KV


def reference_attention(q: Tensor, kv: KV, scale: float) -> Tensor:
    """Softmax(q k^T scale + mask) v, sequence by sequence; shapes as in `attend`."""
    out = torch.empty_like(q)
    for index, (start, end) in enumerate(kv.batch.query_spans):
        if start == end:
            continue
        keys, values, key_positions = kv.sequence(index)
        # [kv_heads, group * L, head_dim]: the query heads of a group share their keys.
        kv_heads = keys.shape[1]
        queries = q[start:end].unflatten(1, (kv_heads, -1)).permute(1, 2, 0, 3)  # [H, G, L, D]
        scores = queries @ keys.permute(1, 2, 0)[:, None] * scale  # [H, G, L, T]
        mask = sequence_mask(kv, index, keys.shape[0], key_positions)
        if mask is not None:
            scores = scores.masked_fill(~(mask if mask.dim() == 2 else mask[:, None]), -torch.inf)
        weights = torch.softmax(scores, dim=-1, dtype=torch.float32).to(q.dtype)
        mixed = weights @ values.transpose(0, 1)[:, None]
        out[start:end] = mixed.permute(2, 0, 1, 3).flatten(1, 2)
    return out
