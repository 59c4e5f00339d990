"""Launches of the products of a few rows, with the tile sizes that stream weights fastest.

For one row `gemv`, for up to `most_rows` `gemm`; more rows are cuBLAS's business. Weights may be in
fp8, and are multiplied by their scales in the epilogue. Imports Triton.
"""

from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn import functional as F

from kvist.kernels import fp8, multiplies_from_memory, shared_memory
from kvist.kernels.fp8 import Fp8Weight, Weight
from kvist.kernels.fp8_kernels import gemm_fp8_kernel, quantize_kernel, widen_kernel
from kvist.kernels.jit import cdiv, dependent_launch, next_power_of_2
from kvist.kernels.linear_kernels import ADD, SILU, STORE, gemm_kernel, gemv_kernel

MOST_ROWS = 64
# What adds to the residual stream, and SwiGLU, are fused into products of more rows where weights
# are few enough for cuBLAS not to gain more by its tiles.
MOST_ROWS_SMALL, SMALL = 256, 1 << 23
MOST_ROWS_DEEP, DEEP = 192, 8192  # and of those that sum so much, which programs can share
MOST_ROWS_FP8 = 256  # behind which it costs less to widen the weights first


@dataclass(frozen=True)
class GemvTuning:
    """Rows of weights of a program, how much of them at a time, and its warps."""

    rows: int = 8
    block_k: int = 1024
    warps: int = 4


@dataclass(frozen=True)
class GemmTuning:
    """A program's tile, how many programs share the K dimension, warps and pipeline stages.

    A tile has no more rows than x, and there are no more stages than shared memory has room for.
    """

    block_n: int = 32
    block_k: int = 128
    splits: int = 1
    warps: int = 4
    stages: int = 4
    block_m: int = 128


def stages_in(room: int, tile: int, wanted: int, *, from_memory: bool) -> int:
    """Pipeline stages, at most those wanted, whose tiles lie side by side in shared memory.

    Args:
        room: bytes of shared memory.
        tile: bytes that a stage loads.
        wanted: what was measured to be the fastest where there is room.
        from_memory: whether products read tiles there: else one stage's are in registers.
    """
    room -= 1024  # for the compiler's barriers
    return max(1, min(wanted, room // tile + (not from_memory)))


def most_rows(w: Weight, dtype: torch.dtype, *, fused: bool = False) -> int:
    """Up to how many rows of this type `gemm` is the best product with such weights.

    `fused` is one that has parts for the residual stream or SwiGLU as its result.
    """
    if isinstance(w, Tensor):
        if not fused or dtype == torch.float32:
            return MOST_ROWS
        deep = MOST_ROWS_DEEP if w.shape[1] >= DEEP else MOST_ROWS
        return MOST_ROWS_SMALL if w.numel() <= SMALL else deep
    whole = w.rounds_activations or dtype == torch.float32
    return MOST_ROWS if whole else MOST_ROWS_FP8


def many_rows(x: Tensor, w: Weight) -> Tensor:
    """`[M, K]` times the weights `[N, K]`, as `[M, N]` in x's type: for more rows than `gemm`'s."""
    if isinstance(w, Tensor):
        return F.linear(x, w)
    if not w.rounds_activations:
        return F.linear(x, widen(w, x.dtype))
    if x.device.type != "cuda" or x.dtype != torch.bfloat16 or any(n % 16 for n in w.shape):
        return fp8.linear(x, w)
    values, scale = quantize(x)
    return torch._scaled_mm(
        values, w.values.t(), scale_a=scale[:, None], scale_b=w.scale[None], out_dtype=x.dtype
    )


def widen(w: Fp8Weight, dtype: torch.dtype) -> Tensor:
    """`Fp8Weight.dequantize` in one launch."""
    n, k = w.shape
    out = torch.empty(n, k, dtype=dtype, device=w.values.device)
    block = min(4096, next_power_of_2(k))
    widen_kernel[(n, cdiv(k, block))](w.values, w.scale, out, k, BLOCK_K=block, num_warps=4)
    return out


def quantize(x: Tensor) -> tuple[Tensor, Tensor]:
    """`fp8.quantize` in one launch; x is contiguous."""
    rows, k = x.shape
    values = torch.empty(rows, k, dtype=fp8.FP8, device=x.device)
    scale = torch.empty(rows, dtype=torch.float32, device=x.device)
    block = next_power_of_2(k)
    quantize_kernel[(rows,)](
        x, values, scale, k, BLOCK_K=block, num_warps=min(16, max(1, block // 512))
    )
    return values, scale


def gemv(
    x: Tensor,
    w: Weight,
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
    kinds = {"store": STORE.value, "add": ADD.value, "silu": SILU.value}
    n, k = out.shape[-1], x.shape[-1]
    values, scale = (w.values, w.scale) if isinstance(w, Fp8Weight) else (w, x)
    gemv_kernel[(cdiv(n, tuning.rows),)](
        x,
        x if norm is None else norm,
        values,
        scale,
        out,
        eps,
        N=n,
        K=k,
        ROWS=tuning.rows,
        BLOCK_K=min(tuning.block_k, next_power_of_2(k)),
        NORM=norm is not None,
        SCALED=isinstance(w, Fp8Weight),
        EPILOGUE=kinds[epilogue],
        DEPENDENT=dependent,
        num_warps=tuning.warps,
        **dependent_launch(dependent),
    )


def gemm(
    x: Tensor,
    w: Weight,
    out: Tensor,
    *,
    silu: bool = False,
    tuning: GemmTuning | None = None,
    dependent: bool = False,
) -> None:
    """Up to `most_rows` rows of x times the weights.

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
    block_m = min(tuning.block_m, max(16, next_power_of_2(m)))
    constants: dict[str, int] = {
        "N": n,
        "K": k,
        "SPLITS": tuning.splits,
        "BLOCK_M": block_m,
        "BLOCK_N": tuning.block_n,
        "BLOCK_K": min(tuning.block_k, max(16, next_power_of_2(k))),
        "EPILOGUE": SILU.value if silu else STORE.value,
        "DEPENDENT": dependent,
        "num_warps": tuning.warps,
        "num_stages": tuning.stages,
        **dependent_launch(dependent),
    }
    if isinstance(w, Fp8Weight) and x.dtype == torch.float32:
        # No tensor cores: the compiler writes each product out.
        narrow = {"BLOCK_N": 32, "BLOCK_K": 64}
        constants |= {name: min(constants[name], most) for name, most in narrow.items()}
    if x.device.type == "cuda":
        index = x.device.index or 0
        values, matrices = w.values if isinstance(w, Fp8Weight) else w, 2 if silu else 1
        width = block_m * x.itemsize + matrices * constants["BLOCK_N"] * values.itemsize
        constants["num_stages"] = stages_in(
            shared_memory(index),
            width * constants["BLOCK_K"],
            tuning.stages,
            from_memory=multiplies_from_memory(index) and x.dtype != torch.float32,
        )
    grid = cdiv(m, block_m), cdiv(n, constants["BLOCK_N"]), tuning.splits
    if isinstance(w, Fp8Weight):
        gemm_fp8_kernel[grid](x, w.values, w.scale, out, m, **constants)
    else:
        gemm_kernel[grid](x, w, out, m, **constants)
