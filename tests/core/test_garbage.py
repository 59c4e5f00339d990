"""While requests are served full collections are rare; nothing is kept for good."""

import gc
import weakref
from collections.abc import Iterator

import pytest

from kvist.core.garbage import RARER, rare_full_collections


class _Node:
    def __init__(self) -> None:
        self.itself = self


@pytest.fixture(autouse=True)
def usual() -> Iterator[tuple[int, int, int]]:
    before = gc.get_threshold()
    yield before
    gc.set_threshold(*before)


def test_full_collections_are_rare_inside_and_usual_outside(usual: tuple[int, int, int]) -> None:
    with rare_full_collections(), rare_full_collections():
        assert gc.get_threshold() == (*usual[:2], RARER * usual[2])
    assert gc.get_threshold() == usual


def test_thresholds_that_a_program_sets_meanwhile_stay() -> None:
    with rare_full_collections():
        gc.set_threshold(500, 5, 5)
    assert gc.get_threshold() == (500, 5, 5)


def test_many_short_spells_leave_little_garbage() -> None:
    nodes: list[weakref.ref[_Node]] = []
    for _ in range(300):
        with rare_full_collections():
            nodes += [weakref.ref(_Node()) for _ in range(100)]
        nodes += [weakref.ref(_Node()) for _ in range(100)]
    assert sum(node() is not None for node in nodes) < 0.2 * len(nodes)


def test_what_is_asked_for_is_collected() -> None:
    old = _Node()
    seen = weakref.ref(old)
    with rare_full_collections():
        del old
        gc.collect()
        assert seen() is None
