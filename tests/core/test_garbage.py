"""What is old is left out of collections while requests are served, and only then."""

import gc
import weakref

from kvist.core.garbage import old_objects_spared


class _Node:
    def __init__(self) -> None:
        self.itself = self


def test_old_objects_are_out_of_collections_inside_only():
    old = _Node()
    seen = weakref.ref(old)
    with old_objects_spared():
        del old
        gc.collect()
        assert seen() is not None
        new = weakref.ref(_Node())
        gc.collect()
        assert new() is None
    gc.collect()
    assert seen() is None


def test_the_last_to_leave_ends_it():
    with old_objects_spared():
        with old_objects_spared():
            pass
        assert gc.get_freeze_count() > 0
    assert gc.get_freeze_count() == 0


def test_a_program_that_freezes_by_itself_stays_frozen():
    gc.freeze()
    try:
        with old_objects_spared():
            pass
        assert gc.get_freeze_count() > 0
    finally:
        gc.unfreeze()
