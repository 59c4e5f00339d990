"""PagedCache gives the dense layouts' results, whatever is shared, freed, aborted or poisoned."""

import pytest
import torch
from paged_models import WINDOW, forward, poison, random_tokens, run

from kvist.cache import CODECS, Batch, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged_cache import PagedCache
from kvist.core.retention import SlidingWindow
from kvist.errors import CacheError, CacheFull, UnknownLayer

PROMPTS = [random_tokens(n, seed=n) for n in (37, 1, 16, 25)]


def dense_cache(model, rows=1, codec="plain", retention=None):
    return DynamicCache(
        model.specs, make_codec(codec, torch.float32), rows=rows, retention=retention
    )


def paged_cache(model, rows=1, codec="plain", poisoned=True, **options):
    cache = PagedCache(model.specs, make_codec(codec, torch.float32), rows=rows, **options)
    if poisoned:
        # A large enough pool from the start, all of it NaN, the null block too.
        assert options.get("num_blocks"), "only a pool that does not grow stays poisoned"
        for pool in cache.pool.pools:
            poison(pool)
    return cache


def assert_same(ours, theirs):
    for a, b in zip(ours, theirs, strict=True):
        assert not a.isnan().any()
        assert (a - b).abs().max() < 1e-4
        assert a.argmax(-1).equal(b.argmax(-1))


@pytest.mark.parametrize("backend", ["reference", "sdpa", None])
@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_ragged_batch_in_chunks_equals_each_prompt_alone(model, block_size, backend):
    cache = paged_cache(model, rows=4, block_size=block_size, num_blocks=120)
    together = run(model, cache, PROMPTS, chunks=[5, 1, 7, 32], backend=backend)
    alone = [run(model, dense_cache(model), [prompt], [64])[0] for prompt in PROMPTS]
    assert_same(together, alone)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_gives_the_dense_layouts_results(mixed, codec):
    cache = paged_cache(mixed, rows=2, codec=codec, block_size=4, num_blocks=40)
    dense = dense_cache(mixed, rows=2, codec=codec)
    sequences, chunks = [PROMPTS[0], PROMPTS[3]], [6, 3]
    assert_same(run(mixed, cache, sequences, chunks), run(mixed, dense, sequences, chunks))


@pytest.mark.parametrize("block_size", [1, 4, 16])
@pytest.mark.parametrize("sinks", [0, 3])
def test_window_with_sinks_gives_the_dense_layouts_results(model, sinks, block_size):
    policy = SlidingWindow(window=7, sinks=sinks)
    cache = paged_cache(
        model, rows=2, block_size=block_size, num_blocks=120, slack=0, retention=policy
    )
    dense = dense_cache(model, rows=2, retention=policy)
    sequences, chunks = [PROMPTS[0], PROMPTS[3]], [4, 1]
    assert_same(run(model, cache, sequences, chunks), run(model, dense, sequences, chunks))


def test_uniform_decode_of_several_rows_equals_each_alone(model):
    sequences = [random_tokens(30, seed=i) for i in range(3)]
    cache = paged_cache(model, rows=3, block_size=4, num_blocks=60)
    together = run(model, cache, sequences, chunks=[1, 1, 1])
    alone = [run(model, dense_cache(model), [tokens], [30])[0] for tokens in sequences]
    assert_same(together, alone)


def test_blocks_behind_a_window_are_given_back_and_used_again(mixed):
    tokens = random_tokens(200, seed=1)
    # The sliding group gets along with the window and a block or two, the full one cannot.
    cache = PagedCache(mixed.specs, make_codec("plain", torch.float32), block_size=4, slack=0)
    logits = run(mixed, cache, [tokens], [3])
    full, sliding = (sum(n > 0 for n in blocks.users) for blocks in cache.blocks)
    assert full == 50
    assert sliding <= WINDOW // 4 + 1
    assert len(cache.blocks[1].users) < 12
    assert_same(logits, run(mixed, dense_cache(mixed), [tokens], [200]))


def test_freed_blocks_are_never_looked_at_again(mixed):
    tokens = random_tokens(60, seed=2)
    cache = paged_cache(mixed, block_size=4, num_blocks=20, slack=0)
    expected = run(mixed, dense_cache(mixed), [tokens], [60])[0]
    for i in range(0, 60, 3):
        logits = forward(mixed, cache, [tokens[i : i + 3]])[0]
        assert (logits - expected[i : i + 3]).abs().max() < 1e-4
        for blocks, pool in zip(cache.blocks, cache.pool.pools, strict=True):
            poison(pool, [b for b, users in enumerate(blocks.users) if users == 0])


def test_fork_shares_all_blocks_until_one_writes(model):
    prompt = random_tokens(18, seed=3)
    cache = paged_cache(model, block_size=4, num_blocks=20)
    run(model, cache, [prompt], [18])
    before = [[b for b, n in enumerate(blocks.users) if n] for blocks in cache.blocks]
    cache.reorder([0, 0, 0])
    assert cache.lengths == (18, 18, 18)
    assert [[b for b, n in enumerate(blocks.users) if n] for blocks in cache.blocks] == before
    # Block 4 holds positions 16 to 19: two of three write to a copy, the last one keeps it.
    forward(model, cache, [[1], [2], [3]])
    after = [[b for b, n in enumerate(blocks.users) if n] for blocks in cache.blocks]
    assert [len(a) - len(b) for a, b in zip(after, before, strict=True)] == [2] * len(before)


@pytest.mark.parametrize("block_size", [1, 4, 16])
def test_forks_go_separate_ways(model, block_size):
    prompt, tails = random_tokens(18, seed=3), [random_tokens(9, seed=s) for s in (5, 6, 7)]
    cache = paged_cache(model, block_size=block_size, num_blocks=60)
    run(model, cache, [prompt], [18])
    cache.reorder([0, 0, 0])
    forked = run(model, cache, tails, [1, 4, 2])
    alone = [run(model, dense_cache(model), [prompt + tail], [64])[0][18:] for tail in tails]
    assert_same(forked, alone)


def test_reorder_drops_permutes_and_repeats_rows_like_dense(model):
    cache, dense = paged_cache(model, rows=3, block_size=4, num_blocks=60), dense_cache(model, 3)
    for tokens, rows in (([PROMPTS[3], PROMPTS[1], PROMPTS[2]], [2, 0]), ([[4], [5]], [1, 1, 0])):
        assert_same(forward(model, cache, tokens), forward(model, dense, tokens))
        cache.reorder(rows)
        dense.reorder(rows)
        assert cache.lengths == dense.lengths
    tails = [random_tokens(6, seed=s) for s in (8, 9, 10)]
    assert_same(forward(model, cache, tails), forward(model, dense, tails))


def test_dropped_rows_give_their_blocks_back(llama):
    cache = PagedCache(llama.specs, make_codec("plain", torch.float32), rows=3, block_size=4)
    run(llama, cache, [PROMPTS[0], PROMPTS[2], PROMPTS[3]], [64] * 3)
    cache.reorder([1])
    assert sum(n > 0 for n in cache.blocks[0].users) == 4
    cache.reset()
    assert cache.lengths == (0,)
    assert not any(cache.blocks[0].users)


def test_aborted_step_leaves_no_trace(model):
    prompt, tail = random_tokens(21, seed=4), random_tokens(8, seed=5)
    cache = paged_cache(model, block_size=4, num_blocks=40)
    run(model, cache, [prompt], [21])
    forward(model, cache, [random_tokens(11, seed=6)], commit=False)
    assert cache.lengths == (21,)
    expected = run(model, dense_cache(model), [prompt + tail], [64])[0][21:]
    assert_same(run(model, cache, [tail], [3]), [expected])


def test_aborted_step_of_a_fork_does_not_reach_its_sibling(model):
    prompt, tail = random_tokens(18, seed=4), random_tokens(8, seed=5)
    cache = paged_cache(model, block_size=4, num_blocks=40)
    run(model, cache, [prompt], [18])
    cache.reorder([0, 0])
    forward(model, cache, [random_tokens(5, seed=6), []], commit=False)
    expected = run(model, dense_cache(model), [prompt + tail], [64])[0][18:]
    assert_same(run(model, cache, [tail, tail], [3, 2]), [expected, expected])


@pytest.mark.parametrize("length", [0, 1, 15, 16, 17])
def test_crop_goes_back_and_on_along_another_way(llama, length):
    prompt, tail = random_tokens(22, seed=4), random_tokens(8, seed=5)
    cache = paged_cache(llama, block_size=4, num_blocks=40)
    run(llama, cache, [prompt], [22])
    cache.crop(length)
    assert cache.lengths == (length,)
    assert sum(n > 0 for n in cache.blocks[0].users) == -(-length // 4)
    expected = run(llama, dense_cache(llama), [prompt[:length] + tail], [64])[0][length:]
    assert_same(run(llama, cache, [tail], [3]), [expected])


def test_crop_of_a_fork_leaves_its_sibling_alone(llama):
    prompt, tail = random_tokens(18, seed=4), random_tokens(8, seed=5)
    cache = paged_cache(llama, block_size=4, num_blocks=40)
    run(llama, cache, [prompt], [18])
    cache.reorder([0, 0])
    run(llama, cache, [[], [7, 8]], [1, 1])
    cache.crop(17)
    expected = run(llama, dense_cache(llama), [prompt[:17] + tail], [64])[0][17:]
    assert_same(run(llama, cache, [tail, tail], [1, 8]), [expected, expected])


def test_negative_crop_drops_from_the_end(llama):
    cache = paged_cache(llama, num_blocks=4)
    run(llama, cache, [random_tokens(10)], [10])
    cache.crop(-3)
    assert cache.lengths == (7,)


def test_crop_takes_a_length_for_each_row(llama):
    cache = paged_cache(llama, rows=2, block_size=4, num_blocks=20)
    run(llama, cache, [random_tokens(10), random_tokens(9)], [10, 10])
    cache.crop([3, 20])
    assert cache.lengths == (3, 9)


def test_cache_filled_in_inference_mode_goes_on_outside_it(llama):
    cache = PagedCache(llama.specs, make_codec("plain", torch.float32), block_size=4)
    with torch.inference_mode():
        run(llama, cache, [random_tokens(10)], [10])
    cache.reorder([0, 0])
    forward(llama, cache, [[1, 2, 3], [4]])
    assert cache.lengths == (13, 11)


def test_crop_behind_a_window_is_refused_and_changes_nothing(mixed):
    prompt, tail = random_tokens(40, seed=4), random_tokens(8, seed=5)
    cache = paged_cache(mixed, block_size=4, num_blocks=40)
    run(mixed, cache, [prompt], [40])
    with pytest.raises(CacheError, match="cannot go back to 20 of 40 tokens"):
        cache.crop(20)
    assert cache.lengths == (40,)
    expected = run(mixed, dense_cache(mixed), [prompt + tail], [64])[0][40:]
    assert_same(run(mixed, cache, [tail], [3]), [expected])


@pytest.mark.parametrize("block_size", [1, 4])
def test_slack_lets_a_window_go_back(mixed, block_size):
    prompt, tail = random_tokens(40, seed=4), random_tokens(8, seed=5)
    cache = paged_cache(mixed, block_size=block_size, num_blocks=60, slack=5)
    run(mixed, cache, [prompt], [40])
    cache.crop(35)
    expected = run(mixed, dense_cache(mixed), [prompt[:35] + tail], [64])[0][35:]
    assert_same(run(mixed, cache, [tail], [3]), [expected])


def test_reset_behind_a_window_starts_anew(mixed):
    cache = paged_cache(mixed, block_size=4, num_blocks=20)
    run(mixed, cache, [random_tokens(40, seed=4)], [7])
    cache.reset()
    tokens = random_tokens(30, seed=5)
    expected = run(mixed, dense_cache(mixed), [tokens], [64])
    assert_same(run(mixed, cache, [tokens], [4]), expected)


def test_full_pool_raises_before_anything_changes(llama):
    cache = paged_cache(llama, rows=2, block_size=4, num_blocks=6)
    prompt, tail = random_tokens(13, seed=4), random_tokens(3, seed=5)
    forward(llama, cache, [prompt, [1, 2]])
    with pytest.raises(CacheFull, match=r"needs 2 more blocks of 4 tokens.* has 1 of 6 free"):
        forward(llama, cache, [random_tokens(4), random_tokens(3)])
    assert cache.lengths == (13, 2)
    expected = run(llama, dense_cache(llama), [prompt + tail], [64])[0][13:]
    assert_same(forward(llama, cache, [tail, []])[:1], [expected])


def test_fork_needs_a_copy_only_where_others_still_share(llama):
    # Three rows share a block; a pool with two free blocks is enough for all of them to write.
    cache = paged_cache(llama, block_size=4, num_blocks=3)
    run(llama, cache, [[1, 2]], [2])
    cache.reorder([0, 0, 0])
    forward(llama, cache, [[3], [4], [5]])
    assert cache.blocks[0].num_free == 0


def test_pool_grows_geometrically(llama):
    cache = PagedCache(llama.specs, make_codec("plain", torch.float32), block_size=4)
    sizes = set()
    for token in random_tokens(120):
        forward(llama, cache, [[token]])
        sizes.add(cache.nbytes)
    assert len(sizes) < 12


def test_layer_that_wrote_nothing_is_an_error_at_commit(llama):
    cache = paged_cache(llama, num_blocks=4)
    batch = Batch.pack([[1, 2]], [0])
    bound = cache.bind(batch)
    bound.update(torch.zeros(2, 2, 16), torch.zeros(2, 2, 16), 0)
    with pytest.raises(CacheError, match=r"layers \[1\] wrote nothing"):
        cache.commit(batch)


def test_unknown_layer_and_recurrent_state_are_refused(llama):
    bound = paged_cache(llama, num_blocks=4).bind(Batch.pack([[1]], [0]))
    with pytest.raises(UnknownLayer, match="layer 7 is not one of this cache's 2 layers"):
        bound.update(torch.zeros(1, 2, 16), torch.zeros(1, 2, 16), 7)
    with pytest.raises(UnknownLayer, match="no recurrent state"):
        bound.state(0)


@pytest.mark.parametrize(
    ("options", "message"),
    [({"rows": 0}, "rows=0"), ({"num_blocks": 0}, "num_blocks=0"), ({"slack": -1}, "slack=-1")],
)
def test_senseless_sizes_are_refused(llama, options, message):
    with pytest.raises(CacheError, match=message):
        PagedCache(llama.specs, make_codec("plain", torch.float32), **options)


def test_wrong_slots_lengths_and_rows_are_refused(llama):
    cache = paged_cache(llama, rows=2, num_blocks=4)
    with pytest.raises(CacheError, match="slots"):
        cache.bind(Batch.pack([[1]], [0]))
    with pytest.raises(CacheError, match="goes on at lengths"):
        cache.bind(Batch.pack([[1], [1]], [0, 3]))
    with pytest.raises(CacheError, match="reorder takes rows"):
        cache.reorder([2])


def test_repr_counts_blocks(llama):
    cache = paged_cache(llama, block_size=4, num_blocks=6)
    run(llama, cache, [random_tokens(9)], [9])
    assert "lengths=[9], blocks=[3] of [6] x 4" in repr(cache)
