"""A directory in the hub's format: what is read, and what each kind of damage says."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file, save_file

from kvist.errors import CheckpointError, NotSupported
from kvist.loading.checkpoint import open_checkpoint

CopyOf = Callable[..., Path]


def split(directory: Path, *, num_shards: int = 3) -> dict[str, str]:
    """Turn a checkpoint of one file into one of several; returns the index's weight_map."""
    weights = load_file(directory / "model.safetensors")
    (directory / "model.safetensors").unlink()
    weight_map = {}
    for i in range(num_shards):
        file = f"model-{i + 1:05}-of-{num_shards:05}.safetensors"
        part = {name: weights[name] for name in sorted(weights)[i::num_shards]}
        save_file(part, directory / file)
        weight_map |= dict.fromkeys(part, file)
    write_index(directory, weight_map)
    return weight_map


def write_index(directory: Path, weight_map: Any) -> None:
    content = {"metadata": {"total_size": 0}, "weight_map": weight_map}
    (directory / "model.safetensors.index.json").write_text(json.dumps(content))


@pytest.mark.parametrize("name", ["dense_tied", "dense_swa", "dense_untied_headdim"])
def test_a_single_file_is_read_as_safetensors_reads_it(fixtures: Path, name: str) -> None:
    checkpoint = open_checkpoint(fixtures / name)
    expected = load_file(fixtures / name / "model.safetensors")
    assert checkpoint.names() == set(expected)
    for key, tensor in expected.items():
        assert checkpoint.shape(key) == tuple(tensor.shape)
        assert torch.equal(checkpoint.tensor(key), tensor)
    assert checkpoint.config["model_type"] == "qwen3"
    assert checkpoint.generation_config["eos_token_id"] == [505, 503]
    assert checkpoint.tokenizer_json == fixtures / name / "tokenizer.json"
    assert checkpoint.chat_template is not None
    assert checkpoint.chat_template.startswith("{%- if tools %}")
    assert checkpoint.gguf_metadata is None


def test_shards_give_the_same_tensors_as_one_file(fixtures: Path, model_directory: CopyOf) -> None:
    directory = model_directory()
    split(directory)
    whole, sharded = open_checkpoint(fixtures / "dense_tied"), open_checkpoint(directory)
    assert sharded.names() == whole.names()
    for name in whole.names():
        assert torch.equal(sharded.tensor(name), whole.tensor(name))


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16, torch.float64])
def test_a_tensor_is_converted_on_request(fixtures: Path, dtype: torch.dtype) -> None:
    checkpoint = open_checkpoint(fixtures / "dense_tied")
    name = "model.layers.0.mlp.up_proj.weight"
    assert torch.equal(checkpoint.tensor(name, dtype=dtype), checkpoint.tensor(name).to(dtype))


def test_a_tensor_that_was_read_owns_its_memory(model_directory: CopyOf) -> None:
    directory = model_directory()
    tensor = open_checkpoint(directory).tensor("model.norm.weight")
    kept = tensor.clone()
    file = directory / "model.safetensors"
    with file.open("r+b") as opened:
        opened.seek(4096)
        opened.write(b"\xff" * (file.stat().st_size - 4096))
    assert torch.equal(tensor, kept)


def test_the_optional_files_are_optional(model_directory: CopyOf) -> None:
    directory = model_directory()
    for name in ("generation_config.json", "tokenizer.json", "tokenizer_config.json"):
        (directory / name).unlink()
    checkpoint = open_checkpoint(directory)
    assert checkpoint.generation_config == checkpoint.tokenizer_config == {}
    assert checkpoint.tokenizer_json is checkpoint.chat_template is None


def test_a_template_file_wins_over_the_tokenizers_config(model_directory: CopyOf) -> None:
    directory = model_directory()
    (directory / "chat_template.jinja").write_text("{{ 'from the file' }}")
    assert open_checkpoint(directory).chat_template == "{{ 'from the file' }}"


def test_of_several_templates_the_default_is_taken(model_directory: CopyOf) -> None:
    directory = model_directory()
    templates = [{"name": "rag", "template": "r"}, {"name": "default", "template": "d"}]
    (directory / "tokenizer_config.json").write_text(json.dumps({"chat_template": templates}))
    assert open_checkpoint(directory).chat_template == "d"


def test_a_config_alone_is_enough_where_no_weights_are_wanted(model_directory: CopyOf) -> None:
    directory = model_directory()
    (directory / "model.safetensors").unlink()
    checkpoint = open_checkpoint(directory, weights=False)
    assert checkpoint.config["hidden_size"] == 64
    assert checkpoint.names() == frozenset()


def test_a_directory_without_a_config_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match=r"no config\.json"):
        open_checkpoint(tmp_path)


def test_a_path_that_does_not_exist_is_refused(tmp_path: Path) -> None:
    with pytest.raises(CheckpointError, match="nowhere: no such file or directory"):
        open_checkpoint(tmp_path / "nowhere")


@pytest.mark.parametrize(
    "file",
    [
        "config.json",
        "generation_config.json",
        "tokenizer_config.json",
        "model.safetensors.index.json",
    ],
)
@pytest.mark.parametrize(
    ("content", "says"),
    [
        (b'{"a": ', "not valid JSON"),
        (b"", "not valid JSON"),
        (b'{"a": "\xff"}', "not valid JSON"),
        (b"[" * 100_000, "not valid JSON"),
        (b"[1, 2]", "holds a list, not a JSON object"),
    ],
    ids=["cut", "empty", "not-utf8", "deep", "list"],
)
def test_broken_json_is_named(
    model_directory: CopyOf, file: str, content: bytes, says: str
) -> None:
    directory = model_directory()
    split(directory)
    (directory / file).write_bytes(content)
    with pytest.raises(CheckpointError, match=f"{file}: {says}") as caught:
        open_checkpoint(directory)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("kept", [0, 5, 100, 5000, -1])
def test_a_truncated_file_is_named(model_directory: CopyOf, kept: int) -> None:
    file = model_directory() / "model.safetensors"
    file.write_bytes(file.read_bytes()[:kept])
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged or truncated"):
        open_checkpoint(file.parent)


def test_a_truncated_shard_is_named(model_directory: CopyOf) -> None:
    directory = model_directory()
    split(directory)
    file = directory / "model-00002-of-00003.safetensors"
    file.write_bytes(file.read_bytes()[:-4])
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors: damaged"):
        open_checkpoint(directory)


def test_a_corrupt_header_is_named(model_directory: CopyOf) -> None:
    file = model_directory() / "model.safetensors"
    content = bytearray(file.read_bytes())
    content[:8] = b"\xff" * 8
    file.write_bytes(content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors: damaged"):
        open_checkpoint(file.parent)


def test_a_git_lfs_pointer_is_recognised(model_directory: CopyOf) -> None:
    file = model_directory() / "model.safetensors"
    file.write_text("version https://git-lfs.github.com/spec/v1\noid sha256:0\nsize 1\n")
    with pytest.raises(CheckpointError, match="git lfs pull"):
        open_checkpoint(file.parent)


def test_missing_shards_are_named(model_directory: CopyOf) -> None:
    directory = model_directory()
    split(directory)
    (directory / "model-00002-of-00003.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"model-00002-of-00003\.safetensors missing, 1 of"):
        open_checkpoint(directory)


def test_a_tensor_that_is_not_in_its_shard_is_named(model_directory: CopyOf) -> None:
    directory = model_directory()
    weight_map = split(directory)
    write_index(directory, weight_map | {"model.extra.weight": "model-00001-of-00003.safetensors"})
    with pytest.raises(CheckpointError, match=r"model\.extra\.weight not in the shard"):
        open_checkpoint(directory)


@pytest.mark.parametrize("file", ["../secret.safetensors", "/etc/passwd", 7, ["a"], None])
def test_an_index_cannot_point_outside_its_directory(model_directory: CopyOf, file: object) -> None:
    directory = model_directory()
    weight_map = split(directory)
    write_index(directory, weight_map | {"model.norm.weight": file})
    with pytest.raises(CheckpointError, match="is not a file name"):
        open_checkpoint(directory)


@pytest.mark.parametrize("weight_map", [{}, None, []])
def test_an_index_without_a_map_is_refused(model_directory: CopyOf, weight_map: object) -> None:
    directory = model_directory()
    split(directory)
    write_index(directory, weight_map)
    with pytest.raises(CheckpointError, match="no weight_map"):
        open_checkpoint(directory)


@pytest.mark.parametrize("file", ["pytorch_model.bin", "consolidated.00.pth", "model.pt"])
def test_pickled_weights_are_refused_with_a_sentence(model_directory: CopyOf, file: str) -> None:
    directory = model_directory()
    (directory / "model.safetensors").rename(directory / file)
    with pytest.raises(CheckpointError, match=f"only pickled weights \\({file}\\).*safetensors"):
        open_checkpoint(directory)
    with pytest.raises(CheckpointError, match="pickled weights"):
        open_checkpoint(directory / file)


def test_a_directory_without_weights_says_what_it_looked_for(model_directory: CopyOf) -> None:
    directory = model_directory()
    (directory / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"neither model\.safetensors nor"):
        open_checkpoint(directory)


def test_weights_alone_lead_to_their_directory(fixtures: Path) -> None:
    with pytest.raises(CheckpointError, match=r"give the directory, .*dense_tied,"):
        open_checkpoint(fixtures / "dense_tied" / "model.safetensors")


def test_integer_weights_are_not_taken_for_floats(model_directory: CopyOf) -> None:
    directory = model_directory()
    save_file({"w": torch.ones(4, dtype=torch.int8)}, directory / "model.safetensors")
    checkpoint = open_checkpoint(directory)
    assert checkpoint.tensor("w").dtype == torch.int8
    with pytest.raises(NotSupported, match="w is stored as I8"):
        checkpoint.tensor("w", dtype=torch.float32)
