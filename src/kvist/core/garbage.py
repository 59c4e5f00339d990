"""Python's garbage collector, kept from going over the whole process while sequences wait.

Every so often a full collection becomes due, and torch and a model are hundreds of thousands of
objects that it looks at: 0.1 s in which no step begins. While requests are served it comes a
hundredth as often; what is young is collected as ever. Used by `LLM` and `AsyncLLM`.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

RARER = 100

_lock = Lock()
_serving = 0  # how many are inside `rare_full_collections`
_usual = gc.get_threshold()


@contextmanager
def rare_full_collections() -> Iterator[None]:
    """While anybody is inside; several threads may be. What is due is caught up with afterwards."""
    global _serving, _usual
    with _lock:
        _serving += 1
        if _serving == 1:
            _usual = gc.get_threshold()
            gc.set_threshold(*_rarer(_usual))
    try:
        yield
    finally:
        with _lock:
            _serving -= 1
            # Whoever has set other thresholds meanwhile meant it.
            if _serving == 0 and gc.get_threshold() == _rarer(_usual):
                gc.set_threshold(*_usual)


def _rarer(thresholds: tuple[int, int, int]) -> tuple[int, int, int]:
    young, middle, old = thresholds
    return young, middle, old * RARER
