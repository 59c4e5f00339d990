"""Dynamic and static caches: what people know from transformers, growth, and zeros at rest."""

import pytest
import torch
from combinations import LENGTH, cache_of, model_of, step

from kvist.cache import CODECS, Batch, make_cache
from kvist.cache.dense import DenseCache, DynamicCache
from kvist.core.spec import StateSpec
from kvist.errors import CacheError, UnknownLayer
from kvist.loading.model import Model

TOKENS = [(7 * i * i + i) % 61 for i in range(200)]


@pytest.fixture
def model() -> Model:
    return model_of("grouped, 12")


def dense_of(model: Model, layout: str = "dynamic", rows: int = 1, codec: str = "plain"):  # type: ignore[no-untyped-def]
    cache = cache_of(model, layout, codec, rows=rows)
    assert isinstance(cache, DenseCache)
    return cache


@pytest.mark.parametrize("layout", ["dynamic", "static", "ring"])
def test_it_looks_like_transformers(model: Model, layout: str) -> None:
    cache = dense_of(model, layout, rows=2)
    assert (cache.get_seq_length(), len(cache)) == (0, 3)
    empty, _ = cache[0]
    spec = model.specs[0]
    assert tuple(empty.shape) == (2, spec.num_kv_heads, 0, spec.head_dim)
    step(model, cache, [TOKENS[:4], TOKENS[:2]])
    assert cache.get_seq_length() == 4
    for keys, values in cache:
        assert keys.shape == values.shape == (2, spec.num_kv_heads, 4, spec.head_dim)
        assert not keys[1, :, 2:].any()
    torch.testing.assert_close(cache[1][0][0, :, :2], cache[1][0][1, :, :2])
    assert "lengths=[4, 2]" in repr(cache)
    with pytest.raises(UnknownLayer, match="layer 3"):
        cache[3]
    cache.reset()
    assert (cache.get_seq_length(), cache.lengths) == (0, (0, 0))


def test_it_does_not_copy_itself_for_every_token(model: Model) -> None:
    cache = dense_of(model)
    capacities = set()
    for token in TOKENS:
        step(model, cache, [[token]])
        capacities.add(cache.capacity)
    assert len(capacities) <= 5
    assert cache.capacity < 2 * len(TOKENS)


def test_a_static_cache_takes_its_bytes_at_once_and_never_moves(model: Model) -> None:
    cache = dense_of(model, "static", rows=2)
    size, address = cache.nbytes, cache._layers[0]["key"]["x"].data_ptr()
    step(model, cache, [TOKENS[:LENGTH], TOKENS[:3]])
    cache.reorder([1, 0])
    step(model, cache, [[1], []])
    assert (cache.nbytes, cache._layers[0]["key"]["x"].data_ptr()) == (size, address)


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", ["dynamic", "static"])
def test_places_that_hold_no_token_are_zero(model: Model, layout: str, codec: str) -> None:
    cache = dense_of(model, layout, rows=3, codec=codec)
    step(model, cache, [TOKENS[:20], TOKENS[:5], TOKENS[:9]])
    step(model, cache, [TOKENS[:5]] * 3, commit=False)
    cache.crop([12, 5, 3])
    cache.reorder([2, 0, 0])
    step(model, cache, [[1], [2], []])
    step(model, cache, [[], [], TOKENS[:6]], commit=False)
    cache.crop(-1)
    for layer in cache._layers:
        for planes in layer.values():
            for plane in planes.values():
                for row, length in enumerate(cache.lengths):
                    assert not plane[row, :, length:].float().any()
                    assert plane[row, :, :length].float().any()


def test_crop_takes_one_length_or_one_for_each_row(model: Model) -> None:
    cache = dense_of(model, rows=2)
    step(model, cache, [TOKENS[:9], TOKENS[:5]])
    cache.crop(7)
    assert cache.lengths == (7, 5)
    cache.crop([6, 9])
    assert cache.lengths == (6, 5)
    cache.crop(-2)
    assert cache.lengths == (4, 4)
    for wrong in ([1], [1, -1]):
        with pytest.raises(CacheError, match="crop takes"):
            cache.crop(wrong)


def test_a_layer_that_missed_a_step_is_named(model: Model) -> None:
    cache = dense_of(model)
    step(model, cache, [TOKENS[:4]])
    batch, spec = Batch.pack([[1]], cache.lengths), model.specs[0]
    x = torch.zeros(1, spec.num_kv_heads, spec.head_dim)
    cache.bind(batch).update(x, x, 0)
    cache.commit(batch)
    with pytest.raises(CacheError, match=r"layer 1 holds sequence 0 up to token 4.*missed"):
        step(model, cache, [[1]])


def test_what_it_cannot_hold_is_refused(model: Model) -> None:
    with pytest.raises(CacheError, match="at least one row, not 0"):
        cache_of(model, "dynamic", rows=0)
    with pytest.raises(CacheError, match="attention layers only"):
        DynamicCache([StateSpec(((4,),), "float32")], model.codec("plain"))
    with pytest.raises(CacheError, match="no cache layout named 'heap'; there are: dynamic"):
        make_cache(model.specs, layout="heap", max_length=8, dtype=model.dtype)
