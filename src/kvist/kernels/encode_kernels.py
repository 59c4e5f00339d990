# mypy: ignore-errors
# ruff: noqa: N803
"""Keys and values written in few bits, in registers: what `cache/codecs` does, bit for bit.

Some heads of one token at a time, as their two halves of channels. The codecs are the reference and
say why each step is what it is. Called by the kernel that rotates and writes, and by attention's
for the basis of its output.
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
def hadamard(x, ROWS: tl.constexpr, SIZE: tl.constexpr, DOUBLINGS: tl.constexpr):
    """Rows of x times Sylvester's matrix of +1 and -1, `[ROWS, SIZE]`, SIZE = 2**DOUBLINGS.

    Each round takes pairs of neighbours to their sum and their difference, all sums first: the bits
    of an index move round by one, and are back in their places at the end.
    """
    for _ in tl.static_range(DOUBLINGS):
        a, b = tl.split(tl.reshape(x, [ROWS, SIZE // 2, 2]))
        x = tl.reshape(tl.permute(tl.join(a + b, a - b), [0, 2, 1]), [ROWS, SIZE])
    return x


@triton.jit
def rotate_halves(a, b, ROWS: tl.constexpr, HALF: tl.constexpr, DOUBLINGS: tl.constexpr):
    """`hadamard` of rows of 2**DOUBLINGS numbers, whose halves `[ROWS, HALF]` are a and b."""
    low = hadamard(a + b, ROWS, HALF, DOUBLINGS - 1)
    high = hadamard(a - b, ROWS, HALF, DOUBLINGS - 1)
    return low, high


@triton.jit
def round_to_even(x):
    """The nearest whole number, for |x| < 2**22."""
    return (x + 12582912.0) - 12582912.0


@triton.jit
def _largest(a, b):
    """Of each row."""
    return tl.maximum(tl.max(tl.abs(a), 1), tl.max(tl.abs(b), 1))


@triton.jit
def rotate_exactly(a, b, ROWS: tl.constexpr, HALF: tl.constexpr, DOUBLINGS: tl.constexpr):
    """As `cache.codecs.rotation.rotate_exactly`, for the halves of some heads."""
    BITS: tl.constexpr = 24 - DOUBLINGS
    broken = tl.sum((a != a).to(tl.int32) + (b != b).to(tl.int32), 1)
    largest = tl.where(broken > 0, float("nan"), _largest(a, b))
    exponent = largest.to(tl.int32, bitcast=True) >> 23
    shift = tl.minimum(BITS + 126 - exponent, 126)
    there = ((shift + 127) << 23).to(tl.float32, bitcast=True)[:, None]
    back = ((127 - shift) << 23).to(tl.float32, bitcast=True)[:, None]
    a, b = rotate_halves(round_to_even(a * there), round_to_even(b * there), ROWS, HALF, DOUBLINGS)
    scale: tl.constexpr = 1.0 / (1 << (DOUBLINGS // 2))
    return a * scale * back, b * scale * back


@triton.jit
def _scale_of(a, b, LARGEST: tl.constexpr):
    """Each row's scale, float16."""
    largest = _largest(a, b)
    wanted = tl.div_rn(largest, tl.zeros_like(largest) + LARGEST)
    return tl.minimum(wanted, 65504.0).to(tl.float16)


@triton.jit
def _divided(y, scale):
    """Numbers by their row's scale, 0 where that is 0 or NaN."""
    scale = scale.to(tl.float32)[:, None]
    return tl.where(scale > 0, tl.div_rn(y, tl.where(scale > 0, scale, 1.0)), 0.0)


@triton.jit
def _clamped(x, LIMIT: tl.constexpr):
    return tl.minimum(tl.maximum(x, -LIMIT), LIMIT)


@triton.jit
def _half(x):
    """Float64 to float16 by way of float32, as torch does it."""
    return _clamped(x, 65504.0).to(tl.float32).to(tl.float16)


@triton.jit
def _nibbles(y, ROWS: tl.constexpr, HALF: tl.constexpr):
    """One half's numbers from 0 to 15 `[ROWS, HALF]`, and its groups' scales and zeros."""
    GROUPS: tl.constexpr = HALF // GROUP
    groups = tl.reshape(y, [ROWS, GROUPS, GROUP])
    low = tl.min(groups, 2)
    high = tl.max(groups, 2)
    step = tl.div_rn(high - low, tl.full([ROWS, GROUPS], 15.0, tl.float32))
    whole = step > 0
    numbers = tl.div_rn(groups - low[:, :, None], tl.where(whole, step, 1.0)[:, :, None])
    numbers = tl.where(whole[:, :, None], round_to_even(numbers), 0.0)
    numbers = tl.minimum(tl.maximum(numbers, 0.0), 15.0)
    wide = groups.to(tl.float64)
    itself = tl.sum(wide * wide, 2)
    read_back = step.to(tl.float64) * tl.sum(wide * numbers.to(tl.float64), 2)
    read_back += low.to(tl.float64) * tl.sum(wide, 2)
    useful = read_back > 0
    stretch = tl.where(useful, itself / tl.where(useful, read_back, 1.0), 1.0)
    scale = _half(step.to(tl.float64) * stretch)
    zero = _half(low.to(tl.float64) * stretch)
    return tl.reshape(numbers, [ROWS, HALF]).to(tl.uint8), scale, zero


@triton.jit
def store_encoded(
    a,
    b,
    x_ptr,
    scale_ptr,
    zero_ptr,
    rows,
    ROWS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    KIND: tl.constexpr,
):
    """Write heads' float32 halves `[ROWS, HEAD_DIM / 2]` as these rows of their planes.

    In the basis of the format.
    """
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, HALF)[None, :]
    kind: tl.constexpr = x_ptr.dtype.element_ty
    if KIND == PLAIN:
        x = x_ptr + rows[:, None] * HEAD_DIM + i
        tl.store(x, a.to(kind))
        tl.store(x + HALF, b.to(kind))
    elif KIND == FP8:
        scale = _scale_of(a, b, 448.0)
        x = x_ptr + rows[:, None] * HEAD_DIM + i
        a = _clamped(_divided(a, scale), 448.0)
        b = _clamped(_divided(b, scale), 448.0)
        tl.store(x, a.to(kind, fp_downcast_rounding="rtne"))
        tl.store(x + HALF, b.to(kind, fp_downcast_rounding="rtne"))
        tl.store(scale_ptr + rows, scale)
    elif KIND == INT8:
        a, b = rotate_exactly(a, b, ROWS, HALF, DOUBLINGS)
        scale = _scale_of(a, b, 127.0)
        x = x_ptr + rows[:, None] * HEAD_DIM + i
        tl.store(x, _clamped(round_to_even(_divided(a, scale)), 127.0).to(tl.int8))
        tl.store(x + HALF, _clamped(round_to_even(_divided(b, scale)), 127.0).to(tl.int8))
        tl.store(scale_ptr + rows, scale)
    else:
        a, b = rotate_exactly(a, b, ROWS, HALF, DOUBLINGS)
        low, low_scale, low_zero = _nibbles(a, ROWS, HALF)
        high, high_scale, high_zero = _nibbles(b, ROWS, HALF)
        tl.store(x_ptr + rows[:, None] * HALF + i, low | (high << 4))
        GROUPS: tl.constexpr = HALF // GROUP
        at = rows[:, None] * (2 * GROUPS) + tl.arange(0, GROUPS)[None, :]
        tl.store(scale_ptr + at, low_scale)
        tl.store(zero_ptr + at, low_zero)
        tl.store(scale_ptr + at + GROUPS, high_scale)
        tl.store(zero_ptr + at + GROUPS, high_zero)
