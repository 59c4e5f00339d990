# mypy: ignore-errors
# ruff: noqa: N803
"""Matrix products of a few rows: bound by the weights' bytes, so all else is fused into their read.

The norm before a product is its prologue, what follows (SwiGLU, the residual sum) its epilogue.
Weights are `[N, K]` as torch keeps them. Launched by linear.py.
"""

import triton.language as tl

from kvist.kernels.jit import kernel

STORE = tl.constexpr(0)  # out = x w^T
ADD = tl.constexpr(1)  # out += x w^T
SILU = tl.constexpr(2)  # out = silu(x gate^T) * (x up^T); w is gate's rows, then up's


@kernel()
def gemv_kernel(
    x_ptr,
    norm_ptr,
    w_ptr,
    scale_ptr,
    out_ptr,
    eps,
    N: tl.constexpr,
    K: tl.constexpr,
    ROWS: tl.constexpr,
    BLOCK_K: tl.constexpr,
    NORM: tl.constexpr,
    SCALED: tl.constexpr,
    EPILOGUE: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row of x, ROWS rows of the weights. With NORM x is RMS-normalised first.

    With SCALED (weights in fp8) a row of the weights is multiplied by its scale.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    k = tl.arange(0, BLOCK_K)
    EVEN: tl.constexpr = (N % ROWS == 0) and (K % BLOCK_K == 0)
    at = w_ptr + rows.to(tl.int64)[:, None] * K + k[None, :]
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
    acc = tl.zeros([ROWS, BLOCK_K], tl.float32)
    acc_up = tl.zeros([ROWS, BLOCK_K], tl.float32)
    squares = tl.zeros([BLOCK_K], tl.float32)
    for k0 in tl.static_range(0, K, BLOCK_K):
        # Weights first: they do not wait for the kernel before.
        if EVEN:
            w = tl.load(at + k0, eviction_policy="evict_first")
            if EPILOGUE == SILU:
                up = tl.load(at + N * K + k0, eviction_policy="evict_first")
        else:
            ok = (rows[:, None] < N) & (k0 + k[None, :] < K)
            w = tl.load(at + k0, mask=ok, other=0.0)
            if EPILOGUE == SILU:
                up = tl.load(at + N * K + k0, mask=ok, other=0.0)
        if DEPENDENT and k0 == 0:
            tl.extra.cuda.gdc_wait()
        inside = k0 + k < K
        x = tl.load(x_ptr + k0 + k, mask=inside, other=0.0).to(tl.float32)
        if NORM:
            squares += x * x
            x = x * tl.load(norm_ptr + k0 + k, mask=inside, other=0.0).to(tl.float32)
        acc += w.to(tl.float32) * x[None, :]
        if EPILOGUE == SILU:
            acc_up += up.to(tl.float32) * x[None, :]
    result = tl.sum(acc, 1)
    up_result = tl.sum(acc_up, 1)
    if SCALED:
        result *= tl.load(scale_ptr + rows, mask=rows < N, other=0.0)
        if EPILOGUE == SILU:
            up_result *= tl.load(scale_ptr + N + rows, mask=rows < N, other=0.0)
    if NORM:
        factor = 1.0 / tl.sqrt(tl.sum(squares, 0) / K + eps)
        result *= factor
        up_result *= factor
    if EPILOGUE == SILU:
        result = result / (1.0 + tl.exp(-result)) * up_result
    if EPILOGUE == ADD:
        result += tl.load(out_ptr + rows, mask=rows < N, other=0.0).to(tl.float32)
    tl.store(out_ptr + rows, result.to(out_ptr.dtype.element_ty), mask=rows < N)


@kernel(do_not_specialize=["M"])
def gemm_kernel(
    x_ptr,
    w_ptr,
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
    """One tile. With SPLITS over one, out is `[SPLITS, M, N]`: parts to be summed."""
    split = tl.program_id(2)
    # Tiles of rows are neighbours, so that weights are read from memory once.
    m = tl.program_id(0) * BLOCK_M + tl.arange(0, BLOCK_M)
    n = tl.program_id(1) * BLOCK_N + tl.arange(0, BLOCK_N)
    PER_SPLIT: tl.constexpr = (K + SPLITS * BLOCK_K - 1) // (SPLITS * BLOCK_K) * BLOCK_K
    EVEN: tl.constexpr = (N % BLOCK_N == 0) and (K % (SPLITS * BLOCK_K) == 0)
    k = split * PER_SPLIT + tl.arange(0, BLOCK_K)
    w_at = w_ptr + n.to(tl.int64)[None, :] * K + k[:, None]
    x_at = x_ptr + m[:, None] * K + k[None, :]
    in_m = m[:, None] < M
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    acc = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    acc_up = tl.zeros([BLOCK_M, BLOCK_N], tl.float32)
    for k0 in range(0, PER_SPLIT, BLOCK_K):
        if EVEN:
            w = tl.load(w_at + k0)
            x = tl.load(x_at + k0, mask=in_m, other=0.0)
        else:
            in_k = k0 + k < K
            w = tl.load(w_at + k0, mask=in_k[:, None] & (n[None, :] < N), other=0.0)
            x = tl.load(x_at + k0, mask=in_m & in_k[None, :], other=0.0)
        acc = tl.dot(x, w, acc, input_precision="ieee")
        if EPILOGUE == SILU:
            if EVEN:
                up = tl.load(w_at + N * K + k0)
            else:
                ok = in_k[:, None] & (n[None, :] < N)
                up = tl.load(w_at + N * K + k0, mask=ok, other=0.0)
            acc_up = tl.dot(x, up, acc_up, input_precision="ieee")
    if EPILOGUE == SILU:
        acc = acc / (1.0 + tl.exp(-acc)) * acc_up
    out = out_ptr + (split * M + m)[:, None] * N + n[None, :]
    tl.store(out, acc.to(out_ptr.dtype.element_ty), mask=in_m & (n[None, :] < N))
