"""The largest of a row of logits, and whether it is finite: what every greedy step asks.

On a CPU by numpy, in microseconds: torch would wake a second thread for a row of this length and
let it spin on a core that the next step needs. Called by the sampler, the loop and the runner.
"""

import numpy as np
import torch
from torch import Tensor

__all__ = ["finite_rows", "largest"]


def largest(scores: Tensor) -> Tensor:
    """`[R, vocab]` -> `[R]` int64, each row's first largest; NaN counts as larger than all."""
    if scores.device.type != "cpu" or scores.dtype != torch.float32:
        return scores.argmax(dim=-1)
    return torch.from_numpy(scores.numpy().argmax(axis=-1))


def finite_rows(logits: Tensor) -> Tensor:
    """`[R, vocab]` -> `[R]` bool, whether a row can be sampled from: no NaN, some finite number."""
    if logits.device.type != "cpu" or logits.dtype != torch.float32:
        return logits.amax(dim=-1).isfinite()
    return torch.from_numpy(np.isfinite(logits.numpy().max(axis=-1)))
