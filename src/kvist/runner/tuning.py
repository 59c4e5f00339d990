"""Tile sizes of a decode step's products, by the shape of their weights; measured on an H200.

Where a shape was not measured, its size decides. Imports Triton.
"""

from kvist.kernels.fp8 import Fp8Weight, Weight
from kvist.kernels.linear import GemmTuning, GemvTuning


def gemv_tuning(n: int, k: int) -> GemvTuning:
    """For one row and weights `[n, k]`, or two such matrices (gate and up)."""
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
    if residual:
        return GemmTuning(block_n=32, block_k=128, splits=8 if n <= 2048 else 4, warps=4, stages=3)
    return GemmTuning(block_n=32, block_k=128, warps=4, stages=4)


def _fp8_tuning(n: int, rows: int, *, residual: bool) -> GemmTuning:
    """Wide enough tiles for a warp group's instructions; splits only where the GPU is not full."""
    if rows > 64:
        splits = 4 if residual and n <= 2048 else 1
        return GemmTuning(block_n=128, block_k=64, splits=splits, warps=8, stages=4, block_m=128)
    return GemmTuning(block_n=64, block_k=128, splits=4 if residual else 1, warps=4, stages=4)
