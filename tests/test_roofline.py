"""The roofline: what a step must do is counted, the machine measured, the verdict a sentence."""

import json

import pytest
import torch
from typer.testing import CliRunner

from kvist.cli.app import app
from kvist.errors import NotSupported, RequestError
from kvist.loading.checkpoint import random_weights
from kvist.loading.model import Model
from kvist.models import family_of
from kvist.models.fp8 import use_fp8
from kvist.reports.roofline import Point, Work, count, measure, multiply_rate, read_rate

CONFIG = {
    "model_type": "qwen3",
    "vocab_size": 64,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 16,
    "max_position_embeddings": 256,
    "num_hidden_layers": 2,
}


def tiny(weights: str = "auto", **changes: object) -> Model:
    config = CONFIG | changes
    family = family_of(config)
    lm = family.build(family.read(config)).eval().requires_grad_(False)
    use_fp8(lm, weights)
    random_weights(lm, dtype=torch.float32, device="cpu")  # `build` leaves memory as it finds it
    return Model("tiny", lm, None, torch.float32, torch.device("cpu"))


def test_a_decode_step_reads_all_weights_and_all_of_the_cache():
    work = count(tiny(), codec="plain", tokens=[1, 1], contexts=[10, 20], logits=2)
    matrices = 2 * (32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48)
    norms = 2 * (2 * 32 + 2 * 16) + 32
    assert work.weights == 4 * (matrices + norms + 64 * 32)
    per_token = 2 * 2 * 2 * 16 * 4  # layers, sides, heads, channels, bytes
    assert work.cache == per_token * (10 + 20 + 2 + 2)
    attention = 4 * 2 * 4 * 16 * (11 + 21)
    assert work.operations == 2 * 2 * (matrices + norms) + 2 * 2 * 64 * 32 + attention


def test_projections_in_fp8_are_a_byte_for_each_weight():
    full, small = (
        count(tiny(weights), codec="plain", tokens=[1], contexts=[4], logits=1)
        for weights in ("auto", "fp8")
    )
    assert full.weights - small.weights == 3 * 2 * (32 * (64 + 32 + 32) + 64 * 32 + 3 * 32 * 48)
    assert full.operations == small.operations


def test_tied_weights_are_read_once():
    tied = count(tiny(tie_word_embeddings=True), codec="plain", tokens=[1], contexts=[4], logits=1)
    apart = count(tiny(), codec="plain", tokens=[1], contexts=[4], logits=1)
    assert tied == apart


def test_a_compressed_cache_is_fewer_bytes():
    full, small = (
        count(tiny(), codec=codec, tokens=[1], contexts=[99], logits=1)
        for codec in ("plain", "fp8")
    )
    assert small.cache < full.cache / 3
    assert small.weights == full.weights


def test_mixtures_of_experts_are_refused():
    model = tiny(model_type="qwen3_moe", num_experts=4, num_experts_per_tok=2,
                 moe_intermediate_size=16)  # fmt: skip
    with pytest.raises(NotSupported, match="dense decoders"):
        count(model, codec="plain", tokens=[1], contexts=[0], logits=1)


def test_the_larger_term_bounds_the_step():
    few = Point("Decode", 1, 2.0, Work(1000, 0, 1000), bandwidth=1000.0, rate=1e6)
    assert (few.bound, few.reached) == ("memory", 0.5)
    many = Point("Prefill", 1, 2.0, Work(1000, 0, 10**6), bandwidth=1e6, rate=1e6)
    assert (many.bound, many.reached) == ("arithmetic", 0.5)
    slow = Point("Decode", 1, 100.0, Work(1000, 0, 1000), bandwidth=1000.0, rate=1e6)
    assert "goes elsewhere" in slow.verdict
    assert "goes elsewhere" not in few.verdict


def test_the_machine_reads_and_multiplies_at_some_rate():
    cpu = torch.device("cpu")
    assert 1e8 < read_rate(cpu, 1 << 24) < 1e13
    rate, kind = multiply_rate(cpu, torch.float32)
    assert kind == "float32"
    assert 1e8 < rate < 1e15


def test_measured_steps_are_named_and_bounded():
    found = measure(tiny(), prompt=24, new_tokens=4, batches=(1, 3))
    assert [p.name for p in found.points] == [
        "Prefill of 24 tokens", "Decode of a sequence at 26 tokens",
        "Decode of 3 sequences at 27 tokens",
    ]  # fmt: skip
    assert all(p.seconds > 0 and p.bound in ("memory", "arithmetic") for p in found.points)
    assert json.loads(json.dumps(found.as_json()))["points"][1]["verdict"].endswith(".")


def test_prompts_that_do_not_fit_are_refused():
    with pytest.raises(RequestError, match="limit is 256"):
        measure(tiny(), prompt=300)


def test_the_command_prints_json_and_draws(tmp_path):
    pytest.importorskip("matplotlib")
    (tmp_path / "config.json").write_text(json.dumps(CONFIG))
    picture = tmp_path / "roofline.png"
    result = CliRunner().invoke(
        app,
        ["roofline", str(tmp_path), "--dummy", "--prompt", "16", "--tokens", "3", "--batch", "2",
         "--json", "--plot", str(picture), "--device", "cpu"],
    )  # fmt: skip
    assert result.exit_code == 0, result.output
    assert json.loads(result.stdout)["points"][0]["bound"] in ("memory", "arithmetic")
    assert picture.read_bytes()[1:4] == b"PNG"
