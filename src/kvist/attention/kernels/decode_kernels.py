# mypy: ignore-errors
# ruff: noqa: N803
"""Paged decode attention on the GPU: one query a sequence, its context split over programs.

Where a context is split depends on its own length, and on whether few or many decode together, so
that a sequence's bits do not change with every neighbour. Launched by launch.py.
"""

import triton
import triton.language as tl

from kvist.attention.kernels.tiles import INT8, load_queries, mix, scores
from kvist.kernels.encode_kernels import hadamard
from kvist.kernels.jit import kernel

STEP = tl.constexpr(16)  # splits that are put together at a time


@triton.jit
def visible_keys(n, WINDOW: tl.constexpr, SINKS: tl.constexpr):
    """What the query at position n - 1 sees: `[0, head)` and `[first, n)`; how many keys that is.

    The kernel counts visible keys only: key u < head has position u, others u - head + first.
    """
    if WINDOW > 0:
        head = tl.minimum(n, SINKS)
        first = tl.maximum(n - WINDOW, head)
    else:
        head = n * 0
        first = head
    return head, first, head + n - first


@triton.jit
def split_length(count, MIN_SPLIT: tl.constexpr, DOUBLINGS: tl.constexpr, TARGET: tl.constexpr):
    """How many keys each split of `count` takes; `launch.Splits` says the same."""
    length = tl.where(count > TARGET * MIN_SPLIT // 4, 2 * MIN_SPLIT, MIN_SPLIT)
    for i in tl.static_range(1, DOUBLINGS):
        length = tl.where(count > TARGET * (MIN_SPLIT << i), MIN_SPLIT << (i + 1), length)
    return length


@kernel(do_not_specialize=["max_splits"])
def split_kernel(
    q_ptr,
    k_ptr,
    k_scale_ptr,
    k_zero_ptr,
    v_ptr,
    v_scale_ptr,
    v_zero_ptr,
    table_ptr,
    kv_lens_ptr,
    starts_ptr,
    partial_ptr,
    stats_ptr,
    out_ptr,
    table_stride,
    max_splits,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    RAGGED: tl.constexpr,
    K_KIND: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_KIND: tl.constexpr,
    V_GROUPS: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    TARGET: tl.constexpr,
    ROWS: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
    DIRECT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One (kv head, some splits, sequence): the group's outputs over the keys of each split.

    Unnormalised, with their maxima and sums, for `combine_kernel`; with DIRECT a sequence's only
    split goes to `out` itself. Scores are in base 2: `scale` carries log2(e).
    """
    h = tl.program_id(0)
    b = tl.program_id(2)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.load(kv_lens_ptr + b)
    row = b
    if RAGGED:
        row = tl.load(starts_ptr + b)
        if tl.load(starts_ptr + b + 1) - row != 1:
            n = 0
    head, first, count = visible_keys(n, WINDOW, SINKS)
    length = split_length(count, MIN_SPLIT, DOUBLINGS, TARGET)
    GROUP: tl.constexpr = HEADS // KV_HEADS
    g = tl.arange(0, ROWS)
    in_group = g < GROUP
    at = (row * HEADS + h * GROUP + g) * HEAD_DIM
    WIDTH: tl.constexpr = HEAD_DIM // 2 if V_KIND >= INT8 else HEAD_DIM
    splits = tl.cdiv(count, length)
    # Splits take turns on the programs there are: which computes one leaves no mark on its bits.
    for split in range(tl.program_id(1), splits, tl.num_programs(1)):
        begin = split * length
        end = tl.minimum(begin + length, count)
        q, q_high = load_queries(q_ptr, at, in_group, HEAD_DIM, K_KIND, Q_DTYPE)
        top = tl.full([ROWS], -1e30, tl.float32)
        total = tl.zeros([ROWS], tl.float32)
        acc = tl.zeros([ROWS, WIDTH], tl.float32)
        acc_high = tl.zeros([ROWS, WIDTH], tl.float32)
        for u0 in range(begin, end, TILE):
            u = u0 + tl.arange(0, TILE)
            ok = u < end
            t = u
            if WINDOW > 0:
                t = tl.where(u < head, u, u - head + first)
            block = tl.load(table_ptr + b * table_stride + t // BLOCK_SIZE, mask=ok, other=0)
            rows = (block.to(tl.int64) * BLOCK_SIZE + t % BLOCK_SIZE) * KV_HEADS + h
            s = scores(
                q,
                q_high,
                k_ptr,
                k_scale_ptr,
                k_zero_ptr,
                rows,
                ok,
                TILE,
                HEAD_DIM,
                K_KIND,
                K_GROUPS,
                PACKED,
            )
            s = tl.where(ok[None, :], s * scale, -1e30)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            fade = tl.exp2(top - new_top)
            total = total * fade + tl.sum(p, 1)
            top = new_top
            acc, acc_high = mix(
                p,
                acc * fade[:, None],
                acc_high * fade[:, None],
                v_ptr,
                v_scale_ptr,
                v_zero_ptr,
                rows,
                ok,
                TILE,
                HEAD_DIM,
                V_KIND,
                V_GROUPS,
                PACKED,
            )
        if DIRECT and splits == 1:
            d = tl.arange(0, HEAD_DIM)
            mixed = (acc / total[:, None]).to(out_ptr.dtype.element_ty)
            tl.store(out_ptr + at[:, None] + d[None, :], mixed, mask=in_group[:, None])
        else:
            slot = (b * HEADS + h * GROUP + g) * max_splits + split
            d = tl.arange(0, WIDTH)
            part = partial_ptr + slot.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
            tl.store(part, acc, mask=in_group[:, None])
            if V_KIND >= INT8:
                tl.store(part + WIDTH, acc_high, mask=in_group[:, None])
            tl.store(stats_ptr + slot * 2, top, mask=in_group)
            tl.store(stats_ptr + slot * 2 + 1, total, mask=in_group)


@kernel(do_not_specialize=["max_splits"])
def combine_kernel(
    partial_ptr,
    stats_ptr,
    kv_lens_ptr,
    starts_ptr,
    out_ptr,
    max_splits,
    HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    HEAD_DOUBLINGS: tl.constexpr,
    ROTATE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    RAGGED: tl.constexpr,
    MIN_SPLIT: tl.constexpr,
    DOUBLINGS: tl.constexpr,
    TARGET: tl.constexpr,
    DIRECT: tl.constexpr,
    DEPENDENT: tl.constexpr,
):
    """One (head, sequence): the splits' outputs, weighted by what each holds of the softmax.

    With DIRECT there is nothing left to do where there is one split.
    """
    h = tl.program_id(0)
    b = tl.program_id(1)
    if DEPENDENT:
        tl.extra.cuda.gdc_launch_dependents()
        tl.extra.cuda.gdc_wait()
    n = tl.load(kv_lens_ptr + b)
    row = b
    if RAGGED:
        row = tl.load(starts_ptr + b)
        if tl.load(starts_ptr + b + 1) - row != 1:
            n = 0
    _, _, count = visible_keys(n, WINDOW, SINKS)
    splits = tl.cdiv(count, split_length(count, MIN_SPLIT, DOUBLINGS, TARGET))
    if splits > (1 if DIRECT else 0):
        d = tl.arange(0, HEAD_DIM)
        i = tl.arange(0, STEP)
        slot = (b * HEADS + h) * max_splits + i
        top = tl.max(tl.full([STEP], -1e30, tl.float32), 0)
        total = tl.sum(tl.zeros([STEP], tl.float32), 0)
        acc = tl.zeros([HEAD_DIM], tl.float32)
        for i0 in range(0, splits, STEP):
            ok = i0 + i < splits
            at = slot + i0
            tops = tl.load(stats_ptr + at * 2, mask=ok, other=-1e30)
            totals = tl.load(stats_ptr + at * 2 + 1, mask=ok, other=0.0)
            where = partial_ptr + at.to(tl.int64)[:, None] * HEAD_DIM + d[None, :]
            parts = tl.load(where, mask=ok[:, None], other=0.0)
            new_top = tl.maximum(top, tl.max(tops, 0))
            fade = tl.exp2(top - new_top)
            weight = tl.exp2(tops - new_top)
            acc = acc * fade + tl.sum(parts * weight[:, None], 0)
            total = total * fade + tl.sum(totals * weight, 0)
            top = new_top
        out = acc / total
        if ROTATE:
            inverse: tl.constexpr = 1.0 / (1 << (HEAD_DOUBLINGS - HEAD_DOUBLINGS // 2))
            rotated = hadamard(tl.reshape(out, [1, HEAD_DIM]), 1, HEAD_DIM, HEAD_DOUBLINGS)
            out = tl.reshape(rotated, [HEAD_DIM]) * inverse
        tl.store(out_ptr + (row * HEADS + h) * HEAD_DIM + d, out.to(out_ptr.dtype.element_ty))
