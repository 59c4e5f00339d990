"""Launches of one kind start the machine code that Triton found for the first of them."""

import pytest
import torch

from kvist.kernels.jit import Kernel, cdiv, kind_of, next_power_of_2

X = torch.zeros(64)


class Code:
    """Machine code that notes how it is started."""

    def __init__(self, started: list) -> None:
        self.started = started

    def __getitem__(self, grid):
        return lambda *arguments: self.started.append((grid, arguments))


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


def test_what_is_known_is_started_with_constants_in_the_kernels_order():
    function = Function()
    kernel = Kernel(function)
    kernel[(3,)](X, 7, NORM=True, BLOCK=64, num_warps=4)
    assert len(function.compiled) == 1
    assert not function.started
    kernel[(5, 2)](X, 7, NORM=True, BLOCK=64, num_warps=4)
    kernel[(1,)](X, 8, NORM=True, BLOCK=64, num_warps=4)
    assert [arguments[1] for _, arguments, _ in function.compiled] == [7, 8]
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


def test_sizes():
    assert [cdiv(n, 4) for n in (0, 1, 4, 5)] == [0, 1, 1, 2]
    assert [next_power_of_2(n) for n in (1, 2, 3, 64, 65)] == [1, 2, 4, 64, 128]
