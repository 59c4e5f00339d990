"""SigLIP and SigLIP2 vision towers in transformers' naming, from a checkpoint of either kind.

For building a nanoVLM from trained backbones. Only the tower is read: the text model and the
pooling head in the same file are left alone.
"""

from collections.abc import Mapping
from typing import Any

import torch

from kvist.errors import ConfigError, NotSupported
from kvist.loading.assembled import AssembledCheckpoint, Source
from kvist.loading.checkpoint import Checkpoint, load_into
from kvist.models.config import positive, value_of
from kvist.models.siglip import VisionConfig, VisionEncoder

__all__ = ["load_vision_tower", "read_vision_config"]

# Hub configs of these models leave out what equals transformers' defaults.
_DEFAULTS = {
    "hidden_size": 768,
    "intermediate_size": 3072,
    "num_hidden_layers": 12,
    "num_attention_heads": 12,
    "image_size": 224,
    "patch_size": 16,
}
_KINDS = ("siglip_vision_model", "siglip2_vision_model")


def read_vision_config(config: Mapping[str, Any]) -> VisionConfig:
    """Read config.json of a SigLIP model or of its vision tower alone.

    Raises:
        NotSupported: another kind of tower, or SigLIP2's with pictures of any proportion (NaFlex).
        ConfigError: a field makes no sense.
    """
    inner = config.get("vision_config", config)
    if not isinstance(inner, Mapping):
        raise ConfigError("config.json: vision_config is no object")
    kind = inner.get("model_type", "siglip_vision_model")
    if kind not in _KINDS:
        raise NotSupported(f"vision tower {kind!r}; kvist runs {', '.join(_KINDS)}")
    if "num_patches" in inner:
        raise NotSupported("SigLIP2's NaFlex variant (num_patches); take one of fixed resolution")
    act = inner.get("hidden_act", "gelu_pytorch_tanh")
    if act != "gelu_pytorch_tanh":
        raise NotSupported(f"hidden_act {act!r}; this encoder is built for 'gelu_pytorch_tanh'")
    sizes = {name: positive(inner, name, default) for name, default in _DEFAULTS.items()}
    return VisionConfig(
        hidden_size=sizes["hidden_size"],
        intermediate_size=sizes["intermediate_size"],
        num_layers=sizes["num_hidden_layers"],
        num_heads=sizes["num_attention_heads"],
        image_size=sizes["image_size"],
        patch_size=sizes["patch_size"],
        layer_norm_eps=float(value_of(inner, "layer_norm_eps", 1e-6)),
    )


def load_vision_tower(
    checkpoint: Checkpoint, *, dtype: torch.dtype, device: str | torch.device
) -> VisionEncoder:
    """Load the tower of a SigLIP checkpoint.

    Raises:
        ConfigError, NotSupported: see `read_vision_config`.
        CheckpointError: the weights are damaged or do not fit.
    """
    config = read_vision_config(checkpoint.config)
    with torch.device("meta"):
        encoder = VisionEncoder(config)
    sources = _sources(checkpoint, config.num_layers)
    load_into(encoder, AssembledCheckpoint(checkpoint, sources), dtype=dtype, device=device)
    return encoder.eval().requires_grad_(False)


def _sources(checkpoint: Checkpoint, layers: int) -> dict[str, Source]:
    """Our name -> transformers'; what a file lacks is left out, for `load_into` to name."""
    names = checkpoint.names()
    prefix = "vision_model." if any(n.startswith("vision_model.") for n in names) else ""
    theirs: dict[str, tuple[str, ...]] = {}

    def add(ours: str, *parts: str) -> None:
        for kind in ("weight", "bias"):
            theirs[f"{ours}.{kind}"] = tuple(f"{prefix}{part}.{kind}" for part in parts)

    add("patch_embedding.conv", "embeddings.patch_embedding")
    add("norm", "post_layernorm")
    for i in range(layers):
        layer = f"encoder.layers.{i}"
        add(f"blocks.{i}.norm1", f"{layer}.layer_norm1")
        add(f"blocks.{i}.norm2", f"{layer}.layer_norm2")
        add(f"blocks.{i}.mlp.fc1", f"{layer}.mlp.fc1")
        add(f"blocks.{i}.mlp.fc2", f"{layer}.mlp.fc2")
        add(f"blocks.{i}.attn.out_proj", f"{layer}.self_attn.out_proj")
        add(f"blocks.{i}.attn.qkv_proj", *(f"{layer}.self_attn.{x}_proj" for x in "qkv"))
    sources = {ours: Source(checkpoint, parts) for ours, parts in theirs.items()}
    places = f"{prefix}embeddings.position_embedding.weight"
    sources["patch_embedding.position_embedding"] = Source(checkpoint, (places,), leading=True)
    return {ours: source for ours, source in sources.items() if names.issuperset(source.names)}
