"""What all tests share: one thread, the reference checkpoints, and SmolLM2 where it was pulled."""

import shutil
import signal
from collections.abc import Callable
from pathlib import Path

import pytest
import torch
from hypothesis import settings

import kvist
from kvist.loading.hub import pulled_path
from tiny_models import CHECKPOINTS, Reference, reference

SMOLLM2 = "smollm2-135m"
_skipped = pytest.StashKey[int]()


# No test is a matter of time: a machine may be busy.
settings.register_profile("kvist", deadline=None)
settings.load_profile("kvist")


def pytest_configure(config: pytest.Config) -> None:
    # Tiny models are slower with more threads, most of all where several suites share a machine.
    torch.set_num_threads(1)
    # A shell that starts something behind it has it ignore Ctrl-C, which tests send.
    signal.signal(signal.SIGINT, signal.default_int_handler)


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    real = [item for item in items if item.get_closest_marker("smollm2")]
    if real and pulled_path(SMOLLM2) is None:
        config.stash[_skipped] = len(real)
        for item in real:
            item.add_marker(pytest.mark.skip(reason=f"run `kvist pull {SMOLLM2}` first"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if count := terminalreporter.config.stash.get(_skipped, 0):
        terminalreporter.section("NO REAL MODEL", yellow=True)
        terminalreporter.line(
            f"{count} tests of SmolLM2-135M were skipped; run `kvist pull {SMOLLM2}` to have them."
        )


@pytest.fixture(scope="session", params=CHECKPOINTS)
def checkpoint(request: pytest.FixtureRequest) -> Reference:
    """Each of the dense Qwen3 checkpoints, with what transformers computed from it."""
    return reference(request.param)


@pytest.fixture(scope="session")
def model() -> kvist.Model:
    """The smallest of them, where any model with a tokenizer will do."""
    return reference("dense_tied").model


@pytest.fixture
def copy_of(tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the checkpoints that a test may damage."""

    def copy(name: str = "dense_tied") -> Path:
        target = tmp_path / name
        shutil.copytree(reference(name).path, target, ignore=shutil.ignore_patterns("ref.*"))
        return target

    return copy


@pytest.fixture(scope="session")
def smollm2() -> kvist.Model:
    """SmolLM2-135M-Instruct, dequantised; tests that ask for it are marked `smollm2`."""
    return kvist.load(SMOLLM2, executor="reference")
