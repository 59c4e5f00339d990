# mypy: ignore-errors
# ruff: noqa: N803
"""Paged prefill attention on the GPU: many queries of a sequence over what the cache holds.

A program takes a run of one sequence's queries and all query heads of one kv head, so that a group
reads its keys once. Launched by launch.py.
"""

import triton.language as tl

from kvist.attention.kernels.tiles import INT8, load_queries, mix, scores
from kvist.kernels.jit import kernel

ABSENT = tl.constexpr(1 << 30)  # behind any sequence's last query


@kernel(do_not_specialize=["count", "room", "whole_from", "whole_to"])
def runs_kernel(
    kv_lens_ptr,
    starts_ptr,
    work_ptr,
    count,
    room,
    whole_from,
    whole_to,
    QUERIES: tl.constexpr,
    SEQUENCES: tl.constexpr,
    TILE: tl.constexpr,
):
    """One sequence's runs of QUERIES queries, behind those of the sequences before it.

    The runs with the most keys come first. Sequences of one query have none, and those of
    `whole_from` to `whole_to` tokens without cached ones. The first program also fills the rest of
    the room with runs behind the last query.
    """
    b = tl.program_id(0)
    s = tl.arange(0, SEQUENCES)
    ok = s < count
    n = tl.load(starts_ptr + s + 1, mask=ok, other=0) - tl.load(starts_ptr + s, mask=ok, other=0)
    whole = (n >= whole_from) & (n <= whole_to)
    whole = whole & (n == tl.load(kv_lens_ptr + s, mask=ok, other=0))
    runs = tl.where((n > 1) & (whole == 0), (n + QUERIES - 1) // QUERIES, 0)
    before = tl.sum(tl.where(s < b, runs, 0))
    mine = tl.sum(tl.where(s == b, runs, 0))
    i = tl.arange(0, TILE)
    for first in range(0, mine, TILE):
        inside = first + i < mine
        at = work_ptr + (before + first + i) * 2
        tl.store(at, b + i * 0, mask=inside)
        tl.store(at + 1, (mine - 1 - first - i) * QUERIES, mask=inside)
    if b == 0:
        for first in range(tl.sum(runs), room, TILE):
            inside = first + i < room
            tl.store(work_ptr + (first + i) * 2, i * 0, mask=inside)
            tl.store(work_ptr + (first + i) * 2 + 1, i * 0 + ABSENT, mask=inside)


@kernel()
def prefill_kernel(
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
    work_ptr,
    out_ptr,
    table_stride,
    scale,
    HEADS: tl.constexpr,
    KV_HEADS: tl.constexpr,
    HEAD_DIM: tl.constexpr,
    BLOCK_SIZE: tl.constexpr,
    WINDOW: tl.constexpr,
    SINKS: tl.constexpr,
    K_KIND: tl.constexpr,
    K_GROUPS: tl.constexpr,
    V_KIND: tl.constexpr,
    V_GROUPS: tl.constexpr,
    Q_DTYPE: tl.constexpr,
    QUERIES: tl.constexpr,
    GROUP: tl.constexpr,
    TILE: tl.constexpr,
    PACKED: tl.constexpr,
):
    """One (kv head, run of QUERIES queries). Rows are queries times GROUP, padded to powers of two.

    `work` holds pairs (sequence, its first query of the run), which may lie behind the last one:
    such a program does nothing. `scale` carries log2(e).
    """
    h = tl.program_id(0)
    work = tl.program_id(1)
    b = tl.load(work_ptr + work * 2)
    i0 = tl.load(work_ptr + work * 2 + 1)
    n = tl.load(kv_lens_ptr + b)
    start = tl.load(starts_ptr + b)
    num_queries = tl.load(starts_ptr + b + 1) - start
    if i0 >= num_queries:
        return
    IN_GROUP: tl.constexpr = HEADS // KV_HEADS
    r = tl.arange(0, QUERIES * GROUP)
    i = i0 + r // GROUP
    g = r % GROUP
    valid = (i < num_queries) & (g < IN_GROUP)
    at = ((start + i).to(tl.int64) * HEADS + h * IN_GROUP + g) * HEAD_DIM
    q, q_high = load_queries(q_ptr, at, valid, HEAD_DIM, K_KIND, Q_DTYPE)

    # Queries have the positions [n - num_queries, n). This run sees keys below `last`, and its
    # first query, at `lowest`, decides where its window begins.
    lowest = n - num_queries + i0
    last = tl.minimum(lowest + QUERIES, n)
    head = n * 0
    first = head
    if WINDOW > 0:
        head = tl.minimum(lowest + 1, SINKS)
        first = tl.maximum(lowest - WINDOW + 1, head)
    count = head + last - first
    # Tiles of keys [0, whole) are seen by every query of the run.
    whole = n * 0
    if WINDOW == 0:
        whole = (lowest + 1) // TILE * TILE
    position = lowest + r // GROUP

    top = tl.full([QUERIES * GROUP], -1e30, tl.float32)
    total = tl.zeros([QUERIES * GROUP], tl.float32)
    WIDTH: tl.constexpr = HEAD_DIM // 2 if V_KIND >= INT8 else HEAD_DIM
    acc = tl.zeros([QUERIES * GROUP, WIDTH], tl.float32)
    acc_high = tl.zeros([QUERIES * GROUP, WIDTH], tl.float32)
    for masked in tl.static_range(2):
        u_begin = whole if masked else 0
        u_end = count if masked else whole
        for u0 in range(u_begin, u_end, TILE):
            u = u0 + tl.arange(0, TILE)
            ok = u < count
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
            s = s * scale
            if masked:
                seen = ok[None, :] & (t[None, :] <= position[:, None])
                if WINDOW > 0:
                    near = t[None, :] > position[:, None] - WINDOW
                    seen = seen & (near | (t[None, :] < SINKS))
                s = tl.where(seen, s, -1e30)
            new_top = tl.maximum(top, tl.max(s, 1))
            p = tl.exp2(s - new_top[:, None])
            if masked and WINDOW > 0:
                # A later query's window may begin behind this whole tile: all its scores are -1e30.
                p = tl.where(seen, p, 0.0)
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
    total = tl.where(valid, total, 1.0)
    d = tl.arange(0, WIDTH)
    out = out_ptr + at[:, None] + d[None, :]
    tl.store(out, (acc / total[:, None]).to(out_ptr.dtype.element_ty), mask=valid[:, None])
    if V_KIND >= INT8:
        high = (acc_high / total[:, None]).to(out_ptr.dtype.element_ty)
        tl.store(out + WIDTH, high, mask=valid[:, None])
