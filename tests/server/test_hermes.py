"""Tool calls are found in a stream however it is cut, and what is none stays text."""

import json
from collections.abc import Iterable
from itertools import pairwise
from typing import Any

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from kvist.server.hermes import CallParser, Part

CITY = '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}\n</tool_call>'
TRICKY = (
    "<tool_call>\n"
    '{"name": "write", "arguments": {"text": "a \\"quoted\\" } ] \\\\ <tool_call> </tool_call>",'
    ' "deep": [{"a": [1, {}]}, "}"]}}\n'
    "</tool_call>"
)

# Name -> text, words beside the calls, calls.
FIXTURES: dict[str, tuple[str, str, list[tuple[str, Any]]]] = {
    "no call": ("Hello there,  you. \n", "Hello there,  you. \n", []),
    "one": (CITY, "", [("weather", {"city": "Oslo"})]),
    "words before": (f"Let me look.\n\n{CITY}", "Let me look.", [("weather", {"city": "Oslo"})]),
    "words behind": (f"{CITY}\nIt was. Yes.", "It was. Yes.", [("weather", {"city": "Oslo"})]),
    "two": (
        f"{CITY}\n{TRICKY}\n",
        "",
        [
            ("weather", {"city": "Oslo"}),
            (
                "write",
                {
                    "text": 'a "quoted" } ] \\ <tool_call> </tool_call>',
                    "deep": [{"a": [1, {}]}, "}"],
                },
            ),
        ],
    ),
    "words between": (f"A\n{CITY} B {CITY}", "AB", [("weather", {"city": "Oslo"})] * 2),
    "another order": (
        '<tool_call>{"arguments": {"a": "</tool_call>"}, "name": "f"}</tool_call>',
        "",
        [("f", {"a": "</tool_call>"})],
    ),
    "no arguments": ('<tool_call>{"name": "now"}</tool_call>', "", [("now", {})]),
    "arguments as text": (
        '<tool_call>{"name": "f", "arguments": "{\\"a\\": 1}"}</tool_call>',
        "",
        [("f", {"a": 1})],
    ),
    "without spaces": ('<tool_call>{"name":"f","arguments":{}}</tool_call>', "", [("f", {})]),
    "unicode": (
        '<tool_call>\n{"name": "f", "arguments": {"é": "日本 \\u00e9 🌱"}}\n</tool_call>',
        "",
        [("f", {"é": "日本 é 🌱"})],
    ),
    "something behind the arguments": (
        '<tool_call>{"name": "f", "arguments": {"a": 1}, "id": "</tool"}</tool_call> done',
        "done",
        [("f", {"a": 1})],
    ),
    "no JSON": (
        "<tool_call>\nweather(Oslo)\n</tool_call>",
        "<tool_call>\nweather(Oslo)\n</tool_call>",
        [],
    ),
    "no call, then one": (
        f"<tool_call>nothing</tool_call>\n{CITY}",
        "<tool_call>nothing</tool_call>",
        [("weather", {"city": "Oslo"})],
    ),
    "a tag that never closes": ("so: <tool_call", "so: <tool_call", []),
    "cut in the head": (
        'ok <tool_call>\n{"name": "weat',
        'ok<tool_call>\n{"name": "weat',
        [],
    ),
    "without an end": (
        '<tool_call>\n{"name": "weather", "arguments": {"city": "Oslo"}}',
        "",
        [("weather", {"city": "Oslo"})],
    ),
    "other tags": ("a < b <tool> <tool_ <<tool_call", "a < b <tool> <tool_ <<tool_call", []),
}  # fmt: skip


def read(pieces: Iterable[str]) -> tuple[str, list[tuple[str, str]]]:
    """Words and calls of a stream; its parts must be in order."""
    parser, parts = CallParser(), list[Part]()
    for piece in pieces:
        parts += parser.push(piece)
    parts += parser.flush()
    assert all(part.text for part in parts)
    calls: list[tuple[str, str]] = []
    for part in parts:
        if part.kind == "call":
            assert part.call == len(calls)
            calls.append((part.text, ""))
        elif part.kind == "arguments":
            assert part.call == len(calls) - 1
            calls[-1] = (calls[-1][0], calls[-1][1] + part.text)
    assert parser.calls == len(calls)
    return "".join(part.text for part in parts if part.kind == "content"), calls


@pytest.mark.parametrize("name", FIXTURES)
def test_calls_and_words_are_told_apart(name: str) -> None:
    text, words, calls = FIXTURES[name]
    found_words, found = read([text])
    assert found_words == words
    assert [(name, json.loads(arguments)) for name, arguments in found] == calls


@pytest.mark.parametrize("name", FIXTURES)
def test_every_split_gives_the_same(name: str) -> None:
    text = FIXTURES[name][0]
    whole = read([text])
    assert read(text) == whole
    for place in range(len(text) + 1):
        assert read([text[:place], text[place:]]) == whole


@settings(max_examples=300, deadline=None)
@given(st.data())
def test_any_splits_of_any_mixture_give_the_same(data: st.DataObject) -> None:
    pieces = [CITY, TRICKY, "<tool_call>", "</tool_call>", '{"name": "f", "arguments": ', "{", "}"]
    pieces += [
        " ",
        "\n",
        "words",
        '"',
        "\\",
        "<",
        '{"name": "g"}',
        '{"name": "g", "arguments": {}}',
    ]
    text = "".join(data.draw(st.lists(st.sampled_from(pieces), max_size=12)))
    places = sorted(data.draw(st.sets(st.integers(0, len(text)), max_size=6)) | {0, len(text)})
    assert read(text[a:b] for a, b in pairwise(places)) == read([text])
    assert read(text) == read([text])


def test_arguments_come_as_soon_as_they_are_there() -> None:
    parser = CallParser()
    assert parser.push('<tool_call>\n{"name": "f", "arguments": ') == []
    assert parser.push('{"a"') == [Part("call", "f", 0), Part("arguments", '{"a"', 0)]
    assert parser.push(": 1") == [Part("arguments", ": 1", 0)]
    assert parser.push("}}\n") == [Part("arguments", "}", 0)]
    assert parser.push("</tool_call>") == []
    assert parser.flush() == []


def test_a_call_that_is_cut_short_keeps_what_it_has() -> None:
    assert read(['<tool_call>{"name": "f", "arguments": {"a": [1, ']) == ("", [("f", '{"a": [1, ')])
