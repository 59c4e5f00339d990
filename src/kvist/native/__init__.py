"""Speed on a CPU: a compiled library beside the models, and a step function that calls it.

kvist runs without it (`missing()` says why it is not there); nothing else depends on it.
"""

from typing import TYPE_CHECKING, Any

from kvist.native.library import missing

if TYPE_CHECKING:
    from kvist.native.executor import NativeStep, native_step

__all__ = ["NativeStep", "available", "missing", "native_step"]


def available() -> bool:
    """Whether the compiled library can be used here; `missing()` says why not."""
    return missing() is None


def __getattr__(name: str) -> Any:
    """Import the executor, and torch with it, when it is first used (PEP 562)."""
    if name in ("NativeStep", "native_step"):
        from kvist.native import executor

        return getattr(executor, name)
    raise AttributeError(f"module 'kvist.native' has no attribute {name!r}")
