"""A cache in a file goes on in another process, to the bit, and nowhere that it does not belong."""

import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch
from combinations import RETENTIONS, SLACK, cache_of, expected, model_of, step, tolerance
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from kvist.cache import CODECS, LAYOUTS, Cache, make_cache
from kvist.cache.saved import SavedCache, load_cache, save_cache, saved_cache
from kvist.core.retention import KeepAll, SlidingWindow
from kvist.errors import CacheError
from kvist.loading.model import Model
from parity import Tally, assert_same_greedy

NAME = "grouped, 12"
TOKENS = tuple((11 * i * i + 5 * i) % 61 for i in range(60))
ROWS = (TOKENS[:41], TOKENS[3:20])
NAMES = {"model": "a model", "tokenizer": "a tokenizer"}


def filled(layout: str, codec: str = "plain", retention: str = "all") -> Cache:
    """Two rows, written in chunks, and gone back a little."""
    model = model_of(NAME)
    cache = cache_of(model, layout, codec, retention, rows=2)
    while any(n < len(t) for n, t in zip(cache.lengths, ROWS, strict=True)):
        step(model, cache, [t[n : n + 5] for n, t in zip(cache.lengths, ROWS, strict=True)])
    cache.crop([38, 16])
    return cache


def save(cache: Cache, path: Path, **other: Any) -> None:
    save_cache(cache, path, tokens=ROWS, **(NAMES | other))  # type: ignore[arg-type]


def load(path: Path, cache: Cache, **other: Any) -> SavedCache:
    return load_cache(path, cache, **(NAMES | other))  # type: ignore[arg-type]


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_loaded_cache_goes_on_to_the_bit(
    layout: str, codec: str, retention: str, tmp_path: Path
) -> None:
    model, cache = model_of(NAME), filled(layout, codec, retention)
    save(cache, tmp_path / "cache")
    loaded = cache_of(model, layout, codec, retention, rows=2)
    assert load(tmp_path / "cache", loaded).tokens == ROWS
    assert loaded.lengths == cache.lengths
    for _ in range(2):
        new = [ROWS[0][38:41], ROWS[1][16:17]]
        found = [step(model, c, new) for c in (cache, loaded)]
        assert all(torch.equal(a, b) for a, b in zip(*found, strict=True))
        # It can go back as far as the other could, and lengths are all that it knew before.
        for c in (cache, loaded):
            c.crop([38, 16])


@pytest.mark.parametrize("source", LAYOUTS)
@pytest.mark.parametrize("target", LAYOUTS)
@pytest.mark.parametrize("codec", ["plain", "int4"])
def test_any_layout_reads_what_nothing_is_missing_from(
    source: str, target: str, codec: str, tmp_path: Path
) -> None:
    model = model_of("llama, 16")  # without windows
    cache = cache_of(model, source, codec)
    step(model, cache, [TOKENS[:30]])
    path = tmp_path / "cache"
    save_cache(cache, path, tokens=[TOKENS], **NAMES)  # type: ignore[arg-type]
    loaded = cache_of(model, target, codec)
    load(path, loaded)
    [logits] = step(model, loaded, [TOKENS[30:32]])
    reference = expected("llama, 16", codec, "all", TOKENS)[30:32]
    within = tolerance("llama, 16", codec, "all", TOKENS)
    assert_same_greedy(reference, logits, Tally(), within=within)


@pytest.mark.parametrize("source", ["dynamic", "static"])
@pytest.mark.parametrize("target", ["ring", "paged"])
@pytest.mark.parametrize("retention", RETENTIONS)
def test_a_window_takes_what_it_needs_of_a_whole_cache(
    source: str, target: str, retention: str, tmp_path: Path
) -> None:
    model = model_of(NAME)
    save(filled(source, retention=retention), tmp_path / "cache")
    loaded = cache_of(model, target, retention=retention, rows=2)
    load(tmp_path / "cache", loaded)
    loaded.crop([38 - SLACK, 16 - SLACK])
    for row, logits in enumerate(step(model, loaded, [[7], [8]])):
        tokens = (*ROWS[row][: (34, 12)[row]], 7 + row)
        reference = expected(NAME, "plain", retention, tokens)[-1:]
        assert_same_greedy(reference, logits)


@pytest.mark.parametrize("source", ["ring", "paged"])
@pytest.mark.parametrize("target", LAYOUTS)
def test_what_has_let_go_of_tokens_is_refused_elsewhere(
    source: str, target: str, tmp_path: Path
) -> None:
    save(filled(source, retention="window and sinks"), tmp_path / "cache")
    loaded = cache_of(model_of(NAME), target, retention="window and sinks", rows=2)
    if source == target:
        load(tmp_path / "cache", loaded)
        return
    with pytest.raises(CacheError, match=f"saved from a {source} cache .* {target} cache"):
        load(tmp_path / "cache", loaded)
    assert loaded.lengths == (0, 0)


def test_layers_filled_late_stay_late(tmp_path: Path) -> None:
    model = model_of("llama, 16")
    cache, spec = cache_of(model, "dynamic"), model.specs[0]
    from kvist.cache import Batch

    for layers in ((0,), (0, 1)):
        batch = Batch.pack([[1, 2, 3]], cache.lengths)
        bound = cache.bind(batch)
        for layer_idx in layers:
            x = torch.randn(3, spec.num_kv_heads, spec.head_dim)
            bound.update(x, x, layer_idx)
        cache.commit(batch)
    save_cache(cache, tmp_path / "cache", tokens=[range(6)], **NAMES)  # type: ignore[arg-type]
    loaded = cache_of(model, "static")
    load(tmp_path / "cache", loaded)
    found = [step(model, c, [[9]])[0] for c in (cache, loaded)]
    torch.testing.assert_close(*found)
    assert loaded.held(1, 0) == (range(3, 7),)  # type: ignore[attr-defined]


def test_a_new_process_gives_the_tokens_of_the_unbroken_one(tmp_path: Path) -> None:
    model, cache = model_of(NAME), filled("ring", "int4", "window and sinks")
    save(cache, tmp_path / "cache")
    code = f"""
import sys, torch
sys.path[:0] = {[str(Path(__file__).parent), str(Path(__file__).parents[1])]!r}
from combinations import cache_of, model_of, step
from kvist.cache.saved import load_cache
from pathlib import Path
torch.set_num_threads(1)
model = model_of({NAME!r})
cache = cache_of(model, "ring", "int4", "window and sinks", rows=2)
load_cache(Path({str(tmp_path / "cache")!r}), cache, model="a model", tokenizer="a tokenizer")
new = [[5], [7]]
for _ in range(10):
    new = [[int(row[-1].argmax())] for row in step(model, cache, new)]
    print(*(ids[0] for ids in new))
"""
    child = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, check=False
    )
    new, unbroken = [[5], [7]], []
    for _ in range(10):
        new = [[int(row[-1].argmax())] for row in step(model, cache, new)]
        unbroken.append(" ".join(str(ids[0]) for ids in new))
    assert (child.stdout.splitlines(), child.stderr) == (unbroken, "")


def test_a_file_says_what_cache_to_make_for_it(tmp_path: Path) -> None:
    save(filled("static", "k8v4", "window and sinks"), tmp_path / "cache")
    saved = saved_cache(tmp_path / "cache")
    assert (saved.layout, saved.codec, saved.lengths) == ("static", "k8v4", (38, 16))
    assert (saved.retention, saved.tokens) == (SlidingWindow(6, sinks=3), ROWS)
    model = model_of(NAME)
    cache = make_cache(
        model.specs,
        layout=saved.layout,
        codec=model.codec(saved.codec),
        retention=saved.retention,
        rows=len(saved.tokens),
        max_length=64,
        dtype=model.dtype,
    )
    load(saved.path, cache)
    assert cache.lengths == saved.lengths
    save(filled("dynamic"), tmp_path / "cache")
    assert saved_cache(tmp_path / "cache").retention == KeepAll()


def test_planes_are_kept_as_few_bits_as_they_are(tmp_path: Path) -> None:
    sizes = {}
    for codec in ("plain", "int4"):
        cache = filled("dynamic", codec)
        save(cache, tmp_path / codec)
        sizes[codec] = sum(
            tensor.nbytes
            for name, tensor in load_file(tmp_path / codec).items()
            if "layers" in name
        )
    assert sizes["int4"] < sizes["plain"] / 3  # two scales for only 12 channels


# What does not belong.


def other_model(model: Model) -> Cache:
    return cache_of(model_of("llama, 16"), "dynamic", rows=2)


@pytest.mark.parametrize(
    ("make", "names", "reason"),
    [
        (lambda m: cache_of(m, "dynamic", rows=2), {"model": "b"}, "another model: 'a model'.*'b'"),
        (lambda m: cache_of(m, "dynamic", rows=2), {"tokenizer": "b"}, "another tokenizer"),
        (
            lambda m: cache_of(m, "dynamic", "int8", rows=2),
            {},
            r"another codec: 'plain\(float32\)'",
        ),
        (
            lambda m: cache_of(m, "dynamic", "plain", "window", rows=2),
            {},
            "another retention.*Keep",
        ),
        (lambda m: cache_of(m, "dynamic", rows=1), {}, "another number of rows: 2, .* 1"),
        (other_model, {}, "other layers"),
    ],
)
def test_what_differs_is_named(
    make: Callable[[Model], Cache], names: dict[str, str], reason: str, tmp_path: Path
) -> None:
    save(filled("dynamic"), tmp_path / "cache")
    cache = make(model_of(NAME))
    with pytest.raises(CacheError, match=reason):
        load(tmp_path / "cache", cache, **names)
    assert not any(cache.lengths)


def test_a_cache_that_is_not_empty_is_not_overwritten(tmp_path: Path) -> None:
    cache = filled("dynamic")
    save(cache, tmp_path / "cache")
    with pytest.raises(CacheError, match=r"into an empty one, not \[38, 16\]"):
        load(tmp_path / "cache", cache)
    assert cache.lengths == (38, 16)


def test_a_static_cache_that_is_too_small_says_so(tmp_path: Path) -> None:
    model = model_of(NAME)
    save(filled("dynamic"), tmp_path / "cache")
    small = make_cache(model.specs, layout="static", rows=2, max_length=20, dtype=model.dtype)
    with pytest.raises(CacheError, match=r"38 tokens in a row.*room for 20"):
        load(tmp_path / "cache", small)
    assert small.lengths == (0, 0)


def changed(path: Path, metadata: dict[str, str], drop: str = "") -> None:
    """The file with other metadata, or without some tensors."""
    with safe_open(path, "pt") as file:
        old = file.metadata()
        tensors = {k: file.get_tensor(k) for k in file.keys() if not drop or drop not in k}  # noqa: SIM118
    save_file(tensors, path, old | metadata)


@pytest.mark.parametrize(
    ("metadata", "drop", "reason"),
    [
        ({"version": "2"}, "", "has version '2' of the format, and this kvist reads '1'"),
        ({"format": "kvist.prefix"}, "", "is not a cache that kvist has saved"),
        ({"lengths": "[38"}, "", "damaged"),
        ({"lengths": "[38, 17.5]"}, "", "damaged"),
        ({"lengths": "[58, 16]"}, "", "damaged: it has fewer token ids"),
        ({"lengths": "[-1, 16]"}, "", "damaged"),
        ({"retention": '{"name": "scored"}'}, "", "damaged.*the retention 'scored'"),
        ({"held": "[]"}, "", "damaged"),
        ({"held": "[[[[0, 38]]], [[[0, 16]]]]"}, "", "damaged"),
        ({"held": json.dumps([[[[0, 30]]] * 3, [[[0, 16]]] * 3])}, "", "damaged"),
        ({"held": json.dumps([[[[0, 39]]] * 3, [[[0, 16]]] * 3])}, "", "damaged"),
        ({}, "rows.1.token_ids", "cannot be read .*rows.1.token_ids"),
        ({}, "rows.0.layers.2.value", "cannot be read .*layers.2.value"),
    ],
)
def test_a_file_that_was_changed_is_refused(
    metadata: dict[str, str], drop: str, reason: str, tmp_path: Path
) -> None:
    save(filled("dynamic"), tmp_path / "cache")
    changed(tmp_path / "cache", metadata, drop)
    cache = cache_of(model_of(NAME), "dynamic", rows=2)
    with pytest.raises(CacheError, match=reason):
        load(tmp_path / "cache", cache)
    assert cache.lengths == (0, 0)


@pytest.mark.parametrize("size", [0, 5, 900, -1])
def test_a_truncated_file_names_itself(size: int, tmp_path: Path) -> None:
    path = tmp_path / "cache"
    save(filled("dynamic"), path)
    path.write_bytes(path.read_bytes()[:size])
    with pytest.raises(CacheError, match=f"{path} cannot be read as a saved cache"):
        load(path, cache_of(model_of(NAME), "dynamic", rows=2))
    with pytest.raises(CacheError, match="no such file"):
        saved_cache(tmp_path / "nothing")


def test_tokens_have_to_cover_the_cache(tmp_path: Path) -> None:
    for tokens in ([TOKENS[:38]], [TOKENS[:37], TOKENS[:16]]):
        with pytest.raises(CacheError, match=r"holds \[38, 16\] tokens"):
            save_cache(filled("dynamic"), tmp_path / "x", tokens=tokens, **NAMES)  # type: ignore[arg-type]
    assert not list(tmp_path.iterdir())


def test_a_file_that_cannot_be_written_leaves_the_old_one(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    cache = filled("dynamic")
    with pytest.raises(CacheError, match="cannot be written"):
        save(cache, tmp_path / "missing" / "cache")
    path = tmp_path / "cache"
    save(cache, path)
    before = path.read_bytes()

    def full(descriptor: int) -> None:
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    cache.crop(3)
    with pytest.raises(CacheError, match="No space left"):
        save(cache, path)
    assert path.read_bytes() == before
    assert [p.name for p in tmp_path.iterdir()] == ["cache"]
