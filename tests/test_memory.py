"""How much memory there is: the machine's, or what a container leaves of it."""

from pathlib import Path

import pytest
import torch

from kvist.runner import memory
from kvist.runner.memory import available_memory

CPU = torch.device("cpu")
MIB = 1 << 20


@pytest.fixture
def cgroup(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    monkeypatch.setattr(memory, "CGROUP", tmp_path)
    return tmp_path


def write(cgroup: Path, limit: str, used: int, inactive: int) -> None:
    (cgroup / "memory.max").write_text(f"{limit}\n")
    (cgroup / "memory.current").write_text(f"{used}\n")
    (cgroup / "memory.stat").write_text(f"anon 5\ninactive_file {inactive}\nactive_file 7\n")


def test_a_containers_limit_counts_and_what_files_may_give_back_is_free(cgroup: Path) -> None:
    write(cgroup, str(20 * MIB), 15 * MIB, 10 * MIB)
    assert available_memory(CPU) == 15 * MIB


def test_a_container_that_is_over_its_limit_has_nothing(cgroup: Path) -> None:
    write(cgroup, str(20 * MIB), 25 * MIB, 0)
    assert available_memory(CPU) == 0


@pytest.mark.parametrize("limit", ["max", "nonsense"])
def test_without_a_limit_the_machines_memory_counts(cgroup: Path, limit: str) -> None:
    without = available_memory(CPU)  # no files of a container at all
    write(cgroup, limit, 10 * MIB, 0)
    assert without > 0
    assert available_memory(CPU) == pytest.approx(without, rel=0.2)
