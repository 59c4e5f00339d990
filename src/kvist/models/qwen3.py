"""Qwen3: the shared decoder with q and k normalised per head, and sliding layers where asked for.

Its head_dim stands apart from hidden_size, its head may be tied to the embedding, and `layer_types`
(or `use_sliding_window` with `max_window_layers`) says which layers see a window only.
"""

from collections.abc import Mapping
from typing import Any

from kvist.models.config import DecoderConfig, read_decoder
from kvist.models.decoder import Decoder


def read_qwen3(config: Mapping[str, Any]) -> DecoderConfig:
    """config.json of a `qwen3` model; raises ConfigError or NotSupported."""
    return read_decoder(config, qk_norm=True, head_dim=128, rope_theta=1e6)


class Qwen3ForCausalLM(Decoder):
    """Qwen3 (Yang et al., 2025), dense."""
