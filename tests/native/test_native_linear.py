"""Each instruction set's products against plain arithmetic on the same rounded operands."""

import ctypes

import gguf
import numpy as np
import pytest
import torch
from quantised_models import cut_blocks, round_activations

from kvist.loading.dequantize import dequantize
from kvist.native.library import library
from kvist.native.weights import STORED

ISAS = ("portable", "avx2", "avx512", "amx")


def product(isa: str, quantisation: str, matrix: torch.Tensor, x: torch.Tensor) -> torch.Tensor:
    """`[rows, matrix rows]`, as the library computes it; skips where it cannot."""
    (rows, columns), count = x.shape, matrix.shape[0]
    padded = -(-count // 16) * 16
    out = torch.full((rows, padded), torch.nan)
    failed = library().kvist_test_linear(
        isa.encode(),
        STORED[quantisation][0],
        ctypes.c_void_p(matrix.data_ptr()),
        count,
        columns,
        rows,
        x.data_ptr(),
        out.data_ptr(),
    )
    if failed:
        pytest.skip(f"this processor has no {isa}")
    assert torch.all(out[:, count:] == 0)
    return out[:, :count]


def quantised(quantisation: str, rows: int, columns: int, seed: int) -> torch.Tensor:
    values = np.random.default_rng(seed).standard_normal((rows, columns)).astype(np.float32)
    kind = gguf.GGMLQuantizationType[quantisation]
    return torch.from_numpy(gguf.quantize(values, kind))


def rounded(
    isa: str, x: torch.Tensor, matrix: torch.Tensor, quantisation: str
) -> tuple[torch.Tensor, torch.Tensor]:
    """Both as kernels round them: to bfloat16 for matrix units, else activations to 8 bits."""
    weights = dequantize(matrix, quantisation)
    if isa != "amx":
        return round_activations(x), weights
    of_few_bits = quantisation.startswith("Q4")
    weights = cut_blocks(matrix, quantisation) if of_few_bits else weights.bfloat16().float()
    return x.bfloat16().float(), weights


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("rows", [1, 2, 3, 5, 8, 9, 15])
def test_product_is_that_of_rounded_operands(isa: str, quantisation: str, rows: int) -> None:
    generator = torch.Generator().manual_seed(rows)
    for seed, (count, columns) in enumerate([(16, 32), (40, 96), (7, 320), (64, 576)]):
        matrix = quantised(quantisation, count, columns, seed)
        x = torch.randn(rows, columns, generator=generator) * 10.0 ** (seed - 2)
        x_rounded, weights = rounded(isa, x, matrix, quantisation)
        found = product(isa, quantisation, matrix, x)
        atol = 2e-5 * float(x.abs().max())
        torch.testing.assert_close(found, x_rounded @ weights.T, rtol=1e-4, atol=atol)


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q8_0"])
@pytest.mark.parametrize("rows", [16, 17, 32, 33, 49])
def test_many_rows_agree_with_float_within_their_rounding(
    isa: str, quantisation: str, rows: int
) -> None:
    matrix = quantised(quantisation, 72, 288, rows)
    x = torch.randn(rows, 288, generator=torch.Generator().manual_seed(rows))
    weights = dequantize(matrix, quantisation)
    found = product(isa, quantisation, matrix, x)
    x_rounded, w_rounded = rounded(isa, x, matrix, quantisation)
    torch.testing.assert_close(found, x_rounded @ w_rounded.T, rtol=1e-4, atol=1e-4)
    exact = x @ weights.T
    assert (found - exact).norm() / exact.norm() < 0.01


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q8_0"])
def test_a_row_is_the_same_to_the_bit_whatever_stands_beside_it(
    isa: str, quantisation: str
) -> None:
    matrix = quantised(quantisation, 40, 224, 1)
    x = torch.randn(35, 224, generator=torch.Generator().manual_seed(1))
    alone = torch.cat([product(isa, quantisation, matrix, row[None]) for row in x])
    for rows in (2, 3, 5, 8, 9, 16, 35):
        assert torch.equal(product(isa, quantisation, matrix, x[:rows]), alone[:rows])


@pytest.mark.parametrize("isa", ISAS)
def test_extreme_blocks_do_not_saturate(isa: str) -> None:
    # Every weight and activation at its limit, where 16-bit sums of products would overflow.
    block = np.concatenate(
        [np.frombuffer(np.float16(1).tobytes(), np.uint8), np.full(32, 0x80, np.uint8)]
    )
    matrix = torch.from_numpy(np.tile(block, (16, 2)).copy())
    for sign in (1.0, -1.0):
        x = torch.full((3, 64), sign)
        expected = torch.full((3, 16), -128.0 * 64 * sign)
        torch.testing.assert_close(product(isa, "Q8_0", matrix, x), expected, rtol=1e-5, atol=0)


@pytest.mark.parametrize("isa", ISAS)
def test_zero_activations_give_zero(isa: str) -> None:
    matrix = quantised("Q4_1", 16, 64, 0)
    assert torch.all(product(isa, "Q4_1", matrix, torch.zeros(2, 64)) == 0)


@pytest.mark.parametrize("exponent", [-24, -17, -16, -15, -14, -3, 0, 10])
def test_q4_0_scales_survive_as_minima(exponent: int) -> None:
    # Q4_0 becomes scale and minimum; subnormal halves are the awkward ones.
    scale = np.float16(2.0**exponent) * np.float16(1.25 if exponent > -20 else 1)
    block = np.concatenate(
        [np.frombuffer(scale.tobytes(), np.uint8), np.arange(16, dtype=np.uint8) * 17]
    )
    matrix = torch.from_numpy(np.tile(block, (16, 1)).copy())
    x = torch.eye(32)[:5] * 127
    expected = x @ dequantize(matrix, "Q4_0").T
    torch.testing.assert_close(product("portable", "Q4_0", matrix, x), expected, rtol=1e-5, atol=0)


def test_argmax_is_the_first_of_the_largest() -> None:
    generator = torch.Generator().manual_seed(0)
    for size in (1, 5, 64, 65, 1000):
        x = torch.randint(0, 50, (size,), generator=generator).float()
        assert library().kvist_argmax(x.data_ptr(), size) == int(x.argmax())
