"""Embeddings: a prompt's last hidden states, pooled to one unit vector.

One forward pass with a cache of its own, in chunks, so that its memory is bounded. It knows nothing
of requests; the server's engine calls it between two steps.
"""

from collections.abc import Sequence
from typing import Literal

import torch
from torch import Tensor
from torch.nn import functional as F

from kvist.cache import Batch, make_cache
from kvist.errors import RequestError
from kvist.loading.model import Model

CHUNK = 2048  # tokens of a forward pass

Pooling = Literal["last", "mean"]


@torch.inference_mode()
def embed(model: Model, token_ids: Sequence[int], pooling: Pooling = "last") -> list[float]:
    """The unit vector of a prompt.

    Args:
        model: its hidden states are taken behind the final norm, `[tokens, hidden]`.
        token_ids: checked already.
        pooling: the last token's state, or the mean of all.

    Raises:
        RequestError: the prompt is longer than the model takes.
    """
    count = len(token_ids)
    if count > model.max_length:
        raise RequestError(f"the input has {count} tokens, and the model takes {model.max_length}")
    cache = make_cache(
        model.specs, rows=1, max_length=count, dtype=model.dtype, device=model.device
    )
    total = torch.zeros((), device=model.device)
    for start in range(0, count, CHUNK):
        chunk = token_ids[start : start + CHUNK]
        batch = Batch.pack([chunk], cache.lengths, device=model.device)
        hidden: Tensor = model.lm.forward(
            model.lm.embed(batch.token_ids), batch.positions, cache.bind(batch)
        ).float()
        cache.commit(batch)
        total = total + hidden.sum(0) if pooling == "mean" else hidden[-1]
    vector: list[float] = F.normalize(total, dim=0).tolist()
    return vector
