"""Launches of the sampling kernels: rows of logits to tokens, without a sort or a word to the host.

The same thresholds, order and draws as `runner.sampler`, which is their reference. Imports Triton.
"""

import torch
from torch import Tensor

from kvist.kernels.jit import cdiv, next_power_of_2
from kvist.kernels.sampling_kernels import BINS, choose_kernel, peak_kernel, weight_kernel

CHUNK = 4096  # tokens of a program; the packed sums of a bin allow no more
PARAMS = 5  # temperature, k, p, min-p, uniform


def sample(
    logits: Tensor,
    params: Tensor | None,
    out: Tensor,
    *,
    filtered: bool = True,
    slots: Tensor | None = None,
    last: Tensor | None = None,
    chunk: int = CHUNK,
) -> None:
    """Each row's next token.

    Args:
        logits: `[R, vocab]` of any floating-point dtype, contiguous.
        params: `[5, at least R]` float64: temperature (0: the likeliest), k (0: all), p (1: all),
            min-p (0: all) and a uniform number in [0, 1) for each row; None: all rows greedy.
        out: `[R]` int64, written; -1 where a row is not finite.
        filtered: whether any row has a k or a p.
        slots: `[R]` int64, with `last`.
        last: `[slots]` int64; `last[slots[r]]` becomes row r's token, 0 where it has none.
        chunk: tokens that a program reads, a power of two.
    """
    rows, vocab = logits.shape
    chunks = cdiv(vocab, chunk)
    device = logits.device
    peaks = torch.empty(rows, chunks, dtype=torch.float32, device=device)
    places = torch.empty(rows, chunks, dtype=torch.int32, device=device)
    drawn, filtered = params is not None, params is not None and filtered
    weights = torch.empty(rows, chunks, dtype=torch.int64, device=device) if drawn else peaks
    bins, found = weights, logits
    if filtered:
        bins = torch.empty(rows, chunks, BINS.value, dtype=torch.int64, device=device)
        found = torch.empty(rows, vocab, dtype=torch.float32, device=device)
    peak_kernel[(chunks, rows)](logits, peaks, places, vocab, CHUNK=chunk, num_warps=4)
    width = next_power_of_2(chunks)
    if params is not None:
        weight_kernel[(chunks, rows)](
            logits,
            params,
            peaks,
            weights,
            bins,
            vocab,
            chunks,
            params.stride(0),
            CHUNK=chunk,
            CHUNKS=width,
            FILTERED=filtered,
            num_warps=4,
        )
    choose_kernel[(rows,)](
        logits,
        peaks if params is None else params,
        peaks,
        places,
        weights,
        bins,
        found,
        out if slots is None else slots,
        out if last is None else last,
        out,
        vocab,
        chunks,
        0 if params is None else params.stride(0),
        CHUNK=chunk,
        CHUNKS=width,
        DRAWN=drawn,
        FILTERED=filtered,
        KEPT=last is not None,
        TILE=min(chunk, 1024),
        num_warps=8,
    )
