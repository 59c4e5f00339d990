# mypy: ignore-errors
# ruff: noqa: N803
"""Keys and values written in few bits, in registers: what `cache/codecs` does, bit for bit.

One head of one token at a time, as its two halves of channels. The codecs are the reference and say
why each step is what it is. Called by the kernel that rotates and writes, and by attention's for
the basis of its output.
"""

import triton
import triton.language as tl

# Number formats, as in attention/kernels/formats.py.
PLAIN = tl.constexpr(0)
FP8 = tl.constexpr(1)
INT8 = tl.constexpr(2)
INT4 = tl.constexpr(3)

GROUP = tl.constexpr(32)  # channels of INT4 that share scale and zero


@triton.jit
def hadamard(x, SIZE: tl.constexpr, DOUBLINGS: tl.constexpr):
    """X times Sylvester's matrix of +1 and -1, for `[SIZE]`, SIZE = 2**DOUBLINGS.

    Each round takes pairs of neighbours to their sum and their difference, all sums first: the bits
    of an index move round by one, and are back in their places at the end.
    """
    for _ in tl.static_range(DOUBLINGS):
        a, b = tl.split(tl.reshape(x, [SIZE // 2, 2]))
        x = tl.reshape(tl.trans(tl.join(a + b, a - b)), [SIZE])
    return x


@triton.jit
def rotate_halves(a, b, HALF: tl.constexpr, DOUBLINGS: tl.constexpr):
    """`hadamard` of the 2 * HALF numbers whose halves are a and b; HALF = 2**(DOUBLINGS - 1)."""
    return hadamard(a + b, HALF, DOUBLINGS - 1), hadamard(a - b, HALF, DOUBLINGS - 1)


@triton.jit
def round_to_even(x):
    """The nearest whole number, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def rotate_exactly(a, b, HALF: tl.constexpr, DOUBLINGS: tl.constexpr):
    """As `cache.codecs.rotation.rotate_exactly`, for one head's halves."""
    BITS: tl.constexpr = 24 - DOUBLINGS
    largest = tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))
    broken = tl.sum((a != a).to(tl.int32) + (b != b).to(tl.int32), 0)
    largest = tl.where(broken > 0, float("nan"), largest)
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    shift = tl.minimum(BITS + 126 - exponent, 126)
    there = ((shift + 127) << 23).to(tl.float32, bitcast=True)
    back = ((127 - shift) << 23).to(tl.float32, bitcast=True)
    a, b = rotate_halves(round_to_even(a * there), round_to_even(b * there), HALF, DOUBLINGS)
    scale: tl.constexpr = 1.0 / (1 << (DOUBLINGS // 2))
    return a * scale * back, b * scale * back


@triton.jit
def _largest(a, b):
    return tl.maximum(tl.max(tl.abs(a), 0), tl.max(tl.abs(b), 0))


@triton.jit
def _divided(y, scale):
    """Y / scale, 0 where the scale is 0 or NaN."""
    return tl.where(scale > 0, tl.div_rn(y, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def _nibbles(y, HALF: tl.constexpr):
    """One half's numbers from 0 to 15 `[HALF]`, and its groups' scales and zeros."""
    GROUPS: tl.constexpr = HALF // GROUP
    groups = tl.reshape(y, [GROUPS, GROUP])
    low = tl.min(groups, 1)
    high = tl.max(groups, 1)
    step = tl.div_rn(high - low, tl.full([GROUPS], 15.0, tl.float32))
    whole = step > 0
    numbers = tl.div_rn(groups - low[:, None], tl.where(whole, step, 1.0)[:, None])
    numbers = tl.where(whole[:, None], round_to_even(numbers), 0.0)
    numbers = tl.minimum(tl.maximum(numbers, 0.0), 15.0)
    wide = groups.to(tl.float64)
    itself = tl.sum(wide * wide, 1)
    read_back = step.to(tl.float64) * tl.sum(wide * numbers.to(tl.float64), 1)
    read_back += low.to(tl.float64) * tl.sum(wide, 1)
    useful = read_back > 0
    stretch = tl.where(useful, itself / tl.where(useful, read_back, 1.0), 1.0)
    scale = _half(step.to(tl.float64) * stretch)
    zero = _half(low.to(tl.float64) * stretch)
    return tl.reshape(numbers, [HALF]).to(tl.uint8), scale, zero


@triton.jit
def _half(x):
    return tl.minimum(tl.maximum(x, -65504.0), 65504.0).to(tl.float16)


@triton.jit
def store_encoded(
    a,
    b,
    x_ptr,
    scale_ptr,
    zero_ptr,
    row,
    HEAD_DIM: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write one head's float32 halves as row `row` of its planes, in the basis of the format."""
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, HALF)
    if KIND == FP8:
        scale = tl.minimum(tl.div_rn(_largest(a, b), 448.0), 65504.0).to(tl.float16)
        wide = scale.to(tl.float32)
        a = tl.minimum(tl.maximum(_divided(a, wide), -448.0), 448.0)
        b = tl.minimum(tl.maximum(_divided(b, wide), -448.0), 448.0)
        kind: tl.constexpr = x_ptr.dtype.element_ty
        tl.store(x_ptr + row * HEAD_DIM + i, a.to(kind, fp_downcast_rounding="rtne"))
        tl.store(x_ptr + row * HEAD_DIM + HALF + i, b.to(kind, fp_downcast_rounding="rtne"))
        tl.store(scale_ptr + row, scale)
    else:
        a, b = rotate_exactly(a, b, HALF, DOUBLINGS)
        if KIND == INT8:
            scale = tl.minimum(tl.div_rn(_largest(a, b), 127.0), 65504.0).to(tl.float16)
            wide = scale.to(tl.float32)
            a = tl.minimum(tl.maximum(round_to_even(_divided(a, wide)), -127.0), 127.0)
            b = tl.minimum(tl.maximum(round_to_even(_divided(b, wide)), -127.0), 127.0)
            tl.store(x_ptr + row * HEAD_DIM + i, a.to(tl.int8))
            tl.store(x_ptr + row * HEAD_DIM + HALF + i, b.to(tl.int8))
            tl.store(scale_ptr + row, scale)
        else:
            low, low_scale, low_zero = _nibbles(a, HALF)
            high, high_scale, high_zero = _nibbles(b, HALF)
            tl.store(x_ptr + row * HALF + i, low | (high << 4))
            GROUPS: tl.constexpr = HALF // GROUP
            at = row * 2 * GROUPS + tl.arange(0, GROUPS)
            tl.store(scale_ptr + at, low_scale)
            tl.store(zero_ptr + at, low_zero)
            tl.store(scale_ptr + at + GROUPS, high_scale)
            tl.store(zero_ptr + at + GROUPS, high_zero)
