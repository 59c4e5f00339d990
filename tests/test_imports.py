"""Imports go one way, the core is standard library only, and what is heavy is imported when needed.

All imports count, those inside functions and under `TYPE_CHECKING` too: a type that only a checker
sees is still something that a reader has to know.
"""

import ast
import re
import subprocess
import sys
import tomllib
from collections.abc import Iterator
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]
SOURCE = ROOT / "src"

# The house, from the ground up: a room may import from the floors below its own. A room is a
# package or a module directly under `kvist`; rooms of one floor know nothing of each other.
FLOORS = (
    {"errors"},
    {"core", "text"},
    {"cache", "kernels"},
    {"attention"},
    {"models"},
    {"runner"},
    {"native", "parallel"},
    {"loading"},
    {"grammar", "sample"},
    {"beam"},
    {"prepare"},
    {"embed", "generate"},
    {"chat", "engine"},
    {"prefixes"},
    {"prefixes", "serving"},
    {"llm", "async_engine"},
    {"reports", "integrations"},
    {"server"},
    {"loadgen"},
    {"cli"},
    {"__main__"},
)
FLOOR = {room: floor for floor, rooms in enumerate(FLOORS) for room in rooms}

# Libraries that may be imported at the head of a module, and where. All others cost time that
# `import kvist` or `kvist --help` would pay, so functions import them.
AT_THE_HEAD = {
    "torch": ("kvist.",),
    "numpy": ("kvist.",),
    "typer": ("kvist.cli.",),
    "triton": ("kvist.attention.kernels.", "kvist.kernels."),
    "fastapi": ("kvist.server.",),
    "prometheus_client": ("kvist.server.",),
    "pydantic": ("kvist.server.",),
    "starlette": ("kvist.server.",),
    "uvicorn": ("kvist.server.",),
    # Modules that functions import when they need what these libraries do.
    "jinja2": ("kvist.text.sandbox",),
    "markdown_it": ("kvist.cli.markdown",),
    "rich": ("kvist.cli.markdown",),
}

# Packages whose name is not that of the module, and what comes with another package.
DISTRIBUTIONS = {"PIL": "pillow", "prometheus_client": "prometheus-client"}
COMES_WITH = {"triton": "torch", "cuda": "torch", "markdown_it": "rich", "starlette": "fastapi"}


@dataclass(frozen=True)
class Import:
    """One import statement's target, and where it stands."""

    module: str
    target: str
    line: int
    at_the_head: bool

    @property
    def place(self) -> str:
        return f"{self.module}, line {self.line}, imports {self.target}"

    @property
    def library(self) -> str:
        return self.target.split(".")[0]


def room_of(module: str) -> str:
    return module.split(".")[1] if "." in module else ""


def _is_type_checking(node: ast.AST) -> bool:
    return isinstance(node, ast.If) and ast.unparse(node.test).endswith("TYPE_CHECKING")


def _imports(module: str, node: ast.AST, at_the_head: bool = True) -> Iterator[Import]:
    for child in ast.iter_child_nodes(node):
        function = isinstance(child, ast.FunctionDef | ast.AsyncFunctionDef)
        later = function or _is_type_checking(child)
        if isinstance(child, ast.Import):
            for name in child.names:
                yield Import(module, name.name, child.lineno, at_the_head)
        elif isinstance(child, ast.ImportFrom):
            assert child.level == 0, f"{module}: imports are absolute"
            for name in child.names:  # `from kvist import errors` is an import of kvist.errors
                target = f"kvist.{name.name}" if child.module == "kvist" else str(child.module)
                yield Import(module, target, child.lineno, at_the_head)
        else:
            yield from _imports(module, child, at_the_head and not later)


@cache
def all_imports() -> tuple[Import, ...]:
    found: list[Import] = []
    for path in sorted(SOURCE.rglob("*.py")):
        parts = path.relative_to(SOURCE).with_suffix("").parts
        module = ".".join(parts[:-1] if parts[-1] == "__init__" else parts)
        found += _imports(module, ast.parse(path.read_text(encoding="utf-8")))
    return tuple(found)


def modules_in(*rooms: str) -> list[str]:
    return sorted({i.module for i in all_imports() if room_of(i.module) in rooms})


def test_every_room_has_its_floor() -> None:
    rooms = {room_of(i.module) for i in all_imports()} - {""}
    assert rooms <= FLOOR.keys(), "say in FLOORS where it stands"


def test_imports_go_down() -> None:
    inside = [i for i in all_imports() if i.library == "kvist" and room_of(i.module)]
    wrong = [
        i.place
        for i in inside
        if {room_of(i.module), room_of(i.target)} <= FLOOR.keys()
        and room_of(i.module) != room_of(i.target)
        and FLOOR[room_of(i.module)] <= FLOOR[room_of(i.target)]
    ]
    assert len(inside) > 100
    assert wrong == []


def test_the_core_imports_the_standard_library_only() -> None:
    wrong = [
        i.place
        for i in all_imports()
        if room_of(i.module) == "core"
        and i.library not in sys.stdlib_module_names
        and room_of(i.target) not in ("core", "errors")
    ]
    assert wrong == []


def test_errors_import_nothing() -> None:
    assert [i.place for i in all_imports() if i.module == "kvist.errors"] == []


def test_libraries_are_imported_inside_functions() -> None:
    wrong = [
        i.place
        for i in all_imports()
        if i.at_the_head
        and i.library != "kvist"
        and i.library not in sys.stdlib_module_names
        and not (i.library in AT_THE_HEAD and i.module.startswith(AT_THE_HEAD[i.library]))
    ]
    assert wrong == []


def test_every_library_is_declared() -> None:
    project = tomllib.loads((ROOT / "pyproject.toml").read_text())["project"]
    extras = project["optional-dependencies"]
    declared = [*project["dependencies"], *(r for e in extras if e != "dev" for r in extras[e])]
    names = {re.split(r"[^\w.-]", requirement)[0] for requirement in declared}
    used = {i.library for i in all_imports()} - {"kvist"} - sys.stdlib_module_names
    used = {COMES_WITH.get(library, library) for library in used}
    assert {DISTRIBUTIONS.get(library, library) for library in used} <= names


@pytest.mark.parametrize(
    "rooms",
    [("errors", "core"), ("text",)],
    ids="_and_".join,
)
def test_whole_rooms_come_without_torch(rooms: tuple[str, ...]) -> None:
    """Not only by what their own files say: nothing that they import imports it either."""
    code = (
        "import importlib, sys\n"
        f"for name in {modules_in(*rooms)!r}: importlib.import_module(name)\n"
        "print(*sorted({'torch', 'numpy', 'transformers'} & sys.modules.keys()))"
    )
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (child.stdout.split(), child.stderr) == ([], "")
