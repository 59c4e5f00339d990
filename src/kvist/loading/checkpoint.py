"""What a checkpoint is to the rest of kvist, and the one way from a checkpoint into a module.

`open_checkpoint` gives a directory of safetensors or a GGUF file one face, `load_into` fills a
module that was built on the meta device, and `random_weights` does so from nothing. What models
exist, and what a config means, is not known here; `kvist.load` puts the two together.
"""

import hashlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import torch
from torch import Tensor, nn

from kvist.errors import CheckpointError, NotSupported
from kvist.models.fp8 import Fp8Linear

__all__ = ["Checkpoint", "check_fit", "load_into", "open_checkpoint", "random_weights"]


class Checkpoint(Protocol):
    """A model's files, opened and checked; weights are read only when asked for."""

    @property
    def path(self) -> Path:
        """The directory or file that it came from."""

    @property
    def config(self) -> dict[str, Any]:
        """The content of config.json, or the same made from a GGUF's metadata."""

    @property
    def generation_config(self) -> dict[str, Any]:
        """The content of generation_config.json, or {}."""

    @property
    def tokenizer_json(self) -> Path | None:
        """tokenizer.json, where there is one."""

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """The content of tokenizer_config.json, or {}; special tokens' texts for a GGUF."""

    @property
    def chat_template(self) -> str | None:
        """The jinja source."""

    @property
    def gguf_metadata(self) -> Mapping[str, Any] | None:
        """A GGUF's metadata as Python values, its `tokenizer.ggml.*` among them; else None."""

    def names(self) -> frozenset[str]:
        """All tensors, by the hub's names ("model.layers.0.self_attn.q_proj.weight")."""

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""

    def tensor(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Read one tensor into memory of its own.

        Args:
            name: one of `names()`.
            dtype: what to convert to; None keeps the file's type (float32 for quantised ones).
            device: where to put it.

        Raises:
            CheckpointError: there is no such tensor, or it cannot be read.
        """


def open_checkpoint(path: Path, *, weights: bool = True) -> Checkpoint:
    """Open a directory in the hub's format, or a GGUF file.

    Args:
        path: what `kvist.loading.hub.resolve` found.
        weights: False is content with a directory that has a config and no weights, as
            `random_weights` needs it; its `names()` are then empty.

    Raises:
        CheckpointError: what is there is missing a part, damaged, or of another kind.
    """
    # Imported here, since they cost time that `kvist pull` and `--help` need not pay.
    if path.is_dir():
        from kvist.loading.safetensors import DirectoryCheckpoint

        return DirectoryCheckpoint.open(path, weights=weights)
    if not path.exists():
        raise CheckpointError(f"{path}: no such file or directory")
    if path.suffix in (".bin", ".pt", ".pth", ".ckpt"):
        raise CheckpointError(
            f"{path}: pickled weights, which can run any code; kvist reads safetensors and GGUF"
        )
    if path.suffix == ".safetensors":
        raise CheckpointError(
            f"{path}: weights alone; give the directory, {path.parent}, with its config.json"
        )
    from kvist.loading.gguf import GGUFCheckpoint

    return GGUFCheckpoint.open(path)


@dataclass(frozen=True)
class _Slot:
    """One parameter or persistent buffer of a module, under all the names that share it."""

    names: Sequence[str]
    tensor: Tensor

    def fill(self, module: nn.Module, value: Tensor) -> None:
        if isinstance(self.tensor, nn.Parameter):
            value = nn.Parameter(value, requires_grad=False)
        for name in self.names:
            owner, _, attribute = name.rpartition(".")
            place = module.get_submodule(owner)
            if isinstance(place, Fp8Linear) and attribute == "weight":
                place.take(value)
            else:
                setattr(place, attribute, value)


def _slots(module: nn.Module) -> list[_Slot]:
    # state_dict lists parameters and persistent buffers under every name that reaches them.
    shared: dict[int, tuple[Tensor, list[str]]] = {}
    for name, tensor in module.state_dict(keep_vars=True).items():
        shared.setdefault(id(tensor), (tensor, []))[1].append(name)
    return [_Slot(names, tensor) for tensor, names in shared.values()]


def load_into(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Give every parameter of a module its weights, read one by one straight to dtype and device.

    All names and shapes are compared before the first weight is read, so the module is either
    filled or untouched, and no more memory is used than the model itself and one tensor. Weights
    that are tied in the module are read once, by whichever of their names the file has.
    Persistent buffers are read too and keep their type if it is not a float; non-persistent ones
    are the model's to compute.

    Args:
        module: built under `torch.device("meta")`.
        checkpoint: where the weights are.
        dtype: of the floating-point parameters.
        device: where to put them.
        ignore: names in the file that the model does without.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape; all are counted and
            the first few named. Or tied weights differ in the file.
        NotSupported: the weights are quantised in a way that is not GGUF's.
    """
    if checkpoint.config.get("quantization_config"):
        method = checkpoint.config["quantization_config"]
        method = method.get("quant_method", method) if isinstance(method, dict) else method
        raise NotSupported(f"{checkpoint.path}: weights quantised with {method!r}")
    check_fit(module, checkpoint, ignore=ignore)
    slots = _slots(module)
    available = checkpoint.names()
    sources = {id(slot): [name for name in slot.names if name in available] for slot in slots}
    for slot in slots:
        _check_tied(sources[id(slot)], checkpoint)
    for slot in slots:
        wanted = dtype if slot.tensor.is_floating_point() else slot.tensor.dtype
        source = sources[id(slot)][0]
        slot.fill(module, checkpoint.tensor(source, dtype=wanted, device=device))


def check_fit(
    module: nn.Module,
    checkpoint: Checkpoint,
    *,
    ignore: Callable[[str], bool] = lambda name: False,
) -> None:
    """Compare all names and shapes, without reading a weight; arguments as in `load_into`.

    Raises:
        CheckpointError: tensors are missing, unexpected or of another shape.
    """
    slots = _slots(module)
    available = checkpoint.names()
    known = {name for slot in slots for name in slot.names}
    missing = [slot.names[0] for slot in slots if not available.intersection(slot.names)]
    extra = sorted(name for name in available - known if not ignore(name))
    misshapen = [
        f"{name} is {list(checkpoint.shape(name))} instead of {list(slot.tensor.shape)}"
        for slot in slots
        for name in slot.names
        if name in available and checkpoint.shape(name) != tuple(slot.tensor.shape)
    ]
    problems = [
        f"{len(names)} {what} ({', '.join(names[:3])}{', …' if len(names) > 3 else ''})"
        for names, what in (
            (missing, "missing"),
            (extra, "not part of the model"),
            (misshapen, "of another shape"),
        )
        if names
    ]
    if problems:
        raise CheckpointError(
            f"{checkpoint.path}: the weights do not fit the config; tensors {'; '.join(problems)}"
        )


def _check_tied(names: Sequence[str], checkpoint: Checkpoint) -> None:
    """A file may hold tied weights twice, but then they must be the same."""
    for name in names[1:]:
        if not torch.equal(checkpoint.tensor(names[0]), checkpoint.tensor(name)):
            raise CheckpointError(
                f"{checkpoint.path}: the config ties {name} to {names[0]}, but they differ in the "
                "file; set tie_word_embeddings to false"
            )


def random_weights(
    module: nn.Module,
    *,
    dtype: torch.dtype,
    device: str | torch.device,
    seed: int = 0,
    std: float = 0.02,
) -> None:
    """Give every parameter of a module random weights: for benchmarks and tests without files.

    Norms become 1, biases and persistent buffers 0, all else normal with mean 0 and deviation
    `std`. A weight depends on its name, the seed and the kind of device, not on the other weights
    nor, but for rounding, on the dtype.
    """
    for slot in _slots(module):
        name, shape = slot.names[0], slot.tensor.shape
        owner, _, attribute = name.rpartition(".")
        wanted = dtype if slot.tensor.is_floating_point() else slot.tensor.dtype
        if attribute == "bias" or not isinstance(slot.tensor, nn.Parameter):
            value = torch.zeros(shape, dtype=wanted, device=device)
        elif "norm" in owner.rpartition(".")[2].lower():
            value = torch.ones(shape, dtype=wanted, device=device)
        else:
            digest = hashlib.sha256(f"{seed}:{name}".encode()).digest()
            generator = torch.Generator(device).manual_seed(int.from_bytes(digest[:7], "little"))
            # Drawn in float32, since generators give other numbers for other types.
            value = torch.empty(shape, dtype=torch.float32, device=device)
            value = value.normal_(0.0, std, generator=generator).to(wanted)
        slot.fill(module, value)
