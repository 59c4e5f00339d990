"""Which code computes a model's steps: its own forward, fused kernels on a GPU, or native code.

The one place that knows all of them, called by the loop, the engine and the chat. A new executor is
a function here and a line in `_MAKERS`. Whatever is chosen is a drop-in for the model's own forward
and is compared with it by `kvist verify`.
"""

import logging
from collections.abc import Callable
from contextlib import suppress
from typing import Protocol

import torch
from torch import Tensor

from kvist.cache import Batch, KVCache
from kvist.cache.paged import PagedPool
from kvist.errors import ConfigError, NotSupported
from kvist.models.decoder import Decoder
from kvist.runner.step import StepFunction, model_step

__all__ = ["EXECUTORS", "Executable", "choose_step", "executor_of"]


class Executable(Protocol):
    """What an executor asks of a model; `kvist.Model` has it."""

    @property
    def lm(self) -> Decoder:
        """The model with its weights, read now where they had been left in the file."""

    @property
    def device(self) -> torch.device:
        """Where it runs."""

    @property
    def native(self) -> StepFunction | None:
        """Its step in native code, where it was loaded for that."""

    @property
    def executor(self) -> str:
        """The name that it was loaded with."""


def choose_step(name: str, model: Executable, pool: PagedPool | None = None) -> StepFunction:
    """The step function of this name for a model.

    Args:
        name: "auto" takes the fastest that can run here; "reference" is the model's own forward,
            "native" the compiled library on a CPU, "fused" kernels and graphs on a GPU,
            "one-launch" those, with decode steps of one sequence in one launch as soon as that is
            compiled, in any context that it fits ("auto": where it was measured to be faster),
            "deterministic" gives each token the same bits in any batch and chunk.
        model: whose weights.
        pool: the paged pool that all batches will be bound to; None for other caches.

    Raises:
        ConfigError: no executor of this name.
        NotSupported: the one asked for cannot run this model here.
    """
    if name not in EXECUTORS:
        raise ConfigError(f"no executor {name!r}; there are: {', '.join(EXECUTORS)}")
    if name != "auto":
        return _MAKERS[name](model, pool)
    if model.native is not None:
        return _WithFallback(model.native, model)
    if model.device.type == "cuda" and pool is not None:
        from kvist.runner.one_launch import OneLaunchStep, longest_of

        if longest := longest_of(model.lm):
            with suppress(NotSupported):  # a shape, a cache or a GPU that it was not written for
                return OneLaunchStep(model.lm, pool, longest=longest)
        with suppress(NotSupported):  # biases, experts, or a GPU that kernels do not know
            return _fused(model, pool)
    return model_step(model.lm)


def executor_of(step: StepFunction, model: Executable) -> str:
    """The name of what computes decode steps now: a step may begin with another executor's."""
    from kvist.runner.fused import FusedStep
    from kvist.runner.one_launch import OneLaunchStep

    if isinstance(step, OneLaunchStep):
        return step.executor
    if isinstance(step, FusedStep):
        return "fused"
    if isinstance(step, _WithFallback) or step is model.native:
        return "native"
    return "reference" if model.executor == "auto" else model.executor


def _reference(model: Executable, pool: PagedPool | None) -> StepFunction:
    return model_step(model.lm)


def _native(model: Executable, pool: PagedPool | None) -> StepFunction:
    if model.native is None:
        raise NotSupported("this model was not loaded for native code; load it with that executor")
    return model.native


def _fused(model: Executable, pool: PagedPool | None) -> StepFunction:
    from kvist.runner.fused import FusedStep

    return FusedStep(model.lm)


def _one_launch(model: Executable, pool: PagedPool | None) -> StepFunction:
    from kvist.runner.one_launch import OneLaunchStep

    if pool is None:
        raise NotSupported("steps in one launch read a paged pool; run this through kvist.LLM")
    return OneLaunchStep(model.lm, pool)


def _deterministic(model: Executable, pool: PagedPool | None) -> StepFunction:
    from kvist.runner.deterministic import deterministic_step

    return deterministic_step(model.lm)


_MAKERS: dict[str, Callable[[Executable, PagedPool | None], StepFunction]] = {
    "reference": _reference,
    "native": _native,
    "fused": _fused,
    "one-launch": _one_launch,
    "deterministic": _deterministic,
}
EXECUTORS = ("auto", *_MAKERS)


class _WithFallback:
    """An executor, and the model's own forward for the caches that it refuses.

    It refuses before anything is written, and for what a cache is, not for what it holds: so all
    steps of a cache go the same way.
    """

    def __init__(self, step: StepFunction, model: Executable) -> None:
        self.step, self.model = step, model
        self._told: set[str] = set()

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        try:
            return self.step(batch, cache)
        except NotSupported as error:
            reason = str(error)
        if reason not in self._told:
            self._told.add(reason)
            logging.getLogger("kvist").warning("%s; running the model's own forward", reason)
        return model_step(self.model.lm)(batch, cache)
