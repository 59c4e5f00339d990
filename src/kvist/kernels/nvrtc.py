"""CUDA C++ kernels: compiled for the GPU at hand when first wanted, kept on disk, launched.

By NVRTC, which torch brings along, so that no toolkit is needed; where torch's own bindings of it
are missing, `available` says no and callers do with Triton. Called by attention's decode kernel.
"""

import ctypes
import hashlib
import os
import re
import tempfile
from collections.abc import Sequence
from contextlib import suppress
from dataclasses import dataclass
from functools import cache
from importlib.util import find_spec
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvist.errors import NotSupported

OLDEST = (9, 0)  # what the kernels were written for
_INCLUDE = re.compile(r'#include "([^"]+)"\n')


@cache
def available(index: int) -> bool:
    """Whether kernels can be compiled for and run on the GPU of this number."""
    if torch.version.cuda is None or torch.cuda.get_device_capability(index) < OLDEST:
        return False
    try:
        if find_spec("cuda.bindings.nvrtc") is None or find_spec("cuda.bindings.driver") is None:
            return False
        from cuda.bindings import nvrtc

        return bool(nvrtc.nvrtcVersion()[0] == 0)
    except (ImportError, RuntimeError):  # no bindings, or no library behind them
        return False


def _checked(result: tuple[Any, ...]) -> Any:
    """What a call of the driver or compiler returned, without its status."""
    status, *values = result
    if int(status) != 0:
        raise NotSupported(f"the GPU's driver or compiler said {status!r}")
    return values[0] if len(values) == 1 else values


def cache_dir() -> Path:
    """Where compiled kernels are kept: $KVIST_HOME/kernels, else in the user's cache directory."""
    if home := os.environ.get("KVIST_HOME"):
        return Path(home).expanduser() / "kernels"
    folder = os.environ.get("XDG_CACHE_HOME")
    return (Path(folder) if folder else Path.home() / ".cache") / "kvist" / "kernels"


def cubin(source: str, options: Sequence[str]) -> bytes:
    """Machine code of a source, from disk where it was compiled before."""
    from cuda.bindings import nvrtc

    version = _checked(nvrtc.nvrtcVersion())
    key = hashlib.sha256(repr((source, options, version)).encode()).hexdigest()
    path = cache_dir() / f"{key[:32]}.cubin"
    with suppress(OSError):
        return path.read_bytes()
    code = _compile(source, options)
    with suppress(OSError):  # a cache that cannot be written to is none
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.NamedTemporaryFile(dir=path.parent, delete=False) as file:
            file.write(code)
        Path(file.name).replace(path)
    return code


def read_source(path: Path, known: set[Path] | None = None) -> str:
    """A source with the files of its folder that it includes in their place, each once."""
    known = set() if known is None else known
    known.add(path)

    def included(match: re.Match[str]) -> str:
        other = path.with_name(match[1])
        return "" if other in known else read_source(other, known)

    return _INCLUDE.sub(included, path.read_text()).replace("#pragma once\n", "")


def _compile(source: str, options: Sequence[str]) -> bytes:
    from cuda.bindings import nvrtc

    program = _checked(nvrtc.nvrtcCreateProgram(source.encode(), b"kvist.cu", 0, [], []))
    [status] = nvrtc.nvrtcCompileProgram(program, len(options), [o.encode() for o in options])
    if int(status) != 0:
        log = b" " * _checked(nvrtc.nvrtcGetProgramLogSize(program))
        nvrtc.nvrtcGetProgramLog(program, log)
        raise NotSupported(f"a kernel could not be compiled: {log.decode(errors='replace')}")
    code: bytes = b" " * _checked(nvrtc.nvrtcGetCUBINSize(program))
    _checked((*nvrtc.nvrtcGetCUBIN(program, code), None))
    nvrtc.nvrtcDestroyProgram(program)
    return code


@dataclass(frozen=True)
class Kernel:
    """A compiled function. It runs on torch's current stream, of the GPU that it was loaded on."""

    function: Any
    shared: int  # bytes of dynamic shared memory

    def __call__(
        self,
        grid: tuple[int, int],
        threads: int,
        *arguments: Tensor | int | float,
    ) -> None:
        """Start it; ints are passed as 32 bits, tensors as addresses."""
        from cuda.bindings import driver

        values = [a.data_ptr() if isinstance(a, Tensor) else a for a in arguments]
        types = [
            ctypes.c_void_p
            if isinstance(a, Tensor)
            else ctypes.c_int32
            if isinstance(a, int)
            else ctypes.c_float
            for a in arguments
        ]
        config = driver.CUlaunchConfig()
        config.gridDimX, config.gridDimY, config.gridDimZ = *grid, 1
        config.blockDimX, config.blockDimY, config.blockDimZ = threads, 1, 1
        config.sharedMemBytes = self.shared
        config.hStream = torch.cuda.current_stream().cuda_stream
        launch = driver.cuLaunchKernelEx(config, self.function, (tuple(values), tuple(types)), 0)
        _checked((*launch, None))


@cache
def load(path: Path, index: int, name: str, shared: int, options: tuple[str, ...]) -> Kernel:
    """A function of a source file, compiled with these macros for the GPU of this number.

    Args:
        path: the source.
        index: the GPU, whose context is current.
        name: of an `extern "C"` function.
        shared: bytes of dynamic shared memory that launches get.
        options: for the compiler, without the architecture.
    """
    from cuda.bindings import driver

    function = _checked(driver.cuModuleGetFunction(_module(path, index, options), name.encode()))
    if shared:
        attributes = driver.CUfunction_attribute
        limit = attributes.CU_FUNC_ATTRIBUTE_MAX_DYNAMIC_SHARED_SIZE_BYTES
        _checked((*driver.cuFuncSetAttribute(function, limit, shared), None))
    return Kernel(function, shared)


@cache
def _module(path: Path, index: int, options: tuple[str, ...]) -> Any:
    from cuda.bindings import driver

    major, minor = torch.cuda.get_device_capability(index)
    architecture = f"--gpu-architecture=sm_{major}{minor}"
    code = cubin(read_source(path), (architecture, "--std=c++17", *options))
    return _checked(driver.cuModuleLoadData(code))
