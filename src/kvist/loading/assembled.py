"""A checkpoint put together from others: tensors under other names, joined or reshaped.

One module's weights may lie in files of another naming, or in two checkpoints; this gives them one
face that `load_into` reads. What is called what is said by whoever makes it (`loading.nanovlm`).
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from kvist.loading.checkpoint import Checkpoint

__all__ = ["AssembledCheckpoint", "Source"]


@dataclass(frozen=True)
class Source:
    """Where one tensor lies.

    Args:
        checkpoint: which files.
        names: its name there; several are joined along the first dimension.
        leading: a dimension of 1 that the file does not have in front.
    """

    checkpoint: Checkpoint
    names: tuple[str, ...]
    leading: bool = False

    @property
    def shape(self) -> tuple[int, ...]:
        """The shape that reading it gives."""
        shapes = [self.checkpoint.shape(name) for name in self.names]
        joined = (sum(shape[0] for shape in shapes), *shapes[0][1:])
        return (1, *joined) if self.leading else joined


@dataclass(frozen=True, eq=False)
class AssembledCheckpoint:
    """Satisfies `kvist.loading.checkpoint.Checkpoint`; all but the weights is the first one's."""

    first: Checkpoint
    sources: Mapping[str, Source]

    @property
    def path(self) -> Path:
        """The first checkpoint's."""
        return self.first.path

    @property
    def config(self) -> dict[str, Any]:
        """The first checkpoint's."""
        return self.first.config

    @property
    def generation_config(self) -> dict[str, Any]:
        """The first checkpoint's."""
        return self.first.generation_config

    @property
    def tokenizer_json(self) -> Path | None:
        """The first checkpoint's."""
        return self.first.tokenizer_json

    @property
    def tokenizer_config(self) -> dict[str, Any]:
        """The first checkpoint's."""
        return self.first.tokenizer_config

    @property
    def chat_template(self) -> str | None:
        """The first checkpoint's."""
        return self.first.chat_template

    @property
    def gguf_metadata(self) -> Mapping[str, Any] | None:
        """The first checkpoint's."""
        return self.first.gguf_metadata

    def names(self) -> frozenset[str]:
        """All tensors, by their new names."""
        return frozenset(self.sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """A tensor's shape, without reading it."""
        return self.sources[name].shape

    def tensor(
        self,
        name: str,
        *,
        dtype: torch.dtype | None = None,
        device: str | torch.device = "cpu",
    ) -> Tensor:
        """Read one tensor; see `Checkpoint.tensor`."""
        source = self.sources[name]
        parts = [
            source.checkpoint.tensor(part, dtype=dtype, device=device) for part in source.names
        ]
        joined = parts[0] if len(parts) == 1 else torch.cat(parts)
        return joined[None] if source.leading else joined
