"""The contract: layout x codec x retention x attention, all of them give the reference's tokens.

Whatever registers itself in LAYOUTS, CODECS or BACKENDS is tested here without being named. The
reference is one sequence alone, its prefill in one piece, a dynamic cache and eager attention,
under the same codec and retention; for lossless codecs there is also one without any cache.
Tokens that differ count only where the reference's margin is above the measured noise.
"""

import random

import pytest
import torch

import kvist
from kvist.attention import BACKENDS
from kvist.cache import CODECS, LAYOUTS, Batch, make_cache
from kvist.core.retention import KeepAll, SlidingWindow
from kvist.errors import CacheError, CacheFull, UnknownLayer
from kvist.reports.verify import compare
from tiny_models import build, forward, new_cache

QWEN3 = {
    "model_type": "qwen3",
    "vocab_size": 67,
    "hidden_size": 32,
    "intermediate_size": 48,
    "num_hidden_layers": 3,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "max_position_embeddings": 256,
    "use_sliding_window": True,
    "sliding_window": 9,
    "layer_types": ["full_attention", "sliding_attention", "full_attention"],
}
LLAMA = {
    "model_type": "llama",
    "vocab_size": 67,
    "hidden_size": 40,
    "intermediate_size": 48,
    "num_hidden_layers": 2,
    "num_attention_heads": 2,
    "num_key_value_heads": 1,
    "head_dim": 20,
    "max_position_embeddings": 256,
}
MODELS = {"mixed windows, GQA": QWEN3, "multi-query": LLAMA}
RETENTIONS = {
    "all": KeepAll(),
    "window": SlidingWindow(7),
    "window and sinks": SlidingWindow(7, 2),
}
# Triton runs in its interpreter only when asked for, and has tests of its own.
ATTENTION = [name for name in BACKENDS if name != "triton"]
PARAMS = kvist.SamplingParams(temperature=0, max_tokens=9, ignore_eos=True, logprobs=5)
_expected: dict[tuple[str, str, str], list[kvist.Result]] = {}


@pytest.fixture(scope="module", params=MODELS)
def named(request):
    """A name and a tiny random model of that kind."""
    return request.param, build(MODELS[request.param], seed=5)


def prompts_of(model, seed: int) -> list[list[int]]:
    rng = random.Random(seed)
    return [[rng.randrange(67) for _ in range(n)] for n in (1, 6, 13, 29)]


def expected(named, codec: str, retention: str) -> list[kvist.Result]:
    """Each prompt alone, whole, with the plainest parts."""
    name, model = named
    key = (name, codec, retention)
    if key not in _expected:
        _expected[key] = [
            kvist.generate(
                model,
                [prompt],
                PARAMS,
                codec=codec,
                retention=RETENTIONS[retention],
                attention="reference",
            )[0]
            for prompt in prompts_of(model, 1)
        ]
    return _expected[key]


@pytest.mark.parametrize("retention", RETENTIONS)
@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_combination_gives_the_references_tokens(named, layout, codec, retention):
    _, model = named
    rng = random.Random(f"{layout} {codec} {retention}")
    for attention in ATTENTION:
        found = kvist.generate(
            model,
            prompts_of(model, 1),
            PARAMS,
            cache=layout,
            codec=codec,
            retention=RETENTIONS[retention],
            attention=attention,
            chunk=rng.choice([1, 2, 3, 5, 8, 64]),
        )
        check = compare(
            f"{layout} {codec} {retention} {attention}", expected(named, codec, retention), found
        )
        assert check.passed, check


@pytest.mark.parametrize("retention", RETENTIONS)
def test_the_reference_itself_needs_no_cache(named, retention):
    _, model = named
    found = kvist.generate(
        model, prompts_of(model, 1), PARAMS, retention=RETENTIONS[retention], use_cache=False
    )
    check = compare("no cache", expected(named, "plain", retention), found)
    assert check.passed, check


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_aborted_step_leaves_no_trace(named, layout, codec):
    _, model = named
    cache = cache_of(model, layout, codec)
    forward(model, cache, [[1, 2, 3, 4]])
    batch = Batch.pack([[5, 6]], cache.lengths)
    view = cache.bind(batch)
    spec = model.specs[0]
    poison = torch.full((2, spec.num_kv_heads, spec.head_dim), torch.nan)
    if codec == "plain":
        view.update(poison, poison, 0)
    assert cache.lengths == (4,)
    after = forward(model, cache, [[7]])
    untouched = cache_of(model, layout, codec)
    forward(model, untouched, [[1, 2, 3, 4]])
    torch.testing.assert_close(after, forward(model, untouched, [[7]]))


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_going_back_gives_what_would_have_been(named, layout, codec):
    _, model = named
    cache = cache_of(model, layout, codec)
    forward(model, cache, [[1, 2, 3, 4, 5, 6]])
    cache.crop(4)
    assert cache.lengths == (4,)
    straight = cache_of(model, layout, codec)
    forward(model, straight, [[1, 2, 3, 4]])
    torch.testing.assert_close(
        forward(model, cache, [[9, 8]]), forward(model, straight, [[9, 8]]), atol=1e-5, rtol=1e-5
    )


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_reordered_rows_go_on_as_their_sources(named, layout, codec):
    _, model = named
    cache = cache_of(model, layout, codec, rows=3)
    forward(model, cache, [[1, 2, 3], [4], [5, 6]])
    cache.reorder([2, 0, 0])
    assert cache.lengths == (2, 3, 3)
    together = forward(model, cache, [[7], [8], [9]])
    for row, (past, new) in enumerate((([5, 6], 7), ([1, 2, 3], 8), ([1, 2, 3], 9))):
        alone = cache_of(model, layout, codec)
        forward(model, alone, [past])
        torch.testing.assert_close(
            together[row], forward(model, alone, [[new]])[0], atol=1e-4, rtol=1e-4
        )


@pytest.mark.parametrize("codec", CODECS)
def test_a_token_is_written_to_the_same_bits_however_many_stand_beside_it(named, codec):
    _, model = named
    made, spec = model.codec(codec), model.specs[0]
    torch.manual_seed(0)
    x = torch.randn(33, spec.num_kv_heads, spec.head_dim) * 3
    for side in ("key", "value"):
        whole = made.encode(x, side, 0)
        for i in (0, 7, 32):
            alone = made.encode(x[i : i + 1], side, 0)
            for name, plane in whole.items():
                assert torch.equal(
                    plane[i : i + 1].view(torch.uint8), alone[name].view(torch.uint8)
                )


@pytest.mark.parametrize("codec", CODECS)
def test_planes_of_zeros_decode_to_finite_numbers(named, codec):
    _, model = named
    made, spec = model.codec(codec), model.specs[0]
    for side in ("key", "value"):
        planes = {
            name: torch.zeros((4, *shape), dtype=dtype)
            for name, (shape, dtype) in made.planes(spec, side, 0).items()
        }
        assert made.decode(planes, side, 0).isfinite().all()


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_batch_that_does_not_go_on_where_the_cache_ends_is_refused(named, layout):
    _, model = named
    cache = cache_of(model, layout)
    with pytest.raises(CacheError, match="3"):
        cache.bind(Batch.pack([[1]], [3]))


@pytest.mark.parametrize("layout", LAYOUTS)
def test_an_unknown_layer_is_named(named, layout):
    _, model = named
    cache, spec = cache_of(model, layout), model.specs[0]
    view = cache.bind(Batch.pack([[1]], [0]))
    x = torch.zeros(1, spec.num_kv_heads, spec.head_dim)
    with pytest.raises(UnknownLayer, match="99"):
        view.update(x, x, 99)


def test_a_full_static_cache_says_so_before_anything_is_written(named):
    _, model = named
    cache = make_cache(model.specs, layout="static", max_length=4, dtype=model.dtype)
    forward(model, cache, [[1, 2, 3]])
    with pytest.raises(CacheFull, match="5"):
        cache.bind(Batch.pack([[4, 5]], cache.lengths))
    assert cache.lengths == (3,)


def test_a_dynamic_cache_looks_like_transformers(named):
    _, model = named
    cache = new_cache(model)
    forward(model, cache, [[1, 2, 3]])
    assert len(cache) == len(model.specs)
    assert cache.get_seq_length() == 3
    keys, values = cache[0]
    spec = model.specs[0]
    assert keys.shape == values.shape == (1, spec.num_kv_heads, 3, spec.head_dim)
    assert len(list(cache)) == len(cache)
    assert cache.nbytes > 0
    cache.reset()
    assert cache.get_seq_length() == 0


def test_a_dynamic_cache_does_not_copy_itself_for_every_token(named):
    _, model = named
    cache = new_cache(model)
    capacities = set()
    for token in range(150):
        forward(model, cache, [[token % 60]])
        capacities.add(cache.capacity)
    assert len(capacities) < 6


def cache_of(model, layout: str, codec: str = "plain", rows: int = 1):
    return make_cache(
        model.specs,
        layout=layout,
        codec=model.codec(codec),
        rows=rows,
        max_length=64,
        dtype=model.dtype,
    )
