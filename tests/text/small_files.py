"""The small tokenizers in tests/fixtures, and a checkpoint's face over them."""

import json
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

FIXTURES = Path(__file__).parents[1] / "fixtures"
QWEN3 = FIXTURES / "qwen3" / "dense_tied"
SMOLLM2 = FIXTURES / "smollm2"


@dataclass(frozen=True)
class Files:
    """The part of a checkpoint that text needs."""

    path: Path
    tokenizer_json: Path | None = None
    tokenizer_config: Mapping[str, Any] = field(default_factory=dict)
    chat_template: str | None = None
    gguf_metadata: Mapping[str, Any] | None = None

    @classmethod
    def at(cls, directory: Path) -> "Files":
        config = directory / "tokenizer_config.json"
        return cls(
            directory,
            directory / "tokenizer.json",
            json.loads(config.read_text()) if config.exists() else {},
        )
