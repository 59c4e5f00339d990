"""A GGUF file seen as a checkpoint of the hub: its names, its row order, its config.json.

`gguf_format` has checked the container and `dequantize` decodes blocks; this module knows what an
architecture's tensors and metadata are called on either side. A new architecture is one entry in
`ARCHITECTURES`. Weights stay in the memory-mapped file until they are asked for.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvist.errors import CheckpointError, ConfigError, NotSupported
from kvist.loading.dequantize import FLOAT_TYPES, dequantize
from kvist.loading.gguf_format import GGUFFile, TensorInfo, read_gguf

__all__ = ["ARCHITECTURES", "Architecture", "GGUFCheckpoint", "QuantizedTensor"]


@dataclass(frozen=True)
class Architecture:
    """How an architecture of GGUF maps to a model of the hub."""

    model_type: str
    hub_class: str
    # llama.cpp rotates neighbouring pairs for some architectures, so their q and k rows were
    # reordered on conversion; the hub's models rotate halves.
    interleaved_rope: bool
    layer_tensors: Mapping[str, str]
    """GGUF's name inside `blk.N.` -> the hub's inside `model.layers.N.`"""
    expert_tensors: Mapping[str, str] = field(default_factory=dict)
    """The same for tensors that hold all experts, one behind the other -> a name with `{}`."""


_LLAMA_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_QWEN3_LAYER = _LLAMA_LAYER | {
    "attn_q_norm": "self_attn.q_norm",
    "attn_k_norm": "self_attn.k_norm",
}
_MOE_LAYER = {name: hub for name, hub in _QWEN3_LAYER.items() if not name.startswith("ffn_")} | {
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate_inp": "mlp.gate",
}
_EXPERTS = {
    "ffn_gate_exps": "mlp.experts.{}.gate_proj",
    "ffn_up_exps": "mlp.experts.{}.up_proj",
    "ffn_down_exps": "mlp.experts.{}.down_proj",
}

ARCHITECTURES: Mapping[str, Architecture] = {
    "llama": Architecture("llama", "LlamaForCausalLM", True, _LLAMA_LAYER),
    "qwen3": Architecture("qwen3", "Qwen3ForCausalLM", False, _QWEN3_LAYER),
    "qwen3moe": Architecture("qwen3_moe", "Qwen3MoeForCausalLM", False, _MOE_LAYER, _EXPERTS),
}

_TOP_TENSORS = {
    "token_embd": "model.embed_tokens",
    "output_norm": "model.norm",
    "output": "lm_head",
}


@dataclass(frozen=True)
class QuantizedTensor:
    """A matrix as it was quantised, for code that multiplies with the blocks themselves."""

    type: str
    """ggml's name, such as "Q4_1"."""
    data: Tensor
    """uint8 `[rows, bytes per row]`; a view of the memory map (read only!) unless rows were
    reordered. Rows are in the hub's order."""
    shape: tuple[int, ...]
    """`(rows, columns)` of the matrix it stands for."""


@dataclass(frozen=True, eq=False)
class GGUFCheckpoint:
    """One GGUF file; satisfies `kvist.loading.checkpoint.Checkpoint`."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    chat_template: str | None
    gguf_metadata: Mapping[str, Any]
    tokenizer_json: Path | None = field(default=None, init=False)
    _tensors: Mapping[str, TensorInfo] = field(repr=False)
    _row_heads: Mapping[str, int] = field(repr=False)
    """Tensors whose rows are to be put back in order -> their number of heads."""
    _bytes: Tensor = field(repr=False)
    """The whole file as uint8, memory-mapped."""

    @classmethod
    def open(cls, path: Path) -> "GGUFCheckpoint":
        """Map a file and translate its metadata.

        Raises:
            CheckpointError: the file is damaged, truncated or no GGUF.
            ConfigError: the metadata lack a value that a config needs.
            NotSupported: an architecture, a quantisation or a feature that kvist does not run.
        """
        file = read_gguf(path)
        architecture = _architecture(file)
        config = _config(file, architecture)
        tensors: dict[str, TensorInfo] = {}
        for name, info in file.tensors.items():
            meant = _hub_tensors(path, info, architecture)
            if tensors.keys() & meant.keys():
                raise CheckpointError(f"{path}: another tensor has the same meaning as {name!r}")
            tensors |= meant
        row_heads = {}
        if architecture.interleaved_rope:
            heads = {
                "q_proj": config["num_attention_heads"],
                "k_proj": config["num_key_value_heads"],
            }
            for name, info in tensors.items():
                owner = name.split(".")[-2] if "." in name else ""
                if owner in heads:
                    vector_of_blocks = len(info.shape) == 1 and info.type not in FLOAT_TYPES
                    if not info.shape or info.shape[0] % (2 * heads[owner]) or vector_of_blocks:
                        raise CheckpointError(
                            f"{path}: tensor {info.name!r} of shape {list(info.shape)} does not "
                            f"divide into {heads[owner]} heads"
                        )
                    row_heads[name] = heads[owner]
        metadata = file.metadata
        template = metadata.get("tokenizer.chat_template")
        mapped = torch.from_file(
            str(path), shared=False, size=path.stat().st_size, dtype=torch.uint8
        )
        return cls(
            path=path,
            config=config,
            generation_config=_generation_config(metadata),
            tokenizer_config=_tokenizer_config(metadata),
            chat_template=template if isinstance(template, str) else None,
            gguf_metadata=metadata,
            _tensors=tensors,
            _row_heads=row_heads,
            _bytes=mapped,
        )

    def names(self) -> frozenset[str]:
        return frozenset(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        return self._info(name).shape

    def tensor(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Read one tensor; without a dtype quantised ones come as float32, others as stored."""
        info = self._info(name)
        # The file's bytes travel, not what they decode to: 5 bits an element instead of 32.
        raw = self._rows(name).to(device)
        if info.type not in FLOAT_TYPES:
            decoded = dequantize(raw, info.type, dtype or torch.float32)
            return decoded.reshape(info.shape)
        stored = raw.view(FLOAT_TYPES[info.type]).reshape(info.shape)
        tensor = stored.to(dtype) if dtype is not None else stored
        return tensor.clone() if tensor.device.type == "cpu" and tensor is stored else tensor

    def quantized(self, name: str) -> QuantizedTensor | None:
        """The tensor's blocks as they are in the file, or None where it is not quantised."""
        info = self._info(name)
        if info.type in FLOAT_TYPES:
            return None
        return QuantizedTensor(info.type, self._rows(name), info.shape)

    def _info(self, name: str) -> TensorInfo:
        try:
            return self._tensors[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r}") from None

    def _rows(self, name: str) -> Tensor:
        """Uint8 `[rows, bytes per row]`, rows in the hub's order."""
        info = self._info(name)
        num_rows = math.prod(info.shape[:-1])
        if name in self._row_heads and len(info.shape) == 1:
            num_rows = info.shape[0]  # a bias: its elements are the rows
        raw = self._bytes[info.offset : info.offset + info.nbytes]
        raw = raw.view(num_rows, -1)
        heads = self._row_heads.get(name)
        if heads is None:
            return raw
        # In the file the two halves of a head alternate: [heads, dim/2, half] is to become
        # [heads, half, dim/2]. numpy copies on this thread, where torch would start its own.
        halves = raw.view(heads, -1, 2, raw.shape[1]).transpose(1, 2)
        return torch.from_numpy(halves.numpy().reshape(num_rows, -1))


def _hub_tensors(path: Path, info: TensorInfo, architecture: Architecture) -> dict[str, TensorInfo]:
    """A tensor of the file by its name in the hub; one that holds all experts, expert by expert."""
    stem, _, suffix = info.name.rpartition(".")
    prefix, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    if prefix != "blk" or not index.isdecimal() or part not in architecture.expert_tensors:
        return {_hub_name(info.name, architecture): info}
    if len(info.shape) != 3:
        raise CheckpointError(f"{path}: tensor {info.name!r} is not [experts, rows, columns]")
    count, one = info.shape[0], info.nbytes // info.shape[0]
    pattern = f"model.layers.{int(index)}.{architecture.expert_tensors[part]}.{suffix}"
    # Expert e lies at [offset + e * one, offset + (e + 1) * one).
    return {
        pattern.format(e): replace(
            info, shape=info.shape[1:], offset=info.offset + e * one, nbytes=one
        )
        for e in range(count)
    }


def _hub_name(name: str, architecture: Architecture) -> str:
    """The hub's name; a tensor that the architecture does not have keeps its own."""
    stem, _, suffix = name.rpartition(".")
    if stem in _TOP_TENSORS:
        return f"{_TOP_TENSORS[stem]}.{suffix}"
    prefix, _, rest = stem.partition(".")
    index, _, part = rest.partition(".")
    if prefix == "blk" and index.isdecimal() and part in architecture.layer_tensors:
        return f"model.layers.{int(index)}.{architecture.layer_tensors[part]}.{suffix}"
    return name


def _architecture(file: GGUFFile) -> Architecture:
    name = file.metadata.get("general.architecture")
    if not isinstance(name, str):
        raise ConfigError(f"{file.path}: the metadata lack general.architecture")
    if name not in ARCHITECTURES:
        known = ", ".join(ARCHITECTURES)
        raise NotSupported(f"{file.path}: GGUF architecture {name!r}; kvist reads {known}")
    if file.metadata.get("split.count", 0) not in (0, 1):
        raise NotSupported(
            f"{file.path}: one part of a split GGUF; join the parts with "
            "`llama-gguf-split --merge` first"
        )
    if file.metadata.get(f"{name}.expert_count", 0) and not ARCHITECTURES[name].expert_tensors:
        raise NotSupported(f"{file.path}: a mixture of experts under the architecture {name!r}")
    if "rope_freqs.weight" in file.tensors:
        raise NotSupported(
            f"{file.path}: rope_freqs.weight (Llama 3's scaled RoPE); take the model in the hub's "
            "format, whose config.json says how it is scaled"
        )
    return ARCHITECTURES[name]


def _config(file: GGUFFile, architecture: Architecture) -> dict[str, Any]:
    """A config.json as the hub would have it."""
    prefix = file.metadata["general.architecture"]
    tensors = file.tensors

    def find(key: str) -> Any:
        return file.metadata.get(f"{prefix}.{key}")

    def whole(key: str, default: int | None = None) -> int:
        value = default if find(key) is None else find(key)
        if value is None:
            raise ConfigError(f"{file.path}: the metadata lack {prefix}.{key}")
        if isinstance(value, list):
            raise NotSupported(f"{file.path}: {prefix}.{key} differs from layer to layer")
        if type(value) is not int or value <= 0:
            raise ConfigError(f"{file.path}: {prefix}.{key} is {value!r}, not a positive integer")
        return value

    def number(key: str, default: float | None = None) -> float:
        value = default if find(key) is None else find(key)
        if value is None:
            raise ConfigError(f"{file.path}: the metadata lack {prefix}.{key}")
        if type(value) not in (int, float) or not (0 < value < math.inf):
            raise ConfigError(f"{file.path}: {prefix}.{key} is {value!r}, not a positive number")
        return _shortest_float32(value)

    hidden_size = whole("embedding_length")
    num_heads = whole("attention.head_count")
    head_dim = whole("attention.key_length", hidden_size // num_heads or None)
    for key in ("attention.value_length", "rope.dimension_count"):
        if whole(key, head_dim) != head_dim:
            raise NotSupported(
                f"{file.path}: {prefix}.{key} is {whole(key)}, kvist needs it to be the head's "
                f"dimension, {head_dim}"
            )
    embedding = tensors.get("token_embd.weight")
    if embedding is None or len(embedding.shape) != 2:
        raise CheckpointError(f"{file.path}: no matrix token_embd.weight")
    config: dict[str, Any] = {
        "architectures": [architecture.hub_class],
        "model_type": architecture.model_type,
        "vocab_size": embedding.shape[0],
        "hidden_size": hidden_size,
        "intermediate_size": whole("feed_forward_length"),
        "num_hidden_layers": whole("block_count"),
        "num_attention_heads": num_heads,
        "num_key_value_heads": whole("attention.head_count_kv", num_heads),
        "head_dim": head_dim,
        "hidden_act": "silu",
        "max_position_embeddings": whole("context_length"),
        "rms_norm_eps": number("attention.layer_norm_rms_epsilon"),
        "rope_theta": number("rope.freq_base", 10000.0),
        "rope_scaling": None,
        "attention_bias": "blk.0.attn_q.bias" in tensors,
        "tie_word_embeddings": "output.weight" not in tensors,
        "torch_dtype": _float_dtype(tensors),
    }
    if "blk.0.ffn_gate.bias" in tensors:
        config["mlp_bias"] = True
    if architecture.expert_tensors:
        # llama.cpp always scales the chosen experts' weights to one, and has experts everywhere.
        config |= {
            "num_experts": whole("expert_count"),
            "num_experts_per_tok": whole("expert_used_count"),
            "moe_intermediate_size": whole("expert_feed_forward_length"),
            "norm_topk_prob": True,
            "decoder_sparse_step": 1,
            "mlp_only_layers": [],
        }
    scaling = find("rope.scaling.type")
    if scaling not in (None, "none"):
        config["rope_scaling"] = {
            "rope_type": scaling,
            "factor": number("rope.scaling.factor"),
            "original_max_position_embeddings": find("rope.scaling.original_context_length"),
        }
    if find("attention.sliding_window"):
        raise NotSupported(f"{file.path}: {prefix}.attention.sliding_window in a GGUF")
    for key, token in _special_tokens(file.metadata).items():
        config[f"{key}_token_id"] = token
    return config


def _shortest_float32(value: float) -> float:
    """0.00001 for 9.999999747e-06: the decimal that was meant when it was stored as float32."""
    return next(
        short
        for digits in range(1, 18)
        if _float32(short := float(f"{value:.{digits}g}")) == _float32(value)
    )


def _float32(value: float) -> float:
    return torch.tensor(value, dtype=torch.float32).item()


def _float_dtype(tensors: Mapping[str, TensorInfo]) -> str:
    """The matrices' common type; float32 where any is quantised."""
    matrices = {info.type for info in tensors.values() if len(info.shape) > 1}
    if len(matrices) == 1 and (only := matrices.pop()) in FLOAT_TYPES:
        return str(FLOAT_TYPES[only]).removeprefix("torch.")
    return "float32"


def _special_tokens(metadata: Mapping[str, Any]) -> dict[str, int]:
    keys = {"bos": "bos", "eos": "eos", "pad": "padding", "unk": "unknown"}
    found = {
        ours: metadata.get(f"tokenizer.ggml.{theirs}_token_id") for ours, theirs in keys.items()
    }
    return {key: token for key, token in found.items() if type(token) is int}


def _generation_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    tokens = _special_tokens(metadata)
    tokens.pop("unk", None)
    config: dict[str, Any] = {f"{key}_token_id": token for key, token in tokens.items()}
    # Chat models end a turn with a token of its own; either ends generation.
    turn_end = metadata.get("tokenizer.ggml.eot_token_id")
    if type(turn_end) is int and turn_end != tokens.get("eos"):
        config["eos_token_id"] = [turn_end, *([tokens["eos"]] if "eos" in tokens else [])]
    return config


def _tokenizer_config(metadata: Mapping[str, Any]) -> dict[str, Any]:
    """The special tokens' texts, which chat templates need, and what is added to every prompt."""
    vocabulary = metadata.get("tokenizer.ggml.tokens") or []
    config: dict[str, Any] = {
        f"{key}_token": vocabulary[token]
        for key, token in _special_tokens(metadata).items()
        if token < len(vocabulary)
    }
    for key in ("add_bos_token", "add_eos_token"):
        if f"tokenizer.ggml.{key}" in metadata:
            config[key] = metadata[f"tokenizer.ggml.{key}"]
    return config
