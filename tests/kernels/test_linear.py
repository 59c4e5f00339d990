"""Products of a few rows equal torch's, with their norms, SwiGLU and sums."""

import pytest
import torch
from torch.nn import functional as F

from kvist.kernels import fp8
from kvist.kernels.fp8 import Fp8Weight
from kvist.kernels.linear import (
    GemmTuning,
    GemvTuning,
    gemm,
    gemv,
    many_rows,
    quantize,
    stages_in,
)

EPS = 1e-6


def weights(n, k, in_fp8, device):
    """Weights as the kernels take them, and as numbers."""
    w = torch.randn(n, k, device=device)
    if not in_fp8:
        return w, w
    rounded = Fp8Weight(*fp8.quantize(w))
    return rounded, rounded.dequantize(torch.float32)


@pytest.mark.parametrize(("n", "k"), [(32, 64), (37, 96)])
@pytest.mark.parametrize("epilogue", ["store", "add", "silu"])
@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("in_fp8", [False, True], ids=["whole", "fp8"])
def test_gemv(n, k, epilogue, normalised, in_fp8, device):
    x, weight = torch.randn(1, k, device=device), torch.randn(k, device=device)
    w, numbers = weights(2 * n if epilogue == "silu" else n, k, in_fp8, device)
    out = torch.randn(1, n, device=device)
    product = (F.rms_norm(x, (k,), weight, EPS) if normalised else x) @ numbers.T
    if epilogue == "silu":
        expected = F.silu(product[:, :n]) * product[:, n:]
    else:
        expected = product + (out if epilogue == "add" else 0)
    norm = weight if normalised else None
    gemv(x, w, out, norm=norm, eps=EPS, epilogue=epilogue, tuning=GemvTuning(4, 32))
    assert (out - expected).abs().max() < 1e-3


@pytest.mark.parametrize(("m", "n", "k"), [(2, 32, 64), (17, 37, 80)])
@pytest.mark.parametrize("silu", [False, True])
@pytest.mark.parametrize("splits", [1, 2])
@pytest.mark.parametrize("in_fp8", [False, True], ids=["whole", "fp8"])
def test_gemm(m, n, k, silu, splits, in_fp8, device):
    if silu and splits > 1:
        pytest.skip("SwiGLU needs whole sums")
    x = torch.randn(m, k, device=device)
    w, numbers = weights(2 * n if silu else n, k, in_fp8, device)
    out = torch.empty(splits, m, n, device=device)
    gemm(x, w, out, silu=silu, tuning=GemmTuning(16, 32, splits, block_m=16))
    product = x @ numbers.T
    expected = F.silu(product[:, :n]) * product[:, n:] if silu else product
    assert (out.sum(0) - expected).abs().max() < 1e-3


def test_products_of_bfloat16_and_fp8(device):
    x = torch.randn(5, 64, device=device).bfloat16()
    w = Fp8Weight(*fp8.quantize(torch.randn(16, 64, device=device)))
    out = torch.empty(5, 16, device=device)
    gemm(x, w, out, tuning=GemmTuning(16, 32, block_m=16))
    expected = x.float() @ w.dequantize(torch.float32).T
    assert (out - expected).norm() < 1e-4 * expected.norm()


@pytest.mark.parametrize("k", [64, 80])
def test_activations_are_rounded_in_one_launch_as_the_reference_does(k, device):
    x = torch.randn(5, k, device=device) * torch.logspace(-5, 3, 5, device=device)[:, None]
    x[3] = 0
    for ours, theirs in zip(quantize(x), fp8.quantize(x), strict=True):
        assert torch.equal(ours.float(), theirs.float())


@pytest.mark.parametrize("rounding", [False, True])
def test_products_of_many_rows(rounding, device):
    kind = torch.bfloat16 if device.type == "cuda" else torch.float32
    x = torch.randn(96, 64, device=device).to(kind)
    w = Fp8Weight(*fp8.quantize(torch.randn(32, 64, device=device)), rounding)
    expected = fp8.linear(x, w).float()
    assert (many_rows(x, w).float() - expected).abs().max() <= expected.abs().max() / 100


# Of SwiGLU at 64 rows, whose tile of 64 x 64 x 128 is 48 KiB in bfloat16, Triton 3.6 holds all
# stages in an H200's shared memory; in others, and in float32, all but one.
@pytest.mark.parametrize(
    ("room", "tile", "from_memory", "stages"),
    [(227, 48, True, 4), (227, 96, False, 3), (163, 48, False, 4), (99, 48, False, 3)],
    ids=["H200", "H200 in float32", "A100", "RTX 4090"],
)
def test_no_more_stages_than_shared_memory_holds(room, tile, from_memory, stages):
    assert stages_in(room << 10, tile << 10, 4, from_memory=from_memory) == stages
    assert (stages - (not from_memory)) * tile <= room
