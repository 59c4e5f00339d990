"""What rounded activations cost: the native step against the same GGUF dequantised, on real text.

    python benchmarks/native_accuracy.py TEXT... [--model NAME] [--tokens 16384] [--json PATH]

Windows of 1,024 tokens, each with an empty cache; perplexity of both, their difference paired by
window with its standard error, the KL divergence, and how often both have the same likeliest token.
"""

import argparse
import json
from pathlib import Path

import torch
from torch.nn.functional import cross_entropy, log_softmax

import kvist
from kvist.cache import Batch, make_cache
from kvist.runner.executors import choose_step

WINDOW = 1024


def main() -> None:
    """Measure, print a line, write JSON."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("texts", nargs="+", type=Path)
    parser.add_argument("--model", default="smollm2-135m")
    parser.add_argument("--tokens", type=int, default=16 * WINDOW)
    parser.add_argument("--codec", default="plain")
    parser.add_argument("--json", type=Path)
    args = parser.parse_args()
    rounded = kvist.load(args.model, device="cpu", executor="native")
    exact = kvist.load(args.model, device="cpu", executor="reference")
    ids = [
        token
        for path in args.texts
        for token in exact.require_tokenizer().encode(path.read_text(encoding="utf-8"))
    ][: args.tokens]
    windows = [ids[i : i + WINDOW] for i in range(0, len(ids) - WINDOW + 1, WINDOW)]
    losses, divergences, agreed = [], [], []
    for window in windows:
        a, b = (logits_of(model, window, args.codec) for model in (exact, rounded))
        wanted = torch.tensor(window[1:])
        losses.append([float(cross_entropy(x[:-1], wanted)) for x in (a, b)])
        p, q = log_softmax(a, -1), log_softmax(b, -1)
        divergences.append(float((p.exp() * (p - q)).sum(-1).mean()))
        agreed.append(float((a.argmax(-1) == b.argmax(-1)).float().mean()))
    table = torch.tensor(losses, dtype=torch.float64)
    change = table[:, 1] - table[:, 0]
    found = {
        "tokens": len(windows) * WINDOW,
        "perplexity": table.mean(0).exp().tolist(),
        "change_percent": 100 * float(change.mean().exp() - 1),
        "standard_error_percent": 100 * float(change.std() / len(windows) ** 0.5),
        "kl": sum(divergences) / len(windows),
        "same_likeliest": sum(agreed) / len(windows),
        "native": repr(rounded.native),
    }
    print(json.dumps(found))
    if args.json:
        args.json.write_text(json.dumps(found, indent=1))


@torch.inference_mode()
def logits_of(model: kvist.Model, ids: list[int], codec: str) -> torch.Tensor:
    """`[len(ids), vocab]`."""
    cache = make_cache(
        model.specs, codec=model.codec(codec), max_length=len(ids), dtype=model.dtype
    )
    batch = Batch.pack([ids], cache.lengths, logits="all")
    return choose_step(model.executor, model)(batch, cache.bind(batch))


if __name__ == "__main__":
    main()
