"""The jinja environment that chat templates run in: sandboxed, and bounded in time and output.

A template comes with a checkpoint or with a request, so it is code that nobody here has read. The
sandbox keeps it from Python's internals; the limits below keep it from running for ever. They
bound loops and output, not the memory of a single expression: whoever lets strangers bring
templates should run them in a process of limited memory. Used by `kvist.text.chat` alone, which
imports this module, and jinja with it, when the first chat is rendered.
"""

import json
import threading
from collections.abc import Mapping
from datetime import datetime
from functools import lru_cache
from typing import Any, NoReturn

from jinja2 import Template, TemplateError, nodes
from jinja2.ext import Extension, loopcontrols
from jinja2.parser import Parser
from jinja2.runtime import Context
from jinja2.sandbox import ImmutableSandboxedEnvironment

__all__ = ["TemplateRefusal", "run"]

# Far above what chats need: one of 10,000 messages takes a few 10,000 steps.
MAX_STEPS = 1_000_000  # loop iterations and macro calls of one rendering
MAX_CHARACTERS = 1 << 25  # of output, or of one repeated string
MAX_BITS = 1 << 14  # of an integer that `*` or `**` makes


class TemplateRefusal(Exception):
    """What a template itself said was wrong, by `raise_exception`."""


class TemplateTooCostly(TemplateError):
    """A rendering went over one of the limits."""


def run(template: str, variables: Mapping[str, Any]) -> str:
    """Render a template.

    Raises:
        TemplateRefusal: the template called `raise_exception`.
        Exception: anything else that jinja, or a template's own mistake, may raise.
    """
    compiled = _compile(template)
    _environment().steps.left = MAX_STEPS
    pieces: list[str] = []
    length = 0
    for piece in compiled.generate(variables):
        length += len(piece)
        if length > MAX_CHARACTERS:
            raise TemplateTooCostly(f"it writes more than {MAX_CHARACTERS} characters")
        pieces.append(piece)
    return "".join(pieces)


class _Steps(threading.local):
    """What is left of a rendering's steps; a rendering stays in one thread."""

    left = 0


class _GenerationTag(Extension):
    """`{% generation %}`, which marks the assistant's words for training; here only a scope."""

    tags = {"generation"}  # noqa: RUF012 - jinja declares it so

    def parse(self, parser: Parser) -> nodes.Node:
        lineno = next(parser.stream).lineno
        body = parser.parse_statements(("name:endgeneration",), drop_needle=True)
        return nodes.Scope(body, lineno=lineno)


class _ChatEnvironment(ImmutableSandboxedEnvironment):
    """The environment that transformers gives to chat templates, with limits."""

    intercepted_binops = frozenset(("*", "**"))

    def __init__(self) -> None:
        super().__init__(
            trim_blocks=True, lstrip_blocks=True, extensions=[_GenerationTag, loopcontrols]
        )
        self.steps = _Steps()
        self.filters["tojson"] = _to_json
        self.globals["raise_exception"] = _raise_exception
        self.globals["strftime_now"] = _strftime_now

    def _parse(self, source: str, name: str | None, filename: str | None) -> nodes.Template:
        tree = super()._parse(source, name, filename)
        bodies: list[tuple[list[nodes.Node], int]] = []
        bodies += [(node.body, node.lineno) for node in tree.find_all(nodes.For)]
        bodies += [(node.body, node.lineno) for node in tree.find_all(nodes.Macro)]
        bodies += [(node.body, node.lineno) for node in tree.find_all(nodes.CallBlock)]
        for body, lineno in bodies:
            step = nodes.EnvironmentAttribute("next_step")
            body.insert(0, nodes.ExprStmt(step, lineno=lineno))
        return tree

    @property
    def next_step(self) -> None:
        """Count one iteration or call; read at the head of every loop and macro.

        A property with an effect, since a call would pass the sandbox's own checks, at ten times
        the price.
        """
        self.steps.left -= 1
        if self.steps.left < 0:
            raise TemplateTooCostly(f"it takes more than {MAX_STEPS} steps")

    def call_binop(self, context: Context, operator: str, left: Any, right: Any) -> Any:
        if isinstance(left, int) and isinstance(right, int):
            bits = left.bit_length() * max(right, 1) if operator == "**" else left.bit_length()
            if bits + right.bit_length() > MAX_BITS:
                raise TemplateTooCostly(f"it makes a number of more than {MAX_BITS} bits")
        for repeated, times in ((left, right), (right, left)):
            if (
                isinstance(repeated, str | list | tuple)
                and isinstance(times, int)
                and len(repeated) * times > MAX_CHARACTERS
            ):
                raise TemplateTooCostly(f"it repeats a value to over {MAX_CHARACTERS} places")
        return super().call_binop(context, operator, left, right)


@lru_cache(maxsize=1)
def _environment() -> _ChatEnvironment:
    return _ChatEnvironment()


@lru_cache(maxsize=64)
def _compile(template: str) -> Template:
    return _environment().from_string(template)


def _to_json(
    value: Any,
    ensure_ascii: bool = False,
    indent: int | None = None,
    separators: tuple[str, str] | None = None,
    sort_keys: bool = False,
) -> str:
    # jinja's own filter escapes <, >, & and ' for HTML, which models were not trained on.
    return json.dumps(
        value,
        ensure_ascii=ensure_ascii,
        indent=indent,
        separators=separators,
        sort_keys=sort_keys,
    )


def _raise_exception(message: str) -> NoReturn:
    raise TemplateRefusal(message)


def _strftime_now(pattern: str) -> str:
    return datetime.now().strftime(pattern)
