"""Thinking is told from the answer, however the text is cut."""

import itertools

import pytest
from hypothesis import given
from hypothesis import strategies as st

from kvist.text.thinking import Piece, ThinkingParser, opens_thinking, split_thinking

PARTS = ("<think>", "</think>", "<", "/", "think", ">", "\n", " ", "a", "é", "</", "<thin", "<b>")
TEXTS = st.lists(st.sampled_from(PARTS), max_size=14).map("".join)


@given(text=TEXTS, cuts=st.lists(st.integers(0, 60)), inside=st.booleans())
def test_any_split_of_the_stream_gives_what_the_whole_gives(
    text: str, cuts: list[int], inside: bool
) -> None:
    bounds = [0, *sorted(min(cut, len(text)) for cut in cuts), len(text)]
    parser = ThinkingParser(inside=inside)
    pieces: list[Piece] = []
    for start, end in itertools.pairwise(bounds):
        pieces += parser.push(text[start:end])
    pieces += parser.flush()
    shown = tuple("".join(p.text for p in pieces if p.thinking is kind) for kind in (True, False))
    assert shown == split_thinking(text, inside=inside)
    assert all(piece.text for piece in pieces)


@given(text=TEXTS, inside=st.booleans())
def test_thinking_comes_before_the_answer(text: str, inside: bool) -> None:
    parser = ThinkingParser(inside=inside)
    kinds = [p.thinking for c in text for p in parser.push(c)] + [
        p.thinking for p in parser.flush()
    ]
    assert kinds == sorted(kinds, reverse=True)


@pytest.mark.parametrize(
    ("text", "thinking", "answer"),
    [
        ("<think>\nhm\n</think>\n\nYes.", "hm", "Yes."),
        ("\n<think>hm", "hm", ""),
        ("<think>\n\n</think>\n\nYes.", "", "Yes."),
        ("The tag <think> opens.", "", "The tag <think> opens."),
        ("<think>a</think>b</think>c", "a", "b</think>c"),
        ("  spaced", "", "  spaced"),
    ],
)
def test_thinking_and_answer_are_told_apart(text: str, thinking: str, answer: str) -> None:
    assert split_thinking(text) == (thinking, answer)


def test_a_word_is_shown_as_soon_as_it_cannot_be_a_tag() -> None:
    parser = ThinkingParser()
    assert parser.push("<thin") == []
    assert parser.push("g>") == [Piece(False, "<thing>")]
    assert parser.push(" <") == [Piece(False, " <")]


def test_a_prompt_that_opens_a_thought_is_recognised() -> None:
    assert opens_thinking("<|im_start|>assistant\n<think>\n")
    assert not opens_thinking("<|im_start|>assistant\n<think>\n\n</think>\n\n")
