"""The chat on the command line: lines in, answers and commands out, on a terminal and in a pipe."""

import fcntl
import io
import os
import pty
import re
import select
import signal
import subprocess
import sys
import termios
import time
from collections.abc import Callable, Iterator
from itertools import pairwise
from pathlib import Path

import pytest
from hypothesis import given
from hypothesis import strategies as st
from rich.console import Console
from torch import Tensor

import kvist
from kvist.cache import CODECS, LAYOUTS, Batch, KVCache
from kvist.chat import Conversation
from kvist.cli import screen
from kvist.cli.app import main
from kvist.cli.markdown import AnswerMarkdown, split_blocks
from kvist.cli.repl import Repl, _joined
from kvist.cli.screen import PlainScreen, RichScreen, Screen
from kvist.loading.model import Model
from kvist.runner.step import model_step
from kvist.text.thinking import Piece
from tiny_models import FIXTURES

TINY = str(FIXTURES / "qwen3" / "dense_tied")
GREEDY = kvist.SamplingParams(temperature=0, max_tokens=10)
SHORT = ("--greedy", "--max-tokens", "10")
CUT = "cut off after 10 tokens; --max-tokens sets the limit\n"

Chat = Callable[..., tuple[str, str]]


@pytest.fixture
def chat(monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]) -> Chat:
    """Run `kvist chat` on the tiny model with some lines of input; its output and remarks.

    That an answer was cut off after ten tokens is not among them.
    """

    def run(*lines: str, options: tuple[str, ...] = SHORT, status: int = 0) -> tuple[str, str]:
        monkeypatch.setattr(sys, "argv", ["kvist", "chat", TINY, *options])
        monkeypatch.setattr(sys, "stdin", io.StringIO("".join(f"{line}\n" for line in lines)))
        with pytest.raises(SystemExit) as end:
            main()
        captured = capsys.readouterr()
        assert (end.value.code or 0) == status, captured.err
        return captured.out, captured.err.replace(CUT, "")

    return run


def answers(model: Model, *sayings: str, system: str | None = None) -> str:
    """What the same conversation gives without a command line, one answer after the other."""
    conversation = Conversation(model, system=system)
    texts = ("".join(d.text for d in conversation.say(text, GREEDY)) for text in sayings)
    return "".join(f"{text}\n" for text in texts)


def test_in_a_pipe_the_answers_are_all_that_is_printed(model: Model, chat: Chat) -> None:
    out, err = chat("Hello", "And now?")
    assert out == answers(model, "Hello", "And now?")
    assert err == ""


def test_options_reach_the_conversation(model: Model, chat: Chat) -> None:
    options = (*SHORT, "--system", "Be brief.", "--cache", "static", "--context", "1k")
    out, err = chat("Hello", "/stats", options=options)
    assert out.startswith(answers(model, "Hello", system="Be brief."))
    assert "static, plain, all kept" in out
    assert "of 1,024 tokens" in out
    assert err == ""


def test_a_window_is_told_in_the_stats(chat: Chat) -> None:
    out, _ = chat("/stats", options=(*SHORT, "--window", "64", "--sinks", "4"))
    assert "the last 64 tokens and the first 4 kept" in out
    assert "0 of 1,024 tokens (0%)" in out


def test_undo_and_reset_go_back(model: Model, chat: Chat) -> None:
    out, err = chat("Hello", "/undo", "Hello", "/reset", "Hello")
    assert out == answers(model, "Hello") * 3
    assert err.splitlines() == ["took back 'Hello'", "a new conversation"]


def test_the_system_message_is_shown_set_and_taken_away(model: Model, chat: Chat) -> None:
    out, err = chat("/system", "/system Be brief.", "Hello", "/system -")
    assert out == answers(model, "Hello", system="Be brief.")
    assert err.splitlines() == ["system: none", "system: Be brief.", "system: none"]


def test_nothing_is_left_to_take_back(chat: Chat) -> None:
    assert chat("/undo") == ("", "nothing to take back\n")


@pytest.mark.parametrize(
    ("line", "error"),
    [
        ("/udno", "there is no command /udno; did you mean /undo? /help lists them"),
        ("/images x.png", "there is no command /images; did you mean /image? /help lists them"),
        ("/image x.png", "takes no pictures; it reads text alone"),
        ("/", "there is no command /; /help lists them"),
        ("/save", "/save needs FILE: /save FILE"),
        ("/reset all", "/reset takes nothing behind it, not 'all'"),
        ("/load /nowhere", "/nowhere"),
    ],
)
def test_a_wrong_command_says_so_and_the_chat_goes_on(
    model: Model, chat: Chat, line: str, error: str
) -> None:
    out, err = chat(line, "Hello")
    assert err.startswith("error: ")
    assert error in err
    assert len(err.splitlines()) == 1
    assert out == answers(model, "Hello")


def test_help_names_every_command(chat: Chat) -> None:
    out, _ = chat("/help")
    for name in ("stats", "undo", "reset", "system", "save", "load", "exit", "help"):
        assert f"/{name}" in out
    assert max(map(len, out.splitlines())) <= 80


def test_exit_leaves_at_once(chat: Chat) -> None:
    assert chat("/exit", "Hello") == ("", "")


def test_two_slashes_say_one(model: Model, chat: Chat) -> None:
    assert chat("//reset")[0] == answers(model, "/reset")


def test_empty_lines_say_nothing(chat: Chat) -> None:
    assert chat("", "   ") == ("", "")


def test_a_message_may_have_several_lines() -> None:
    lines = iter(['"""one', "", "two", '"""', "three", '"""four"""', '"""five', "six"])
    assert list(_joined(lines)) == ["one\n\ntwo", "three", "four", "five\nsix"]


def test_a_full_context_says_what_to_do(chat: Chat) -> None:
    out, err = chat("Hello", "word " * 40, options=("--greedy", "--context", "48"))
    assert "the context of 48 tokens is full: /undo or /reset, or start with a larger" in err
    assert "error: with this message the conversation takes" in err
    assert out.count("\n") >= 1


def test_a_cut_answer_names_the_limit(chat: Chat) -> None:
    _, err = chat("Hello", options=("--greedy", "--max-tokens", "3"))
    assert err == "cut off after 3 tokens; --max-tokens sets the limit\n"


@pytest.mark.parametrize(
    ("options", "error"),
    [
        (("--codec", "int3"), "no codec named 'int3'"),
        (("--cache", "heap"), "no cache layout named 'heap'"),
        (("--context", "many"), "'many' is not a number of tokens"),
        (("--context", "2m"), "context must be 1..1024 tokens"),
        (("--greedy", "--temperature", "1"), "contradict each other"),
        (("--resume", "/nowhere"), "/nowhere"),
    ],
)
def test_wrong_options_are_refused(chat: Chat, options: tuple[str, ...], error: str) -> None:
    out, err = chat(options=options, status=1)
    assert (out, error in err) == ("", True)


def test_a_saved_chat_is_gone_on_with(model: Model, chat: Chat, tmp_path: Path) -> None:
    file = str(tmp_path / "my chat")
    options = (*SHORT, "--codec", "int8", "--cache", "ring", "--system", "Be brief.")
    out, err = chat("Hello", f"/save {file}", "And now?", "/reset", f"/load {file}", "And now?",
                    options=options)  # fmt: skip
    conversation = Conversation(model, "int8", "ring", system="Be brief.")
    hello, now = (
        "".join(d.text for d in conversation.say(t, GREEDY)) for t in ("Hello", "And now?")
    )
    assert out == f"{hello}\n{now}\n{now}\n"
    assert re.search(
        r"^saved 1 turn, \d+ tokens in the cache to .*my chat \([\d.]+ KiB\)$", err, re.M
    )
    assert re.search(r"^resumed 1 turn, \d+ tokens in the cache$", err, re.M)
    out, err = chat("And now?", "/stats", options=(*SHORT, "--resume", file))
    assert out.startswith(f"{now}\n")
    assert "ring, int8, all kept" in out
    assert err.startswith("resumed 1 turn")


def test_resuming_takes_the_cache_as_it_was_saved(chat: Chat, tmp_path: Path) -> None:
    file = str(tmp_path / "chat")
    chat(f"/save {file}")
    _, err = chat(options=("--resume", file, "--codec", "int8", "--window", "64"), status=1)
    assert err == "error: --resume takes the cache as it was saved; leave out --codec, --window\n"
    _, err = chat("/system", options=("--resume", file, "--system", "Be brief."))
    assert err.splitlines()[1] == "system: Be brief."


def test_help_names_every_codec_and_layout(chat: Chat) -> None:
    out, _ = chat(options=("--help",))
    assert [name for name in (*CODECS, *LAYOUTS) if name not in out] == []


# Interrupts.


class Notes:
    """A screen that keeps what it was shown."""

    def __init__(self) -> None:
        self.notes: list[str] = []
        self.ended = 0

    def working(self, what: str) -> None: ...
    def piece(self, piece: Piece) -> None: ...
    def table(self, rows: object) -> None: ...

    def end(self) -> None:
        self.ended += 1

    def note(self, text: str) -> None:
        self.notes.append(text)

    error = note


def pressing(model: Model, *steps: int) -> Callable[[Batch, KVCache], Tensor]:
    """A step of the model during which someone presses Ctrl-C, at these counts of steps."""
    run, count = model_step(model.lm), iter(range(10_000))

    def step(batch: Batch, cache: KVCache) -> Tensor:
        if next(count) in steps:
            signal.raise_signal(signal.SIGINT)
        return run(batch, cache)

    return step


def test_ctrl_c_stops_the_answer_and_not_the_chat(model: Model) -> None:
    shown = Notes()
    conversation = Conversation(model, step=pressing(model, 4))
    before = signal.getsignal(signal.SIGINT)
    Repl(conversation, GREEDY, shown, figures=False).run(iter(["Hello", "And now?"]))
    assert shown.notes[0] == "stopped"
    assert shown.ended == 2
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"] * 2
    assert signal.getsignal(signal.SIGINT) is before


def test_ctrl_c_before_the_first_word_takes_the_message_back(model: Model) -> None:
    shown = Notes()
    conversation = Conversation(model, step=pressing(model, 0))
    Repl(conversation, GREEDY, shown, figures=False).run(iter(["x" * 600]))
    assert shown.notes == ["stopped before the first word, so your message was taken back"]
    assert conversation.messages == []


def test_a_second_ctrl_c_interrupts_a_step(model: Model) -> None:
    run, shown = model_step(model.lm), Notes()

    def twice(batch: Batch, cache: KVCache) -> Tensor:
        signal.raise_signal(signal.SIGINT)
        signal.raise_signal(signal.SIGINT)
        return run(batch, cache)

    conversation = Conversation(model, step=twice)
    Repl(conversation, GREEDY, shown).run(iter(["Hello"]))
    assert shown.notes == ["stopped"]
    assert (conversation.messages, shown.ended) == ([], 1)


# The screen.


@pytest.fixture
def always_drawn(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(screen, "_DRAW_SECONDS", 0.0)


def terminal(width: int = 80, height: int = 24) -> Console:
    return Console(
        file=io.StringIO(), force_terminal=True, width=width, height=height, color_system=None
    )


def what_stays(drawn: str) -> str:
    """What a terminal shows in the end: erased lines are gone, and so are control codes."""
    lines = [""]
    row = 0
    for part in re.split(r"(\x1b\[[0-9;?]*[A-Za-z]|\n|\r)", drawn):
        if part == "\n":
            row += 1
            if row == len(lines):
                lines.append("")
        elif part == "\r":
            pass  # what follows is erased or begins a line
        elif part == "\x1b[2K":
            lines[row] = ""
        elif up := re.fullmatch(r"\x1b\[(\d+)A", part):
            row -= int(up[1])
        elif not part.startswith("\x1b"):
            lines[row] += part
    return "\n".join(line.rstrip() for line in lines).strip("\n")


def shown(text: str, size: int, *, thinking: bool = False, width: int = 80) -> str:
    console = terminal(width)
    screen = RichScreen(console)
    screen.working("reading")
    for start in range(0, len(text), size):
        screen.piece(Piece(thinking, text[start : start + size]))
    screen.end()
    assert isinstance(console.file, io.StringIO)
    return what_stays(console.file.getvalue())


ANSWER = """Here is a list, with **bold** words and `code`:

1. one
2. two
   - nested

## A heading

```python
def f(x):
    return x  # a comment that is so long that it would not fit into a line of eighty characters
```

| a | b |
|---|---|
| 1 | 2 |

<b>as it is</b>
one line
and another
"""


@pytest.mark.usefixtures("always_drawn")
@pytest.mark.parametrize("size", [1, 7, 1000])
def test_an_answer_looks_the_same_however_it_came(size: int) -> None:
    assert shown(ANSWER, size) == shown(ANSWER, 10_000)


@pytest.mark.usefixtures("always_drawn")
def test_an_answer_is_readable_at_80_columns() -> None:
    lines = shown(ANSWER, 3).splitlines()
    assert max(map(len, lines)) <= 80
    assert lines[0] == "Here is a list, with bold words and code:"
    for line in (" 1 one", "    • nested", "A heading", "  def f(x):", "<b>as it is</b>"):
        assert line in lines
    assert lines[-2:] == ["one line", "and another"]
    assert not any(a == b == "" for a, b in pairwise(lines))


BLOCKS = st.sampled_from(
    ["a word", "# head", "- item", "1. item", "> quote", "```\ncode\n```", "    code", "---", "**b"]
)


@pytest.mark.usefixtures("always_drawn")
@given(st.lists(BLOCKS, max_size=5).map("\n\n".join), st.integers(1, 6))
def test_finished_blocks_are_never_taken_back(text: str, size: int) -> None:
    done: list[str] = []
    rest = ""
    for start in range(0, len(text), size):
        blocks, rest = split_blocks(rest + text[start : start + size])
        done += blocks
    assert "".join([*done, rest]) == text
    whole, last = split_blocks(text)
    assert [*done, rest] == [*whole, last]


@pytest.mark.usefixtures("always_drawn")
def test_a_block_longer_than_the_screen_is_whole_in_the_end() -> None:
    code = "\n".join(f"line {i}" for i in range(100))
    console = terminal(height=10)
    screen = RichScreen(console)
    screen.working("reading")
    for line in code.splitlines(keepends=True):
        screen.piece(Piece(False, line if line != "line 0\n" else "```\nline 0\n"))
    screen.end()
    assert isinstance(console.file, io.StringIO)
    final = console.file.getvalue().rpartition("\x1b[")[2]
    assert [f"  line {i}" in final for i in range(100)] == [True] * 100


def test_a_model_cannot_command_the_terminal() -> None:
    assert "\x1b]0;" not in shown("\x1b]0;title\x07 and \x9b31m text", 100)


@pytest.mark.usefixtures("always_drawn")
def test_thinking_stands_before_the_answer_indented() -> None:
    console = terminal()
    screen = RichScreen(console)
    screen.working("reading")
    for piece in (Piece(True, "First,"), Piece(True, " this.\n\nThen"), Piece(False, "Yes.")):
        screen.piece(piece)
    screen.end()
    assert isinstance(console.file, io.StringIO)
    assert what_stays(console.file.getvalue()) == "  First, this.\n\n  Then\n\nYes."


@pytest.mark.usefixtures("always_drawn")
def test_hidden_thinking_leaves_how_long_it_took() -> None:
    console = terminal()
    screen = RichScreen(console, hide_thinking=True)
    screen.working("reading")
    for piece in (Piece(True, "Secret."), Piece(False, "Yes.")):
        screen.piece(piece)
    screen.end()
    assert isinstance(console.file, io.StringIO)
    assert "Secret" not in console.file.getvalue()
    assert re.fullmatch(r"thought for 0\.\d s\n\nYes\.", what_stays(console.file.getvalue()))


@pytest.mark.parametrize(
    ("hide", "text"), [(False, "<think>\nHm.\n</think>\n\nYes.\n"), (True, "Yes.\n")]
)
def test_in_a_pipe_thinking_has_its_tags_or_is_left_out(
    capsys: pytest.CaptureFixture[str], hide: bool, text: str
) -> None:
    screen: Screen = PlainScreen(hide_thinking=hide)
    screen.working("reading")
    screen.piece(Piece(True, "Hm."))
    screen.piece(Piece(False, "Yes."))
    screen.end()
    assert capsys.readouterr().out == text


def test_markdown_keeps_the_lines_of_a_poem() -> None:
    console = terminal()
    console.print(AnswerMarkdown("Roses are red\nviolets are blue"))
    assert isinstance(console.file, io.StringIO)
    lines = [line.rstrip() for line in console.file.getvalue().split("\n")]
    assert lines[:2] == ["Roses are red", "violets are blue"]


# The whole program.


class Terminal:
    """`kvist chat` on a pseudo-terminal of 80 columns."""

    def __init__(self, *options: str) -> None:
        self.end, there = pty.openpty()
        termios.tcsetwinsize(there, (24, 80))
        self.child = subprocess.Popen(
            [sys.executable, "-m", "kvist", "chat", TINY, *SHORT, *options],
            stdin=there, stdout=there, stderr=there, start_new_session=True,
            env={**os.environ, "TERM": "xterm", "COLUMNS": "80"}, preexec_fn=_take_terminal,
        )  # fmt: skip
        os.close(there)
        self.unread = ""

    def until(self, wanted: str, seconds: float = 60) -> str:
        """Read until something appears; return what was read."""
        deadline = time.monotonic() + seconds
        while wanted not in self.unread:
            ready, _, _ = select.select([self.end], [], [], max(deadline - time.monotonic(), 0))
            assert ready, f"{wanted!r} did not come: {self.unread!r}"
            self.unread += os.read(self.end, 4096).decode(errors="replace")
        read, found, self.unread = self.unread.partition(wanted)
        return read + found

    def type(self, text: str) -> None:
        os.write(self.end, text.encode())

    def press(self, key: str, wanted: str) -> None:
        """Press a key until it is heeded: `input` misses a Ctrl-C while it is about to wait."""
        for _ in range(12):
            self.type(key)
            if select.select([self.end], [], [], 5)[0]:
                self.until(wanted)
                return
        raise AssertionError(f"{key!r} was not heeded; {wanted!r} did not come")


def _take_terminal() -> None:
    """In the child: its input is its terminal."""
    fcntl.ioctl(0, termios.TIOCSCTTY, 0)


@pytest.fixture
def on_terminal() -> Iterator[Callable[..., Terminal]]:
    begun: list[Terminal] = []

    def begin(*options: str) -> Terminal:
        begun.append(Terminal(*options))
        return begun[-1]

    yield begin
    for each in begun:
        each.child.kill()
        each.child.wait()
        os.close(each.end)


def test_on_a_terminal_one_talks_and_leaves_with_ctrl_d(
    on_terminal: Callable[..., Terminal], tmp_path: Path
) -> None:
    talk = on_terminal()
    greeting = talk.until("> ")
    assert "context 1,024" in greeting
    assert "/help lists the commands, Ctrl-D leaves" in greeting
    talk.type("Hello\n")
    talk.until("reading")
    talk.type("And now?\n")  # while the answer is on its way
    assert "0 tokens cached" in talk.until("tok/s")
    assert "And now?" not in talk.until("tokens cached").rpartition("> ")[0]
    talk.until("> ")
    talk.press("\x03", "Ctrl-D or /exit leaves")  # at the prompt, Ctrl-C is a hint only
    talk.until("> ")
    talk.type("\x04")
    assert talk.child.wait(timeout=20) == 0
