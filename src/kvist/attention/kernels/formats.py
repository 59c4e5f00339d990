"""What the planes of a codec look like to a kernel: number format, scales, what stands in a byte.

A codec whose planes are laid out like one of these is read in place by every attention kernel,
whatever basis it writes in; others are gathered and decoded by torch. Nothing here imports Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

# Number formats, as the kernels know them; integers last.
PLAIN, FP8, INT8, INT4 = 0, 1, 2, 3

_KINDS = {
    torch.float32: PLAIN,
    torch.bfloat16: PLAIN,
    torch.float16: PLAIN,
    torch.float8_e4m3fn: FP8,
    torch.int8: INT8,
    torch.uint8: INT4,
}


@dataclass(frozen=True)
class Format:
    """One side's planes, `[blocks, block_size, kv_heads, ...]`, each contiguous.

    Args:
        kind: PLAIN, FP8, INT8 or INT4.
        values: `[..., head_dim]`; INT4 `[..., head_dim / 2]`, where byte i has channel i in its
            low and channel i + head_dim / 2 in its high four bits, unsigned.
        scales: float16, what numbers are multiplied by: FP8 and INT8 `[...]`, INT4
            `[..., groups]` of consecutive channels; None for PLAIN.
        zeros: INT4's alone, like its scales: what is added to the product.
        groups: scales of a head.
    """

    kind: int
    values: Tensor
    scales: Tensor | None = None
    zeros: Tensor | None = None
    groups: int = 1


def read_format(planes: Mapping[str, Tensor], head_dim: int) -> Format | None:
    """How kernels read these planes, or None where they cannot."""
    values, scales, zeros = planes.get("x"), planes.get("scale"), planes.get("zero")
    if values is None or len(planes) != 1 + (scales is not None) + (zeros is not None):
        return None
    kind = _KINDS.get(values.dtype)
    if kind is None or values.shape[3] != (head_dim // 2 if kind == INT4 else head_dim):
        return None
    if kind == PLAIN:
        return Format(kind, values) if scales is None and zeros is None else None
    if scales is None or scales.dtype != torch.float16:
        return None
    if kind != INT4:
        return Format(kind, values, scales) if scales.dim() == 3 and zeros is None else None
    # The two halves of the channels must not share a group, unless there is one only.
    groups = scales.shape[3] if scales.dim() == 4 else 0
    if zeros is None or zeros.dtype != torch.float16 or zeros.shape != scales.shape:
        return None
    if not groups or (groups > 1 and groups % 2) or groups & (groups - 1):
        return None
    return Format(kind, values, scales, zeros, groups)
