"""From what a user calls a model to a path on this machine.

Names are tried in a fixed order: what exists on disk, what `kvist pull` fetched, then the Hugging
Face hub through its own library, whose offline mode, token and cache hold. Opening what is found
is `checkpoint`'s business. Imports no torch, so that the command line starts fast.
"""

import difflib
import errno
import os
import re
from pathlib import Path

from kvist.errors import CheckpointError, DownloadError, KvistError, ModelNotFound
from kvist.loading.known import KNOWN

__all__ = ["download_snapshot", "is_hub_id", "models_dir", "pulled_path", "resolve", "unknown_name"]

# No pickles, and no second copy of the weights in a subdirectory or in the maker's own format.
_ALLOW = ["*.json", "*.jinja"]
_WEIGHTS = ["*.safetensors"]
_IGNORE = ["*/*", "consolidated*.safetensors"]

_HUB_ID = re.compile(r"[A-Za-z0-9][\w.-]*/[\w.-]+", re.ASCII)


def models_dir() -> Path:
    """Where pulled models live: $KVIST_HOME/models, else in the user's cache directory."""
    if home := os.environ.get("KVIST_HOME"):
        return Path(home).expanduser() / "models"
    cache = os.environ.get("XDG_CACHE_HOME")
    return (Path(cache) if cache else Path.home() / ".cache") / "kvist" / "models"


def pulled_path(name: str, directory: Path | None = None) -> Path | None:
    """The file of a known model, if it is here in full size; None otherwise."""
    source = KNOWN[name]
    path = (directory or models_dir()) / name / source.filename
    try:
        return path if path.stat().st_size == source.nbytes else None
    except OSError:
        return None


def is_hub_id(name: str) -> bool:
    """Whether a name has the hub's form, "organisation/model"."""
    return _HUB_ID.fullmatch(name) is not None


def resolve(name_or_path: str, *, weights: bool = True) -> Path:
    """Find a model: an existing path, a pulled name, or a hub id, in this order.

    Only a hub id causes a download (into the hub library's cache); a known name that is not here
    is left for the user to pull.

    Args:
        name_or_path: what the user calls the model.
        weights: False fetches a hub id's configuration and tokenizer alone.

    Returns:
        What `open_checkpoint` takes, or refuses if it is a file of another kind.

    Raises:
        ModelNotFound: nothing of this name, with the nearest name or the command that helps.
        DownloadError: the hub has it, but it could not be fetched.
        CheckpointError: the hub has it, but only as pickles.
    """
    try:
        path = Path(name_or_path).expanduser()
        exists = bool(name_or_path) and path.exists()
    except (OSError, RuntimeError):  # too long a name, or ~nobody
        raise unknown_name(name_or_path) from None
    if exists:
        return path
    if name_or_path in KNOWN:
        pulled = pulled_path(name_or_path)
        if pulled is None:
            raise ModelNotFound(
                f"{name_or_path} is not on this machine; run `kvist pull {name_or_path}`"
            )
        return pulled
    looks_like_path = name_or_path.startswith((".", "/", "~")) or path.suffix == ".gguf"
    if looks_like_path:
        raise ModelNotFound(f"{name_or_path}: no such file or directory")
    if is_hub_id(name_or_path):
        return download_snapshot(name_or_path, weights=weights)
    raise unknown_name(name_or_path)


def unknown_name(name: str) -> ModelNotFound:
    """The error for a name that means nothing, with the nearest one that does."""
    nearest = difflib.get_close_matches(name.lower(), KNOWN, n=1, cutoff=0.5)
    hint = f"Did you mean {nearest[0]}?" if nearest else f"Known are {', '.join(KNOWN)}."
    return ModelNotFound(
        f"no model {name!r}. {hint} A directory, a .gguf file or a hub id such as "
        "HuggingFaceTB/SmolLM2-135M-Instruct will do as well."
    )


def download_snapshot(repo_id: str, *, local_dir: Path | None = None, weights: bool = True) -> Path:
    """A hub repository's config, tokenizer and safetensors, from the cache where it is complete.

    Args:
        repo_id: "organisation/model".
        local_dir: put plain files there instead of into the hub library's cache.
        weights: False leaves the safetensors where they are.

    Raises:
        ModelNotFound: the hub has no such repository, or offline mode finds none in the cache.
        DownloadError: it is gated, the network failed, or the disk is full.
    """
    import huggingface_hub

    try:
        snapshot = huggingface_hub.snapshot_download(
            repo_id,
            allow_patterns=[*(_WEIGHTS if weights else ()), *_ALLOW],
            ignore_patterns=_IGNORE,
            local_dir=local_dir,
        )
    # The library raises its own errors and, by version, those of requests or httpx or the system:
    # whatever it was, the user gets one line.
    except Exception as error:
        raise _explain(repo_id, local_dir, error) from error
    path = Path(snapshot)
    if weights and not any(path.glob("*.safetensors")):
        raise CheckpointError(
            f"{repo_id} has no safetensors files, and kvist reads no pickled weights (.bin, .pt); "
            "look for a converted copy"
        )
    return path


def _explain(repo_id: str, local_dir: Path | None, error: Exception) -> KvistError:
    from huggingface_hub import constants, errors

    if isinstance(error, errors.GatedRepoError):
        return DownloadError(
            f"{repo_id} is gated: accept its terms at {constants.ENDPOINT}/{repo_id}, then set "
            "HF_TOKEN to your token"
        )
    if isinstance(error, errors.RepositoryNotFoundError):
        return ModelNotFound(
            f"the hub has no model {repo_id!r}, or it is private: check the name, or set HF_TOKEN"
        )
    if isinstance(error, errors.HFValidationError):
        return ModelNotFound(f"{repo_id!r} is not a hub id ({_first_line(error)})")
    if isinstance(error, errors.HfHubHTTPError):
        return DownloadError(f"{repo_id}: the hub refused ({_first_line(error)}); try again later")
    if constants.HF_HUB_OFFLINE:
        return ModelNotFound(
            f"{repo_id} is not in the local cache and HF_HUB_OFFLINE is set; unset it to download"
        )
    if isinstance(error, OSError) and (error.filename or error.errno == errno.ENOSPC):
        where = error.filename or local_dir or constants.HF_HUB_CACHE
        return DownloadError(f"{repo_id} could not be written to {where}: {error.strerror}")
    return DownloadError(
        f"{repo_id} is not in the local cache and the hub could not be reached "
        f"({_first_line(error.__cause__ or error)}); check the network and try again"
    )


def _first_line(error: BaseException) -> str:
    lines = str(error).strip().splitlines()
    return lines[0] if lines else type(error).__name__
