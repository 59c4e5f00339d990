"""What the text tests share: two small vocabularies."""

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
from small_files import QWEN3, SMOLLM2, Files

from kvist.text.tokenizer import Tokenizer


@pytest.fixture(scope="session")
def qwen3() -> Tokenizer:
    """Qwen3's normaliser and pre-tokenizer over 503 tokens and nine added ones."""
    return Tokenizer.from_checkpoint(Files.at(QWEN3))


@pytest.fixture(scope="session")
def smollm2_metadata() -> dict[str, Any]:
    """SmolLM2's own metadata, cut to its first 700 merges."""
    return json.loads((SMOLLM2 / "first_merges.json").read_text())


@pytest.fixture(scope="session")
def qwen3_metadata() -> dict[str, Any]:
    """The small Qwen3 tokenizer, written as llama.cpp's converter would."""
    original = json.loads((QWEN3 / "tokenizer.json").read_text())
    tokens = list(original["model"]["vocab"]) + [t["content"] for t in original["added_tokens"]]
    special = {t["content"]: t["special"] for t in original["added_tokens"]}
    types = [1 if t not in special else 3 if special[t] else 4 for t in tokens]
    merges = original["model"]["merges"]
    return {
        "tokenizer.ggml.model": "gpt2",
        "tokenizer.ggml.pre": "qwen2",
        "tokenizer.ggml.tokens": tokens,
        "tokenizer.ggml.token_type": types,
        "tokenizer.ggml.merges": [m if isinstance(m, str) else " ".join(m) for m in merges],
        "tokenizer.ggml.eos_token_id": tokens.index("<|im_end|>"),
        "tokenizer.ggml.padding_token_id": tokens.index("<|endoftext|>"),
        "tokenizer.ggml.add_bos_token": False,
    }


@pytest.fixture
def saved(tmp_path: Path) -> Callable[..., Files]:
    """Write a changed copy of the small Qwen3 tokenizer; return the checkpoint it makes."""

    def save(change: Callable[[dict[str, Any]], None] | None = None, **config: Any) -> Files:
        tokenizer = json.loads((QWEN3 / "tokenizer.json").read_text())
        if change is not None:
            change(tokenizer)
        (tmp_path / "tokenizer.json").write_text(json.dumps(tokenizer))
        (tmp_path / "tokenizer_config.json").write_text(json.dumps(config))
        return Files.at(tmp_path)

    return save
