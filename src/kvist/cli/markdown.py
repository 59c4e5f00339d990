"""Markdown for a terminal, as far as it is known: which blocks of a growing text are finished.

Imports rich, so only what draws imports this. How it grows on the screen is `screen`'s business.
"""

from itertools import pairwise
from typing import Any, ClassVar

from markdown_it import MarkdownIt
from rich import markdown
from rich.console import Console, ConsoleOptions, RenderResult
from rich.padding import Padding
from rich.syntax import Syntax

__all__ = ["AnswerMarkdown", "split_blocks"]

# HTML is shown as it was written; rich would leave it out.
_PARSER = MarkdownIt("commonmark", {"html": False}).enable(["strikethrough", "table"])


def split_blocks(text: str) -> tuple[list[str], str]:
    """Cut a growing text into the blocks that are finished, and the last, which may still change.

    A paragraph, list, table or fenced block is finished once something else begins behind it. A
    line without its end counts only if it begins with a letter: `1` may become `1.`, which would
    go on with the list before it.
    """
    *_, last_line = lines = text.split("\n")
    known = text if last_line[:1].isalpha() else text[: len(text) - len(last_line)]
    begins = [token.map[0] for token in _PARSER.parse(known) if token.level == 0 and token.map]
    if not begins:
        return [], text
    done = ["\n".join([*lines[start:end], ""]) for start, end in pairwise(begins)]
    return done, "\n".join(lines[begins[-1] :])


class _Heading(markdown.Heading):
    """At the left like everything else, whatever its level."""

    LEVEL_ALIGN: ClassVar[dict[str, Any]] = {}


class _CodeBlock(markdown.CodeBlock):
    """In the terminal's own colours, indented, without a box of background around it."""

    def __rich_console__(self, console: Console, options: ConsoleOptions) -> RenderResult:
        code = str(self.text).rstrip()
        theme = "ansi_dark"
        yield Padding(
            Syntax(code, self.lexer_name, theme=theme, word_wrap=True, background_color="default"),
            (0, 0, 0, 2),
        )


class AnswerMarkdown(markdown.Markdown):
    """A model's answer: line breaks stay where the model put them, and nothing is left out."""

    elements: ClassVar[dict[str, type[markdown.MarkdownElement]]] = {
        **markdown.Markdown.elements,
        "heading_open": _Heading,
        "fence": _CodeBlock,
        "code_block": _CodeBlock,
    }

    def __init__(self, text: str) -> None:
        """Parse a text, or some whole blocks of it."""
        super().__init__(text)
        self.parsed = _PARSER.parse(text)
        for token in self.parsed:
            for child in token.children or ():
                if child.type == "softbreak":
                    child.type = "hardbreak"
