"""Quantised models of a few thousand weights, and the instruction sets that this processor has."""

from collections.abc import Callable
from pathlib import Path

import pytest
from quantised_models import LLAMA, QWEN3, write_gguf

import kvist
from kvist.loading.checkpoint import Checkpoint, open_checkpoint
from kvist.native import missing

SHAPES = {"llama": LLAMA, "qwen3": QWEN3}
Opened = tuple[kvist.Model, Checkpoint]


def pytest_collection_modifyitems(items: list[pytest.Item]) -> None:
    here = [item for item in items if Path(__file__).parent in item.path.parents]
    if reason := missing():
        for item in here:
            item.add_marker(pytest.mark.skip(reason=reason))


@pytest.fixture(scope="session")
def opened(tmp_path_factory: pytest.TempPathFactory) -> Callable[[str, str], Opened]:
    """`opened(family, quantisation)`: the model, dequantised, and its checkpoint."""
    made: dict[tuple[str, str], Opened] = {}
    folder = tmp_path_factory.mktemp("gguf")

    def open_one(family: str = "llama", quantisation: str = "Q4_1") -> Opened:
        key = (family, quantisation)
        if key not in made:
            path = write_gguf(
                folder / f"{family}-{quantisation}.gguf", SHAPES[family], quantisation
            )
            made[key] = kvist.load(path, executor="reference"), open_checkpoint(path)
        return made[key]

    return open_one
