"""Tile sizes of a decode step's products, by the shape of their weights; measured on an H200.

Where a shape was not measured, its size decides. Imports Triton.
"""

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


def gemm_tuning(n: int, k: int, *, residual: bool) -> GemmTuning:
    """For up to 64 rows and weights `[n, k]`.

    What goes to the residual stream is few columns wide: programs share its K dimension, and the
    next norm adds up their parts.
    """
    if residual:
        return GemmTuning(block_n=32, block_k=128, splits=8 if n <= 2048 else 4, warps=4, stages=3)
    return GemmTuning(block_n=32, block_k=128, warps=4, stages=4)
