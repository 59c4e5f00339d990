"""The Hadamard basis: rotation that spreads a channel's outliers over a whole head.

Numbers written with few bits share a scale, so one large channel costs all others their precision.
In the Hadamard basis every channel is a sum of all with signs +1 and -1, and none stands out
(QuaRot: Ashkboos et al., 2024). Codecs encode in this basis; kernels bring queries into it, and
attention's output back, and never rotate the cache itself.

H is symmetric and has the entries +1 and -1 times a power of two, so that whole numbers stay whole:
orthonormal for p = 4, 16, 64 ..., and otherwise short of it by a factor of two, that its inverse
makes up for.
"""

from functools import lru_cache

import torch
from torch import Tensor

_SIGNIFICAND = 24  # bits of a float32's significand: whole numbers up to 2**24 are exact


def block_size(head_dim: int) -> int:
    """p, the largest power of two that divides head_dim; H is block-diagonal with blocks of p."""
    return head_dim & -head_dim


def rotate(x: Tensor) -> Tensor:
    """`x H` for `[..., head_dim]`, in x's own precision."""
    return _times_matrix(x, inverse=False)


def unrotate(x: Tensor) -> Tensor:
    """The inverse of `rotate`; also its transpose's, so that scores are kept."""
    return _times_matrix(x, inverse=True)


def rotate_exactly(x: Tensor) -> Tensor:
    """`x H` for float32 `[..., head_dim]`, the same bits for a token whatever stands beside it.

    Matrix products add in an order that depends on their shape, so a token encoded alone could
    differ in its last bits from the same token in a batch. Here each head is first rounded to whole
    multiples of a power of two, at most 2**24 / p of them: every partial sum is then a whole number
    that float32 holds exactly, and the order does not matter. For p = 64 the rounding is 2**-18 of
    the head's largest channel, far below what any codec keeps.

    Returns:
        float32 whose elements are, within a head, whole multiples of one power of two, at most
        2**24 of them.
    """
    bits = _SIGNIFICAND + 1 - block_size(x.shape[-1]).bit_length()
    largest = x.abs().amax(dim=-1, keepdim=True)
    # A float32's exponent stands 23 bits up, 127 too large: largest < 2**(exponent - 126). Times
    # 2**shift, |x| is at most 2**bits. Clamped so that the way back is a normal number, too.
    exponent = largest.view(torch.int32) >> 23
    shift = (bits + 126 - exponent).clamp(max=126)
    there = ((shift + 127) << 23).view(torch.float32)
    back = ((127 - shift) << 23).view(torch.float32)
    return rotate((x * there).round_()) * back


def _times_matrix(x: Tensor, *, inverse: bool) -> Tensor:
    p = block_size(x.shape[-1])
    matrix = _hadamard(p, inverse, x.dtype, x.device)
    if p == x.shape[-1]:
        return x @ matrix
    blocks = x.unflatten(-1, (-1, p)) @ matrix
    return blocks.flatten(-2)  # type: ignore[no-any-return]


@lru_cache(maxsize=64)
@torch.inference_mode(False)
def _hadamard(size: int, inverse: bool, dtype: torch.dtype, device: torch.device) -> Tensor:
    """Sylvester's matrix, `[size, size]`, of entries +-1 / 2**(log2(size) / 2), or its inverse."""
    matrix = torch.ones(1, 1)
    while matrix.shape[0] < size:
        matrix = torch.cat((torch.cat((matrix, matrix), 1), torch.cat((matrix, -matrix), 1)))
    doublings = size.bit_length() - 1
    halvings = doublings - doublings // 2 if inverse else doublings // 2
    return (matrix / (1 << halvings)).to(dtype=dtype, device=device)
