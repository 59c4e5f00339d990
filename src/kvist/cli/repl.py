"""The chat's loop: lines in, answers and commands out.

A line that begins with / is a command, any other is said to the model. It shows everything through
a `Screen` and keeps nothing that the `Conversation` does not.
"""

import signal
import sys
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from difflib import get_close_matches
from pathlib import Path

from kvist.chat import Conversation, Turn
from kvist.cli.screen import Screen
from kvist.core.params import SamplingParams
from kvist.core.retention import Retention, SlidingWindow
from kvist.errors import KvistError, RequestError
from kvist.reports.sizes import bytes_text
from kvist.text.thinking import ThinkingParser

_QUOTES = '"""'


@dataclass(frozen=True)
class Command:
    """Something that can be done beside talking."""

    name: str
    argument: str
    help: str
    run: Callable[[str], None]


class Repl:
    """Reads lines until there are no more, or one says /exit."""

    def __init__(
        self,
        conversation: Conversation,
        params: SamplingParams,
        screen: Screen,
        *,
        figures: bool = True,
    ) -> None:
        """`figures` says in a line what each answer took."""
        self._conversation = conversation
        self._params = params
        self._screen = screen
        self._figures = figures
        self._leaving = False
        self._pictures: list[str] = []  # for the next message, as data URLs
        commands = (
            Command("help", "", "show this", self._help),
            Command("stats", "", "what the last turn took, and what the cache holds", self._stats),
            Command("undo", "", "take back the last turn", self._undo),
            Command("reset", "", "begin anew, with the same system message", self._reset),
            Command("system", "[TEXT]", "show the system message, or set it (- takes it away)",
                    self._system),
            Command("image", "PATH", "show a picture with the next message", self._image),
            Command("save", "FILE", "write the conversation and its cache", self.save),
            Command("load", "FILE", "go on with a conversation that was saved", self.load),
            Command("exit", "", "leave, like Ctrl-D", self._exit),
        )  # fmt: skip
        self._commands = {command.name: command for command in commands}

    def run(self, lines: Iterator[str]) -> None:
        """Answer line after line."""
        for line in lines:
            try:
                if line.startswith("/") and not line.startswith("//"):
                    self._command(line)
                elif line.strip():
                    self._say(line.removeprefix("/"))
            except KvistError as error:
                self._screen.error(str(error))
            except KeyboardInterrupt:
                self._screen.note("stopped")
            if self._leaving:
                return

    def greet(self) -> None:
        """Say what one talks to and how."""
        c = self._conversation
        dtype = str(c.model.dtype).removeprefix("torch.")
        self._screen.note(
            f"{c.model.name} · {dtype} on {c.model.device} · {c.layout} cache, {c.codec.name} · "
            f"context {c.context:,}\n/help lists the commands, Ctrl-D leaves"
        )

    def _say(self, text: str) -> None:
        conversation, screen = self._conversation, self._screen
        said = len(conversation.messages)
        stream = conversation.say(text, self._params, self._pictures)
        self._pictures = []
        parser = ThinkingParser(inside=conversation.starts_thinking)
        with _interrupts_to(conversation.stop), _without_echo():
            screen.working("reading")
            try:
                for delta in stream:
                    for piece in parser.push(delta.text):
                        screen.piece(piece)
                for piece in parser.flush():
                    screen.piece(piece)
            finally:
                screen.end()
        turn = conversation.turn
        assert turn is not None
        remarks = []
        if len(conversation.messages) == said:
            remarks.append("stopped before the first word, so your message was taken back")
        elif turn.finish_reason == "interrupted":
            remarks.append("stopped")
        elif turn.finish_reason == "length":
            remarks.append(self._cut(turn))
        if self._figures:
            remarks.append(figures(turn))
        if remarks:
            screen.note("\n".join(remarks))

    def _cut(self, turn: Turn) -> str:
        """Why an answer has no end."""
        context = self._conversation.context
        if turn.prompt_tokens + turn.output_tokens >= context:
            limit = self._conversation.model.max_length
            larger = f", or start with a larger --context (up to {limit:,})" * (context < limit)
            return f"the context of {context:,} tokens is full: /undo or /reset{larger}"
        return f"cut off after {turn.output_tokens:,} tokens; --max-tokens sets the limit"

    # Commands.

    def _command(self, line: str) -> None:
        name, _, argument = line[1:].partition(" ")
        command = self._commands.get(name)
        if command is None:
            near = get_close_matches(name, self._commands, 1)
            hint = f"did you mean /{near[0]}? " if near else ""
            raise RequestError(f"there is no command /{name}; {hint}/help lists them")
        argument = argument.strip()
        if argument and not command.argument:
            raise RequestError(f"/{name} takes nothing behind it, not {argument!r}")
        if not argument and command.argument.isalpha():
            raise RequestError(f"/{name} needs {command.argument}: /{name} {command.argument}")
        command.run(argument)

    def _help(self, _: str) -> None:
        rows = {f"/{c.name} {c.argument}": c.help for c in self._commands.values()}
        rows[_QUOTES] = "begins and ends a message of several lines"
        rows["//…"] = "says something that begins with a slash"
        rows["Ctrl-C"] = "stops an answer"
        self._screen.table(rows)

    def _exit(self, _: str) -> None:
        self._leaving = True

    def _undo(self, _: str) -> None:
        said = self._conversation.undo()
        self._screen.note("nothing to take back" if said is None else f"took back {_short(said)}")

    def _reset(self, _: str) -> None:
        self._conversation.reset()
        self._pictures = []
        self._screen.note("a new conversation")

    def _image(self, file: str) -> None:
        self._pictures.append(self._conversation.picture(Path(file).expanduser()))
        count = len(self._pictures)
        pictures = "a picture goes" if count == 1 else f"{count} pictures go"
        self._screen.note(f"{pictures} with your next message")

    def _system(self, text: str) -> None:
        if text:
            self._conversation.set_system(None if text == "-" else text)
        self._screen.note(f"system: {self._conversation.system or 'none'}")

    def save(self, file: str) -> None:
        """Write the conversation and its cache to a file."""
        path = Path(file).expanduser()
        self._conversation.save(path)
        self._screen.note(f"saved {self._size()} to {path} ({bytes_text(path.stat().st_size)})")

    def load(self, file: str) -> None:
        """Go on with a conversation that was saved."""
        self._conversation.restore(Path(file).expanduser())
        self._screen.note(f"resumed {self._size()}")

    def _size(self) -> str:
        c = self._conversation
        turns = sum(message["role"] == "user" for message in c.messages)
        s = "" if turns == 1 else "s"
        return f"{turns} turn{s}, {len(c.cached_ids):,} tokens in the cache"

    def _stats(self, _: str) -> None:
        c, turn = self._conversation, self._conversation.turn
        rows = {}
        if turn is not None:
            read = _rate(turn.prefilled_tokens, turn.prefill)
            rows["last turn"] = (
                f"{turn.cached_tokens:,} tokens cached, {turn.prefilled_tokens:,} read at {read}"
            )
            written = _rate(turn.output_tokens - 1, turn.decode)
            rows["answer"] = f"{turn.output_tokens:,} tokens written at {written}"
            if turn.remark:
                rows["remark"] = turn.remark
        rows["cache"] = f"{c.layout}, {c.codec.name}, {_kept(c.retention)}"
        rows["holds"] = f"{len(c.cached_ids):,} tokens in {bytes_text(c.cache.nbytes)}"
        used = c.tokens_used
        rows["context"] = f"{used:,} of {c.context:,} tokens ({used / c.context:.0%})"
        self._screen.table(rows)


def figures(turn: Turn) -> str:
    """What a turn took, in a line."""
    parts = [f"{turn.cached_tokens:,} tokens cached", f"{turn.prefilled_tokens:,} read"]
    if turn.output_tokens:
        parts.append(f"{turn.output_tokens:,} written")
    if turn.output_tokens > 1:
        parts.append(_rate(turn.output_tokens - 1, turn.decode))
    return " · ".join([*parts, turn.remark] if turn.remark else parts)


def _rate(tokens: int, seconds: float) -> str:
    if tokens < 1 or seconds <= 0:
        return "– tok/s"
    rate = tokens / seconds
    return f"{rate:,.0f} tok/s" if rate >= 100 else f"{rate:.1f} tok/s"


def _kept(retention: Retention | None) -> str:
    if isinstance(retention, SlidingWindow):
        first = f" and the first {retention.sinks:,}" if retention.sinks else ""
        return f"the last {retention.window:,} tokens{first} kept"
    return "all kept" if retention is None else f"{retention.name} kept"


def _short(text: str) -> str:
    line = " ".join(text.split())
    return repr(line if len(line) <= 60 else f"{line[:59]}…")


@contextmanager
def _interrupts_to(stop: Callable[[], None]) -> Iterator[None]:
    """Let the first Ctrl-C call `stop`; a second one interrupts as usual."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return

    def heed(signum: int, frame: object) -> None:
        signal.signal(signal.SIGINT, before)
        stop()

    before = signal.signal(signal.SIGINT, heed)
    try:
        yield
    finally:
        signal.signal(signal.SIGINT, before)


@contextmanager
def _without_echo() -> Iterator[None]:
    """Keep what is typed for the next line, but off the screen, which is being drawn on."""
    if not sys.stdin.isatty():
        yield
        return
    try:
        import termios
    except ImportError:  # not POSIX
        yield
        return
    terminal = sys.stdin.fileno()
    before = termios.tcgetattr(terminal)
    quiet = [*before]
    quiet[3] &= ~termios.ECHO
    termios.tcsetattr(terminal, termios.TCSANOW, quiet)
    try:
        yield
    finally:
        termios.tcsetattr(terminal, termios.TCSANOW, before)


def read_lines(interactive: bool) -> Iterator[str]:
    """Messages from standard input; on a terminal with a prompt, history and editing keys."""
    if not interactive:
        yield from _joined(line.rstrip("\n") for line in sys.stdin)
        return
    try:
        import readline  # `input` uses it by itself
    except ImportError:  # not everywhere
        pass
    else:
        readline.set_auto_history(True)
    yield from _joined(_typed())


def _typed() -> Iterator[str]:
    while True:
        try:
            print()
            line = input("> ")
            print()
        except EOFError:
            print()
            return
        except KeyboardInterrupt:
            print("\n(Ctrl-D or /exit leaves)")
        else:
            yield line


def _joined(lines: Iterator[str]) -> Iterator[str]:
    """One message for each line, or for several between triple quotes."""
    for line in lines:
        if not line.startswith(_QUOTES):
            yield line
            continue
        parts = [line.removeprefix(_QUOTES)]
        while not parts[-1].endswith(_QUOTES):
            following = next(lines, None)
            if following is None:
                break
            parts.append(following)
        yield "\n".join(parts).removesuffix(_QUOTES).strip("\n")
