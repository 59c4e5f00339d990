"""Checkpoints that the tests of loading read, and damage."""

from collections.abc import Callable
from pathlib import Path

import gguf
import numpy as np
import pytest
from tiny_gguf import TinyGGUF, llama_metadata, llama_tensors


@pytest.fixture
def tiny() -> TinyGGUF:
    return TinyGGUF(llama_tensors(), llama_metadata())


@pytest.fixture
def tiny_gguf(tiny: TinyGGUF, tmp_path: Path) -> Path:
    return tiny.write(tmp_path / "tiny.gguf")


@pytest.fixture(scope="session")
def fixtures() -> Path:
    return Path(__file__).parents[1] / "fixtures" / "qwen3"


@pytest.fixture
def model_directory(fixtures: Path, tmp_path: Path) -> Callable[[str], Path]:
    """A copy of one of the fixtures' checkpoints that a test may damage."""

    def copy(name: str = "dense_tied") -> Path:
        target = tmp_path / name
        target.mkdir()
        for file in (fixtures / name).iterdir():
            if not file.name.startswith("ref."):
                (target / file.name).write_bytes(file.read_bytes())
        return target

    return copy


@pytest.fixture
def random_blocks() -> Callable[[str, int], np.ndarray]:
    """Random bytes as rows of whole blocks."""

    def make(type_name: str, rows: int) -> np.ndarray:
        kind = gguf.GGMLQuantizationType[type_name]
        nbytes = gguf.GGML_QUANT_SIZES[kind][1]
        return np.random.default_rng(0).integers(0, 256, (rows, 5 * nbytes), dtype=np.uint8)

    return make
