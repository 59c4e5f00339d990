"""Starting up costs next to nothing: what is heavy is not imported before it is needed.

What is measured is what was imported, not the clock, which depends on the machine.
"""

import subprocess
import sys

import pytest

from tiny_models import FIXTURES

TINY = FIXTURES / "qwen3" / "dense_tied"
HEAVY = {
    "torch",
    "numpy",
    "transformers",
    "tokenizers",
    "safetensors",
    "gguf",
    "huggingface_hub",
    "jinja2",
    "PIL",
}


def imported_by(code: str) -> set[str]:
    """The heavy libraries, and those of the command line, that are there after some code ran."""
    report = (
        f"import sys\n{code}\n"
        f"print('imported:', *sorted({HEAVY | {'typer', 'rich'}!r} & sys.modules.keys()))"
    )
    child = subprocess.run(
        [sys.executable, "-c", report], capture_output=True, text=True, check=False
    )
    assert child.returncode == 0, child.stderr
    return set(child.stdout.rpartition("imported:")[2].split())


def test_importing_kvist_imports_nothing_heavy() -> None:
    assert imported_by("import kvist") == set()


def test_plain_data_comes_without_torch() -> None:
    code = "import kvist; kvist.SamplingParams(temperature=0); kvist.Result; kvist.SlidingWindow(4)"
    assert imported_by(code) == set()


def test_pulling_needs_no_torch() -> None:
    assert imported_by("import kvist; kvist.pull") == set()


@pytest.mark.parametrize("arguments", [["--help"], ["--version"], ["generate", "--help"], []])
def test_help_is_shown_without_anything_heavy(arguments: list[str]) -> None:
    code = (
        "from kvist.cli.app import main\n"
        f"sys.argv = ['kvist', *{arguments!r}]\n"
        "try: main()\n"
        "except SystemExit: pass"
    )
    assert imported_by(code) & HEAVY == set()


def test_a_wrong_option_is_refused_before_anything_heavy() -> None:
    code = (
        "from kvist.cli.app import main\n"
        "sys.argv = ['kvist', 'generate', 'x', '--no-such-option']\n"
        "try: main()\n"
        "except SystemExit as end: assert end.code == 2"
    )
    assert imported_by(code) & HEAVY == set()


def test_a_model_loads_and_answers_without_torchs_compiler() -> None:
    """It takes longer to import than a small model to load, and is asked for by accident easily."""
    code = (
        "import kvist\n"
        f"model = kvist.load({str(TINY)!r})\n"
        "kvist.generate(model, ['Hi'], kvist.SamplingParams(temperature=1.0, max_tokens=2))\n"
        "assert 'torch._dynamo' not in sys.modules"
    )
    assert imported_by(code) & {"transformers", "gguf", "huggingface_hub", "jinja2"} == set()
