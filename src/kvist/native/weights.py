"""From a GGUF checkpoint to weights that the compiled library can multiply with.

Blocks go from the mapped file straight into the library's own order; no float copy of a matrix is
ever made, and the file's pages are given back as soon as they are packed. What the library cannot
run is refused here by name, before anything is packed.
"""

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from pathlib import Path
from typing import Protocol

import torch
from torch import Tensor

from kvist.errors import KvistError, NotSupported
from kvist.models.config import DecoderConfig
from kvist.models.rope import rope_frequencies
from kvist.native.library import Shape, isa_bytes, library

__all__ = ["PackedModel", "QuantizedWeights", "pack_model"]

# ggml's name -> (the library's `Stored`, its `Kind`).
STORED = {"Q4_0": (0, 0), "Q4_1": (1, 0), "Q8_0": (2, 1)}
STORED_FLOATS = {torch.float32: 3, torch.float16: 4, torch.bfloat16: 5}

_LAYER_MATRICES = (
    "self_attn.q_proj",
    "self_attn.k_proj",
    "self_attn.v_proj",
    "self_attn.o_proj",
    "mlp.gate_proj",
    "mlp.up_proj",
    "mlp.down_proj",
)
_LAYER_NORMS = ("input_layernorm", "post_attention_layernorm")
_HEAD_NORMS = ("self_attn.q_norm", "self_attn.k_norm")
_EMBEDDING = "model.embed_tokens.weight"


class Blocks(Protocol):
    """A matrix as it was quantised; `kvist.loading.gguf.QuantizedTensor` is one."""

    @property
    def type(self) -> str:
        """Its name in ggml, such as "Q4_1"."""

    @property
    def data(self) -> Tensor:
        """Uint8 `[rows, bytes per row]`."""

    @property
    def shape(self) -> tuple[int, ...]:
        """`(rows, columns)` of the matrix that it stands for."""


class QuantizedWeights(Protocol):
    """Where weights come from; `kvist.loading.gguf.GGUFCheckpoint` is such a place."""

    @property
    def path(self) -> Path:
        """For messages."""

    def quantized(self, name: str) -> Blocks | None:
        """A matrix's blocks, None where it is stored in floats."""

    def tensor(self, name: str, *, dtype: torch.dtype | None = None) -> Tensor:
        """A tensor in floats."""


@dataclass(frozen=True, eq=False)
class PackedModel:
    """Weights in the library, with the threads that work on them; freed with this object.

    Args:
        config: whose decoder it is.
        handle: the library's own.
        padded_vocab: columns of its logits; those behind the vocabulary mean nothing.
        threads: that work on a step.
        pid: the process that they live in; a fork has none of them.
        digest: names the weights, by a sample of each.
    """

    config: DecoderConfig
    handle: int
    padded_vocab: int
    threads: int
    pid: int
    digest: str
    _kept: list[Tensor] = field(default_factory=list, repr=False)
    """Memory that the library reads and does not own: the embedding's rows."""

    @property
    def isa(self) -> str:
        """The instruction set that its kernels were chosen for."""
        name: bytes = library().kvist_model_isa(self.handle)
        return name.decode()


def pack_model(
    config: DecoderConfig,
    checkpoint: QuantizedWeights,
    *,
    threads: int,
    cpus: Sequence[int] = (),
    isa: str | None = None,
) -> PackedModel:
    """Pack a checkpoint's quantised weights.

    Args:
        config: of the model that it is a checkpoint of.
        checkpoint: has Q4_0, Q4_1 or Q8_0 matrices.
        threads: that a step runs on.
        cpus: a core for each thread to be bound to during a step; empty leaves it to the system.
        isa: an instruction set by name; None takes the best.

    Raises:
        NotSupported: another format or family, or sizes that the kernels do not run.
    """
    check_config(config)
    loaded = library()
    matrices = [
        [_quantized(checkpoint, f"model.layers.{i}.{name}.weight") for name in _LAYER_MATRICES]
        for i in range(config.num_layers)
    ]
    head_name = _EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
    head = _quantized(checkpoint, head_name)
    shape = Shape(
        layers=config.num_layers,
        hidden=config.hidden_size,
        intermediate=config.intermediate_size,
        heads=config.num_heads,
        kv_heads=config.num_kv_heads,
        head_dim=config.head_dim,
        vocab=config.vocab_size,
        qk_norm=config.qk_norm,
        norm_eps=config.rms_norm_eps,
        rotation_scale=config.rope.attention_factor,
    )
    cores = (ctypes.c_int32 * len(cpus))(*cpus)
    handle = loaded.kvist_model_new(shape, isa_bytes(isa), threads, cores, len(cpus))
    if not handle:
        raise NotSupported(f"this processor cannot run the kernels for {isa or 'any processor'}")
    digest = sha256()
    for matrix in (*(matrix for layer in matrices for matrix in layer), head):
        flat = matrix.data.reshape(-1)
        digest.update(bytes(flat[:: max(1, flat.numel() // 64)].tolist()))
    padded = -(-config.vocab_size // 16) * 16
    model = PackedModel(config, handle, padded, threads, os.getpid(), digest.hexdigest())
    weakref.finalize(model, _free, handle, model.pid)
    kinds = [STORED[matrix.type][1] for layer in matrices for matrix in layer]
    if loaded.kvist_model_lay_out(
        handle, (ctypes.c_int32 * len(kinds))(*kinds), STORED[head.type][1]
    ):
        raise KvistError(f"{checkpoint.path}: not enough memory for the packed weights")
    file_bytes = checkpoint.path.stat().st_size
    for i, layer in enumerate(matrices):
        for slot, matrix in enumerate(layer):
            _pack(handle, i, slot, matrix, file_bytes)
        names = _LAYER_NORMS + (_HEAD_NORMS if config.qk_norm else ())
        for slot, name in enumerate(names):
            weight = checkpoint.tensor(f"model.layers.{i}.{name}.weight", dtype=torch.float32)
            _vector(handle, i, slot, weight)
    _pack(handle, -1, 0, head, file_bytes)
    _vector(handle, -1, 0, checkpoint.tensor("model.norm.weight", dtype=torch.float32))
    _vector(handle, -1, 1, rope_frequencies(config.rope))
    _embedding(model, checkpoint)
    return model


def _free(handle: int, pid: int) -> None:
    """Stop the threads and give the memory back; a forked process has no threads to stop."""
    if os.getpid() == pid:
        library().kvist_model_free(handle)


def check_config(config: DecoderConfig) -> None:
    """Refuse decoders that the library does not run.

    Raises:
        NotSupported: names the feature.
    """
    group, left = divmod(config.num_heads, config.num_kv_heads)
    refused = {
        f"model_type {config.model_type!r}": config.model_type not in ("llama", "qwen3"),
        "biases": config.attention_bias or config.output_bias or config.mlp_bias,
        f"head_dim {config.head_dim}, no multiple of 16 up to 256": (
            config.head_dim % 16 or config.head_dim > 256
        ),
        f"{group} query heads for each of keys, more than 64": left or group > 64,
        "sizes that are no multiples of 32": any(
            size % 32
            for size in (
                config.hidden_size,
                config.intermediate_size,
                config.num_heads * config.head_dim,
            )
        ),
    }
    for what, is_so in refused.items():
        if is_so:
            raise NotSupported(f"the native executor does not run {what}")


def _quantized(checkpoint: QuantizedWeights, name: str) -> Blocks:
    matrix = checkpoint.quantized(name)
    if matrix is None or matrix.type not in STORED:
        kind = "unquantised" if matrix is None else matrix.type
        raise NotSupported(
            f"{checkpoint.path}: {name} is {kind}; the native executor runs {', '.join(STORED)}"
        )
    return matrix


def _pack(handle: int, layer: int, slot: int, matrix: Blocks, file_bytes: int) -> None:
    data = matrix.data.contiguous()
    library().kvist_model_pack(
        handle, layer, slot, STORED[matrix.type][0], data.data_ptr(), matrix.shape[0]
    )
    # Only pages of the mapping itself are given back: they are the file's and clean, so nothing is
    # lost. Rows that were reordered lie in memory of their own, which is smaller than the file.
    if data.untyped_storage().nbytes() == file_bytes:
        library().kvist_forget_pages(data.data_ptr(), data.nbytes)


def _vector(handle: int, layer: int, slot: int, values: Tensor) -> None:
    values = values.float().contiguous()
    library().kvist_model_vector(handle, layer, slot, values.data_ptr(), values.numel())


def _embedding(model: PackedModel, checkpoint: QuantizedWeights) -> None:
    """Rows are looked up in the mapped file itself: a step needs a few of its pages."""
    quantized = checkpoint.quantized(_EMBEDDING)
    if quantized is not None and quantized.type in STORED:
        stored, rows = STORED[quantized.type][0], quantized.data
    else:
        rows = checkpoint.tensor(_EMBEDDING)  # a float type as stored, else float32
        stored = STORED_FLOATS[rows.dtype]
    rows = rows.contiguous()
    model._kept.append(rows)
    library().kvist_model_embedding(model.handle, stored, rows.data_ptr())
