"""nanoVLM: a vision encoder, a projector and a decoder that takes its embeddings from both.

nanoVLM's language model is Llama-shaped, so nothing of it is written here: `language` is the shared
decoder, of any family that kvist runs. How pictures become tiles and prompts is `loading`'s
business, and where an image's embeddings go in a step the runner's.
"""

from collections.abc import Mapping
from dataclasses import dataclass, field

from torch import Tensor, nn

from kvist.errors import ConfigError, NotSupported
from kvist.models.config import JSON, DecoderConfig, positive, value_of
from kvist.models.decoder import Decoder
from kvist.models.registry import FAMILIES
from kvist.models.rope import RopeConfig
from kvist.models.siglip import VisionConfig, VisionEncoder


@dataclass(frozen=True)
class VLMConfig:
    """What nanoVLM's config.json decides, in any of its versions.

    Args:
        pixel_shuffle_factor: patches along a side that the projector makes into one token.
        use_tokens: the language model alone takes tokens and gives logits, instead of embeddings.
        max_image_size: the long side of a picture that is cut into tiles; None where the version
            squeezes every picture into one tile.
        resize_to_max_side: small pictures are enlarged to `max_image_size` too.
        extra_tokens: by nanoVLM's names, `image_token` and, where the version has them,
            `global_image_token` and `r1c1` ... Empty in the first version, which puts the image's
            embeddings before the text.
        tokenizer: a hub id, a known name, or a path relative to the checkpoint.
        chat_template: jinja source; None takes the tokenizer's own.
        language_weights: where the language model comes from if not from this checkpoint: a path
            relative to it, a known name or a hub id. kvist's own addition to the format.
        source: config.json as it was read; written back unchanged by `save_pretrained`.
    """

    vision: VisionConfig
    language: DecoderConfig
    pixel_shuffle_factor: int
    use_tokens: bool = False
    max_image_size: int | None = None
    resize_to_max_side: bool = False
    extra_tokens: Mapping[str, str] = field(default_factory=dict)
    tokenizer: str = ""
    chat_template: str | None = None
    language_weights: str | None = None
    source: JSON = field(default_factory=dict, repr=False)

    def __post_init__(self) -> None:
        """Refuse what the projector could not take."""
        if self.vision.class_token:
            raise NotSupported(
                "vit_cls_flag: a class token alone gives the projector no patches; nanoVLM itself "
                "cannot run this either"
            )
        if self.vision.grid % self.pixel_shuffle_factor:
            raise ConfigError(
                f"mp_pixel_shuffle_factor {self.pixel_shuffle_factor} does not divide the "
                f"{self.vision.grid} patches of a side"
            )

    @property
    def image_tokens(self) -> int:
        """Tokens that a tile becomes."""
        return (self.vision.grid // self.pixel_shuffle_factor) ** 2


def is_nanovlm(config: JSON) -> bool:
    """Whether a config.json is nanoVLM's; it has no `model_type` to say so."""
    return "vit_hidden_dim" in config and "mp_pixel_shuffle_factor" in config


def read_vlm(
    config: JSON, *, language: DecoderConfig | None = None, head_dim: int | None = None
) -> VLMConfig:
    """Read nanoVLM's config.json.

    Fields that a version did not have yet mean what that version did: no `resize_to_max_side_len`
    leaves small pictures small, no `max_img_size` squeezes them into one tile, no
    `vlm_extra_tokens` puts images before the text.

    Args:
        config: the content of config.json.
        language: the decoder's configuration where the `lm_*` fields do not give it.
        head_dim: of a decoder with normalised heads, by which it is known as Qwen3's; the `lm_*`
            fields have no name for that.

    Raises:
        ConfigError: a field is missing or makes no sense.
        NotSupported: a variant that kvist does not run.
    """
    config = {"model_type": "nanoVLM", **config}
    vision = VisionConfig(
        hidden_size=positive(config, "vit_hidden_dim"),
        intermediate_size=positive(config, "vit_inter_dim"),
        num_layers=positive(config, "vit_n_blocks"),
        num_heads=positive(config, "vit_n_heads"),
        image_size=positive(config, "vit_img_size"),
        patch_size=positive(config, "vit_patch_size"),
        layer_norm_eps=float(value_of(config, "vit_ln_eps", 1e-6)),
        class_token=bool(config.get("vit_cls_flag", False)),
    )
    extra_tokens = dict(config.get("vlm_extra_tokens") or {})
    if extra_tokens and "image_token" not in extra_tokens:
        raise ConfigError("config.json: vlm_extra_tokens has no 'image_token'")
    tiles = config.get("max_img_size") if extra_tokens else None
    vlm = VLMConfig(
        vision=vision,
        language=language or _read_language(config, head_dim),
        pixel_shuffle_factor=positive(config, "mp_pixel_shuffle_factor"),
        use_tokens=bool(config.get("lm_use_tokens", False)),
        max_image_size=None if tiles is None else positive(config, "max_img_size"),
        resize_to_max_side=bool(config.get("resize_to_max_side_len", False)),
        extra_tokens=extra_tokens,
        tokenizer=str(config.get("lm_tokenizer") or ""),
        chat_template=config.get("lm_chat_template"),
        language_weights=config.get("lm_weights"),
        source={name: value for name, value in config.items() if name != "model_type"},
    )
    stated = config.get("mp_image_token_length", vlm.image_tokens)
    if stated != vlm.image_tokens:
        raise ConfigError(
            f"config.json: mp_image_token_length is {stated}, but {vision.grid} x {vision.grid} "
            f"patches shuffled by {vlm.pixel_shuffle_factor} make {vlm.image_tokens} tokens"
        )
    if vlm.max_image_size is not None and vlm.max_image_size % vision.image_size:
        raise ConfigError(
            f"config.json: max_img_size {vlm.max_image_size} is not a multiple of vit_img_size "
            f"{vision.image_size}"
        )
    return vlm


def _read_language(config: JSON, head_dim: int | None) -> DecoderConfig:
    """The decoder that the `lm_*` fields describe."""
    hidden = positive(config, "lm_hidden_dim")
    heads = positive(config, "lm_n_heads")
    kv_heads = positive(config, "lm_n_kv_heads")
    layers = positive(config, "lm_n_blocks")
    qk_norm = head_dim is not None
    if head_dim is None:
        head_dim = hidden // heads
        if head_dim * heads != hidden or head_dim % 2:
            raise ConfigError(f"lm_hidden_dim {hidden} is not lm_n_heads {heads} x an even number")
    if heads % kv_heads:
        raise ConfigError(f"lm_n_heads {heads} is not a multiple of lm_n_kv_heads {kv_heads}")
    return DecoderConfig(
        model_type="qwen3" if qk_norm else "llama",
        vocab_size=positive(config, "lm_vocab_size"),
        hidden_size=hidden,
        intermediate_size=positive(config, "lm_inter_dim"),
        num_layers=layers,
        num_heads=heads,
        num_kv_heads=kv_heads,
        head_dim=head_dim,
        # nanoVLM goes on past this length, with other frequencies than those that the cached keys
        # were rotated by; here it is the limit.
        max_positions=positive(config, "lm_max_position_embeddings"),
        rms_norm_eps=float(value_of(config, "lm_rms_eps", 1e-5)),
        rope=RopeConfig(
            head_dim,
            theta=float(value_of(config, "lm_re_base")),
            attention_factor=float(value_of(config, "lm_attn_scaling", 1.0)),
        ),
        tie_word_embeddings=bool(config.get("lm_tie_weights", True)),
        windows=(None,) * layers,
        qk_norm=qk_norm,
    )


class Projector(nn.Module):
    """Pixel shuffle, then a linear map into the language model's embeddings (Idefics3)."""

    def __init__(self, vision: VisionConfig, factor: int, hidden_size: int) -> None:
        """`factor` x `factor` neighbouring patches become one token of `hidden_size`."""
        super().__init__()
        self.grid, self.factor = vision.grid, factor
        self.proj = nn.Linear(vision.hidden_size * factor**2, hidden_size, bias=False)

    def forward(self, x: Tensor) -> Tensor:
        """`[n, grid * grid, hidden]` -> `[n, (grid / factor)^2, hidden_size]`, row by row."""
        f, side = self.factor, self.grid // self.factor
        x = x.unflatten(1, (side, f, side, f)).transpose(2, 3)  # [n, side, side, f, f, hidden]
        return self.proj(x.flatten(3).flatten(1, 2))  # type: ignore[no-any-return]


class VisionLanguageModel(nn.Module):
    """Vision encoder and projector beside a language model that knows nothing of them."""

    def __init__(self, config: VLMConfig) -> None:
        """Build the modules; weights are the loader's business."""
        super().__init__()
        self.config = config
        self.vision = VisionEncoder(config.vision)
        self.projector = Projector(
            config.vision, config.pixel_shuffle_factor, config.language.hidden_size
        )
        self.language: Decoder = FAMILIES[config.language.model_type].build(config.language)

    def encode_images(self, pixels: Tensor) -> Tensor:
        """Tiles to what stands for them among the token embeddings.

        Args:
            pixels: `[n, 3, image_size, image_size]` in [0, 1].

        Returns:
            `[n, image_tokens, hidden]`.
        """
        weight = self.projector.proj.weight
        x = self.vision(pixels.to(weight.device, weight.dtype))
        return self.projector(x)  # type: ignore[no-any-return]
