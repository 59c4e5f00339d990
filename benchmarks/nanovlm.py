"""nanoVLM's shapes: kvist beside the original's algorithm, on the same random weights.

The baseline is written here after nanoVLM's own loop: keys and values are concatenated and their
heads repeated at every step, prompts are padded into one rectangle, nothing stops before the last
token, and the forward pass behind that token is computed too. Both are asked for the same greedy
tokens, and the result says whether they agree.

    python benchmarks/nanovlm.py [--shapes 222M 450M] [--batches 1 8] [--threads 2] [--json FILE]
"""

import argparse
import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor
from torch.nn import functional as F

from kvist.cache import Batch, make_cache
from kvist.core.request import ImageSpan
from kvist.loading.checkpoint import random_weights
from kvist.models.nanovlm import VisionLanguageModel, read_vlm
from kvist.models.rope import rope_frequencies
from kvist.runner.encoder_cache import EncodedImages, with_images

VIT_BASE = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_n_heads": 12,
    "vit_n_blocks": 12,
}
SMOLLM2_135M = {
    "lm_hidden_dim": 576,
    "lm_inter_dim": 1536,
    "lm_n_heads": 9,
    "lm_n_kv_heads": 3,
    "lm_n_blocks": 30,
}
SMOLLM2_360M = {
    "lm_hidden_dim": 960,
    "lm_inter_dim": 2560,
    "lm_n_heads": 15,
    "lm_n_kv_heads": 5,
    "lm_n_blocks": 32,
}
SHARED = {
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192,
    "lm_vocab_size": 49152,
    "mp_pixel_shuffle_factor": 2,
}
SHAPES: dict[str, dict[str, Any]] = {
    "222M": VIT_BASE | SMOLLM2_135M | SHARED | {"vit_img_size": 224},
    "450M": VIT_BASE | SMOLLM2_360M | SHARED | {"vit_img_size": 256},
    "tiny": VIT_BASE
    | SMOLLM2_135M
    | SHARED
    | {"vit_img_size": 224, "vit_n_blocks": 1, "lm_n_blocks": 2, "lm_vocab_size": 512},
}


@dataclass(frozen=True)
class Work:
    """Prompts of equal length, one picture each, in front of the text."""

    pixels: Tensor  # [batch, 3, H, W]
    text: Tensor  # [batch, text tokens]
    new_tokens: int


Run = Callable[[VisionLanguageModel, Work], Iterator[list[int]]]


def baseline(vlm: VisionLanguageModel, work: Work) -> Iterator[list[int]]:
    """Generate as nanoVLM does; yields each step's tokens."""
    lm = vlm.language
    images = vlm.encode_images(work.pixels)
    x = torch.cat((images, lm.embed(work.text)), dim=1)
    mask = torch.ones(x.shape[:2])
    cache: list[tuple[Tensor, Tensor]] | None = None
    x, cache = _baseline_forward(vlm, x, mask, cache, 0)
    length = mask.shape[1]
    logits = lm.lm_head(x[:, -1])
    for _ in range(work.new_tokens):
        chosen = logits.argmax(dim=-1, keepdim=True)
        yield chosen[:, 0].tolist()
        mask = torch.cat((mask, torch.ones(len(mask), 1)), dim=1)
        x, cache = _baseline_forward(vlm, lm.embed(chosen), mask, cache, length)
        length += 1
        logits = lm.lm_head(x[:, -1])


def _baseline_forward(
    vlm: VisionLanguageModel,
    x: Tensor,
    mask: Tensor,
    cache: list[tuple[Tensor, Tensor]] | None,
    start: int,
) -> tuple[Tensor, list[tuple[Tensor, Tensor]]]:
    """`[B, T, hidden]` through all blocks; returns hidden states and the grown cache."""
    model, config = vlm.language.model, vlm.config.language
    groups = config.num_heads // config.num_kv_heads
    angles = torch.arange(start, start + x.shape[1])[:, None].float() * rope_frequencies(
        config.rope
    )
    cos, sin = (f(torch.cat((angles, angles), dim=-1)) for f in (torch.cos, torch.sin))

    def norm(x: Tensor, weight: Tensor) -> Tensor:
        return x * torch.rsqrt((x**2).mean(dim=-1, keepdim=True) + config.rms_norm_eps) * weight

    def rotate(x: Tensor) -> Tensor:
        first, second = x.chunk(2, dim=-1)
        return x * cos + torch.cat((-second, first), dim=-1) * sin

    def heads(x: Tensor) -> Tensor:
        return x.unflatten(-1, (-1, config.head_dim)).transpose(1, 2)  # type: ignore[no-any-return]

    grown = []
    layers: Any = model.layers
    for i, layer in enumerate(layers):
        attention, residual = layer.self_attn, x
        x = norm(x, layer.input_layernorm.weight)
        q, k = rotate(heads(attention.q_proj(x))), rotate(heads(attention.k_proj(x)))
        v = heads(attention.v_proj(x))
        if cache is not None:
            k, v = torch.cat((cache[i][0], k), dim=2), torch.cat((cache[i][1], v), dim=2)
        grown.append((k, v))
        additive = (1.0 - mask[:, None, None, : k.shape[2]]) * torch.finfo(q.dtype).min
        causal = q.shape[2] == k.shape[2] and q.shape[2] > 1
        if causal:  # one mask for padding and order: sdpa takes no mask beside is_causal
            order = torch.full((q.shape[2], q.shape[2]), torch.finfo(q.dtype).min).triu(1)
            additive = (additive + order).clamp_min(torch.finfo(q.dtype).min)
        mixed = F.scaled_dot_product_attention(
            q,
            k.repeat_interleave(groups, dim=1),
            v.repeat_interleave(groups, dim=1),
            attn_mask=additive,
        )
        x = residual + attention.o_proj(mixed.transpose(1, 2).flatten(2))
        mlp, residual = layer.mlp, x
        x = norm(x, layer.post_attention_layernorm.weight)
        x = residual + mlp.down_proj(F.silu(mlp.gate_proj(x)) * mlp.up_proj(x))
    return norm(x, model.norm.weight), grown


def kvist(vlm: VisionLanguageModel, work: Work) -> Iterator[list[int]]:
    """Generate with kvist's parts: packed prompts, image spans, a cache that grows in steps."""
    lm, length = vlm.language, vlm.config.image_tokens
    images = EncodedImages(vlm.encode_images)
    spans = [[ImageSpan(0, length, str(i), pixels)] for i, pixels in enumerate(work.pixels)]
    tokens = [[0] * length + text for text in work.text.tolist()]
    total = len(tokens[0]) + work.new_tokens
    cache = make_cache(lm.specs, rows=len(tokens), max_length=total, dtype=torch.float32)
    for _ in range(work.new_tokens):
        batch = with_images(Batch.pack(tokens, cache.lengths), lm, spans, images)
        embeddings = lm.embed(batch.token_ids) if batch.embeddings is None else batch.embeddings
        hidden = lm(embeddings, batch.positions, cache.bind(batch))
        cache.commit(batch)
        chosen = lm.logits(hidden[batch.logit_rows]).argmax(dim=-1).tolist()
        yield chosen
        tokens = [[token] for token in chosen]


@dataclass(frozen=True)
class Measured:
    """One engine on one shape and batch: medians over the repeats."""

    shape: str
    engine: str
    batch: int
    prompt_tokens: int
    new_tokens: int
    ttft_ms: float
    decode_tok_s: float
    same_ids: bool


RUNS: dict[str, Run] = {"baseline": baseline, "kvist": kvist}


@torch.inference_mode()
def measure(
    shape: str, batches: list[int], text_tokens: int, new_tokens: int, repeats: int
) -> list[Measured]:
    """Both engines in turn, so that a slow moment of the machine hits both."""
    config = read_vlm(SHAPES[shape])
    with torch.device("meta"):
        vlm = VisionLanguageModel(config)
    random_weights(vlm, dtype=torch.float32, device="cpu")
    vlm.eval()
    results = []
    for batch in batches:
        generator = torch.Generator().manual_seed(0)
        side, vocab = config.vision.image_size, config.language.vocab_size
        work = Work(
            torch.rand(batch, 3, side, side, generator=generator),
            torch.randint(vocab, (batch, text_tokens), generator=generator),
            new_tokens,
        )
        times: dict[str, list[tuple[float, float]]] = {name: [] for name in RUNS}
        ids: dict[str, list[list[int]]] = {}
        for _ in range(repeats + 1):  # the first is a warm-up
            for name, run in RUNS.items():
                began = time.perf_counter()
                steps = run(vlm, work)
                first = next(steps)
                prefilled = time.perf_counter()
                ids[name] = [first, *steps]
                times[name].append((prefilled - began, time.perf_counter() - prefilled))
        for name, taken in times.items():
            ttft = statistics.median(t for t, _ in taken[1:])
            decode = statistics.median(t for _, t in taken[1:])
            results.append(
                Measured(
                    shape=shape,
                    engine=name,
                    batch=batch,
                    prompt_tokens=config.image_tokens + text_tokens,
                    new_tokens=new_tokens,
                    ttft_ms=round(1e3 * ttft, 1),
                    decode_tok_s=round(batch * (new_tokens - 1) / decode, 1),
                    same_ids=ids[name] == ids["baseline"],
                )
            )
            print(results[-1], file=sys.stderr, flush=True)
    return results


def surroundings() -> dict[str, Any]:
    """What the figures depend on beside the code."""
    git = subprocess.run(
        ["git", "rev-parse", "HEAD"],
        capture_output=True,
        text=True,
        check=False,
        cwd=Path(__file__).parent,
    )
    return {
        "command": " ".join(sys.argv),
        "commit": git.stdout.strip(),
        "python": platform.python_version(),
        "torch": torch.__version__,
        "threads": torch.get_num_threads(),
        "machine": _processor(),
    }


def _processor() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor()


def main() -> None:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--shapes", nargs="+", choices=SHAPES, default=["222M", "450M"])
    parser.add_argument("--batches", nargs="+", type=int, default=[1, 8])
    parser.add_argument("--text-tokens", type=int, default=448)
    parser.add_argument("--new-tokens", type=int, default=64)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--threads", type=int, help="torch's; all cores by default")
    parser.add_argument("--json", type=Path, default=Path("benchmarks/results/nanovlm.json"))
    args = parser.parse_args()
    if args.threads:
        torch.set_num_threads(args.threads)
    results = [
        asdict(measured)
        for shape in args.shapes
        for measured in measure(
            shape, args.batches, args.text_tokens, args.new_tokens, args.repeats
        )
    ]
    args.json.parent.mkdir(parents=True, exist_ok=True)
    args.json.write_text(json.dumps({**surroundings(), "results": results}, indent=1) + "\n")
    print(f"written: {args.json}")


if __name__ == "__main__":
    main()
