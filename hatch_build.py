"""Compile kvist's native library when a wheel is built or kvist is installed from source.

Runs at build time only, with the system's C++ compiler (`CXX`, else c++, g++ or clang++; further
flags in `CXXFLAGS`). Where there is none, or it fails, the wheel is a pure one, the log says so and
kvist runs on torch's operators. `KVIST_NATIVE=0` builds a pure wheel on purpose.
"""

import os
import platform
import shutil
import subprocess
import sysconfig
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from typing import Any

from hatchling.builders.hooks.plugin.interface import BuildHookInterface

NATIVE = Path("src/kvist/native")
LIBRARY = "_kvist.so"

# Compiled once for every processor; which instruction set runs is decided where the library runs.
COMMON = ("api.cpp", "dispatch.cpp", "model.cpp", "pool.cpp", "screen.cpp", "step.cpp",
          "testing.cpp", "workspace.cpp")  # fmt: skip
FLAGS = ("-std=c++20", "-fPIC", "-fvisibility=hidden", "-fno-math-errno", "-fno-trapping-math",
         "-ffp-contract=off")  # fmt: skip
PORTABLE = ("-O2", "-ftree-vectorize", "-DKVIST_ISA=portable")
AVX2 = ("-mavx2", "-mfma", "-mf16c")
AVX512 = (*AVX2, "-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mavx512vnni")
AMX = (*AVX512, "-mavx512bf16", "-mavx512vbmi2", "-mamx-tile", "-mamx-bf16")


class NativeLibrary(BuildHookInterface):
    """Hatchling's custom build hook."""

    def initialize(self, version: str, build_data: dict[str, Any]) -> None:
        """Compile, and make the wheel one for this platform if that went well."""
        if self.target_name != "wheel":
            return
        reason = build(Path(self.root) / NATIVE, dict(os.environ))
        if reason:
            self.app.display_warning(f"kvist: no native library, a pure wheel instead: {reason}")
            return
        tag = sysconfig.get_platform().replace("-", "_").replace(".", "_")
        build_data["pure_python"] = False
        build_data["tag"] = f"py3-none-{tag}"
        build_data["artifacts"].append(f"{NATIVE}/{LIBRARY}")


def build(native: Path, environment: dict[str, str]) -> str | None:
    """Compile the library into the package; returns why not, or None."""
    if environment.get("KVIST_NATIVE") == "0":
        return "KVIST_NATIVE=0"
    if os.name != "posix":
        return f"not built on {platform.system()}"
    library, sources = native / LIBRARY, native / "src"
    inputs = [*sources.iterdir(), Path(__file__)]
    if library.exists() and library.stat().st_mtime > max(p.stat().st_mtime for p in inputs):
        return None
    candidates = (environment.get("CXX"), "c++", "g++", "clang++")
    compiler = next((found for name in candidates if name and (found := shutil.which(name))), None)
    if compiler is None:
        return "no C++ compiler found (g++ or clang++; or set CXX)"
    with tempfile.TemporaryDirectory() as scratch:
        objects, extra = Path(scratch), environment.get("CXXFLAGS", "").split()

        def compile_one(unit: tuple[str, str, tuple[str, ...]]) -> None:
            name, source, flags = unit
            command = [compiler, *FLAGS, *flags, *extra, "-c", str(sources / source)]
            run([*command, "-o", str(objects / f"{name}.o")])

        try:
            with ThreadPoolExecutor(os.cpu_count()) as pool:
                list(pool.map(compile_one, units(compiler)))
            made = objects / LIBRARY
            linked = sorted(str(path) for path in objects.glob("*.o"))
            run([compiler, "-shared", "-pthread", *extra, *linked, "-o", str(made)])
        except CompileError as error:
            return str(error)
        # Put in place in one move: a running kvist keeps the file that it has mapped.
        staged = library.with_suffix(".new")
        shutil.copyfile(made, staged)
        staged.replace(library)
    return None


def units(compiler: str) -> list[tuple[str, str, tuple[str, ...]]]:
    """What to compile: object, source, flags. The slowest come first."""
    if platform.machine().lower() not in ("x86_64", "amd64"):
        common = [(Path(source).stem, source, ("-O2",)) for source in COMMON]
        return [("portable", "kernels.cpp", PORTABLE), *common]
    amx = AMX if understands(compiler, AMX) else ()
    return [
        ("avx512", "kernels.cpp", ("-O3", "-DKVIST_ISA=avx512", *AVX512)),
        ("portable", "kernels.cpp", PORTABLE),
        ("avx2", "kernels.cpp", ("-O2", "-DKVIST_ISA=avx2", *AVX2)),
        ("amx", "amx.cpp", ("-O3", *amx)),
        *((Path(source).stem, source, ("-O2", "-DKVIST_X86")) for source in COMMON),
    ]


def understands(compiler: str, flags: tuple[str, ...]) -> bool:
    """Whether the compiler knows all of these flags."""
    command = [compiler, *flags, "-x", "c++", "-fsyntax-only", os.devnull]
    return subprocess.run(command, capture_output=True, check=False).returncode == 0


class CompileError(Exception):
    """A compiler's or linker's command failed; the message is its first error."""


def run(command: list[str]) -> None:
    """Run one command; raises CompileError with the line that says why."""
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        lines = done.stderr.splitlines()
        first = next((line for line in lines if "error" in line), lines[-1] if lines else "")
        raise CompileError(f"{Path(command[0]).name} failed: {first or done.returncode}")
