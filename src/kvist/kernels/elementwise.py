"""Norms, rotary with cache write, and SwiGLU, each in one launch. Imports Triton."""

from dataclasses import dataclass
from math import gcd

import torch
from torch import Tensor

from kvist.kernels.elementwise_kernels import norm_kernel, rotary_kernel, silu_mul_kernel
from kvist.kernels.jit import cdiv, dependent_launch, next_power_of_2

FEW, MANY = 32, 512  # tokens
SILU = 2048  # channels of a program
INT8 = 2  # a number format of `encode_kernels`


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
    block = next_power_of_2(size)
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


@dataclass(frozen=True)
class Target:
    """Where one side of a layer is written.

    Args:
        values: `[places, kv_heads, ...]`, in the format of `kind`.
        kind: a number format of `encode_kernels`.
        scales: of the formats that have them, `[places, kv_heads, ...]` float16.
        zeros: INT4's, like the scales.
    """

    values: Tensor
    kind: int = 0
    scales: Tensor | None = None
    zeros: Tensor | None = None

    @property
    def pointers(self) -> tuple[Tensor, Tensor, Tensor]:
        """As the kernel takes them; what a format lacks is never looked at."""
        values = self.values
        return (
            values,
            values if self.scales is None else self.scales,
            values if self.zeros is None else self.zeros,
        )


def _heads_at_a_time(num_tokens: int, most: int, kind: int) -> tuple[int, int]:
    """How many heads of a token a program takes, and by how many warps.

    Few tokens are spread over as many programs as there are; for many, starting programs costs more
    than their work. What rotates before it rounds exchanges numbers all the time, within a warp at
    the least cost.
    """
    if num_tokens <= FEW:
        return 1, 1
    return (gcd(most, 2), 1) if kind >= INT8 and num_tokens <= MANY else (most, 4)


def rotate_and_write(
    qkv: Tensor,
    norms: tuple[Tensor, Tensor] | None,
    eps: float,
    rotation: tuple[Tensor, Tensor],
    q: Tensor,
    keys: Target,
    values: Target,
    places: Tensor | None,
    *,
    mean: Tensor | None = None,
    dependent: bool = False,
) -> None:
    """Normalise q and k per head, rotate them, and write k and v to where they are kept.

    Args:
        qkv: `[N, (heads + 2 kv_heads) * head_dim]`, contiguous: q, k, v one behind the other.
        norms: weights of q's and k's RMSNorm, each `[head_dim]`.
        eps: of those norms.
        rotation: cos and sin, each `[N, head_dim / 2]` float32.
        q: `[N, heads, head_dim]`, written; in the Hadamard basis where keys are in integers.
        keys: planes, or with PLAIN any `[N, kv_heads, head_dim]`; written.
        values: likewise.
        places: `[N]` int64, where in the planes; None writes row by row.
        mean: `[kv_heads, head_dim]` float32, taken away from keys before they are encoded.
        dependent: programmatic dependent launch.
    """
    num_tokens, heads, head_dim = q.shape
    kv_heads = keys.values.shape[1]
    q_norm, k_norm = norms or (qkv, qkv)
    rows, warps = _heads_at_a_time(num_tokens, gcd(heads, kv_heads, 8), max(keys.kind, values.kind))
    rotary_kernel[((heads + 2 * kv_heads) // rows, num_tokens)](
        qkv,
        q_norm,
        k_norm,
        *rotation,
        qkv if places is None else places,
        q,
        *keys.pointers,
        qkv if mean is None else mean,
        *values.pointers,
        eps,
        HEADS=heads,
        KV_HEADS=kv_heads,
        HEAD_DIM=head_dim,
        DOUBLINGS=head_dim.bit_length() - 1,
        NORM=norms is not None,
        PLACED=places is not None,
        CENTRED=mean is not None,
        K_KIND=keys.kind,
        V_KIND=values.kind,
        ROWS=rows,
        DEPENDENT=dependent,
        num_warps=warps,
        **dependent_launch(dependent),
    )


def silu_mul(x: Tensor) -> Tensor:
    """`[N, 2 * size]`, gates first -> silu(gate) * up `[N, size]`."""
    rows, size = x.shape[0], x.shape[1] // 2
    out = torch.empty(rows, size, dtype=x.dtype, device=x.device)
    silu_mul_kernel[(cdiv(size, SILU), rows)](x, out, size, BLOCK=SILU, num_warps=4)
    return out
