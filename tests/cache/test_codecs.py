"""Codecs: planes of few bits that hold what they promise, token by token, in any shape of head."""

import random
from math import ceil

import pytest
import torch
from combinations import MODELS, cache_of, expected, model_of, step, tolerance
from torch import Tensor

from kvist.cache import CODECS, Codec, make_cache, make_codec
from kvist.cache.codecs import Calibration, Quantized
from kvist.cache.codecs.int4 import Int4
from kvist.cache.codecs.rotation import block_size, rotate, rotate_exactly, unrotate
from kvist.cache.protocol import SIDES, Planes, Side
from kvist.cache.size import bits_per_value, bytes_per_token, layer_bytes_per_token
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError
from parity import Tally, assert_same_greedy

F32 = torch.float32
HEAD_DIMS = (8, 12, 20, 24, 64, 80, 96, 128)
LOSSY = [name for name in CODECS if not make_codec(name, F32).lossless]

every_codec = pytest.mark.parametrize("codec", CODECS)
every_lossy_codec = pytest.mark.parametrize("codec", LOSSY)
every_head_dim = pytest.mark.parametrize("head_dim", HEAD_DIMS)
every_side = pytest.mark.parametrize("side", SIDES)


def tokens_of(head_dim: int, count: int = 24, heads: int = 2, seed: int = 0) -> Tensor:
    """`[count, heads, head_dim]` with some large channels, as keys have them."""
    generator = torch.Generator().manual_seed(seed)
    x = torch.randn(count, heads, head_dim, generator=generator)
    x[..., :: max(1, head_dim // 4)] *= 8
    return x


def centred(name: str, x: Tensor) -> Codec:
    """A codec made for a model whose keys are like x."""
    return make_codec(name, F32, lambda: Calibration((x.mean(dim=0),), "a test"))


def raw(planes: Planes, head_dim: int) -> Tensor:
    """Planes as a kernel reads them: number * scale + zero, by the documented layout alone."""
    x = planes["x"]
    if x.dtype == torch.uint8:
        numbers = torch.zeros(*x.shape[:-1], head_dim)
        for i in range(head_dim // 2):
            numbers[..., i] = (x[..., i] & 15).float()
            numbers[..., i + head_dim // 2] = (x[..., i] >> 4).float()
    else:
        numbers = x.float()
    if "scale" not in planes:
        return numbers
    group = head_dim if planes["scale"].dim() < x.dim() else min(32, head_dim)
    for i in range(head_dim):
        scale, zero = (
            planes[name].reshape(*x.shape[:-1], -1)[..., i // group].float()
            if name in planes
            else 0.0
            for name in ("scale", "zero")
        )
        numbers[..., i] = numbers[..., i] * scale + zero
    return numbers


def same_bits(a: Tensor, b: Tensor) -> bool:
    return a.dtype == b.dtype and torch.equal(a.view(torch.uint8), b.view(torch.uint8))


@every_head_dim
@every_codec
def test_planes_are_of_the_declared_shape_and_type(codec: str, head_dim: int) -> None:
    made, spec = make_codec(codec, F32), AttentionSpec(3, head_dim)
    for side in SIDES:
        found = made.encode(tokens_of(head_dim, heads=3), side, 0)
        declared = made.planes(spec, side, 0)
        assert {name: (tuple(p.shape[1:]), p.dtype) for name, p in found.items()} == declared
        back = made.decode(found, side, 0)
        assert (back.shape, back.dtype) == ((24, 3, head_dim), F32)


@every_head_dim
@every_codec
def test_a_token_is_written_to_the_same_bits_alone_and_among_others(
    codec: str, head_dim: int
) -> None:
    x = tokens_of(head_dim, count=33)
    made = centred(codec, x)
    for side in SIDES:
        whole = made.encode(x, side, 0)
        for part in (slice(0, 1), slice(7, 8), slice(5, 30)):
            for name, plane in made.encode(x[part].clone(), side, 0).items():
                assert same_bits(plane, whole[name][part])
        shaped = made.encode(x.view(3, 11, 2, head_dim), side, 0)
        assert all(same_bits(shaped[n].flatten(0, 1), p) for n, p in whole.items())


@every_side
@every_codec
def test_planes_of_zeros_are_finite(codec: str, side: Side) -> None:
    x = tokens_of(24)
    made = centred(codec, x)
    zeros = {name: torch.zeros_like(plane) for name, plane in made.encode(x, side, 0).items()}
    assert made.decode(zeros, side, 0).isfinite().all()


@every_side
@every_lossy_codec
def test_zero_comes_back_as_zero_and_any_size_as_something_finite(codec: str, side: Side) -> None:
    made = make_codec(codec, F32)
    x = tokens_of(64)
    for size in (0.0, 1e-38, 1e-6, 1e4, 1e20):
        back = made.decode(made.encode(x * size, side, 0), side, 0)
        assert back.isfinite().all()
        if size in (0.0, 1e4):
            assert (back - x * size).abs().max() <= 0.2 * size * x.abs().max()


@every_side
@every_lossy_codec
def test_a_faulty_token_stays_faulty_and_harms_no_other(codec: str, side: Side) -> None:
    made = make_codec(codec, F32)
    x = tokens_of(64)
    good = made.decode(made.encode(x, side, 0), side, 0)
    x[3, 1, 5] = torch.nan
    back = made.decode(made.encode(x, side, 0), side, 0)
    assert back[3, 1].isnan().any()
    back[3, 1] = good[3, 1]
    assert torch.equal(back, good)


@every_head_dim
@every_lossy_codec
def test_what_is_read_is_near_what_was_written(codec: str, head_dim: int) -> None:
    x = tokens_of(head_dim, count=200)
    made = make_codec(codec, F32)
    for side in SIDES:
        error = (made.decode(made.encode(x, side, 0), side, 0) - x).norm() / x.norm()
        assert error < {"int8": 0.01, "fp8": 0.03}.get(codec, 0.1)


@every_head_dim
@every_codec
def test_kernels_that_read_planes_find_the_models_attention(codec: str, head_dim: int) -> None:
    """Queries are brought into the planes' basis, the output out of it, and the mean drops out."""
    keys, values, q = (tokens_of(head_dim, heads=1, seed=i) for i in range(3))
    keys = keys + 5 * torch.linspace(-1, 1, head_dim)
    made = centred(codec, keys)
    written = made.encode(keys, "key", 0), made.encode(values, "value", 0)
    read_keys = raw(written[0], head_dim)[:, 0]
    read_values = raw(written[1], head_dim)[:, 0]
    seen_keys = made.decode(written[0], "key", 0)[:, 0]
    seen_values = made.decode(written[1], "value", 0)[:, 0]
    scale = head_dim**-0.5 / 8
    theirs = (made.to_basis(q, 0)[:, 0] @ read_keys.T * scale).softmax(dim=-1)
    ours = (q[:, 0] @ seen_keys.T * scale).softmax(dim=-1)
    torch.testing.assert_close(theirs, ours, atol=2e-5, rtol=1e-4)
    out = made.from_basis((theirs @ read_values)[:, None], 0)[:, 0]
    torch.testing.assert_close(out, ours @ seen_values, atol=2e-4, rtol=1e-3)


@every_side
def test_int4_keeps_the_product_of_a_group_with_itself(side: Side) -> None:
    x = tokens_of(64, count=100)
    planes = Int4().encode(x)
    back = Int4().decode(planes)
    groups, read = x.unflatten(-1, (2, 32)), back.unflatten(-1, (2, 32))
    itself = (groups * groups).sum(dim=-1)
    torch.testing.assert_close((groups * read).sum(dim=-1), itself, rtol=2e-3, atol=0)


def test_int4_refuses_heads_that_it_cannot_pack() -> None:
    with pytest.raises(CacheError, match="head_dim 7 is odd"):
        make_codec("int4", F32).planes(AttentionSpec(1, 7), "key", 0)


def test_centring_pays_where_keys_have_a_mean() -> None:
    x = tokens_of(64, count=400) + 20 * torch.sin(torch.arange(64.0))
    errors = [
        (codec.decode(codec.encode(x, "key", 0), "key", 0) - x).square().mean()
        for codec in (make_codec("int4", F32), centred("int4", x))
    ]
    assert errors[1] < errors[0] / 4


# The Hadamard basis.


@every_head_dim
def test_the_rotation_has_powers_of_two_for_entries_and_an_inverse(head_dim: int) -> None:
    matrix, inverse = rotate(torch.eye(head_dim)), unrotate(torch.eye(head_dim))
    p = block_size(head_dim)
    for m in (matrix, inverse):
        assert m.abs().unique().numel() <= 2  # zero outside the blocks, one size inside
        assert m.abs().amax().frexp().mantissa == 0.5
        assert (m != 0).sum(dim=0).tolist() == [p] * head_dim
        assert torch.equal(m, m.T)
    assert torch.equal(matrix @ inverse, torch.eye(head_dim))
    if p in (4, 16, 64):
        assert torch.equal(matrix, inverse)


@every_head_dim
def test_the_exact_rotation_is_the_rotation(head_dim: int) -> None:
    x = tokens_of(head_dim, count=100)
    exactly = rotate_exactly(x)
    p = block_size(head_dim)
    # Each of p channels is off by half a step of 2**-24 * p of what bounds the largest.
    off = (exactly - rotate(x.double())).abs().amax(dim=-1) / x.abs().amax(dim=-1)
    assert off.max() <= p * p * 2**-24


# What a cache takes.


@pytest.mark.parametrize(
    ("codec", "bits"), [("plain", 32), ("int8", 8.25), ("fp8", 8.25), ("k8v4", 6.625), ("int4", 5)]
)
def test_bits_of_a_value(codec: str, bits: float) -> None:
    assert bits_per_value([AttentionSpec(3, 64)] * 5, make_codec(codec, F32)) == bits


@every_head_dim
@every_codec
def test_bytes_of_a_token_are_those_that_are_allocated(codec: str, head_dim: int) -> None:
    specs = [AttentionSpec(2, head_dim), AttentionSpec(1, head_dim, window=4)]
    made = make_codec(f"{codec},1=int8", F32)
    cache = make_cache(specs, layout="static", codec=made, rows=2, max_length=10, dtype=F32)
    assert bytes_per_token(specs, made) * 20 == cache.nbytes


def test_int4_takes_half_a_byte_a_channel_and_four_a_group() -> None:
    for head_dim in HEAD_DIMS:
        expected_bytes = 2 * (head_dim // 2 + 4 * ceil(head_dim / 32))
        spec = AttentionSpec(1, head_dim)
        assert layer_bytes_per_token(spec, make_codec("int4", F32), 0) == expected_bytes


# A codec for each layer.


def test_layers_may_have_codecs_of_their_own() -> None:
    made = make_codec("int4, 0-1 = int8 ,5=plain", F32)
    spec = AttentionSpec(1, 64)
    kinds = [made.planes(spec, "key", i)["x"][1] for i in (0, 1, 2, 4, 5, 6)]
    assert kinds == [torch.int8, torch.int8, torch.uint8, torch.uint8, F32, torch.uint8]
    assert not made.lossless
    assert make_codec("plain,3=plain", F32).lossless


def test_a_mixed_codec_gives_the_tokens_of_its_reference() -> None:
    name, codec = "80", "int4,0=int8,2=plain"
    tokens = tuple(random.Random(0).randrange(61) for _ in range(40))
    reference = expected(name, codec, "window and sinks", tokens)
    for layout in ("static", "ring", "paged"):
        cache = cache_of(model_of(name), layout, codec, "window and sinks")
        for start in range(0, 40, 5):
            [logits] = step(model_of(name), cache, [tokens[start : start + 5]])
            within = tolerance(name, codec, "window and sinks", tokens)
            assert_same_greedy(reference[start : start + 5], logits, Tally(), within=within)


@pytest.mark.parametrize(
    ("text", "reason"),
    [
        ("int5", "no codec named 'int5'; there are: plain"),
        ("int4,0-1=int9", "no codec named 'int9'"),
        ("int4,0:int8", "'0:int8' is not layer=codec"),
        ("int4,=int8", "is not layer=codec"),
        ("int4,0-=int8", "is not layer=codec"),
        ("int4,", "is not layer=codec"),
        ("int4,0-3=int8,3=plain", "names layer 3 twice"),
        ("int4,3-1=int8", "is not layer=codec"),
    ],
)
def test_a_codec_that_makes_no_sense_is_refused(text: str, reason: str) -> None:
    with pytest.raises(CacheError, match=reason):
        make_codec(text, F32)


def test_a_codec_for_layers_that_the_model_lacks_is_refused() -> None:
    specs = [AttentionSpec(1, 8)] * 3
    with pytest.raises(CacheError, match=r"layer 3.*3 layers"):
        make_cache(specs, codec="int4,1-3=int8", max_length=8, dtype=F32)


def test_fingerprints_tell_apart_what_cannot_read_each_others_planes() -> None:
    x = tokens_of(64)
    made = [make_codec(name, F32) for name in CODECS]
    made += [
        make_codec("plain", torch.bfloat16),
        centred("int4", x),
        make_codec("int4,0=int8", F32),
    ]
    made += [make_codec("int4,1=int8", F32), Quantized("int4", Int4(16), Int4(16), F32)]
    assert len({codec.fingerprint for codec in made}) == len(made)
    assert centred("int4", x).fingerprint == centred("int4", x).fingerprint


def test_only_codecs_that_need_a_calibration_ask_for_one() -> None:
    asked = []

    def calibrate() -> None:
        asked.append(1)

    for name in ("plain", "fp8", "int8", "k8v4", "plain,0=int8"):
        make_codec(name, F32, calibrate)
    assert not asked
    make_codec("plain,0=int4", F32, calibrate)
    assert asked


def test_every_tiny_model_runs_with_every_codec_in_bfloat16() -> None:
    for name in MODELS:
        for codec in CODECS:
            made = make_codec(codec, torch.bfloat16)
            for spec in model_of(name).specs:
                x = tokens_of(spec.head_dim, heads=spec.num_kv_heads).bfloat16()
                back = made.decode(made.encode(x, "key", 0), "key", 0)
                assert back.dtype == torch.bfloat16
                assert made.to_basis(x, 0).dtype == made.from_basis(x, 0).dtype == torch.bfloat16
                assert (back - x).abs().max() < 0.4 * x.abs().max()
