"""What a chat looks like: on a terminal with colours and markdown, or as plain text in a pipe.

Both show the same things; neither knows a conversation or a command. Finished blocks of an answer
are printed once and for all, and only its last, unfinished block is drawn anew, a few times a
second, so nothing flickers and all of it can be scrolled back to.
"""

import sys
from collections.abc import Callable, Mapping
from time import monotonic
from typing import TYPE_CHECKING, Protocol

from kvist.text.thinking import CLOSE, OPEN, Piece

if TYPE_CHECKING:
    from rich.console import Console, ConsoleOptions, RenderableType, RenderResult
    from rich.live import Live

_MAX_WIDTH = 100  # longer lines are hard to read
# A model may write any character; the terminal is to obey none of them.
_INERT = {code: None for code in (*range(32), *range(127, 160)) if chr(code) not in "\t\n"}
_DRAW_SECONDS = 0.1  # between two drawings, or more where drawing is slow


class Screen(Protocol):
    """Where a chat is shown."""

    def working(self, what: str) -> None:
        """An answer begins; nothing of it is there yet."""

    def piece(self, piece: Piece) -> None:
        """Some more of the answer, or of the thinking before it."""

    def end(self) -> None:
        """The answer has ended, whichever way."""

    def note(self, text: str) -> None:
        """A remark by the program."""

    def error(self, text: str) -> None:
        """Something that did not work."""

    def table(self, rows: Mapping[str, str]) -> None:
        """Names and what they stand for."""


class PlainScreen:
    """Text on standard output as it comes; remarks and errors on standard error."""

    def __init__(self, *, hide_thinking: bool = False) -> None:
        """`hide_thinking` leaves it out."""
        self._hide = hide_thinking
        self._thinking = self._anything = False

    def working(self, what: str) -> None:
        """Nothing to show."""
        self._thinking = self._anything = False

    def piece(self, piece: Piece) -> None:
        """See `Screen.piece`; thinking stands between its tags."""
        if piece.thinking and self._hide:
            return
        if piece.thinking != self._thinking:
            self._thinking = piece.thinking
            print(f"{OPEN}\n" if piece.thinking else f"\n{CLOSE}\n\n", end="")
        print(piece.text, end="", flush=True)
        self._anything = True

    def end(self) -> None:
        """See `Screen.end`."""
        if self._thinking:
            print(f"\n{CLOSE}", end="")
        if self._anything:
            print(flush=True)

    def note(self, text: str) -> None:
        """See `Screen.note`."""
        print(text, file=sys.stderr)

    def error(self, text: str) -> None:
        """See `Screen.error`."""
        print(f"error: {text}", file=sys.stderr)

    def table(self, rows: Mapping[str, str]) -> None:
        """See `Screen.table`."""
        width = max(map(len, rows))
        for name, text in rows.items():
            print(f"{name:<{width}}  {text}")


class RichScreen:
    """A terminal: markdown, highlighted code, thinking dimmed."""

    def __init__(self, console: "Console | None" = None, *, hide_thinking: bool = False) -> None:
        """`hide_thinking` shows only that the model thinks, and for how long it did."""
        from rich.console import Console

        self.console = console or Console(highlight=False, emoji=False)
        self._hide = hide_thinking
        self._growing: Growing | None = None
        self._thinking = False
        self._since = 0.0

    def working(self, what: str) -> None:
        """See `Screen.working`."""
        self._thinking = False
        self._growing = self._answer()
        self._growing.status(f"{what} …")

    def piece(self, piece: Piece) -> None:
        """See `Screen.piece`."""
        assert self._growing is not None, "`working` comes first"
        if piece.thinking != self._thinking:
            self._growing.end()
            self._end_thinking()
            self._thinking, self._since = piece.thinking, monotonic()
            self._growing = self._thought() if piece.thinking else self._answer()
        if piece.thinking and self._hide:
            self._growing.status(f"thinking … {monotonic() - self._since:.0f} s")
        else:
            self._growing.push(piece.text.translate(_INERT))

    def end(self) -> None:
        """See `Screen.end`."""
        if self._growing is not None:
            self._growing.end()
            self._growing = None
            self._end_thinking()
            self.console.print()

    def note(self, text: str) -> None:
        """See `Screen.note`."""
        self.console.print(text, style="dim", markup=False)

    def error(self, text: str) -> None:
        """See `Screen.error`."""
        self.console.print(f"error: {text}", style="red", markup=False)

    def table(self, rows: Mapping[str, str]) -> None:
        """See `Screen.table`."""
        from rich.table import Table
        from rich.text import Text

        table = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
        for name, text in rows.items():
            table.add_row(Text(name, style="dim", no_wrap=True), Text(text))
        self.console.print(table)

    def _answer(self) -> "Growing":
        from kvist.cli.markdown import AnswerMarkdown, split_blocks

        return Growing(self.console, AnswerMarkdown, split_blocks)

    def _thought(self) -> "Growing":
        from rich.padding import Padding
        from rich.text import Text

        def render(text: str) -> Padding:
            return Padding(Text(text.strip("\n"), style="dim"), (0, 0, 0, 2))

        return Growing(self.console, render, _split_paragraphs)

    def _end_thinking(self) -> None:
        """Leave a line between thinking and answer, or say how long it took."""
        if self._thinking:
            self._thinking = False
            if self._hide:
                self.note(f"thought for {monotonic() - self._since:.1f} s")
            self.console.print()


class Growing:
    """A text that grows at the end of the screen, with an empty line between its parts.

    Args:
        console: where.
        render: how a part of it looks.
        split: cuts the text into the parts that are finished and the one that may still change.
    """

    def __init__(
        self,
        console: "Console",
        render: "Callable[[str], RenderableType]",
        split: Callable[[str], tuple[list[str], str]],
    ) -> None:
        """Nothing is drawn yet."""
        self._console = console
        self._render = render
        self._split = split
        self._rest = ""  # what may still change; all before it was printed
        self._printed = False
        self._live: Live | None = None
        self._next_draw = 0.0

    def status(self, text: str) -> None:
        """Show this in place of the text that has yet to come."""
        from rich.text import Text

        if monotonic() >= self._next_draw:
            self._next_draw = monotonic() + _DRAW_SECONDS
            self._drawing().update(Text(text, style="dim"), refresh=True)

    def push(self, text: str) -> None:
        """Take some more text, and draw if it is time."""
        self._rest += text
        now = monotonic()
        if now >= self._next_draw:
            self._draw()
            took = monotonic() - now
            # Drawing must not slow down what is drawn: at most a tenth of the time goes to it.
            self._next_draw = now + max(_DRAW_SECONDS, 10 * took)

    def end(self) -> None:
        """Print what is left; the text is whole now."""
        if self._live is not None:
            self._live.stop()
            self._live = None
        done, last = self._split(self._rest)
        self._rest = ""
        self._print([*done, last])

    def _draw(self) -> None:
        done, self._rest = self._split(self._rest)
        if done:
            self._print(done)
        else:
            self._drawing().update(self._tail(), refresh=True)

    def _print(self, texts: list[str]) -> None:
        """Print what is finished, above what may still change."""
        from rich.console import Group

        parts = []
        for text in filter(str.strip, texts):
            parts.append(self._part(text))
            self._printed = True
        if self._live is not None:
            self._live.update(self._tail())  # drawn with the print, not before it
        self._console.print(Group(*parts), end="")

    def _part(self, text: str) -> "_Part":
        return _Part(self._render(text), gap=self._printed)

    def _tail(self) -> "_Part":
        """What fits on the screen of the part that may still change."""
        part = self._part(self._rest)
        part.height = max(self._console.size.height - 2, 1)
        return part

    def _drawing(self) -> "Live":
        from rich.live import Live

        if self._live is None:
            self._live = Live(
                console=self._console, auto_refresh=False, transient=True, redirect_stderr=False
            )
            self._live.start()
        return self._live


class _Part:
    """A part of a text as lines, without empty ones around it.

    Args:
        whole: what it shows.
        gap: whether an empty line comes before it.
    """

    height: int | None = None
    """How many lines there are at most, the last ones; None is all."""

    def __init__(self, whole: "RenderableType", *, gap: bool) -> None:
        self._whole = whole
        self._gap = gap

    def __rich_console__(self, console: "Console", options: "ConsoleOptions") -> "RenderResult":
        from rich.segment import Segment

        width = min(options.max_width, _MAX_WIDTH)
        lines = console.render_lines(self._whole, options.update(width=width, height=None))
        filled = [i for i, line in enumerate(lines) if any(s.text.strip() for s in line)]
        lines = lines[filled[0] : filled[-1] + 1] if filled else []
        if self._gap and lines:
            lines.insert(0, [])
        for line in lines[-self.height :] if self.height else lines:
            yield from line
            yield Segment.line()


def _split_paragraphs(text: str) -> tuple[list[str], str]:
    """Whole paragraphs, and the last one."""
    *done, last = text.split("\n\n")
    return done, last
