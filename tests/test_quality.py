"""What `kvist quality` reports is what was measured: losses, needles, advice, table and picture."""

import json
from pathlib import Path

import pytest
from typer.testing import CliRunner

import kvist
from kvist.cache import CODECS
from kvist.cli.app import app
from kvist.errors import RequestError
from kvist.reports.needle import find_needles, needle_prompts
from kvist.reports.quality import Sensitivity, advise, measure, sensitivity, windows_of
from tiny_models import FIXTURES

TEXT = "A cache keeps keys and values, so that they are computed once. " * 12


@pytest.fixture
def text(tmp_path: Path) -> Path:
    path = tmp_path / "text.txt"
    path.write_text(TEXT)
    return path


def test_only_whole_windows_are_measured() -> None:
    assert windows_of(range(10), 4) == [[0, 1, 2, 3], [4, 5, 6, 7]]
    assert windows_of(range(10), 4, 1) == [[0, 1, 2, 3]]
    assert [w[0] for w in windows_of(range(40), 4, 3)] == [0, 12, 24]
    assert len(windows_of(range(10), 4, 9)) == 2
    with pytest.raises(RequestError, match="3 tokens, fewer than one window of 4"):
        windows_of(range(3), 4)


def test_the_plain_cache_loses_nothing_and_more_bits_lose_less(model: kvist.Model) -> None:
    windows = windows_of(model.encode(TEXT), 48, 4)
    found = {one.codec: one for one in measure(model, windows, list(CODECS))}
    plain = found["plain"]
    assert plain.perplexity_change == plain.kl == 0
    assert plain.top1 == 1
    assert plain.tokens == 4 * 47
    assert 0 < found["int8"].kl < found["int4"].kl
    assert found["int4"].bytes_per_token < found["int8"].bytes_per_token < plain.bytes_per_token


def test_each_layer_is_measured_alone(model: kvist.Model) -> None:
    windows = windows_of(model.encode(TEXT), 48, 2)
    layers = sensitivity(model, windows, "int4")
    assert [one.layer for one in layers] == list(range(len(model.specs)))
    assert all(one.kl > 0 for one in layers)
    [first] = measure(model, windows, ["plain,0=int4"])
    assert first.kl == pytest.approx(layers[0].kl)


def test_advice_names_the_layers_that_stand_out_and_a_codec_that_works(model: kvist.Model) -> None:
    even = [Sensitivity(layer, 1.0) for layer in range(6)]
    assert "no layer stands out" in advise("int4", even)[0]
    one = [Sensitivity(0, 30.0), *even[1:]]
    [sentence] = advise("int4", one)
    assert "1 layer of 6 causes 86%" in sentence
    setting = sentence.split('codec="')[1].split('"')[0]
    assert setting == "int4,0=int8"
    assert model.codec(setting).name == setting


@pytest.mark.parametrize("depth", [0.0, 0.5, 1.0])
def test_a_needle_lies_where_it_should_in_a_prompt_of_the_asked_length(
    model: kvist.Model, depth: float
) -> None:
    tokenizer = model.require_tokenizer()
    hay = tokenizer.encode("straw ")
    prompts = needle_prompts(model, hay, 160, depth, 3)
    assert len({key for _, key in prompts}) == 3
    for ids, key in prompts:
        assert len(ids) == 160
        written = tokenizer.decode(ids)
        assert written.count(key) == 2
        assert written.endswith("The pass key is")
        before = written.index("The pass key") / len(written)
        assert (before < 0.1) if depth == 0 else (before > 0.2)


def test_a_context_without_room_for_a_needle_says_how_much_it_takes(model: kvist.Model) -> None:
    with pytest.raises(RequestError, match="take at least") as caught:
        needle_prompts(model, [1], 20, 0.5, 1)
    least = int(str(caught.value).rsplit(" ", 1)[1])
    assert needle_prompts(model, [1], least, 0.5, 1)


@pytest.mark.smollm2
def test_a_trained_model_finds_its_needles_in_a_short_text(smollm2: kvist.Model) -> None:
    text = smollm2.encode(TEXT)
    [middle] = find_needles(smollm2, text, ["plain"], [160], depths=[0.5], count=2)
    assert middle.found == middle.asked == 2


def test_the_command_prints_a_table_and_writes_json_and_a_picture(
    text: Path, tmp_path: Path
) -> None:
    pytest.importorskip("matplotlib")
    picture = tmp_path / "quality.png"
    arguments = ["quality", str(FIXTURES / "qwen3" / "dense_tied"), "--text", str(text)]
    arguments += ["--window", "40", "--windows", "2", "--codec", "int8", "--layers", "int4"]
    arguments += ["--needle", "150", "--plot", str(picture)]
    shown = CliRunner().invoke(app, arguments)
    assert shown.exit_code == 0, shown.output
    for words in ("int8", "costliest layers", "pass keys found", "150 tokens", "too few to judge"):
        assert words in shown.output
    assert picture.read_bytes().startswith(b"\x89PNG")

    found = json.loads(CliRunner().invoke(app, [*arguments, "--json"]).stdout)
    assert [one["codec"] for one in found["codecs"]] == ["plain", "int8"]
    assert {one["context"] for one in found["needles"]} == {150}
    assert found["layers"]
    assert found["advice"]


def test_text_that_cannot_be_read_is_named(tmp_path: Path) -> None:
    missing = tmp_path / "nothing.txt"
    model = str(FIXTURES / "qwen3" / "dense_tied")
    result = CliRunner().invoke(app, ["quality", model, "--text", str(missing)])
    assert result.exit_code != 0
    assert "nothing.txt" in str(result.exception or result.output)


def test_rounded_weights_are_held_against_the_models_own(
    model: kvist.Model, text: Path, tmp_path: Path
) -> None:
    arguments = ["quality", model.name, "--text", str(text), "--window", "48", "--windows", "2"]
    both = ["--weights", "fp8", "--weights", "fp8-dynamic"]
    shown = CliRunner().invoke(app, [*arguments, *both])
    assert shown.exit_code == 0, shown.output
    assert "fp8-dynamic" in shown.output
    found = json.loads(CliRunner().invoke(app, [*arguments, *both, "--json"]).output)
    assert [one["codec"] for one in found["codecs"]] == ["plain"]
    fp8, dynamic = found["weights"]
    assert (fp8["weights"], dynamic["weights"]) == ("fp8", "fp8-dynamic")
    assert 0 < fp8["kl"] < dynamic["kl"]
    assert fp8["tokens"] == 2 * 47
