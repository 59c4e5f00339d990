"""Which executor computes a model's steps, and what happens where it cannot."""

import logging
from pathlib import Path

import pytest
import torch
from quantised_models import LLAMA, write_gguf

import kvist
from kvist.cache.groups import bytes_per_token, group_layers
from kvist.errors import ConfigError, NotSupported
from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.gguf import GGUFCheckpoint
from kvist.reports.plan import plan_model
from kvist.runner.executors import choose_step
from tiny_models import tiny

PARAMS = kvist.SamplingParams(temperature=0, max_tokens=6, ignore_eos=True)


@pytest.fixture
def gguf(tmp_path: Path) -> Path:
    return write_gguf(tmp_path / "llama.gguf", LLAMA, "Q4_1")


def test_an_unknown_executor_is_named(gguf: Path) -> None:
    with pytest.raises(ConfigError, match="'magic'; there are: auto, reference"):
        choose_step("magic", tiny())
    with pytest.raises(ConfigError, match="'magic'"):
        kvist.load(gguf, executor="magic")


def test_a_model_in_floats_is_its_own_executor() -> None:
    model = tiny()
    assert model.native is None
    with pytest.raises(NotSupported, match="not loaded for native code"):
        choose_step("native", model)


def test_quantised_weights_stay_in_the_file_until_somebody_wants_floats(gguf: Path) -> None:
    model = kvist.load(gguf, device="cpu")
    assert model.native is not None
    kvist.generate(model, [[1, 2, 3]], PARAMS)
    assert all(weight.is_meta for weight in model.decoder.parameters())
    assert not any(weight.is_meta for weight in model.lm.parameters())
    exact = kvist.load(gguf, executor="reference")
    assert exact.native is None
    for a, b in zip(model.lm.parameters(), exact.lm.parameters(), strict=True):
        assert torch.equal(a, b)


def test_a_cache_that_it_cannot_read_is_computed_by_the_models_forward(
    gguf: Path, caplog: pytest.LogCaptureFixture
) -> None:
    model, exact = (kvist.load(gguf, executor=e, device="cpu") for e in ("auto", "reference"))
    with caplog.at_level(logging.WARNING, "kvist"):
        [found] = kvist.generate(model, [[1, 2, 3]], PARAMS, codec="fp8")
    [expected] = kvist.generate(exact, [[1, 2, 3]], PARAMS, codec="fp8")
    assert found.token_ids == expected.token_ids
    [record] = caplog.records  # once, however many steps there were
    assert "codec 'fp8'" in record.message
    assert record.message.endswith("; running the model's own forward")


def test_native_by_name_refuses_what_it_cannot_run(gguf: Path) -> None:
    with pytest.raises(NotSupported, match="bfloat16"):
        kvist.load(gguf, "bfloat16", "cpu", executor="native")
    model = kvist.load(gguf, device="cpu", executor="native")
    with pytest.raises(NotSupported, match="fp8"):
        kvist.generate(model, [[1, 2, 3]], PARAMS, codec="fp8")


def test_the_engine_and_the_loop_choose_alike(gguf: Path) -> None:
    model = kvist.load(gguf, device="cpu")
    [alone] = kvist.generate(model, [[5, 3, 9, 11]], PARAMS)
    [served] = kvist.LLM(model).generate([[5, 3, 9, 11]], PARAMS)
    assert served.token_ids == alone.token_ids


def test_rounded_activations_have_a_fingerprint_of_their_own(gguf: Path) -> None:
    one, again = (kvist.load(gguf, device="cpu").fingerprint for _ in range(2))
    assert one == again
    assert one != kvist.load(gguf, device="cpu", executor="reference").fingerprint


def test_a_plan_counts_what_native_code_keeps(gguf: Path) -> None:
    found, _ = plan_model(str(gguf), context=128, device="cpu")
    model = kvist.load(gguf, device="cpu")
    assert model.native is not None
    assert found.setting.packed
    assert found.setting.cache_dtype == model.native.packed.cache_dtype
    held = [bytes_per_token(g, model.codec("plain")) for g in group_layers(model.specs)]
    assert found.chosen.bytes_per_token == sum(held)
    checkpoint = open_checkpoint(gguf)
    assert isinstance(checkpoint, GGUFCheckpoint)
    in_file = sum(
        matrix.data.nbytes
        for name in checkpoint.names()
        if (matrix := checkpoint.quantized(name)) is not None
    )
    filling = 15 * LLAMA.hidden // 32 * 20  # rows that make the head's a multiple of 16
    assert in_file <= found.need.weights <= in_file + filling
    assert all("bfloat16" not in line for line in found.advice)


def test_a_plan_for_another_dtype_counts_floats(gguf: Path) -> None:
    found, _ = plan_model(str(gguf), context=128, device="cpu", dtype="bfloat16")
    assert not found.setting.packed
    assert found.setting.cache_dtype is None
