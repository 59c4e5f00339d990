"""What fits, as a report: every codec against a memory, and what would make a setting fit.

From a configuration alone; `fit` does the counting. `kvist plan` prints it, and an engine sizes its
pool of blocks with it.
"""

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import TYPE_CHECKING

import torch
from torch import nn

from kvist.cache import CODECS, LAYOUTS
from kvist.core.retention import KeepAll, Retention
from kvist.core.spec import AttentionSpec, LayerSpec
from kvist.errors import CacheError, NotSupported, RequestError
from kvist.models.config import DecoderConfig
from kvist.models.decoder import Decoder
from kvist.models.fp8 import Fp8Linear, check_weights, use_fp8
from kvist.models.registry import family_of
from kvist.reports.fit import (
    CHUNK,
    CodecFit,
    Need,
    Setting,
    codec_fit,
    fits,
    longest_context,
    most_requests,
    need,
    request_bytes,
    tokens_held,
)
from kvist.reports.sizes import bytes_text

if TYPE_CHECKING:
    from kvist.loading.checkpoint import Checkpoint
    from kvist.native.weights import PackedSize

__all__ = ["Plan", "plan", "plan_model", "sliding_text"]

FREE_SHARE = 0.9
"""Of the memory that is free, how much is planned with where none is named."""


@dataclass(frozen=True)
class Plan:
    """What a setting needs of a memory, and what each codec would make of it.

    Args:
        setting: what was asked.
        memory: bytes there are.
        need: bytes that the setting takes.
        codecs: one for each registered codec, and for the setting's own.
        advice: in sentences, what would make it fit, or how much more would.
    """

    setting: Setting
    memory: int
    need: Need
    codecs: tuple[CodecFit, ...]
    advice: tuple[str, ...]

    @property
    def fits(self) -> bool:
        """Whether there is memory enough."""
        return self.need.total <= self.memory

    @property
    def chosen(self) -> CodecFit:
        """What the setting's own codec makes of it."""
        return next(fit for fit in self.codecs if fit.codec == self.setting.codec)


def plan(
    config: DecoderConfig,
    specs: Sequence[LayerSpec],
    *,
    weight_bytes: int,
    dtype: torch.dtype,
    memory: int,
    context: int,
    concurrency: int = 1,
    codec: str = "plain",
    layout: str = "paged",
    chunk: int = CHUNK,
    fp8_bytes: int = 0,
    packed: bool = False,
    cache_dtype: torch.dtype | None = None,
) -> Plan:
    """Plan a setting; arguments as in `Setting`, and `memory` in bytes.

    Raises:
        RequestError: a context that the model cannot have, or no request at all.
        CacheError: no codec of this name.
    """
    if not 0 < context <= config.max_positions:
        raise RequestError(
            f"this model's context is 1 to {config.max_positions:,} tokens, not {context:,}"
        )
    if concurrency < 1:
        raise RequestError(f"concurrency must be at least one request, not {concurrency}")
    setting = Setting(
        config,
        tuple(specs),
        weight_bytes,
        dtype,
        codec,
        layout,
        context,
        concurrency,
        chunk,
        fp8_bytes,
        packed,
        cache_dtype,
    )
    names = [*CODECS, *([] if codec in CODECS else [codec])]
    return Plan(
        setting=setting,
        memory=memory,
        need=need(setting),
        codecs=tuple(codec_fit(replace(setting, codec=name), memory) for name in names),
        advice=_advice(setting, memory),
    )


def plan_model(
    path_or_name: str,
    *,
    memory: int | None = None,
    context: int | None = None,
    concurrency: int = 1,
    codec: str = "plain",
    layout: str = "paged",
    retention: Retention | None = None,
    dtype: str = "auto",
    device: str = "auto",
    weights: str = "auto",
) -> tuple[Plan, str]:
    """Plan a model by its name, from its configuration file.

    Args:
        path_or_name: as in `kvist.load`, and `dtype`, `device` and `weights` alike.
        memory: bytes; None takes most of what is free on the device.
        context: tokens of a request; None takes the model's limit.
        concurrency: requests at a time.
        codec: how keys and values are written.
        layout: where they lie.
        retention: which tokens stay; all by default.

    Returns:
        The plan, and where its memory is.
    """
    from kvist.loading.checkpoint import open_checkpoint
    from kvist.loading.hub import resolve
    from kvist.loading.model import pick_device, pick_dtype
    from kvist.runner.memory import available_memory

    check_weights(weights)
    where = pick_device(device)
    checkpoint = open_checkpoint(resolve(path_or_name, weights=False), weights=False)
    kind = pick_dtype(dtype, checkpoint.config, where)
    whole, lm = _without_weights(checkpoint)
    use_fp8(lm, weights)
    rounded = [module for module in lm.modules() if isinstance(module, Fp8Linear)]
    fp8_bytes = sum(module.nbytes for module in rounded)
    others = sum(p.numel() for p in whole.parameters()) - sum(m.weight.numel() for m in rounded)
    config = lm.config
    if layout not in LAYOUTS:
        raise CacheError(f"no cache layout named {layout!r}; there are: {', '.join(LAYOUTS)}")
    native = _packed(checkpoint, config, kind, where) if weights == "auto" else None
    if memory is None:
        memory = int(available_memory(where) * FREE_SHARE)
        place = f"{FREE_SHARE:.0%} of what is free here ({where.type})"
    else:
        place = "given"
    made = plan(
        config,
        [(retention or KeepAll()).apply(spec) for spec in config.specs],
        weight_bytes=native.weights if native else others * kind.itemsize + fp8_bytes,
        fp8_bytes=fp8_bytes,
        packed=native is not None,
        cache_dtype=native.cache_dtype if native else None,
        dtype=kind,
        memory=memory,
        context=context or config.max_positions,
        concurrency=concurrency,
        codec=codec,
        layout=layout,
    )
    return made, place


def _packed(
    checkpoint: "Checkpoint", config: DecoderConfig, dtype: torch.dtype, device: torch.device
) -> "PackedSize | None":
    """What native code would keep of a checkpoint; None where it would not run it."""
    from kvist.loading.gguf import GGUFCheckpoint
    from kvist.loading.model import chooses_native
    from kvist.native.weights import packed_size

    if not chooses_native(checkpoint, dtype, device):
        return None
    assert isinstance(checkpoint, GGUFCheckpoint)
    try:
        return packed_size(config, checkpoint)
    except NotSupported:
        return None


def _without_weights(checkpoint: "Checkpoint") -> tuple[nn.Module, Decoder]:
    """A checkpoint's model on the meta device, and the decoder in it, which has the cache."""
    from kvist.loading.checkpoint import open_checkpoint
    from kvist.loading.hub import resolve
    from kvist.models.nanovlm import VisionLanguageModel, is_nanovlm, read_vlm

    with torch.device("meta"):
        if not is_nanovlm(checkpoint.config):
            family = family_of(checkpoint.config)
            lm = family.build(family.read(checkpoint.config))
            return lm, lm
        language = None
        if name := checkpoint.config.get("lm_weights"):  # the language model lies elsewhere
            nearby = checkpoint.path / name
            found = nearby if nearby.exists() else resolve(name, weights=False)
            beside = open_checkpoint(found, weights=False)
            language = family_of(beside.config).read(beside.config)
        vlm = VisionLanguageModel(read_vlm(checkpoint.config, language=language))
        return vlm, vlm.language


def sliding_text(setting: Setting) -> str:
    """In words, which layers hold less than the context; nothing if none does."""
    held = Counter(
        spec.window
        for spec in setting.specs
        if isinstance(spec, AttentionSpec)
        and tokens_held(spec, setting.context, setting.layout, setting.chunk) < setting.context
    )
    each = [f"{count} of {len(setting.specs)} layers keep {size:,}" for size, count in held.items()]
    return f" ({', '.join(each)})" if each else ""


# Advice.


def _advice(setting: Setting, memory: int) -> tuple[str, ...]:
    """Whether it fits, and what would."""
    total = need(setting).total
    if total <= memory:
        requests, longest = most_requests(setting, memory), longest_context(setting, memory)
        more = f"{_requests(requests)} of {setting.context:,} tokens"
        longer = f", or {_requests(setting.concurrency)} of {longest:,}"
        return (
            f"It fits, with {bytes_text(memory - total)} to spare.",
            f"There is room for {more}{longer * (longest > setting.context)}.",
        )
    ways = _ways_to_fit(setting, memory) or _last_way_to_fit(setting, memory)
    return (
        f"It does not fit: {bytes_text(total - memory)} short.",
        f"It would {', or '.join([*ways, f'with {bytes_text(total)} of memory'])}.",
    )


def _ways_to_fit(setting: Setting, memory: int) -> list[str]:
    """What makes a setting fit if nothing else is changed."""
    ways = []
    if fits(half := _halved(setting), memory):
        ways.append(f"in bfloat16 ({bytes_text(need(half).total)})")
    smaller = [s for s in _by_codec(setting) if request_bytes(s) < request_bytes(setting)]
    # The largest that fits: what is larger is nearer to the plain cache.
    if (codec := next((s for s in smaller if fits(s, memory)), None)) is not None:
        ways.append(f"with the codec {codec.codec} ({bytes_text(need(codec).total)})")
    if setting.layout != "paged" and fits(replace(setting, layout="paged"), memory):
        ways.append("with the paged layout, which gives back what is behind a window")
    if longest := longest_context(setting, memory):
        ways.append(f"with a context of {_rounded(longest):,} tokens")
    if requests := most_requests(setting, memory):
        ways.append(f"with {_requests(requests)} at a time")
    return ways


def _last_way_to_fit(setting: Setting, memory: int) -> list[str]:
    """All savings together, where none does it alone."""
    smallest = _halved(_by_codec(replace(setting, concurrency=1))[-1])
    if not (longest := longest_context(smallest, memory)):
        return []
    bfloat16 = " in bfloat16" if smallest.dtype != setting.dtype else ""
    codec = f" with the codec {smallest.codec}" if smallest.codec != setting.codec else ""
    return [f"{bfloat16}{codec} and one request of {_rounded(longest):,} tokens".removeprefix(" ")]


def _halved(setting: Setting) -> Setting:
    """The setting in a type of two bytes, where that makes it smaller."""
    if setting.dtype.itemsize <= 2 or setting.packed:
        return setting
    factor = setting.dtype.itemsize // 2
    whole = setting.weight_bytes - setting.fp8_bytes
    weight_bytes = whole // factor + setting.fp8_bytes
    return replace(setting, dtype=torch.bfloat16, weight_bytes=weight_bytes)


def _by_codec(setting: Setting) -> list[Setting]:
    """The setting with each codec, the largest cache first."""
    each = (replace(setting, codec=name) for name in CODECS)
    return sorted(each, key=request_bytes, reverse=True)


def _rounded(tokens: int) -> int:
    """Down to a number that people use."""
    return tokens - tokens % 256 if tokens > 1024 else tokens


def _requests(count: int) -> str:
    return f"{count:,} request{'' if count == 1 else 's'}"
