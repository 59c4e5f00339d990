"""Keys and values that the fused write encodes have the codec's own bits."""

import pytest
import torch
from torch.nn import functional as F

from kvist.attention.kernels import read_encoding, read_formats
from kvist.cache.codecs import Calibration, Plain, Quantized, make_codec
from kvist.cache.codecs.int4 import Int4
from kvist.cache.codecs.rotation import unrotate
from kvist.cache.protocol import SIDES
from kvist.core.spec import AttentionSpec
from kvist.kernels import elementwise
from kvist.kernels.elementwise import Target, rotate_and_write
from kvist.models.rope import RopeConfig, RotaryEmbedding, rope_frequencies, rotate

HEADS, KV_HEADS, COUNT = 4, 2, 5
EPS = 1e-6
CODECS = ["plain", "fp8", "int8", "int4", "k8v4"]


def centred(dtype: torch.dtype, head_dim: int, device: torch.device):
    mean = torch.randn(KV_HEADS, head_dim, device=device)
    return make_codec("int4", dtype, lambda: Calibration((mean,), "a test"))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("head_dim", [64, 128])
@pytest.mark.parametrize("name", [*CODECS, "int4 centred"])
@pytest.mark.parametrize("few", [5, 0], ids=["few tokens", "many"])
def test_planes_have_the_codecs_bits(few, name, head_dim, dtype, device, monkeypatch):
    torch.manual_seed(0)
    monkeypatch.setattr(elementwise, "FEW", few)
    codec = centred(dtype, head_dim, device) if name == "int4 centred" else make_codec(name, dtype)
    spec, rope = AttentionSpec(KV_HEADS, head_dim), RopeConfig(head_dim, 1e4)
    positions = torch.tensor([0, 7, 1000, 3, 64], device=device)
    places = torch.tensor([9, 2, 5, 11, 0], device=device)
    qkv = torch.randn(COUNT, (HEADS + 2 * KV_HEADS) * head_dim, device=device).to(dtype)
    qkv[3, HEADS * head_dim :] = 0  # a head of zeros
    q_norm, k_norm = torch.rand(2, head_dim, device=device).to(dtype) + 0.5
    planes = {
        side: {
            plane: torch.zeros(3, 4, *shape, dtype=kind, device=device)
            for plane, (shape, kind) in codec.planes(spec, side, 0).items()
        }
        for side in SIDES
    }
    formats, encoding = read_formats(planes, spec), read_encoding(codec, 0, head_dim)
    assert formats
    assert encoding
    flat = [
        Target(f.values.flatten(0, 1), f.kind, *(s if s is None else s.flatten(0, 1) for s in
               (f.scales, f.zeros)))
        for f in formats
    ]  # fmt: skip
    angles = positions[:, None] * rope_frequencies(rope).to(device)
    q = torch.empty(COUNT, HEADS, head_dim, device=device, dtype=dtype)
    rotation = angles.cos(), angles.sin()
    rotate_and_write(
        qkv, (q_norm, k_norm), EPS, rotation, q, *flat, places, mean=encoding.mean
    )  # fmt: skip

    # What the kernel makes of k before it is encoded, by writing it plainly.
    plain = torch.empty(2, COUNT, KV_HEADS, head_dim, device=device, dtype=dtype)
    plain_q = torch.empty_like(q)
    rotate_and_write(
        qkv, (q_norm, k_norm), EPS, rotation, plain_q, Target(plain[0]), Target(plain[1]), None
    )
    wanted_q = unrotate(plain_q.float()) if encoding.keys_rotated else plain_q.float()
    assert (q.float() - wanted_q).abs().max() < (0.05 if dtype == torch.bfloat16 else 1e-4)
    for side, x in zip(SIDES, plain, strict=True):
        for plane, expected in codec.encode(x, side, 0).items():
            ours = planes[side][plane].flatten(0, 1)[places]
            assert ours.view(torch.uint8).equal(expected.contiguous().view(torch.uint8)), (
                side, plane)  # fmt: skip


def test_keys_are_those_of_the_model(device):
    head_dim, rope = 64, RopeConfig(64, 1e4)
    positions = torch.tensor([0, 7, 1000], device=device)
    qkv = torch.randn(3, (HEADS + 2 * KV_HEADS) * head_dim, device=device)
    k = qkv.unflatten(-1, (-1, head_dim))[:, HEADS : HEADS + KV_HEADS]
    expected = rotate(
        F.rms_norm(k, (head_dim,), None, EPS), RotaryEmbedding(rope)(positions, k.dtype)
    )
    angles = positions[:, None] * rope_frequencies(rope).to(device)
    room = torch.empty(2, 3, KV_HEADS, head_dim, device=device)
    q, ones = torch.empty(3, HEADS, head_dim, device=device), torch.ones(head_dim, device=device)
    rotation = angles.cos(), angles.sin()
    rotate_and_write(qkv, (ones, ones), EPS, rotation, q, Target(room[0]), Target(room[1]), None)
    assert (room[0] - expected).abs().max() < 1e-4


def test_codecs_that_kernels_do_not_write_are_left_to_themselves():
    dtype = torch.float32
    assert read_encoding(make_codec("int4", dtype), 0, 32) is None
    coarse = Quantized("coarse", Int4(64), Int4(64), dtype)
    assert read_encoding(coarse, 0, 128) is None
    layered = make_codec("int4,1=plain", dtype)
    assert read_encoding(layered, 0, 64).keys_rotated
    assert not read_encoding(layered, 1, 64).keys_rotated
    assert isinstance(layered.of(1), Plain)
