"""The largest of a row of logits, and whether it is finite: what every greedy step asks.

On a CPU by numpy, in microseconds: torch would wake a second thread for a row of this length and
let it spin on a core that the next step needs. Native code finds both while it makes the logits,
and its executor says so. Called by the sampler, the loop and the runner.
"""

from array import array

import numpy as np
import torch
from torch import Tensor

__all__ = ["all_finite", "finite_rows", "largest", "with_largest"]


def with_largest(logits: Tensor, found: "array[int]") -> Tensor:
    """The same logits, whose maker knows what `largest` and `finite_rows` would find.

    Args:
        logits: `[R, vocab]`, not to be written to from here on.
        found: each row's first largest, "q"; -1 where it was not looked for, or not all are finite.
    """
    if found and min(found) >= 0:
        known = torch.frombuffer(found, dtype=torch.int64)
        logits.known_largest = known  # type: ignore[attr-defined]
    return logits


def _known(logits: Tensor) -> Tensor | None:
    return getattr(logits, "known_largest", None)


def largest(scores: Tensor) -> Tensor:
    """`[R, vocab]` -> `[R]` int64, each row's first largest; NaN counts as larger than all."""
    if (known := _known(scores)) is not None:
        return known
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.numpy().argmax(axis=-1))


def finite_rows(logits: Tensor) -> Tensor:
    """`[R, vocab]` -> `[R]` bool, whether a row can be sampled from: no NaN, some finite number."""
    if (known := _known(logits)) is not None:
        return torch.from_numpy(np.ones(known.shape, dtype=bool))
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.amax(dim=-1).isfinite()
    return torch.from_numpy(np.isfinite(logits.numpy().max(axis=-1)))


def all_finite(logits: Tensor) -> bool:
    """Whether every row of `[R, vocab]` can be sampled from; asked for each token, so quickly."""
    return _known(logits) is not None or bool(finite_rows(logits).numpy(force=True).all())
