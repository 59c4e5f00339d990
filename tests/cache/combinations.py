"""Every layout x codec x retention x attention there is, tiny models to try them on, and what each
combination is held against: one sequence alone, in one piece, in a dynamic cache, read by the
reference attention.

Nothing is listed by name that registers itself: a new layout, codec or kernel is found here.
"""

from collections.abc import Callable, Sequence
from functools import cache as once
from functools import partial
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvist.attention import BACKENDS
from kvist.cache import Batch, Cache, make_cache
from kvist.cache.dense import DynamicCache
from kvist.cache.paged_cache import PagedCache
from kvist.cache.ring import RingCache
from kvist.core.plan import NULL_BLOCK
from kvist.core.retention import KeepAll, Retention, SlidingWindow
from kvist.loading.model import Model
from tiny_models import CONFIG, build

LENGTH = 64
VOCAB = 61
SLACK = 4  # tokens that every layout can go back
CHUNK = 5  # most new tokens of a step that every layout takes

RETENTIONS: dict[str, Retention] = {
    "all": KeepAll(),
    "window": SlidingWindow(7),
    "window and sinks": SlidingWindow(6, sinks=3),
}
# Triton runs in its interpreter only when asked for, and has tests of its own.
ATTENTION = [name for name in BACKENDS if name != "triton"]

FULL, SLIDING = "full_attention", "sliding_attention"
LAYERS = {"num_hidden_layers": 3, "layer_types": [SLIDING, FULL, SLIDING]}
MODELS: dict[str, dict[str, Any]] = {
    "grouped, 12": CONFIG | LAYERS | {"head_dim": 12},
    "multi-query, 20": CONFIG | LAYERS | {"head_dim": 20, "num_key_value_heads": 1},
    "24": CONFIG | LAYERS | {"head_dim": 24, "num_key_value_heads": 4},
    "80": CONFIG | LAYERS | {"head_dim": 80, "num_attention_heads": 2, "num_key_value_heads": 1},
    "llama, 16": {
        **{k: v for k, v in CONFIG.items() if k not in ("layer_types", "use_sliding_window")},
        "model_type": "llama",
        "head_dim": 16,
    },
}

# Small enough that rings close and blocks are given back within a test.
SMALL: dict[str, Callable[..., Cache]] = {
    "ring": partial(RingCache, max_chunk=CHUNK, slack=SLACK),
    "paged": partial(PagedCache, block_size=4, slack=SLACK),
}


@once
def model_of(name: str) -> Model:
    """A random model of tiny size."""
    return build(MODELS[name], seed=len(name))


def cache_of(
    model: Model, layout: str, codec: str = "plain", retention: str = "all", rows: int = 1
) -> Cache:
    """An empty cache of this combination, its rings and blocks small."""
    options: dict[str, Any] = {
        "codec": model.codec(codec),
        "retention": RETENTIONS[retention],
        "rows": rows,
    }
    if layout in SMALL:
        return SMALL[layout](model.specs, **options)
    return make_cache(model.specs, layout=layout, max_length=LENGTH, dtype=model.dtype, **options)


@torch.no_grad()
def step(
    model: Model,
    cache: Cache,
    tokens: Sequence[Sequence[int]],
    attention: str | None = None,
    *,
    commit: bool = True,
) -> list[Tensor]:
    """One step; the logits `[L, vocab]` of each row's new tokens."""
    batch = Batch.pack(tokens, cache.lengths, logits="all")
    bound = cache.bind(batch, backend=attention)
    hidden = model.lm.forward(model.lm.embed(batch.token_ids), batch.positions, bound)
    if commit:
        cache.commit(batch)
    return list(model.lm.logits(hidden).split(list(batch.query_lens)))


@once
def expected(name: str, codec: str, retention: str, tokens: tuple[int, ...]) -> Tensor:
    """`[N, vocab]` of one sequence alone, in one piece, with the plainest parts."""
    model = model_of(name)
    cache = DynamicCache(model.specs, model.codec(codec), retention=RETENTIONS[retention])
    return step(model, cache, [tokens], "reference")[0]


@once
def tolerance(name: str, codec: str, retention: str, tokens: tuple[int, ...]) -> float:
    """How far a logit may be off: lossless, by the order of sums.

    Lossy, a number near the border between two levels may fall on either side of it. That is rare,
    so it moves logits by less than writing every number in few bits does.
    """
    if model_of(name).codec(codec).lossless:
        return 1e-3
    loss = expected(name, codec, retention, tokens) - expected(name, "plain", retention, tokens)
    return 1e-3 + 0.5 * float(loss.abs().max())


@torch.no_grad()
def without_a_cache(model: Model, tokens: Sequence[int], retention: Retention) -> Tensor:
    """`[N, vocab]` by nothing but the weights and an explicit mask, in float64."""
    lm, count = model.lm, len(tokens)
    rotation = lm.model.rotary(torch.arange(count), torch.float64)
    x = lm.embed(torch.tensor(tokens)).double()
    query, key = torch.arange(count)[:, None], torch.arange(count)[None]

    def norm(module: torch.nn.Module, y: Tensor) -> Tensor:
        if isinstance(module, torch.nn.Identity):
            return y
        return F.rms_norm(y, y.shape[-1:], module.weight.double(), module.eps)

    def linear(module: torch.nn.Linear, y: Tensor) -> Tensor:
        return F.linear(y, module.weight.double())

    def rotated(y: Tensor) -> Tensor:
        half = y.shape[-1] // 2
        return y * rotation[0] + torch.cat((y[..., half:], y[..., :half]), dim=-1) * rotation[1]

    for layer, spec in zip(lm.model.layers, model.specs, strict=True):
        spec = retention.apply(spec)
        attention, heads = layer.self_attn, (-1, spec.head_dim)
        y = norm(layer.input_layernorm, x)
        q = rotated(norm(attention.q_norm, linear(attention.q_proj, y).unflatten(-1, heads)))
        k = rotated(norm(attention.k_norm, linear(attention.k_proj, y).unflatten(-1, heads)))
        v = linear(attention.v_proj, y).unflatten(-1, heads)
        group = q.shape[1] // k.shape[1]
        k, v = (z.repeat_interleave(group, dim=1) for z in (k, v))
        scores = torch.einsum("qhd,khd->hqk", q, k) * spec.head_dim**-0.5
        seen = key <= query
        if spec.window is not None:
            seen = seen & ((key > query - spec.window) | (key < spec.sinks))
        weights = scores.masked_fill(~seen, -torch.inf).softmax(dim=-1)
        mixed = torch.einsum("hqk,khd->qhd", weights, v).flatten(1)
        x = x + linear(attention.o_proj, mixed)
        y = norm(layer.post_attention_layernorm, x)
        mlp = layer.mlp
        x = x + linear(mlp.down_proj, F.silu(linear(mlp.gate_proj, y)) * linear(mlp.up_proj, y))
    return linear(lm.lm_head, norm(lm.model.norm, x)).float()


def poison(cache: Cache) -> None:
    """Fill free places with ones in every bit, NaN in any float, where a layout may leave anything.

    The dense layouts promise zeros there instead.
    """
    if isinstance(cache, RingCache):
        _poison_rings(cache)
    elif isinstance(cache, PagedCache):
        for pool, blocks in zip(cache.pool.pools, cache.blocks, strict=True):
            free = [b for b, users in enumerate(blocks.users) if not users or b == NULL_BLOCK]
            for plane in pool._bytes:
                plane[free] = 0xFF


def _poison_rings(cache: RingCache) -> None:
    if cache._sources is not None or not cache._layers:
        return  # rows are not yet what they will be
    for layer_idx, spec in enumerate(cache.specs):
        if spec not in cache.ring_sizes:
            continue
        places = spec.sinks + cache.ring_sizes[spec]
        for row in range(len(cache.lengths)):
            free = torch.ones(places, dtype=torch.bool)
            for held in cache.held(layer_idx, row):
                positions = torch.arange(held.start, held.stop)
                free[cache._places(layer_idx, positions)] = False
            for planes in cache._layers[layer_idx].values():
                for plane in planes.values():
                    data = plane[..., None].view(torch.uint8)  # [rows, heads, places, ...]
                    data[row][:, free] = 0xFF
