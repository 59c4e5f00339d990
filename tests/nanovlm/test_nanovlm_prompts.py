"""Prompts with pictures: nanoVLM's text for them, and a span for every tile."""

from collections.abc import Mapping
from dataclasses import replace

import pytest
import torch
from PIL import Image
from vlm_cases import CHELSEA, case

from kvist.errors import ConfigError, RequestError
from kvist.loading.image_prompt import ImageProcessor, PreparedPrompt
from kvist.loading.images import ImageLimits, Tiling

IMAGE = "<|image|>" * 4


@pytest.fixture
def processor() -> ImageProcessor:
    return case("vlm_tied").loaded.processor


def picture(width: int = 32, height: int = 32, colour: str = "red") -> Image.Image:
    return Image.new("RGB", (width, height), colour)


def image_part(image: object) -> dict[str, object]:
    return {"type": "image", "image": image}


def user(*content: object) -> dict[str, object]:
    parts = [{"type": "text", "text": c} if isinstance(c, str) else image_part(c) for c in content]
    return {"role": "user", "content": parts}


def text_of(processor: ImageProcessor, prompt: PreparedPrompt) -> str:
    return processor.tokenizer.decode(prompt.token_ids, skip_special_tokens=False)


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
@pytest.mark.parametrize("text_only", [False, True])
def test_chat_messages_become_nanovlms_ids(name: str, text_only: bool) -> None:
    facts = case(name).facts["vlm"][2 if text_only else 0]
    message = user(facts["prompt"]) if text_only else user(CHELSEA, facts["prompt"])
    prompt = case(name).loaded.processor.prepare([message])
    assert list(prompt.token_ids) == case(name).ref[f"vlm.{facts['case']}.input_ids"][0].tolist()


def test_several_pictures_of_a_message_become_nanovlms_text() -> None:
    facts = case("vlm_tied").facts["vlm"][1]
    processor = case("vlm_tied").loaded.processor
    tiles = processor._tiles([picture(300, 400), picture(64, 64)])
    assert processor.image_text(tiles) + facts["prompt"] == facts["prompt_with_images"]


@pytest.mark.parametrize("name", ["vlm_tied", "vlm_untied"])
def test_extra_tokens_get_nanovlms_ids(name: str) -> None:
    tokenizer, config = case(name).loaded.tokenizer, case(name).loaded.model.config
    ids = {n: tokenizer.token_to_id(token) for n, token in config.extra_tokens.items()}
    assert ids == case(name).facts["extra_token_ids"]
    assert tokenizer.eos_token_id == case(name).facts["eos_token_id"]


def test_each_tile_has_a_span_with_its_pixels(processor: ImageProcessor) -> None:
    prompt = processor.prepare([user(CHELSEA, "What is this?")])
    token = processor.placeholder_id
    covered = [i for span in prompt.spans for i in range(span.start, span.stop)]
    assert covered == [i for i, t in enumerate(prompt.token_ids) if t == token]
    pixels = torch.stack([span.pixels for span in prompt.spans])
    assert torch.equal(pixels, case("vlm_tied").ref["vlm.one_image.pixels.0"])


def test_equal_tiles_share_a_digest(processor: ImageProcessor) -> None:
    prompt = processor.prepare("", [picture(64, 32, "red"), picture(64, 32, "blue")])
    digests = [span.digest for span in prompt.spans]
    assert len(set(digests[:3])) == len(set(digests[3:])) == 1
    assert digests[0] != digests[3]


def test_a_picture_of_one_tile_is_its_own_overview(processor: ImageProcessor) -> None:
    fitting = replace(processor, tiling=replace(processor.tiling, enlarge=False))
    tiles = fitting._tiles([picture()])
    assert fitting.image_text(tiles) == "<|global_image|>" + IMAGE


def test_pictures_come_before_the_text_of_their_message(processor: ImageProcessor) -> None:
    before = processor.prepare([user(picture(), "Look.")])
    behind = processor.prepare([user("Look.", picture())])
    assert before.token_ids == behind.token_ids


def test_a_later_turn_leaves_the_turns_before_it_as_they_were(processor: ImageProcessor) -> None:
    first = [user(picture(), "One?"), {"role": "assistant", "content": "Yes."}]
    one = processor.prepare(first, add_generation_prompt=False)
    two = processor.prepare([*first, user(picture(colour="blue"), "And now?"), user("Text.")])
    assert two.token_ids[: len(one.token_ids)] == one.token_ids
    assert two.spans[: len(one.spans)] == one.spans
    assert len(two.spans) == 2 * len(one.spans)


def test_text_takes_pictures_in_front(processor: ImageProcessor) -> None:
    prompt = processor.prepare("What is this?", [picture()])
    assert text_of(processor, prompt).startswith("<|global_image|><|image|>")
    assert text_of(processor, prompt).endswith("What is this?")
    assert processor.prepare("No picture.").spans == ()


def test_token_ids_take_pictures_at_their_placeholders(processor: ImageProcessor) -> None:
    whole = processor.prepare("Hm?", [picture()])
    again = processor.prepare(whole.token_ids, [picture()])
    assert again == whole
    with pytest.raises(RequestError, match="has 20 image tokens, but its pictures make 10 tiles"):
        processor.prepare(whole.token_ids, [picture(), picture()])
    inside = whole.spans[0].start + 2
    parted = (*whole.token_ids[:inside], 7, *whole.token_ids[inside:])
    with pytest.raises(RequestError, match="image tokens, but"):
        processor.prepare(parted, [picture()])
    with pytest.raises(RequestError, match="has 21 image tokens, but its pictures make 5"):
        processor.prepare((*whole.token_ids, processor.placeholder_id), [picture()])


def test_text_that_writes_the_image_token_itself_is_refused(processor: ImageProcessor) -> None:
    for prompt in ("What is <|image|>?", [user(picture(), "What is <|image|>?")]):
        with pytest.raises(RequestError, match=r"the text holds <\|image\|>"):
            processor.prepare(prompt)


def test_a_chats_pictures_belong_into_its_messages(processor: ImageProcessor) -> None:
    with pytest.raises(RequestError, match="as content parts"):
        processor.prepare([user("Look.")], [picture()])


def test_openais_spelling_of_a_picture_is_taken(processor: ImageProcessor) -> None:
    url = "data:image/png;base64,"
    message = {"role": "user", "content": [{"type": "image_url", "image_url": {"url": url}}]}
    with pytest.raises(RequestError, match="the image in the data URL is no picture"):
        processor.prepare([message])


def test_limits_reach_the_pictures_of_a_chat(processor: ImageProcessor) -> None:
    strict = replace(processor, limits=ImageLimits(max_pixels=10))
    with pytest.raises(RequestError, match="32 x 32 pixels"):
        strict.prepare([user(picture(), "Look.")])


def test_more_tiles_than_places_with_a_token_are_refused(processor: ImageProcessor) -> None:
    wide = replace(processor, tiling=Tiling(tile=32, max_side=32 * 9))
    with pytest.raises(ConfigError, match="no token for row 1, column 9"):
        wide.prepare("", [picture(32 * 9, 32)])


# Versions before the current one.


def older(processor: ImageProcessor, extra: Mapping[str, str], **changes: object) -> ImageProcessor:
    tiling = replace(processor.tiling, overview=False, **changes)  # type: ignore[arg-type]
    return replace(processor, extra_tokens=extra, tiling=tiling)


def test_a_version_without_overview_has_tiles_only(processor: ImageProcessor) -> None:
    extra = {n: t for n, t in processor.extra_tokens.items() if n != "global_image_token"}
    tiles = (old := older(processor, extra))._tiles([picture(64, 30)])
    assert old.image_text(tiles) == f"<row_1_col_1>{IMAGE}<row_1_col_2>{IMAGE}"


def test_a_version_without_places_has_image_tokens_only(processor: ImageProcessor) -> None:
    old = older(processor, {"image_token": "<|image|>"})
    assert old.image_text(old._tiles([picture(64, 30)])) == IMAGE * 2
    squeezing = older(processor, {"image_token": "<|image|>"}, max_side=None)
    tiles = squeezing._tiles([picture(64, 30), picture()])
    assert squeezing.image_text(tiles) == IMAGE * 2
    assert len(squeezing.prepare("Hm?", [picture(64, 30), picture()]).spans) == 2


def test_the_first_version_puts_its_one_picture_before_the_text(processor: ImageProcessor) -> None:
    first = replace(older(processor, {}, max_side=None), placeholder_id=0)
    prompt = first.prepare("Hello", [picture()])
    assert prompt.token_ids == (0, 0, 0, 0, *first.tokenizer.encode("Hello"))
    assert [(span.start, span.length) for span in prompt.spans] == [(0, 4)]
    with pytest.raises(RequestError, match="one picture in a prompt, not 2"):
        first.prepare("Hello", [picture(), picture()])
