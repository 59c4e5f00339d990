"""Launches of the log-probability kernels: no float32 copy of the logits, no word to the host.

The same numbers as `runner.sampler.logprobs_later`, which is their reference. Imports Triton.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from kvist.kernels.jit import cdiv, next_power_of_2
from kvist.kernels.logprob_kernels import chunk_kernel, row_kernel

CHUNK = 4096  # tokens of a program


class Logprobs(NamedTuple):
    """What is known of R tokens, each at a place of its own.

    Args:
        own: `[R]` float32, log-probabilities.
        ranks: `[R]` int32, 1 for the likeliest; equally likely tokens share a rank.
        ids: `[R, top]` int32, the likeliest tokens, likeliest first; of equals the lower id.
        values: `[R, top]` float32, theirs.
    """

    own: Tensor
    ranks: Tensor
    ids: Tensor
    values: Tensor


def logprobs(
    logits: Tensor, rows: Tensor, tokens: Tensor, top: int, *, chunk: int = CHUNK
) -> Logprobs:
    """Log-probabilities of tokens, and the likeliest beside each.

    Args:
        logits: `[any, vocab]` of any floating-point dtype, contiguous.
        rows: `[R]` int64, the row of logits that each token is from.
        tokens: `[R]` int64.
        top: how many alternatives, at most the vocabulary.
        chunk: tokens that a program reads, a power of two.
    """
    vocab, count, device = logits.shape[-1], len(tokens), logits.device
    chunks = cdiv(vocab, chunk)
    peaks, sums = (torch.empty(count, chunks, dtype=torch.float32, device=device) for _ in "ab")
    above = torch.empty(count, chunks, dtype=torch.int32, device=device)
    values = torch.empty(count, chunks, top, dtype=torch.float32, device=device)
    ids = torch.empty(count, chunks, top, dtype=torch.int32, device=device)
    found = Logprobs(
        torch.empty(count, dtype=torch.float32, device=device),
        torch.empty(count, dtype=torch.int32, device=device),
        torch.empty(count, top, dtype=torch.int32, device=device),
        torch.empty(count, top, dtype=torch.float32, device=device),
    )
    if not count:
        return found
    parts = peaks, sums, above, values, ids
    chunk_kernel[(chunks, count)](
        logits, rows, tokens, *parts, vocab, top, CHUNK=chunk, num_warps=4
    )
    row_kernel[(count,)](
        logits,
        rows,
        tokens,
        *parts,
        found.own,
        found.ranks,
        found.values,
        found.ids,
        vocab,
        chunks,
        top,
        CHUNKS=next_power_of_2(chunks),
        CANDIDATES=next_power_of_2(max(1, chunks * top)),
        num_warps=4,
    )
    return found
