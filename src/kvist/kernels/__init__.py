"""Whether Triton kernels can run here; the room of those that know no cache: norms, rotary, MLP.

Importing this asks for neither Triton nor a GPU. The modules beside it import Triton and are
imported only where `can_run` said yes. Attention's own kernels stand in `attention/kernels`.
"""

import os
from functools import cache
from importlib.util import find_spec

import torch


@cache
def has_triton() -> bool:
    """Whether Triton is installed."""
    return find_spec("triton") is not None


def interpreted() -> bool:
    """Whether Triton runs kernels in its interpreter on the CPU: for tests, slow by design."""
    return os.environ.get("TRITON_INTERPRET", "0") == "1"


@cache
def _capability(index: int) -> tuple[int, int]:
    return torch.cuda.get_device_capability(index)


def can_run(device: torch.device) -> bool:
    """Whether kernels can run on tensors of this device.

    On NVIDIA GPUs from compute capability 8.0 on, and on the CPU in the interpreter.
    """
    if not has_triton():
        return False
    if device.type != "cuda":
        return device.type == "cpu" and interpreted()
    return torch.version.cuda is not None and _capability(device.index or 0) >= (8, 0)


def can_run_fp8(device: torch.device) -> bool:
    """Whether kernels can read fp8 (e4m3), where they can run at all."""
    return device.type == "cpu" or _capability(device.index or 0) >= (8, 9)


def can_launch_early(device: torch.device) -> bool:
    """Whether a kernel may start before the one before it has ended (dependent launch)."""
    return device.type == "cuda" and _capability(device.index or 0) >= (9, 0)


@cache
def shared_memory(index: int) -> int:
    """Bytes of a GPU's shared memory that one program may have, as Triton counts them."""
    from triton.runtime import driver

    return int(driver.active.utils.get_device_properties(index)["max_shared_mem"])


@cache
def multiplies_from_memory(index: int) -> bool:
    """Whether a GPU's products read both operands from shared memory, as Hopper's do."""
    return _capability(index)[0] in (9, 10)
