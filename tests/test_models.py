"""The packed models compute what transformers computes, and refuse by name what they do not."""

import json
import math
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch

import kvist
from kvist.cache import Batch
from kvist.cache.dense import DynamicCache
from kvist.errors import ConfigError, KvistError, NotSupported
from kvist.models import family_of
from kvist.models.rope import RopeConfig, rope_frequencies
from tiny_models import (
    CHECKPOINTS,
    CONFIG,
    LENGTHS,
    Reference,
    build,
    forward,
    new_cache,
    reference,
    tiny,
    whole_logits,
)

BACKENDS = ("reference", "sdpa")
LOGITS = 1e-3  # absolute; the references' own noise is below 1e-4


@pytest.mark.parametrize("attention", BACKENDS)
@pytest.mark.parametrize("length", LENGTHS)
def test_prompt_logits_equal_transformers(
    checkpoint: Reference, length: int, attention: str
) -> None:
    prompt = checkpoint.tensors[f"p{length}.input_ids"][0].tolist()
    logits = forward(checkpoint.model, new_cache(checkpoint.model), [prompt], attention)
    assert_close(logits, checkpoint.tensors[f"p{length}.logits"][0])


@pytest.mark.parametrize("name", CHECKPOINTS)
def test_transformers_5s_style_of_config_gives_the_same_model(
    name: str, copy_of: Callable[[str], Path]
) -> None:
    directory, known = copy_of(name), reference(name)
    (directory / "config.saved_by_transformers.json").rename(directory / "config.json")
    model = kvist.load(directory)
    assert model.config == known.model.config
    assert_close(whole_logits(model, known.prompts[-1]), known.tensors["p120.logits"][0])


@pytest.mark.parametrize("layout", ["dynamic", "static"])
def test_logits_of_every_decode_step_equal_transformers(checkpoint: Reference, layout: str) -> None:
    """All five sequences at once, ragged, each fed its own reference tokens."""
    cache = new_cache(checkpoint.model, len(LENGTHS), layout)
    expected = [checkpoint.tensors[f"p{n}.greedy_step_logits"][0] for n in LENGTHS]
    ends = torch.tensor(LENGTHS).cumsum(0) - 1
    logits = forward(checkpoint.model, cache, checkpoint.prompts)[ends]
    for step in range(64):
        assert_close(logits, torch.stack([rows[step] for rows in expected]))
        new = [[ids[step]] for ids in checkpoint.greedy]
        logits = forward(checkpoint.model, cache, new)


def test_each_layers_keys_and_values_equal_transformers(checkpoint: Reference) -> None:
    cache = new_cache(checkpoint.model)
    assert isinstance(cache, DynamicCache)
    forward(checkpoint.model, cache, [checkpoint.prompts[3]])
    held = [name for name in checkpoint.tensors if name.startswith("p40.kv.")]
    assert len(held) == 2 * len(checkpoint.model.specs)
    for layer, (keys, values) in enumerate(cache):
        assert keys.shape[2] == values.shape[2] == 40
        for side, ours in (("key", keys), ("value", values)):
            # A sliding layer of transformers keeps the last window - 1 positions only.
            theirs = checkpoint.tensors[f"p40.kv.{layer}.{side}"]
            assert_close(ours[:, :, -theirs.shape[2] :], theirs)


@pytest.mark.parametrize("attention", BACKENDS)
def test_any_chunks_give_the_logits_of_the_whole(checkpoint: Reference, attention: str) -> None:
    prompt, expected = checkpoint.prompts[3], checkpoint.tensors["p40.logits"][0]
    for chunk in (1, 2, 3, 5, 8, 13, 15, 16, 17, 31, 39):
        cache = new_cache(checkpoint.model)
        parts = [prompt[i : i + chunk] for i in range(0, len(prompt), chunk)]
        logits = [forward(checkpoint.model, cache, [part], attention) for part in parts]
        assert_close(torch.cat(logits), expected)


def test_a_ragged_batch_gives_each_sequence_what_it_gets_alone(checkpoint: Reference) -> None:
    for attention in BACKENDS:
        cache = new_cache(checkpoint.model, len(LENGTHS))
        logits = forward(checkpoint.model, cache, checkpoint.prompts, attention)
        for part, length in zip(logits.split(LENGTHS), LENGTHS, strict=True):
            assert_close(part, checkpoint.tensors[f"p{length}.logits"][0])


def test_sequences_may_wait_while_others_go_on() -> None:
    model, cache = tiny(), new_cache(tiny(), rows=2)
    first, second = [3, 1, 4, 1, 5, 9], [2, 7, 1, 8]
    forward(model, cache, [first[:4], []])
    a = forward(model, cache, [first[4:5], second[:3]])
    b = forward(model, cache, [[], second[3:]])
    c = forward(model, cache, [first[5:], []])
    assert_close(torch.cat((a[:1], c)), whole_logits(model, first)[4:])
    assert_close(torch.cat((a[1:], b)), whole_logits(model, second))


def test_masks_follow_the_batch_and_rotation_the_positions_given() -> None:
    """Rotary attention sees distances only, so a shift of all positions changes nothing."""
    model = tiny()
    ids = [3, 1, 4, 1, 5, 9, 2, 6, 5, 3, 5, 8]
    batch = Batch.pack([ids], [0], logits="all")
    with torch.inference_mode():
        hidden = model.lm(
            model.lm.embed(batch.token_ids), batch.positions + 17, new_cache(model).bind(batch)
        )
        assert_close(model.lm.logits(hidden), whole_logits(model, ids))


def test_embeddings_may_take_the_place_of_tokens() -> None:
    model = tiny()
    ids = [3, 1, 4, 1, 5]
    batch = Batch.pack([[0] * 5], [0], logits="all")
    batch = replace(batch, embeddings=model.lm.embed(torch.tensor(ids)))
    from kvist.runner.step import model_step

    with torch.inference_mode():
        logits = model_step(model.lm)(batch, new_cache(model).bind(batch))
    assert_close(logits, whole_logits(model, ids))


@pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
def test_narrow_types_stay_near_float32(dtype: str) -> None:
    known = reference("dense_swa")
    model = kvist.load(known.path, dtype=dtype)
    assert {str(p.dtype) for p in model.lm.parameters()} == {f"torch.{dtype}"}
    expected = known.tensors["p40.logits"][0]
    for attention in BACKENDS:
        logits = forward(model, new_cache(model), [known.prompts[3]], attention)
        assert logits.dtype == torch.float32
        apart = (logits - expected).abs().mean() / expected.std()
        assert apart < (0.05 if dtype == "bfloat16" else 0.01)


def test_a_tied_head_is_the_embedding_itself_and_an_untied_one_is_not() -> None:
    tied, untied = reference("dense_tied").model.lm, reference("dense_untied_headdim").model.lm
    assert tied.lm_head.weight is tied.model.embed_tokens.weight
    assert not torch.equal(untied.lm_head.weight, untied.model.embed_tokens.weight)


# --- configurations


def qwen3(**changes: Any) -> dict[str, Any]:
    config = CONFIG | {"num_hidden_layers": 6} | changes
    return {name: value for name, value in config.items() if value is not ...}


@pytest.mark.parametrize(
    ("changes", "windows"),
    [
        ({"layer_types": ..., "max_window_layers": 4}, (None,) * 4 + (9, 9)),
        ({"layer_types": ..., "max_window_layers": 0}, (9,) * 6),
        ({"layer_types": ...}, (None,) * 6),  # the family's max_window_layers is 28
        (
            {"layer_types": ..., "max_window_layers": 5, "sliding_window": ...},
            (None,) * 5 + (4096,),
        ),
        ({"layer_types": ..., "max_window_layers": 0, "sliding_window": None}, (None,) * 6),
        ({"layer_types": ..., "max_window_layers": 0, "use_sliding_window": False}, (None,) * 6),
        ({"layer_types": ["sliding_attention", "full_attention"] * 3}, (9, None) * 3),
    ],
    ids=str,
)
def test_windows_are_read_as_transformers_reads_them(
    changes: dict[str, Any], windows: tuple[int | None, ...]
) -> None:
    from transformers import Qwen3Config

    config = qwen3(**changes)
    theirs = Qwen3Config(**config)
    kinds = theirs.layer_types or ()
    seen = [theirs.sliding_window if kind == "sliding_attention" else None for kind in kinds]
    assert family_of(config).read(config).windows == windows == tuple(seen)


@pytest.mark.parametrize(
    ("changes", "error", "says"),
    [
        ({"model_type": "gpt_oss"}, NotSupported, "gpt_oss"),
        ({"model_type": ...}, ConfigError, "model_type"),
        ({"hidden_act": "gelu"}, NotSupported, "gelu"),
        ({"partial_rotary_factor": 0.5}, NotSupported, "partial_rotary_factor 0.5"),
        ({"rope_scaling": {"type": "dynamic", "factor": 2.0}}, NotSupported, "dynamic"),
        ({"rope_scaling": {"rope_type": "longrope"}}, NotSupported, "longrope"),
        (
            {"rope_parameters": {"full_attention": {"rope_theta": 1e4}}},
            NotSupported,
            "full_attention",
        ),
        ({"rope_scaling": {"rope_type": "linear"}}, ConfigError, "factor"),
        ({"rope_scaling": {"rope_type": "llama3", "factor": 2.0}}, ConfigError, "low_freq_factor"),
        ({"rope_scaling": "yarn"}, ConfigError, "yarn"),
        ({"layer_types": ["chunked_attention"] * 6}, NotSupported, "chunked_attention"),
        ({"layer_types": ["full_attention"]}, ConfigError, "1 entries"),
        (
            {"layer_types": ["sliding_attention"] * 6, "use_sliding_window": False},
            ConfigError,
            "sliding",
        ),
        ({"quantization_config": {"quant_method": "awq"}}, NotSupported, "awq"),
        ({"head_dim": 7}, ConfigError, "head_dim 7"),
        ({"num_key_value_heads": 3}, ConfigError, "num_key_value_heads 3"),
        ({"vocab_size": 0}, ConfigError, "vocab_size"),
        ({"rms_norm_eps": -1}, ConfigError, "rms_norm_eps"),
        ({"tie_word_embeddings": "false"}, ConfigError, "tie_word_embeddings"),
        ({"eos_token_id": "</s>"}, ConfigError, "eos_token_id"),
    ],
    ids=lambda value: str(value) if isinstance(value, dict) else "",
)
def test_what_is_not_supported_or_makes_no_sense_is_refused_by_name(
    changes: dict[str, Any], error: type[KvistError], says: str
) -> None:
    config = qwen3(layer_types=["full_attention"] * 6) | changes
    config = {name: value for name, value in config.items() if value is not ...}
    with pytest.raises(error, match=says) as caught:
        family_of(config).read(config)
    assert "\n" not in str(caught.value)


JUNK: tuple[Any, ...] = (
    None,
    -1,
    0,
    1.5,
    True,
    "16",
    "",
    [],
    {},
    [None],
    {"a": {}},
    math.nan,
    math.inf,
    2**70,
)


@pytest.mark.parametrize("family", ["qwen3", "llama"])
def test_a_field_that_is_missing_or_junk_gives_one_of_kvists_errors_or_a_model(family: str) -> None:
    scaling = {
        "rope_type": "yarn",
        "factor": 2.0,
        "original_max_position_embeddings": 64,
        "beta_fast": 32.0,
        "beta_slow": 1.0,
        "attention_factor": 1.1,
        "mscale": 1.0,
        "mscale_all_dim": 0.5,
        "truncate": True,
    }
    whole = CONFIG | {
        "model_type": family,
        "rms_norm_eps": 1e-6,
        "rope_theta": 1e4,
        "rope_scaling": scaling,
        "hidden_act": "silu",
        "attention_bias": False,
        "mlp_bias": False,
        "max_window_layers": 1,
        "quantization_config": None,
    }
    without = CONFIG | {"model_type": family, "layer_types": None, "max_window_layers": 1}
    damaged = [whole | {name: junk} for name in whole for junk in JUNK]
    damaged += [{k: v for k, v in whole.items() if k != name} for name in whole]
    damaged += [whole | {"rope_scaling": scaling | {name: j}} for name in scaling for j in JUNK]
    damaged += [without | {name: j} for name in without for j in JUNK]
    built = 0
    for config in damaged:
        try:
            read = family_of(config).read(config)
            if read.num_layers < 10 and max(read.vocab_size, read.hidden_size) < 1000:
                logits = whole_logits(build(config), [1, 0, 0])
                built += logits.shape == (3, read.vocab_size)
        except KvistError:
            continue
        except Exception as error:
            raise AssertionError(f"{type(error).__name__}: {error} from {config}") from error
    assert built > 50


@pytest.mark.parametrize("missing", ["vocab_size", "hidden_size", "num_hidden_layers"])
def test_a_config_that_lacks_a_field_names_it(missing: str, copy_of: Callable[[str], Path]) -> None:
    path = copy_of("dense_tied") / "config.json"
    config = json.loads(path.read_text())
    del config[missing]
    path.write_text(json.dumps(config))
    with pytest.raises(ConfigError, match=missing):
        kvist.load(path.parent)


# --- rotation


@pytest.mark.parametrize(
    ("rope", "parameters"),
    [
        (RopeConfig(16, 1e4), {"rope_type": "default"}),
        (RopeConfig(16, 1e4, "linear", 4.0), {"rope_type": "linear", "factor": 4.0}),
        (
            RopeConfig(64, 5e5, "llama3", 8.0, 8192, 1.0, 4.0),
            {
                "rope_type": "llama3",
                "factor": 8.0,
                "low_freq_factor": 1.0,
                "high_freq_factor": 4.0,
                "original_max_position_embeddings": 8192,
            },
        ),
        (
            RopeConfig(128, 1e6, "yarn", 4.0, 32768, 1.0, 32.0),
            {"rope_type": "yarn", "factor": 4.0, "original_max_position_embeddings": 32768},
        ),
        (
            RopeConfig(128, 1e6, "yarn", 4.0, 32768, 1.0, 32.0, truncate=False),
            {
                "rope_type": "yarn",
                "factor": 4.0,
                "original_max_position_embeddings": 32768,
                "truncate": False,
            },
        ),
    ],
    ids=lambda value: value.kind if isinstance(value, RopeConfig) else "",
)
def test_frequencies_at_real_sizes_equal_transformers(
    rope: RopeConfig, parameters: dict[str, Any]
) -> None:
    from transformers import LlamaConfig
    from transformers.models.llama.modeling_llama import LlamaRotaryEmbedding

    theirs = LlamaRotaryEmbedding(
        LlamaConfig(
            hidden_size=4 * rope.head_dim,
            num_attention_heads=4,
            head_dim=rope.head_dim,
            max_position_embeddings=131072,
            rope_parameters=parameters | {"rope_theta": rope.theta},
        )
    )
    torch.testing.assert_close(rope_frequencies(rope), theirs.inv_freq, rtol=1e-6, atol=0)


def assert_close(ours: torch.Tensor, theirs: torch.Tensor) -> None:
    torch.testing.assert_close(ours, theirs, rtol=0, atol=LOGITS)
