"""What a cache takes, exactly, from specs and a codec alone: nothing is allocated, no weight read.

Called by whoever plans memory or reports it (`kvist info`, `kvist plan`, `kvist quality`).
"""

from collections.abc import Sequence
from math import prod

from kvist.cache.protocol import SIDES, Codec
from kvist.core.spec import AttentionSpec, LayerSpec


def layer_bytes_per_token(spec: AttentionSpec, codec: Codec, layer_idx: int) -> int:
    """Bytes of one token's keys and values in one layer, all planes included."""
    return sum(
        prod(shape) * dtype.itemsize
        for side in SIDES
        for shape, dtype in codec.planes(spec, side, layer_idx).values()
    )


def bytes_per_token(specs: Sequence[LayerSpec], codec: Codec) -> int:
    """Bytes of one token's keys and values in all attention layers."""
    return sum(
        layer_bytes_per_token(spec, codec, layer_idx)
        for layer_idx, spec in enumerate(specs)
        if isinstance(spec, AttentionSpec)
    )


def bits_per_value(specs: Sequence[LayerSpec], codec: Codec) -> float:
    """Bits of cache for each number of keys and values, scales and zeros included."""
    values = sum(
        2 * spec.num_kv_heads * spec.head_dim for spec in specs if isinstance(spec, AttentionSpec)
    )
    return 8 * bytes_per_token(specs, codec) / values
