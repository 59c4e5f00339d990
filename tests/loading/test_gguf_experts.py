"""A mixture of experts in a GGUF, where all experts of a layer are one tensor."""

from pathlib import Path

import pytest
import torch
from tiny_gguf import TinyGGUF

from kvist.loading.checkpoint import load_into, open_checkpoint, random_weights
from kvist.models import family_of

LAYERS, HIDDEN, EXPERTS, EXPERT, VOCAB = 2, 64, 4, 32, 96
METADATA = {
    "qwen3moe.block_count": LAYERS,
    "qwen3moe.context_length": 256,
    "qwen3moe.embedding_length": HIDDEN,
    "qwen3moe.feed_forward_length": 128,
    "qwen3moe.attention.head_count": 4,
    "qwen3moe.attention.head_count_kv": 2,
    "qwen3moe.attention.key_length": 16,
    "qwen3moe.attention.value_length": 16,
    "qwen3moe.rope.freq_base": 1000000.0,
    "qwen3moe.attention.layer_norm_rms_epsilon": 1e-6,
    "qwen3moe.expert_count": EXPERTS,
    "qwen3moe.expert_used_count": 2,
    "qwen3moe.expert_feed_forward_length": EXPERT,
}
CONFIG = {
    "model_type": "qwen3_moe",
    "vocab_size": VOCAB,
    "hidden_size": HIDDEN,
    "intermediate_size": 128,
    "num_hidden_layers": LAYERS,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_experts": EXPERTS,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": EXPERT,
    "norm_topk_prob": True,
}
TOP = {"model.embed_tokens": "token_embd", "model.norm": "output_norm", "lm_head": "output"}
LAYER = {
    "input_layernorm": "attn_norm",
    "post_attention_layernorm": "ffn_norm",
    "self_attn.q_proj": "attn_q",
    "self_attn.k_proj": "attn_k",
    "self_attn.v_proj": "attn_v",
    "self_attn.o_proj": "attn_output",
    "self_attn.q_norm": "attn_q_norm",
    "self_attn.k_norm": "attn_k_norm",
    "mlp.gate": "ffn_gate_inp",
}


@pytest.fixture
def model():
    """A tiny mixture with random weights."""
    family = family_of(CONFIG)
    lm = family.build(family.read(CONFIG))
    random_weights(lm, dtype=torch.float32, device="cpu", seed=3)
    return lm


def written(model, path: Path, quantization: str = "F32") -> Path:
    """The model as llama.cpp's converter would write it."""
    state = {name.removesuffix(".weight"): value for name, value in model.state_dict().items()}
    tensors = {f"{theirs}.weight": state[ours] for ours, theirs in TOP.items()}
    for i in range(LAYERS):
        for ours, theirs in LAYER.items():
            tensors[f"blk.{i}.{theirs}.weight"] = state[f"model.layers.{i}.{ours}"]
        for part in ("gate", "up", "down"):
            name = f"model.layers.{i}.mlp.experts.{{}}.{part}_proj"
            merged = torch.stack([state[name.format(e)] for e in range(EXPERTS)])
            tensors[f"blk.{i}.ffn_{part}_exps.weight"] = merged
    tiny = TinyGGUF(tensors, dict(METADATA), "qwen3moe", quantization, interleaved=False)
    tiny.vocabulary = []
    return tiny.write(path)


@pytest.mark.parametrize("quantization", ["F32", "Q8_0"])
def test_experts_of_a_gguf_are_those_of_the_hub(model, tmp_path, quantization):
    checkpoint = open_checkpoint(written(model, tmp_path / "moe.gguf", quantization))
    family = family_of(checkpoint.config)
    with torch.device("meta"):
        loaded = family.build(family.read(checkpoint.config))
    load_into(loaded, checkpoint, dtype=torch.float32, device="cpu")
    for name, expected in model.state_dict().items():
        close = 1e-9 if quantization == "F32" else 1e-3
        torch.testing.assert_close(loaded.state_dict()[name], expected, atol=close, rtol=0)


def test_an_experts_blocks_are_at_hand_as_they_were_quantised(model, tmp_path):
    checkpoint = open_checkpoint(written(model, tmp_path / "moe.gguf", "Q8_0"))
    name = "model.layers.1.mlp.experts.2.up_proj.weight"
    quantised = checkpoint.quantized(name)
    assert quantised.type == "Q8_0"
    assert quantised.shape == (EXPERT, HIDDEN)
    assert quantised.data.shape[0] == EXPERT
