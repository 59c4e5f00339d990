"""Compile a CUDA source for one shape and GPU, and keep the library in the user's cache directory.

A library is named by what it was made of: the sources, the definitions, the architecture and the
compiler's version. Nothing here loads one. Compiling takes seconds: whoever calls `compiled` does
so where nobody waits.
"""

import hashlib
import os
import re
import shutil
import subprocess
import tempfile
from collections.abc import Mapping
from pathlib import Path

from kvist.errors import NotSupported

SOURCES = Path(__file__).parent
FLAGS = ("-O3", "-std=c++17", "-shared", "-Xcompiler", "-fPIC", "-cudart", "static")
TIME_LIMIT = 300  # seconds


def kernels_dir() -> Path:
    """Where compiled kernels lie: $KVIST_HOME/kernels, else in the user's cache directory."""
    if home := os.environ.get("KVIST_HOME"):
        return Path(home).expanduser() / "kernels"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvist" / "kernels"


def find_nvcc() -> str | None:
    """The compiler: $CUDA_HOME's, else the one on the path, else the usual place's."""
    homes = [os.environ.get("CUDA_HOME"), os.environ.get("CUDA_PATH")]
    for home in filter(None, homes):
        if found := shutil.which("nvcc", path=str(Path(home) / "bin")):
            return found
    return shutil.which("nvcc") or shutil.which("nvcc", path="/usr/local/cuda/bin")


def library_name(source: str, defines: Mapping[str, int], arch: str) -> str:
    """What a library is called, up to its compiler's version."""
    digest = hashlib.sha256(" ".join(FLAGS).encode())
    for path in sorted([SOURCES / source, *SOURCES.glob("*.cuh")]):
        digest.update(path.name.encode() + b"\0" + path.read_bytes())
    for name, value in sorted(defines.items()):
        digest.update(f"{name}={value}\n".encode())
    return f"{Path(source).stem}-{arch}-{digest.hexdigest()[:24]}"


def compiled(source: str, defines: Mapping[str, int], arch: str) -> Path:
    """The library of this source, compiled now if it was not before.

    Args:
        source: a file of this folder.
        defines: macros and their values.
        arch: as nvcc names it, such as "sm_90".

    Raises:
        NotSupported: it was not compiled before and cannot be: no nvcc, or nvcc fails.
    """
    name, folder, nvcc = library_name(source, defines, arch), kernels_dir(), find_nvcc()
    if nvcc is None:
        if found := compiled_before(source, defines, arch):
            return found
        raise NotSupported(
            f"there is no nvcc to compile {source} with; install the CUDA toolkit or set CUDA_HOME"
        )
    path = folder / f"{name}-cuda{_release(nvcc)}.so"
    if path.exists():
        return path
    try:
        folder.mkdir(parents=True, exist_ok=True)
        # Under another name first: several processes may compile at once, and one may be killed.
        with tempfile.TemporaryDirectory(dir=folder) as scratch:
            made = Path(scratch) / path.name
            macros = [f"-D{name}={value}" for name, value in defines.items()]
            _run([nvcc, *FLAGS, f"-arch={arch}", *macros, "-o", made, SOURCES / source])
            made.replace(path)
    except OSError as error:
        raise NotSupported(f"{source} cannot be compiled into {folder}: {error}") from error
    return path


def compiled_before(source: str, defines: Mapping[str, int], arch: str) -> Path | None:
    """The library of this source that any version of the compiler made, if there is one."""
    name = library_name(source, defines, arch)
    return max(kernels_dir().glob(f"{name}-cuda*.so"), default=None)


def _release(nvcc: str) -> str:
    """The compiler's version, such as "13.0"."""
    found = re.search(r"release (\d+\.\d+)", _run([nvcc, "--version"]))
    return found[1] if found else "unknown"


def _run(command: list[str | Path]) -> str:
    try:
        done = subprocess.run(
            command, capture_output=True, text=True, check=False, timeout=TIME_LIMIT
        )
    except (OSError, subprocess.TimeoutExpired) as error:
        raise NotSupported(f"{command[0]} cannot be run: {error}") from error
    if done.returncode:
        told = (done.stderr.strip() or done.stdout.strip()).splitlines()
        reason = next((line for line in told if "error" in line.lower()), told[-1] if told else "")
        raise NotSupported(f"{command[0]} failed ({done.returncode}): {reason}")
    return done.stdout
