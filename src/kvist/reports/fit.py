"""Counting: what a model, its activations and its cache take, and what fits into a memory.

`need` counts one setting; the rest searches for the largest that fits. Plain numbers from a
configuration: no weight is read and nothing is allocated. `plan` makes reports and advice of it.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace
from functools import cache

import torch

from kvist.cache import make_codec
from kvist.cache.groups import bytes_per_token, group_layers
from kvist.cache.ring import ring_size
from kvist.core.spec import AttentionSpec, LayerSpec
from kvist.core.tables import CacheGroup
from kvist.models.config import DecoderConfig

ACTIVATIONS = (
    "the larger of tokens x (4 hidden + 2 head_dim + max(4 q + kv, 3 intermediate)) x itemsize "
    "+ tokens x context x (1 + itemsize) for a mask + one layer's keys and values where they are "
    "decoded or gathered, and requests x vocabulary x 24 for the sampler; q = heads x head_dim, "
    "kv = key/value heads x head_dim, tokens of one step"
)
"""How activations are estimated, for people; `_activations` is the same in Python."""

BLOCK = 16
"""Tokens of a block of the paged layout."""

CHUNK = 2048
"""Prompt tokens of one step, at most."""


@dataclass(frozen=True)
class Setting:
    """What is to run, and how its cache is made.

    Args:
        config: the decoder's configuration.
        specs: what each layer's cache must hold, retention applied.
        weight_bytes: of all parameters, in the form in which they stay.
        fp8_bytes: what of them is in fp8, whatever the dtype.
        dtype: of weights and activations.
        codec: how keys and values are written.
        layout: where they lie.
        context: tokens of a request, prompt and output.
        concurrency: requests at a time.
        chunk: most prompt tokens of a step.
        packed: whether native code runs the weights as the file has them.
        cache_dtype: what a plain cache is kept in where it is not `dtype`.
    """

    config: DecoderConfig
    specs: tuple[LayerSpec, ...]
    weight_bytes: int
    dtype: torch.dtype
    codec: str
    layout: str
    context: int
    concurrency: int = 1
    chunk: int = CHUNK
    fp8_bytes: int = 0
    packed: bool = False
    cache_dtype: torch.dtype | None = None

    @property
    def token_bytes(self) -> tuple[tuple[AttentionSpec, int], ...]:
        """What one token takes in all layers of each spec."""
        return _token_bytes(self.specs, self.codec, self.dtype, self.cache_dtype)


@dataclass(frozen=True)
class Need:
    """Bytes that a setting takes."""

    weights: int
    activations: int
    cache: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.weights + self.activations + self.cache


@dataclass(frozen=True)
class CodecFit:
    """What one codec makes of the memory that is left for the cache.

    Args:
        codec: its name.
        bytes_per_token: of all layers, for a token that all of them keep.
        request_bytes: the cache of one request of the setting's context.
        tokens: that fit in all.
        requests: of that context, that fit at a time.
        longest: context of the longest requests of which the setting's concurrency fits.
    """

    codec: str
    bytes_per_token: int
    request_bytes: int
    tokens: int
    requests: int
    longest: int


# Counting.


def need(setting: Setting) -> Need:
    """Bytes that a setting takes."""
    requests = setting.concurrency
    return Need(setting.weight_bytes, _activations(setting), requests * request_bytes(setting))


def request_bytes(setting: Setting) -> int:
    """Bytes of the cache of one request as long as the context."""
    return sum(
        size * tokens_held(spec, setting.context, setting.layout, setting.chunk)
        for spec, size in setting.token_bytes
    )


@cache
def _token_bytes(
    specs: tuple[LayerSpec, ...], codec: str, dtype: torch.dtype, stored: torch.dtype | None
) -> tuple[tuple[AttentionSpec, int], ...]:
    made = make_codec(codec, dtype, stored=stored)
    return tuple((group.spec, bytes_per_token(group, made)) for group in group_layers(specs))


def tokens_held(spec: AttentionSpec, context: int, layout: str, chunk: int = CHUNK) -> int:
    """Tokens of a request of this length that a layer has room for at a time."""
    if layout == "paged":
        blocks = CacheGroup(spec, num_blocks=2)
        return BLOCK * blocks.most_blocks(context, min(chunk, context), 1, BLOCK)
    ring = ring_size(spec, context) if layout == "ring" else None
    return context if ring is None else spec.sinks + ring


def fits(setting: Setting, memory: int) -> bool:
    """Whether a setting takes no more than this many bytes."""
    return need(setting).total <= memory


def _activations(setting: Setting) -> int:
    """An estimate, from above, of what one step holds beside weights and cache; `ACTIVATIONS`.

    A layer's peak is where queries are rotated or where the MLP multiplies its two halves; the
    sampler's is the softmax and its running sum, in float64. A mask, and one layer's keys and
    values in the model's basis, are there where the kernel takes no other form.
    """
    config, itemsize = setting.config, setting.dtype.itemsize
    q = config.num_heads * config.head_dim
    kv = config.num_kv_heads * config.head_dim
    tokens = min(setting.chunk, setting.context)
    widest = max(4 * q + kv, 3 * config.intermediate_size)
    layer = tokens * (4 * config.hidden_size + 2 * config.head_dim + widest) * itemsize
    sampler = setting.concurrency * config.vocab_size * 24
    sizes = setting.token_bytes
    masked = tokens < setting.context or any(spec.window is not None for spec, _ in sizes)
    mask = tokens * setting.context * (1 + itemsize) if masked else 0
    lossless = make_codec(setting.codec, setting.dtype).lossless
    in_place = lossless and setting.layout in ("static", "dynamic")
    decoded = 0 if in_place else setting.concurrency * setting.context * 2 * kv * itemsize
    return max(layer + mask + decoded, sampler)


# Searching.


def codec_fit(setting: Setting, memory: int) -> CodecFit:
    """What the setting's codec makes of a memory of this many bytes."""
    sizes = setting.token_bytes
    cost = request_bytes(setting)
    used = need(setting)
    room = max(memory - used.weights - used.activations, 0)
    longest = longest_context(setting, memory)
    return CodecFit(
        codec=setting.codec,
        bytes_per_token=sum(size for _, size in sizes),
        request_bytes=cost,
        # With shorter requests a step takes less, and more may fit.
        tokens=max(room * setting.context // cost, longest * setting.concurrency),
        requests=most_requests(setting, memory),
        longest=longest,
    )


def most_requests(setting: Setting, memory: int) -> int:
    """Requests of the setting's context that fit at a time."""
    most = max(memory // request_bytes(setting), 1)
    return _largest(most, lambda n: fits(replace(setting, concurrency=n), memory))


def longest_context(setting: Setting, memory: int) -> int:
    """The longest context at which the setting's concurrency fits."""
    most = setting.config.max_positions
    return _largest(most, lambda n: fits(replace(setting, context=n), memory))


def _largest(most: int, suits: Callable[[int], bool]) -> int:
    """The largest number in 1..most that suits, 0 where none does; what is larger needs more."""
    low, high = 0, most  # `low` suits, what is over `high` does not
    while low < high:
        middle = (low + high + 1) // 2
        low, high = (middle, high) if suits(middle) else (low, middle - 1)
    return low
