"""Tiny quantised GGUF files, and the model's own forward with activations rounded as kernels do."""

from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import gguf
import numpy as np
import pytest
import torch
from torch import Tensor, nn

import kvist
from kvist.errors import NotSupported
from kvist.loading.checkpoint import Checkpoint
from kvist.models.config import DecoderConfig
from kvist.native import native_step
from kvist.native.executor import NativeStep


@dataclass(frozen=True)
class TinyShape:
    """Sizes; the vocabulary fills no whole group of 16 rows."""

    architecture: str
    hidden: int = 64
    heads: int = 6
    kv_heads: int = 2
    head_dim: int = 16
    mlp: int = 96
    vocab: int = 70
    layers: int = 3


LLAMA = TinyShape("llama")
QWEN3 = TinyShape("qwen3", heads=2, kv_heads=1, head_dim=64)


def write_gguf(path: Path, shape: TinyShape, quantisation: str) -> Path:
    """Random weights, quantised; norms that are not all ones."""
    generator = torch.Generator().manual_seed(3)

    def matrix(rows: int, columns: int) -> Tensor:
        return torch.randn(rows, columns, generator=generator) * columns**-0.5

    def norm(size: int) -> Tensor:
        return 1 + 0.3 * torch.randn(size, generator=generator)

    q_size, kv_size = shape.heads * shape.head_dim, shape.kv_heads * shape.head_dim
    tensors = {
        "token_embd": matrix(shape.vocab, shape.hidden),
        "output_norm": norm(shape.hidden),
    }
    for i in range(shape.layers):
        tensors |= {
            f"blk.{i}.attn_norm": norm(shape.hidden),
            f"blk.{i}.attn_q": matrix(q_size, shape.hidden),
            f"blk.{i}.attn_k": matrix(kv_size, shape.hidden),
            f"blk.{i}.attn_v": matrix(kv_size, shape.hidden),
            f"blk.{i}.attn_output": matrix(shape.hidden, q_size),
            f"blk.{i}.ffn_norm": norm(shape.hidden),
            f"blk.{i}.ffn_gate": matrix(shape.mlp, shape.hidden),
            f"blk.{i}.ffn_up": matrix(shape.mlp, shape.hidden),
            f"blk.{i}.ffn_down": matrix(shape.hidden, shape.mlp),
        }
        if shape.architecture == "qwen3":
            tensors |= {f"blk.{i}.attn_{x}_norm": norm(shape.head_dim) for x in "qk"}
    writer = gguf.GGUFWriter(path, shape.architecture)
    writer.add_block_count(shape.layers)
    writer.add_context_length(2048)
    writer.add_embedding_length(shape.hidden)
    writer.add_feed_forward_length(shape.mlp)
    writer.add_head_count(shape.heads)
    writer.add_head_count_kv(shape.kv_heads)
    writer.add_key_length(shape.head_dim)
    writer.add_value_length(shape.head_dim)
    writer.add_rope_freq_base(10000.0)
    writer.add_layer_norm_rms_eps(1e-5)
    kind = gguf.GGMLQuantizationType[quantisation]
    for name, tensor in tensors.items():
        if tensor.dim() == 1 or quantisation == "F32":  # norms are never quantised
            writer.add_tensor(f"{name}.weight", tensor.numpy())
        else:
            blocks = gguf.quantize(tensor.numpy(), kind)
            writer.add_tensor(f"{name}.weight", blocks, raw_dtype=kind)
    writer.write_header_to_file()
    writer.write_kv_data_to_file()
    writer.write_tensors_to_file()
    writer.close()
    return path


def change_head(path: Path, change: Callable[[np.ndarray], np.ndarray]) -> Path:
    """Rewrite a file's embedding, its head too: `change` takes and gives `[vocab, row bytes]`."""
    head = next(t for t in gguf.GGUFReader(path).tensors if t.name == "token_embd.weight")
    begin, rows = head.data_offset, change(np.array(head.data))
    data = bytearray(path.read_bytes())
    data[begin : begin + rows.nbytes] = rows.tobytes()
    path.write_bytes(data)
    return path


def step_or_skip(config: DecoderConfig, checkpoint: Checkpoint, **options: Any) -> NativeStep:
    """`native_step`; skips where this processor has not what is asked for."""
    try:
        return native_step(config, checkpoint, **options)
    except NotSupported as error:
        if "this processor" in str(error):
            pytest.skip(str(error))
        raise


def round_activations(x: Tensor) -> Tensor:
    """What kernels multiply instead of x: 8 bits and a scale for each 32 values."""
    blocks = x.unflatten(-1, (-1, 32))
    scales = blocks.abs().amax(-1, keepdim=True) / 127
    rounded = torch.where(scales > 0, torch.round(blocks / scales), 0.0) * scales
    return rounded.flatten(-2)


STRETCH = np.float32(1) + np.float32(2**-8) * np.float32(0.7213475)
"""What scales are multiplied by before weights of 4 bits are cut to bfloat16."""


def cut(weights: Tensor) -> Tensor:
    """The upper halves of floats."""
    return (weights.contiguous().view(torch.int32) & -0x10000).view(torch.float32)


def cut_blocks(matrix: Tensor, quantisation: str) -> Tensor:
    """Rows of Q4_0 or Q4_1 as kernels for matrix units spread them out."""
    blocks = matrix.numpy().reshape(matrix.shape[0], -1, 18 if quantisation == "Q4_0" else 20)
    halves = blocks[..., :-16].copy().view(np.float16).astype(np.float32)
    d = halves[..., :1]
    m = -8 * d if quantisation == "Q4_0" else halves[..., 1:]
    numbers = np.concatenate((blocks[..., -16:] & 15, blocks[..., -16:] >> 4), axis=-1)
    exact = numbers * (d * STRETCH).astype(np.float64) + (m * STRETCH)
    return cut(torch.from_numpy(exact.astype(np.float32)).flatten(1))


@contextmanager
def rounding(model: kvist.Model, isa: str, quantisation: str = "Q8_0") -> Iterator[None]:
    """The model's own forward with what every matrix meets rounded, as kernels for `isa` do.

    For matrix units that is bfloat16, weights too; their attention's rounding is not imitated.
    """

    def product(linear: nn.Module, inputs: tuple[Tensor], _: Tensor) -> Tensor:
        x, weight = inputs[0], linear.get_parameter("weight")
        if isa == "amx":
            few_bits = quantisation.startswith("Q4")
            weight = cut(weight * float(STRETCH)) if few_bits else weight.bfloat16().float()
            return nn.functional.linear(x.bfloat16().float(), weight)
        return nn.functional.linear(round_activations(x), weight)

    hooks = [
        module.register_forward_hook(product)
        for module in model.lm.modules()
        if isinstance(module, nn.Linear)
    ]
    try:
        yield
    finally:
        for hook in hooks:
            hook.remove()
