"""A directory in the hub's format: config.json, safetensors in one file or several, text assets.

Everything is checked when the directory is opened, and weights are then read from the memory map
one tensor at a time. Pickled weights are refused: there is no code here that could read them.
"""

import json
from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvist.errors import CheckpointError, NotSupported

__all__ = ["DirectoryCheckpoint"]

_SINGLE = "model.safetensors"
_INDEX = "model.safetensors.index.json"
_PICKLED = ("*.bin", "*.pt", "*.pth", "*.ckpt")
_PLAIN_TYPES = frozenset({"F64", "F32", "F16", "BF16"})


@dataclass(frozen=True, eq=False)
class DirectoryCheckpoint:
    """One directory; satisfies `kvist.loading.checkpoint.Checkpoint`."""

    path: Path
    config: dict[str, Any]
    generation_config: dict[str, Any]
    tokenizer_config: dict[str, Any]
    chat_template: str | None
    tokenizer_json: Path | None
    gguf_metadata: Mapping[str, Any] | None = field(default=None, init=False)
    # Opened shards: tensor name -> the handle of the file that holds it.
    _shards: Mapping[str, Any] = field(repr=False)

    @classmethod
    def open(cls, path: Path, *, weights: bool = True) -> "DirectoryCheckpoint":
        """Read the JSON files and, unless without weights, the headers of all shards.

        Raises:
            CheckpointError: a file is missing, damaged or truncated; the message names it.
        """
        if not (path / "config.json").is_file():
            raise CheckpointError(f"{path}: no config.json, so this is not a model's directory")
        tokenizer_json = path / "tokenizer.json"
        tokenizer_config = _read_json(path / "tokenizer_config.json", optional=True)
        return cls(
            path=path,
            config=_read_json(path / "config.json"),
            generation_config=_read_json(path / "generation_config.json", optional=True),
            tokenizer_config=tokenizer_config,
            chat_template=_chat_template(path, tokenizer_config),
            tokenizer_json=tokenizer_json if tokenizer_json.is_file() else None,
            _shards=_open_shards(path) if weights else {},
        )

    def names(self) -> frozenset[str]:
        return frozenset(self._shards)

    def shape(self, name: str) -> tuple[int, ...]:
        return tuple(self._shard(name).get_slice(name).get_shape())

    def quantized(self, name: str) -> None:
        """None: nothing in these files is in a GGUF's blocks."""

    def tensor(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Read one tensor; without a dtype it comes as stored."""
        shard = self._shard(name)
        stored_type = shard.get_slice(name).get_dtype()
        if dtype is not None and dtype.is_floating_point and stored_type not in _PLAIN_TYPES:
            raise NotSupported(
                f"{self.path}: tensor {name} is stored as {stored_type}, whose scales kvist does "
                "not know; take the model in bfloat16, float16 or float32"
            )
        stored: Tensor = shard.get_tensor(name)
        # Converted after the move: the file's type is never wider than needed on the way.
        tensor = stored.to(device)
        if dtype is not None:
            tensor = tensor.to(dtype)
        # A view of the file would fault, or change, when someone writes to the file.
        return tensor.clone() if tensor is stored else tensor

    def _shard(self, name: str) -> Any:
        try:
            return self._shards[name]
        except KeyError:
            raise CheckpointError(f"{self.path}: no tensor {name!r}") from None


def _read_json(path: Path, *, optional: bool = False) -> dict[str, Any]:
    if optional and not path.is_file():
        return {}
    try:
        content = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise CheckpointError(f"{path}: cannot be read ({error.strerror or error})") from error
    except (ValueError, RecursionError) as error:  # JSON's and UTF-8's errors are ValueErrors
        raise CheckpointError(f"{path}: not valid JSON ({error})") from error
    if not isinstance(content, dict):
        raise CheckpointError(f"{path}: holds a {type(content).__name__}, not a JSON object")
    return content


def _chat_template(path: Path, tokenizer_config: Mapping[str, Any]) -> str | None:
    """chat_template.jinja, else the config's entry: a text, or a list of named ones."""
    file = path / "chat_template.jinja"
    if file.is_file():
        try:
            return file.read_text(encoding="utf-8")
        except (OSError, UnicodeDecodeError) as error:
            raise CheckpointError(f"{file}: cannot be read ({error})") from error
    template = tokenizer_config.get("chat_template")
    if isinstance(template, list):
        named = {e.get("name"): e.get("template") for e in template if isinstance(e, dict)}
        template = named.get("default")
    return template if isinstance(template, str) else None


def _open_shards(path: Path) -> dict[str, Any]:
    """Tensor name -> the open file that holds it."""
    if (path / _SINGLE).is_file():
        handle = _open(path / _SINGLE)
        return dict.fromkeys(handle.keys(), handle)
    if not (path / _INDEX).is_file():
        raise CheckpointError(_nothing_to_read(path))
    weight_map = _read_json(path / _INDEX).get("weight_map")
    if not isinstance(weight_map, dict) or not weight_map:
        raise CheckpointError(f"{path / _INDEX}: no weight_map")
    for file in weight_map.values():
        if not isinstance(file, str) or Path(file).name != file:
            raise CheckpointError(f"{path / _INDEX}: {file!r} is not a file name")
    files = set(weight_map.values())
    absent = sorted(file for file in files if not (path / file).is_file())
    if absent:
        raise CheckpointError(
            f"{path}: {_some(absent)} missing, {len(absent)} of the {len(files)} shards that "
            f"{_INDEX} names; fetch them again"
        )
    handles = {file: _open(path / file) for file in sorted(files)}
    held = {file: frozenset(handle.keys()) for file, handle in handles.items()}
    astray = sorted(name for name, file in weight_map.items() if name not in held[file])
    if astray:
        raise CheckpointError(
            f"{path}: {_some(astray)} not in the shard that {_INDEX} names ({len(astray)} tensors)"
        )
    return {name: handles[file] for name, file in weight_map.items()}


def _open(file: Path) -> Any:
    """Map a file and check that its header agrees with its size."""
    from safetensors import SafetensorError, safe_open

    try:
        with file.open("rb") as raw:
            beginning = raw.read(40)
        if beginning.startswith(b"version https://git-lfs"):
            raise CheckpointError(f"{file}: a git-lfs pointer, not the weights; run `git lfs pull`")
        return safe_open(file, framework="pt", device="cpu")
    except SafetensorError as error:
        raise CheckpointError(f"{file}: damaged or truncated ({error}); fetch it again") from error
    except OSError as error:
        raise CheckpointError(f"{file}: cannot be read ({error.strerror or error})") from error


def _nothing_to_read(path: Path) -> str:
    pickled = sorted(file.name for pattern in _PICKLED for file in path.glob(pattern))
    if pickled:
        return (
            f"{path}: only pickled weights ({_some(pickled)}); unpickling runs whatever code the "
            "file holds, so kvist never does: take or convert to safetensors"
        )
    return f"{path}: neither {_SINGLE} nor {_INDEX}"


def _some(names: Iterable[str]) -> str:
    listed = list(names)
    return ", ".join(listed[:3]) + (", …" if len(listed) > 3 else "")
