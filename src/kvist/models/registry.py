"""Which families there are, by the `model_type` of config.json.

A new family is a file of its own and a line here (docs/recipes/model.md).
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any

from kvist.errors import ConfigError, NotSupported
from kvist.models.config import DecoderConfig
from kvist.models.decoder import Decoder
from kvist.models.llama import LlamaForCausalLM, read_llama
from kvist.models.qwen3 import Qwen3ForCausalLM, read_qwen3
from kvist.models.qwen3_moe import Qwen3MoeForCausalLM, read_qwen3_moe


@dataclass(frozen=True)
class Family:
    """How to read a family's config.json and how to build its model from that."""

    read: Callable[[Mapping[str, Any]], DecoderConfig]
    build: Callable[[Any], Decoder]  # of what `read` gives


FAMILIES: dict[str, Family] = {
    "llama": Family(read_llama, LlamaForCausalLM),
    "qwen3": Family(read_qwen3, Qwen3ForCausalLM),
    "qwen3_moe": Family(read_qwen3_moe, Qwen3MoeForCausalLM),
}


def family_of(config: Mapping[str, Any]) -> Family:
    """The family that config.json names.

    Raises:
        ConfigError: no model_type.
        NotSupported: a family that kvist does not run.
    """
    name = config.get("model_type")
    if name is None:
        raise ConfigError("config.json lacks 'model_type', so there is no telling what to build")
    if not isinstance(name, str) or name not in FAMILIES:
        raise NotSupported(f"model_type {name!r}; kvist runs {', '.join(sorted(FAMILIES))}")
    return FAMILIES[name]
