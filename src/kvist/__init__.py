"""kvist: LLM inference with the KV cache at its centre.

    >>> import kvist
    >>> model = kvist.load("smollm2-135m")
    >>> params = kvist.SamplingParams(temperature=0)
    >>> [result] = kvist.generate(model, ["The capital of France is"], params)
    >>> result.text

Public names are imported when first used, so that `import kvist` costs next to nothing.
"""

import sys
from types import ModuleType
from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from kvist.async_engine import AsyncLLM
    from kvist.cache.layouts import make_cache
    from kvist.core.params import SamplingParams
    from kvist.core.results import Delta, Result
    from kvist.core.retention import KeepAll, SlidingWindow
    from kvist.errors import KvistError
    from kvist.generate import generate, stream
    from kvist.llm import LLM
    from kvist.loading.model import Model, load
    from kvist.loading.pull import pull

__version__ = "0.1.0"

_PUBLIC = {
    "LLM": "kvist.llm",
    "AsyncLLM": "kvist.async_engine",
    "Delta": "kvist.core.results",
    "KeepAll": "kvist.core.retention",
    "KvistError": "kvist.errors",
    "Model": "kvist.loading.model",
    "Result": "kvist.core.results",
    "SamplingParams": "kvist.core.params",
    "SlidingWindow": "kvist.core.retention",
    "generate": "kvist.generate",
    "load": "kvist.loading.model",
    "make_cache": "kvist.cache.layouts",
    "pull": "kvist.loading.pull",
    "stream": "kvist.generate",
}

__all__ = [
    "LLM",
    "AsyncLLM",
    "Delta",
    "KeepAll",
    "KvistError",
    "Model",
    "Result",
    "SamplingParams",
    "SlidingWindow",
    "__version__",
    "generate",
    "load",
    "make_cache",
    "pull",
    "stream",
]


def __getattr__(name: str) -> Any:
    """Import a public name from where it lives (PEP 562)."""
    if name not in _PUBLIC:
        raise AttributeError(f"module 'kvist' has no attribute {name!r}")
    from importlib import import_module

    value = getattr(import_module(_PUBLIC[name]), name)
    globals()[name] = value
    return value


def __dir__() -> list[str]:
    """All public names, imported or not."""
    return sorted(__all__)


class _Package(ModuleType):
    """Keeps `kvist.generate` the function: importing the module of that name would hide it."""

    def __setattr__(self, name: str, value: object) -> None:
        if not (name in _PUBLIC and isinstance(value, ModuleType)):
            super().__setattr__(name, value)


sys.modules[__name__].__class__ = _Package
