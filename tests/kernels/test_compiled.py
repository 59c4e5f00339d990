"""CUDA C++ kernels are put together from their files, compiled once and kept; others stand in."""

import re
import shutil
import subprocess
import sys
from types import ModuleType, SimpleNamespace

import pytest
import torch

from kvist.attention.kernels import compiled
from kvist.attention.kernels.formats import FP8, INT4, INT8, Format
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


def pages_on_cpu(*kinds: int, kv_heads: int = 8) -> Pages:
    """A quantised layer of 16 sequences."""
    planes = torch.zeros(2, 16, kv_heads, 128), torch.zeros(2, 16, kv_heads)
    keys, values = (Format(kind, *planes, groups=4 if kind == INT4 else 1) for kind in kinds)
    lens = torch.ones(16, dtype=torch.int32)
    table, starts = torch.ones(16, 1), torch.arange(17)
    return Pages(keys, values, AttentionSpec(kv_heads, 128), 16, table, lens, starts)


Q = torch.zeros(16, 16, 128, dtype=torch.bfloat16)


@pytest.mark.skipif(shutil.which("nvcc") is None, reason="needs a CUDA compiler")
@pytest.mark.parametrize("kv_heads", [4, 8])
@pytest.mark.parametrize("kinds", [(FP8, FP8), (INT8, INT4)], ids=["fp8", "k8v4"])
def test_the_source_compiles_to_the_size_that_launches_give_it(
    kinds, kv_heads, monkeypatch, tmp_path
):
    asked = []
    monkeypatch.setattr(compiled, "_load", lambda *given: asked.append(given))
    compiled._kernel(Q, pages_on_cpu(*kinds, kv_heads=kv_heads), rotate=True)
    [(_, shared, options)] = asked
    source = tmp_path / "decode.cu"
    check = f"static_assert(STAGES * STAGE == {shared});"
    source.write_text(nvrtc.read_source(compiled.DECODE) + check)
    command = ["nvcc", "-arch=sm_90", "-std=c++17", "-ptx", *options, source, "-o", "/dev/null"]
    run = subprocess.run(command, capture_output=True, text=True, check=False)
    assert run.returncode == 0, run.stderr


def parameters(path, name):
    """The kinds of a kernel's parameters, as its source has them."""
    [found] = re.findall(rf"{name}\(([^)]*)\)", nvrtc.read_source(path))
    return [
        "pointer" if "*" in parameter else parameter.split()[0] for parameter in found.split(",")
    ]


def test_launches_give_kernels_what_they_take(monkeypatch):
    launches = {}

    def load(path, index, name, shared, options):
        def launch(grid, threads, *arguments):
            kinds = ["pointer" if torch.is_tensor(a) else type(a).__name__ for a in arguments]
            launches[name] = path, grid, threads, kinds

        return launch

    monkeypatch.setattr(nvrtc, "load", load)
    monkeypatch.setattr(
        torch.cuda, "get_device_properties", lambda _: SimpleNamespace(multi_processor_count=100)
    )
    compiled._load.cache_clear()
    pages = pages_on_cpu(INT8, INT4)
    plan = compiled.make_plan(pages, 16, 64, ragged=False)
    compiled.decode(Q, pages, torch.empty_like(Q), plan, 0.1)
    compiled._load.cache_clear()
    for name, (path, _, _, kinds) in launches.items():
        assert kinds == parameters(path, name)
    assert launches["decode_kernel"][1:3] == ((200, 1), 288)
    assert launches["list_kernel"][1:3] == ((1, 1), 1024)


def test_it_leaves_a_cpu_to_others():
    assert not compiled.can_decode(Q, pages_on_cpu(FP8, FP8), rotate=False)


def test_a_kernel_that_cannot_be_compiled_is_done_without(monkeypatch, caplog):
    def fail(*_):
        raise NotSupported("no compiler")

    monkeypatch.setattr(nvrtc, "load", fail)
    compiled._load.cache_clear()
    assert compiled._kernel(Q, pages_on_cpu(FP8, FP8), rotate=False) is None
    assert compiled._kernel(Q, pages_on_cpu(FP8, FP8), rotate=False) is None
    assert [record.getMessage() for record in caplog.records] == [
        "no compiler; decoding by Triton's kernels"
    ]
    compiled._load.cache_clear()
