"""The core keeps its contracts, and repeats itself exactly."""

import inspect
import pickle

import pytest
from harness import FULL, Harness, make_request
from null_runner import NullRunner

from kvist.core import plan, protocols
from kvist.core.blocks import PagedBlockManager
from kvist.core.scheduler import ContinuousScheduler
from kvist.core.tables import CacheGroup


@pytest.mark.parametrize(
    ("contract", "implementation"),
    [
        (protocols.Scheduler, ContinuousScheduler),
        (protocols.BlockManager, PagedBlockManager),
        (protocols.Runner, NullRunner),
    ],
)
def test_implementations_have_the_contracts_signatures(contract, implementation):
    methods = {name for name in vars(contract) if not name.startswith("_")}
    assert methods
    for name in methods:
        promised = inspect.signature(getattr(contract, name))
        kept = inspect.signature(getattr(implementation, name))
        assert list(promised.parameters) == list(kept.parameters)


def test_a_plan_is_plain_frozen_data():
    harness = Harness([CacheGroup(FULL, 20)], 4)
    harness.add(make_request("a", range(9), n=2, temperature=1.0))
    made = harness.schedule()
    assert pickle.loads(pickle.dumps(made)) == made
    assert isinstance(made, plan.Plan)
    with pytest.raises(AttributeError):
        made.step = 3  # type: ignore[misc]
    harness.commit()
    harness.drain()


def test_the_same_requests_give_the_same_plans():
    def plans() -> list[plan.Plan]:
        harness = Harness([CacheGroup(FULL, 9, 6)], 4, max_batch_tokens=16, checked=False)
        for i in range(6):
            harness.add(make_request(f"{i}", range(i, 2 * i + 3), n=1 + i % 2, priority=i % 3))
        made = []
        while harness.scheduler.has_unfinished:
            made.append(harness.step())
        return made

    assert plans() == plans()
