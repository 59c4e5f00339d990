"""Generation with pictures: nanoVLM's tokens, however the prompt was computed."""

import pytest
import torch
from PIL import Image
from vlm_cases import CHELSEA, TOLERANCE, case, greedy

from kvist.cache import LAYOUTS, make_cache
from kvist.runner.encoder_cache import EncodedImages

RUNS = [
    ("vlm_tied", "one_image"),
    ("vlm_tied", "two_images"),
    ("vlm_tied", "text_only"),
    ("vlm_untied", "one_image"),
    ("vlm_untied", "text_only"),
]


@pytest.mark.parametrize(("name", "prompt"), RUNS)
def test_greedy_ids_are_nanovlms(name: str, prompt: str) -> None:
    ids, logits = greedy(case(name).loaded, [case(name).prompt(prompt)], 32)
    assert ids == [case(name).ids(prompt)]
    expected = case(name).ref.get(f"vlm.{prompt}.step_logits")
    if expected is not None:
        torch.testing.assert_close(logits, expected[:, :32], atol=TOLERANCE, rtol=0)


def test_ids_from_the_picture_itself_are_nanovlms() -> None:
    content = [{"type": "image", "image": CHELSEA}, {"type": "text", "text": "What is this?"}]
    loaded = case("vlm_tied").loaded
    prompt = loaded.processor.prepare([{"role": "user", "content": content}])
    assert greedy(loaded, [prompt], 32)[0] == [case("vlm_tied").ids("one_image")]


def test_a_ragged_batch_gives_each_prompts_own_ids() -> None:
    # nanoVLM ran these as one left-padded batch; here there is no padding.
    tied = case("vlm_tied")
    names = ("one_image", "text_only", "two_images")
    ids, _ = greedy(tied.loaded, [tied.prompt(n) for n in names], 32)
    assert ids == tied.ref["vlm.leftpad.generated_ids"].tolist()


@pytest.mark.parametrize("chunk", [1, 3, 16, 50])
def test_any_chunk_size_gives_the_same_ids(chunk: int) -> None:
    tied = case("vlm_tied")
    ids, _ = greedy(tied.loaded, [tied.prompt("two_images")], 8, chunk=chunk)
    assert ids == [tied.ids("two_images")[:8]]


@pytest.mark.parametrize("layout", sorted(LAYOUTS))
def test_every_layout_gives_the_same_ids(layout: str) -> None:
    tied = case("vlm_tied")
    ids, _ = greedy(tied.loaded, [tied.prompt("one_image")], 8, layout=layout, chunk=16)
    assert ids == [tied.ids("one_image")[:8]]


@pytest.mark.parametrize("kept", [1, 5, 12, 42])
def test_a_prefix_that_ends_inside_a_picture_gives_the_same_ids(kept: int) -> None:
    tied = case("vlm_tied")
    prompt, lm = tied.prompt("one_image"), tied.loaded.model.language
    cache = make_cache(lm.specs, max_length=100, dtype=torch.float32)
    greedy(tied.loaded, [prompt], 4, cache=cache)
    cache.crop(kept)
    assert greedy(tied.loaded, [prompt], 8, cache=cache)[0] == [tied.ids("one_image")[:8]]


def test_a_warm_image_cache_encodes_nothing_and_gives_the_same_ids() -> None:
    tied, calls = case("vlm_tied"), []

    def encode(pixels: torch.Tensor) -> torch.Tensor:
        calls.append(len(pixels))
        return tied.loaded.model.encode_images(pixels)

    images = EncodedImages(encode)
    for expected_calls in ([5], [5]):
        ids, _ = greedy(tied.loaded, [tied.prompt("one_image")], 8, images=images)
        assert ids == [tied.ids("one_image")[:8]]
        assert calls == expected_calls


def test_what_follows_the_first_eos_is_not_part_of_the_answer() -> None:
    # nanoVLM goes on past the end and overwrites what came; kvist stops there.
    tied = case("vlm_tied")
    eos, expected = tied.facts["vlm_eos"]["eos_token_id"], tied.ref["vlm.eos.generated_ids"][0]
    ids = greedy(tied.loaded, [tied.prompt("one_image")], 32)[0][0]
    end = ids.index(eos) + 1
    assert ids[:end] == expected[:end].tolist()
    assert set(expected[end:].tolist()) == {eos}


def test_a_second_turn_with_another_picture_goes_on_from_the_first_ones_cache() -> None:
    loaded = case("vlm_tied").loaded
    first = {"role": "user", "content": [{"type": "image", "image": CHELSEA}]}
    answer = {"role": "assistant", "content": "A cat."}
    blue = Image.new("RGB", (40, 40), "blue")
    second = {"role": "user", "content": [{"type": "image", "image": blue}]}
    one = loaded.processor.prepare([first])
    both = loaded.processor.prepare([first, answer, second])
    cache = make_cache(loaded.model.language.specs, max_length=300, dtype=torch.float32)
    greedy(loaded, [one], 1, cache=cache)
    assert both.token_ids[: cache.lengths[0]] == one.token_ids
    warm, _ = greedy(loaded, [both], 8, cache=cache)
    assert warm == greedy(loaded, [both], 8)[0]
