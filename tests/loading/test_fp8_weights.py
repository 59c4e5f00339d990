"""Weights that are rounded to fp8 while they are read: which, how far, and what refuses them."""

from dataclasses import replace
from pathlib import Path

import pytest
import torch

import kvist
from kvist.errors import ConfigError, NotSupported
from kvist.kernels.fp8 import Fp8Weight, dequantize, linear, quantize
from kvist.models.fp8 import Fp8Linear
from kvist.reports.quality import weight_bytes

NANOVLM = Path(__file__).parents[1] / "fixtures" / "nanovlm" / "vlm_tied"
GREEDY = kvist.SamplingParams(temperature=0, max_tokens=8, ignore_eos=True)


def kept_in_fp8(model: kvist.Model) -> set[str]:
    return {
        name.rpartition(".")[2]
        for name, module in model.lm.named_modules()
        if isinstance(module, Fp8Linear)
    }


def test_a_row_comes_back_within_a_sixteenth_of_each_number() -> None:
    torch.manual_seed(0)
    rows = torch.randn(32, 96) * torch.logspace(-4, 4, 32)[:, None]
    values, scale = quantize(rows)
    error = (dequantize(values, scale, torch.float32) - rows).abs()
    least = rows.abs().amax(-1, keepdim=True) / 448 / 64  # below it fp8 is evenly spaced
    assert (error <= torch.maximum(rows.abs() / 16, least)).all()
    assert (values.float().abs().amax(-1) == 448).all()


def test_a_row_of_zeros_stays_zeros() -> None:
    values, scale = quantize(torch.zeros(2, 16))
    assert not dequantize(values, scale, torch.float32).any()


def test_activations_are_rounded_only_where_that_was_asked_for() -> None:
    torch.manual_seed(0)
    x, w = torch.randn(5, 64), quantize(torch.randn(8, 64))
    whole = x @ dequantize(*w, torch.float32).T
    rounded = dequantize(*quantize(x), torch.float32) @ dequantize(*w, torch.float32).T
    torch.testing.assert_close(linear(x, Fp8Weight(*w)), whole)
    torch.testing.assert_close(linear(x, Fp8Weight(*w, rounds_activations=True)), rounded)
    assert (whole - rounded).abs().max() > 0.01


def test_projections_alone_are_rounded(fixtures: Path) -> None:
    model, own = (kvist.load(fixtures / "dense_tied", weights=w) for w in ("fp8", "auto"))
    assert kept_in_fp8(model) == {
        *("q_proj", "k_proj", "v_proj", "o_proj"),
        *("gate_proj", "up_proj", "down_proj"),
    }
    theirs = dict(own.lm.named_parameters())
    for name, weight in model.lm.named_parameters():
        if weight.dtype == torch.float8_e4m3fn:
            assert torch.equal(weight.float(), quantize(theirs[name])[0].float())
        else:
            assert torch.equal(weight, theirs[name])
    assert model.weights == "fp8"
    assert weight_bytes(model) < weight_bytes(own)


@pytest.mark.parametrize("weights", ["fp8", "fp8-dynamic"])
def test_loop_and_engine_give_the_same_tokens(weights: str, fixtures: Path) -> None:
    model = kvist.load(fixtures / "dense_swa", weights=weights)
    prompts = [[5, 9, 2, 7], list(range(3, 40))]
    loop = [kvist.generate(model, [prompt], GREEDY)[0].token_ids for prompt in prompts]
    engine = kvist.LLM(model, cache_memory=1 << 20).generate(prompts, GREEDY)
    assert [result.token_ids for result in engine] == loop


def test_equal_bits_are_kept_with_rounded_weights(fixtures: Path) -> None:
    model = kvist.load(fixtures / "dense_tied", weights="fp8", executor="deterministic")
    prompts = [[5, 9, 2, 7], list(range(3, 40))]
    params = replace(GREEDY, logprobs=2)
    alone = [kvist.generate(model, [prompt], params)[0].logprobs for prompt in prompts]
    assert [r.logprobs for r in kvist.generate(model, prompts, params)] == alone


def test_a_vision_language_models_language_is_rounded() -> None:
    model = kvist.load(NANOVLM, weights="fp8")
    assert kept_in_fp8(model)
    assert model.vision is not None
    tower = [n for n, _ in model.vision.named_parameters() if not n.startswith("language.")]
    assert all(model.vision.get_parameter(n).dtype == torch.float32 for n in tower)


def test_caches_of_rounded_weights_are_told_apart(fixtures: Path) -> None:
    names = ("auto", "fp8", "fp8-dynamic")
    prints = {kvist.load(fixtures / "dense_tied", weights=name).fingerprint for name in names}
    assert len(prints) == 3


def test_what_cannot_be_rounded_is_refused_with_a_remedy(fixtures: Path, tiny_gguf: Path) -> None:
    with pytest.raises(NotSupported, match=r"tiny\.gguf: weights='fp8' .* weights='auto'"):
        kvist.load(tiny_gguf, weights="fp8")
    with pytest.raises(NotSupported, match="native code knows no weights='fp8'"):
        kvist.load(fixtures / "dense_tied", weights="fp8", executor="native")
    with pytest.raises(ConfigError, match="no weights 'int3'; there are: auto, fp8, fp8-dynamic"):
        kvist.load(fixtures / "dense_tied", weights="int3")
