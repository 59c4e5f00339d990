"""The public names: all there, kept, and the same whatever was imported first."""

import ast
import importlib
import inspect
import subprocess
import sys
from dataclasses import fields
from pathlib import Path

import pytest

import kvist
from kvist import errors

# Names that users write. One may be added; taking one away breaks somebody's program.
PUBLIC = {
    "Delta",
    "KeepAll",
    "KvistError",
    "Model",
    "Result",
    "SamplingParams",
    "SlidingWindow",
    "__version__",
    "generate",
    "load",
    "make_cache",
    "pull",
    "stream",
}


def test_public_names_are_kept() -> None:
    assert set(kvist.__all__) >= PUBLIC
    assert sorted(kvist.__all__) == dir(kvist)


def test_every_public_name_is_there() -> None:
    for name in kvist.__all__:
        assert getattr(kvist, name) is not None
    namespace: dict[str, object] = {}
    exec("from kvist import *", namespace)
    assert namespace.keys() >= set(kvist.__all__)


def test_what_type_checkers_see_is_what_is_imported() -> None:
    """The names under TYPE_CHECKING, the table of lazy imports, and `__all__` agree."""
    source = ast.parse(Path(kvist.__file__).read_text(encoding="utf-8"))
    blocks = [node for node in source.body if isinstance(node, ast.If)]
    seen = {
        alias.name: node.module
        for block in blocks
        for node in block.body
        if isinstance(node, ast.ImportFrom)
        for alias in node.names
    }
    assert seen == kvist._PUBLIC
    assert {*seen, "__version__"} == set(kvist.__all__)


def test_an_unknown_name_is_an_attribute_error() -> None:
    with pytest.raises(AttributeError, match="'kvist' has no attribute 'generat'"):
        kvist.generat  # noqa: B018


def test_generate_stays_the_function_whatever_is_imported_first() -> None:
    """There is a module of that name, too; Python would put it in the function's place."""
    firsts = (
        "kvist.generate",
        "kvist.stream",
        "import kvist.generate",
        "from kvist.generate import decode",
        "import kvist.cli.generate",
        "import importlib; importlib.import_module('kvist.generate')",
    )
    code = f"""
import sys, torch
for first in {firsts!r}:
    for name in [name for name in sys.modules if name.split(".")[0] == "kvist"]:
        del sys.modules[name]
    import kvist
    exec(first)
    from kvist import generate
    from kvist.generate import stream
    assert callable(kvist.generate) and kvist.generate is generate, first
    assert kvist.stream is stream, first
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    assert (child.returncode, child.stderr) == (0, "")


def test_parameters_are_kept() -> None:
    def names(function: object) -> list[str]:
        return list(inspect.signature(function).parameters)  # type: ignore[arg-type]

    assert names(kvist.load)[:3] == ["path_or_name", "dtype", "device"]
    assert names(kvist.generate)[:5] == ["model", "prompts", "params", "cache", "codec"]
    assert names(kvist.stream)[:5] == ["model", "prompt", "params", "cache", "codec"]
    defaults = {n: p.default for n, p in inspect.signature(kvist.generate).parameters.items()}
    assert (defaults["params"], defaults["cache"], defaults["codec"]) == (None, "dynamic", "plain")
    assert [field.name for field in fields(kvist.SamplingParams)][:18] == [
        "temperature",
        "top_k",
        "top_p",
        "min_p",
        "max_tokens",
        "min_tokens",
        "stop",
        "stop_token_ids",
        "ignore_eos",
        "seed",
        "n",
        "logprobs",
        "prompt_logprobs",
        "repetition_penalty",
        "presence_penalty",
        "frequency_penalty",
        "logit_bias",
        "num_beams",
    ]
    results = {field.name for field in fields(kvist.Result)}
    assert results >= {"text", "token_ids", "logprobs", "finish_reason", "usage", "timings"}


def test_everything_that_a_package_exports_is_there() -> None:
    root = Path(kvist.__file__).parent
    for path in root.rglob("*.py"):
        name = ".".join(("kvist", *path.relative_to(root).with_suffix("").parts))
        if "__all__" not in path.read_text(encoding="utf-8") or ".kernels." in name:
            continue  # kernels need Triton
        module = importlib.import_module(name.removesuffix(".__init__"))
        missing = [export for export in module.__all__ if not hasattr(module, export)]
        assert missing == [], name


def test_every_error_is_one_of_the_family_and_says_what_it_is_for() -> None:
    for name in errors.__all__:
        error = getattr(errors, name)
        assert issubclass(error, kvist.KvistError)
        assert inspect.getdoc(error)


def test_the_version_is_the_packages() -> None:
    from importlib.metadata import version

    assert kvist.__version__ == version("kvist")
