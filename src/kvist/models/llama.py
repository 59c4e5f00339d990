"""Llama and everything of its shape, SmolLM2 first of all: the shared decoder as it is.

nanoVLM's language model is of this shape too.
"""

from collections.abc import Mapping
from typing import Any

from kvist.models.config import DecoderConfig, read_decoder
from kvist.models.decoder import Decoder


def read_llama(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json of a `llama` model; raises ConfigError or NotSupported."""
    return read_decoder(config, qk_norm=False)


class LlamaForCausalLM(Decoder):
    """Llama (Touvron et al., 2023); SmolLM2 (Allal et al., 2025)."""
