"""Tile sizes of a decode step's products, by the shape of their weights; measured on an H200.

Where a shape was not measured, its size decides. Imports Triton.
"""

from kvist.kernels.fp8 import Fp8Weight, Weight
from kvist.kernels.linear import MOST_ROWS, SMALL, GemmTuning, GemvTuning


def gemv_tuning(w: Weight, *, matrices: int = 1) -> GemvTuning:
    """For one row and weights `[n, k]`, or several such matrices in one (gate and up)."""
    n, k = w.shape[0] // matrices, w.shape[1]
    if isinstance(w, Fp8Weight):  # instructions count, too: more rows share what is read of x
        if k >= 8192:
            return GemvTuning(rows=4, block_k=1024, warps=2)
        return GemvTuning(rows=16, block_k=512) if k >= 4096 else GemvTuning(rows=4, block_k=1024)
    if n > 65536 or k >= 8192:
        return GemvTuning(rows=4, block_k=1024, warps=2)
    if k >= 4096:
        return GemvTuning(rows=2, block_k=2048, warps=4)
    if 1024 < k <= 2048:
        return GemvTuning(rows=4, block_k=2048, warps=8)
    return GemvTuning(rows=2, block_k=1024, warps=4)


def gemm_tuning(w: Weight, rows: int, *, residual: bool) -> GemmTuning:
    """For so many rows, at most `most_rows`, and weights `[n, k]`.

    What goes to the residual stream is few columns wide: programs share its K dimension, and the
    next norm adds up their parts.
    """
    n, _ = w.shape
    if isinstance(w, Fp8Weight):
        return _fp8_tuning(n, rows, residual=residual)
    if w.numel() > SMALL and rows > 32:
        return _large_tuning(rows, residual=residual)
    if rows > MOST_ROWS:
        if residual:
            return GemmTuning(block_n=64, splits=4 if rows <= 160 else 2, block_m=64)
        return GemmTuning(block_n=64, block_k=64, block_m=64)
    if residual:
        return GemmTuning(block_n=32, block_k=128, splits=8 if n <= 2048 else 4, warps=4, stages=3)
    return GemmTuning(block_n=32, block_k=128, warps=4, stages=4)


def _large_tuning(rows: int, *, residual: bool) -> GemmTuning:
    """Wide tiles: what is read of x again and again would else outweigh the weights."""
    if rows > MOST_ROWS:
        splits = 4 if rows <= 128 else 2
        return GemmTuning(block_n=128, block_k=64, splits=splits, warps=8, block_m=128)
    if residual:
        return GemmTuning(block_n=128, block_k=64, splits=4, stages=5, block_m=64)
    return GemmTuning(block_n=64, block_m=64)


def _fp8_tuning(n: int, rows: int, *, residual: bool) -> GemmTuning:
    """As wide as a warp group's instruction, but for so few rows that the GPU would not be full."""
    if residual:
        splits = 8 if n <= 2048 and rows <= 64 else 4 if n <= 2048 or rows <= 64 else 2
    else:
        splits = 1
    block_n = 32 if rows <= 16 and n <= 4096 and not residual else 64
    stages = 4 if rows <= 64 else 3
    return GemmTuning(block_n=block_n, block_k=128, splits=splits, stages=stages, block_m=128)
