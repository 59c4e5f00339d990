"""Norms, rotary with cache write, and SwiGLU, each in one launch. Imports Triton."""

import torch
import triton
from torch import Tensor

from kvist.kernels.elementwise_kernels import norm_kernel, rotary_kernel, silu_mul_kernel


def dependent_launch(dependent: bool) -> dict[str, bool]:
    """Launch options of a kernel that may start before the one before it has ended."""
    return {"launch_pdl": True} if dependent else {}


def rms_norm(
    x: Tensor,
    weight: Tensor,
    eps: float,
    out: Tensor,
    delta: Tensor | None = None,
    *,
    dependent: bool = False,
) -> None:
    """RMSNorm of the residual stream, after what the last product adds to it.

    Args:
        x: `[rows, size]`, contiguous; with `delta` it is written back.
        weight: `[size]`.
        eps: added to the mean square.
        out: `[rows, size]`.
        delta: `[rows, size]`, or `[parts, rows, size]` to be added up in that order.
        dependent: programmatic dependent launch.
    """
    rows, size = x.shape
    block = triton.next_power_of_2(size)
    norm_kernel[(rows,)](
        x,
        x if delta is None else delta,
        weight,
        out,
        size,
        rows,
        eps,
        PARTS=0 if delta is None else delta.numel() // x.numel(),
        BLOCK=block,
        DEPENDENT=dependent,
        num_warps=min(8, max(1, block // 512)),
        **dependent_launch(dependent),
    )


def rotate_and_write(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    q: Tensor,
    keys: Tensor,
    values: Tensor,
    places: Tensor | None,
    *,
    dependent: bool = False,
) -> None:
    """Normalise q and k per head, rotate them, and write k and v to where they are kept.

    Args:
        qkv: `[N, (heads + 2 kv_heads) * head_dim]`, contiguous: q, k, v one behind the other.
        norms: weights of q's and k's RMSNorm, each `[head_dim]`.
        eps: of those norms.
        rotation: cos and sin, each `[N, head_dim / 2]` float32.
        q: `[N, heads, head_dim]`, written.
        keys: `[places, kv_heads, head_dim]`, a plane, or `[N, kv_heads, head_dim]`; written.
        values: likewise.
        places: `[N]` int64, where in the planes; None writes row by row.
        dependent: programmatic dependent launch.
    """
    num_tokens, heads, head_dim = q.shape
    kv_heads = keys.shape[1]
    q_norm, k_norm = norms or (qkv, qkv)
    rotary_kernel[(heads + 2 * kv_heads, num_tokens)](
        qkv,
        q_norm,
        k_norm,
        *rotation,
        qkv if places is None else places,
        q,
        keys,
        values,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        NORM=norms is not None,
        PLACED=places is not None,
        DEPENDENT=dependent,
        num_warps=1,
        **dependent_launch(dependent),
    )


def silu_mul(x: Tensor) -> Tensor:
    """`[N, 2 * size]`, gates first -> silu(gate) * up `[N, size]`."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    silu_mul_kernel[(triton.cdiv(size, 1024), rows)](x, out, size, BLOCK=1024, num_warps=4)
    return out
