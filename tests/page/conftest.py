"""Says loudly where the page's tests had no browser."""

import pytest
from chromium import CHROMIUM

_skipped = pytest.StashKey[int]()


def pytest_collection_modifyitems(config: pytest.Config, items: list[pytest.Item]) -> None:
    wanting = [item for item in items if "browser" in getattr(item, "fixturenames", ())]
    if wanting and not CHROMIUM:
        config.stash[_skipped] = len(wanting)
        for item in wanting:
            item.add_marker(pytest.mark.skip(reason="no chromium: apt-get install chromium"))


def pytest_terminal_summary(terminalreporter: pytest.TerminalReporter) -> None:
    if count := terminalreporter.config.stash.get(_skipped, 0):
        terminalreporter.section("NO BROWSER", yellow=True)
        terminalreporter.line(
            f"{count} tests of the page were skipped; `apt-get install chromium` to have them."
        )
