"""The page in the package is the one that its sources make."""

import hashlib
import json
from pathlib import Path

import pytest

from kvist.server.page import STATIC

WEB = Path(__file__).parents[2] / "web"
SKIPPED = {"node_modules", "README.md"}


def sources(folder: Path) -> list[Path]:
    found = []
    for path in folder.iterdir():
        if path.name in SKIPPED or path.name.startswith("."):
            continue
        found += sources(path) if path.is_dir() else [path]
    return found


@pytest.mark.skipif(not WEB.exists(), reason="the page's sources are not in this distribution")
def test_the_committed_build_is_that_of_the_sources() -> None:
    """As web/record.mjs writes it at the end of a build."""
    digest = hashlib.sha256()
    for name in sorted(path.relative_to(WEB).as_posix() for path in sources(WEB)):
        content = hashlib.sha256((WEB / name).read_bytes()).hexdigest()
        digest.update(f"{name} {content}\n".encode())
    built = json.loads((STATIC / "build.json").read_text())
    assert built["sources"] == digest.hexdigest(), "the page is stale: run `make web`, commit both"
