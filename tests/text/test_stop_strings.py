"""Stop strings: the earliest one ends the text, and no part of it ever reaches a stream."""

from itertools import pairwise

import pytest
from hypothesis import example, given
from hypothesis import strategies as st

from kvist.errors import RequestError
from kvist.text.detokenize import Detokenizer, StopStrings

# Few letters, so that stop strings overlap with themselves and each other.
words = st.text("ab", min_size=1, max_size=5)
stops_and_text = st.tuples(st.lists(words, max_size=4), st.text("abc", max_size=30))


def searched(stops, text):
    """The plain definition: where the earliest stop begins, and the shortest that begins there."""
    found = [(text.find(stop), len(stop), stop) for stop in stops if stop in text]
    return (text[: min(found)[0]], min(found)[2]) if found else (text, None)


def cut(text, places):
    """The text in pieces, some of which may be empty."""
    edges = [0, *sorted(min(place, len(text)) for place in places), len(text)]
    return [text[a:b] for a, b in pairwise(edges)]


def fed(stops, pieces):
    search = StopStrings(stops)
    outputs = [search.push(piece) for piece in pieces]
    return search, outputs, search.flush()


@given(stops_and_text, st.lists(st.integers(0, 30), max_size=8))
@example((["abc", "b"], "abab"), [1, 2, 3])
@example((["abc", "b"], "ab"), [1])
@example((["aab", "ab"], "aaab"), [1, 2, 3])
@example((["aabaa", "ba", "b"], "aabab"), [])
def test_any_cut_of_the_text_gives_what_a_search_of_the_whole_gives(given_, places):
    stops, text = given_
    expected, stop = searched(stops, text)
    search, outputs, rest = fed(stops, cut(text, places))
    assert "".join(piece for piece, _ in outputs) + rest == expected
    assert search.matched == stop


@given(stops_and_text)
def test_nothing_of_a_stop_string_is_shown_on_the_way(given_):
    stops, text = given_
    expected, _ = searched(stops, text)
    _, outputs, _ = fed(stops, text)
    shown = ""
    for piece, met in outputs:
        shown += piece
        assert expected.startswith(shown)
        assert not met or shown == expected


@given(stops_and_text)
def test_no_more_is_held_back_than_may_begin_a_stop_string(given_):
    stops, text = given_
    search = StopStrings(stops)
    shown = ""
    for end, character in enumerate(text, start=1):
        shown += search.push(character)[0]
        if any(stop in text[:end] for stop in stops):
            break
        held = text[len(shown) : end]
        beginnings = {stop[:i] for stop in stops for i in range(len(stop))}
        assert held == max((b for b in beginnings | {""} if text[:end].endswith(b)), key=len)


def test_stop_string_split_over_pieces_is_held_back():
    search = StopStrings(["<end>"])
    assert search.push("Hello <") == ("Hello ", False)
    assert search.push("en") == ("", False)
    assert search.push("d> and more") == ("", True)
    assert search.matched == "<end>"


def test_what_only_looked_like_a_stop_string_is_shown():
    search = StopStrings(["\n\nQ:"])
    assert search.push("a\n") == ("a", False)
    assert search.push("\n") == ("", False)
    assert search.push("b") == ("\n\nb", False)
    assert search.matched is None


def test_held_text_is_flushed():
    search = StopStrings(["\n\n"])
    assert search.push("a\n") == ("a", False)
    assert search.flush() == "\n"
    assert search.matched is None


def test_earlier_beginning_wins_over_earlier_end():
    search = StopStrings(["abcd", "c"])
    assert search.push("xabc") == ("x", False)  # "abcd" may still begin earlier
    assert search.push("d") == ("", True)
    assert search.matched == "abcd"


def test_end_of_text_settles_which_stop_string_it_was():
    search = StopStrings(["abcd", "c"])
    assert search.push("xabc") == ("x", False)
    assert search.flush() == "ab"
    assert search.matched == "c"


def test_shorter_one_wins_at_the_same_beginning():
    search = StopStrings(["abc", "ab"])
    assert search.push("xabc") == ("x", True)
    assert search.matched == "ab"


def test_nothing_comes_after_a_stop():
    search = StopStrings(["."])
    assert search.push("a.b") == ("a", True)
    assert search.push("c.d") == ("", True)
    assert search.flush() == ""


def test_without_stop_strings_text_passes_through():
    search = StopStrings([])
    assert search.push("abc") == ("abc", False)
    assert search.push("") == ("", False)
    assert search.flush() == ""


def test_repetitive_stop_string_costs_one_pass():
    search = StopStrings(["a" * 20_000 + "b"])
    assert all(not search.push("a")[1] for _ in range(60_000))
    assert len(search.flush()) == 20_000


def test_stop_string_of_characters_of_several_tokens_is_found(qwen3):
    ids = qwen3.encode("före 😀 efter")
    detokenizer, search = Detokenizer(qwen3), StopStrings(["😀"])
    shown = ""
    for token_id in ids:
        text, met = search.push(detokenizer.push(token_id))
        shown += text
        if met:
            break
    assert shown == "före "
    assert search.matched == "😀"


@pytest.mark.parametrize("stops", [[""], ["a", ""], [None], [5], [b"a"]])
def test_empty_stop_strings_and_other_types_are_refused(stops):
    with pytest.raises(RequestError, match=f"non-empty string, not {stops[-1]!r}"):
        StopStrings(stops)


def test_bare_string_is_refused_with_the_remedy():
    with pytest.raises(RequestError, match=r"write \['END'\]"):
        StopStrings("END")
