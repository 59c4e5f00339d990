"""Sampling as its definitions read: one row at a time, in plain Python, sharing nothing with kvist.

Slow on purpose; what the real sampler does is compared with it.
"""

import math
from collections.abc import Collection, Mapping, Sequence


def distribution(
    logits: Sequence[float],
    *,
    temperature: float = 1.0,
    top_k: int = 0,
    top_p: float = 1.0,
    min_p: float = 0.0,
    logit_bias: Mapping[int, float] | None = None,
    banned: Collection[int] = (),
    repetition_penalty: float = 1.0,
    presence_penalty: float = 0.0,
    frequency_penalty: float = 0.0,
    prompt: Sequence[int] = (),
    output: Sequence[int] = (),
) -> list[float]:
    """Each token's probability."""
    scores = list(logits)
    for token, bias in (logit_bias or {}).items():
        scores[token] += bias
    for token in banned:
        scores[token] = -math.inf
    for token in {*prompt, *output}:
        score = scores[token]
        scores[token] = score / repetition_penalty if score > 0 else score * repetition_penalty
    for token in set(output):
        scores[token] -= presence_penalty + frequency_penalty * output.count(token)
    if temperature == 0:
        best = scores.index(max(scores))
        return [float(token == best) for token in range(len(scores))]
    likely = softmax([score / temperature for score in scores])
    kept = sorted(range(len(likely)), key=lambda token: -likely[token])
    kept = kept[: top_k or None]
    total, reached, nucleus = sum(likely[t] for t in kept), 0.0, []
    for token in kept:
        if reached >= top_p * total and top_p < 1:
            break
        nucleus.append(token)
        reached += likely[token]
    threshold = min_p * likely[kept[0]]
    final = {token: likely[token] for token in nucleus if likely[token] >= threshold}
    total = sum(final.values())
    return [final.get(token, 0.0) / total for token in range(len(likely))]


def draw(probabilities: Sequence[float], uniform: float) -> int:
    """The token in whose stretch of [0, 1) the uniform number falls."""
    reached = 0.0
    for token, probability in enumerate(probabilities):
        reached += probability
        if uniform < reached:
            return token
    return max(range(len(probabilities)), key=lambda token: probabilities[token])


def softmax(scores: Sequence[float]) -> list[float]:
    highest = max(scores)
    weights = [math.exp(score - highest) for score in scores]
    total = sum(weights)
    return [weight / total for weight in weights]


def chi_square_limit(degrees: int, deviations: float = 4.0) -> float:
    """What chi-square exceeds by chance about once in 30,000 (Wilson & Hilferty, 1931)."""
    part = 2 / (9 * degrees)
    return degrees * (1 - part + deviations * math.sqrt(part)) ** 3


def chi_square(counts: Sequence[int], probabilities: Sequence[float]) -> tuple[float, int]:
    """The statistic and its degrees of freedom; thin tails are taken together."""
    total = sum(counts)
    assert all(not n or p > 0 for n, p in zip(counts, probabilities, strict=True))
    cells = [(n, p * total) for n, p in zip(counts, probabilities, strict=True) if p * total >= 5]
    tail = (total - sum(n for n, _ in cells), total - sum(e for _, e in cells))
    if tail[1] >= 5:
        cells.append(tail)
    return sum((n - e) ** 2 / e for n, e in cells), len(cells) - 1
