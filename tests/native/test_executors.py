"""Which executor computes a model's steps, and what happens where it cannot."""

import logging
from pathlib import Path

import pytest
import torch
from quantised_models import LLAMA, write_gguf

import kvist
from kvist.errors import ConfigError, NotSupported
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
