"""Triton kernels that start quickly: `@kernel` where `@triton.jit` would stand for a launched one.

Triton looks at each argument of each launch, and at all that a kernel was compiled with, before it
finds the machine code: 40 to 80 us of the host's time, more than most kernels take. Here a launch's
kind is a short key, and machine code that was found once is started directly. What will be launched
can be compiled side by side before (`compile_ahead`). Imports Triton.
"""

import os
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import suppress
from contextvars import ContextVar, copy_context
from functools import partial
from typing import Any

import torch
import triton
from torch import Tensor


def cdiv(a: int, b: int) -> int:
    """The quotient of a and b, rounded up.

    Triton's own can also be called in kernels, and takes 3 us for it.
    """
    return -(-a // b)


def next_power_of_2(n: int) -> int:
    """The smallest power of two that is at least n, which is at least 1."""
    return 1 << (n - 1).bit_length()


def dependent_launch(dependent: bool) -> dict[str, bool]:
    """Launch options of a kernel that may start before the one before it has ended."""
    return {"launch_pdl": True} if dependent else {}


WHOLE = 16  # bytes to which addresses, and units to which counts, are aligned or not
MOST_THREADS = 16

_ahead: ContextVar[set[Any] | None] = ContextVar("_ahead", default=None)


def compile_ahead(rehearsal: Callable[[], None]) -> None:
    """Run it with kernels compiled instead of launched; behind it all of them can be launched.

    By as many threads as there are cores: the compiler lets go of Python's lock. What is on disk
    from an earlier process is loaded. A kernel that cannot be compiled, or is too large for the
    device, says so when it is launched.
    """
    # In a context of its own: wherever it is interrupted, nothing stays in this mode.
    copy_context().run(_compile_ahead, rehearsal)


def _compile_ahead(rehearsal: Callable[[], None]) -> None:
    made: set[Any] = set()
    _ahead.set(made)
    threads = ThreadPoolExecutor(min(MOST_THREADS, os.cpu_count() or 1))
    try:
        with triton.AsyncCompileMode(threads, ignore_errors=True):
            rehearsal()
        list(threads.map(partial(_load, torch.cuda.current_device()), made))
    finally:
        threads.shutdown(cancel_futures=True)


def _load(device: int, compiled: Any) -> None:
    """What starts a kernel is compiled, too, and its machine code loaded when first asked for."""
    torch.cuda.set_device(device)  # of this thread
    if hasattr(compiled, "result"):
        compiled = compiled.result(ignore_errors=True)
    with suppress(Exception):
        compiled.run  # noqa: B018


class Kernel:
    """A kernel, launched as `kernel[grid](*arguments, **constants)`.

    Arguments that are no compile-time constants are given by position, in the kernel's order and
    before all constants; those, and the compiler's options, by name.

    Args:
        function: what `triton.jit` made.
    """

    def __init__(self, function: Any) -> None:
        """Compile nothing yet."""
        self.function = function
        self._found: dict[tuple[Any, ...], tuple[Any, tuple[Any, ...]]] = {}

    def __getitem__(self, grid: tuple[int, ...]) -> Callable[..., None]:
        """A function that starts so many programs."""
        return partial(self._launch, grid)

    def _launch(self, grid: tuple[int, ...], *arguments: Any, **constants: Any) -> None:
        if (made := _ahead.get()) is not None:
            made.add(self.function.warmup(*arguments, grid=grid, **constants))
            return
        key = kind_of(arguments, constants)
        found = self._found.get(key)
        if found is None:
            compiled = self.function[grid](*arguments, **constants)
            if compiled is not None:  # the interpreter has none
                names = self.function.arg_names[len(arguments) :]
                self._found[key] = compiled, tuple(constants[name] for name in names)
            return
        compiled, rest = found
        compiled[(*grid, 1, 1)[:3]](*arguments, *rest)


def kind_of(arguments: Sequence[Any], constants: dict[str, Any]) -> tuple[Any, ...]:
    """What launches have in common that start the same machine code.

    At least all that Triton compiles for: the device, types, whether addresses and whole numbers
    are multiples of 16, whole numbers that are 1, and constants.
    """
    kind = [*constants, *constants.values()]
    for argument in arguments:
        if isinstance(argument, Tensor):
            kind.append(argument.dtype)
            kind.append(argument.data_ptr() % WHOLE == 0)
        elif isinstance(argument, int):
            whole = argument % WHOLE == 0
            kind.append((type(argument), whole, argument == 1, argument >> 31))
        else:
            kind.append(type(argument))
    kind.append(arguments[0].get_device())
    return tuple(kind)


def kernel(*, do_not_specialize: Sequence[str] = ()) -> Callable[[Any], Kernel]:
    """Decorate a function that is launched; what kernels call stays `triton.jit`.

    Args:
        do_not_specialize: whole numbers that change from launch to launch, for which the compiler
            is to assume nothing.
    """

    def decorate(function: Any) -> Kernel:
        return Kernel(triton.jit(function, do_not_specialize=list(do_not_specialize)))

    return decorate
