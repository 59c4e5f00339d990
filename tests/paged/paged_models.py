"""Tiny random models, and a loop that runs them over any cache with the tokens it is given."""

from collections.abc import Sequence

import torch
from torch import Tensor

from kvist.cache import Batch, Cache
from kvist.cache.block_pool import BlockPool
from kvist.models.decoder import Decoder
from kvist.models.registry import family_of

VOCAB = 61
WINDOW = 9


def tiny_model(model_type: str, *, seed: int = 0) -> Decoder:
    """A `llama`, or a `qwen3` whose layers are full, sliding, sliding, full; weights large enough
    that attention is far from uniform.
    """
    config = {
        "model_type": model_type,
        "vocab_size": VOCAB,
        "hidden_size": 32,
        "intermediate_size": 48,
        "num_hidden_layers": 4 if model_type == "qwen3" else 2,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 16,
        "max_position_embeddings": 512,
        "tie_word_embeddings": True,
    }
    if model_type == "qwen3":
        full, sliding = "full_attention", "sliding_attention"
        config |= {
            "layer_types": [full, sliding, sliding, full],
            "use_sliding_window": True,
            "sliding_window": WINDOW,
        }
    family = family_of(config)
    generator = torch.Generator().manual_seed(seed)
    model = family.build(family.read(config))
    for parameter in model.parameters():
        if parameter.dim() == 2:
            parameter.data.normal_(0, 0.3, generator=generator)
    return model.eval().requires_grad_(False)


def random_tokens(count: int, seed: int = 0) -> list[int]:
    """Token ids of the tiny vocabulary."""
    generator = torch.Generator().manual_seed(seed)
    return torch.randint(0, VOCAB, (count,), generator=generator).tolist()


def forward(
    model: Decoder,
    cache: Cache,
    tokens: Sequence[Sequence[int]],
    *,
    backend: str | None = None,
    commit: bool = True,
) -> list[Tensor]:
    """One step; the logits `[L, vocab]` of each sequence's new tokens."""
    device = model.lm_head.weight.device
    batch = Batch.pack(tokens, cache.lengths, logits="all", device=device)
    bound = cache.bind(batch, backend=backend)
    hidden = model.forward(model.embed(batch.token_ids), batch.positions, bound)
    if commit:
        cache.commit(batch)
    return list(model.logits(hidden).split(list(batch.query_lens)))


def run(
    model: Decoder,
    cache: Cache,
    sequences: Sequence[Sequence[int]],
    chunks: Sequence[int],
    backend: str | None = None,
) -> list[Tensor]:
    """Feed whole sequences, sequence b in steps of `chunks[b]` tokens; all logits of each."""
    parts: list[list[Tensor]] = [[] for _ in sequences]
    starts = cache.lengths
    while any(n - s < len(t) for n, s, t in zip(cache.lengths, starts, sequences, strict=True)):
        step = [
            list(tokens[length - start : length - start + chunk])
            for tokens, chunk, start, length in zip(
                sequences, chunks, starts, cache.lengths, strict=True
            )
        ]
        for part, logits in zip(parts, forward(model, cache, step, backend=backend), strict=True):
            part.append(logits)
    return [torch.cat(part) for part in parts]


def poison(pool: BlockPool, blocks: Sequence[int] | None = None) -> None:
    """Fill some blocks, or all of them, with ones in every bit: NaN in any floating-point type."""
    chosen = range(pool.num_blocks) if blocks is None else blocks
    for plane in pool._bytes:
        plane[list(chosen)] = 0xFF
