"""Random calls to the block manager alone, with a model of what every place of every block holds.

Beyond what the scheduler does today: forks at any length, going back behind what was computed and
writing something else there, several calls in one plan, plans committed late.
"""

from collections import deque
from collections.abc import Callable, Sequence
from typing import Any
from zlib import crc32

import pytest
from harness import FULL, examples, sliding
from hypothesis import HealthCheck, Phase, settings
from hypothesis import strategies as st
from hypothesis.stateful import (
    RuleBasedStateMachine,
    initialize,
    rule,
    run_state_machine_as_test,
)

from kvist.core.blocks import PagedBlockManager
from kvist.core.prefix import Node, PrefixKeys
from kvist.core.tables import CacheGroup
from kvist.errors import CacheError

Draw = Callable[[st.SearchStrategy[Any]], Any]

ACTS = ["open"] * 4 + ["allocate"] * 2 + ["work"] * 4 + ["free"] * 4
ACTS += ["publish", "fork", "fork", "truncate"]

SPECS = [[FULL], [sliding(3)], [FULL, sliding(4)], [sliding(1), FULL], [sliding(5, sinks=3)]]


def mark(before: int, token: int) -> int:
    """What a place holds: all tokens up to it."""
    return crc32(repr((before, token)).encode())


def marks(tokens: list[int]) -> list[int]:
    """What the places of a sequence hold."""
    result: list[int] = []
    for token in tokens:
        result.append(mark(result[-1] if result else 0, token))
    return result


class BlocksMachine(RuleBasedStateMachine):
    """One call at a time; `run_plan` makes moves and writes happen."""

    def __init__(self) -> None:
        super().__init__()
        self.tokens: dict[int, list[int]] = {}  # all that has room
        self.written: dict[int, int] = {}
        self.committed: dict[int, int] = {}
        self.places: dict[tuple[int, int], dict[int, int]] = {}
        self.host: dict[tuple[int, int], dict[int, int]] = {}
        self.unsettled: deque[int] = deque()
        self.count = 0
        self.blocks: PagedBlockManager | None = None

    @initialize(
        specs=st.sampled_from(SPECS),
        size=st.integers(1, 4),
        places=st.integers(6, 28),
        host_blocks=st.sampled_from([0, 2, 6, 12]),
        save_ahead=st.integers(1, 6),
        max_forgotten=st.integers(0, 8),
        prefix_cache=st.sampled_from([True, True, True, False]),
    )
    def configure(
        self,
        specs: list,
        size: int,
        places: int,
        host_blocks: int,
        save_ahead: int,
        max_forgotten: int,
        prefix_cache: bool,
    ) -> None:
        """A tiny cache."""
        self.blocks = PagedBlockManager(
            [CacheGroup(spec, 2 + places // size, host_blocks) for spec in specs],
            size,
            prefix_cache=prefix_cache,
            save_ahead=save_ahead,
            max_forgotten=max_forgotten,
        )
        self.blocks.step = 1

    @rule(data=st.data(), what=st.sampled_from(ACTS))
    def act(self, data: st.DataObject, what: str) -> None:
        """One rule for all, so that none is left out of an example."""
        if what in ("open", "work") or self.tokens:
            getattr(self, what)(data.draw)
            self.check()

    def open(self, draw: Draw) -> None:
        """A prompt like those before, up to a point."""
        length = draw(st.sampled_from([1, 3, 6, 7, 12, 13, 20]))
        tokens = [0] * length
        differs_at = draw(st.sampled_from([40, 40, 0, 4, 9]))
        if differs_at < length:
            tokens[differs_at] = 1
        keys = PrefixKeys((), tokens)
        known = len(self.blocks.index)
        match = self.blocks.match(keys, length - 1)
        assert len(self.blocks.index) == known, "match has no effect"
        assert match.host_tokens <= match.num_tokens < length
        wanted = min(length, match.num_tokens + draw(st.sampled_from([24, 24, 0, 1, 5])))
        key = self.new_key()
        if self.blocks.open(key, keys, match, wanted):
            self.tokens[key] = tokens
            self.written[key] = self.committed[key] = match.num_tokens
            del tokens[wanted:]  # others may follow
            keys.truncate(wanted // self.blocks.block_size)

    def new_key(self) -> int:
        """A name for a sequence."""
        self.count += 1
        return self.count

    def some_key(self, draw: Draw) -> int:
        """A living sequence."""
        return draw(st.sampled_from(sorted(self.tokens)))

    def allocate(self, draw: Draw) -> None:
        """Some more tokens."""
        self.grow(self.some_key(draw), draw(st.lists(st.integers(0, 1), max_size=9)))

    def grow(self, key: int, more: list[int]) -> None:
        """Take more tokens if there is room; if not, nothing has changed."""
        length = len(self.tokens[key])
        room = self.blocks.room(key, length + len(more))
        tables = [self.blocks.blocks_of(key, g) for g in range(len(self.blocks.groups))]
        accepted = self.blocks.allocate(key, length + len(more))
        assert accepted == (room == length + len(more)), "room() tells what allocate() accepts"
        if accepted:
            self.tokens[key] += more
        else:
            assert tables == [self.blocks.blocks_of(key, g) for g in range(len(tables))]

    def publish(self, draw: Draw) -> None:
        """Some of a sequence's written tokens are committed."""
        key = self.some_key(draw)
        self.committed[key] = draw(st.integers(self.committed[key], self.written[key]))
        self.blocks.publish(key, self.committed[key])

    def fork(self, draw: Draw) -> None:
        """Share a part of another sequence; both may go on."""
        parent, child = self.some_key(draw), self.new_key()
        length = max(0, self.committed[parent] + 1 - draw(st.integers(0, 8)))
        tokens = self.tokens[parent][:length]
        if self.blocks.can_fork(parent, length):
            self.blocks.fork(parent, child, PrefixKeys((), tokens), length)
            self.tokens[child] = tokens
            self.written[child] = self.committed[child] = length
            for key in draw(st.permutations([parent, child])):
                self.grow(key, draw(st.lists(st.integers(0, 1), max_size=3)))
        else:
            with pytest.raises(CacheError, match="cannot share"):
                self.blocks.fork(parent, child, PrefixKeys((), tokens), length)

    def truncate(self, draw: Draw) -> None:
        """Go back, if no window forbids it."""
        key = self.some_key(draw)
        length = max(0, len(self.tokens[key]) - draw(st.integers(0, 12)))
        try:
            self.blocks.truncate(key, length)
        except CacheError:
            windows = [group.spec.window for group in self.blocks.groups]
            assert any(windows), "only a window forbids it"
            assert length < self.committed[key], "what was not computed can always go"
        else:
            del self.tokens[key][length:]
            self.written[key] = min(self.written[key], length)
            self.committed[key] = min(self.committed[key], length)

    def free(self, draw: Draw) -> None:
        """The end of a sequence."""
        key = self.some_key(draw)
        del self.tokens[key]
        self.blocks.free(key)

    def work(self, draw: Draw) -> None:
        """Steps as usual: everything is written, and committed, perhaps one plan later."""
        late = draw(st.booleans())
        while len(self.unsettled) > late:
            self.settle()
        before = dict(self.written)
        self.run_plan()
        for key in self.tokens:
            done = before[key] if late else self.written[key]
            self.committed[key] = max(self.committed[key], done)
            self.blocks.publish(key, self.committed[key])

    def run_plan(self) -> None:
        """Saves, loads, copies; then every sequence writes what it has room for."""
        slots = {key: key for key in self.tokens}
        for g, changes in enumerate(self.blocks.collect(slots)):
            for block, host_block in changes.saves:
                self.host[g, host_block] = dict(self.places[g, block])
            for block, host_block in changes.loads:
                self.places[g, block] = dict(self.host[g, host_block])
            for source, destination in changes.copies:
                self.places[g, destination] = dict(self.places.get((g, source), {}))
        queries = {}
        for key, tokens in self.tokens.items():
            values = marks(tokens)
            # A plan's queries are its new tokens; a sequence without any must be able to go on.
            queries[key] = range(self.written[key], len(tokens)) or [len(tokens)]
            for position in range(self.written[key], len(tokens)):
                index, place = divmod(position, self.blocks.block_size)
                for g in range(len(self.blocks.groups)):
                    block = self.blocks.blocks_of(key, g)[index]
                    assert block
                    self.places.setdefault((g, block), {})[place] = values[position]
            self.written[key] = len(tokens)
        self.unsettled.append(self.blocks.step)
        self.blocks.step += 1
        self.check()
        self.check_contents(queries)

    def settle(self) -> None:
        """A plan is committed."""
        self.blocks.settle(self.unsettled.popleft())
        self.check()

    def check(self) -> None:
        """The books."""
        self.blocks.check()

    def check_contents(self, queries: dict[int, Sequence[int]]) -> None:
        """What each query reads is its own; what is published is what its key says."""
        size = self.blocks.block_size
        for key, tokens in self.tokens.items():
            values = marks(tokens)
            for g, group in enumerate(self.blocks.groups):
                table = self.blocks.blocks_of(key, g)
                sinks, window = group.spec.sinks, group.spec.window
                for query in queries[key]:
                    low = 0 if window is None else max(0, query - window + 1)
                    end = min(query + 1, len(tokens))
                    for position in {*range(min(sinks, end)), *range(low, end)}:
                        block = table[position // size]
                        assert block
                        assert self.places[g, block][position % size] == values[position]
        for node in self.blocks.index:
            if node.parent is None:
                continue
            values = marks(path(node))[-size:]
            for g in range(len(self.blocks.groups)):
                if node.blocks[g]:
                    held = self.places[g, node.blocks[g]]
                    assert [held[i] for i in range(size)] == values
                if node.hosts[g] >= 0:
                    held = self.host[g, node.hosts[g]]
                    assert [held[i] for i in range(size)] == values

    def teardown(self) -> None:
        """Nothing is left when all is freed."""
        if self.blocks is None:
            return
        for key in list(self.tokens):
            self.blocks.free(key)
        while self.unsettled:
            self.settle()
        self.tokens.clear()
        self.run_plan()
        self.settle()
        for pool in self.blocks.pools:
            assert pool.num_available == pool.num_blocks - 1


def path(node: Node) -> list[int]:
    """The tokens up to and in a node."""
    if node.parent is None:
        return []
    return path(node.parent) + list(node.key[1])


def test_every_block_holds_what_its_owners_and_its_key_say() -> None:
    """Books and contents after every call."""
    run_state_machine_as_test(
        BlocksMachine,
        settings=settings(
            max_examples=examples(0.44),
            stateful_step_count=40,
            deadline=None,
            suppress_health_check=list(HealthCheck),
            phases=(Phase.explicit, Phase.reuse, Phase.generate, Phase.shrink),
            report_multiple_bugs=False,
        ),
    )
