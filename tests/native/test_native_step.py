"""A whole step in the library against the model's own forward, on every cache that it reads."""

from collections.abc import Callable, Sequence
from dataclasses import replace

import pytest
import torch
from quantised_models import rounding, step_or_skip
from torch import Tensor

import kvist
from kvist.cache import Batch, make_cache
from kvist.cache.codecs import make_codec
from kvist.errors import NotSupported, RequestError
from kvist.native.executor import NativeStep
from kvist.runner.greedy import finite_rows
from kvist.runner.step import StepFunction, model_step

IDS = torch.randint(0, 70, (40,), generator=torch.Generator().manual_seed(1)).tolist()
ISAS = ("portable", "avx2", "avx512", "amx")
Opened = Callable[..., tuple[kvist.Model, object]]


def make_step(opened: Opened, *model: str, **options: object) -> NativeStep:
    """A step for this model; skips where the processor has not what is asked for."""
    loaded, checkpoint = opened(*model)
    return step_or_skip(loaded.config, checkpoint, **options)


def logits_of(
    model: kvist.Model,
    step: StepFunction,
    chunks: Sequence[Sequence[Sequence[int]]],
    layout: str = "dynamic",
    dtype: torch.dtype = torch.float32,
    retention: kvist.SlidingWindow | None = None,
    codec: str = "plain",
) -> list[Tensor]:
    """All logits of each sequence: `chunks` are steps, each with new tokens for each sequence."""
    cache = make_cache(
        model.specs,
        layout=layout,
        rows=len(chunks[0]),
        max_length=400,
        dtype=dtype,
        codec=make_codec(codec, dtype, lambda: model.calibration),
        retention=retention,
    )
    out: list[list[Tensor]] = [[] for _ in chunks[0]]
    with torch.inference_mode():
        for tokens in chunks:
            batch = Batch.pack(tokens, cache.lengths, logits="all")
            logits = step(batch, cache.bind(batch))
            cache.commit(batch)
            for rows, (start, end) in zip(out, batch.query_spans, strict=True):
                rows.append(logits[start:end])
    return [torch.cat(rows) for rows in out]


def close(found: Tensor, expected: Tensor, limit: float) -> None:
    assert found.shape == expected.shape
    assert ((found - expected).norm() / expected.norm()).item() < limit


WHOLE = [[IDS]]
CHUNKED = [[IDS[:9]], [IDS[9:10]], [IDS[10:13]], *([[i]] for i in IDS[13:])]
RAGGED = [
    [IDS[:7], IDS[3:20], IDS[5:6]],
    [IDS[7:8], [], IDS[6:16]],
    [IDS[8:9], IDS[20:21], IDS[16:17]],
]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("quantisation", ["Q4_0", "Q4_1", "Q8_0"])
def test_logits_are_those_of_rounded_activations(
    opened: Opened, isa: str, family: str, quantisation: str
) -> None:
    model, _ = opened(family, quantisation)
    step = make_step(opened, family, quantisation, isa=isa, threads=1)
    for chunks in (WHOLE, CHUNKED, RAGGED):
        with rounding(model, isa, quantisation):
            expected = logits_of(model, model_step(model.lm), chunks)
        found, wanted = torch.cat(logits_of(model, step, chunks)), torch.cat(expected)
        # A value on the edge may round the other way and move what follows it; most do not.
        close(found, wanted, 0.03)
        limit = 1e-2 if isa == "amx" else 1e-3  # matrix units' attention rounds on its own
        assert ((found - wanted).norm(dim=1) / wanted.norm(dim=1)).median() < limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
def test_logits_are_near_the_float_models(opened: Opened, isa: str, family: str) -> None:
    model, _ = opened(family, "Q8_0")
    step = make_step(opened, family, "Q8_0", isa=isa, threads=2)
    [expected] = logits_of(model, model_step(model.lm), WHOLE)
    [found] = logits_of(model, step, WHOLE)
    close(found, expected, 0.03)


LONG = [[(IDS * 9)[:340]]]  # three spans of positions
LONG_CHUNKED = [[(IDS * 9)[a:b]] for a, b in ((0, 1), (1, 30), (30, 129), (129, 290), (290, 340))]


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", ["plain", "int8", "int4"])
def test_logits_are_the_same_to_the_bit_however_they_are_computed(
    opened: Opened, isa: str, codec: str
) -> None:
    model, _ = opened()
    alone = make_step(opened, isa=isa, threads=1)
    several = make_step(opened, isa=isa, threads=3)
    for whole, chunked in ((WHOLE, CHUNKED), (LONG, LONG_CHUNKED)):
        [expected] = logits_of(model, alone, whole, codec=codec)
        for layout in ("dynamic", "static", "ring", "paged"):
            for step, chunks in ((several, whole), (alone, chunked), (several, chunked)):
                [found] = logits_of(model, step, chunks, layout, codec=codec)
                assert torch.equal(found, expected)
    together = logits_of(model, several, RAGGED, "paged", codec=codec)
    for i, row in enumerate(together):
        [by_itself] = logits_of(
            model, alone, [[chunk[i]] for chunk in RAGGED if chunk[i]], codec=codec
        )
        assert torch.equal(row, by_itself)


@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("codec", ["int8", "k8v4", "int4", "int4,0-1=int8"])
@pytest.mark.parametrize("layout", ["dynamic", "paged"])
def test_planes_of_few_bits_are_read_and_written_in_place(
    opened: Opened, family: str, codec: str, layout: str
) -> None:
    model, _ = opened(family, "Q8_0")
    step = make_step(opened, family, "Q8_0", threads=2)
    with rounding(model, step.packed.isa):
        [expected] = logits_of(model, model_step(model.lm), CHUNKED, layout, codec=codec)
    [found] = logits_of(model, step, CHUNKED, layout, codec=codec)
    close(found, expected, 0.05)
    # Matrix units' attention rounds on its own, and 4 bits of what follows may come out otherwise.
    limit = 0.04 if step.packed.isa == "amx" else 0.02
    assert ((found - expected).norm(dim=1) / expected.norm(dim=1)).median() < limit


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("codec", ["int8", "int4"])
def test_tokens_are_encoded_as_the_codec_encodes_them(opened: Opened, isa: str, codec: str) -> None:
    # The first layer's values are one product away from the embedding, so both have the same.
    model, _ = opened("qwen3", "Q8_0")
    step = make_step(opened, "qwen3", "Q8_0", isa=isa, threads=1)
    caches = []
    with torch.inference_mode(), rounding(model, isa):
        for run in (step, model_step(model.lm)):
            coder = make_codec(codec, torch.float32, lambda: model.calibration)
            cache = make_cache(model.specs, codec=coder, max_length=64, dtype=torch.float32)
            batch = Batch.pack([IDS], cache.lengths)
            run(batch, cache.bind(batch))
            cache.commit(batch)
            caches.append(cache)
    positions = torch.arange(len(IDS))
    for side in ("key", "value"):
        found, expected = (cache.read(0, 0, positions)[side] for cache in caches)
        differing = (found["x"] != expected["x"]).float().mean().item()
        assert differing < 0.01  # a number on the edge may go the other way
        for name in found.keys() - {"x"}:
            torch.testing.assert_close(found[name], expected[name], rtol=2e-3, atol=1e-6)


def test_what_it_wrote_is_what_the_models_forward_would_read(opened: Opened) -> None:
    model, _ = opened()
    step = make_step(opened, threads=1)
    own = model_step(model.lm)
    caches = [make_cache(model.specs, max_length=64, dtype=torch.float32) for _ in range(2)]
    with torch.inference_mode():
        for cache, run in zip(caches, (step, own), strict=True):
            batch = Batch.pack([IDS], cache.lengths)
            run(batch, cache.bind(batch))
            cache.commit(batch)
    for (keys, values), (own_keys, own_values) in zip(*caches, strict=True):
        close(keys, own_keys, 0.05)
        close(values, own_values, 0.05)


@pytest.mark.parametrize("isa", ISAS)
def test_a_bfloat16_cache_costs_little_and_nothing_on_matrix_units(
    opened: Opened, isa: str
) -> None:
    model, _ = opened()
    step = make_step(opened, threads=2, isa=isa)
    for chunks in (CHUNKED, LONG_CHUNKED):
        [expected] = logits_of(model, step, chunks)
        [found] = logits_of(model, step, chunks, dtype=torch.bfloat16)
        close(found, expected, 0.04)
        if step.packed.cache_dtype == torch.bfloat16:
            assert torch.equal(found, expected)


@pytest.mark.parametrize("sinks", [0, 3])
@pytest.mark.parametrize("layout", ["dynamic", "ring", "paged"])
def test_a_window_hides_what_the_model_does_not_see(
    opened: Opened, layout: str, sinks: int
) -> None:
    model, _ = opened()
    step = make_step(opened, threads=2)
    window = kvist.SlidingWindow(6, sinks)
    with rounding(model, step.packed.isa, "Q4_1"):
        [expected] = logits_of(model, model_step(model.lm), CHUNKED, layout, retention=window)
    [found] = logits_of(model, step, CHUNKED, layout, retention=window)
    [everything] = logits_of(model, step, CHUNKED, layout)
    close(found, expected, 0.05)
    assert (everything - expected).norm() / expected.norm() > 0.1


def test_embeddings_may_stand_for_tokens(opened: Opened) -> None:
    model, _ = opened()
    step = make_step(opened, threads=1)
    cache = make_cache(model.specs, max_length=64, dtype=torch.float32)
    with torch.inference_mode():
        plain = Batch.pack([IDS], cache.lengths, logits="all")
        batch = replace(plain, embeddings=model.lm.embed(plain.token_ids))
        found = step(batch, cache.bind(batch))
    [expected] = logits_of(model, step, WHOLE)
    torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("isa", ISAS)
def test_it_notes_the_first_largest_of_each_row(opened: Opened, isa: str) -> None:
    model, _ = opened()
    step = make_step(opened, threads=3, isa=isa)
    cache = make_cache(model.specs, rows=3, max_length=64, dtype=torch.float32)
    with torch.inference_mode():
        batch = Batch.pack([IDS, IDS[:1], IDS[3:9]], cache.lengths, logits="all")
        logits = step(batch, cache.bind(batch))
        assert logits.known_largest.tolist() == logits.argmax(-1).tolist()  # type: ignore[attr-defined]
        embeddings = model.lm.embed(batch.token_ids)
        embeddings[len(IDS)] = torch.nan
        cache.reset()
        batch = replace(batch, embeddings=embeddings)
        logits = step(batch, cache.bind(batch))
    assert finite_rows(logits).tolist().count(False) == 1
    assert not hasattr(logits, "known_largest")  # of no row, where one is not finite


def test_a_prompt_longer_than_a_pass_is_the_same_in_pieces(opened: Opened) -> None:
    model, _ = opened()
    step = make_step(opened, threads=2, isa="portable")
    ids = IDS * 14  # 560 tokens: two passes over the weights
    cache = make_cache(model.specs, max_length=600, dtype=torch.float32)
    with torch.inference_mode():
        batch = Batch.pack([ids], cache.lengths)
        whole = step(batch, cache.bind(batch))
        cache.commit(batch)
        cache.reset()
        for part in (ids[:300], ids[300:559], ids[559:]):
            batch = Batch.pack([part], cache.lengths)
            pieces = step(batch, cache.bind(batch))
            cache.commit(batch)
    close(pieces, whole, 1e-2)


def test_generate_runs_on_it(opened: Opened) -> None:
    model, _ = opened("llama", "Q8_0")
    step = make_step(opened, "llama", "Q8_0")
    params = kvist.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    results = kvist.generate(model, [IDS[:9], IDS[:3]], params, step=step)
    assert [len(result.token_ids) for result in results] == [12, 12]


def test_what_it_does_not_read_is_refused(opened: Opened) -> None:
    model, _ = opened()
    step = make_step(opened, threads=1)
    batch = Batch.pack([IDS], [0])
    fp8 = make_cache(
        model.specs, codec=make_codec("fp8", torch.float32), max_length=64, dtype=torch.float32
    )
    with pytest.raises(NotSupported, match="fp8"):
        step(batch, fp8.bind(batch))
    plain = make_cache(model.specs, max_length=64, dtype=torch.float32)
    with pytest.raises(NotSupported, match="'sdpa'"):
        step(batch, plain.bind(batch, backend="sdpa"))
    half = make_cache(model.specs, max_length=64, dtype=torch.float16)
    with pytest.raises(NotSupported, match="float16"):
        step(batch, half.bind(batch))


def test_a_token_outside_the_vocabulary_is_refused(opened: Opened) -> None:
    model, _ = opened()
    step = make_step(opened, threads=1)
    cache = make_cache(model.specs, max_length=64, dtype=torch.float32)
    batch = Batch.pack([[3, 70]], cache.lengths)
    with pytest.raises(RequestError, match="vocabulary of 70"):
        step(batch, cache.bind(batch))


@pytest.mark.parametrize("isa", ISAS)
@pytest.mark.parametrize("family", ["llama", "qwen3"])
@pytest.mark.parametrize("kind", ["F32", "F16", "BF16"])
def test_weights_in_floats_give_the_models_logits(
    opened: Opened, isa: str, family: str, kind: str
) -> None:
    model, _ = opened(family, kind)
    step = make_step(opened, family, kind, isa=isa, threads=2)
    [alone] = logits_of(model, make_step(opened, family, kind, isa=isa, threads=1), WHOLE)
    for chunks in (WHOLE, CHUNKED):
        [expected] = logits_of(model, model_step(model.lm), chunks)
        [found] = logits_of(model, step, chunks)
        torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-4)
        assert torch.equal(found, alone)


def test_a_checkpoint_in_floats_runs_by_name(model: kvist.Model) -> None:
    native = kvist.load(model.name, device="cpu", executor="native")
    assert native.native is not None
    assert native.native.packed.activations == "float32"
    params = kvist.SamplingParams(temperature=0, max_tokens=12, ignore_eos=True)
    [found] = kvist.generate(native, [IDS], params)
    [expected] = kvist.generate(model, [IDS], params)
    assert found.token_ids == expected.token_ids
