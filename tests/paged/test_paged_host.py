"""Blocks go to host memory and come back bit for bit."""

import pytest
import torch
from paged_models import poison, random_tokens, run

from kvist.cache import CODECS, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged import PagedPool
from kvist.cache.paged_cache import PagedCache
from kvist.core.plan import GroupChanges, HostMove
from kvist.core.spec import AttentionSpec


def make_pool(codec, **options):
    sizes = {"num_blocks": 8, "block_size": 4, "max_slots": 1, "max_blocks": 4, "max_tokens": 8}
    specs = [AttentionSpec(2, 16), AttentionSpec(2, 16, window=5), AttentionSpec(2, 16)]
    return PagedPool(specs, make_codec(codec, torch.float32), **(sizes | options))


@pytest.mark.parametrize("codec", CODECS)
def test_block_comes_back_from_the_host_bit_for_bit(codec):
    pool = make_pool(codec, host_blocks=(3, 1))
    blocks, generator = pool.pools[0], torch.Generator().manual_seed(0)
    shape = (2, blocks.bytes_per_block)
    written = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)
    blocks.write_blocks([2, 5], written)
    saves = (HostMove(block=2, host_block=1), HostMove(block=5, host_block=0))
    pool.apply([GroupChanges(saves=saves), GroupChanges()])
    poison(blocks)
    loads = (HostMove(block=7, host_block=0), HostMove(block=1, host_block=1))
    pool.apply([GroupChanges(loads=loads), GroupChanges()])
    assert blocks.read_blocks([1, 7]).equal(written)
    assert [host.nbytes for host in pool.hosts] == [
        3 * pool.pools[0].bytes_per_block,
        pool.pools[1].bytes_per_block,
    ]


def test_one_plan_saves_a_block_before_it_loads_another_into_its_place():
    pool = make_pool("plain", host_blocks=2)
    blocks = pool.pools[0]
    old, new = torch.zeros(1, blocks.bytes_per_block).byte(), torch.ones(1, blocks.bytes_per_block)
    blocks.write_blocks([3, 4], torch.cat([new.byte(), old]))
    pool.apply([GroupChanges(saves=(HostMove(3, 0),)), GroupChanges()])
    plan = GroupChanges(saves=(HostMove(4, 1),), loads=(HostMove(4, 0),))
    pool.apply([plan, GroupChanges()])
    assert blocks.read_blocks([4]).equal(new.byte())
    pool.apply([GroupChanges(loads=(HostMove(5, 1),)), GroupChanges()])
    assert blocks.read_blocks([5]).equal(old)


def test_sequence_goes_on_after_a_round_trip_to_the_host(mixed):
    tokens = random_tokens(40, seed=1)
    codec = make_codec("plain", torch.float32)
    cache = PagedCache(mixed.specs, codec, block_size=4, num_blocks=16)
    run(mixed, cache, [tokens[:30]], [30])
    for blocks, pool in zip(cache.blocks, cache.pool.pools, strict=True):
        used = [b for b, users in enumerate(blocks.users) if users]
        kept = pool.read_blocks(used)
        poison(pool)
        pool.write_blocks(used, kept)
    expected = run(mixed, DynamicCache(mixed.specs, codec), [tokens], [40])[0][30:]
    assert (run(mixed, cache, [tokens[30:]], [3])[0] - expected).abs().max() < 1e-4
