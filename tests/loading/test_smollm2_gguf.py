"""The real SmolLM2-135M, where it has been pulled."""

import time
from pathlib import Path

import gguf
import pytest
import torch

from kvist.loading.checkpoint import Checkpoint, open_checkpoint
from kvist.loading.hub import pulled_path

pytestmark = pytest.mark.smollm2


@pytest.fixture(scope="module")
def path() -> Path:
    path = pulled_path("smollm2-135m")
    if path is None:
        pytest.skip("SmolLM2-135M is not here; run `kvist pull smollm2-135m`")
    return path


@pytest.fixture(scope="module")
def checkpoint(path: Path) -> Checkpoint:
    return open_checkpoint(path)


def test_the_config_is_that_of_the_hubs_smollm2(checkpoint: Checkpoint) -> None:
    expected = {
        "model_type": "llama",
        "vocab_size": 49152,
        "hidden_size": 576,
        "intermediate_size": 1536,
        "num_hidden_layers": 30,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
        "max_position_embeddings": 8192,
        "rms_norm_eps": 1e-5,
        "rope_theta": 100000,
        "tie_word_embeddings": True,
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert {key: checkpoint.config[key] for key in expected} == expected
    assert checkpoint.tokenizer_config["eos_token"] == "<|im_end|>"
    assert "<|im_start|>" in (checkpoint.chat_template or "")
    assert sum(torch.Size(checkpoint.shape(n)).numel() for n in checkpoint.names()) == 134_515_008


def test_weights_are_those_of_the_gguf_package(checkpoint: Checkpoint, path: Path) -> None:
    tensors = {tensor.name: tensor for tensor in gguf.GGUFReader(path).tensors}
    for theirs, ours in (
        ("token_embd.weight", "model.embed_tokens.weight"),
        ("blk.7.ffn_down.weight", "model.layers.7.mlp.down_proj.weight"),
        ("blk.29.attn_v.weight", "model.layers.29.self_attn.v_proj.weight"),
        ("blk.3.attn_norm.weight", "model.layers.3.input_layernorm.weight"),
    ):
        expected = gguf.dequantize(tensors[theirs].data, tensors[theirs].tensor_type)
        assert torch.equal(checkpoint.tensor(ours), torch.from_numpy(expected)), ours


def test_the_whole_model_is_read_in_seconds(path: Path) -> None:
    start = time.perf_counter()
    checkpoint = open_checkpoint(path)
    for name in checkpoint.names():
        checkpoint.tensor(name, dtype=torch.float32)
    assert time.perf_counter() - start < 5  # about 0.5 on two cores; 3.5 with the gguf package
