"""The plan, made from the configuration alone, agrees with what is allocated."""

import json
import weakref
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from torch.overrides import TorchFunctionMode
from typer.testing import CliRunner

import kvist
from kvist.cache import CODECS, Batch, make_cache
from kvist.cli.app import app
from kvist.core.tables import CacheGroup
from kvist.errors import CacheError, KvistError, RequestError
from kvist.loading.model import Model
from kvist.models.fp8 import Fp8Linear
from kvist.reports.fit import Setting, fits, need, request_bytes
from kvist.reports.plan import Plan, plan, plan_model
from kvist.reports.sizes import bytes_text, parse_bytes, parse_tokens
from kvist.runner.step import model_step
from tiny_models import CONFIG, FIXTURES, build, reference

WITHIN = 0.03
MODELS = ("dense_tied", "dense_swa", "dense_untied_headdim")

# Qwen3-0.6B, as its config.json has it.
QWEN3: dict[str, Any] = {
    "model_type": "qwen3",
    "vocab_size": 151936,
    "hidden_size": 1024,
    "intermediate_size": 3072,
    "num_hidden_layers": 28,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "max_position_embeddings": 40960,
    "tie_word_embeddings": True,
    "torch_dtype": "bfloat16",
}
GIB = 2**30


@pytest.fixture
def config_alone(tmp_path: Path) -> Path:
    """A directory with a config.json and nothing else."""
    (tmp_path / "config.json").write_text(json.dumps(QWEN3))
    return tmp_path


def setting_of(model: Model, codec: str, layout: str, context: int) -> Setting:
    return Setting(model.config, model.specs, 0, model.dtype, codec, layout, context)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", MODELS)
def test_a_static_cache_takes_what_was_planned(name: str, codec: str) -> None:
    model = reference(name).model
    cache = make_cache(
        model.specs, layout="static", codec=codec, rows=3, max_length=500, dtype=model.dtype
    )
    planned = 3 * request_bytes(setting_of(model, codec, "static", 500))
    assert planned == pytest.approx(cache.nbytes, rel=WITHIN)


@pytest.mark.parametrize("codec", CODECS)
def test_rings_take_what_was_planned(codec: str) -> None:
    model = reference("dense_swa").model
    retention = kvist.SlidingWindow(100, sinks=4)  # a ring for every layer, of two sizes
    cache = make_cache(
        model.specs, layout="ring", codec=codec, retention=retention, max_length=900,
        dtype=model.dtype,
    )  # fmt: skip
    batch = Batch.pack([[1] * 50], cache.lengths)
    cache.bind(batch)  # takes the room
    setting = setting_of(model, codec, "ring", 900)
    kept = tuple(retention.apply(spec) for spec in model.config.specs)
    planned = request_bytes(replace(setting, specs=kept))
    assert planned == pytest.approx(cache.nbytes, rel=WITHIN)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("name", MODELS)
def test_an_engine_that_gets_what_was_planned_has_room_for_the_requests(
    name: str, codec: str
) -> None:
    model = reference(name).model
    setting = replace(setting_of(model, codec, "paged", 1024), chunk=64)
    memory = need(replace(setting, concurrency=40)).cache
    llm = kvist.LLM(model, codec=codec, cache_memory=memory, max_batch_tokens=64)
    pool = llm.engine.pool
    assert memory == pytest.approx(pool.nbytes, rel=WITHIN)
    for group, blocks in zip(pool.groups, pool.pools, strict=True):
        most = CacheGroup(group.spec, 2).most_blocks(1024, 64, 1, 16)
        assert blocks.num_blocks == pytest.approx(40 * most, rel=WITHIN)


@pytest.mark.parametrize("weights", ["auto", "fp8"])
@pytest.mark.parametrize("name", [*(f"qwen3/{name}" for name in MODELS), "nanovlm/vlm_tied"])
def test_weights_take_what_was_planned(name: str, weights: str) -> None:
    path = FIXTURES / name
    for dtype in ("float32", "bfloat16"):
        model = kvist.load(path, dtype, weights=weights)
        whole = model.vision or model.lm
        scales = [m.scale for m in whole.modules() if isinstance(m, Fp8Linear)]
        allocated = sum(tensor.nbytes for tensor in (*whole.parameters(), *scales))
        made, _ = plan_model(str(path), dtype=dtype, weights=weights, memory=GIB)
        assert made.need.weights == allocated


class PeakBytes(TorchFunctionMode):
    """The most bytes that the results of torch's functions held at a time."""

    def __init__(self) -> None:
        super().__init__()
        self.live = self.peak = 0
        self._held: dict[int, int] = {}

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        out = func(*args, **(kwargs or {}))
        # A result may be a view of what was given.
        given = {
            _storage(x)._cdata for x in (*args, *(kwargs or {}).values()) if torch.is_tensor(x)
        }
        for x in out if isinstance(out, tuple) else (out,):
            if torch.is_tensor(x) and (key := _storage(x)._cdata) not in given | self._held.keys():
                self._held[key] = _storage(x).nbytes()
                self.live += self._held[key]
                self.peak = max(self.peak, self.live)
                weakref.finalize(_storage(x), self._free, key)
        return out

    def _free(self, key: int) -> None:
        self.live -= self._held.pop(key, 0)


def _storage(x: torch.Tensor) -> Any:
    return x.untyped_storage()


@pytest.mark.parametrize(
    "shape",
    [
        {"intermediate_size": 512},
        {"num_attention_heads": 16, "num_key_value_heads": 1},
        {"num_attention_heads": 8, "num_key_value_heads": 8},
    ],
)
@torch.inference_mode()
def test_activations_are_estimated_from_above_and_not_by_much(shape: dict[str, int]) -> None:
    model = build(CONFIG | {"head_dim": 32} | shape)
    cache = make_cache(model.specs, layout="static", max_length=256, dtype=model.dtype)
    batch = Batch.pack([[1] * 256], cache.lengths)
    bound = cache.bind(batch)
    with PeakBytes() as measured:
        model_step(model.lm)(batch, bound)
    estimate = need(setting_of(model, "plain", "static", 256)).activations
    assert measured.peak * 0.97 < estimate < measured.peak * 1.3


def planned(memory: int, **given: Any) -> Plan:
    model = reference("dense_tied").model
    asked = {"context": 1024, "weight_bytes": 2**20, "dtype": torch.float32} | given
    return plan(model.config, model.specs, memory=memory, **asked)


@given(memory=st.integers(1, 2**27), context=st.integers(1, 1024), requests=st.integers(1, 40))
def test_what_is_said_to_fit_fits_and_one_more_does_not(
    memory: int, context: int, requests: int
) -> None:
    made = planned(memory, context=context, concurrency=requests)
    for fit in made.codecs:
        setting = replace(made.setting, codec=fit.codec)
        for most, at in (
            (fit.requests, lambda n, s=setting: replace(s, concurrency=n)),
            (fit.longest, lambda n, s=setting: replace(s, context=n)),
        ):
            assert most == 0 or fits(at(most), memory)
            limit = 1024 if at(1).context == 1 else 2**27
            assert most == limit or not fits(at(most + 1), memory)
    assert made.fits == (made.chosen.requests >= requests) == (made.chosen.longest >= context)


def test_more_memory_never_fits_less() -> None:
    plans = [planned(memory << 20) for memory in (1, 2, 3, 5, 8, 13, 21)]
    assert [p.chosen.tokens for p in plans] == sorted(p.chosen.tokens for p in plans)
    assert [p.chosen.requests for p in plans] == sorted(p.chosen.requests for p in plans)


def test_what_fits_says_how_much_more_would() -> None:
    made = planned(GIB)
    fit = made.chosen
    assert made.fits
    assert made.advice[1] == f"There is room for {fit.requests:,} requests of 1,024 tokens."


def test_what_does_not_fit_says_what_would() -> None:
    made = planned(6 * 2**20, concurrency=12)
    assert not made.fits
    assert made.advice[0].startswith("It does not fit: ")
    assert f"with {made.chosen.requests} requests at a time" in made.advice[1]
    assert f"with a context of {made.chosen.longest:,} tokens" in made.advice[1]
    assert made.advice[1].endswith(f"with {bytes_text(made.need.total)} of memory.")


def test_where_no_single_change_helps_all_of_them_are_named_together() -> None:
    model = reference("dense_tied").model
    made = planned(2 * 2**20, concurrency=8, weight_bytes=2 * 2**20 + 1)
    assert model.dtype == torch.float32
    assert "in bfloat16" in made.advice[1]
    assert "one request of" in made.advice[1]


def test_a_window_frees_what_is_behind_it_where_the_layout_does() -> None:
    model = reference("dense_swa").model
    sizes = {
        layout: request_bytes(replace(setting_of(model, "plain", layout, 1024), chunk=32))
        for layout in ("static", "paged")
    }
    # Half of the layers hold a window of 16 tokens and two chunks, in blocks that it may cut.
    assert sizes["paged"] == sizes["static"] * (1024 + 96) // 2048


def test_a_plan_reads_a_configuration_alone(config_alone: Path) -> None:
    made, _ = plan_model(str(config_alone), memory=24 * GIB, dtype="bfloat16", context=32768)
    assert made.need.weights == 596_049_920 * 2
    plain = made.codecs[0]
    assert plain.bytes_per_token == 28 * 2 * 8 * 128 * 2
    assert plain.request_bytes == 32768 * plain.bytes_per_token
    assert made.fits


def test_without_a_memory_most_of_what_is_free_is_planned_with(config_alone: Path) -> None:
    made, place = plan_model(str(config_alone), device="cpu")
    assert 0 < made.memory < 2**50
    assert place == "90% of what is free here (cpu)"
    assert made.setting.dtype == torch.float32


@pytest.mark.parametrize(
    ("given", "error"),
    [
        ({"context": 100_000}, RequestError),
        ({"concurrency": 0}, RequestError),
        ({"codec": "int3"}, CacheError),
        ({"layout": "heap"}, CacheError),
    ],
)
def test_what_makes_no_sense_is_refused(
    config_alone: Path, given: dict[str, Any], error: type[KvistError]
) -> None:
    with pytest.raises(error):
        plan_model(str(config_alone), memory=GIB, **given)


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("24GiB", 24 * GIB),
        ("512MB", 512_000_000),
        ("1.5 gib", 3 * GIB // 2),
        ("8G", 8 * GIB),
        ("1,000,000", 1_000_000),
        ("4096", 4096),
    ],
)
def test_sizes_are_read_as_people_write_them(text: str, value: int) -> None:
    assert parse_bytes(text) == value


@pytest.mark.parametrize(("text", "value"), [("32k", 32768), ("4096", 4096), ("1m", 2**20)])
def test_tokens_are_counted_in_units_of_1024(text: str, value: int) -> None:
    assert parse_tokens(text) == value


@pytest.mark.parametrize("parse", [parse_bytes, parse_tokens])
@pytest.mark.parametrize("text", ["", "many", "-1", "0", "12parsecs", "1..5k", "nan"])
def test_what_is_no_size_is_refused_with_an_example(parse: Callable[[str], int], text: str) -> None:
    with pytest.raises(RequestError, match=r"such as"):
        parse(text)


def test_sizes_are_written_in_three_digits() -> None:
    sizes = (12, 1023, 1536, 360 * 2**20, 24 * GIB, 2**41)
    assert [bytes_text(n) for n in sizes] == [
        "12 B",
        "1.00 KiB",
        "1.50 KiB",
        "360 MiB",
        "24.0 GiB",
        "2.00 TiB",
    ]


def run(*arguments: str) -> str:
    result = CliRunner().invoke(app, ["plan", *arguments], env={"COLUMNS": "80"})
    assert result.exit_code == 0, result.exception
    return result.output


def test_the_command_shows_sums_codecs_and_advice(config_alone: Path) -> None:
    out = run(
        str(config_alone), "--memory", "4GiB", "--context", "32k", "--concurrency", "8",
        "--dtype", "bfloat16",
    )  # fmt: skip
    lines = out.splitlines()
    assert max(map(len, lines)) <= 80
    assert "1.11 GiB  596,049,920 parameters" in out
    assert "8 requests of 32,768 tokens, plain" in out
    assert [line.split()[0] for line in lines if line.split()[:1] == ["plain"]] == ["plain"]
    assert all(any(line.startswith(codec) for line in lines) for codec in CODECS)
    assert "It does not fit" in out


def test_the_command_says_what_is_in_fp8(config_alone: Path) -> None:
    arguments = ["plan", str(config_alone), "--memory", "2GiB", "--weights", "fp8"]
    result = CliRunner().invoke(app, arguments)
    assert result.exit_code == 0, result.output
    assert "of them in fp8" in result.output
    refused = CliRunner().invoke(app, [*arguments[:-1], "fp7"])
    assert "there are: auto, fp8, fp8-dynamic" in str(refused.exception)


def test_the_command_gives_json(config_alone: Path) -> None:
    found = json.loads(run(str(config_alone), "--memory", "24GiB", "--context", "1k", "--json"))
    assert found["fits"] is True
    assert found["memory_bytes"] == 24 * GIB
    assert [fit["codec"] for fit in found["codecs"]] == list(CODECS)
    assert found["context"] == 1024
    assert "hidden" in found["activation_formula"]


def test_a_window_can_be_planned_with(config_alone: Path) -> None:
    options = (str(config_alone), "--memory", "24GiB", "--context", "32k", "--json")
    whole, within = (
        json.loads(run(*options, *rest))["codecs"][0]
        for rest in ((), ("--window", "1024", "--sinks", "4"))
    )
    assert within["bytes_per_token"] == whole["bytes_per_token"]
    # The window, two chunks of 2,048 tokens, the sinks' block and the one that the window cuts.
    assert within["request_bytes"] == whole["request_bytes"] * (1024 + 4096 + 32) // 32768
    assert within["longest"] == 40960


@pytest.mark.smollm2
def test_smollm2_takes_what_was_planned(smollm2: Model) -> None:
    made, _ = plan_model("smollm2-135m", memory=GIB, dtype="bfloat16")
    numbers = sum(parameter.numel() for parameter in smollm2.lm.parameters())
    assert made.need.weights == pytest.approx(2 * numbers, rel=WITHIN)
    assert made.chosen.bytes_per_token == 30 * 2 * 3 * 64 * 2
