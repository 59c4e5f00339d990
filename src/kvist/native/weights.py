"""From a checkpoint to weights that the compiled library can multiply with.

Quantised blocks go from the mapped file straight into the library's own order; no float copy of a
matrix is ever made, and the file's pages are given back as soon as they are packed. Matrices in
floats are read and packed one by one. What the library cannot
run is refused here by name, before anything is packed.
"""

import ctypes
import os
import weakref
from collections.abc import Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from itertools import chain
from pathlib import Path
from typing import TYPE_CHECKING, NamedTuple, Protocol

import torch
from torch import Tensor

from kvist.errors import KvistError, NotSupported
from kvist.models.config import DecoderConfig
from kvist.models.rope import rope_frequencies
from kvist.native.library import Shape, isa_bytes, library

if TYPE_CHECKING:
    from hashlib import _Hash as Digest

__all__ = ["PackedModel", "PackedSize", "QuantizedWeights", "pack_model", "packed_size"]

# ggml's name, or a dtype -> (the library's `Stored`, its `Kind`).
STORED = {"Q4_0": (0, 0), "Q4_1": (1, 0), "Q8_0": (2, 1)}
STORED_FLOATS = {torch.float32: (3, 2), torch.float16: (4, 2), torch.bfloat16: (5, 3)}
_BLOCK_BYTES = (20, 34, 128, 64)  # of 32 numbers of a row, by kind
# Instruction sets with a coarse copy of a Q8_0 head, and its bytes of 32 numbers.
_SCREENED, _COARSE_BYTES = ("avx512", "amx"), 22

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

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's, without reading it."""

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
        quantised: whether its weights are, so that activations are rounded: see `activations`.
    """

    config: DecoderConfig
    handle: int
    padded_vocab: int
    threads: int
    pid: int
    digest: str
    quantised: bool
    _kept: list[Tensor] = field(default_factory=list, repr=False)
    """Memory that the library reads and does not own: the embedding's rows."""

    @property
    def isa(self) -> str:
        """The instruction set that its kernels were chosen for."""
        name: bytes = library().kvist_model_isa(self.handle)
        return name.decode()

    @property
    def activations(self) -> str:
        """What they are rounded to: "float32" is not at all."""
        return _activations(self.isa, self.quantised)

    @property
    def cache_dtype(self) -> torch.dtype | None:
        """What keys and values are rounded to before they are multiplied; None is not at all."""
        return _CACHE_DTYPES.get(self.activations)


def _activations(isa: str, quantised: bool) -> str:
    if not quantised:
        return "float32"
    return "bfloat16" if isa == "amx" else "8-bit"


_CACHE_DTYPES = {"bfloat16": torch.bfloat16}


class PackedSize(NamedTuple):
    """What a checkpoint will take in native code.

    Args:
        weights: bytes of its packed matrices, with the head's coarse copy for greedy steps; an
            embedding of its own stays in the mapped file.
        cache_dtype: see `PackedModel`.
    """

    weights: int
    cache_dtype: torch.dtype | None


def packed_size(config: DecoderConfig, checkpoint: QuantizedWeights) -> PackedSize:
    """What `pack_model` would make of a checkpoint here, read from its headers alone.

    Raises:
        NotSupported: as `pack_model`.
    """
    check_config(config)
    names, head_name, read, quantised = _matrices(config, checkpoint)
    isa = chosen_isa() or library().kvist_best_isa().decode()
    total = 0
    for name in [*chain.from_iterable(names), head_name]:
        rows, columns = checkpoint.shape(name)
        blocks = -(-rows // 16) * 16 * columns // 32
        total += blocks * _BLOCK_BYTES[read.kind(name)]
    if isa in _SCREENED and read.kind(head_name) == STORED["Q8_0"][1]:
        total += blocks * _COARSE_BYTES
    return PackedSize(total, _CACHE_DTYPES.get(_activations(isa, quantised)))


def chosen_isa() -> str | None:
    """The instruction set that the environment's `KVIST_ISA` names; None is the best."""
    return os.environ.get("KVIST_ISA")


def _matrices(
    config: DecoderConfig, checkpoint: QuantizedWeights
) -> tuple[list[list[str]], str, "_Floats | _Quantized", bool]:
    """Names of each layer's matrices and of the head; their reader; whether they are quantised."""
    head_name = _EMBEDDING if config.tie_word_embeddings else "lm_head.weight"
    names = [
        [f"model.layers.{i}.{name}.weight" for name in _LAYER_MATRICES]
        for i in range(config.num_layers)
    ]
    if checkpoint.quantized(head_name) is None:
        return names, head_name, _Floats(checkpoint, head_name), False
    return names, head_name, _Quantized(checkpoint), True


def pack_model(
    config: DecoderConfig,
    checkpoint: QuantizedWeights,
    *,
    threads: int,
    cpus: Sequence[int] = (),
    isa: str | None = None,
) -> PackedModel:
    """Pack a checkpoint's weights: all matrices quantised, or all in one type of floats.

    Args:
        config: of the model that it is a checkpoint of.
        checkpoint: has Q4_0, Q4_1 or Q8_0 matrices, or float32, float16 or bfloat16 ones.
        threads: that a step runs on.
        cpus: a core for each thread to be bound to during a step; empty leaves it to the system.
        isa: an instruction set by name; None takes the best.

    Raises:
        NotSupported: another format or family, or sizes that the kernels do not run.
    """
    check_config(config)
    loaded = library()
    names, head_name, read, quantised = _matrices(config, checkpoint)
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
    padded = -(-config.vocab_size // 16) * 16
    kinds = [read.kind(name) for layer in names for name in layer]
    laid_out = loaded.kvist_model_lay_out(
        handle, (ctypes.c_int32 * len(kinds))(*kinds), read.kind(head_name)
    )
    if laid_out:
        loaded.kvist_model_free(handle)
        raise KvistError(f"{checkpoint.path}: not enough memory for the packed weights")
    try:
        for i, layer in enumerate(names):
            for slot, name in enumerate(layer):
                read.pack(handle, i, slot, name, digest)
        read.pack(handle, -1, 0, head_name, digest)
    except BaseException:
        loaded.kvist_model_free(handle)
        raise
    model = PackedModel(
        config, handle, padded, threads, os.getpid(), digest.hexdigest(), quantised=quantised
    )
    weakref.finalize(model, _free, handle, model.pid)
    for i in range(config.num_layers):
        for slot, norm in enumerate(_LAYER_NORMS + (_HEAD_NORMS if config.qk_norm else ())):
            weight = checkpoint.tensor(f"model.layers.{i}.{norm}.weight", dtype=torch.float32)
            _vector(handle, i, slot, weight)
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


class _Quantized:
    """Matrices in the file's own blocks."""

    def __init__(self, checkpoint: QuantizedWeights) -> None:
        self.checkpoint = checkpoint
        self.file_bytes = checkpoint.path.stat().st_size

    def kind(self, name: str) -> int:
        return STORED[self._matrix(name).type][1]

    def pack(self, handle: int, layer: int, slot: int, name: str, digest: "Digest") -> None:
        matrix = self._matrix(name)
        data = matrix.data.contiguous()
        _pack(handle, layer, slot, STORED[matrix.type][0], data, digest)
        # Only pages of the mapping itself are given back: they are the file's and clean, so nothing
        # is lost. Rows that were reordered lie in memory of their own, smaller than the file.
        if data.untyped_storage().nbytes() == self.file_bytes:
            library().kvist_forget_pages(data.data_ptr(), data.nbytes)

    def _matrix(self, name: str) -> Blocks:
        matrix = self.checkpoint.quantized(name)
        if matrix is None or matrix.type not in STORED:
            kind = "in floats" if matrix is None else matrix.type
            raise NotSupported(
                f"{self.checkpoint.path}: {name} is {kind}; the native executor runs "
                f"{', '.join(STORED)} or floats throughout"
            )
        return matrix


class _Floats:
    """Matrices in floats, all of the type that the head's is of."""

    def __init__(self, checkpoint: QuantizedWeights, head_name: str) -> None:
        self.checkpoint = checkpoint
        self.dtype = checkpoint.tensor(head_name).dtype

    def kind(self, name: str) -> int:
        if self.checkpoint.quantized(name) is not None:
            raise NotSupported(
                f"{self.checkpoint.path}: {name} is quantised and the head is not; the native "
                "executor runs either throughout"
            )
        return STORED_FLOATS[self.dtype][1]

    def pack(self, handle: int, layer: int, slot: int, name: str, digest: "Digest") -> None:
        # Another type than the head's is brought to it only if nothing can be lost.
        data = self.checkpoint.tensor(name)
        if data.dtype != self.dtype and self.dtype != torch.float32:
            raise NotSupported(
                f"{self.checkpoint.path}: {name} is {data.dtype}, the head {self.dtype}; the "
                "native executor runs one type of floats throughout"
            )
        data = data.to(self.dtype).contiguous()
        _pack(handle, layer, slot, STORED_FLOATS[self.dtype][0], data, digest)


def _pack(handle: int, layer: int, slot: int, stored: int, data: Tensor, digest: "Digest") -> None:
    library().kvist_model_pack(handle, layer, slot, stored, data.data_ptr(), data.shape[0])
    flat = data.view(torch.uint8).reshape(-1)
    digest.update(bytes(flat[:: max(1, flat.numel() // 64)].tolist()))


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
        stored = STORED_FLOATS[rows.dtype][0]
    rows = rows.contiguous()
    model._kept.append(rows)
    library().kvist_model_embedding(model.handle, stored, rows.data_ptr())
