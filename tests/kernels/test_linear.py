"""Products of a few rows equal torch's, with their norms, SwiGLU and sums."""

import pytest
import torch
from torch.nn import functional as F

from kvist.kernels.linear import GemmTuning, GemvTuning, gemm, gemv

EPS = 1e-6


@pytest.mark.parametrize(("n", "k"), [(32, 64), (37, 96)])
@pytest.mark.parametrize("epilogue", ["store", "add", "silu"])
@pytest.mark.parametrize("normalised", [False, True])
def test_gemv(n, k, epilogue, normalised, device):
    x, weight = torch.randn(1, k, device=device), torch.randn(k, device=device)
    w = torch.randn(2 * n if epilogue == "silu" else n, k, device=device)
    out = torch.randn(1, n, device=device)
    product = (F.rms_norm(x, (k,), weight, EPS) if normalised else x) @ w.T
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
def test_gemm(m, n, k, silu, splits, device):
    if silu and splits > 1:
        pytest.skip("SwiGLU needs whole sums")
    x, w = torch.randn(m, k, device=device), torch.randn(2 * n if silu else n, k, device=device)
    out = torch.empty(splits, m, n, device=device)
    gemm(x, w, out, silu=silu, tuning=GemmTuning(16, 32, splits))
    product = x @ w.T
    expected = F.silu(product[:, :n]) * product[:, n:] if silu else product
    assert (out.sum(0) - expected).abs().max() < 1e-3
