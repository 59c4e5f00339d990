"""A name leads to a path, or to one line that says what to do."""

from pathlib import Path
from types import SimpleNamespace
from typing import Any

import huggingface_hub
import pytest
from huggingface_hub import constants, errors

from kvist.errors import CheckpointError, DownloadError, KvistError, ModelNotFound
from kvist.loading import hub
from kvist.loading.hub import models_dir, resolve
from kvist.loading.known import KNOWN, PullSource

NAME = "smollm2-135m"


@pytest.fixture(autouse=True)
def own_home(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    home = tmp_path / "kvist-home"
    monkeypatch.setenv("KVIST_HOME", str(home))
    return home


@pytest.fixture
def snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> SimpleNamespace:
    """Stands for the hub: returns a directory, or raises `error`; keeps the call's arguments."""
    fake = SimpleNamespace(error=None, path=tmp_path / "snapshot", call=None)
    fake.path.mkdir()
    (fake.path / "model.safetensors").touch()

    def snapshot_download(repo_id: str, **options: Any) -> str:
        fake.call = (repo_id, options)
        if fake.error is not None:
            raise fake.error
        return str(fake.path)

    monkeypatch.setattr(huggingface_hub, "snapshot_download", snapshot_download)
    return fake


def http_error(kind: type[Exception], message: str) -> Exception:
    """An error of the hub library without the HTTP response that its constructor asks for."""
    error = kind.__new__(kind)
    Exception.__init__(error, message)
    return error


def test_models_live_below_kvist_home_else_in_the_cache(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    assert models_dir() == tmp_path / "kvist-home" / "models"
    monkeypatch.delenv("KVIST_HOME")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "xdg"))
    assert models_dir() == tmp_path / "xdg" / "kvist" / "models"
    monkeypatch.delenv("XDG_CACHE_HOME")
    monkeypatch.setenv("HOME", str(tmp_path))
    assert models_dir() == tmp_path / ".cache" / "kvist" / "models"


def test_an_existing_directory_or_file_is_itself(tmp_path: Path) -> None:
    file = tmp_path / "model.gguf"
    file.touch()
    assert resolve(str(tmp_path)) == tmp_path
    assert resolve(str(file)) == file


def test_a_directory_wins_over_a_hub_id_of_the_same_name(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path, snapshot: SimpleNamespace
) -> None:
    (tmp_path / "org" / "name").mkdir(parents=True)
    monkeypatch.chdir(tmp_path)
    assert resolve("org/name") == Path("org/name")
    assert snapshot.call is None


def test_a_configuration_alone_needs_no_weights(snapshot: SimpleNamespace) -> None:
    (snapshot.path / "model.safetensors").unlink()
    assert resolve("org/name", weights=False) == snapshot.path
    assert not any("safetensors" in pattern for pattern in snapshot.call[1]["allow_patterns"])
    with pytest.raises(CheckpointError, match="no safetensors"):
        resolve("org/name")


def test_a_home_directory_is_expanded(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    monkeypatch.setenv("HOME", str(tmp_path))
    (tmp_path / "mine").mkdir()
    assert resolve("~/mine") == tmp_path / "mine"


def test_a_known_name_that_was_not_pulled_says_how_to_pull_it() -> None:
    with pytest.raises(ModelNotFound, match=f"run `kvist pull {NAME}`"):
        resolve(NAME)


def test_a_known_name_that_was_pulled_is_its_file(
    monkeypatch: pytest.MonkeyPatch, own_home: Path
) -> None:
    monkeypatch.setitem(KNOWN, NAME, PullSource("tiny.gguf", nbytes=4, sha256="", ways=()))
    file = own_home / "models" / NAME / "tiny.gguf"
    file.parent.mkdir(parents=True)
    file.write_bytes(b"GGU")
    with pytest.raises(ModelNotFound):  # another size: half a file, or an older one
        resolve(NAME)
    file.write_bytes(b"GGUF")
    assert resolve(NAME) == file


@pytest.mark.parametrize("typo", ["smollm2", "smolm2-135m", "SmolLM2-135M", "smollm-135"])
def test_a_typo_gets_the_nearest_name(typo: str) -> None:
    with pytest.raises(ModelNotFound, match=f"no model '{typo}'. Did you mean {NAME}\\?"):
        resolve(typo)


@pytest.mark.parametrize("name", ["", "qqq", "x" * 5000, "a/b/c", "~nobody-of-this-name/x"])
def test_a_name_that_means_nothing_gets_one_line(name: str) -> None:
    with pytest.raises(ModelNotFound) as caught:
        resolve(name)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("path", ["./missing", "/missing/model", "missing.gguf", "a/b.gguf"])
def test_what_looks_like_a_path_is_not_looked_up_on_the_hub(
    path: str, snapshot: SimpleNamespace
) -> None:
    with pytest.raises(ModelNotFound, match="no such file or directory"):
        resolve(path)
    assert snapshot.call is None


def test_a_hub_id_is_downloaded_without_pickles(snapshot: SimpleNamespace) -> None:
    assert resolve("org/name") == snapshot.path
    repo_id, options = snapshot.call
    assert repo_id == "org/name"
    assert options["allow_patterns"] == ["*.safetensors", "*.json", "*.jinja"]
    assert "*/*" in options["ignore_patterns"]


def test_a_hub_model_of_pickles_only_is_refused(snapshot: SimpleNamespace) -> None:
    (snapshot.path / "model.safetensors").unlink()
    with pytest.raises(CheckpointError, match="org/name has no safetensors"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("error", "kind", "says"),
    [
        (
            http_error(errors.RepositoryNotFoundError, "404 Client Error\nmore"),
            ModelNotFound,
            "the hub has no model 'org/name', or it is private",
        ),
        (
            http_error(errors.GatedRepoError, "403 Client Error\nmore"),
            DownloadError,
            "org/name is gated: accept its terms at .*/org/name, then set HF_TOKEN",
        ),
        (
            http_error(errors.HfHubHTTPError, "503 Server Error\nmore"),
            DownloadError,
            r"the hub refused \(503 Server Error\)",
        ),
        (
            errors.LocalEntryNotFoundError("An error happened\nmore"),
            DownloadError,
            "org/name is not in the local cache and the hub could not be reached",
        ),
        (
            ConnectionError("Name or service not known"),
            DownloadError,
            r"could not be reached \(Name or service not known\)",
        ),
        (OSError(28, "No space left on device"), DownloadError, "No space left on device"),
        (PermissionError(13, "Permission denied", "/x"), DownloadError, "/x: Permission denied"),
        (RuntimeError(), DownloadError, "RuntimeError"),
    ],
)
def test_the_hubs_errors_become_one_line_with_the_remedy(
    snapshot: SimpleNamespace, error: Exception, kind: type[KvistError], says: str
) -> None:
    snapshot.error = error
    with pytest.raises(kind, match=says) as caught:
        resolve("org/name")
    assert "\n" not in str(caught.value)


def test_offline_mode_is_named_as_the_reason(
    monkeypatch: pytest.MonkeyPatch, snapshot: SimpleNamespace
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    snapshot.error = errors.LocalEntryNotFoundError("not cached")
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE is set; unset it"):
        resolve("org/name")


def test_the_real_library_offline_gives_the_same_line(
    monkeypatch: pytest.MonkeyPatch, tmp_path: Path
) -> None:
    monkeypatch.setattr(constants, "HF_HUB_OFFLINE", True)
    monkeypatch.setattr(constants, "HF_HUB_CACHE", str(tmp_path / "empty-cache"))
    with pytest.raises(ModelNotFound, match="HF_HUB_OFFLINE"):
        resolve("org/name")


@pytest.mark.parametrize(
    ("name", "is_one"),
    [
        ("Qwen/Qwen3-0.6B", True),
        ("HuggingFaceTB/SmolLM2-135M-Instruct", True),
        ("smollm2-135m", False),
        ("a/b/c", False),
        ("/absolute", False),
        ("org/", False),
        ("org/näme", False),
    ],
)
def test_hub_ids_have_an_organisation_and_a_name(name: str, is_one: bool) -> None:
    assert hub.is_hub_id(name) is is_one
