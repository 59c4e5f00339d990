"""Models: one readable file a family, packed and pure, over one shared decoder."""

from kvist.models.config import DecoderConfig
from kvist.models.decoder import CausalLM, Decoder
from kvist.models.registry import FAMILIES, family_of

__all__ = ["FAMILIES", "CausalLM", "Decoder", "DecoderConfig", "family_of"]
