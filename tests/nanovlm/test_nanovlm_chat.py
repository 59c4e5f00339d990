"""A chat that is shown pictures computes only what is new, and answers as from nothing."""

from pathlib import Path
from typing import Any

import pytest
from PIL import Image
from vlm_cases import CHELSEA, NANOVLM

import kvist
from kvist.chat import Conversation
from kvist.errors import CacheError, RequestError
from kvist.loading.model import Model

GREEDY = kvist.SamplingParams(temperature=0, max_tokens=6)


@pytest.fixture(scope="module")
def seeing() -> Model:
    return kvist.load(NANOVLM / "vlm_tied")


def say(conversation: Conversation, text: str, *images: Any) -> list[int]:
    stream = conversation.say(text, GREEDY, images)
    return [token for delta in stream for token in delta.token_ids]


def from_nothing(conversation: Conversation) -> list[int]:
    *messages, _ = conversation.messages
    return list(kvist.generate(conversation.model, [messages], GREEDY)[0].token_ids)


def test_pictures_in_several_turns_answer_as_from_nothing(seeing: Model) -> None:
    chat = Conversation(seeing)
    red = Image.new("RGB", (40, 20), "red")
    for text, images in (
        ("What is this?", [CHELSEA]),
        ("Is it a cat?", []),
        ("And these?", [red, CHELSEA.read_bytes()]),
    ):
        before = len(chat.cached_ids)
        assert say(chat, text, *images) == from_nothing(chat)
        assert chat.turn is not None
        assert chat.turn.cached_tokens >= before - 6  # all but what the answer's end rewrote


def test_another_picture_in_the_same_place_is_not_taken_for_the_first(seeing: Model) -> None:
    chat = Conversation(seeing)
    first = say(chat, "What is this?", Image.new("RGB", (64, 64), "red"))
    assert chat.undo() == "What is this?"
    other = say(chat, "What is this?", CHELSEA)
    assert chat.turn is not None
    image = seeing.prepare(chat.messages[:1]).spans[0]
    assert chat.turn.cached_tokens == image.start
    assert other == from_nothing(chat)
    assert first


def test_a_saved_chat_keeps_its_pictures(seeing: Model, tmp_path: Path) -> None:
    picture = tmp_path / "cat.png"
    picture.write_bytes(CHELSEA.read_bytes())
    chat = Conversation(seeing)
    say(chat, "What is this?", picture)
    chat.save(tmp_path / "chat")
    picture.unlink()
    resumed = Conversation(seeing)
    resumed.restore(tmp_path / "chat")
    assert say(resumed, "Why?") == say(chat, "Why?") == from_nothing(resumed)
    assert resumed.turn is not None
    assert chat.turn is not None
    assert resumed.turn.cached_tokens == chat.turn.cached_tokens > 40


def test_a_model_that_only_reads_refuses_pictures(model: Model) -> None:
    with pytest.raises(RequestError, match="takes no pictures"):
        Conversation(model).say("What is this?", GREEDY, [CHELSEA])


def test_a_picture_that_cannot_be_read_changes_nothing(seeing: Model, tmp_path: Path) -> None:
    chat = Conversation(seeing)
    with pytest.raises(RequestError, match=r"nothing\.png"):
        chat.say("What is this?", GREEDY, [tmp_path / "nothing.png"])
    assert chat.messages == []
    (tmp_path / "text.png").write_text("no picture")
    with pytest.raises(RequestError, match=r"text\.png is no picture"):
        chat.say("What is this?", GREEDY, [tmp_path / "text.png"])


def test_a_chat_with_pictures_is_refused_by_another_model(
    seeing: Model, model: Model, tmp_path: Path
) -> None:
    chat = Conversation(seeing)
    say(chat, "What is this?", CHELSEA)
    chat.save(tmp_path / "chat")
    with pytest.raises(CacheError):
        Conversation(model).restore(tmp_path / "chat")
