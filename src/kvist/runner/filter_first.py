"""nanoVLM's order of sampling: filter first, then divide by the temperature.

kvist's own order is the field's usual one (`runner.sampler`); this one, a named option, is for who
compares with nanoVLM. It differs twice: the filters see the logits before the temperature, and
top-p drops the token that crosses p, which others keep.
"""

import torch
from torch import Tensor


def filter_then_temperature(
    logits: Tensor, *, top_k: int, top_p: float, temperature: float
) -> Tensor:
    """Probabilities to draw from.

    Args:
        logits: `[R, vocab]`.
        top_k: keep the k largest, and what equals the k-th; 0 keeps all.
        top_p: of what top-k left, keep the likeliest while their probabilities add up to no more
            than this; the likeliest always stays. 1 keeps all.
        temperature: > 0, divides what the filters left.

    Returns:
        `[R, vocab]`, rows add up to 1.
    """
    if top_k > 0:
        smallest = logits.topk(min(top_k, logits.shape[-1]), dim=-1).values[..., -1:]
        logits = logits.masked_fill(logits < smallest, -torch.inf)
    if top_p < 1.0:
        ordered, places = logits.sort(dim=-1, descending=True)
        dropped = torch.softmax(ordered, dim=-1).cumsum(dim=-1) > top_p
        dropped[..., 0] = False
        logits = logits.masked_fill(
            torch.zeros_like(dropped).scatter(-1, places, dropped), -torch.inf
        )
    return torch.softmax(logits / temperature, dim=-1)
