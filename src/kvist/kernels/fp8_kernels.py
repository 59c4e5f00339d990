# mypy: ignore-errors
# ruff: noqa: N803
"""Products with weights in fp8, and activations rounded to it. Launched by linear.py.

Weights are widened in registers, as the left operand of the tensor cores, which alone may come from
there; so a tile of the result lies on its side until it is stored.
"""

import triton.language as tl

from kvist.kernels.jit import kernel
from kvist.kernels.linear_kernels import SILU


@kernel()
def gemm_fp8_kernel(
    x_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    M,
    N: tl.constexpr,
    K: tl.constexpr,
    SPLITS: tl.constexpr,
    BLOCK_M: tl.constexpr,
    BLOCK_N: tl.constexpr,
    BLOCK_K: tl.constexpr,
    EPILOGUE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """A tile of x w^T; grid (rows of x, rows of w, splits). As `gemm_kernel` otherwise."""
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    split = tl.program_id(2)
    PER_SPLIT: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = (N % BLOCK_N == 0) and (K % (SPLITS * BLOCK_K) == 0)
    k = split * PER_SPLIT + tl.arange(0, BLOCK_K)
    w_at = w_ptr + n.to(tl.int64)[:, None] * K + k[None, :]
    x_at = x_ptr + m[None, :] * K + k[:, None]
    in_m = m[None, :] < M
    in_n = n[:, None] < N
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    acc_up = tl.zeros([BLOCK_N, BLOCK_M], tl.float32)
    kind = x_ptr.dtype.element_ty
    for k0 in range(0, PER_SPLIT, BLOCK_K):
        if EVEN:
            w = tl.load(w_at + k0)
            x = tl.load(x_at + k0, mask=in_m, other=0.0)
        else:
            in_k = k0 + k < K
            w = tl.load(w_at + k0, mask=in_n & in_k[None, :], other=0.0)
            x = tl.load(x_at + k0, mask=in_m & in_k[:, None], other=0.0)
        acc = tl.dot(w.to(kind), x, acc, input_precision="ieee")
        if EPILOGUE == SILU:
            if EVEN:
                up = tl.load(w_at + N * K + k0)
            else:
                up = tl.load(w_at + N * K + k0, mask=in_n & in_k[None, :], other=0.0)
            acc_up = tl.dot(up.to(kind), x, acc_up, input_precision="ieee")
    acc *= tl.load(scale_ptr + n, mask=n < N, other=0.0)[:, None]
    if EPILOGUE == SILU:
        acc_up *= tl.load(scale_ptr + N + n, mask=n < N, other=0.0)[:, None]
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    out = out_ptr + (split * M + m[:, None]).to(tl.int64) * N + n[None, :]
    inside = (m[:, None] < M) & (n[None, :] < N)
    tl.store(out, tl.trans(acc).to(out_ptr.dtype.element_ty), mask=inside)


@kernel()
def widen_kernel(values_ptr, scale_ptr, out_ptr, K, BLOCK_K: tl.constexpr):
    """A part of one row of weights, times its scale."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.program_id(1) * BLOCK_K + tl.arange(0, BLOCK_K)
    values = tl.load(values_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    wide = values * tl.load(scale_ptr + row)
    tl.store(out_ptr + row * K + k, wide.to(out_ptr.dtype.element_ty), mask=k < K)


@kernel()
def quantize_kernel(x_ptr, values_ptr, scale_ptr, K, BLOCK_K: tl.constexpr):
    """One row: its largest magnitude becomes 448, the largest of e4m3."""
    row = tl.program_id(0).to(tl.int64)
    k = tl.arange(0, BLOCK_K)
    x = tl.load(x_ptr + row * K + k, mask=k < K, other=0.0).to(tl.float32)
    largest = tl.max(tl.abs(x), 0)
    scale = tl.maximum(tl.div_rn(largest, tl.zeros_like(largest) + 448.0), 1.1754943508222875e-38)
    values = tl.clamp(tl.div_rn(x, tl.zeros_like(x) + scale), -448.0, 448.0)
    tl.store(values_ptr + row * K + k, values.to(tl.float8e4nv), mask=k < K)
    tl.store(scale_ptr + row, scale)
