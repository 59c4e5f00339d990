"""Small models to test with: reference checkpoints, and random ones made from a configuration."""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache as once
from functools import cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

import kvist
from kvist.cache import Batch, Cache, KVCache, make_cache
from kvist.loading.checkpoint import random_weights
from kvist.loading.model import Model
from kvist.models import family_of
from kvist.runner.step import model_step

FIXTURES = Path(__file__).parent / "fixtures"
CHECKPOINTS = ("dense_tied", "dense_swa", "dense_untied_headdim")
LENGTHS = (1, 5, 17, 40, 120)

CONFIG: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "tie_word_embeddings": True,
    "eos_token_id": 60,
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 9,
}


@dataclass(frozen=True)
class Reference:
    """A checkpoint beside which stands what transformers computed from it."""

    path: Path

    @cached_property
    def model(self) -> Model:
        return kvist.load(self.path)

    @cached_property
    def tensors(self) -> dict[str, Tensor]:
        return load_file(self.path / "ref.safetensors")

    @cached_property
    def facts(self) -> dict[str, Any]:
        facts: dict[str, Any] = json.loads((self.path / "ref.json").read_text())
        return facts

    @property
    def prompts(self) -> list[list[int]]:
        """The five prompts, shortest first."""
        return [self.tensors[f"p{n}.input_ids"][0].tolist() for n in LENGTHS]

    @property
    def greedy(self) -> list[tuple[int, ...]]:
        """The 64 greedy tokens that follow each prompt."""
        return [tuple(self.tensors[f"p{n}.greedy_ids"][0].tolist()) for n in LENGTHS]


@once
def reference(name: str) -> Reference:
    return Reference(FIXTURES / "qwen3" / name)


@once
def tiny(seed: int = 0) -> Model:
    """A random model of 61 tokens and two layers, full and sliding; peaked enough to be told apart.

    It has no tokenizer.
    """
    return build(CONFIG, seed)


def build(config: dict[str, Any], seed: int = 0, **rest: Any) -> Model:
    """A random model from a config.json."""
    family = family_of(config)
    with torch.device("meta"):
        lm = family.build(family.read(config))
    random_weights(lm, dtype=torch.float32, device="cpu", seed=seed, std=0.4)
    lm.eval().requires_grad_(False)
    return Model(
        "tiny", lm, rest.pop("tokenizer", None), torch.float32, torch.device("cpu"), **rest
    )


def new_cache(model: Model, rows: int = 1, layout: str = "dynamic") -> Cache:
    return make_cache(
        model.specs, layout=layout, rows=rows, max_length=model.max_length, dtype=model.dtype
    )


@torch.no_grad()
def forward(
    model: Model, cache: Cache, tokens: Sequence[Sequence[int]], attention: str | None = None
) -> Tensor:
    """One step over new tokens of each sequence; the logits of all of them, `[N, vocab]`."""
    batch = Batch.pack(tokens, cache.lengths, logits="all")
    logits = model_step(model.lm)(batch, cache.bind(batch, backend=attention))
    cache.commit(batch)
    return logits


def whole_logits(model: Model, ids: Sequence[int]) -> Tensor:
    """`[N, vocab]` from one forward over all tokens, by reference attention."""
    return forward(model, new_cache(model), [ids], "reference")


class CountingStep:
    """The model's own step, and how many tokens each of its calls had."""

    def __init__(self, model: Model) -> None:
        self.step = model_step(model.lm)
        self.tokens: list[int] = []

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        self.tokens.append(batch.num_tokens)
        return self.step(batch, cache)
