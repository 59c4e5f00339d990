# mypy: ignore-errors
# ruff: noqa: N803
"""Sampling from a vocabulary that is never sorted: peaks, weights, then one token of each row.

A row is read in chunks. A token's weight is exp(scaled logit - the row's largest) in whole numbers
of 2**-36, so that sums are exact and their order does not matter: nor do chunks, nor neighbours.
Top-k and top-p are thresholds on scaled logits, found first among bins one unit wide and then among
the tokens of one bin. Launched by sampling.py.
"""

import triton
import triton.language as tl

from kvist.kernels.jit import kernel

BINS = tl.constexpr(32)
UNIT = tl.constexpr(1 << 36)
# A bin's sum in one chunk of up to 4,096 tokens holds its weights below this bit, its count above.
COUNT = tl.constexpr(49)
ONE_MORE = tl.constexpr(1 << 49)
BELOW = tl.constexpr((1 << 49) - 1)


@triton.jit
def load_logits(logits_ptr, row, i, VOCAB):
    """Those of the tokens i as float32, -inf behind the last."""
    x = tl.load(logits_ptr + row * VOCAB + i, mask=i < VOCAB, other=-float("inf"))
    return x.to(tl.float32)


@triton.jit
def weights_of(scaled, top):
    """Whole numbers of 2**-36: 2**36 for the row's largest, 0 from 25 units below it on."""
    return (tl.exp(scaled - top) * UNIT).to(tl.int64)


@triton.jit
def bins_of(scaled, top):
    """How many whole units below the row's largest, at most BINS - 1."""
    return tl.minimum(top - scaled, BINS - 1.0).to(tl.int32)


@triton.jit
def order_of(x):
    """Whole numbers in the order of float32 numbers."""
    bits = x.to(tl.int32, bitcast=True)
    return (bits ^ ((bits >> 31) & 0x7FFFFFFF)).to(tl.int64)


@kernel()
def peak_kernel(logits_ptr, peaks_ptr, places_ptr, VOCAB, CHUNK: tl.constexpr):
    """One (chunk, row): its largest logit, NaN if one is, and the first token that has it."""
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    i = chunk * CHUNK + tl.arange(0, CHUNK)
    x = load_logits(logits_ptr, row, i, VOCAB)
    peak = tl.max(x, 0)
    place = tl.min(tl.where(x == peak, i, VOCAB), 0)
    broken = tl.sum((x != x).to(tl.int32), 0)
    at = row * tl.num_programs(0) + chunk
    tl.store(peaks_ptr + at, tl.where(broken > 0, float("nan"), peak))
    tl.store(places_ptr + at, place)


@kernel()
def weight_kernel(
    logits_ptr,
    params_ptr,
    peaks_ptr,
    weights_ptr,
    bins_ptr,
    VOCAB,
    chunks,
    stride,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    FILTERED: tl.constexpr,
):
    """One (chunk, row): the sum of its weights, or where k or p is asked for that of each bin.

    Params are `[5, stride]` float64: temperature, k, p, min-p, uniform.
    """
    chunk = tl.program_id(0)
    row = tl.program_id(1).to(tl.int64)
    temperature = tl.load(params_ptr + row).to(tl.float32)
    if temperature > 0:
        k = tl.load(params_ptr + stride + row)
        p = tl.load(params_ptr + 2 * stride + row)
        min_p = tl.load(params_ptr + 3 * stride + row).to(tl.float32)
        c = tl.arange(0, CHUNKS)
        peaks = tl.load(peaks_ptr + row * chunks + c, mask=c < chunks, other=-float("inf"))
        top = tl.div_rn(tl.max(peaks, 0), temperature)
        i = chunk * CHUNK + tl.arange(0, CHUNK)
        x = load_logits(logits_ptr, row, i, VOCAB)
        scaled = tl.div_rn(x, temperature)
        weights = weights_of(scaled, top)
        at = row * chunks + chunk
        searched = False
        if FILTERED:
            searched = (k > 0) | (p < 1)
            if searched:
                bins = bins_of(scaled, top)
                counted = tl.where(i < VOCAB, weights + ONE_MORE, 0)
                for b in range(BINS):
                    tl.store(bins_ptr + at * BINS + b, tl.sum(tl.where(bins == b, counted, 0), 0))
        if not searched:
            kept = weights
            if min_p > 0:
                kept = tl.where(scaled >= top + tl.log(min_p), weights, 0)
            tl.store(weights_ptr + at, tl.sum(kept, 0))


@triton.jit
def _collect(
    logits_ptr,
    bins_ptr,
    found_ptr,
    row,
    wanted,
    top,
    temperature,
    VOCAB,
    chunks,
    CHUNK: tl.constexpr,
):
    """Put the scaled logits of one bin side by side; how many, and their range in order."""
    n = tl.full([], 0, tl.int32)
    low = tl.full([], 1 << 40, tl.int64)
    high = tl.full([], -(1 << 40), tl.int64)
    for chunk in range(chunks):
        held = tl.load(bins_ptr + (row * chunks + chunk) * BINS + wanted) >> COUNT
        if held > 0:
            i = chunk * CHUNK + tl.arange(0, CHUNK)
            x = load_logits(logits_ptr, row, i, VOCAB)
            scaled = tl.div_rn(x, temperature)
            inside = (bins_of(scaled, top) == wanted) & (i < VOCAB)
            place = n + tl.cumsum(inside.to(tl.int32), 0) - 1
            tl.store(found_ptr + row * VOCAB + place, scaled, mask=inside)
            order = order_of(scaled)
            low = tl.minimum(low, tl.min(tl.where(inside, order, 1 << 40), 0))
            high = tl.maximum(high, tl.max(tl.where(inside, order, -(1 << 40)), 0))
            n += tl.sum(inside.to(tl.int32), 0)
    tl.debug_barrier()
    return n, low, high


@triton.jit
def _above(found_ptr, n, order, top, TILE: tl.constexpr):
    """How many of those found come behind this place in order, and their weight."""
    count = tl.full([], 0, tl.int32)
    weight = tl.full([], 0, tl.int64)
    for start in range(0, n, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(found_ptr + i, mask=i < n, other=-float("inf"))
        beyond = (order_of(x) > order) & (i < n)
        count += tl.sum(beyond.to(tl.int32), 0)
        weight += tl.sum(tl.where(beyond, weights_of(x, top), 0), 0)
    return count, weight


@triton.jit
def _number_at(found_ptr, n, order, TILE: tl.constexpr):
    """The number found that has this place in order."""
    number = tl.full([], float("inf"), tl.float32)
    for start in range(0, n, TILE):
        i = start + tl.arange(0, TILE)
        x = tl.load(found_ptr + i, mask=i < n, other=float("inf"))
        number = tl.minimum(number, tl.min(tl.where(order_of(x) >= order, x, float("inf")), 0))
    return number


@triton.jit
def _threshold(
    logits_ptr,
    bins_ptr,
    found_ptr,
    row,
    k,
    p,
    top,
    temperature,
    VOCAB,
    chunks,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    TILE: tl.constexpr,
):
    """The smallest scaled logit that top-k and then top-p keep."""
    b = tl.arange(0, BINS)
    c = tl.arange(0, CHUNKS)
    at = (row * chunks + c)[:, None] * BINS + b[None, :]
    sums = tl.load(bins_ptr + at, mask=c[:, None] < chunks, other=0)
    counts = tl.sum(sums >> COUNT, 0)
    weights = tl.sum(sums & BELOW, 0)
    total = tl.sum(weights, 0)
    floor = tl.full([], -float("inf"), tl.float32)
    if k > 0:
        # The k-th largest is in the first bin with which there are k.
        wanted = tl.sum((tl.cumsum(counts, 0) < k).to(tl.int32), 0)
        before = tl.sum(tl.where(b < wanted, counts, 0), 0)
        weight_before = tl.sum(tl.where(b < wanted, weights, 0), 0)
        n, low, high = _collect(
            logits_ptr, bins_ptr, found_ptr, row, wanted, top, temperature, VOCAB, chunks, CHUNK
        )
        found = found_ptr + row * VOCAB
        while low < high:  # the smallest place behind which fewer than k come
            middle = low + (high - low) // 2
            count, _ = _above(found, n, middle, top, TILE)
            if before + count < k:
                high = middle
            else:
                low = middle + 1
        floor = _number_at(found, n, low, TILE)
        count, weight = _above(found, n, low, top, TILE)
        rest = k.to(tl.int64) - before - count  # of those that equal it
        total = weight_before + weight + rest * weights_of(floor, top)
        tl.debug_barrier()
    if p < 1:
        share = p * total.to(tl.float64)
        wanted = tl.sum((tl.cumsum(weights, 0).to(tl.float64) < share).to(tl.int32), 0)
        wanted = tl.minimum(wanted, BINS - 1)
        weight_before = tl.sum(tl.where(b < wanted, weights, 0), 0)
        n, low, high = _collect(
            logits_ptr, bins_ptr, found_ptr, row, wanted, top, temperature, VOCAB, chunks, CHUNK
        )
        found = found_ptr + row * VOCAB
        while low < high:  # the smallest place behind which less than the share comes
            middle = low + (high - low) // 2
            _, weight = _above(found, n, middle, top, TILE)
            if (weight_before + weight).to(tl.float64) < share:
                high = middle
            else:
                low = middle + 1
        floor = tl.maximum(floor, _number_at(found, n, low, TILE))
    return floor


@kernel()
def choose_kernel(
    logits_ptr,
    params_ptr,
    peaks_ptr,
    places_ptr,
    weights_ptr,
    bins_ptr,
    found_ptr,
    slots_ptr,
    last_ptr,
    out_ptr,
    VOCAB,
    chunks,
    stride,
    CHUNK: tl.constexpr,
    CHUNKS: tl.constexpr,
    DRAWN: tl.constexpr,
    FILTERED: tl.constexpr,
    KEPT: tl.constexpr,
    TILE: tl.constexpr,
):
    """One row's token: the likeliest, or the first whose weights up to it exceed uniform * total.

    -1 where the logits are not finite. With KEPT `last[slot]` becomes the token, 0 for none.
    """
    row = tl.program_id(0).to(tl.int64)
    c = tl.arange(0, CHUNKS)
    valid = c < chunks
    peaks = tl.load(peaks_ptr + row * chunks + c, mask=valid, other=-float("inf"))
    places = tl.load(places_ptr + row * chunks + c, mask=valid, other=VOCAB)
    broken = tl.sum((peaks != peaks).to(tl.int32), 0)
    peak = tl.max(peaks, 0)
    token = tl.min(tl.where(peaks == peak, places, VOCAB), 0)
    finite = (broken == 0) & (tl.abs(peak) < float("inf"))
    token = tl.where(finite, token, -1)
    if DRAWN:
        temperature = tl.load(params_ptr + row).to(tl.float32)
        if finite & (temperature > 0):
            k = tl.load(params_ptr + stride + row)
            p = tl.load(params_ptr + 2 * stride + row)
            min_p = tl.load(params_ptr + 3 * stride + row).to(tl.float32)
            uniform = tl.load(params_ptr + 4 * stride + row)
            top = tl.div_rn(peak, temperature)
            floor = tl.full([], -float("inf"), tl.float32)
            if min_p > 0:
                floor = top + tl.log(min_p)
            weights = tl.zeros([CHUNKS], tl.int64)
            searched = False
            if FILTERED:
                searched = (k > 0) | (p < 1)
                if searched:
                    smallest = _threshold(
                        logits_ptr,
                        bins_ptr,
                        found_ptr,
                        row,
                        k,
                        p,
                        top,
                        temperature,
                        VOCAB,
                        chunks,
                        CHUNK,
                        CHUNKS,
                        TILE,
                    )
                    floor = tl.maximum(floor, smallest)
                    for chunk in range(chunks):
                        highest = tl.load(peaks_ptr + row * chunks + chunk)
                        if tl.div_rn(highest, temperature) >= floor:
                            i = chunk * CHUNK + tl.arange(0, CHUNK)
                            x = load_logits(logits_ptr, row, i, VOCAB)
                            scaled = tl.div_rn(x, temperature)
                            kept = tl.where(scaled >= floor, weights_of(scaled, top), 0)
                            weights = tl.where(c == chunk, tl.sum(kept, 0), weights)
            if not searched:
                weights = tl.load(weights_ptr + row * chunks + c, mask=valid, other=0)
            total = tl.sum(weights, 0)
            target = tl.minimum((uniform * total.to(tl.float64)).to(tl.int64), total - 1)
            chosen = tl.sum((tl.cumsum(weights, 0) <= target).to(tl.int32), 0)
            target -= tl.sum(tl.where(c < chosen, weights, 0), 0)
            i = chosen * CHUNK + tl.arange(0, CHUNK)
            x = load_logits(logits_ptr, row, i, VOCAB)
            scaled = tl.div_rn(x, temperature)
            kept = tl.where(scaled >= floor, weights_of(scaled, top), 0)
            token = chosen * CHUNK + tl.sum((tl.cumsum(kept, 0) <= target).to(tl.int32), 0)
    tl.store(out_ptr + row, token.to(tl.int64))
    if KEPT:
        slot = tl.load(slots_ptr + row)
        tl.store(last_ptr + slot, tl.maximum(token, 0).to(tl.int64))
