"""A conversation in a file: a saved cache with the messages in its metadata.

Whatever reads saved caches reads these too. `Conversation` calls it, and the command line to learn
how a conversation was made before it opens one.
"""

import json
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, cast

from kvist.cache import Cache
from kvist.cache.files import open_file, write_file
from kvist.cache.saved import Saveable, load_cache, save_cache, saved_cache
from kvist.core.retention import KeepAll, Retention
from kvist.errors import CacheError, RequestError
from kvist.loading.model import Model
from kvist.text.chat import normalise_messages

__all__ = ["SavedChat", "load_chat", "save_chat", "saved_chat"]

_MESSAGES = "chat.messages"


@dataclass(frozen=True)
class SavedChat:
    """What a file says of the conversation in it.

    Args:
        messages: who said what.
        token_ids: the tokens that the cache holds, and perhaps some behind them.
        codec: how they are written.
        layout: where they lie.
        retention: which of them stay; None is all.
    """

    messages: tuple[dict[str, Any], ...]
    token_ids: tuple[int, ...]
    codec: str
    layout: str
    retention: Retention | None


def save_chat(
    path: Path,
    model: Model,
    messages: Sequence[Mapping[str, Any]],
    cache: Cache,
    token_ids: Sequence[int],
) -> None:
    """Write a conversation: all of it, or nothing.

    Raises:
        CacheError: it cannot be written; an old file stays.
    """
    try:
        with TemporaryDirectory(dir=path.parent, prefix=f".{path.name}.") as directory:
            part = Path(directory) / "cache"
            save_cache(cast(Saveable, cache), part, tokens=[token_ids], **_fingerprints(model))
            with open_file(part, "a saved cache") as file:
                tensors = {name: file.get_tensor(name) for name in file.keys()}  # noqa: SIM118
                metadata = {**file.metadata(), _MESSAGES: json.dumps([*messages])}
                write_file(path, tensors, metadata)
    except OSError as error:
        raise CacheError(f"{path} cannot be written: {error.strerror or error}") from error


def saved_chat(path: Path) -> SavedChat:
    """What a file says, without its cache.

    Raises:
        CacheError: no file, no conversation in it, or it is damaged.
    """
    saved = saved_cache(path)
    with open_file(path, "a saved conversation") as file:
        written = file.metadata().get(_MESSAGES)
    if written is None or len(saved.tokens) != 1:
        raise CacheError(f"{path} holds a cache, but no conversation")
    try:
        messages = json.loads(written)
        messages = normalise_messages(messages) if messages else []
    except (ValueError, RequestError) as error:
        raise CacheError(f"{path} is damaged: {error}") from error
    return SavedChat(
        messages=tuple(messages),
        token_ids=saved.tokens[0],
        codec=saved.codec,
        layout=saved.layout,
        retention=None if isinstance(saved.retention, KeepAll) else saved.retention,
    )


def load_chat(path: Path, model: Model, cache: Cache) -> None:
    """Fill an empty cache, made as `saved_chat` says.

    Raises:
        CacheError: it is of another model, tokenizer or codec, or damaged; the cache is empty then.
    """
    load_cache(path, cast(Saveable, cache), **_fingerprints(model))


def _fingerprints(model: Model) -> dict[str, str]:
    return {"model": model.fingerprint, "tokenizer": model.require_tokenizer().fingerprint}
