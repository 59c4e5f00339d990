"""The mean of a model's keys, that int4 takes away from them."""

from dataclasses import replace

import pytest
import torch
from combinations import MODELS, model_of

import kvist
from kvist.cache import Batch
from kvist.cache.codecs import Calibration, Plain, calibrate, make_codec
from kvist.cache.codecs.calibration import PIECES, SKIPPED, calibration_text
from kvist.cache.dense import DynamicCache
from kvist.loading.model import Model
from tiny_models import FIXTURES

TEXT = [(7 * i * i + 3 * i) % 61 for i in range(400)]


def means_of(model: Model, ids: list[int]) -> Calibration:
    return calibrate(model.lm, ids, dtype=model.dtype)


@pytest.mark.parametrize("name", MODELS)
def test_there_is_a_mean_for_each_layer_head_and_channel(name: str) -> None:
    model = model_of(name)
    found = means_of(model, TEXT)
    shapes = [(spec.num_kv_heads, spec.head_dim) for spec in model.specs]
    assert [tuple(mean.shape) for mean in found.key_means] == shapes
    assert all(mean.isfinite().all() for mean in found.key_means)


def test_the_mean_is_that_of_pieces_spread_over_the_positions() -> None:
    model = model_of("llama, 16")
    found = means_of(model, TEXT)
    length = len(TEXT) // PIECES
    stride = (model.max_length - length) // PIECES
    keys = []
    for piece in range(PIECES):
        batch = Batch.pack([TEXT[piece * length : (piece + 1) * length]], [0], logits="none")
        cache = DynamicCache(model.specs, Plain(model.dtype))
        positions = batch.positions + piece * stride
        model.lm.forward(model.lm.embed(batch.token_ids), positions, cache.bind(batch))
        cache.commit(batch)
        keys.append(cache[1][0][0, :, SKIPPED:])  # [kv_heads, length - SKIPPED, head_dim]
    torch.testing.assert_close(found.key_means[1], torch.cat(keys, dim=1).mean(dim=1))


@pytest.mark.parametrize("count", [1, 2, 7, 8, 9, 63])
def test_few_tokens_are_enough(count: int) -> None:
    found = means_of(model_of("80"), TEXT[:count])
    assert all(mean.isfinite().all() for mean in found.key_means)


def test_a_models_int4_is_centred_and_says_on_what() -> None:
    model = model_of("80")
    made = model.codec("int4")
    assert model.calibration.source in made.fingerprint
    assert model.calibration is model.calibration
    other = means_of(model, TEXT)
    assert make_codec("int4", model.dtype, lambda: other).fingerprint != made.fingerprint


def test_the_same_text_gives_the_same_name_whatever_the_last_bits_are() -> None:
    model = model_of("80")
    found = means_of(model, TEXT)
    moved = replace(found, key_means=tuple(m * (1 + 1e-7) for m in found.key_means))
    fingerprints = {
        make_codec("int4", model.dtype, lambda c=c: c).fingerprint for c in (found, moved)
    }
    assert len(fingerprints) == 1


def test_what_was_made_in_inference_mode_serves_outside() -> None:
    with torch.inference_mode():
        found = means_of(model_of("80"), TEXT)
    assert not any(mean.is_inference() for mean in found.key_means)


def test_the_built_in_text_is_long_enough_and_of_many_kinds() -> None:
    text = calibration_text()
    assert 1500 < len(text.encode()) < 4000
    assert "def " in text
    assert any(ch.isdigit() for ch in text)
    assert any("一" <= ch <= "鿿" for ch in text)


def test_a_model_with_a_tokenizer_uses_the_text() -> None:
    model = kvist.load(FIXTURES / "qwen3" / "dense_tied")
    ids = model.require_tokenizer().encode(calibration_text())
    expected = calibrate(model.lm, ids, dtype=model.dtype)
    assert model.calibration.source == expected.source
    torch.testing.assert_close(model.calibration.key_means, expected.key_means)
