"""A GGUF file gives the hub's names, row order, values and config."""

from pathlib import Path

import gguf
import pytest
import torch
from safetensors.torch import load_file
from tiny_gguf import HEAD_DIM, HEADS, HIDDEN, KV_HEADS, LAYERS, MLP, VOCAB, TinyGGUF

from kvist.errors import CheckpointError, ConfigError, NotSupported
from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.dequantize import dequantize
from kvist.loading.gguf import GGUFCheckpoint

HUB_NAMES = {
    "token_embd.weight": "model.embed_tokens.weight",
    "output_norm.weight": "model.norm.weight",
    "blk.0.attn_norm.weight": "model.layers.0.input_layernorm.weight",
    "blk.0.attn_q.weight": "model.layers.0.self_attn.q_proj.weight",
    "blk.0.attn_k.weight": "model.layers.0.self_attn.k_proj.weight",
    "blk.0.attn_v.weight": "model.layers.0.self_attn.v_proj.weight",
    "blk.1.attn_output.weight": "model.layers.1.self_attn.o_proj.weight",
    "blk.1.ffn_norm.weight": "model.layers.1.post_attention_layernorm.weight",
    "blk.1.ffn_gate.weight": "model.layers.1.mlp.gate_proj.weight",
    "blk.1.ffn_up.weight": "model.layers.1.mlp.up_proj.weight",
    "blk.1.ffn_down.weight": "model.layers.1.mlp.down_proj.weight",
}


def open_gguf(path: Path) -> GGUFCheckpoint:
    checkpoint = open_checkpoint(path)
    assert isinstance(checkpoint, GGUFCheckpoint)
    return checkpoint


def test_tensors_have_the_names_shapes_and_values_of_the_hub(
    tiny: TinyGGUF, tiny_gguf: Path
) -> None:
    checkpoint = open_gguf(tiny_gguf)
    assert len(checkpoint.names()) == len(tiny.tensors) == 2 + 9 * LAYERS
    for theirs, ours in HUB_NAMES.items():
        assert checkpoint.shape(ours) == tuple(tiny.tensors[theirs].shape)
        torch.testing.assert_close(
            checkpoint.tensor(ours), tiny.tensors[theirs], rtol=0, atol=0, msg=ours
        )


@pytest.mark.parametrize(("quantization", "dtype"), [("F16", "float16"), ("BF16", "bfloat16")])
def test_half_precision_weights_come_as_stored_or_as_asked(
    tiny: TinyGGUF, tmp_path: Path, quantization: str, dtype: str
) -> None:
    tiny.quantization = quantization
    checkpoint = open_gguf(tiny.write(tmp_path / "half.gguf"))
    stored = getattr(torch, dtype)
    for theirs, ours in HUB_NAMES.items():
        expected = tiny.tensors[theirs]
        if expected.ndim > 1:
            expected = expected.to(stored)
            assert checkpoint.tensor(ours).dtype == stored
        got = checkpoint.tensor(ours, dtype=torch.float32)
        torch.testing.assert_close(got, expected.float(), rtol=0, atol=0)
    assert checkpoint.config["torch_dtype"] == dtype


@pytest.mark.parametrize("quantization", ["Q4_0", "Q4_1", "Q5_0", "Q5_1", "Q8_0"])
def test_quantised_weights_are_close_to_what_was_quantised(
    tiny: TinyGGUF, tmp_path: Path, quantization: str
) -> None:
    tiny.quantization = quantization
    checkpoint = open_gguf(tiny.write(tmp_path / "quantised.gguf"))
    # Half a step of a block whose 32 normal values span about five deviations.
    tolerance = {"Q4": 0.4, "Q5": 0.2, "Q8": 0.02}[quantization[:2]]
    for theirs, ours in HUB_NAMES.items():
        difference = checkpoint.tensor(ours) - tiny.tensors[theirs]
        assert difference.abs().max() < tolerance, ours
    assert checkpoint.config["torch_dtype"] == "float32"


def test_biases_of_queries_and_keys_are_put_back_in_order(tiny: TinyGGUF, tmp_path: Path) -> None:
    for i in range(LAYERS):
        tiny.tensors[f"blk.{i}.attn_q.bias"] = torch.randn(HEADS * HEAD_DIM)
        tiny.tensors[f"blk.{i}.attn_k.bias"] = torch.randn(KV_HEADS * HEAD_DIM)
    checkpoint = open_gguf(tiny.write(tmp_path / "bias.gguf"))
    for part, ours in (("attn_q", "q_proj"), ("attn_k", "k_proj")):
        got = checkpoint.tensor(f"model.layers.1.self_attn.{ours}.bias")
        torch.testing.assert_close(got, tiny.tensors[f"blk.1.{part}.bias"], rtol=0, atol=0)
    assert checkpoint.config["attention_bias"] is True


def test_the_config_is_in_the_hubs_style(tiny_gguf: Path) -> None:
    checkpoint = open_gguf(tiny_gguf)
    assert checkpoint.config == {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "vocab_size": VOCAB,
        "hidden_size": HIDDEN,
        "intermediate_size": MLP,
        "num_hidden_layers": LAYERS,
        "num_attention_heads": HEADS,
        "num_key_value_heads": KV_HEADS,
        "head_dim": HEAD_DIM,
        "hidden_act": "silu",
        "max_position_embeddings": 128,
        "rms_norm_eps": 1e-5,  # and not 9.999999747e-06, which the file holds
        "rope_theta": 100000.0,
        "rope_scaling": None,
        "attention_bias": False,
        "tie_word_embeddings": True,
        "torch_dtype": "float32",
        "bos_token_id": 1,
        "eos_token_id": 2,
    }
    assert checkpoint.generation_config == {"bos_token_id": 1, "eos_token_id": 2}
    assert checkpoint.tokenizer_config == {
        "bos_token": "t1",
        "eos_token": "t2",
        "add_bos_token": False,
    }
    assert checkpoint.chat_template == "{{ messages }}"
    assert checkpoint.tokenizer_json is None
    assert checkpoint.gguf_metadata["tokenizer.ggml.tokens"][:2] == ["t0", "t1"]


def test_an_output_matrix_unties_the_head(tiny: TinyGGUF, tmp_path: Path) -> None:
    tiny.tensors["output.weight"] = torch.randn(VOCAB, HIDDEN)
    checkpoint = open_gguf(tiny.write(tmp_path / "untied.gguf"))
    assert checkpoint.config["tie_word_embeddings"] is False
    assert torch.equal(checkpoint.tensor("lm_head.weight"), tiny.tensors["output.weight"])


def test_the_token_that_ends_a_turn_ends_generation_too(tiny: TinyGGUF, tmp_path: Path) -> None:
    tiny.metadata["tokenizer.ggml.eot_token_id"] = 7
    checkpoint = open_gguf(tiny.write(tmp_path / "chat.gguf"))
    assert checkpoint.generation_config["eos_token_id"] == [7, 2]


def test_a_qwen3_in_a_gguf_equals_its_safetensors(fixtures: Path, tmp_path: Path) -> None:
    weights = load_file(fixtures / "dense_untied_headdim" / "model.safetensors")
    tensor_map = gguf.get_tensor_name_map(gguf.MODEL_ARCH.QWEN3, 3)
    named = {
        tensor_map.get_name(name, try_suffixes=(".weight",)): tensor.contiguous()
        for name, tensor in weights.items()
    }
    metadata = {
        "qwen3.block_count": 3,
        "qwen3.context_length": 1024,
        "qwen3.embedding_length": 64,
        "qwen3.feed_forward_length": 128,
        "qwen3.attention.head_count": 4,
        "qwen3.attention.head_count_kv": 4,
        "qwen3.attention.key_length": 32,
        "qwen3.attention.value_length": 32,
        "qwen3.rope.freq_base": 1000000.0,
        "qwen3.attention.layer_norm_rms_epsilon": 1e-6,
    }
    path = tmp_path / "qwen3.gguf"
    TinyGGUF(named, metadata, architecture="qwen3", interleaved=False).write(path)
    checkpoint = open_gguf(path)
    original = open_checkpoint(fixtures / "dense_untied_headdim")
    assert checkpoint.names() == original.names()
    for name in original.names():
        assert torch.equal(checkpoint.tensor(name), original.tensor(name)), name
    for key in ("model_type", "architectures", "head_dim", "rms_norm_eps", "hidden_size"):
        assert checkpoint.config[key] == original.config[key]


def test_quantised_blocks_are_at_hand_in_the_hubs_row_order(tiny: TinyGGUF, tmp_path: Path) -> None:
    tiny.quantization = "Q4_1"
    checkpoint = open_gguf(tiny.write(tmp_path / "q4.gguf"))
    for name in HUB_NAMES.values():
        blocks = checkpoint.quantized(name)
        if len(checkpoint.shape(name)) == 1:
            assert blocks is None
            continue
        assert blocks is not None
        assert blocks.type == "Q4_1"
        assert blocks.shape == checkpoint.shape(name)
        assert blocks.data.shape == (blocks.shape[0], blocks.shape[1] // 32 * 20)
        assert torch.equal(dequantize(blocks.data, blocks.type), checkpoint.tensor(name))


def test_a_tensor_that_was_read_does_not_change_with_the_file(tiny_gguf: Path) -> None:
    checkpoint = open_gguf(tiny_gguf)
    before = checkpoint.tensor("model.norm.weight")
    kept = before.clone()
    with tiny_gguf.open("r+b") as file:
        file.seek(-tiny_gguf.stat().st_size // 2, 2)
        file.write(b"\xff" * (tiny_gguf.stat().st_size // 2))
    assert torch.equal(before, kept)


def test_an_unknown_tensor_is_named(tiny_gguf: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no tensor 'lm_head\.weight'"):
        open_checkpoint(tiny_gguf).tensor("lm_head.weight")


@pytest.mark.parametrize(
    "key",
    [
        "block_count",
        "context_length",
        "embedding_length",
        "feed_forward_length",
        "attention.head_count",
        "attention.layer_norm_rms_epsilon",
    ],
)
def test_a_missing_metadata_key_is_named(tiny: TinyGGUF, tmp_path: Path, key: str) -> None:
    del tiny.metadata[f"llama.{key}"]
    with pytest.raises(ConfigError, match=f"lack llama.{key}"):
        open_checkpoint(tiny.write(tmp_path / "poor.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.block_count", 0, r"llama\.block_count is 0"),
        ("llama.block_count", "two", r"llama\.block_count is 'two'"),
        ("llama.rope.freq_base", float("nan"), r"llama\.rope\.freq_base is nan"),
    ],
)
def test_a_senseless_metadata_value_is_named(
    tiny: TinyGGUF, tmp_path: Path, key: str, value: object, says: str
) -> None:
    tiny.metadata[key] = value
    with pytest.raises(ConfigError, match=says):
        open_checkpoint(tiny.write(tmp_path / "odd.gguf"))


@pytest.mark.parametrize(
    ("key", "value", "says"),
    [
        ("llama.expert_count", 8, "mixture of experts"),
        ("llama.rope.dimension_count", HEAD_DIM // 2, r"rope\.dimension_count is 8"),
        ("llama.attention.sliding_window", 4096, "sliding_window"),
        ("llama.attention.head_count_kv", [2, 1], "differs from layer to layer"),
        ("split.count", 3, "split GGUF"),
    ],
)
def test_what_is_not_supported_is_refused_by_name(
    tiny: TinyGGUF, tmp_path: Path, key: str, value: object, says: str
) -> None:
    tiny.metadata[key] = value
    with pytest.raises(NotSupported, match=says):
        open_checkpoint(tiny.write(tmp_path / "other.gguf"))


def test_scaled_rope_factors_are_refused_by_name(tiny: TinyGGUF, tmp_path: Path) -> None:
    tiny.tensors["rope_freqs.weight"] = torch.ones(HEAD_DIM // 2)
    with pytest.raises(NotSupported, match="rope_freqs"):
        open_checkpoint(tiny.write(tmp_path / "llama3.gguf"))


def test_a_scaled_rope_reaches_the_config(tiny: TinyGGUF, tmp_path: Path) -> None:
    tiny.metadata |= {
        "llama.rope.scaling.type": "yarn",
        "llama.rope.scaling.factor": 4.0,
        "llama.rope.scaling.original_context_length": 32,
    }
    assert open_checkpoint(tiny.write(tmp_path / "yarn.gguf")).config["rope_scaling"] == {
        "rope_type": "yarn",
        "factor": 4.0,
        "original_max_position_embeddings": 32,
    }


def test_an_unknown_architecture_is_refused_by_name(tiny: TinyGGUF, tmp_path: Path) -> None:
    tiny.architecture = "mamba"
    with pytest.raises(NotSupported, match=r"'mamba'; kvist reads llama, qwen3"):
        open_checkpoint(tiny.write(tmp_path / "mamba.gguf"))


def test_rows_that_do_not_divide_into_heads_are_an_error(tiny: TinyGGUF, tmp_path: Path) -> None:
    tiny.tensors["blk.0.attn_q.weight"] = torch.randn(60, HIDDEN)
    tiny.interleaved = False
    with pytest.raises(CheckpointError, match=r"blk\.0\.attn_q\.weight.*4 heads"):
        open_checkpoint(tiny.write(tmp_path / "odd.gguf"))
