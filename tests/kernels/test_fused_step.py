"""The fused step gives the model's own logits, prefilling and decoding."""

import pytest
import torch
from torch import Tensor

from kvist.cache import Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged_cache import PagedCache
from kvist.errors import NotSupported
from kvist.kernels import elementwise, linear
from kvist.kernels.fp8 import Fp8Weight
from kvist.models.decoder import Decoder
from kvist.models.fp8 import Fp8Linear, use_fp8
from kvist.models.registry import family_of
from kvist.runner.fused import FusedStep
from kvist.runner.step import StepFunction, model_step

CONFIG = {
    "vocab_size": 61,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 512,
    "num_hidden_layers": 2,
}
SLIDING = {
    "model_type": "qwen3",
    "layer_types": ["full_attention", "sliding_attention"],
    "use_sliding_window": True,
    "sliding_window": 9,
    "tie_word_embeddings": True,
}
PROMPTS = [list(range(3, 3 + n)) for n in (37, 4, 11)]


def tiny(device: torch.device, **changes: object) -> Decoder:
    config = CONFIG | changes
    family = family_of(config)
    torch.manual_seed(0)
    model = family.build(family.read(config)).to(device).eval()
    for name, weight in model.named_parameters():
        with torch.no_grad():
            weight.normal_(1.0 if "norm" in name else 0.0, 0.3)
    return model.requires_grad_(False)


def in_fp8(model: Decoder, weights: str) -> Decoder:
    """The same model with its projections rounded."""
    use_fp8(model, weights)
    for module in model.modules():
        if isinstance(module, Fp8Linear):
            module.take(module.weight.data)
    return model


def paged(
    model: Decoder, rows: int, device: torch.device, dtype: torch.dtype = torch.float32
) -> PagedCache:
    codec = make_codec("plain", dtype)
    cache = PagedCache(model.specs, codec, rows=rows, block_size=4, num_blocks=80, device=device)
    cache.pool.reserve([80] * len(cache.pool.pools), 8, 64, 256)
    cache._stale = True
    return cache


def run(step: StepFunction, cache, prompts, device: torch.device, backend=None) -> list[Tensor]:
    """Logits of a prefill and of seven greedy steps."""
    found, new = [], prompts
    for _ in range(8):
        batch = Batch.pack(new, cache.lengths, device=device)
        logits = step(batch, cache.bind(batch, backend=backend)).clone()
        cache.commit(batch)
        found.append(logits)
        new = [[token] for token in logits.argmax(-1).tolist()]
    return found


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three rows", "one row"])
@pytest.mark.parametrize("family", [SLIDING, {"model_type": "llama"}], ids=["qwen3", "llama"])
def test_fused_step_gives_the_models_logits(family, prompts, device):
    model = tiny(device, **family)
    codec = make_codec("plain", torch.float32)
    dense = DynamicCache(model.specs, codec, rows=len(prompts), device=device)
    expected = run(model_step(model), dense, prompts, device)
    ours = run(FusedStep(model), paged(model, len(prompts), device), prompts, device, "triton")
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-3


@pytest.mark.parametrize("logits", ["last", [2, 40], "none"], ids=["last", "some", "none"])
def test_the_last_layer_computes_only_rows_with_logits(logits, device, monkeypatch):
    model = tiny(device, **SLIDING)
    whole = Batch.pack(PROMPTS, [0] * 3, logits="all", device=device)
    expected = FusedStep(model)(whole, paged(model, 3, device).bind(whole, backend="triton"))
    batch = Batch.pack(PROMPTS, [0] * 3, logits=logits, device=device)
    rows = []
    silu = elementwise.silu_mul

    def noted(x: Tensor) -> Tensor:
        rows.append(len(x))
        return silu(x)

    monkeypatch.setattr(elementwise, "silu_mul", noted)
    monkeypatch.setattr(linear, "MOST_ROWS", 1)  # all products by torch, and SwiGLU apart
    monkeypatch.setattr(linear, "SMALL", 0)
    ours = FusedStep(model)(batch, paged(model, 3, device).bind(batch, backend="triton"))
    assert rows == [52, len(batch.logit_rows)][: 1 + bool(len(batch.logit_rows))]
    if len(ours):
        assert (ours - expected[batch.logit_rows]).abs().max() < 1e-3


def test_a_row_of_logits_may_be_wanted_twice(device):
    model = tiny(device, **SLIDING)
    tokens, cached = [[5], [6]], [0, 0]
    once = Batch.pack(tokens, cached, device=device)
    expected = FusedStep(model)(once, paged(model, 2, device).bind(once, backend="triton"))
    twice = Batch.pack(tokens, cached, logits=[0, 0, 1], device=device)
    ours = FusedStep(model)(twice, paged(model, 2, device).bind(twice, backend="triton"))
    assert torch.equal(ours, expected[twice.logit_rows])


@pytest.mark.parametrize("prompts", [PROMPTS, PROMPTS[:1]], ids=["three rows", "one row"])
def test_fused_step_multiplies_by_the_same_rounded_weights(prompts, device):
    model = in_fp8(tiny(device, **SLIDING), "fp8")
    codec = make_codec("plain", torch.float32)
    dense = DynamicCache(model.specs, codec, rows=len(prompts), device=device)
    expected = run(model_step(model), dense, prompts, device)
    ours = run(FusedStep(model), paged(model, len(prompts), device), prompts, device, "triton")
    for a, b in zip(ours, expected, strict=True):
        assert (a - b).abs().max() < 1e-3


def test_fused_step_rounds_activations_of_many_tokens_where_asked_for(device):
    model, prompt = in_fp8(tiny(device, **SLIDING), "fp8-dynamic"), [i % 60 for i in range(70)]
    codec = make_codec("plain", torch.float32)
    dense = DynamicCache(model.specs, codec, rows=1, device=device)
    batch = Batch.pack([prompt], [0], device=device)
    expected = model_step(model)(batch, dense.bind(batch))
    bound = paged(model, 1, device).bind(batch, backend="triton")
    # A number that is rounded the other way is six per cent off.
    assert (FusedStep(model)(batch, bound) - expected).abs().max() < 0.1 * expected.abs().max()


def test_models_that_the_kernels_do_not_know_are_refused(device):
    model = tiny(device, model_type="llama", attention_bias=True)
    with pytest.raises(NotSupported, match="without biases"):
        FusedStep(model)


@pytest.mark.parametrize("weights", ["auto", "fp8"])
def test_step_and_model_share_one_memory(weights, device):
    model = in_fp8(tiny(device, **SLIDING), weights)
    before = {name: weight.clone() for name, weight in model.named_parameters()}
    layer, again = FusedStep(model).layers[0], FusedStep(model).layers[0]
    block = model.model.layers[0]
    for matrix, parts in (
        ("qkv", [block.self_attn.q_proj, block.self_attn.k_proj, block.self_attn.v_proj]),
        ("gate_up", [block.mlp.gate_proj, block.mlp.up_proj]),
    ):
        whole, same = (
            m.values if isinstance(m, Fp8Weight) else m
            for m in (getattr(layer, matrix), getattr(again, matrix))
        )
        assert parts[0].weight.data_ptr() == whole.data_ptr() == same.data_ptr()
        assert torch.cat([part.weight.float() for part in parts]).equal(whole.float())
    for name, weight in model.named_parameters():
        assert weight.float().equal(before[name].float())
