"""A step whose every row has the same bits, whoever stands beside it: `deterministic_step`.

Fast matrix products sum in an order that depends on how many rows there are, so the same token
alone, in a batch or in a chunk comes out a little different. Here every module runs on a fixed
number of rows, the last ones padded, and attention on fixed tiles (attention/fixed.py). What it
costs is reported by `kvist verify --deterministic`; the reference needs none of it.
"""

import copy
from typing import Any, cast
from weakref import WeakKeyDictionary

import torch
from torch import Tensor, nn

from kvist.cache.protocol import KV, KVCache, State
from kvist.models.decoder import Decoder, GatedMLP, RMSNorm
from kvist.runner.step import StepFunction, model_step

ROWS = (16, 8, 4, 2, 1)
"""Rows that are tried, in this order; one row alone has no neighbours."""


class FixedRows(nn.Module):
    """A module that works row by row, always given the same number of rows.

    Args:
        module: `[N, ...]` -> `[N, ...]`, each row by itself.
        rows: how many at a time.
    """

    def __init__(self, module: nn.Module, rows: int) -> None:
        """Wrap the module; its parameters stay its own."""
        super().__init__()
        self.module, self.rows = module, rows

    def forward(self, x: Tensor) -> Tensor:
        """`[N, ...]` -> `[N, ...]`."""
        count = len(x)
        padded = -(-count // self.rows) * self.rows
        if padded != count:
            x = torch.cat((x, x.new_zeros(padded - count, *x.shape[1:])))
        parts = [self.module(part) for part in x.split(self.rows)]
        return torch.cat(parts)[:count] if parts else self.module(x)


class _Fixed:
    """A layer's view whose attention is decided: everything else is the view's own."""

    backend = "fixed"

    def __init__(self, kv: KV) -> None:
        self._kv = kv

    def __getattr__(self, name: str) -> Any:
        return getattr(self._kv, name)


class _FixedCache:
    """A bound cache all of whose layers are attended to in fixed tiles."""

    def __init__(self, cache: KVCache) -> None:
        self._cache = cache

    def update(self, key_states: Tensor, value_states: Tensor, layer_idx: int) -> KV:
        return cast("KV", _Fixed(self._cache.update(key_states, value_states, layer_idx)))

    def state(self, layer_idx: int) -> State:
        return self._cache.state(layer_idx)


def deterministic_step(lm: Decoder) -> StepFunction:
    """A drop-in for `model_step(lm)` on the same weights; attention is always the fixed one."""
    if lm not in _copies:
        _copies[lm] = deterministic_copy(lm)
    step = model_step(_copies[lm])
    return lambda batch, cache: step(batch, _FixedCache(cache))


_copies: WeakKeyDictionary[Decoder, Decoder] = WeakKeyDictionary()  # trying out takes a moment


@torch.inference_mode()
def deterministic_copy(lm: Decoder) -> Decoder:
    """The model with `FixedRows` around its parts, sharing its weights.

    That a part gives a row the same bits at every place among so many rows is tried out on this
    machine, for each shape, and where it does not hold fewer rows are taken.
    """
    fixed = copy.deepcopy(lm, {id(p): p for p in (*lm.parameters(), *lm.buffers())})
    rows: dict[tuple[type, tuple[torch.Size, ...]], int] = {}
    dtype = lm.model.norm.weight.dtype  # of activations; projections may be kept in fewer bits
    for name, module in list(fixed.named_modules()):
        if not isinstance(module, nn.Linear | GatedMLP | RMSNorm):
            continue
        parent = fixed.get_submodule(name.rpartition(".")[0])
        if isinstance(parent, FixedRows):  # a part of what is wrapped already
            continue
        kind = (type(module), tuple(p.shape for p in module.parameters()))
        if kind not in rows:
            rows[kind] = next(n for n in ROWS if n == 1 or _places_are_alike(module, n, dtype))
        setattr(parent, name.rpartition(".")[2], FixedRows(module, rows[kind]))
    return fixed


def _places_are_alike(module: nn.Module, rows: int, dtype: torch.dtype) -> bool:
    """Whether a row's result has the same bits at each of so many places, whatever is beside it."""
    weight = next(module.parameters())
    generator = torch.Generator().manual_seed(0)
    x = torch.randn(rows, weight.shape[-1], generator=generator).to(weight.device, dtype)
    alike = module(x[:1].expand(rows, -1).contiguous())
    turned = (module(x.roll(n, 0)).roll(-n, 0) for n in range(rows))
    return bool((alike == alike[:1]).all()) and all(
        torch.equal(y[0], alike[0]) and torch.equal(y, module(x)) for y in turned
    )
