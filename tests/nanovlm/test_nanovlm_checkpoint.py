"""nanoVLM's checkpoint format: read in all its versions, written so that nanoVLM reads it back."""

import json
import shutil
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file
from vlm_cases import CHELSEA, FIXTURES, NANOVLM, case, greedy, load

from kvist.errors import CheckpointError, ConfigError, NotSupported
from kvist.loading.checkpoint import open_checkpoint
from kvist.loading.nanovlm import load_nanovlm, save_pretrained
from kvist.models.nanovlm import VisionLanguageModel, is_nanovlm, read_vlm

QWEN3 = FIXTURES / "qwen3" / "dense_untied_headdim"


def config_of(name: str = "vlm_tied") -> dict[str, Any]:
    return json.loads((NANOVLM / name / "config.json").read_text())  # type: ignore[no-any-return]


def edit(path: Path, **changes: Any) -> None:
    """Change config.json's fields; None takes one out."""
    config = json.loads((path / "config.json").read_text()) | changes
    kept = {name: value for name, value in config.items() if value is not None}
    (path / "config.json").write_text(json.dumps(kept))


@pytest.fixture
def copy(tmp_path: Path) -> Path:
    """A copy of `vlm_tied` that a test may change."""
    for file in ("config.json", "model.safetensors"):
        shutil.copy(NANOVLM / "vlm_tied" / file, tmp_path / file)
    shutil.copytree(NANOVLM / "vlm_tied" / "tokenizer", tmp_path / "tokenizer")
    return tmp_path


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
def test_saved_again_it_is_what_nanovlm_wrote(name: str, tmp_path: Path) -> None:
    save_pretrained(case(name).loaded.model, tmp_path)
    assert json.loads((tmp_path / "config.json").read_text()) == config_of(name)
    files = tmp_path / "model.safetensors", NANOVLM / name / "model.safetensors"
    ours, theirs = (load_file(file) for file in files)
    assert ours.keys() == theirs.keys()
    assert all(torch.equal(ours[n], theirs[n]) for n in theirs)
    with safe_open(files[0], "pt") as a, safe_open(files[1], "pt") as b:
        assert a.metadata() == b.metadata()


def test_saved_with_its_tokenizer_it_loads_alone(tmp_path: Path) -> None:
    before = case("vlm_tied").loaded
    save_pretrained(before.model, tmp_path, before.tokenizer)
    after = load(tmp_path)
    message = {"role": "user", "content": [{"type": "image", "image": CHELSEA}]}
    assert after.processor.prepare([message]) == before.processor.prepare([message])


def test_a_directory_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(CheckpointError, match=r"file.*(exists|directory)"):
        save_pretrained(case("vlm_tied").loaded.model, tmp_path / "file")


def test_nanovlms_config_is_known_by_its_fields() -> None:
    assert is_nanovlm(config_of())
    assert not is_nanovlm({"model_type": "qwen3", "hidden_size": 64})


def test_fields_that_a_version_lacks_mean_what_it_did() -> None:
    config = config_of()
    current = read_vlm(config)
    assert (current.max_image_size, current.resize_to_max_side) == (64, True)
    del config["resize_to_max_side_len"]
    assert not read_vlm(config).resize_to_max_side
    del config["max_img_size"]
    assert read_vlm(config).max_image_size is None
    for field in ("vlm_extra_tokens", "lm_chat_template", "mp_image_token_length"):
        del config[field]
    first = read_vlm(config)
    assert (first.extra_tokens, first.chat_template, first.image_tokens) == ({}, None, 4)


def test_the_first_version_is_asked_with_question_and_answer(copy: Path) -> None:
    newer = ("vlm_extra_tokens", "lm_chat_template", "mp_image_token_length", "max_img_size")
    edit(copy, **dict.fromkeys(newer))
    loaded = load(copy)
    content = [{"type": "image", "image": CHELSEA}, {"type": "text", "text": "What is this?"}]
    prompt = loaded.processor.prepare([{"role": "user", "content": content}])
    assert [(s.start, s.length) for s in prompt.spans] == [(0, 4)]
    assert loaded.tokenizer.decode(prompt.token_ids[4:]) == "Question: What is this? Answer:"
    assert len(greedy(loaded, [prompt], 3)[0][0]) == 3


def test_attention_scaling_multiplies_scores_by_its_square(copy: Path) -> None:
    # It is on the cosines and sines of queries and keys alike.
    weights = load_file(copy / "model.safetensors")
    for name in weights:
        if name.endswith("q_proj.weight"):
            weights[name] = weights[name] * 1.1**2
    save_file(weights, copy / "model.safetensors")
    by_weights = load(copy)
    shutil.copy(NANOVLM / "vlm_tied" / "model.safetensors", copy / "model.safetensors")
    edit(copy, lm_attn_scaling=1.1)
    by_config, prompt = load(copy), case("vlm_tied").prompt("one_image")
    ids, logits = greedy(by_config, [prompt], 8)
    other_ids, other_logits = greedy(by_weights, [prompt], 8)
    assert ids == other_ids != [case("vlm_tied").ids("one_image")[:8]]
    torch.testing.assert_close(logits, other_logits, atol=1e-3, rtol=0)


VIT_BASE = {
    "vit_hidden_dim": 768,
    "vit_inter_dim": 3072,
    "vit_patch_size": 16,
    "vit_n_heads": 12,
    "vit_n_blocks": 12,
    "vit_ln_eps": 1e-6,
    "vit_cls_flag": False,
}
SMOLLM2_135M = {
    "lm_hidden_dim": 576,
    "lm_inter_dim": 1536,
    "lm_n_heads": 9,
    "lm_n_kv_heads": 3,
    "lm_n_blocks": 30,
    "lm_re_base": 100000,
    "lm_max_position_embeddings": 8192,
}
SMOLLM2_360M = SMOLLM2_135M | {
    "lm_hidden_dim": 960,
    "lm_inter_dim": 2560,
    "lm_n_heads": 15,
    "lm_n_kv_heads": 5,
    "lm_n_blocks": 32,
}
# The published checkpoints, each of another version: what it added, and its size in millions.
PUBLISHED = {
    "222M": (
        SMOLLM2_135M,
        {"vit_img_size": 224, "lm_vocab_size": 49152, "mp_pixel_shuffle_factor": 2},
        222,
        49,
    ),
    "450M": (
        SMOLLM2_360M,
        {
            "vit_img_size": 256,
            "lm_vocab_size": 49153,
            "mp_pixel_shuffle_factor": 2,
            "mp_image_token_length": 64,
            "vlm_extra_tokens": {"image_token": "<|image|>"},
        },
        450,
        64,
    ),
    "230M-8k": (
        SMOLLM2_135M,
        {
            "vit_img_size": 512,
            "lm_vocab_size": 49169,
            "mp_pixel_shuffle_factor": 4,
            "mp_image_token_length": 64,
            "max_img_size": 1024,
            "vlm_extra_tokens": {"image_token": "<|image|>", "r1c1": "<row_1_col_1>"},
        },
        228,
        64,
    ),
}


@pytest.mark.parametrize("name", PUBLISHED)
def test_published_checkpoints_have_their_sizes(name: str) -> None:
    language, version, millions, image_tokens = PUBLISHED[name]
    config = read_vlm(VIT_BASE | language | version)
    with torch.device("meta"):
        model = VisionLanguageModel(config)
    assert sum(p.numel() for p in model.parameters()) / 1e6 == pytest.approx(millions, abs=1)
    assert config.image_tokens == image_tokens


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"vit_n_heads": 5}, "48 is not a multiple of its 5 heads"),
        ({"vit_patch_size": 7}, "not a multiple of its patch size 7"),
        ({"mp_pixel_shuffle_factor": 3}, "3 does not divide the 4 patches"),
        ({"mp_image_token_length": 9}, "mp_image_token_length is 9, but 4 x 4 patches"),
        ({"max_img_size": 65}, "max_img_size 65 is not a multiple of vit_img_size 32"),
        ({"lm_n_heads": 5}, "lm_hidden_dim 96 is not lm_n_heads 5"),
        ({"lm_n_kv_heads": 4}, "lm_n_heads 6 is not a multiple of lm_n_kv_heads 4"),
        ({"lm_hidden_dim": None}, "lacks 'lm_hidden_dim'"),
        ({"lm_n_blocks": 0}, "lm_n_blocks must be a whole number >= 1, not 0"),
        ({"vlm_extra_tokens": {"r1c1": "x"}}, "no 'image_token'"),
    ],
)
def test_a_config_that_makes_no_sense_names_the_field(
    changes: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        read_vlm(config_of() | changes)


def test_a_class_token_cannot_feed_the_projector() -> None:
    with pytest.raises(NotSupported, match="vit_cls_flag"):
        read_vlm(config_of() | {"vit_cls_flag": True})


def test_extra_tokens_beyond_the_embedding_are_refused(copy: Path) -> None:
    edit(copy, vlm_extra_tokens=config_of()["vlm_extra_tokens"] | {"one_more": "<|more|>"})
    with pytest.raises(ConfigError, match=r"'<\|more\|>' gets the id 578, but .* 578 embeddings"):
        load(copy)


def test_a_tokenizer_beside_the_weights_serves_for_a_hub_id(copy: Path) -> None:
    edit(copy, lm_tokenizer="HuggingFaceTB/SmolLM2-135M-Instruct")
    for file in (copy / "tokenizer").iterdir():
        shutil.copy(file, copy / file.name)
    assert load(copy).tokenizer.token_to_id("<|image|>") == 512


def test_without_any_tokenizer_the_error_says_so(copy: Path) -> None:
    edit(copy, lm_tokenizer="")
    with pytest.raises(CheckpointError, match="names no lm_tokenizer"):
        load(copy)


def test_missing_weights_are_named(copy: Path) -> None:
    weights = load_file(copy / "model.safetensors")
    del weights["vision_encoder.blocks.1.ln2.weight"]
    weights["decoder.surplus"] = torch.zeros(1)
    save_file(weights, copy / "model.safetensors")
    with pytest.raises(CheckpointError, match=r"vision\.blocks\.1\.norm2.*decoder\.surplus"):
        load(copy)


# Language models from elsewhere.


@pytest.fixture
def with_qwen3(copy: Path) -> Path:
    """Vision encoder and projector in one directory, a Qwen3 checkpoint beside it."""
    weights = load_file(copy / "model.safetensors")
    vision = {n: t for n, t in weights.items() if n.startswith("vision_encoder.")}
    generator = torch.Generator().manual_seed(0)
    vision["MP.proj.weight"] = torch.randn(64, 192, generator=generator) * 0.1
    save_file(vision, copy / "model.safetensors")
    shutil.copytree(QWEN3, copy / "qwen3")
    edit(
        copy,
        lm_weights="qwen3",
        lm_tokenizer="qwen3",
        lm_chat_template=None,
        resize_to_max_side_len=None,
        vlm_extra_tokens={"image_token": "<|endoftext|>"},
    )
    return copy


def test_a_qwen3_checkpoint_is_the_language_model(with_qwen3: Path) -> None:
    loaded = load(with_qwen3)
    assert loaded.model.language.config.model_type == "qwen3"
    reference = load_file(QWEN3 / "ref.safetensors")
    prompt = loaded.processor.prepare(reference["p17.input_ids"][0].tolist())
    expected = reference["p17.greedy_ids"].flatten().tolist()
    assert greedy(loaded, [prompt], 64)[0] == [expected]


def test_a_qwen3_nanovlm_saved_whole_loads_again(with_qwen3: Path, tmp_path: Path) -> None:
    before = load(with_qwen3)
    whole = tmp_path / "whole"
    save_pretrained(before.model, whole, before.tokenizer)
    saved = json.loads((whole / "config.json").read_text())
    assert "lm_weights" not in saved
    assert saved["lm_hidden_dim"] == 64
    after = load(whole)
    assert after.model.language.config.qk_norm
    assert after.model.language.config.head_dim == before.model.language.config.head_dim == 32
    prompt = before.processor.prepare("What is this?", [CHELSEA])
    assert greedy(after, [prompt], 8)[0] == greedy(before, [prompt], 8)[0]


def test_the_vision_part_alone_is_saved_where_the_language_model_is_elsewhere(
    with_qwen3: Path,
) -> None:
    before, part = load(with_qwen3), with_qwen3 / "part"
    save_pretrained(before.model.half(), part, vision_only=True)
    names = load_file(part / "model.safetensors").keys()
    assert {name.partition(".")[0] for name in names} == {"vision_encoder", "MP"}
    edit(part, lm_weights="../qwen3", lm_tokenizer="../qwen3")
    prompt = before.processor.prepare("What is this?", [CHELSEA])
    assert len(greedy(load(part), [prompt], 8)[0][0]) == 8
    with pytest.raises(ConfigError, match="names no lm_weights"):
        save_pretrained(case("vlm_tied").loaded.model, part, vision_only=True)


def test_what_the_format_has_no_field_for_is_not_saved(with_qwen3: Path, tmp_path: Path) -> None:
    edit(
        with_qwen3 / "qwen3",
        use_sliding_window=True,
        sliding_window=8,
        layer_types=["sliding_attention"] * 3,
    )
    with pytest.raises(NotSupported, match="windows"):
        save_pretrained(load(with_qwen3).model, tmp_path / "whole")


def test_dummy_weights_need_a_config_only(copy: Path) -> None:
    (copy / "model.safetensors").unlink()
    checkpoint = open_checkpoint(copy, weights=False)
    loaded = load_nanovlm(checkpoint, dtype=torch.float32, device="cpu", dummy=True)
    prompt = loaded.processor.prepare("What is this?", [CHELSEA])
    assert len(greedy(loaded, [prompt], 2)[0][0]) == 2
