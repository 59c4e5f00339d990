"""A decoder's configuration, read from a hub's config.json in the styles of transformers 4 and 5.

Only numbers that decide the computation are kept. What kvist does not run is refused here by name,
before a weight is read, never run wrongly. Families read their own extras on top.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

from kvist.core.spec import AttentionSpec
from kvist.errors import ConfigError, NotSupported
from kvist.models.rope import RopeConfig, positive_number, read_rope

JSON = Mapping[str, Any]


@dataclass(frozen=True)
class DecoderConfig:
    """A decoder-only transformer: what Llama, SmolLM2 and Qwen3 share.

    Args:
        model_type: the family's name in the hub.
        qk_norm: RMSNorm over each head of q and k before rotation (Qwen3).
        attention_bias: biases on q, k, v projections.
        output_bias: a bias on the attention's output projection.
        mlp_bias: biases in the MLP.
        windows: for each layer its sliding window, None for full attention.
        eos_token_ids: ids that end a sequence, as config.json has them.
    """

    model_type: str
    vocab_size: int
    hidden_size: int
    intermediate_size: int
    num_layers: int
    num_heads: int
    num_kv_heads: int
    head_dim: int
    max_positions: int
    rms_norm_eps: float
    rope: RopeConfig
    tie_word_embeddings: bool
    windows: tuple[int | None, ...]
    qk_norm: bool = False
    attention_bias: bool = False
    output_bias: bool = False
    mlp_bias: bool = False
    eos_token_ids: tuple[int, ...] = ()

    @property
    def specs(self) -> tuple[AttentionSpec, ...]:
        """What each layer's cache must hold."""
        return tuple(AttentionSpec(self.num_kv_heads, self.head_dim, w) for w in self.windows)


def read_decoder(
    config: JSON,
    *,
    qk_norm: bool,
    head_dim: int | None = None,
    rope_theta: float = 10000.0,
    rms_norm_eps: float = 1e-6,
) -> DecoderConfig:
    """Read what all decoder families have in common.

    Args:
        config: the content of config.json.
        qk_norm: whether the family normalises q and k per head.
        head_dim: the family's default; None is hidden_size / num_attention_heads.
        rope_theta: the family's default base.
        rms_norm_eps: the family's default epsilon.

    Raises:
        ConfigError: a field is missing or makes no sense.
        NotSupported: the file asks for something that kvist does not run.
    """
    _refuse(config)
    hidden = positive(config, "hidden_size")
    heads = positive(config, "num_attention_heads")
    layers = positive(config, "num_hidden_layers")
    kv_heads = positive(config, "num_key_value_heads", heads)
    if heads % kv_heads:
        raise ConfigError(
            f"num_attention_heads {heads} is not a multiple of num_key_value_heads {kv_heads}"
        )
    dim = positive(config, "head_dim", head_dim or hidden // heads)
    if dim % 2:
        raise ConfigError(f"head_dim {dim} is odd; rotary embeddings rotate pairs of channels")
    max_positions = positive(config, "max_position_embeddings")
    bias = flag(config, "attention_bias")
    return DecoderConfig(
        model_type=str(config["model_type"]),
        vocab_size=positive(config, "vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive(config, "intermediate_size"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=dim,
        max_positions=max_positions,
        rms_norm_eps=positive_number(config, "rms_norm_eps", rms_norm_eps),
        rope=read_rope(config, head_dim=dim, max_positions=max_positions, default_theta=rope_theta),
        tie_word_embeddings=flag(config, "tie_word_embeddings"),
        windows=_windows(config, layers),
        qk_norm=qk_norm,
        attention_bias=bias,
        output_bias=bias,
        mlp_bias=flag(config, "mlp_bias"),
        eos_token_ids=token_ids(config.get("eos_token_id")),
    )


def _windows(config: JSON, layers: int) -> tuple[int | None, ...]:
    """Each layer's window, from `layer_types` or `use_sliding_window` + `max_window_layers`."""
    window = sliding_window(config)
    types = config.get("layer_types")
    if types is None:
        first = value_of(config, "max_window_layers", 28)  # the family's default
        if isinstance(first, bool) or not isinstance(first, int):
            raise ConfigError(
                f"config.json: max_window_layers must be a whole number, not {first!r}"
            )
        return tuple(window if i >= first else None for i in range(layers))
    if not isinstance(types, list | tuple):
        raise ConfigError(f"config.json: layer_types must be a list, not {types!r}")
    if len(types) != layers:
        raise ConfigError(f"layer_types has {len(types)} entries for num_hidden_layers {layers}")
    for kind in types:
        if kind not in ("full_attention", "sliding_attention"):
            raise NotSupported(f"layer type {kind!r}; kvist runs full_attention, sliding_attention")
    if "sliding_attention" in types and window is None:
        raise ConfigError(
            "layer_types has sliding_attention, but use_sliding_window or sliding_window is not set"
        )
    return tuple(window if kind == "sliding_attention" else None for kind in types)


def sliding_window(config: JSON) -> int | None:
    """The window of the layers that slide; None where the file switches them off."""
    if not flag(config, "use_sliding_window") or config.get("sliding_window", 4096) is None:
        return None
    return positive(config, "sliding_window", 4096)  # the family's default


def _refuse(config: JSON) -> None:
    """Raise for what would change the computation and is not built."""
    act = config.get("hidden_act", "silu")
    if act != "silu":
        raise NotSupported(f"hidden_act {act!r}; this decoder is built for 'silu'")
    if quantised := config.get("quantization_config"):
        method = quantised.get("quant_method") if isinstance(quantised, Mapping) else quantised
        raise NotSupported(
            f"weights quantised with {method!r}; load the unquantised checkpoint or a GGUF"
        )


def token_ids(value: Any) -> tuple[int, ...]:
    """The ids of a field that holds none, one or a list."""
    ids = () if value is None else tuple(value) if isinstance(value, list | tuple) else (value,)
    for token in ids:
        if isinstance(token, bool) or not isinstance(token, int):
            raise ConfigError(f"eos_token_id must be a token id, or a list of them, not {value!r}")
    return ids


def value_of(config: JSON, name: str, default: Any = None) -> Any:
    """A field's value, or the default; raises ConfigError where there is neither."""
    value = config.get(name)
    if value is None:
        value = default
    if value is None:
        raise ConfigError(f"config.json of a {config.get('model_type')} model lacks {name!r}")
    return value


def flag(config: JSON, name: str) -> bool:
    """A field that is true or false; false where it is missing or null."""
    value = config.get(name)
    if value is None or isinstance(value, bool):
        return bool(value)
    raise ConfigError(f"config.json: {name} must be true or false, not {value!r}")


def positive(config: JSON, name: str, default: int | None = None) -> int:
    """A field that must be a whole number over zero, and of this world."""
    value = value_of(config, name, default)
    if isinstance(value, bool) or not isinstance(value, int) or not 1 <= value < 2**31:
        raise ConfigError(f"config.json: {name} must be a whole number >= 1, not {value!r}")
    return value
