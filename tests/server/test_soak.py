"""The short form of the soak test; see `soak.py` for the long one."""

from soak import soak


def test_a_crowd_leaves_the_server_as_it_was() -> None:
    report = soak(requests=240, clients=16, seed=3)
    assert report.wrong == []
    assert report.requests == 240
    assert report.left > 0
    assert report.compared > 0
    assert report.evicted > 0
    assert len(report.kinds) == 9
    assert report.memory[-1] - report.memory[len(report.memory) // 2] < 64
