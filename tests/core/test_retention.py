"""Retention turns a layer's spec into the spec that storage and mask both follow."""

import pytest

from kvist.core.retention import KeepAll, SlidingWindow, first_needed
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError

FULL = AttentionSpec(2, 16)
SLIDING = AttentionSpec(2, 16, window=32)


def test_keeping_all_changes_nothing() -> None:
    assert KeepAll().apply(FULL) == FULL
    assert KeepAll().apply(SLIDING) == SLIDING


def test_a_window_narrows_what_is_wider() -> None:
    assert SlidingWindow(8, 2).apply(FULL) == AttentionSpec(2, 16, window=8, sinks=2)
    assert SlidingWindow(8, 2).apply(SLIDING) == AttentionSpec(2, 16, window=8, sinks=2)


def test_a_layers_own_window_stays_where_it_is_shorter() -> None:
    assert SlidingWindow(32, 4).apply(SLIDING) == SLIDING
    assert SlidingWindow(64, 4).apply(SLIDING) == SLIDING


@pytest.mark.parametrize(("window", "sinks"), [(0, 0), (-1, 0), (4, -1)])
def test_a_window_that_holds_nothing_is_refused(window: int, sinks: int) -> None:
    with pytest.raises(CacheError, match=f"window={window}, sinks={sinks}"):
        SlidingWindow(window, sinks)


def test_what_no_later_query_sees_is_not_needed() -> None:
    assert first_needed(FULL, 1000) == 0
    assert first_needed(SLIDING, 10) == 0
    assert first_needed(SLIDING, 100) == 69  # the query at 100 sees 69 to 100
