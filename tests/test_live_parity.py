"""kvist equals transformers on random small models, whatever their configuration.

Each is built, given random weights and saved by transformers, then loaded by kvist, its config.json
in the style of transformers 4 or 5. Greedy tokens follow the rule of exactness: where two sums in
different orders give different tokens, the reference's margin must be within the difference of the
logits, and that may happen once in a thousand tokens.
"""

import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any

import pytest
import torch
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st
from torch import Tensor

import kvist
from kvist import SamplingParams
from tiny_models import forward, new_cache, whole_logits

transformers = pytest.importorskip("transformers")

NEW = 8


@dataclass
class Tally:
    """Tokens compared and ties among them, over all examples."""

    tokens: int = 0
    ties: int = 0


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    transformers.logging.set_verbosity_error()
    transformers.logging.disable_progress_bar()
    counted = Tally()
    yield counted
    assert counted.ties <= max(1, counted.tokens / 1000)


@st.composite
def ropes(draw: st.DrawFn) -> dict[str, Any]:
    kind = draw(st.sampled_from(["default", "default", "linear", "llama3", "yarn"]))
    rope: dict[str, Any] = {"rope_type": kind, "rope_theta": draw(st.sampled_from([1e2, 1e4, 1e6]))}
    if kind != "default":
        rope["factor"] = draw(st.sampled_from([2.0, 4.0, 8.5]))
    if kind in ("llama3", "yarn"):
        rope["original_max_position_embeddings"] = draw(st.sampled_from([8, 16, 64]))
    if kind == "llama3":
        rope["low_freq_factor"], rope["high_freq_factor"] = 1.0, draw(st.sampled_from([2.0, 4.0]))
    if kind == "yarn":
        optional = {
            "beta_fast": 16.0,
            "beta_slow": 2.0,
            "attention_factor": 1.3,
            "truncate": False,
        }
        chosen = draw(st.sets(st.sampled_from(sorted(optional))))
        rope |= {name: optional[name] for name in chosen}
        if draw(st.booleans()):
            rope |= {"mscale": 1.5, "mscale_all_dim": 0.8}
    return rope


@st.composite
def configs(draw: st.DrawFn) -> dict[str, Any]:
    family = draw(st.sampled_from(["qwen3", "qwen3_moe", "llama"]))
    kv_heads, layers = draw(st.integers(1, 3)), draw(st.integers(1, 4))
    heads = kv_heads * draw(st.integers(1, 3))
    config: dict[str, Any] = {
        "model_type": family,
        "vocab_size": 97,
        "hidden_size": heads * draw(st.sampled_from([4, 6, 10])),
        "intermediate_size": draw(st.sampled_from([16, 33])),
        "num_hidden_layers": layers,
        "num_attention_heads": heads,
        "num_key_value_heads": kv_heads,
        "head_dim": draw(st.sampled_from([2, 6, 8, 16])),
        "max_position_embeddings": 128,
        "rms_norm_eps": draw(st.sampled_from([1e-6, 1e-5, 0.1])),
        "tie_word_embeddings": draw(st.booleans()),
        "attention_bias": draw(st.booleans()),
        "rope_parameters": draw(ropes()),
        "eos_token_id": None,
        "bos_token_id": None,
    }
    if family == "llama":
        config["mlp_bias"] = draw(st.booleans())
    else:
        config["use_sliding_window"] = draw(st.booleans())
        config["sliding_window"] = draw(st.integers(2, 12))
        if draw(st.booleans()):
            kinds = ["full_attention"]
            kinds += ["sliding_attention"] if config["use_sliding_window"] else []
            config["layer_types"] = draw(
                st.lists(st.sampled_from(kinds), min_size=layers, max_size=layers)
            )
        else:
            config["max_window_layers"] = draw(st.integers(0, layers))
    if family == "qwen3_moe":
        experts = draw(st.integers(2, 6))
        config |= {
            "num_experts": experts,
            "num_experts_per_tok": draw(st.integers(1, experts)),
            "moe_intermediate_size": draw(st.sampled_from([5, 12])),
            "norm_topk_prob": draw(st.booleans()),
            "decoder_sparse_step": draw(st.integers(1, 2)),
            "mlp_only_layers": draw(st.lists(st.integers(0, layers - 1), max_size=1)),
        }
    return config


def in_the_style_of_transformers_4(config: dict[str, Any], drop_layer_types: bool) -> None:
    rope = config.pop("rope_parameters")
    config["rope_theta"] = rope.pop("rope_theta")
    config["rope_scaling"] = None if rope["rope_type"] == "default" else rope
    config["torch_dtype"] = config.pop("dtype")
    if drop_layer_types:  # older still: max_window_layers alone says it
        config.pop("layer_types", None)


def random_transformers_model(config: dict[str, Any], seed: int) -> Any:
    kind = {
        "qwen3": transformers.Qwen3Config,
        "qwen3_moe": transformers.Qwen3MoeConfig,
        "llama": transformers.LlamaConfig,
    }[config["model_type"]]
    made = kind(**{name: value for name, value in config.items() if name != "model_type"})
    model = transformers.AutoModelForCausalLM.from_config(
        made, attn_implementation="eager", experts_implementation="eager", dtype=torch.float32
    ).eval()
    generator = torch.Generator().manual_seed(seed)
    for name, weight in model.named_parameters():
        noise = torch.randn(weight.shape, generator=generator)
        if "norm" in name:
            weight.data = 1 + 0.3 * noise
        elif name.endswith("bias"):
            weight.data = 0.3 * noise
        else:
            weight.data = noise if "embed" in name else 1.5 * noise / weight.shape[-1] ** 0.5
    return model


@torch.no_grad()
def transformers_greedy(model: Any, prompt: list[int]) -> tuple[list[int], Tensor]:
    """Tokens, and the logits that each was chosen from, without any cache."""
    ids, rows = list(prompt), []
    for _ in range(NEW):
        rows.append(model(torch.tensor([ids]), use_cache=False).logits[0, -1])
        ids.append(int(rows[-1].argmax()))
    return ids[len(prompt) :], torch.stack(rows)


def check_tokens(
    model: kvist.Model,
    prompt: list[int],
    ours: tuple[int, ...],
    theirs: list[int],
    logits: Tensor,
    tally: Tally,
) -> None:
    for step, (own, reference) in enumerate(zip(ours, theirs, strict=True)):
        tally.tokens += 1
        if own == reference:
            continue
        difference = (whole_logits(model, [*prompt, *theirs[:step]])[-1] - logits[step]).abs().max()
        best = logits[step].topk(2).values
        assert best[0] - best[1] <= 4 * difference, f"token {step}: {own} instead of {reference}"
        tally.ties += 1
        return  # behind a tie the two texts are different ones


@settings(max_examples=40, deadline=None, suppress_health_check=list(HealthCheck))
@given(
    config=configs(),
    style=st.sampled_from([4, 5]),
    prompts=st.lists(st.lists(st.integers(0, 96), min_size=1, max_size=30), min_size=1, max_size=3),
    layout=st.sampled_from(["dynamic", "static"]),
    attention=st.sampled_from(["reference", "sdpa"]),
    chunk=st.sampled_from([1, 4, 9, 64]),
    seed=st.integers(0, 2**32),
)
def test_any_configuration_gives_transformers_logits_and_tokens(
    tally: Tally,
    config: dict[str, Any],
    style: int,
    prompts: list[list[int]],
    layout: str,
    attention: str,
    chunk: int,
    seed: int,
) -> None:
    theirs = random_transformers_model(config, seed)
    with TemporaryDirectory() as directory:
        theirs.save_pretrained(directory)
        path = Path(directory) / "config.json"
        saved = json.loads(path.read_text())
        if style == 4:
            in_the_style_of_transformers_4(saved, "max_window_layers" in config)
            path.write_text(json.dumps(saved))
        model = kvist.load(directory)

    logits = forward(model, new_cache(model, len(prompts), layout), prompts, attention)
    results = kvist.generate(
        model,
        prompts,
        SamplingParams(temperature=0, max_tokens=NEW),
        cache=layout,
        attention=attention,
        chunk=chunk,
    )
    for prompt, own, result in zip(
        prompts, logits.split([len(p) for p in prompts]), results, strict=True
    ):
        with torch.no_grad():
            expected = theirs(torch.tensor([prompt]), use_cache=False).logits[0]
        torch.testing.assert_close(own, expected, rtol=0, atol=1e-3)
        check_tokens(model, prompt, result.token_ids, *transformers_greedy(theirs, prompt), tally)
