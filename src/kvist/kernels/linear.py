"""Launches of the products of a few rows, with the tile sizes that stream weights fastest.

For one row `gemv`, for up to `MOST_ROWS` `gemm`; more rows are cuBLAS's business. Imports Triton.
"""

from dataclasses import dataclass

import triton
from torch import Tensor

from kvist.kernels.elementwise import dependent_launch
from kvist.kernels.linear_kernels import ADD, SILU, STORE, gemm_kernel, gemv_kernel

MOST_ROWS = 64


@dataclass(frozen=True)
class GemvTuning:
    """Rows of weights of a program, how much of them at a time, and its warps."""

    rows: int = 8
    block_k: int = 1024
    warps: int = 4


@dataclass(frozen=True)
class GemmTuning:
    """A program's tile, how many programs share the K dimension, warps and pipeline stages."""

    block_n: int = 32
    block_k: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4


def gemv(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    norm: Tensor | None = None,
    eps: float = 0.0,
    epilogue: str = "store",
    tuning: GemvTuning | None = None,
    dependent: bool = False,
) -> None:
    """One row of x times the weights.

    Args:
        x: `[1, K]`.
        w: `[N, K]`; for "silu" `[2 N, K]`, the gate's rows first.
        out: `[1, N]`.
        norm: weight of an RMSNorm of x, `[K]`.
        eps: of that norm.
        epilogue: "store"; "add" adds to out; "silu" is silu(gate) * up.
        tuning: tile sizes.
        dependent: programmatic dependent launch.
    """
    tuning = tuning or GemvTuning()
    kinds = {"store": STORE, "add": ADD, "silu": SILU}
    n, k = out.shape[-1], x.shape[-1]
    gemv_kernel[(triton.cdiv(n, tuning.rows),)](
        x,
        x if norm is None else norm,
        w,
        out,
        eps,
        N=n,
        K=k,
        ROWS=tuning.rows,
        BLOCK_K=min(tuning.block_k, triton.next_power_of_2(k)),
        NORM=norm is not None,
        EPILOGUE=kinds[epilogue],
        DEPENDENT=dependent,
        num_warps=tuning.warps,
        **dependent_launch(dependent),
    )


def gemm(
    x: Tensor,
    w: Tensor,
    out: Tensor,
    *,
    silu: bool = False,
    tuning: GemmTuning | None = None,
    dependent: bool = False,
) -> None:
    """Up to `MOST_ROWS` rows of x times the weights.

    Args:
        x: `[M, K]`, contiguous.
        w: `[N, K]`; with `silu` `[2 N, K]`, the gate's rows first.
        out: `[M, N]`, or `[splits, M, N]` float32 for the parts that `rms_norm` adds up.
        silu: out is silu(gate) * up.
        tuning: tile sizes.
        dependent: programmatic dependent launch.
    """
    tuning = tuning or GemmTuning()
    (m, k), n = x.shape, out.shape[-1]
    gemm_kernel[(triton.cdiv(n, tuning.block_n), tuning.splits)](
        x,
        w,
        out,
        m,
        N=n,
        K=k,
        SPLITS=tuning.splits,
        BLOCK_M=max(16, triton.next_power_of_2(m)),
        BLOCK_N=tuning.block_n,
        BLOCK_K=min(tuning.block_k, max(16, triton.next_power_of_2(k))),
        EPILOGUE=SILU if silu else STORE,
        DEPENDENT=dependent,
        num_warps=tuning.warps,
        num_stages=tuning.stages,
        **dependent_launch(dependent),
    )
