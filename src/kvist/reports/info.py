"""What a model is and what its cache costs, from its configuration alone."""

from typing import Any

import torch

from kvist.cache import make_codec
from kvist.cache.protocol import SIDES
from kvist.core.spec import AttentionSpec
from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.hub import resolve
from kvist.models import family_of


def describe(path_or_name: str, codec: str = "plain") -> dict[str, Any]:
    """Facts about a model, without reading its weights.

    Args:
        path_or_name: as in `kvist.load`.
        codec: the codec for which cache bytes are counted.

    Returns:
        Names and values, in the order in which a person would want them.
    """
    checkpoint = open_checkpoint(resolve(path_or_name, weights=False), weights=False)
    family = family_of(checkpoint.config)
    config = family.read(checkpoint.config)
    with torch.device("meta"):
        lm = family.build(config)
    sliding = [w for w in config.windows if w is not None]
    facts: dict[str, Any] = {
        "model": path_or_name,
        "architecture": config.model_type,
        "parameters": sum(p.numel() for p in lm.parameters()),
        "layers": config.num_layers,
        "hidden_size": config.hidden_size,
        "attention": f"{config.num_heads} query heads over {config.num_kv_heads} key/value heads "
        f"of {config.head_dim}",
        "vocabulary": config.vocab_size,
        "context": config.max_positions,
        "rope": f"{config.rope.kind}, theta {config.rope.theta:g}",
        "tied_head": config.tie_word_embeddings,
    }
    if sliding:
        facts["sliding_layers"] = f"{len(sliding)} of {config.num_layers}, window {sliding[0]}"
    for dtype in (torch.float32, torch.bfloat16) if codec == "plain" else (torch.bfloat16,):
        per_token = cache_bytes_per_token(lm.specs, codec, dtype)
        name = str(dtype).removeprefix("torch.") if codec == "plain" else codec
        facts[f"cache_bytes_per_token_{name}"] = per_token
    facts["cache_bytes_at_full_context"] = per_token * config.max_positions
    return facts


def cache_bytes_per_token(specs: Any, codec: str, dtype: torch.dtype) -> int:
    """Bytes that one token takes in the caches of all layers."""
    made = make_codec(codec, dtype)
    return sum(
        torch.Size(shape).numel() * kind.itemsize
        for layer_idx, spec in enumerate(specs)
        if isinstance(spec, AttentionSpec)
        for side in SIDES
        for shape, kind in made.planes(spec, side, layer_idx).values()
    )
