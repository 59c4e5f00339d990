"""nanoVLM's checkpoints, read and written: its names for weights, its tokenizer, its versions.

`kvist.load` calls `load_nanovlm` where config.json is nanoVLM's. `save_pretrained` writes what
nanoVLM itself reads back. Vision towers in transformers' naming are `vision_tower`'s business.
"""

import json
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvist.errors import CheckpointError, ConfigError, DownloadError, NotSupported
from kvist.loading.assembled import AssembledCheckpoint, Source
from kvist.loading.checkpoint import Checkpoint, load_into, open_checkpoint, random_weights
from kvist.loading.hub import is_hub_id, resolve
from kvist.loading.image_prompt import ImageProcessor
from kvist.loading.images import DEFAULT_LIMITS, ImageLimits, Tiling
from kvist.models.config import DecoderConfig
from kvist.models.fp8 import use_fp8
from kvist.models.nanovlm import VisionLanguageModel, VLMConfig, read_vlm
from kvist.models.registry import family_of
from kvist.models.rope import rope_frequencies

if TYPE_CHECKING:
    from kvist.text.tokenizer import Tokenizer, TokenizerSource

__all__ = ["NanoVLM", "load_nanovlm", "make_processor", "make_tokenizer", "save_pretrained"]

_HEAD = "decoder.head.weight"
_EMBEDDING = "decoder.token_embedding.weight"
_FREQUENCIES = "decoder.rotary_embd.inv_freq"  # a buffer of nanoVLM's, which its loader insists on
_Q_NORM = "decoder.blocks.0.attn.q_norm.weight"

# The first version has no chat template: it was trained on this text, behind the image.
_FIRST_TEMPLATE = (
    "{% for message in messages %}{% if message['role'] == 'assistant' %}"
    "{{ ' ' + message['content'] + '\n' }}{% else %}"
    "{{ 'Question: ' + message['content'] + ' Answer:' }}{% endif %}{% endfor %}"
)


@dataclass(frozen=True, eq=False)
class NanoVLM:
    """A loaded checkpoint.

    Args:
        model: in evaluation mode; `model.language` is the `CausalLM` that the loop runs.
        tokenizer: with the extra tokens, and the chat template of the checkpoint's version.
        processor: prompts with pictures to token ids and spans.
    """

    model: VisionLanguageModel
    tokenizer: "Tokenizer"
    processor: ImageProcessor


def load_nanovlm(
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    weights: str = "auto",
    dummy: bool = False,
    seed: int = 0,
    limits: ImageLimits = DEFAULT_LIMITS,
) -> NanoVLM:
    """Load a checkpoint of any of nanoVLM's versions.

    Two things go beyond nanoVLM. The decoder may normalise its heads (`attn.q_norm` among the
    tensors) and is Qwen3's then. And `lm_weights` in config.json may name another checkpoint, by a
    path relative to this one, a known name or a hub id; the language model, of any family, is then
    that one, and this file holds the vision encoder and the projector only.

    Args:
        checkpoint: opened; without weights if `dummy`.
        dtype: of all weights.
        device: where to put them.
        weights: how the language model's projections are kept, as in `kvist.load`.
        dummy: random weights.
        seed: of the random weights.
        limits: what a picture may cost.

    Raises:
        ConfigError, NotSupported: config.json is damaged, or not one that kvist runs.
        CheckpointError: weights or tokenizer are missing or do not fit.
    """
    beside = None
    if name := checkpoint.config.get("lm_weights"):
        beside = open_checkpoint(
            _find(checkpoint.path, str(name), weights=not dummy), weights=not dummy
        )
    config = _read_config(checkpoint, beside)
    tokenizer = make_tokenizer(config, checkpoint, beside)
    processor = make_processor(config, tokenizer, limits)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
        use_fp8(model.language, weights)
    if dummy:
        random_weights(model, dtype=dtype, device=device, seed=seed)
    else:
        sources = {f"language.{n}": Source(beside, (n,)) for n in beside.names()} if beside else {}
        sources |= {_to_kvist(n): Source(checkpoint, (n,)) for n in checkpoint.names()}
        assembled = AssembledCheckpoint(checkpoint, sources)
        load_into(model, assembled, dtype=dtype, device=device, ignore=_computed)
    return NanoVLM(model.eval().requires_grad_(False), tokenizer, processor)


def _read_config(checkpoint: Checkpoint, beside: Checkpoint | None) -> VLMConfig:
    if beside is not None:
        language = family_of(beside.config).read(beside.config)
        return read_vlm(checkpoint.config, language=language)
    normed = _Q_NORM in checkpoint.names()
    return read_vlm(checkpoint.config, head_dim=checkpoint.shape(_Q_NORM)[0] if normed else None)


def _computed(name: str) -> bool:
    """Buffers that files carry and that are computed instead."""
    return name == _FREQUENCIES or name.endswith("rotary_emb.inv_freq")


def _find(directory: Path, name: str, *, weights: bool) -> Path:
    """A path beside the checkpoint, else whatever a user could call a model."""
    nearby = directory / name
    return nearby if nearby.exists() else resolve(name, weights=weights)


# Names: nanoVLM's parts, and ours for the same.
_PARTS = {
    "decoder.token_embedding": "language.model.embed_tokens",
    "decoder.norm": "language.model.norm",
    "decoder.head": "language.lm_head",
    "decoder.blocks": "language.model.layers",
    "vision_encoder.patch_embedding.cls_token": "vision.patch_embedding.class_token",
    "vision_encoder.layer_norm": "vision.norm",
    "vision_encoder": "vision",
    "MP.proj": "projector.proj",
}
_LAYER_PARTS = {
    "language": {
        "norm1": "input_layernorm",
        "norm2": "post_attention_layernorm",
        "attn.out_proj": "self_attn.o_proj",
        "attn": "self_attn",
    },
    "vision": {"ln1": "norm1", "ln2": "norm2"},
}


def _to_kvist(name: str) -> str:
    """A tensor's name in nanoVLM to ours; one that nanoVLM does not have stays as it is."""
    name = _replace_start(name, _PARTS)
    part, _, _ = name.partition(".")
    return _replace_in_layer(name, _LAYER_PARTS.get(part, {}))


def _to_nanovlm(name: str) -> str:
    """Our name of a tensor to nanoVLM's."""
    part, _, _ = name.partition(".")
    back = {ours: theirs for theirs, ours in _LAYER_PARTS.get(part, {}).items()}
    name = _replace_in_layer(name, back)
    return _replace_start(name, {ours: theirs for theirs, ours in _PARTS.items()})


def _replace_start(name: str, starts: Mapping[str, str]) -> str:
    for start in sorted(starts, key=len, reverse=True):
        if name.startswith(f"{start}.") or name == start:
            return starts[start] + name[len(start) :]
    return name


def _replace_in_layer(name: str, parts: Mapping[str, str]) -> str:
    """Rename what stands behind a layer's number."""
    pieces = name.split(".")
    numbers = [i for i, piece in enumerate(pieces) if piece.isdecimal()]
    if not numbers:
        return name
    head, rest = pieces[: numbers[0] + 1], ".".join(pieces[numbers[0] + 1 :])
    return ".".join((*head, _replace_start(rest, parts)))


# Tokenizer and prompts.


@dataclass(frozen=True)
class _TokenizerFiles:
    """A directory that has a tokenizer and maybe nothing else; satisfies `TokenizerSource`."""

    path: Path
    gguf_metadata: Mapping[str, Any] | None = None
    chat_template: str | None = None

    @property
    def tokenizer_json(self) -> Path | None:
        file = self.path / "tokenizer.json"
        return file if file.is_file() else None

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        file = self.path / "tokenizer_config.json"
        if not file.is_file():
            return {}
        try:
            content = json.loads(file.read_text(encoding="utf-8"))
        except (OSError, ValueError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
        return content if isinstance(content, dict) else {}


def make_tokenizer(
    config: VLMConfig, checkpoint: Checkpoint, beside: Checkpoint | None = None
) -> "Tokenizer":
    """The language model's tokenizer with nanoVLM's extra tokens behind its vocabulary.

    Raises:
        CheckpointError: there is none, or it is damaged.
        ConfigError: the extra tokens' ids go beyond the embedding.
        DownloadError: `lm_tokenizer` is a hub id, and the hub could not be reached.
    """
    from kvist.text.tokenizer import Tokenizer

    base = Tokenizer.from_checkpoint(_tokenizer_source(config, checkpoint, beside))
    backend = base.backend  # ours alone until this function returns
    # New ones get the next free ids, in this order, as transformers gives them.
    backend.add_special_tokens(list(config.extra_tokens.values()))
    vocab = config.language.vocab_size
    for token in config.extra_tokens.values():
        index = backend.token_to_id(token)
        if index is None or index >= vocab:
            raise ConfigError(
                f"{checkpoint.path}: the extra token {token!r} gets the id {index}, but the "
                f"language model has {vocab} embeddings; lm_vocab_size or lm_tokenizer is wrong"
            )
    template = config.chat_template
    if template is None:
        template = base.chat_template if config.extra_tokens else _FIRST_TEMPLATE
    return Tokenizer(backend, base.special_tokens, template)


def _tokenizer_source(
    config: VLMConfig, checkpoint: Checkpoint, beside: Checkpoint | None
) -> "TokenizerSource":
    name = config.tokenizer
    if name and (directory := checkpoint.path / name).is_dir():
        return _TokenizerFiles(directory)
    if checkpoint.tokenizer_json is not None:
        return checkpoint
    if beside is not None and name in ("", config.language_weights):
        return beside
    if not name:
        raise CheckpointError(f"{checkpoint.path}: config.json names no lm_tokenizer")
    if is_hub_id(name) and not Path(name).exists():
        return _TokenizerFiles(_download_tokenizer(name))
    found = resolve(name, weights=False)
    if (found / "tokenizer.json").is_file():
        return _TokenizerFiles(found)
    return open_checkpoint(found, weights=False)


def _download_tokenizer(repo_id: str) -> Path:
    """A hub repository's tokenizer alone; from the cache where it is there."""
    import huggingface_hub

    files = ["tokenizer.json", "tokenizer_config.json", "special_tokens_map.json"]
    try:
        return Path(huggingface_hub.snapshot_download(repo_id, allow_patterns=files))
    except Exception as error:  # the library's own, by version requests', httpx' or the system's
        raise DownloadError(
            f"lm_tokenizer {repo_id} is not in the local cache and could not be fetched "
            f"({' '.join(str(error).split())[:120]}); put its tokenizer.json beside config.json"
        ) from error


def make_processor(
    config: VLMConfig, tokenizer: "Tokenizer", limits: ImageLimits = DEFAULT_LIMITS
) -> ImageProcessor:
    """The way of this checkpoint's version with pictures."""
    if config.extra_tokens:
        placeholder = tokenizer.token_to_id(config.extra_tokens["image_token"])
        assert placeholder is not None, "the tokenizer lacks the image token"
    else:
        placeholder = 0
    tiling = Tiling(
        tile=config.vision.image_size,
        max_side=config.max_image_size,
        enlarge=config.resize_to_max_side,
        overview="global_image_token" in config.extra_tokens,
    )
    return ImageProcessor(
        tokenizer, tiling, config.image_tokens, config.extra_tokens, placeholder, limits
    )


# Writing.


def save_pretrained(
    model: VisionLanguageModel,
    directory: Path,
    tokenizer: "Tokenizer | None" = None,
    *,
    vision_only: bool = False,
) -> None:
    """Write a checkpoint as nanoVLM's own `save_pretrained` does.

    Args:
        model: of any dtype. A Qwen3 language model is written too, for kvist to read.
        directory: made if it is not there.
        tokenizer: written beside the weights and named in config.json; None leaves `lm_tokenizer`
            as it is.
        vision_only: leave out the language model, which config.json's `lm_weights` names.

    Raises:
        NotSupported: the language model has something that config.json has no field for.
        CheckpointError: the directory cannot be written.
    """
    from safetensors.torch import save_file

    config = dict(model.config.source)
    metadata = None
    tensors = {_to_nanovlm(n): t.contiguous().cpu() for n, t in model.state_dict().items()}
    if vision_only:
        if model.config.language_weights is None:
            raise ConfigError("config.json names no lm_weights, so the file must hold them")
        tensors = {n: t for n, t in tensors.items() if not n.startswith("decoder.")}
    else:
        config.pop("lm_weights", None)
        config |= _language_fields(model.config.language)
        if model.config.language.tie_word_embeddings:
            # One of the two names holds both, as safetensors' save_model leaves it.
            tensors[_HEAD] = tensors.pop(_EMBEDDING)
            metadata = {_EMBEDDING: _HEAD}
        tensors[_FREQUENCIES] = rope_frequencies(model.config.language.rope)
    try:
        directory.mkdir(parents=True, exist_ok=True)
        if tokenizer is not None:
            config["lm_tokenizer"] = "tokenizer"
            _save_tokenizer(tokenizer, directory / "tokenizer")
        (directory / "config.json").write_text(json.dumps(config, indent=4), encoding="utf-8")
        save_file(tensors, directory / "model.safetensors", metadata)
    except OSError as error:
        raise CheckpointError(f"{directory}: {error.strerror or error}") from error


def _language_fields(config: DecoderConfig) -> dict[str, Any]:
    """The decoder's configuration in nanoVLM's fields."""
    theta = config.rope.theta
    biased = config.attention_bias or config.output_bias or config.mlp_bias
    if config.rope.kind != "default" or biased or any(config.windows):
        raise NotSupported(
            f"nanoVLM's format has no fields for this {config.model_type} model's biases, windows "
            f"or rope type {config.rope.kind!r}"
        )
    return {
        "lm_hidden_dim": config.hidden_size,
        "lm_inter_dim": config.intermediate_size,
        "lm_rms_eps": config.rms_norm_eps,
        "lm_re_base": int(theta) if theta.is_integer() else theta,
        "lm_max_position_embeddings": config.max_positions,
        "lm_vocab_size": config.vocab_size,
        "lm_n_heads": config.num_heads,
        "lm_n_kv_heads": config.num_kv_heads,
        "lm_n_blocks": config.num_layers,
        "lm_attn_scaling": config.rope.attention_factor,
        "lm_tie_weights": config.tie_word_embeddings,
    }


def _save_tokenizer(tokenizer: "Tokenizer", directory: Path) -> None:
    directory.mkdir(exist_ok=True)
    tokenizer.backend.save(str(directory / "tokenizer.json"))
    named = {"tokenizer_class": "PreTrainedTokenizerFast", **tokenizer.special_tokens}
    (directory / "tokenizer_config.json").write_text(json.dumps(named, indent=1), encoding="utf-8")
