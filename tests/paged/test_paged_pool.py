"""PagedPool as an engine uses it: slots, table changes, copies, and views that kernels can read."""

import time

import numpy as np
import pytest
import torch
from paged_models import WINDOW, poison, random_tokens

from kvist.attention import attend
from kvist.cache import CODECS, Batch, make_codec
from kvist.cache.paged import PagedPool
from kvist.core.plan import BlockCopy, GroupChanges, TableChange
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError

SPEC = AttentionSpec(num_kv_heads=2, head_dim=16)
SLIDING = AttentionSpec(num_kv_heads=2, head_dim=16, window=6, sinks=2)


def make_pool(specs, codec="plain", **options):
    sizes = {
        "num_blocks": 40,
        "block_size": 4,
        "max_slots": 4,
        "max_blocks": 16,
        "max_tokens": 64,
    }
    pool = PagedPool(specs, make_codec(codec, torch.float32), **(sizes | options))
    for blocks in pool.pools:
        poison(blocks)
    return pool


def tables(*rows):
    """Changes of one group that put whole tables into slots 0, 1, ..."""
    return GroupChanges(tables=tuple(TableChange(slot, 0, row) for slot, row in enumerate(rows)))


def step(pool, model, tokens, cached, slots):
    batch = Batch.pack(tokens, cached, slots=slots, logits="all")
    hidden = model.forward(model.embed(batch.token_ids), batch.positions, pool.bind(batch))
    return list(model.logits(hidden).split(list(batch.query_lens)))


def random_kv(pool, batch, layer_idx=0, seed=0):
    """Bind, write random keys and values, return the view and what was written."""
    generator = torch.Generator().manual_seed(seed)
    k, v = (torch.randn(batch.num_tokens, 2, 16, generator=generator) for _ in range(2))
    return pool.bind(batch).update(k, v, layer_idx), k, v


def test_two_sequences_read_the_prefix_that_one_of_them_wrote(llama):
    prefix, tails = random_tokens(8, seed=1), [random_tokens(5, seed=2), random_tokens(3, seed=3)]
    pool = make_pool(llama.specs)
    pool.apply([tables((7, 3, 9, 2), (7, 3, 5))])
    step(pool, llama, [prefix], [0], [0])
    shared = step(pool, llama, tails, [8, 8], [0, 1])
    for tail, logits in zip(tails, shared, strict=True):
        alone = make_pool(llama.specs)
        alone.apply([tables((1, 2, 3, 4))])
        expected = step(alone, llama, [prefix + tail], [0], [0])[0][8:]
        assert (logits - expected).abs().max() < 1e-4


def test_slots_may_come_in_any_order(llama):
    tokens = [random_tokens(5, seed=1), random_tokens(9, seed=2)]
    pool = make_pool(llama.specs)
    pool.apply([GroupChanges(tables=(TableChange(3, 0, (8, 2)), TableChange(1, 0, (4, 6, 1))))])
    a, b = step(pool, llama, tokens, [0, 0], [3, 1])
    c, d = step(pool, llama, [[5], [6]], [9, 5], [1, 3])
    for prompt, last, first, then in ((tokens[0], [6], a, d), (tokens[1], [5], b, c)):
        alone = make_pool(llama.specs)
        alone.apply([tables((1, 2, 3, 4))])
        expected = step(alone, llama, [prompt + last], [0], [0])[0]
        assert (torch.cat([first, then]) - expected).abs().max() < 1e-4


def test_copied_block_is_equal_and_its_own(llama):
    pool = make_pool(llama.specs)
    pool.apply([tables((1, 2))])
    step(pool, llama, [random_tokens(6)], [0], [0])
    pool.apply([GroupChanges(copies=(BlockCopy(2, 5),), tables=(TableChange(1, 0, (1, 5)),))])
    before = pool.pools[0].read_blocks([2, 5])
    assert before[0].equal(before[1])
    step(pool, llama, [[3]], [6], [1])
    after = pool.pools[0].read_blocks([2, 5])
    assert after[0].equal(before[0])
    assert not after[1].equal(before[1])


def test_copies_follow_one_another():
    pool = make_pool([SPEC])
    blocks = pool.pools[0]
    blocks.write_blocks([1, 2], torch.stack([torch.full((512 * 2,), n) for n in (1, 2)]).byte())
    blocks.copy_blocks([BlockCopy(2, 4), BlockCopy(1, 2), BlockCopy(2, 3)])
    assert [int(row[0]) for row in blocks.read_blocks([1, 2, 3, 4])] == [1, 1, 1, 2]


def test_table_changes_touch_the_named_entries_only():
    pool = make_pool([SPEC, SLIDING])
    pool.apply([tables((1, 2, 3)), tables((4, 5, 6))])
    changes = (TableChange(0, 1, (8,)), TableChange(0, 2, (9, 10)), TableChange(0, 2, (11,)))
    pool.apply([GroupChanges(tables=changes), GroupChanges()])
    assert pool.tables[0].device_table[0, :5].tolist() == [1, 8, 11, 10, 0]
    assert pool.tables[1].device_table[0, :5].tolist() == [4, 5, 6, 0, 0]


def test_admitted_slot_starts_out_with_null_entries():
    pool = make_pool([SPEC])
    pool.apply([tables((1, 2, 3), (4, 5, 6))])
    pool.apply([GroupChanges(tables=(TableChange(0, 0, (7,)),))], admitted=[0])
    assert pool.tables[0].device_table[:2, :3].tolist() == [[7, 0, 0], [4, 5, 6]]


def test_plan_without_changes_may_carry_no_groups():
    make_pool([SPEC, SLIDING]).apply([])


def test_buffers_of_a_step_stay_at_one_address():
    pool = make_pool([SPEC])
    pool.apply([tables((1, 2, 3), (4, 5), (6,))])
    addresses = set()
    for tokens, cached in (([[1], [2], [3]], [8, 4, 0]), ([[1, 2, 3]], [0]), ([[1], [1]], [9, 5])):
        kv, _, _ = random_kv(pool, Batch.pack(tokens, cached))
        shared = (
            kv.block_table,
            kv.kv_lens,
            kv.query_starts,
            kv.slot_mapping,
            kv.planes("key")["x"],
        )
        addresses.add(tuple(tensor.data_ptr() for tensor in shared))
        assert kv.block_table.stride() == (16, 1)
    assert len(addresses) == 1


def test_kernels_find_tables_lengths_and_places_in_the_view():
    pool = make_pool([SPEC])
    pool.apply([tables((3, 1, 2), (7, 5))])
    kv, k, _ = random_kv(pool, Batch.pack([[1, 2, 3], [4]], [6, 4], slots=[0, 1]))
    assert kv.block_table[:, :3].tolist() == [[3, 1, 2], [7, 5, 0]]
    assert kv.kv_lens.tolist() == [9, 5]
    assert kv.query_starts.tolist() == [0, 3, 4]
    assert kv.slot_mapping.tolist() == [1 * 4 + 2, 1 * 4 + 3, 2 * 4, 5 * 4]
    for dtype, tensor in (
        (torch.int32, kv.block_table),
        (torch.int32, kv.kv_lens),
        (torch.int32, kv.query_starts),
        (torch.int64, kv.slot_mapping),
    ):
        assert tensor.dtype == dtype
    plane = kv.planes("key")["x"]
    assert plane.shape == (40, 4, 2, 16)
    assert plane.is_contiguous()
    assert plane[1, 2].equal(k[0])
    assert plane[5, 0].equal(k[3])


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("lengths", [(9,), (9, 3, 14), (8, 8)])
@pytest.mark.parametrize("spec", [SPEC, SLIDING])
def test_dense_and_sequence_show_the_same_keys(spec, lengths, codec):
    pool = make_pool([spec], codec)
    rows = np.random.default_rng(0).permutation(np.arange(1, 13)).reshape(3, 4).tolist()
    pool.apply([tables(*map(tuple, rows))])
    batch = Batch.pack([[0] * n for n in lengths], [0] * len(lengths))
    random_kv(pool, batch)
    kv, _, _ = random_kv(pool, Batch.pack([[1]] * len(lengths), lengths), seed=1)
    keys, values, positions = kv.dense()
    assert not keys.isnan().any()
    assert not values.isnan().any()
    assert keys[positions < 0].count_nonzero() == values[positions < 0].count_nonzero() == 0
    for i, n in enumerate(lengths):
        k, v, p = kv.sequence(i)
        p = torch.arange(n + 1) if p is None else p
        held = positions[i] >= 0
        assert positions[i][held].equal(p)
        assert keys[i][held].equal(k)
        assert values[i][held].equal(v)
        seen = {*range(max(0, n - 5), n + 1), 0, 1} if spec is SLIDING else set(range(n + 1))
        assert seen <= set(p.tolist())


def test_null_entries_are_absent_and_positions_stay_absolute():
    pool = make_pool([SLIDING])
    pool.apply([tables((1, 2, 3, 4, 5))])
    first, k, _ = random_kv(pool, Batch.pack([[0] * 17], [0]))
    assert first.in_order
    # Position 17 looks at [12, 17] and at the sinks 0 and 1; blocks 1 and 2 were given back.
    pool.apply([GroupChanges(tables=(TableChange(0, 1, (0, 0)),))])
    for block in (2, 3):
        poison(pool.pools[0], [block])
    kv, _, _ = random_kv(pool, Batch.pack([[0]], [17]), seed=1)
    keys, _, positions = kv.sequence(0)
    assert positions.tolist() == [0, 1, 2, 3, 12, 13, 14, 15, 16, 17]
    assert keys[:4].equal(k[:4])
    assert keys[4:9].equal(k[12:])
    assert not kv.in_order


def test_null_entry_without_a_window_is_absent_too():
    pool = make_pool([SPEC])
    pool.apply([tables((1, 2, 3), (4, 5, 6))])
    random_kv(pool, Batch.pack([[0] * 9, [0] * 9], [0, 0]))
    pool.apply([GroupChanges(tables=(TableChange(1, 1, (0,)),))])
    kv, _, _ = random_kv(pool, Batch.pack([[0], [0]], [9, 9]))
    assert not kv.in_order
    assert kv.sequence(1)[2].tolist() == [0, 1, 2, 3, 8, 9]
    keys, _, positions = kv.dense()
    assert positions[1].tolist() == [0, 1, 2, 3, 8, 9, -1, -1, -1, -1]
    assert keys[1, 6:].count_nonzero() == 0


def test_consecutive_blocks_are_read_without_a_copy():
    pool = make_pool([SPEC])
    pool.apply([tables((5, 6, 7))])
    kv, _, _ = random_kv(pool, Batch.pack([[0] * 10], [0]))
    assert kv.sequence(0)[0].data_ptr() == kv.planes("key")["x"][5].data_ptr()


@pytest.mark.parametrize("backend", ["reference", "sdpa"])
def test_waiting_sequences_and_padding_rows_disturb_nobody(backend):
    tokens = Batch.pack([[0] * 6, [0] * 3], [0, 0])
    q = torch.randn(1, 4, 16, generator=torch.Generator().manual_seed(2))
    alone = make_pool([SPEC])
    alone.apply([tables((1, 2), (3,))])
    random_kv(alone, tokens)
    kv, k, v = random_kv(alone, Batch.pack([[1]], [6]), seed=1)
    expected = attend(q, kv, scale=0.25)

    pool = make_pool([SPEC])
    pool.apply([tables((1, 2), (3,))])
    random_kv(pool, tokens)
    padded = Batch.pack([[1], [], [0], [0]], [6, 3, 0, 0], slots=[0, 1, pool.null_slot, 4])
    bound = pool.bind(padded, backend=backend)
    kv = bound.update(*(torch.cat([x, x, x]) for x in (k, v)), 0)
    out = attend(torch.cat([q, q, q]), kv, scale=0.25)
    assert (out[:1] - expected).abs().max() < 1e-5
    assert kv.slot_mapping.tolist() == [2 * 4 + 2, 0, 0]


def test_windowed_view_reads_only_what_the_window_needs(mixed):
    pool = make_pool(mixed.specs, max_blocks=20)
    assert [group.layers for group in pool.groups] == [(0, 3), (1, 2)]
    row = tuple(range(1, 17))
    pool.apply([tables(row), tables(row)])
    step(pool, mixed, [random_tokens(60)], [0], [0])
    bound = pool.bind(Batch.pack([[1]], [60]))
    x = torch.zeros(1, 2, 16)
    assert bound.update(x, x, 0).sequence(0)[0].shape[0] == 61
    assert bound.update(x, x, 1).sequence(0)[0].shape[0] <= WINDOW + 4


@pytest.mark.parametrize(
    ("tokens", "cached", "message"),
    [
        ([[1]] * 5, [0] * 5, "this step has 5 sequences; the pool was made for 4"),
        ([[1] * 65], [0], "65 new tokens; the pool was made for 64"),
        ([[1]], [64], "17 blocks of 4 tokens for a sequence; the pool was made for 16"),
    ],
)
def test_step_that_is_too_large_is_refused_with_both_numbers(tokens, cached, message):
    with pytest.raises(CacheError, match=message):
        make_pool([SPEC]).bind(Batch.pack(tokens, cached))


def test_sizes_that_hold_nothing_are_refused():
    with pytest.raises(CacheError, match="num_blocks >= 2, not 1"):
        make_pool([SPEC], num_blocks=1)
    with pytest.raises(CacheError, match="block_size >= 1, not 0"):
        make_pool([SPEC], block_size=0)


@pytest.mark.parametrize("codec", CODECS)
def test_pool_takes_the_bytes_that_it_says(codec):
    pool = make_pool([SPEC, SLIDING, SPEC], codec, num_blocks=(30, 10))
    planes = [
        p for b in pool.pools for s in b.planes.values() for x in s.values() for p in x.values()
    ]
    assert pool.nbytes == sum(plane.nbytes for plane in planes)
    assert [b.nbytes // b.bytes_per_block for b in pool.pools] == [30, 10]


def test_batch_and_bind_of_256_long_sequences_take_a_millisecond():
    pool = make_pool(
        [AttentionSpec(1, 8)] * 2,
        num_blocks=600,
        block_size=16,
        max_slots=256,
        max_blocks=512,
        max_tokens=256,
    )
    entries = np.random.default_rng(0).integers(1, 600, (256, 512)).tolist()
    pool.apply([tables(*map(tuple, entries))])
    changes = [GroupChanges(tables=tuple(TableChange(s, 511, (7,)) for s in range(0, 256, 16)))]
    cached, slots, tokens = [8190] * 256, list(range(256)), [[5]] * 256
    best = min(
        _timed(lambda: (pool.apply(changes), pool.bind(Batch.pack(tokens, cached, slots=slots))))
        for _ in range(20)
    )
    assert best < 1e-3, f"{best * 1e3:.2f} ms"


def _timed(work):
    start = time.perf_counter()
    work()
    return time.perf_counter() - start
