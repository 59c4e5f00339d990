"""What the planes of a codec look like to a kernel: number format, scales, what stands in a byte.

A codec whose planes are laid out like one of these is read in place by every attention kernel,
whatever basis it writes in; others are gathered and decoded by torch. Nothing here imports Triton.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from kvist.cache.codecs import fp8
from kvist.cache.codecs.int4 import Int4
from kvist.cache.codecs.int8 import Int8
from kvist.cache.codecs.layered import Layered
from kvist.cache.codecs.plain import Plain
from kvist.cache.codecs.quantized import Quantized
from kvist.cache.protocol import Codec

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
    if kind != FP8 and head_dim < 32:  # tensor cores take 16 channels of each half at least
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


@dataclass(frozen=True)
class Encoding:
    """How kernels write a layer: planes hold the codec's own bits afterwards.

    Args:
        mean: `[kv_heads, head_dim]` float32, taken away from keys first; None for none.
        keys_rotated: whether keys, and so queries, are in the Hadamard basis.
        values_rotated: whether values, and so attention's output, are.
    """

    mean: Tensor | None = None
    keys_rotated: bool = False
    values_rotated: bool = False


def read_encoding(codec: Codec, layer_idx: int, head_dim: int) -> Encoding | None:
    """How kernels write what this codec writes, or None where they cannot."""
    if isinstance(codec, Layered):
        codec = codec.of(layer_idx)
    if isinstance(codec, Plain):
        return Encoding()
    if not isinstance(codec, Quantized):
        return None
    for coder in (codec.key, codec.value):
        # Each half of the channels has groups of its own.
        groups = isinstance(coder, Int4) and coder.group == 32 and head_dim % 64 == 0
        if not (groups or isinstance(coder, Int8 | fp8.FP8)):
            return None
    mean = None if codec.centre is None else codec.centre.key_means[layer_idx]
    return Encoding(mean, codec.key.rotated, codec.value.rotated)
