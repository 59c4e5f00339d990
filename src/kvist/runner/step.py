"""The seam where speed is put in: a step function takes a batch and a bound cache to logits.

`model_step` is the reference, the model's own forward. A captured graph, or a native executor made
from the same weights, is a drop-in for it and is compared with it; model files never change for it.
"""

from typing import Protocol

from torch import Tensor

from kvist.cache import Batch, KVCache
from kvist.models import CausalLM


class StepFunction(Protocol):
    """One forward pass over some tokens of some sequences."""

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        """`[R, vocab]` float32, the logits of `batch.logit_rows`.

        With `batch.largest_only` they may be NaN, if `runner.greedy` knows where the largest is.
        Writes the batch's keys and values through `cache`; the caller commits afterwards.
        """


def model_step(lm: CausalLM) -> StepFunction:
    """The step that runs the model's own forward."""

    def step(batch: Batch, cache: KVCache) -> Tensor:
        embeddings = batch.embeddings if batch.embeddings is not None else lm.embed(batch.token_ids)
        positions = batch.rope_positions if batch.rope_positions is not None else batch.positions
        hidden = lm.forward(embeddings, positions, cache)
        return lm.logits(hidden[batch.logit_rows])

    return step
