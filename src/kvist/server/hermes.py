"""Tool calls in a model's text, in the format of Hermes and Qwen3, as the text streams.

    <tool_call>
    {"name": "get_weather", "arguments": {"city": "Oslo"}}
    </tool_call>

`CallParser` takes text in pieces, cut anywhere, and gives the same parts for every way of cutting:
what is said beside the calls, each call's name as soon as it is known, and its arguments while they
come. What only looks like a call comes out as text. How a model is told of its tools is the chat
template's business; how it is held to calling them, `formats`'.
"""

import json
import re
from dataclasses import dataclass
from typing import Literal

from kvist.text.thinking import overlap

OPEN, CLOSE = "<tool_call>", "</tool_call>"

# The usual order. The arguments can then be passed on while they come; `{` is their first letter.
_HEAD = re.compile(r'\s*\{\s*"name"\s*:\s*"([^"\\<]+)"\s*,\s*"arguments"\s*:\s*(?=\{)')
_TAGS = re.compile(f"{OPEN}|{CLOSE}")
# Where the state of a JSON text changes: strings, escapes, depth.
_MARKS = re.compile(r'["\\{}\[\]]')


@dataclass(frozen=True)
class Part:
    """A piece of an output.

    Args:
        kind: "call" begins a call of the function `text`; "arguments" go on with the last one.
        text: words, a name, or a piece of JSON.
        call: which call of the output, from 0.
    """

    kind: Literal["content", "reasoning", "call", "arguments"]
    text: str
    call: int = 0


class CallParser:
    """Splits an output into words and calls."""

    def __init__(self) -> None:
        """Begin outside of a call."""
        self.calls = 0
        self._held = ""  # not decided yet
        self._state: Literal["text", "head", "arguments", "tail"] = "text"
        self._fresh = False  # nothing was said since the last call
        self._looked = 0  # in a head: the tags before this place are done with
        self._failed = False  # in a head: it was closed and is no call
        self._depth = 0
        self._quoted = self._escaped = False

    def push(self, text: str) -> list[Part]:
        """Take the next piece of the output; return what is certain now."""
        self._held += text
        parts: list[Part] = []
        while {
            "text": self._text,
            "head": self._head,
            "arguments": self._arguments,
            "tail": self._tail,
        }[self._state](parts):
            pass
        return parts

    def flush(self) -> list[Part]:
        """Return the rest, at the output's end: a call that was cut short stays as it is."""
        held, self._held = self._held, ""
        if self._state == "text" and held and not (self._fresh and held.isspace()):
            return [Part("content", held)]
        if self._state == "head":
            return [Part("content", OPEN + held)]
        return []

    # Each takes what it can from what is held; True if the next state may go on at once.

    def _text(self, parts: list[Part]) -> bool:
        if self._fresh:
            self._held = self._held.lstrip()
        before, found, rest = self._held.partition(OPEN)
        if found:
            if before := before.rstrip():
                parts.append(Part("content", before))
            self._state, self._held = "head", rest
            self._looked, self._failed = 0, False
            return True
        # Space may stand before a call, and the end may be the beginning of a tag.
        certain = self._held[: len(self._held) - overlap(self._held, OPEN)].rstrip()
        if certain:
            parts.append(Part("content", certain))
            self._held, self._fresh = self._held[len(certain) :], False
        return False

    def _head(self, parts: list[Part]) -> bool:
        if head := _HEAD.match(self._held):
            self._begin(parts, head[1])
            self._state, self._held = "arguments", self._held[head.end() :]
            self._depth, self._quoted, self._escaped = 0, False, False
            return True
        # Another order of keys, or no call at all: the whole is needed to tell. A tag may also
        # stand in one of its strings, so that what ends there need not be the end.
        for tag in _TAGS.finditer(self._held, self._looked):
            self._looked = tag.end()
            if tag[0] == CLOSE:
                if call := _whole_call(self._held[: tag.start()]):
                    self._begin(parts, call[0])
                    parts.append(Part("arguments", call[1], self.calls - 1))
                    self._state, self._held = "tail", self._held[tag.start() :]
                    return True
                self._failed = True
            elif self._failed:  # this was none, and another begins
                parts.append(Part("content", OPEN + self._held[: tag.start()].rstrip()))
                self._state, self._held, self._fresh = "text", self._held[tag.start() :], False
                return True
        return False

    def _begin(self, parts: list[Part], name: str) -> None:
        parts.append(Part("call", name, self.calls))
        self.calls += 1

    def _arguments(self, parts: list[Part]) -> bool:
        """Pass the JSON value on that has begun, to its last bracket."""
        place = 0
        if self._escaped and self._held:
            place, self._escaped = 1, False
        while mark := _MARKS.search(self._held, place):
            place = mark.end()
            match mark[0]:
                case "\\":
                    if place == len(self._held):
                        self._escaped = True
                    place += 1
                case '"':
                    self._quoted = not self._quoted
                case "{" | "[" if not self._quoted:
                    self._depth += 1
                case "}" | "]" if not self._quoted:
                    self._depth -= 1
                    if not self._depth:
                        parts.append(Part("arguments", self._held[:place], self.calls - 1))
                        self._state, self._held = "tail", self._held[place:]
                        return True
        if self._held:
            parts.append(Part("arguments", self._held, self.calls - 1))
            self._held = ""
        return False

    def _tail(self, parts: list[Part]) -> bool:
        """Nothing but the call's end is awaited."""
        _, found, rest = self._held.partition(CLOSE)
        if found:
            self._state, self._held, self._fresh = "text", rest, True
        return bool(found)


def _whole_call(text: str) -> tuple[str, str] | None:
    """Name and arguments of a call that is complete; None if it is none."""
    try:
        call = json.loads(text)
    except (ValueError, RecursionError):
        return None
    if not isinstance(call, dict) or not isinstance(call.get("name"), str):
        return None
    arguments = call.get("arguments", {})
    if isinstance(arguments, str):  # some models write the JSON as a text
        return call["name"], arguments
    return call["name"], json.dumps(arguments, ensure_ascii=False)
