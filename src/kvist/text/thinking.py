"""Thinking and answer apart: what a model writes between `<think>` and `</think>`, as it streams.

`split_thinking` says what belongs where; `ThinkingParser` gives the same for text that comes in
pieces, however it is cut. Nothing is hidden or shown here: that is the screen's or the server's
choice.
"""

from dataclasses import dataclass

__all__ = [
    "CLOSE",
    "OPEN",
    "Piece",
    "ThinkingParser",
    "opens_thinking",
    "overlap",
    "split_thinking",
]

OPEN, CLOSE = "<think>", "</think>"


@dataclass(frozen=True)
class Piece:
    """Some text, and whether it is thinking or answer."""

    thinking: bool
    text: str


def opens_thinking(prompt: str) -> bool:
    """Whether a rendered prompt ends inside a thought, so that the output begins there."""
    return prompt.rstrip().endswith(OPEN)


def split_thinking(text: str, *, inside: bool = False) -> tuple[str, str]:
    """The thinking and the answer of a whole output, without the tags and the space around them.

    Only an output that begins with the tag has thinking; one inside an answer is just text.

    Args:
        text: the output.
        inside: the prompt has opened the thought already (see `opens_thinking`).
    """
    if not inside:
        body = text.lstrip()
        if not body.startswith(OPEN):
            return "", text
        text = body.removeprefix(OPEN)
    thinking, _, answer = text.partition(CLOSE)
    return thinking.strip(), answer.lstrip()


class ThinkingParser:
    """`split_thinking` for text that comes in pieces; what it gives is never taken back.

    Attributes:
        inside: whether the text so far ends inside a thought.
    """

    def __init__(self, *, inside: bool = False) -> None:
        """See `split_thinking`."""
        self.inside = inside
        self._decided = inside  # whether the output begins with a thought
        self._begun = False  # whether this part has shown anything but space
        self._held = ""  # may still turn out to be (part of) a tag, or space to leave out

    def push(self, text: str) -> list[Piece]:
        """Take the next piece of the output; return what is certain now, at most two pieces."""
        self._held += text
        if not self._decided:
            body = self._held.lstrip()
            if body != OPEN and OPEN.startswith(body):  # too early; also where all is space yet
                return []
            if not body.startswith(OPEN):
                self._begun = True  # an answer without thinking keeps its leading space
            else:
                self.inside, self._held = True, body.removeprefix(OPEN)
            self._decided = True
        pieces: list[Piece] = []
        if self.inside:
            thinking, found, rest = self._held.partition(CLOSE)
            if not found:
                self._show(pieces, self._held[: len(self._held) - overlap(self._held, CLOSE)])
                return pieces
            self._show(pieces, thinking)
            self.inside, self._begun, self._held = False, False, rest
        answer = self._held if self._begun else self._held.lstrip()
        self._held = ""
        if answer:
            self._begun = True
            pieces.append(Piece(False, answer))
        return pieces

    def flush(self) -> list[Piece]:
        """Return the rest, at the output's end."""
        pieces: list[Piece] = []
        if self.inside:
            self._show(pieces, self._held)
        elif self._held:
            pieces.append(Piece(False, self._held))
        self._held = ""
        return pieces

    def _show(self, pieces: list[Piece], thinking: str) -> None:
        """Show this beginning of what is held, less the space at its ends."""
        shown = thinking.rstrip()
        self._held = self._held[len(shown) :]
        if not self._begun:
            shown = shown.lstrip()
        if shown:
            self._begun = True
            pieces.append(Piece(True, shown))


def overlap(text: str, tag: str) -> int:
    """How many characters at the text's end may be the beginning of the tag."""
    return next((n for n in range(len(tag) - 1, 0, -1) if text.endswith(tag[:n])), 0)
