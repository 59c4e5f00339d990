# mypy: ignore-errors
# ruff: noqa: N803
"""What stands between a layer's matrix products: norms, rotary with cache write, SwiGLU.

All arithmetic is float32, whatever the tensors' dtype. Launched by elementwise.py.
"""

import triton.language as tl

from kvist.kernels.encode_kernels import INT8, rotate_halves, store_encoded
from kvist.kernels.jit import kernel


@kernel(do_not_specialize=["rows"])
def norm_kernel(
    x_ptr,
    delta_ptr,
    weight_ptr,
    out_ptr,
    size,
    rows,
    eps,
    PARTS: tl.constexpr,
    BLOCK: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One row: x += the sum of delta's PARTS, written back; out = x / rms(x) * weight."""
    row = tl.program_id(0).to(tl.int64)
    i = tl.arange(0, BLOCK)
    ok = i < size
    weight = tl.load(weight_ptr + i, mask=ok, other=0.0).to(tl.float32)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    x = tl.load(x_ptr + row * size + i, mask=ok, other=0.0).to(tl.float32)
    if PARTS > 0:
        for part in tl.static_range(PARTS):
            at = (part * rows + row) * size
            x += tl.load(delta_ptr + at + i, mask=ok, other=0.0).to(tl.float32)
        tl.store(x_ptr + row * size + i, x.to(x_ptr.dtype.element_ty), mask=ok)
    scale = 1.0 / tl.sqrt(tl.sum(x * x, 0) / size + eps)
    tl.store(out_ptr + row * size + i, (x * scale * weight).to(out_ptr.dtype.element_ty), mask=ok)


@kernel()
def rotary_kernel(
    qkv_ptr,
    q_weight_ptr,
    k_weight_ptr,
    cos_ptr,
    sin_ptr,
    places_ptr,
    q_ptr,
    k_ptr,
    k_scale_ptr,
    k_zero_ptr,
    mean_ptr,
    v_ptr,
    v_scale_ptr,
    v_zero_ptr,
    eps,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    NORM: tl.constexpr,
    PLACED: tl.constexpr,
    CENTRED: tl.constexpr,
    K_KIND: tl.constexpr,
    V_KIND: tl.constexpr,
    ROWS: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One (ROWS heads of q, k or v, token): q and k normalised, rotated; k and v to their places.

    k and v are written in the format of their planes, q in the basis of k's.
    """
    h = tl.program_id(0) * ROWS
    token = tl.program_id(1).to(tl.int64)
    HALF: tl.constexpr = HEAD_DIM // 2
    i = tl.arange(0, HALF)
    r = tl.arange(0, ROWS)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    source = token * (HEADS + 2 * KV_HEADS) + h + r
    source = qkv_ptr + source[:, None] * HEAD_DIM + i[None, :]
    a = tl.load(source)
    b = tl.load(source + HALF)
    if h >= HEADS + KV_HEADS:
        place = tl.load(places_ptr + token) if PLACED else token
        rows = place * KV_HEADS + h - HEADS - KV_HEADS + r
        store_encoded(
            a.to(tl.float32),
            b.to(tl.float32),
            v_ptr,
            v_scale_ptr,
            v_zero_ptr,
            rows,
            ROWS,
            HEAD_DIM,
            DOUBLINGS,
            V_KIND,
        )
    else:
        x = a.to(tl.float32)
        y = b.to(tl.float32)
        if NORM:
            scale = 1.0 / tl.sqrt((tl.sum(x * x, 1) + tl.sum(y * y, 1)) / HEAD_DIM + eps)
            weight_ptr = q_weight_ptr
            if h >= HEADS:
                weight_ptr = k_weight_ptr
            x = x * scale[:, None] * tl.load(weight_ptr + i).to(tl.float32)[None, :]
            y = y * scale[:, None] * tl.load(weight_ptr + HALF + i).to(tl.float32)[None, :]
        cos = tl.load(cos_ptr + token * HALF + i)[None, :]
        sin = tl.load(sin_ptr + token * HALF + i)[None, :]
        first = x * cos - y * sin
        second = y * cos + x * sin
        if h < HEADS:
            if K_KIND >= INT8:
                first, second = rotate_halves(first, second, ROWS, HALF, DOUBLINGS)
                inverse: tl.constexpr = 1.0 / (1 << (DOUBLINGS - DOUBLINGS // 2))
                first = first * inverse
                second = second * inverse
            target = token * HEADS + h + r
            target = q_ptr + target[:, None] * HEAD_DIM + i[None, :]
            tl.store(target, first.to(q_ptr.dtype.element_ty))
            tl.store(target + HALF, second.to(q_ptr.dtype.element_ty))
        else:
            place = tl.load(places_ptr + token) if PLACED else token
            # As a codec is given them: in the model's own dtype.
            first = first.to(qkv_ptr.dtype.element_ty).to(tl.float32)
            second = second.to(qkv_ptr.dtype.element_ty).to(tl.float32)
            if CENTRED:
                mean = mean_ptr + (h - HEADS + r)[:, None] * HEAD_DIM + i[None, :]
                first -= tl.load(mean)
                second -= tl.load(mean + HALF)
            store_encoded(
                first,
                second,
                k_ptr,
                k_scale_ptr,
                k_zero_ptr,
                place * KV_HEADS + h - HEADS + r,
                ROWS,
                HEAD_DIM,
                DOUBLINGS,
                K_KIND,
            )


@kernel()
def silu_mul_kernel(x_ptr, out_ptr, size, BLOCK: tl.constexpr):
    """One (run of channels, row): silu(gate) * up, gates first in a row of x."""
    row = tl.program_id(1).to(tl.int64)
    i = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    ok = i < size
    gate = tl.load(x_ptr + row * 2 * size + i, mask=ok, other=0.0).to(tl.float32)
    up = tl.load(x_ptr + row * 2 * size + size + i, mask=ok, other=0.0).to(tl.float32)
    out = gate / (1.0 + tl.exp(-gate)) * up
    tl.store(out_ptr + row * size + i, out.to(out_ptr.dtype.element_ty), mask=ok)
