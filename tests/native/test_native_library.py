"""Where the compiled library is, and what is said where it cannot be used."""

from pathlib import Path

import pytest
import torch

import kvist.native
from kvist.errors import ConfigError
from kvist.native import library


def test_it_can_be_turned_off(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("KVIST_NATIVE", "0")
    assert library.missing.__wrapped__() == "KVIST_NATIVE=0 turns the compiled library off"


def test_its_absence_names_the_remedy(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVIST_NATIVE", raising=False)
    monkeypatch.setattr(library, "LIBRARY", tmp_path / "_kvist.so")
    assert "install one (g++ or clang++)" in library.missing.__wrapped__()


def test_a_damaged_library_is_not_loaded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.delenv("KVIST_NATIVE", raising=False)
    damaged = tmp_path / "_kvist.so"
    damaged.write_bytes(b"not a library")
    monkeypatch.setattr(library, "LIBRARY", damaged)
    assert "cannot be loaded" in library.missing.__wrapped__()


def test_available_says_whether_missing_has_no_reason() -> None:
    assert kvist.native.available() == (kvist.native.missing() is None)


def test_an_unknown_instruction_set_is_named() -> None:
    with pytest.raises(ConfigError, match="'sse9'"):
        library.isa_bytes("sse9")


def test_a_thread_that_comes_late_is_done_without_for_a_while_and_then_for_longer() -> None:
    active = torch.zeros(60, dtype=torch.int32)
    library.library().kvist_test_pool(len(active), 10, active.data_ptr())
    found = "".join(map(str, active.tolist()))
    first, *alone = map(len, found.split("22")[:-1])  # jobs on one thread, between two tries
    assert first == 0
    assert len(alone) >= 2
    assert alone == sorted(alone)
    assert alone[0] < alone[-1]
