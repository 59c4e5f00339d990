# mypy: ignore-errors
# ruff: noqa: N803, SIM109
"""Tiles of keys and values as the attention kernels use them: loaded from planes, in registers.

Integers become float16 four at a time: their bits are put into the mantissa of a float16 of known
exponent, which costs about one instruction a number; plain conversions cost several and made int8
slower than bfloat16. fp8 has an instruction of its own. `PACKED=False` are the plain conversions,
for the interpreter, which knows no assembly. Called by the decode and prefill kernels.
"""

import triton
import triton.language as tl

from kvist.attention.kernels import formats

PLAIN = tl.constexpr(formats.PLAIN)
FP8 = tl.constexpr(formats.FP8)
INT8 = tl.constexpr(formats.INT8)
INT4 = tl.constexpr(formats.INT4)


@triton.jit
def _int8_to_half(low, high):
    """1024 + 128 + x has the bits of x ^ 0x80 as its low mantissa byte.

    Two tensors at a time, here and below: what has one result the compiler moves behind the
    change of layout before a product, where bytes are read one by one.
    """
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 biased, exponent, offset;
        mov.b32 exponent, 0x64646464;
        mov.b32 offset, 0x64806480;
        xor.b32 biased, $4, 0x80808080;
        prmt.b32 $0, biased, exponent, 0x4140;
        prmt.b32 $1, biased, exponent, 0x4342;
        xor.b32 biased, $5, 0x80808080;
        prmt.b32 $2, biased, exponent, 0x4140;
        prmt.b32 $3, biased, exponent, 0x4342;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        sub.f16x2 $2, $2, offset;
        sub.f16x2 $3, $3, offset;
        }""",
        "=&r,=&r,=&r,=&r,r,r",
        [low, high],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _nibbles_to_half(x, low_scale, high_scale, low_zero, high_zero):
    """The low and the high four bits of each byte, 0 to 15, times scale plus zero."""
    return tl.inline_asm_elementwise(
        """{
        .reg .b32 low, high, exponent, offset;
        mov.b32 exponent, 0x64646464;
        mov.b32 offset, 0x64006400;
        and.b32 low, $4, 0x0f0f0f0f;
        shr.u32 high, $4, 4;
        and.b32 high, high, 0x0f0f0f0f;
        prmt.b32 $0, low, exponent, 0x4140;
        prmt.b32 $1, low, exponent, 0x4342;
        prmt.b32 $2, high, exponent, 0x4140;
        prmt.b32 $3, high, exponent, 0x4342;
        sub.f16x2 $0, $0, offset;
        sub.f16x2 $1, $1, offset;
        sub.f16x2 $2, $2, offset;
        sub.f16x2 $3, $3, offset;
        fma.rn.f16x2 $0, $0, $5, $9;
        fma.rn.f16x2 $1, $1, $6, $10;
        fma.rn.f16x2 $2, $2, $7, $11;
        fma.rn.f16x2 $3, $3, $8, $12;
        }""",
        "=&r,=&r,=&r,=&r,r,r,r,r,r,r,r,r,r",
        [x, low_scale, high_scale, low_zero, high_zero],
        dtype=(tl.float16, tl.float16),
        is_pure=True,
        pack=4,
    )


@triton.jit
def _spread(scales, TILE: tl.constexpr, HALF: tl.constexpr, GROUPS: tl.constexpr):
    """Scales of groups `[TILE, GROUPS]` for each of their channels, `[TILE, HALF]`."""
    wide = tl.broadcast_to(scales[:, :, None], [TILE, GROUPS, HALF // GROUPS])
    return tl.reshape(wide, [TILE, HALF])


@triton.jit
def _load_nibbles(
    x_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    ok,
    TILE: tl.constexpr,
    HALF: tl.constexpr,
    GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    HALF_GROUPS: tl.constexpr = (GROUPS + 1) // 2  # one scale for a whole head serves both halves
    SECOND: tl.constexpr = GROUPS // 2  # where the second half's scales begin
    d = tl.arange(0, HALF)
    g = tl.arange(0, HALF_GROUPS)
    x = tl.load(x_ptr + rows[:, None] * HALF + d[None, :], mask=ok[:, None], other=0)
    at = rows[:, None] * GROUPS + g[None, :]
    low_scale = tl.load(scale_ptr + at, mask=ok[:, None], other=0.0)
    high_scale = tl.load(scale_ptr + at + SECOND, mask=ok[:, None], other=0.0)
    low_zero = tl.load(zero_ptr + at, mask=ok[:, None], other=0.0)
    high_zero = tl.load(zero_ptr + at + SECOND, mask=ok[:, None], other=0.0)
    low_scale = _spread(low_scale, TILE, HALF, HALF_GROUPS)
    high_scale = _spread(high_scale, TILE, HALF, HALF_GROUPS)
    low_zero = _spread(low_zero, TILE, HALF, HALF_GROUPS)
    high_zero = _spread(high_zero, TILE, HALF, HALF_GROUPS)
    if PACKED:
        low, high = _nibbles_to_half(x, low_scale, high_scale, low_zero, high_zero)
    else:
        low = (x & 15).to(tl.float16) * low_scale + low_zero
        high = (x >> 4).to(tl.float16) * high_scale + high_zero
    return low, high


@triton.jit
def _load_bytes(x_ptr, rows, ok, HALF: tl.constexpr, PACKED: tl.constexpr):
    d = tl.arange(0, HALF)
    at = x_ptr + rows[:, None] * (2 * HALF) + d[None, :]
    low = tl.load(at, mask=ok[:, None], other=0)
    high = tl.load(at + HALF, mask=ok[:, None], other=0)
    if PACKED:
        low, high = _int8_to_half(low, high)
    else:
        low, high = low.to(tl.float16), high.to(tl.float16)
    return low, high


@triton.jit
def _load_whole(x_ptr, rows, ok, HEAD_DIM: tl.constexpr, KIND: tl.constexpr):
    """PLAIN in its own dtype, FP8 as float16: `[TILE, head_dim]`."""
    d = tl.arange(0, HEAD_DIM)
    x = tl.load(x_ptr + rows[:, None] * HEAD_DIM + d[None, :], mask=ok[:, None], other=0.0)
    if KIND == FP8:
        x = x.to(tl.float16)
    return x


@triton.jit
def load_halves(
    x_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    ok,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Channels `[0, head_dim / 2)` and the others of integers, each `[TILE, head_dim / 2]`.

    INT4 gives the values themselves, INT8 what is to be multiplied by `load_scale`.
    """
    if KIND == INT4:
        low, high = _load_nibbles(
            x_ptr, scale_ptr, zero_ptr, rows, ok, TILE, HEAD_DIM // 2, GROUPS, PACKED
        )
    else:
        low, high = _load_bytes(x_ptr, rows, ok, HEAD_DIM // 2, PACKED)
    return low, high


@triton.jit
def load_scale(scale_ptr, rows, ok):
    """`[TILE]` float32, the scales of FP8 and INT8."""
    return tl.load(scale_ptr + rows, mask=ok, other=0.0).to(tl.float32)


@triton.jit
def load_queries(q_ptr, at, ok, HEAD_DIM: tl.constexpr, KIND: tl.constexpr, DTYPE: tl.constexpr):
    """Rows of q at the offsets `at`: whole, or for integer keys their two halves of channels."""
    if KIND == PLAIN or KIND == FP8:
        d = tl.arange(0, HEAD_DIM)
        low = tl.load(q_ptr + at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
        high = low
    else:
        d = tl.arange(0, HEAD_DIM // 2)
        low = tl.load(q_ptr + at[:, None] + d[None, :], mask=ok[:, None], other=0.0)
        high_at = at[:, None] + HEAD_DIM // 2 + d[None, :]
        high = tl.load(q_ptr + high_at, mask=ok[:, None], other=0.0)
    return low.to(DTYPE), high.to(DTYPE)


@triton.jit
def scores(
    q,
    q_high,
    x_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    ok,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Products q k^T, `[M, TILE]` float32. Those of absent keys are any number: select after."""
    if KIND == PLAIN or KIND == FP8:
        k = _load_whole(x_ptr, rows, ok, HEAD_DIM, KIND)
        s = tl.dot(q, tl.trans(k), input_precision="ieee")
    else:
        low, high = load_halves(
            x_ptr, scale_ptr, zero_ptr, rows, ok, TILE, HEAD_DIM, KIND, GROUPS, PACKED
        )
        s = tl.dot(q_high, tl.trans(high), tl.dot(q, tl.trans(low)))
    if KIND == FP8 or KIND == INT8:
        s = s * load_scale(scale_ptr, rows, ok)[None, :]
    return s


@triton.jit
def mix(
    p,
    acc,
    acc_high,
    x_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    ok,
    TILE: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    KIND: tl.constexpr,
    GROUPS: tl.constexpr,
    PACKED: tl.constexpr,
):
    """Add p v to acc, float32: `[M, head_dim]`, or of integers two halves of the channels."""
    if KIND == FP8 or KIND == INT8:
        p = p * load_scale(scale_ptr, rows, ok)[None, :]
    if KIND == PLAIN or KIND == FP8:
        v = _load_whole(x_ptr, rows, ok, HEAD_DIM, KIND)
        acc = tl.dot(p.to(v.dtype), v, acc, input_precision="ieee")
    else:
        low, high = load_halves(
            x_ptr, scale_ptr, zero_ptr, rows, ok, TILE, HEAD_DIM, KIND, GROUPS, PACKED
        )
        p = p.to(tl.float16)
        acc = tl.dot(p, low, acc)
        acc_high = tl.dot(p, high, acc_high)
    return acc, acc_high
