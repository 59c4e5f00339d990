"""The deterministic executor gives the same bits, however the work was cut, batched and stored."""

import random
from dataclasses import replace

import pytest
import torch
from torch import nn

import kvist
from kvist.cache import LAYOUTS
from kvist.models.decoder import GatedMLP
from kvist.reports.verify import verify
from kvist.runner.deterministic import FixedRows
from tiny_models import Reference, build, reference

PARAMS = kvist.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True, logprobs=3)
MOE = {
    "model_type": "qwen3_moe",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "max_position_embeddings": 256,
    "num_experts": 4,
    "num_experts_per_tok": 2,
    "moe_intermediate_size": 24,
    "norm_topk_prob": True,
}


def prompts_of(model: kvist.Model) -> list[list[int]]:
    rng = random.Random(0)
    return [[rng.randrange(model.config.vocab_size) for _ in range(n)] for n in (1, 7, 30, 45)]


def fixed(model: kvist.Model) -> kvist.Model:
    return replace(model, executor="deterministic")


def same_bits(model: kvist.Model, expected: list[kvist.Result], **options: object) -> bool:
    found = kvist.generate(model, prompts_of(model), PARAMS, **options)
    return all(
        (a.token_ids, a.logprobs) == (b.token_ids, b.logprobs)
        for a, b in zip(expected, found, strict=True)
    )


def alone(model: kvist.Model, **options: object) -> list[kvist.Result]:
    return [kvist.generate(model, [p], PARAMS, **options)[0] for p in prompts_of(model)]


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_and_chunk_gives_the_same_bits(checkpoint: Reference, layout: str) -> None:
    model = fixed(checkpoint.model)
    expected = alone(model)
    assert same_bits(model, expected, cache=layout)
    assert same_bits(model, expected, cache=layout, chunk=7)
    assert same_bits(model, alone(model, codec="int4"), cache=layout, codec="int4", chunk=5)


def test_no_cache_at_all_gives_the_same_bits(checkpoint: Reference) -> None:
    model = fixed(checkpoint.model)
    assert same_bits(model, alone(model), use_cache=False)


def test_a_mixture_of_experts_gives_the_same_bits() -> None:
    model = fixed(build(MOE, seed=1))
    assert same_bits(model, alone(model), chunk=3)


def test_its_tokens_are_the_references(checkpoint: Reference) -> None:
    greedy = kvist.SamplingParams(temperature=0, max_tokens=24, ignore_eos=True)
    found = kvist.generate(fixed(checkpoint.model), checkpoint.prompts, greedy)
    assert [result.token_ids for result in found] == [ids[:24] for ids in checkpoint.greedy]


def test_every_way_that_verify_knows_gives_the_same_bits() -> None:
    checks = list(verify(fixed(reference("dense_swa").model), new_tokens=4, codecs=["int8"]))
    assert len(checks) > 20
    assert {check.max_delta for check in checks} == {0.0}
    assert all(check.passed for check in checks)


def test_one_bit_of_difference_fails_where_equal_bits_are_promised(checkpoint: Reference) -> None:
    first, *_ = verify(fixed(checkpoint.model), new_tokens=2, codecs=[])
    assert first.exact
    assert first.passed
    assert not replace(first, max_delta=1e-9).passed
    assert replace(first, max_delta=1e-9, exact=False).passed


def test_parts_of_another_size_are_padded_and_cut() -> None:
    torch.manual_seed(0)
    module = nn.Linear(5, 3)
    for count in (0, 1, 4, 6):
        x = torch.randn(count, 5)
        torch.testing.assert_close(FixedRows(module, 4)(x), module(x))
    heads = torch.randn(3, 2, 5)
    torch.testing.assert_close(FixedRows(module, 4)(heads), module(heads))


def test_the_weights_are_shared_and_the_model_stays_as_it_was(model: kvist.Model) -> None:
    from kvist.runner.deterministic import deterministic_copy

    before = [type(module) for module in model.lm.modules()]
    made = deterministic_copy(model.lm)
    assert [type(module) for module in model.lm.modules()] == before
    ours = {p.data_ptr() for p in model.lm.parameters()}
    assert {p.data_ptr() for p in made.parameters()} == ours
    assert not any(
        isinstance(child, nn.Linear | GatedMLP)
        for module in made.modules()
        if not isinstance(module, FixedRows | GatedMLP)
        for child in module.children()
    )
