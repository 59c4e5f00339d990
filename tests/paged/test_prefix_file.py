"""A prefix survives in a file, and is refused where it does not belong."""

import re

import pytest
import torch
from paged_models import WINDOW, poison, random_tokens, run
from safetensors.torch import load_file, save_file

from kvist.cache import CODECS, make_codec
from kvist.cache.dense import DynamicCache
from kvist.cache.paged import PagedPool
from kvist.cache.paged_cache import PagedCache
from kvist.cache.prefix_file import open_prefix, save_prefix
from kvist.core.spec import AttentionSpec
from kvist.errors import CacheError

TOKENS = random_tokens(40, seed=1)


def make_cache(model, codec="plain", block_size=4):
    return PagedCache(
        model.specs, make_codec(codec, torch.float32), block_size=block_size, num_blocks=64, slack=0
    )


def export(model, path, codec="plain", block_size=4):
    """The first 32 of TOKENS in a file."""
    cache = make_cache(model, codec, block_size)
    run(model, cache, [TOKENS[:32]], [7])
    tables = [rows[0] for rows in cache.tables]
    save_prefix(path, cache.pool, tables, TOKENS[:32], model="model-a", extra="adapter-1")
    return cache


def reopen(path, pool, **changes):
    expected = {"model": "model-a", "extra": "adapter-1", "token_ids": TOKENS[:32]}
    return open_prefix(path, pool, **(expected | changes))


def goes_on_from(path, model, codec, block_size):
    """Whether a poisoned cache, filled from the file, goes on like an unbroken sequence."""
    cache = make_cache(model, codec, block_size)
    run(model, cache, [random_tokens(32, seed=9)], [5])
    for blocks in cache.pool.pools:
        poison(blocks)
    reopen(path, cache.pool).restore([rows[0] for rows in cache.tables])
    dense = DynamicCache(model.specs, make_codec(codec, torch.float32))
    expected = run(model, dense, [TOKENS], [40])[0][32:]
    return (run(model, cache, [TOKENS[32:]], [3])[0] - expected).abs().max() < 1e-4


@pytest.mark.parametrize("codec", CODECS)
def test_restored_prefix_goes_on_like_the_unbroken_sequence(mixed, tmp_path, codec):
    cache = export(mixed, tmp_path / "p", codec)
    assert cache.tables[1][0].count(0) > 0  # behind the window, so not in the file
    assert goes_on_from(tmp_path / "p", mixed, codec, block_size=4)


@pytest.mark.parametrize("block_size", [1, 2, 16])
def test_pool_of_another_block_size_reads_the_file(llama, tmp_path, block_size):
    export(llama, tmp_path / "p")
    assert goes_on_from(tmp_path / "p", llama, "plain", block_size)


def test_smaller_blocks_fit_into_a_window_and_larger_ones_are_refused(mixed, tmp_path):
    export(mixed, tmp_path / "p")
    assert goes_on_from(tmp_path / "p", mixed, "plain", block_size=2)
    with pytest.raises(CacheError, match="does not hold position 16"):
        goes_on_from(tmp_path / "p", mixed, "plain", block_size=16)


def test_file_gives_its_own_tokens(llama, tmp_path):
    cache = export(llama, tmp_path / "p")
    found = open_prefix(tmp_path / "p", cache.pool, model="model-a", extra="adapter-1")
    assert found.token_ids == tuple(TOKENS[:32])


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"model": "model-b"}, "has model 'model-a', but 'model-b' is needed"),
        ({"extra": ""}, "has extra 'adapter-1', but '' is needed"),
        ({"token_ids": [*TOKENS[:9], 99]}, f"other tokens: {TOKENS[9]} at position 9, not 99"),
        ({"token_ids": TOKENS[:31]}, "holds 32 tokens, not 31"),
    ],
)
def test_prefix_of_something_else_is_refused_with_the_reason(llama, tmp_path, changes, message):
    cache = export(llama, tmp_path / "p")
    with pytest.raises(CacheError, match=re.escape(message)):
        reopen(tmp_path / "p", cache.pool, **changes)


def test_prefix_of_another_codec_is_refused(llama, tmp_path):
    export(llama, tmp_path / "p")
    half = PagedCache(llama.specs, make_codec("plain", torch.bfloat16)).pool
    with pytest.raises(CacheError, match=r"has codec 'plain\(.*float32.* is needed"):
        reopen(tmp_path / "p", half)


def test_prefix_of_another_shape_is_refused(llama, tmp_path):
    export(llama, tmp_path / "p")
    wider = PagedCache([AttentionSpec(4, 16)] * 2, make_codec("plain", torch.float32)).pool
    with pytest.raises(CacheError, match=r"layers\.0\.key\.x is missing or has another shape"):
        reopen(tmp_path / "p", wider)


def test_changed_tokens_and_other_files_are_refused(llama, tmp_path):
    cache = export(llama, tmp_path / "p")
    tensors = load_file(tmp_path / "p")
    save_file(tensors, tmp_path / "foreign")
    with pytest.raises(CacheError, match="is not a prefix that kvist has exported"):
        reopen(tmp_path / "foreign", cache.pool)
    metadata = {
        "format": "kvist.prefix",
        "version": "1",
        "model": "model-a",
        "extra": "adapter-1",
        "codec": "plain(float32)",
        "tokens": "0" * 64,
    }
    save_file(tensors, tmp_path / "changed", metadata)
    with pytest.raises(CacheError, match="is damaged: its tokens do not match"):
        reopen(tmp_path / "changed", cache.pool)
    save_file(tensors, tmp_path / "newer", metadata | {"version": "2"})
    with pytest.raises(CacheError, match="has version '2', but '1' is needed"):
        reopen(tmp_path / "newer", cache.pool)


def test_truncated_or_missing_file_is_named(llama, tmp_path):
    cache = export(llama, tmp_path / "p")
    whole = (tmp_path / "p").read_bytes()
    (tmp_path / "cut").write_bytes(whole[: len(whole) // 2])
    with pytest.raises(CacheError, match=r"cut cannot be read as a prefix"):
        reopen(tmp_path / "cut", cache.pool)
    with pytest.raises(CacheError, match="nowhere: no such file"):
        reopen(tmp_path / "nowhere", cache.pool)


def test_blocks_that_the_file_cannot_fill_are_refused_before_anything_is_written(mixed, tmp_path):
    export(mixed, tmp_path / "p")
    pool = PagedPool(
        mixed.specs,
        make_codec("plain", torch.float32),
        num_blocks=20,
        block_size=4,
        max_slots=1,
        max_blocks=8,
        max_tokens=8,
    )
    whole = list(range(1, 9))
    found = reopen(tmp_path / "p", pool)
    # Of the sliding layers the file holds the window's blocks alone.
    with pytest.raises(CacheError, match=r"does not hold position 0 of layers \[1, 2\]"):
        found.restore([whole, whole])
    assert not pool.pools[0].read_blocks(whole).any()
    first = (32 - WINDOW + 1) // 4
    found.restore([whole, [0] * first + whole[first:]])
    assert pool.pools[0].read_blocks(whole).any(dim=1).all()


def test_short_or_missing_tables_are_refused(llama, tmp_path):
    cache = export(llama, tmp_path / "p")
    with pytest.raises(CacheError, match="7 blocks of 4 tokens cannot hold 32 tokens"):
        reopen(tmp_path / "p", cache.pool).restore([range(1, 8)])
    with pytest.raises(CacheError, match="2 tables for 1 groups"):
        save_prefix(tmp_path / "q", cache.pool, [[], []], [], model="model-a")


def test_failed_export_leaves_the_old_file_and_nothing_else(llama, tmp_path, monkeypatch):
    cache = export(llama, tmp_path / "p")
    before = (tmp_path / "p").read_bytes()

    def full(*_):
        raise OSError("No space left on device")

    monkeypatch.setattr("safetensors.torch.save_file", full)
    with pytest.raises(CacheError, match="cannot be written: No space left on device"):
        save_prefix(tmp_path / "p", cache.pool, [cache.tables[0][0]], TOKENS[:32], model="b")
    assert (tmp_path / "p").read_bytes() == before
    assert [file.name for file in tmp_path.iterdir()] == ["p"]


def test_export_into_a_missing_directory_is_named(llama, tmp_path):
    cache = export(llama, tmp_path / "p")
    with pytest.raises(CacheError, match="cannot be written"):
        save_prefix(tmp_path / "no" / "p", cache.pool, [cache.tables[0][0]], TOKENS[:32], model="b")
