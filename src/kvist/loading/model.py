"""`load`: from a name or a path to a model that can generate, with all that belongs to it.

A `Model` is the language model plus its tokenizer, chat template and defaults. It holds no state of
any conversation: caches and requests stand beside it, so one model serves any number of them.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING, Any

import torch

from kvist.core.spec import LayerSpec
from kvist.errors import ConfigError, NotSupported, RequestError
from kvist.models.config import DecoderConfig, token_ids
from kvist.models.decoder import Decoder
from kvist.models.fp8 import check_weights, use_fp8
from kvist.models.registry import family_of

if TYPE_CHECKING:
    from kvist.cache.codecs import Calibration
    from kvist.cache.protocol import Codec
    from kvist.loading.checkpoint import Checkpoint
    from kvist.loading.image_prompt import ImageProcessor, PreparedPrompt
    from kvist.models.nanovlm import VisionLanguageModel
    from kvist.native import NativeStep
    from kvist.runner.encoder_cache import EncodedImages
    from kvist.text.tokenizer import Tokenizer

DTYPES = {
    "float32": torch.float32,
    "float16": torch.float16,
    "bfloat16": torch.bfloat16,
}

# What a prompt may be: text, token ids, or chat messages in OpenAI's shape.
Prompt = str | Sequence[int] | Sequence[Mapping[str, Any]]


@dataclass(frozen=True)
class Model:
    """A language model and what belongs to it.

    Args:
        name: what it was loaded as.
        decoder: the model itself, in evaluation mode; use `lm`, which sees that it has its weights.
        tokenizer: None where the checkpoint has none; prompts are then token ids.
        generation_config: the model's defaults for sampling.
        dtype: of its weights and activations.
        device: where it runs.
        vision: of a vision-language model, the whole of it; `lm` is its language model.
        processor: turns prompts with pictures into tokens and spans.
        images: encoded pictures by their content, bounded in bytes.
        executor: what computes its steps, a name in `kvist.runner.executors.EXECUTORS`.
        weights: how the projections are kept, a name in `kvist.models.fp8.WEIGHTS`.
        native: its step in native code; the weights are packed there as they were quantised.
        unread: the file that the decoder's own weights are still in, if they are not read yet.
    """

    name: str
    decoder: Decoder
    tokenizer: "Tokenizer | None"
    dtype: torch.dtype
    device: torch.device
    generation_config: Mapping[str, Any] = field(default_factory=dict)
    vision: "VisionLanguageModel | None" = None
    processor: "ImageProcessor | None" = None
    images: "EncodedImages | None" = None
    executor: str = "auto"
    weights: str = "auto"
    native: "NativeStep | None" = None
    unread: "Checkpoint | None" = field(default=None, repr=False)

    @cached_property
    def lm(self) -> Decoder:
        """The decoder with its weights.

        A native step does without them, so they stay in the file until somebody asks here.
        """
        if self.unread is not None:
            _fill(self.decoder, self.unread, self.dtype, self.device)
        return self.decoder

    @property
    def config(self) -> DecoderConfig:
        """The decoder's configuration."""
        return self.decoder.config

    @property
    def specs(self) -> tuple[LayerSpec, ...]:
        """What each layer's cache must hold."""
        return self.decoder.specs

    @property
    def max_length(self) -> int:
        """Tokens that a sequence may reach, prompt and output."""
        return self.config.max_positions

    @property
    def eos_token_ids(self) -> frozenset[int]:
        """Ids that end a sequence: generation_config's, else config's, else the tokenizer's."""
        ids = token_ids(self.generation_config.get("eos_token_id")) or self.config.eos_token_ids
        if not ids and self.tokenizer is not None:
            ids = token_ids(self.tokenizer.eos_token_id)
        return frozenset(ids)

    @cached_property
    def fingerprint(self) -> str:
        """Names the weights that computed a cache: configuration, dtype and a sample of each.

        Two models with equal fingerprints compute the same keys and values, so a saved cache or
        prefix of the one serves the other.
        """
        digest = hashlib.sha256(f"{self.config} {self.dtype}".encode())
        if self.weights != "auto":
            digest.update(self.weights.encode())
        if self.native is not None:
            # Rounded activations compute other keys than the same weights in float32 do.
            digest.update(self.native.fingerprint.encode())
            return digest.hexdigest()[:32]
        for name, weight in self.lm.named_parameters():
            flat = weight.detach().flatten()
            sample = flat[:: max(1, flat.numel() // 64)].float().cpu()
            digest.update(f"{name} {tuple(weight.shape)} {sample.tolist()}".encode())
        return digest.hexdigest()[:32]

    def codec(self, name: str) -> "Codec":
        """A codec for this model's cache, by name; raises CacheError where there is none."""
        from kvist.cache.codecs import make_codec

        stored = None if self.native is None else self.native.packed.cache_dtype
        return make_codec(name, self.dtype, lambda: self.calibration, stored=stored)

    @cached_property
    def calibration(self) -> "Calibration":
        """The mean of this model's keys, which some codecs need; computed when first asked for."""
        from kvist.cache.codecs.calibration import calibrate, calibration_text

        if self.tokenizer is not None:
            ids = self.tokenizer.encode(calibration_text())
        else:
            ids = [(i * 2654435761) % self.config.vocab_size for i in range(512)]
        return calibrate(self.lm, ids, dtype=self.dtype, device=self.device)

    def require_tokenizer(self) -> "Tokenizer":
        """The tokenizer; raises RequestError where the checkpoint has none."""
        if self.tokenizer is None:
            raise RequestError(f"{self.name} has no tokenizer; give the prompt as token ids")
        return self.tokenizer

    def prepare(self, prompt: "Prompt | PreparedPrompt", **template: Any) -> "PreparedPrompt":
        """A prompt's token ids, and where its pictures' embeddings go; arguments as in `encode`.

        Pictures are content parts of chat messages, `{"type": "image", "image": picture}`: a path,
        bytes, a data URL or a PIL image. What is prepared already comes back as it is.
        """
        from kvist.loading.image_prompt import PreparedPrompt

        if isinstance(prompt, PreparedPrompt):
            return prompt
        if self.processor is None or (isinstance(prompt, Sequence) and not _is_chat(prompt)):
            return PreparedPrompt(self.encode(prompt, **template), ())
        return self.processor.prepare(prompt, **template)

    def encode(self, prompt: Prompt, **template: Any) -> tuple[int, ...]:
        """A prompt's token ids.

        Args:
            prompt: text (encoded with the model's own special tokens), token ids (checked), or
                chat messages (through the chat template, with the generation prompt).
            template: further variables of the chat template (`enable_thinking=False`, `tools=…`).

        Raises:
            RequestError: it is empty, holds an id outside the vocabulary, or is none of these.
        """
        if isinstance(prompt, str):
            ids = self.require_tokenizer().encode(prompt, add_special_tokens=True)
        elif not isinstance(prompt, Sequence) or isinstance(prompt, bytes | bytearray):
            raise RequestError(
                f"a prompt is text, token ids or chat messages, not {type(prompt).__name__}"
            )
        elif _is_chat(prompt):
            ids = self.require_tokenizer().encode(self.render_chat(prompt, **template))
        else:
            ids = list(prompt)  # type: ignore[arg-type]
        if not ids:
            raise RequestError("the prompt is empty; give at least one token")
        vocab = self.config.vocab_size
        if set(map(type, ids)) == {int} and min(ids) >= 0 and max(ids) < vocab:
            return tuple(ids)
        for i, token in enumerate(ids):
            if isinstance(token, bool) or not isinstance(token, int) or not 0 <= token < vocab:
                raise RequestError(
                    f"prompt token {i} is {token!r}; this model's ids are 0..{vocab - 1}"
                )
        return tuple(ids)

    def render_chat(self, messages: Sequence[Any], **template: Any) -> str:
        """Chat messages as the text that the model was trained on."""
        from kvist.text.chat import render

        tokenizer = self.require_tokenizer()
        if tokenizer.chat_template is None:
            raise RequestError(f"{self.name} has no chat template; give the prompt as text")
        return render(
            tokenizer.chat_template,
            messages,
            special_tokens=tokenizer.special_tokens,
            **template,
        )


def load(
    path_or_name: str | Path,
    dtype: str | torch.dtype = "auto",
    device: str | torch.device = "auto",
    *,
    executor: str = "auto",
    weights: str = "auto",
    dummy: bool = False,
    seed: int = 0,
) -> Model:
    """Load a model.

    Args:
        path_or_name: a directory in the hub's format, a GGUF file, a hub id, or a pulled name
            such as `smollm2-135m`.
        dtype: "auto" is the checkpoint's own on a GPU and float32 on a CPU, where narrower types
            are slower; or "float32", "bfloat16", "float16".
        device: "auto" is the first GPU, else the CPU.
        executor: what computes its steps. "auto" takes the fastest there is: on a CPU, 4- and 8-bit
            GGUF weights stay as they are and go to native code, which rounds activations.
            "reference" is the model's own forward with those weights dequantised, to the bit what
            the file says; "native" is native code for weights in floats too, or an error that
            says why not; further names in `kvist.runner.executors.EXECUTORS`.
        weights: "auto" keeps the projections' weights in `dtype` (or as a GGUF has them); "fp8"
            rounds them to 8 bits while they are read, with a scale for each output channel;
            "fp8-dynamic" rounds activations, too, where many tokens are computed at once.
        dummy: random weights from the configuration alone; nothing but config.json is read.
        seed: of the random weights.

    Raises:
        ModelNotFound: there is nothing of this name; the message says where it looked.
        ConfigError, NotSupported: its configuration is damaged, or not one that kvist runs.
        CheckpointError: its weights are damaged or do not fit the configuration.
    """
    from kvist.loading.checkpoint import open_checkpoint, random_weights
    from kvist.loading.hub import resolve
    from kvist.models.nanovlm import is_nanovlm
    from kvist.text.tokenizer import find_tokenizer

    where = pick_device(device)
    checkpoint = open_checkpoint(resolve(str(path_or_name), weights=not dummy), weights=not dummy)
    kind = pick_dtype(dtype, checkpoint.config, where)
    _check_weights(weights, executor, checkpoint)
    if is_nanovlm(checkpoint.config):
        return _load_vision(
            str(path_or_name), checkpoint, kind, where, weights=weights, dummy=dummy, seed=seed
        )
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        lm = family.build(family.read(checkpoint.config))
        use_fp8(lm, weights)
    lm.eval().requires_grad_(False)
    native = None if dummy or weights != "auto" else _native(executor, lm, checkpoint, kind, where)
    if dummy:
        random_weights(lm, dtype=kind, device=where, seed=seed)
    elif native is None:
        _fill(lm, checkpoint, kind, where)
    return Model(
        name=str(path_or_name),
        decoder=lm,
        tokenizer=find_tokenizer(checkpoint),
        dtype=kind,
        device=where,
        generation_config=checkpoint.generation_config,
        executor=executor,
        weights=weights,
        native=native,
        unread=None if native is None else checkpoint,
    )


def _check_weights(weights: str, executor: str, checkpoint: "Checkpoint") -> None:
    """Refuse weights that this checkpoint or executor cannot have."""
    check_weights(weights)
    if weights == "auto":
        return
    if executor == "native":
        raise NotSupported(f"native code knows no weights={weights!r}; take executor='auto'")
    if checkpoint.gguf_metadata is not None:
        raise NotSupported(
            f"{checkpoint.path}: weights={weights!r} quantises safetensors, and a GGUF's weights "
            "come as they are; load it with weights='auto', or the model's safetensors"
        )


def _fill(lm: Decoder, checkpoint: "Checkpoint", dtype: torch.dtype, device: torch.device) -> None:
    """Read a decoder's weights; where that breaks off, it may be done again."""
    from kvist.loading.checkpoint import load_into

    load_into(lm, checkpoint, dtype=dtype, device=device, ignore=_ignorable)
    lm.requires_grad_(False)


def chooses_native(checkpoint: "Checkpoint", dtype: torch.dtype, device: torch.device) -> bool:
    """Whether native code is to run a checkpoint, if it can, where no executor is named."""
    from kvist.loading.gguf import GGUFCheckpoint

    on_cpu = device.type == "cpu" and dtype == torch.float32
    return on_cpu and isinstance(checkpoint, GGUFCheckpoint)


def _native(
    executor: str,
    lm: Decoder,
    checkpoint: "Checkpoint",
    dtype: torch.dtype,
    device: torch.device,
) -> "NativeStep | None":
    """The model's step in native code; None where another executor is to run it.

    Raises:
        NotSupported: it was asked for by name and cannot run this; says why.
    """
    from kvist.loading.checkpoint import check_fit
    from kvist.loading.gguf import GGUFCheckpoint
    from kvist.loading.safetensors import DirectoryCheckpoint
    from kvist.native import native_step
    from kvist.runner.executors import EXECUTORS

    if executor not in EXECUTORS:
        raise ConfigError(f"no executor {executor!r}; there are: {', '.join(EXECUTORS)}")
    if executor not in ("auto", "native"):
        return None
    if executor == "auto" and not chooses_native(checkpoint, dtype, device):
        return None
    try:
        if device.type != "cpu" or dtype != torch.float32:
            raise NotSupported(f"native code computes in float32 on a CPU, not {dtype} on {device}")
        assert isinstance(checkpoint, GGUFCheckpoint | DirectoryCheckpoint)
        check_fit(lm, checkpoint, ignore=_ignorable)
        return native_step(lm.config, checkpoint)
    except NotSupported:
        if executor == "native":
            raise
        return None


def _load_vision(
    name: str,
    checkpoint: "Checkpoint",
    dtype: torch.dtype,
    device: torch.device,
    *,
    weights: str,
    dummy: bool,
    seed: int,
) -> Model:
    """A vision-language model in nanoVLM's format."""
    from kvist.loading.nanovlm import load_nanovlm
    from kvist.runner.encoder_cache import EncodedImages

    loaded = load_nanovlm(
        checkpoint, dtype=dtype, device=device, weights=weights, dummy=dummy, seed=seed
    )
    return Model(
        name=name,
        decoder=loaded.model.language,
        tokenizer=loaded.tokenizer,
        dtype=dtype,
        device=device,
        generation_config=checkpoint.generation_config,
        weights=weights,
        vision=loaded.model,
        processor=loaded.processor,
        images=EncodedImages(loaded.model.encode_images),
    )


def _is_chat(prompt: Sequence[Any]) -> bool:
    """Whether a prompt is chat messages."""
    return bool(prompt) and not isinstance(prompt, str) and isinstance(prompt[0], Mapping)


def _ignorable(name: str) -> bool:
    """Tensors that old checkpoints carry and that are computed instead."""
    return name.endswith("rotary_emb.inv_freq")


def pick_device(device: str | torch.device) -> torch.device:
    """A device by name, "auto" for the first GPU or the CPU; ConfigError where it is not there."""
    if device == "auto":
        return torch.device("cuda" if torch.cuda.is_available() else "cpu")
    try:
        found = torch.device(device)
    except RuntimeError as error:
        raise ConfigError(f"no device named {device!r}; try 'cpu' or 'cuda'") from error
    if found.type == "cuda" and not torch.cuda.is_available():
        raise ConfigError(f"device {str(device)!r}: torch sees no CUDA device here; try 'cpu'")
    return found


def pick_dtype(
    dtype: str | torch.dtype, config: Mapping[str, Any], device: torch.device
) -> torch.dtype:
    """A dtype by name, "auto" for float32 on a CPU and the checkpoint's own elsewhere."""
    if isinstance(dtype, torch.dtype):
        dtype = str(dtype).removeprefix("torch.")
    if dtype == "auto":
        stored = str(config.get("dtype") or config.get("torch_dtype") or "bfloat16")
        dtype = "float32" if device.type == "cpu" or stored not in DTYPES else stored
    if dtype not in DTYPES:
        raise NotSupported(f"dtype {dtype!r}; there are: auto, {', '.join(DTYPES)}")
    return DTYPES[dtype]
