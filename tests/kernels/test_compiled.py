"""CUDA C++ kernels are put together from their files, compiled once and kept; others stand in."""

import re
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kvist.attention.kernels import compiled
from kvist.attention.kernels.formats import Format
from kvist.attention.kernels.launch import Pages
from kvist.core.spec import AttentionSpec
from kvist.errors import NotSupported
from kvist.kernels import nvrtc


@pytest.fixture
def compiler(monkeypatch, tmp_path):
    """A compiler that counts what it is asked for, and an empty cache on disk."""
    asked: list[tuple[str, tuple[str, ...]]] = []

    def compile_(source, options):
        asked.append((source, options))
        return source.encode()

    bindings = ModuleType("cuda.bindings")
    bindings.nvrtc = SimpleNamespace(nvrtcVersion=lambda: (0, 13, 0))
    monkeypatch.setitem(sys.modules, "cuda", ModuleType("cuda"))
    monkeypatch.setitem(sys.modules, "cuda.bindings", bindings)
    monkeypatch.setattr(nvrtc, "_compile", compile_)
    monkeypatch.setenv("KVIST_HOME", str(tmp_path))
    return asked


def test_a_kernel_is_compiled_once_for_each_set_of_options(compiler):
    assert nvrtc.cubin("a", ("-DX=1",)) == nvrtc.cubin("a", ("-DX=1",)) == b"a"
    assert len(compiler) == 1
    nvrtc.cubin("a", ("-DX=2",))
    nvrtc.cubin("b", ("-DX=1",))
    assert len(compiler) == 3


def test_a_cache_that_cannot_be_written_to_is_done_without(compiler, monkeypatch, tmp_path):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("KVIST_HOME", str(tmp_path / "file"))
    assert nvrtc.cubin("a", ()) == nvrtc.cubin("a", ()) == b"a"
    assert len(compiler) == 2


@pytest.mark.parametrize("path", [compiled.DECODE, compiled.LIST], ids=lambda path: path.name)
def test_a_source_brings_what_it_includes_once(path):
    source = nvrtc.read_source(path)
    assert "#include" not in source
    assert "#pragma once" not in source
    assert source.count("struct Item {") == 1


def test_the_sizes_of_source_and_launch_agree():
    source = nvrtc.read_source(compiled.DECODE)
    for name, value in (
        ("KEYS", compiled.KEYS),
        ("DIM", compiled.DIM),
        ("LANES", compiled.LANES),
        ("PAD", compiled._PAD),
    ):
        assert re.search(rf"\b{name} = {value}\b", source), name


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs a CUDA compiler")
@pytest.mark.parametrize("kinds", [(1, 1), (2, 3)], ids=["fp8", "k8v4"])
def test_the_source_compiles(kinds, tmp_path):
    source = tmp_path / "decode.cu"
    source.write_text(nvrtc.read_source(compiled.DECODE))
    macros = {
        "K_KIND": kinds[0],
        "V_KIND": kinds[1],
        "KV_HEADS": 8,
        "GROUP": 4,
        "BLOCK": 16,
        "STAGES": 3,
        "PER_SM": 2,
        "MODEL_BFLOAT": 1,
        "ROTATE": 1,
    }
    options = [f"-D{name}={value}" for name, value in macros.items()]
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-ptx", *options, source, "-o", "/dev/null"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def pages_on_cpu(kind: int = 1) -> Pages:
    """A quantised layer of 16 sequences."""
    side = Format(kind, torch.zeros(2, 16, 8, 128), torch.zeros(2, 16, 8))
    lens = torch.ones(16, dtype=torch.int32)
    table, starts = torch.ones(16, 1), torch.arange(17)
    return Pages(side, side, AttentionSpec(8, 128), 16, table, lens, starts)


def test_it_leaves_a_cpu_to_others():
    assert not compiled.can_decode(torch.zeros(16, 16, 128), pages_on_cpu(), rotate=False)


def test_a_kernel_that_cannot_be_compiled_is_done_without(monkeypatch, caplog):
    def fail(*_):
        raise NotSupported("no compiler")

    monkeypatch.setattr(nvrtc, "load", fail)
    compiled._load.cache_clear()
    q = torch.zeros(16, 16, 128, dtype=torch.bfloat16)
    assert compiled._kernel(q, pages_on_cpu(), rotate=False) is None
    assert compiled._kernel(q, pages_on_cpu(), rotate=False) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no compiler; decoding by Triton's kernels"
    ]
    compiled._load.cache_clear()
