# mypy: ignore-errors
# ruff: noqa: N803
"""Log-probabilities of chosen tokens and the likeliest beside them, in two passes over no copy.

The first reads a row of logits in chunks and keeps of each its largest, its sum of exponentials and
its likeliest tokens; the second puts a row's chunks together. Launched by logprobs.py.
"""

import triton.language as tl

from kvist.kernels.jit import kernel
from kvist.kernels.sampling_kernels import load_logits


@kernel()
def chunk_kernel(
    logits_ptr,
    rows_ptr,
    tokens_ptr,
    peaks_ptr,
    sums_ptr,
    above_ptr,
    values_ptr,
    ids_ptr,
    VOCAB,
    TOP,
    CHUNK: tl.constexpr,
):
    """One (chunk, token): of the token's row, the parts and TOP candidates, likeliest first."""
    chunk = tl.program_id(0)
    which = tl.program_id(1)
    row = tl.load(rows_ptr + which)
    token = tl.load(tokens_ptr + which)
    chosen = tl.load(logits_ptr + row * VOCAB + token).to(tl.float32)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr, row, i, VOCAB)
    peak = tl.max(x, 0)
    at = which.to(tl.int64) * tl.num_programs(0) + chunk
    tl.store(peaks_ptr + at, peak)
    # All may be -inf: then nothing is added, not NaN.
    weights = tl.where(x > -float("inf"), tl.exp(x - peak), 0.0)
    tl.store(sums_ptr + at, tl.sum(weights, 0))
    tl.store(above_ptr + at, tl.sum((x > chosen).to(tl.int32), 0))
    for place in range(TOP):
        best = tl.max(x, 0)
        found = tl.min(tl.where(x == best, i, VOCAB), 0)
        tl.store(values_ptr + at * TOP + place, best)
        tl.store(ids_ptr + at * TOP + place, found)
        x = tl.where(i == found, -float("inf"), x)


@kernel()
def row_kernel(
    logits_ptr,
    rows_ptr,
    tokens_ptr,
    peaks_ptr,
    sums_ptr,
    above_ptr,
    values_ptr,
    ids_ptr,
    own_ptr,
    ranks_ptr,
    top_ptr,
    top_ids_ptr,
    VOCAB,
    chunks,
    TOP,
    CHUNKS: tl.constexpr,
    CANDIDATES: tl.constexpr,
):
    """One token: its log-probability and rank, and the TOP likeliest of its row."""
    which = tl.program_id(0).to(tl.int64)
    row = tl.load(rows_ptr + which)
    token = tl.load(tokens_ptr + which)
    chosen = tl.load(logits_ptr + row * VOCAB + token).to(tl.float32)
    c = tl.arange(0, CHUNKS)
    at = which * chunks + c
    peaks = tl.load(peaks_ptr + at, mask=c < chunks, other=-float("inf"))
    sums = tl.load(sums_ptr + at, mask=c < chunks, other=0.0)
    above = tl.load(above_ptr + at, mask=c < chunks, other=0)
    peak = tl.max(peaks, 0)
    total = tl.log(tl.sum(tl.where(sums > 0, sums * tl.exp(peaks - peak), 0.0), 0))
    tl.store(own_ptr + which, chosen - peak - total)
    tl.store(ranks_ptr + which, tl.sum(above, 0) + 1)
    f = tl.arange(0, CANDIDATES)
    first = which * chunks * TOP
    x = tl.load(values_ptr + first + f, mask=f < chunks * TOP, other=-float("inf"))
    for place in range(TOP):
        best = tl.max(x, 0)
        found = tl.min(tl.where(x == best, f, CANDIDATES), 0)
        known = found < chunks * TOP  # not so where a row is not finite
        tl.store(top_ptr + which * TOP + place, best - peak - total)
        token_id = tl.load(ids_ptr + first + found, mask=known, other=0)
        tl.store(top_ids_ptr + which * TOP + place, token_id)
        x = tl.where(f == found, -float("inf"), x)
