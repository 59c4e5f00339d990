"""The ring: bounded for a window however long the sequence, exact as far as it says, no further."""

import pytest
import torch
from combinations import CHUNK, SLACK, cache_of, expected, model_of, poison, step

from kvist.cache import Batch, make_cache, make_codec
from kvist.cache.dense_view import DenseKV
from kvist.cache.ring import MAX_CHUNK, RingCache, RingKV, ring_size
from kvist.core.retention import SlidingWindow
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError
from kvist.loading.model import Model
from parity import assert_same_greedy

NAME = "grouped, 12"  # layers: window 9, full, window 9
WINDOW = 9
TOKENS = tuple((11 * i * i + 5 * i) % 61 for i in range(60))


@pytest.fixture
def model() -> Model:
    return model_of(NAME)


def ring_of(model: Model, *, chunk: int = CHUNK, slack: int = SLACK, **options: int) -> RingCache:
    codec = make_codec("plain", model.dtype)
    return RingCache(model.specs, codec, max_chunk=chunk, slack=slack, **options)


def fill(model: Model, cache: RingCache, until: int, chunk: int | None = None) -> None:
    while cache.lengths[0] < until:
        start = cache.lengths[0]
        step(model, cache, [TOKENS[start : min(start + (chunk or CHUNK), until)]])


def check_next(model: Model, cache: RingCache, tokens: tuple[int, ...] = TOKENS) -> None:
    """The next token's logits are the reference's, with NaN wherever nothing is held."""
    poison(cache)
    at = cache.lengths[0]
    [logits] = step(model, cache, [tokens[at : at + 1]])
    assert_same_greedy(expected(NAME, "plain", "all", tokens)[at : at + 1], logits)


def test_windowed_layers_stay_as_small_as_the_window_and_full_ones_grow(model: Model) -> None:
    cache = ring_of(model)
    fill(model, cache, 60)
    places = [layer["key"]["x"].shape[2] for layer in cache._layers]
    assert places[0] == places[2] == WINDOW + CHUNK - 1 + SLACK
    assert places[1] >= 60
    assert cache.get_seq_length(0) == places[0]
    assert cache.get_seq_length(1) == 60


def test_a_ring_never_moves(model: Model) -> None:
    cache = ring_of(model)
    fill(model, cache, 5)
    addresses = [cache._layers[0][side]["x"].data_ptr() for side in ("key", "value")]
    fill(model, cache, 60)
    cache.reorder([0])
    step(model, cache, [[1]])
    assert [cache._layers[0][side]["x"].data_ptr() for side in ("key", "value")] == addresses


def test_more_than_max_chunk_new_tokens_are_refused(model: Model) -> None:
    cache = ring_of(model)
    assert cache.max_chunk == CHUNK
    with pytest.raises(CacheError, match=r"6 new tokens.*at most 5"):
        cache.bind(Batch.pack([TOKENS[:6]], [0]))
    assert cache.lengths == (0,)
    check_next(model, cache)


def test_without_windows_a_ring_cache_takes_any_chunk() -> None:
    model = model_of("llama, 16")
    cache = ring_of(model)
    assert cache.max_chunk is None
    step(model, cache, [TOKENS])
    assert cache.lengths == (60,)


@pytest.mark.parametrize("slack", [0, 1, SLACK])
@pytest.mark.parametrize("broken_off", [False, True])
def test_going_back_is_exact_as_far_as_the_slack_and_refused_beyond(
    model: Model, slack: int, broken_off: bool
) -> None:
    # A step that was broken off may have overwritten a chunk more.
    reach = slack + (0 if broken_off else CHUNK)
    for length in range(WINDOW + CHUNK + 2 * reach, 48, 3):
        cache = ring_of(model, slack=slack)
        fill(model, cache, length)
        if broken_off:
            step(model, cache, [TOKENS[:CHUNK]], commit=False)
        with pytest.raises(CacheError, match=r"cannot go back to .* more slack"):
            cache.crop(length - reach - 1)
        assert cache.lengths == (length,)
        cache.crop(length - reach)
        check_next(model, cache)
        fill(model, cache, length)
        check_next(model, cache)


def test_going_back_to_the_beginning_is_always_possible(model: Model) -> None:
    cache = ring_of(model)
    for _ in range(2):
        fill(model, cache, 50)
        cache.reset()
        assert cache.lengths == (0,)
        check_next(model, cache)
        cache.reset()


def test_before_the_ring_closes_any_length_can_be_gone_back_to(model: Model) -> None:
    for back in range(15):
        cache = ring_of(model)
        fill(model, cache, 15)
        cache.crop(back)
        check_next(model, cache)


def test_a_negative_crop_drops_from_the_end(model: Model) -> None:
    cache = ring_of(model)
    fill(model, cache, 30)
    cache.crop(-3)
    assert cache.lengths == (27,)
    check_next(model, cache)


def test_rows_that_are_repeated_go_on_apart(model: Model) -> None:
    cache = ring_of(model)
    fill(model, cache, 30)
    cache.reorder([0, 0])
    other = (*TOKENS[:30], *reversed(TOKENS[30:]))
    for at in range(30, 45):
        found = step(model, cache, [TOKENS[at : at + 1], other[at : at + 1]])
        for tokens, logits in zip((TOKENS, other), found, strict=True):
            assert_same_greedy(expected(NAME, "plain", "all", tokens)[at : at + 1], logits)


def test_sinks_keep_their_places(model: Model) -> None:
    retention = SlidingWindow(6, sinks=3)
    codec = make_codec("plain", model.dtype)
    cache = RingCache(model.specs, codec, retention=retention, max_chunk=4, slack=0)
    fill(model, cache, 50, chunk=4)
    assert cache.held(0, 0) == (range(3), range(41, 50))
    assert cache.get_seq_length(0) == 12
    sinks = cache._layers[0]["key"]["x"][0, :, :3].clone()
    straight = cache_of(model, "dynamic", retention="window and sinks")
    step(model, straight, [TOKENS[:3]])
    torch.testing.assert_close(sinks, straight[0][0][0])  # type: ignore[index]


def test_looking_in_shows_what_is_held_in_order(model: Model) -> None:
    cache, straight = ring_of(model, rows=2), cache_of(model, "dynamic", rows=2)
    for c in (cache, straight):
        for start in range(0, 40, 4):
            step(model, c, [TOKENS[start : start + 4], TOKENS[start : start + (start < 20)]])
    for layer_idx in range(3):
        held = [cache.held(layer_idx, row) for row in range(2)]
        for side in (0, 1):
            found, whole = cache[layer_idx][side], straight[layer_idx][side]  # type: ignore[index]
            for row, [positions] in enumerate(held):
                theirs = whole[row, :, positions.start : positions.stop]
                torch.testing.assert_close(found[row, :, : len(positions)], theirs)
                assert not found[row, :, len(positions) :].any()


def test_a_ring_reads_like_a_dense_row_until_it_is_full(model: Model) -> None:
    cache = ring_of(model)
    seen = []
    for token in TOKENS[:30]:
        batch = Batch.pack([[token]], cache.lengths)
        bound = cache.bind(batch)
        spec = model.specs[0]
        x = torch.randn(1, spec.num_kv_heads, spec.head_dim)
        for layer_idx in range(3):
            view = bound.update(x, x, layer_idx)
            assert isinstance(view, RingKV) == (layer_idx != 1)
            if layer_idx == 0:
                assert isinstance(view, DenseKV)
                seen.append(view.in_order)
                assert (view.sequence(0)[2] is None) == view.in_order
        cache.commit(batch)
    assert seen == [n < WINDOW + CHUNK - 1 + SLACK for n in range(30)]


def test_a_window_that_sequences_cannot_outgrow_has_no_ring(model: Model) -> None:
    for length, rings in ((WINDOW + MAX_CHUNK, False), (4 * MAX_CHUNK, True)):
        cache = make_cache(model.specs, layout="ring", max_length=length, dtype=model.dtype)
        assert isinstance(cache, RingCache)
        assert bool(cache.ring_sizes) == rings
        assert cache.max_chunk == (MAX_CHUNK if rings else None)


def test_the_size_is_known_without_a_cache() -> None:
    spec = AttentionSpec(2, 8, window=100, sinks=4)
    assert ring_size(spec, max_chunk=10, slack=3) == 112
    assert ring_size(spec, 116, max_chunk=10, slack=3) is None
    assert ring_size(spec, 117, max_chunk=10, slack=3) == 112
    assert ring_size(AttentionSpec(2, 8)) is None


@pytest.mark.parametrize("sizes", [{"chunk": 0}, {"slack": -1}])
def test_sizes_that_make_no_sense_are_refused(model: Model, sizes: dict[str, int]) -> None:
    with pytest.raises(CacheError, match="max_chunk >= 1 and slack >= 0"):
        ring_of(model, **sizes)


def test_an_executor_is_told_how_large_the_rings_are(model: Model) -> None:
    cache = ring_of(model)
    bound = cache.bind(Batch.pack([[1]], [0]))
    sizes = [bound.ring_size(i) for i in range(len(cache.specs))]
    assert sizes == [cache.ring_sizes.get(spec, 0) for spec in cache.specs]
    assert any(sizes)
    assert len(bound.layers_in_place()) == len(sizes)
