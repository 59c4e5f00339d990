"""Quantised GGUF blocks to floating point, vectorised in torch on whatever device they are on.

Bit for bit what the `gguf` package computes (a test compares them), about five times as fast. It
knows blocks only; rows, names and files are `gguf`'s business.

Block layouts: https://github.com/ggml-org/llama.cpp/blob/master/ggml/src/ggml-common.h
"""

from collections.abc import Callable, Mapping
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from kvist.loading.gguf_format import BLOCKS

__all__ = ["FLOAT_TYPES", "dequantize"]

FLOAT_TYPES: Mapping[str, torch.dtype] = {
    "F32": torch.float32,
    "F16": torch.float16,
    "BF16": torch.bfloat16,
}

# Elements that are decoded at a time. On a CPU a chunk's temporaries stay in the cache, and no
# chunk is large enough for torch to start threads of its own: thousands of small parallel regions
# cost seconds on a busy machine (30 s for SmolLM2, measured), while plain threads over many chunks
# just take turns. On a GPU launches are what costs.
_CHUNK_CPU = 1 << 15
_CHUNK_GPU = 1 << 26
_CHUNKS_WORTH_A_THREAD = 16


def dequantize(raw: Tensor, type_name: str, dtype: torch.dtype = torch.float32) -> Tensor:
    """Decode rows of blocks.

    Args:
        raw: uint8 `[..., bytes per row]`, whole blocks.
        type_name: ggml's name, such as "Q4_1"; a key of `BLOCKS` that is not a float type.
        dtype: what to round to; decoding itself is done in float32.

    Returns:
        `[..., elements per row]`, a tensor of its own memory on raw's device.
    """
    elements, nbytes = BLOCKS[type_name]
    decode = _DECODERS[type_name]
    blocks = raw.reshape(-1, nbytes)
    out = torch.empty(blocks.shape[0], elements, dtype=dtype, device=raw.device)
    on_cpu = raw.device.type == "cpu"
    step = (_CHUNK_CPU if on_cpu else _CHUNK_GPU) // elements

    inference = torch.is_inference_mode_enabled()  # which is a thread's own

    def decode_span(first: int, last: int) -> None:
        with torch.inference_mode(inference):
            for start in range(first, last, step):
                stop = min(start + step, last)
                out[start:stop] = decode(blocks[start:stop])

    num_chunks = -(-blocks.shape[0] // step)
    workers = min(torch.get_num_threads(), num_chunks // _CHUNKS_WORTH_A_THREAD) if on_cpu else 1
    if workers < 2:
        decode_span(0, blocks.shape[0])
    else:
        span = -(-num_chunks // workers) * step
        firsts = range(0, blocks.shape[0], span)
        with ThreadPoolExecutor(workers) as pool:
            lasts = [min(first + span, blocks.shape[0]) for first in firsts]
            list(pool.map(decode_span, firsts, lasts))
    return out.view(*raw.shape[:-1], raw.shape[-1] // nbytes * elements)


def _half(blocks: Tensor, start: int) -> Tensor:
    """The float16 at a byte offset of each block, `[blocks, 1]` float32."""
    return blocks[:, start : start + 2].contiguous().view(torch.float16).float()


def _nibbles(packed: Tensor) -> Tensor:
    """`[..., n]` bytes to `[..., 2n]`: all low halves, then all high halves."""
    return torch.cat((packed & 15, packed >> 4), dim=-1)


def _fifth_bits(blocks: Tensor, start: int) -> Tensor:
    """32 bits at a byte offset as `[blocks, 32]` of 0 or 16, for element i bit i."""
    shifts = torch.arange(8, dtype=torch.uint8, device=blocks.device)
    bits = (blocks[:, start : start + 4, None] >> shifts) & 1
    return bits.flatten(1) << 4


def _q4_0(blocks: Tensor) -> Tensor:
    # half scale, 16 bytes of nibbles
    return _nibbles(blocks[:, 2:]).float().sub_(8).mul_(_half(blocks, 0))


def _q4_1(blocks: Tensor) -> Tensor:
    # half scale, half minimum, 16 bytes of nibbles
    return _nibbles(blocks[:, 4:]).float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q5_0(blocks: Tensor) -> Tensor:
    # half scale, 4 bytes of fifth bits, 16 bytes of nibbles
    q = _nibbles(blocks[:, 6:]) | _fifth_bits(blocks, 2)
    return q.float().sub_(16).mul_(_half(blocks, 0))


def _q5_1(blocks: Tensor) -> Tensor:
    # half scale, half minimum, 4 bytes of fifth bits, 16 bytes of nibbles
    q = _nibbles(blocks[:, 8:]) | _fifth_bits(blocks, 4)
    return q.float().mul_(_half(blocks, 0)).add_(_half(blocks, 2))


def _q8_0(blocks: Tensor) -> Tensor:
    # half scale, 32 signed bytes
    return blocks[:, 2:].view(torch.int8).float().mul_(_half(blocks, 0))


def _sub_scales(packed: Tensor) -> tuple[Tensor, Tensor]:
    """The K-types' 12 bytes of eight 6-bit scales and eight 6-bit minimums, each `[blocks, 8, 1]`.

    Bytes 0-3 hold scales 0-3, bytes 4-7 minimums 0-3, in the low six bits; the nibbles of bytes
    8-11 are the low four bits of scales and minimums 4-7, whose upper two are the spare top bits.
    """
    first, second, third = packed[:, 0:4], packed[:, 4:8], packed[:, 8:12]
    scales = torch.cat((first & 63, (third & 15) | ((first >> 6) << 4)), dim=1)
    minimums = torch.cat((second & 63, (third >> 4) | ((second >> 6) << 4)), dim=1)
    return scales.float().unsqueeze(-1), minimums.float().unsqueeze(-1)


def _scaled_k(blocks: Tensor, q: Tensor) -> Tensor:
    """Q4_K and Q5_K: half scale, half minimum, 12 bytes of sub-scales; q is `[blocks, 8, 32]`."""
    scales, minimums = _sub_scales(blocks[:, 4:16])
    scales.mul_(_half(blocks, 0).unsqueeze(-1))
    minimums.mul_(_half(blocks, 2).unsqueeze(-1))
    return q.float().mul_(scales).sub_(minimums).flatten(1)


def _q4_k(blocks: Tensor) -> Tensor:
    # ..., 128 bytes: each 32 hold 64 elements, low halves first
    return _scaled_k(blocks, _nibbles(blocks[:, 16:].unflatten(1, (4, 32))).view(-1, 8, 32))


def _q5_k(blocks: Tensor) -> Tensor:
    # ..., 32 bytes of fifth bits (bit g belongs to group g), then nibbles as in Q4_K
    groups = torch.arange(8, dtype=torch.uint8, device=blocks.device).view(1, 8, 1)
    high = (blocks[:, 16:48].unsqueeze(1) >> groups) & 1
    low = _nibbles(blocks[:, 48:].unflatten(1, (4, 32))).view(-1, 8, 32)
    return _scaled_k(blocks, low | (high << 4))


def _q6_k(blocks: Tensor) -> Tensor:
    # 128 bytes of low nibbles, 64 of upper bit pairs, 16 signed scales, half scale. Each half of
    # the block (64, 32 and 8 bytes of these) holds 128 elements in four runs of 32.
    low = _nibbles(blocks[:, :128].unflatten(1, (2, 64)))
    shifts = torch.tensor([0, 2, 4, 6], dtype=torch.uint8, device=blocks.device).view(1, 1, 4, 1)
    high = (blocks[:, 128:192].unflatten(1, (2, 1, 32)) >> shifts) & 3
    q: Tensor = (low.view(-1, 16, 16) | (high << 4).view(-1, 16, 16)).float().sub_(32)
    scales = blocks[:, 192:208].contiguous().view(torch.int8).float().mul_(_half(blocks, 208))
    return q.mul_(scales.unsqueeze(-1)).flatten(1)


_DECODERS: Mapping[str, Callable[[Tensor], Tensor]] = {
    "Q4_0": _q4_0,
    "Q4_1": _q4_1,
    "Q5_0": _q5_0,
    "Q5_1": _q5_1,
    "Q8_0": _q8_0,
    "Q4_K": _q4_k,
    "Q5_K": _q5_k,
    "Q6_K": _q6_k,
}
