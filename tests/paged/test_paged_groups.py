"""Layers fall into groups by spec, and a memory budget is divided between the groups."""

import pytest
import torch

from kvist.cache import make_codec
from kvist.cache.block_pool import BlockPool
from kvist.cache.groups import LayerGroup, blocks_for, bytes_per_token, group_layers
from kvist.core.retention import SlidingWindow
from kvist.core.spec import AttentionSpec, StateSpec
from kvist.errors import CacheError

FULL = AttentionSpec(2, 16)
SLIDING = AttentionSpec(2, 16, window=32)
PLAIN = make_codec("plain", torch.float32)


def budget(memory, groups, **options):
    sizes = {"block_size": 16, "context": 1024, "chunk": 64} | options
    return blocks_for(memory, groups, PLAIN, **sizes)


def test_layers_of_equal_spec_form_a_group():
    groups = group_layers([FULL, SLIDING, SLIDING, FULL])
    assert groups == (LayerGroup(FULL, (0, 3)), LayerGroup(SLIDING, (1, 2)))


def test_retention_decides_what_is_equal():
    groups = group_layers([FULL, SLIDING], SlidingWindow(window=32))
    assert groups == (LayerGroup(SLIDING, (0, 1)),)


def test_recurrent_layer_is_refused():
    with pytest.raises(CacheError, match="holds attention layers only"):
        group_layers([FULL, StateSpec(((4, 4),), "float32")])


def test_one_group_gets_all_the_memory():
    (group,) = group_layers([FULL, FULL])
    per_block = 16 * bytes_per_token(group, PLAIN)
    assert per_block == 16 * 2 * 2 * 2 * 16 * 4  # tokens, layers, sides, heads, channels, bytes
    assert budget(100 * per_block + 1, [group]) == (100,)


@pytest.mark.parametrize("memory", [3_000_000, 10_000_000, 50_000_001])
def test_budget_is_kept_and_used(memory):
    groups = group_layers([FULL, SLIDING, SLIDING, FULL])
    counts = budget(memory, groups)
    pools = [
        BlockPool(g, PLAIN, num_blocks=n, block_size=16)
        for g, n in zip(groups, counts, strict=True)
    ]
    taken = sum(pool.nbytes for pool in pools)
    assert memory - sum(pool.bytes_per_block for pool in pools) < taken <= memory


def test_groups_run_out_together_at_the_context_they_are_sized_for():
    full, sliding = budget(50_000_000, group_layers([FULL, SLIDING]))
    # A sequence of 1024 tokens fills 64 blocks; the window of 32 with chunks of 64 at most 11.
    assert (full - 1) / 64 == pytest.approx((sliding - 1) / 11, rel=0.02)


def test_memory_for_less_than_a_block_is_refused_with_both_numbers():
    with pytest.raises(CacheError, match=r"8,000 bytes are too few .* 8,192 bytes"):
        budget(8_000, group_layers([FULL]))


def test_guesses_that_may_be_taken_back_ask_for_more_of_a_window():
    groups = group_layers([FULL, SLIDING])
    _, without = budget(50_000_000, groups)
    _, sliding = budget(50_000_000, groups, slack=33)
    assert sliding > without
