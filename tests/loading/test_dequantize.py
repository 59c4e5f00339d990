"""Decoding of quantised blocks against the gguf package's, bit for bit."""

from collections.abc import Callable

import gguf
import numpy as np
import pytest
import torch

from kvist.loading.dequantize import FLOAT_TYPES, dequantize
from kvist.loading.gguf_format import BLOCKS

QUANTIZED = [name for name in BLOCKS if name not in FLOAT_TYPES]


@pytest.mark.parametrize("type_name", QUANTIZED)
@np.errstate(all="ignore")
def test_random_bytes_decode_as_the_gguf_package_decodes_them(
    type_name: str, random_blocks: Callable[[str, int], np.ndarray]
) -> None:
    raw = random_blocks(type_name, 300)
    expected = gguf.dequantize(raw, gguf.GGMLQuantizationType[type_name])
    decoded = dequantize(torch.from_numpy(raw), type_name)
    assert decoded.dtype == torch.float32
    np.testing.assert_array_equal(decoded.numpy(), expected)


@pytest.mark.parametrize("type_name", QUANTIZED)
def test_more_blocks_than_are_decoded_at_once_give_the_same(
    type_name: str,
    random_blocks: Callable[[str, int], np.ndarray],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    raw = torch.from_numpy(random_blocks(type_name, 7))
    whole = dequantize(raw, type_name)
    monkeypatch.setattr("kvist.loading.dequantize._CHUNK_CPU", 256)
    monkeypatch.setattr("kvist.loading.dequantize._CHUNKS_WORTH_A_THREAD", 1)
    monkeypatch.setattr(torch, "get_num_threads", lambda: 3)
    with torch.inference_mode():
        torch.testing.assert_close(
            dequantize(raw, type_name), whole, rtol=0, atol=0, equal_nan=True
        )
    torch.testing.assert_close(dequantize(raw, type_name), whole, rtol=0, atol=0, equal_nan=True)


def test_decoding_to_another_dtype_rounds_the_float32_result(
    random_blocks: Callable[[str, int], np.ndarray],
) -> None:
    raw = torch.from_numpy(random_blocks("Q4_1", 9))
    expected = dequantize(raw, "Q4_1").to(torch.bfloat16)
    rounded = dequantize(raw, "Q4_1", torch.bfloat16)
    torch.testing.assert_close(rounded, expected, rtol=0, atol=0, equal_nan=True)


@pytest.mark.parametrize("type_name", list(BLOCKS))
def test_block_sizes_are_those_of_the_gguf_package(type_name: str) -> None:
    kind = gguf.GGMLQuantizationType[type_name]
    assert BLOCKS[type_name] == gguf.GGML_QUANT_SIZES[kind]
