"""Python's garbage collector, kept from going over a whole process while sequences wait.

Some full collection becomes due while requests are served, and torch and a model are hundreds of
thousands of objects that it would look at: 0.1 s in which no step begins. Used by `LLM` and
`AsyncLLM` while they have something to do; what is dropped meanwhile is found after.
"""

import gc
from collections.abc import Iterator
from contextlib import contextmanager
from threading import Lock

_lock = Lock()
_serving = 0  # how many are inside `old_objects_spared`
_frozen_here = False


@contextmanager
def old_objects_spared() -> Iterator[None]:
    """Collect only among what is made inside; may be entered by several threads.

    Nothing is changed for a program that keeps objects out of collections itself (`gc.freeze`).
    """
    global _serving, _frozen_here
    with _lock:
        _serving += 1
        if _serving == 1 and not gc.get_freeze_count():
            gc.freeze()
            _frozen_here = True
    try:
        yield
    finally:
        with _lock:
            _serving -= 1
            if _serving == 0 and _frozen_here:
                gc.unfreeze()
                _frozen_here = False
