"""Safetensors files that hold a cache: written all at once or not at all, read with clear errors.

What is in them is the business of `prefix_file` and `saved`.
"""

import os
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from torch import Tensor

from kvist.errors import CacheError


def write_file(path: Path, tensors: dict[str, Tensor], metadata: dict[str, str]) -> None:
    """Write beside the path, then put in place: a reader sees the old file or the new one.

    Raises:
        CacheError: it cannot be written; nothing is left behind, and an old file stays.
    """
    from safetensors import SafetensorError
    from safetensors.torch import save_file

    partial = None
    try:
        with tempfile.NamedTemporaryFile(dir=path.parent, prefix=path.name, delete=False) as file:
            partial = Path(file.name)
        save_file(tensors, partial, metadata)
        with partial.open("rb") as written:
            os.fsync(written.fileno())
        partial.replace(path)
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be written: {error}") from error
    finally:
        if partial is not None:
            partial.unlink(missing_ok=True)


@contextmanager
def open_file(path: Path, what: str) -> Iterator[Any]:
    """The opened file, as safetensors gives it; `what` it is meant to be, for the error.

    Raises:
        CacheError: there is none, or it is damaged; names the file.
    """
    from safetensors import SafetensorError, safe_open

    try:
        with safe_open(path, framework="pt") as file:
            yield file
    except FileNotFoundError as error:
        raise CacheError(f"{path}: no such file") from error
    except (OSError, SafetensorError) as error:
        raise CacheError(f"{path} cannot be read as {what}: {error}") from error
