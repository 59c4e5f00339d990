"""Whatever is done to a cache, it gives the reference's tokens.

Layout x codec x retention x attention, each drawn with a tiny model of its own, in ragged batches,
chunk by chunk, with steps that are broken off, rows that are dropped, repeated and exchanged, turns
taken back, and free places full of NaN. What registers itself in LAYOUTS, CODECS or BACKENDS is
tested here without being named.
"""

import random
from collections.abc import Iterator

import pytest
import torch
from combinations import (
    ATTENTION,
    CHUNK,
    LENGTH,
    MODELS,
    RETENTIONS,
    SLACK,
    VOCAB,
    cache_of,
    expected,
    model_of,
    poison,
    step,
    tolerance,
    without_a_cache,
)

from kvist.cache import CODECS, LAYOUTS, Batch, Cache
from kvist.errors import CacheError, CacheFull, UnknownLayer
from kvist.loading.model import Model
from parity import Tally, assert_same_greedy

every_layout = pytest.mark.parametrize("layout", LAYOUTS)
every_codec = pytest.mark.parametrize("codec", CODECS)
every_retention = pytest.mark.parametrize("retention", RETENTIONS)
every_model = pytest.mark.parametrize("name", MODELS)


@pytest.fixture(scope="module")
def tally() -> Iterator[Tally]:
    """Ties of the whole suite."""
    found = Tally()
    yield found
    found.check()


def drawn(rng: random.Random, count: int) -> tuple[int, ...]:
    return tuple(rng.randrange(VOCAB) for _ in range(count))


class Player:
    """A cache and what its rows should hold; compares every logit with the reference's."""

    def __init__(self, rng: random.Random, layout: str, codec: str, retention: str, rows: int):
        self.rng, self.rows_wanted = rng, rows
        self.name = rng.choice(list(MODELS))
        self.kind = (codec, retention)
        self.model = model_of(self.name)
        # Sequences, to be written from their beginning, and how much of each is.
        self.sequences = [drawn(rng, rng.choice((1, 9, 30, 45))) for _ in range(rows)]
        self.cache = cache_of(self.model, layout, codec, retention, rows)
        self.longest = [0] * rows  # that each row ever was

    @property
    def left(self) -> list[int]:
        return [len(s) - n for s, n in zip(self.sequences, self.cache.lengths, strict=True)]

    def new_tokens(self, most: int) -> list[tuple[int, ...]]:
        """Some of what is left of each row; rows may wait."""
        counts = [min(left, self.rng.randint(0, most)) for left in self.left]
        if not any(counts):  # a step without any token is no step
            counts = [min(left, 1) for left in self.left]
        lengths = self.cache.lengths
        return [s[n : n + c] for s, n, c in zip(self.sequences, lengths, counts, strict=True)]

    def forward(self, tally: Tally, most: int = CHUNK, attention: str | None = None) -> None:
        """A step, compared."""
        starts, new = self.cache.lengths, self.new_tokens(most)
        attention = attention or self.rng.choice(ATTENTION)
        found = step(self.model, self.cache, new, attention)
        for sequence, start, logits in zip(self.sequences, starts, found, strict=True):
            reference = expected(self.name, *self.kind, sequence)[start : start + len(logits)]
            within = tolerance(self.name, *self.kind, sequence)
            assert_same_greedy(reference, logits, tally, within=within)
        self.longest = list(map(max, self.longest, self.cache.lengths))

    def break_off(self) -> None:
        """A step that writes half of the layers something else, and is never committed."""
        before = self.cache.lengths
        batch = Batch.pack(self.new_tokens(CHUNK), before)
        bound = self.cache.bind(batch)
        for layer_idx, spec in enumerate(self.model.specs[: len(self.model.specs) // 2 + 1]):
            shape = (batch.num_tokens, spec.num_kv_heads, spec.head_dim)
            bound.update(torch.full(shape, 9.0), torch.full(shape, torch.nan), layer_idx)
        assert self.cache.lengths == before

    def go_back(self) -> None:
        """No row further than the slack behind where it has been."""
        lengths = [
            self.rng.randint(max(0, longest - SLACK), n)
            for n, longest in zip(self.cache.lengths, self.longest, strict=True)
        ]
        self.cache.crop(lengths)
        assert list(self.cache.lengths) == lengths

    def reorder(self) -> None:
        """Rows are dropped, exchanged, repeated; a repeated one goes on in its own way."""
        count = len(self.sequences)
        rows = [self.rng.randrange(count) for _ in range(self.rng.randint(1, self.rows_wanted))]
        self.cache.reorder(rows)
        held = self.cache.lengths
        self.longest = [self.longest[row] for row in rows]
        self.sequences = [
            self.sequences[row][:n] + drawn(self.rng, min(12, LENGTH - n))
            for row, n in zip(rows, held, strict=True)
        ]


@every_retention
@every_codec
@every_layout
def test_any_chunks_and_neighbours_give_the_references_tokens(
    layout: str, codec: str, retention: str, tally: Tally
) -> None:
    for attention in ATTENTION:
        rng = random.Random(f"{layout} {codec} {retention} {attention}")
        player = Player(rng, layout, codec, retention, rows=3)
        while any(player.left):
            player.forward(tally, most=rng.choice((1, CHUNK)), attention=attention)


@every_retention
@every_codec
@every_layout
def test_whatever_happens_on_the_way_gives_the_references_tokens(
    layout: str, codec: str, retention: str, tally: Tally
) -> None:
    rng = random.Random(f"{layout} {codec} {retention}")
    player = Player(rng, layout, codec, retention, rows=3)
    for _ in range(14):
        happening = rng.choice((player.break_off, player.go_back, player.reorder, None))
        if happening is not None and any(player.left):
            happening()
        poison(player.cache)
        if any(player.left):
            player.forward(tally)


@every_retention
@every_model
def test_lossless_is_what_weights_and_mask_alone_give(name: str, retention: str) -> None:
    tokens = drawn(random.Random(name), 40)
    found = expected(name, "plain", retention, tokens)
    assert_same_greedy(without_a_cache(model_of(name), tokens, RETENTIONS[retention]), found)


@every_layout
def test_each_row_alone_decodes_like_all_of_them_at_once(layout: str) -> None:
    model, rng = model_of("grouped, 12"), random.Random(layout)
    sequences = [drawn(rng, 24) for _ in range(4)]
    together = cache_of(model, layout, rows=4)
    alone = [cache_of(model, layout) for _ in sequences]
    for i in range(24):
        logits = step(model, together, [s[i : i + 1] for s in sequences])
        for row, cache in enumerate(alone):
            [own] = step(model, cache, [sequences[row][i : i + 1]])
            assert_same_greedy(own, logits[row], within=1e-4)


# What a contract forbids.


@pytest.fixture(params=LAYOUTS)
def three(request: pytest.FixtureRequest) -> tuple[Model, Cache]:
    """A cache of each layout that holds three tokens."""
    model = model_of("llama, 16")
    cache = cache_of(model, request.param)
    step(model, cache, [[1, 2, 3]])
    return model, cache


def test_a_batch_that_does_not_go_on_where_the_cache_ends_is_refused(
    three: tuple[Model, Cache],
) -> None:
    model, cache = three
    for cached in (2, 4):
        with pytest.raises(CacheError, match=rf"\[{cached}\].*\[3\]"):
            cache.bind(Batch.pack([[1]], [cached]))
        with pytest.raises(CacheError, match=rf"\[{cached}\].*\[3\]"):
            cache.commit(Batch.pack([[1]], [cached]))
    tokens = (1, 2, 3, 4)
    [logits] = step(model, cache, [[4]])
    assert_same_greedy(expected("llama, 16", "plain", "all", tokens)[3:], logits)


def test_a_batch_of_other_rows_is_refused(three: tuple[Model, Cache]) -> None:
    _, cache = three
    with pytest.raises(CacheError, match="rows"):
        cache.bind(Batch.pack([[1], [2]], [3, 0]))
    with pytest.raises(CacheError, match="rows"):
        cache.bind(Batch.pack([[1]], [3], slots=[1]))


def test_rows_that_are_not_there_cannot_be_reordered(three: tuple[Model, Cache]) -> None:
    _, cache = three
    for rows in ([], [1], [-1]):
        with pytest.raises(CacheError, match="reorder takes rows"):
            cache.reorder(rows)
    assert cache.lengths == (3,)


def test_an_unknown_layer_is_named(three: tuple[Model, Cache]) -> None:
    model, cache = three
    bound, spec = cache.bind(Batch.pack([[1]], [3])), model.specs[0]
    x = torch.zeros(1, spec.num_kv_heads, spec.head_dim)
    for layer_idx in (-1, 2, 99):
        with pytest.raises(UnknownLayer, match=str(layer_idx)):
            bound.update(x, x, layer_idx)
    with pytest.raises(UnknownLayer):
        bound.state(0)


def test_a_static_cache_that_is_full_says_so_before_anything_is_written() -> None:
    model, rng = model_of("llama, 16"), random.Random(0)
    tokens = drawn(rng, LENGTH)
    cache = cache_of(model, "static")
    step(model, cache, [tokens[:-1]])
    with pytest.raises(CacheFull, match=rf"{LENGTH + 1} tokens.*room for {LENGTH}"):
        cache.bind(Batch.pack([[5, 6]], cache.lengths))
    [logits] = step(model, cache, [tokens[-1:]])
    assert_same_greedy(expected("llama, 16", "plain", "all", tokens)[-1:], logits)


@pytest.mark.parametrize("layout", ["dynamic", "static", "ring"])
@every_codec
def test_a_layer_filled_late_sees_what_it_was_given(layout: str, codec: str) -> None:
    model = model_of("grouped, 12")
    torch.manual_seed(0)
    late, early = cache_of(model, layout, codec, rows=2), cache_of(model, layout, codec, rows=2)
    # The last layer misses a first step of 3 and 1 tokens, whose positions it then lacks.
    for tokens, layers in (([[1] * 3, [1]], (0, 1)), ([[1] * 2, [1] * 4], (0, 1, 2))):
        batch = Batch.pack(tokens, late.lengths)
        bound = late.bind(batch)
        for layer_idx in layers:
            spec = model.specs[layer_idx]
            shape = (batch.num_tokens, spec.num_kv_heads, spec.head_dim)
            keys, values = torch.randn(shape), torch.randn(shape)
            view = bound.update(keys, values, layer_idx)
        late.commit(batch)
        poison(late)
    only = early.bind(Batch.pack([[1] * 2, [1] * 4], early.lengths)).update(keys, values, 2)
    assert not view.in_order
    assert late.get_seq_length(2) == 4
    for row, first in enumerate((3, 1)):
        k, v, positions = view.sequence(row)
        ours, theirs, _ = only.sequence(row)
        if positions is None:
            positions = torch.arange(len(k))
        held = positions >= 0
        assert positions[held].tolist() == list(range(first, 5))
        torch.testing.assert_close(k[held], ours)
        torch.testing.assert_close(v[held], theirs)
    k, v, positions = view.dense()
    assert (k[positions < 0] == 0).all()
    assert (v[positions < 0] == 0).all()
