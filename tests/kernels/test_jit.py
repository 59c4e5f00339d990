"""Launches of one kind start the machine code that Triton found for the first of them."""

import inspect
from importlib import import_module

import pytest
import torch
import triton
from triton.backends.nvidia.compiler import CUDABackend

from kvist.kernels.jit import Kernel, cdiv, compile_ahead, kind_of, next_power_of_2

X = torch.zeros(64)
MODULES = (  # that define kernels
    "attention.kernels.decode_kernels",
    "attention.kernels.prefill_kernels",
    "kernels.elementwise_kernels",
    "kernels.fp8_kernels",
    "kernels.inputs",
    "kernels.linear_kernels",
    "kernels.logprob_kernels",
    "kernels.sampling_kernels",
)


class Code:
    """Machine code that notes how it is loaded and started."""

    def __init__(self, started: list, loaded: list | None = None) -> None:
        self.started, self.loaded = started, loaded

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append((grid, arguments))

    @property
    def run(self):
        if self.loaded is None:
            raise RuntimeError("out of resource: shared memory")
        self.loaded.append(self)


class Function:
    """In Triton's place: compiles and starts at once, slowly."""

    arg_names = ("x", "n", "BLOCK", "NORM")

    def __init__(self) -> None:
        self.compiled, self.started = [], []

    def __getitem__(self, grid):
        def launch(*arguments, **constants):
            self.compiled.append((grid, arguments, constants))
            return Code(self.started)

        return launch

    def warmup(self, code, *, grid):
        return code


def test_what_is_known_is_started_with_constants_in_the_kernels_order():
    function = Function()
    kernel = Kernel(function)
    kernel[(3,)](X, 7, NORM=True, BLOCK=64, num_warps=4)
    assert len(function.compiled) == 1
    assert not function.started
    kernel[(5, 2)](X, 7, NORM=True, BLOCK=64, num_warps=4)
    kernel[(1,)](X, 16, NORM=True, BLOCK=64, num_warps=4)
    assert [arguments[1] for _, arguments, _ in function.compiled] == [7, 16]
    (grid, (x, n, block, norm)), *_ = function.started
    assert (grid, n, block, norm) == ((5, 2, 1), 7, 64, True)
    assert x is X


@pytest.mark.parametrize(
    "other",
    [
        ((X.double(), 32), {}),
        ((X[1:], 32), {}),
        ((X, 31), {}),
        ((X, 1), {}),
        ((X, 1 << 32), {}),
        ((X, 32.0), {}),
        ((X, 32), {"BLOCK": 128}),
        ((X, 32), {"num_warps": 8}),
        ((X, 32), {"launch_pdl": True}),
    ],
    ids=["type", "address", "multiple", "one", "long", "float", "constant", "option", "more"],
)
def test_what_triton_compiles_anew_is_of_another_kind(other):
    arguments, changes = other
    constants = {"BLOCK": 64, "num_warps": 4}
    usual = kind_of((X, 32), constants)
    assert usual == kind_of((X[4:], 48), constants)
    assert usual != kind_of(arguments, constants | changes)


@pytest.fixture
def _one_gpu(monkeypatch):
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    monkeypatch.setattr(torch.cuda, "set_device", lambda index: None)


@pytest.mark.usefixtures("_one_gpu")
def test_what_is_compiled_ahead_is_loaded_once_and_not_started():
    function, loaded = Function(), []
    kernel, small, large = Kernel(function), Code([], loaded), Code([])

    def rehearsal() -> None:
        for code in (small, large, small):
            kernel[(1,)](code)

    compile_ahead(rehearsal)
    assert loaded == [small]
    assert not function.compiled
    kernel[(1,)](X, 7, NORM=True, BLOCK=64)
    assert len(function.compiled) == 1


@pytest.mark.usefixtures("_one_gpu")
def test_compiling_ahead_can_be_interrupted(monkeypatch):
    def interrupted(*_: object) -> None:
        raise KeyboardInterrupt

    function = Function()
    with monkeypatch.context() as patch:
        patch.setattr(triton.AsyncCompileMode, "__exit__", interrupted)
        with pytest.raises(KeyboardInterrupt):
            compile_ahead(lambda: None)
    Kernel(function)[(1,)](X, 7, NORM=True, BLOCK=64)
    assert len(function.compiled) == 1
    compile_ahead(lambda: None)


def test_sizes():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]


@pytest.mark.parametrize("specialised", [True, False])
def test_a_kind_tells_apart_all_that_triton_does(specialised):
    specialise = getattr(triton.runtime.jit, "native_specialize_impl", None)
    if specialise is None:
        pytest.skip("this Triton specialises elsewhere")
    edges = (1 << 31, 1 << 32, 1 << 63)
    counts = [near for n in (0, *edges) for near in (n - 16, n - 1, n, n + 1, n + 16)]
    others = [-1 << 31, (-1 << 31) - 1, 15, 17, True, False, 0.0, 1.0, None]
    tensors = [X, X[1:], X[4:], X.double(), X.bfloat16(), X.to(torch.float8_e4m3fn), X.int()]
    found: dict[tuple, tuple] = {}
    for argument in (*counts, *others, *tensors):
        theirs = specialise(CUDABackend, argument, False, specialised, True)
        assert found.setdefault(kind_of((X, argument), {}), theirs) == theirs


def test_kernels_take_constants_behind_all_else_and_none_by_default():
    modules = [import_module(f"kvist.{name}") for name in MODULES]
    kernels = {k for m in modules for k in vars(m).values() if isinstance(k, Kernel)}
    assert len(kernels) >= len(modules)
    for kernel in kernels:
        parameters = inspect.signature(kernel.function.fn).parameters.values()
        constant = ["constexpr" in str(p.annotation) for p in parameters]
        assert constant == sorted(constant), kernel.function.__name__
        assert all(p.default is p.empty for p in parameters), kernel.function.__name__
