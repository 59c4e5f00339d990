"""Attention through torch's scaled_dot_product_attention.

Decode packs the query heads of a group as if they were queries, so keys are read once for a whole
group; a uniform batch is one call, a ragged one goes sequence by sequence and so never reads
padding. Prefill goes sequence by sequence and is causal without a mask where the prompt is new.
"""

import torch
from torch import Tensor
from torch.nn.functional import scaled_dot_product_attention as sdpa

from kvist.attention.mask import sequence_mask
from kvist.cache.protocol import KV


def sdpa_attention(q: Tensor, kv: KV, scale: float) -> Tensor:
    """Shapes as in `attend`."""
    batch = kv.batch
    window = kv.spec.window
    sees_all = kv.in_order and (window is None or max(batch.kv_lens) <= window)
    if kv.dense_is_view and batch.uniform and batch.query_lens[0] == 1 and sees_all:
        keys, values, _ = kv.dense()
        return _decode(q, keys.transpose(1, 2), values.transpose(1, 2), None, scale)
    out = torch.empty_like(q)
    for index, (start, end) in enumerate(batch.query_spans):
        if start == end:
            continue
        keys, values, key_positions = kv.sequence(index)
        # [1, kv_heads, T, head_dim]
        keys, values = keys.transpose(0, 1)[None], values.transpose(0, 1)[None]
        rows, total = q[start:end], keys.shape[2]
        if end - start == 1:
            mask = sequence_mask(kv, index, total, key_positions)
            out[start:end] = _decode(rows, keys, values, mask, scale)
        else:
            fresh = key_positions is None and end - start == total
            causal = fresh and sees_all
            mask = None if causal else sequence_mask(kv, index, total, key_positions)
            mixed = sdpa(
                rows.transpose(0, 1)[None],
                keys,
                values,
                attn_mask=_per_query_head(mask, rows.shape[1]),
                is_causal=causal,
                scale=scale,
                enable_gqa=rows.shape[1] != keys.shape[1],
            )
            out[start:end] = mixed[0].transpose(0, 1)
    return out


def _decode(q: Tensor, keys: Tensor, values: Tensor, mask: Tensor | None, scale: float) -> Tensor:
    """One query for each sequence: `q [B, heads, D]`, keys and values `[B, kv_heads, T, D]`."""
    grouped = q.unflatten(1, (keys.shape[1], -1))  # [B, kv_heads, group, D]
    return sdpa(grouped, keys, values, attn_mask=mask, scale=scale).flatten(1, 2)


def _per_query_head(mask: Tensor | None, heads: int) -> Tensor | None:
    """A mask by kv_heads `[kv_heads, L, T]` repeated for the query heads of each group."""
    if mask is None or mask.dim() == 2:
        return mask
    return mask.repeat_interleave(heads // mask.shape[0], dim=0)
