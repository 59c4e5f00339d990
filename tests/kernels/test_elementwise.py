"""Norms, rotary with cache write, and SwiGLU compute what the model's own modules compute."""

import pytest
import torch
from torch.nn import functional as F

from kvist.kernels.elementwise import Target, rms_norm, rotate_and_write, silu_mul
from kvist.models.rope import RopeConfig, RotaryEmbedding, rope_frequencies, rotate

EPS = 1e-6


def close(ours: torch.Tensor, theirs: torch.Tensor, tolerance: float = 1e-5) -> bool:
    return bool((ours - theirs).abs().max() < tolerance)


@pytest.mark.parametrize("size", [64, 96])
@pytest.mark.parametrize("parts", [0, 1, 3])
def test_norm_adds_what_came_before_it(size, parts, device):
    x, weight = torch.randn(5, size, device=device), torch.randn(size, device=device)
    delta = torch.randn(parts, 5, size, device=device) if parts else None
    whole = x + delta.sum(0) if delta is not None else x.clone()
    out = torch.empty_like(x)
    rms_norm(x, weight, EPS, out, delta)
    assert close(x, whole)
    assert close(out, F.rms_norm(whole, (size,), weight, EPS), 1e-4)


@pytest.mark.parametrize("normalised", [False, True])
@pytest.mark.parametrize("placed", [False, True])
def test_rotary_equals_the_models_and_writes_where_it_is_told(normalised, placed, device):
    heads, kv_heads, head_dim, count = 4, 2, 16, 3
    rope = RopeConfig(head_dim, 1e4)
    positions = torch.tensor([0, 7, 1000], device=device)
    places = torch.tensor([9, 2, 5], device=device) if placed else torch.arange(3, device=device)
    qkv = torch.randn(count, (heads + 2 * kv_heads) * head_dim, device=device)
    q_norm, k_norm = torch.randn(2, head_dim, device=device)
    angles = positions[:, None] * rope_frequencies(rope).to(device)
    q = torch.empty(count, heads, head_dim, device=device)
    planes = torch.full((2, 12, kv_heads, head_dim), torch.nan, device=device)
    rotate_and_write(
        qkv,
        (q_norm, k_norm) if normalised else None,
        EPS,
        (angles.cos(), angles.sin()),
        q,
        Target(planes[0]),
        Target(planes[1]),
        places if placed else None,
    )
    parts = qkv.split([heads * head_dim, kv_heads * head_dim, kv_heads * head_dim], dim=-1)
    expected_q, expected_k, expected_v = (p.unflatten(-1, (-1, head_dim)) for p in parts)
    if normalised:
        expected_q = F.rms_norm(expected_q, (head_dim,), q_norm, EPS)
        expected_k = F.rms_norm(expected_k, (head_dim,), k_norm, EPS)
    rotation = RotaryEmbedding(rope)(positions, torch.float32)
    assert close(q, rotate(expected_q, rotation), 1e-4)
    assert close(planes[0, places], rotate(expected_k, rotation), 1e-4)
    assert close(planes[1, places], expected_v)
    assert planes.isnan().sum() == 2 * (12 - count) * kv_heads * head_dim


def test_silu_mul_of_a_wide_row(device):
    x = torch.randn(2, 2 * 1500, device=device)
    gate, up = x.chunk(2, dim=-1)
    assert close(silu_mul(x), F.silu(gate) * up)
