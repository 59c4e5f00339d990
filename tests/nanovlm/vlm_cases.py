"""Two checkpoints with nanoVLM's own results, and a plain greedy loop over the model's parts.

The loop is written out here so that these tests pin the parts (spans, chunks, embeddings) and not
`generate()`, which has tests of its own.
"""

import json
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache, cached_property
from pathlib import Path
from typing import Any

import torch
from safetensors.torch import load_file
from torch import Tensor

from kvist.cache import Batch, Cache, make_cache
from kvist.core.request import ImageSpan
from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.image_prompt import PreparedPrompt
from kvist.loading.images import digest_of
from kvist.loading.nanovlm import NanoVLM, load_nanovlm
from kvist.runner.encoder_cache import EncodedImages, with_images

FIXTURES = Path(__file__).parents[1] / "fixtures"
NANOVLM = FIXTURES / "nanovlm"
CHELSEA = NANOVLM / "chelsea.png"
TOLERANCE = 1e-3


@dataclass(frozen=True)
class Case:
    """A checkpoint, loaded, and its references."""

    path: Path
    loaded: NanoVLM

    @cached_property
    def ref(self) -> dict[str, Tensor]:
        return load_file(self.path / "ref.safetensors")

    @cached_property
    def facts(self) -> dict[str, Any]:
        return json.loads((self.path / "ref.json").read_text())  # type: ignore[no-any-return]

    def prompt(self, name: str) -> PreparedPrompt:
        """A reference's ids with its pixels as spans."""
        ids = self.ref[f"vlm.{name}.input_ids"][0].tolist()
        pixels = [p for i in range(2) for p in self.ref.get(f"vlm.{name}.pixels.{i}", ())]
        places = [i for i, token in enumerate(ids) if token == self.facts["image_token_id"]]
        length = self.loaded.processor.image_tokens
        assert len(places) == len(pixels) * length
        spans = tuple(
            ImageSpan(places[i * length], length, digest_of(p), p) for i, p in enumerate(pixels)
        )
        return PreparedPrompt(tuple(ids), spans)

    def ids(self, name: str) -> list[int]:
        return self.ref[f"vlm.{name}.generated_ids"][0].tolist()  # type: ignore[no-any-return]


@cache
def case(name: str) -> Case:
    """`vlm_tied` or `vlm_untied`; loaded once, and never changed by a test."""
    path = NANOVLM / name
    return Case(path, load(path))


def load(path: Path) -> NanoVLM:
    return load_nanovlm(open_checkpoint(path), dtype=torch.float32, device="cpu")


@torch.inference_mode()
def greedy(
    loaded: NanoVLM,
    prompts: Sequence[PreparedPrompt],
    new: int,
    *,
    chunk: int = 10_000,
    layout: str = "dynamic",
    images: EncodedImages | None = None,
    cache: Cache | None = None,
) -> tuple[list[list[int]], Tensor]:
    """Greedy ids of each prompt, and the logits they were chosen by, `[prompts, new, vocab]`.

    A cache that holds the beginning of the prompts already is gone on with.
    """
    lm = loaded.model.language
    if images is None:
        images = EncodedImages(loaded.model.encode_images)
    longest = max(len(p.token_ids) for p in prompts) + new
    if cache is None:
        cache = make_cache(
            lm.specs, rows=len(prompts), layout=layout, max_length=longest, dtype=torch.float32
        )
    spans = [prompt.spans for prompt in prompts]
    chosen: list[list[int]] = [[] for _ in prompts]
    steps: list[list[Tensor]] = [[] for _ in prompts]
    while len(chosen[0]) < new or len({len(c) for c in chosen}) > 1:
        parts = []
        for prompt, output, start in zip(prompts, chosen, cache.lengths, strict=True):
            known = (*prompt.token_ids, *output)
            parts.append(() if len(output) == new else known[start : start + chunk])
        batch = with_images(Batch.pack(parts, cache.lengths), lm, spans, images)
        embeddings = lm.embed(batch.token_ids) if batch.embeddings is None else batch.embeddings
        hidden = lm(embeddings, batch.positions, cache.bind(batch))
        cache.commit(batch)
        logits = iter(lm.logits(hidden[batch.logit_rows]))
        for i, (part, prompt) in enumerate(zip(parts, prompts, strict=True)):
            if not part:
                continue
            scores = next(logits)
            if cache.lengths[i] >= len(prompt.token_ids) + len(chosen[i]):
                chosen[i].append(int(scores.argmax()))
                steps[i].append(scores)
    return chosen, torch.stack([torch.stack(s) for s in steps])
