"""Kernels run on the GPU where there is one, and otherwise in Triton's interpreter on the CPU.

The interpreter must be chosen before the first kernel is defined, so before kvist's kernel modules
are imported; they are only imported by tests of this folder, or by whoever asks for them by name.
"""

import os
from importlib.util import find_spec

import pytest
import torch

ON_GPU = torch.cuda.is_available()
HAS_TRITON = find_spec("triton") is not None

if HAS_TRITON and not ON_GPU:
    os.environ["TRITON_INTERPRET"] = "1"
    import interpreter

    interpreter.correct()

collect_ignore_glob = [] if HAS_TRITON else ["test_*.py"]


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if not HAS_TRITON:
        terminalreporter.section("NO TRITON", yellow=True)
        terminalreporter.line("The kernels' tests did not run; `pip install triton` to have them.")


@pytest.fixture(scope="session")
def device() -> torch.device:
    """Where the kernels run."""
    return torch.device("cuda" if ON_GPU else "cpu")
