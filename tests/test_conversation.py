"""A conversation computes only what is new, and says what it would have said from nothing."""

import json
import subprocess
import sys
from collections.abc import Iterator, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from torch import Tensor

import kvist
from kvist.cache import CODECS, LAYOUTS, Batch, KVCache
from kvist.cache.saved import save_cache
from kvist.chat import Conversation
from kvist.core.results import Delta
from kvist.errors import CacheError, ContextTooLong, NumericalError, RequestError
from kvist.generate import generate
from kvist.loading.model import Model
from kvist.runner.step import model_step
from tiny_models import new_cache, reference

GREEDY = kvist.SamplingParams(temperature=0, max_tokens=12)
SAYINGS = ("Hello there, who are you?", "And what is 2 + 2?", "Thanks.")


@pytest.fixture(scope="session")
def sliding() -> Model:
    """Layers full, sliding, sliding, full; a window of 16."""
    return reference("dense_swa").model


class Script:
    """A step that runs the model and then makes it say what is in the script."""

    def __init__(self, model: Model, *answers: str) -> None:
        encode = model.require_tokenizer().encode
        eos = min(model.eos_token_ids)
        self._next = iter([token for text in answers for token in (*encode(text), eos)])
        self._step = model_step(model.lm)
        self.batches: list[Batch] = []

    def __call__(self, batch: Batch, cache: KVCache) -> Tensor:
        self.batches.append(batch)
        logits = self._step(batch, cache)
        forced = torch.full_like(logits, -torch.inf)
        forced[:, next(self._next)] = 0.0
        return forced


def tokens_of(stream: Iterator[Delta]) -> list[int]:
    return [token for delta in stream for token in delta.token_ids]


def talk(conversation: Conversation, sayings: Sequence[str] = SAYINGS) -> list[list[int]]:
    return [tokens_of(conversation.say(text, GREEDY)) for text in sayings]


def from_nothing(conversation: Conversation, codec: str = "plain") -> list[int]:
    """What the model answers to the last message if the whole conversation is computed anew."""
    *messages, _ = conversation.messages
    [result] = generate(
        conversation.model, [messages], GREEDY, codec=codec, retention=conversation.retention
    )
    return list(result.token_ids)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_every_layout_answers_as_from_nothing(model: Model, layout: str) -> None:
    conversation = Conversation(model, layout=layout, system="Be brief.")
    for text in SAYINGS:
        tokens = tokens_of(conversation.say(text, GREEDY))
        assert tokens == from_nothing(conversation)


@pytest.mark.parametrize("codec", CODECS)
def test_every_codec_answers_as_from_nothing(model: Model, codec: str) -> None:
    conversation = Conversation(model, codec)
    for text in SAYINGS:
        tokens = tokens_of(conversation.say(text, GREEDY))
        assert tokens == from_nothing(conversation, codec)


@pytest.mark.parametrize("layout", LAYOUTS)
def test_windows_answer_as_from_nothing(sliding: Model, layout: str) -> None:
    for retention in (None, kvist.SlidingWindow(24, sinks=4)):
        conversation = Conversation(sliding, layout=layout, retention=retention)
        for text in SAYINGS:
            tokens = tokens_of(conversation.say(text, GREEDY))
            assert tokens == from_nothing(conversation)


def test_only_the_new_turn_is_computed(model: Model) -> None:
    script = Script(model, "I am a test.", "Four.")
    conversation = Conversation(model, step=script)
    tokens_of(conversation.say(SAYINGS[0]))
    first = conversation.turn
    assert first is not None
    assert (first.cached_tokens, first.finish_reason) == (0, "stop")
    script.batches.clear()
    tokens_of(conversation.say(SAYINGS[1]))
    second = conversation.turn
    assert second is not None
    # All of the first turn is there but for its last token, which ended it and was never fed.
    assert second.cached_tokens == first.prompt_tokens + first.output_tokens - 1
    assert script.batches[0].query_lens == (second.prefilled_tokens,)
    assert [m["content"] for m in conversation.messages][1::2] == ["I am a test.", "Four."]


def test_a_template_that_leaves_out_old_thinking_is_followed(model: Model) -> None:
    script = Script(model, "<think>\nHm.\n</think>\n\nYes.", "No.")
    conversation = Conversation(model, step=script)
    tokens_of(conversation.say("Is it?"))
    held = len(conversation.cached_ids)
    tokens_of(conversation.say("Is it not?"))
    turn = conversation.turn
    assert turn is not None
    assert 0 < turn.cached_tokens < held
    encode, decode = model.encode, model.require_tokenizer().decode
    prompt = encode(conversation.messages[:-1])
    assert conversation.cached_ids[: len(prompt)] == prompt
    assert "Hm." not in decode(prompt)
    assert conversation.messages[1]["content"] == "<think>\nHm.\n</think>\n\nYes."


def test_thinking_can_be_turned_off_in_the_template(model: Model) -> None:
    conversation = Conversation(
        model, step=Script(model, "Yes.", "No."), template={"enable_thinking": False}
    )
    tokens_of(conversation.say("Is it?"))
    decode = model.require_tokenizer().decode
    assert "<think>\n\n</think>" in decode(conversation.cached_ids)
    assert not conversation.starts_thinking
    tokens_of(conversation.say("Is it not?"))


@pytest.mark.parametrize(("layout", "length"), [("paged", 100), ("ring", 310)])
def test_a_cache_that_cannot_go_back_is_filled_anew_and_says_so(
    sliding: Model, layout: str, length: int
) -> None:
    # What is behind the window of 16 is gone, and the old thinking is longer than that.
    thinking = f"<think>\n{'x' * length}\n</think>\n\nYes."
    conversation = Conversation(sliding, layout=layout, step=Script(sliding, thinking, "No."))
    tokens_of(conversation.say("Is it?"))
    tokens_of(conversation.say("Is it not?"))
    turn = conversation.turn
    assert turn is not None
    assert turn.cached_tokens == 0
    assert "could not go back" in turn.remark
    prompt = sliding.encode(conversation.messages[:-1])
    assert conversation.cached_ids[: len(prompt)] == prompt


def test_repeating_a_turn_computes_its_last_token_only(model: Model) -> None:
    conversation = Conversation(model)
    first = tokens_of(conversation.say("Hello", GREEDY))
    assert conversation.undo() == "Hello"
    assert conversation.messages == []
    assert tokens_of(conversation.say("Hello", GREEDY)) == first
    assert conversation.turn is not None
    assert conversation.turn.prefilled_tokens == 1


def test_nothing_is_left_to_undo_at_the_beginning(model: Model) -> None:
    conversation = Conversation(model, system="Be brief.")
    assert conversation.undo() is None
    assert conversation.system == "Be brief."


def test_reset_keeps_the_system_message_alone(model: Model) -> None:
    conversation = Conversation(model, system="Be brief.")
    talk(conversation, SAYINGS[:1])
    conversation.reset()
    assert conversation.messages == [{"role": "system", "content": "Be brief."}]
    assert (conversation.cached_ids, conversation.tokens_used) == ((), 0)
    assert talk(conversation) == talk(Conversation(model, system="Be brief."))


def test_another_system_message_applies_to_what_was_said_before(model: Model) -> None:
    conversation = Conversation(model, system="Be brief.")
    talk(conversation, SAYINGS[:2])
    conversation.set_system("Be verbose.")
    [tokens] = talk(conversation, SAYINGS[2:])
    assert tokens == from_nothing(conversation)
    conversation.set_system(None)
    assert conversation.messages[0]["role"] == "user"


def interrupted_by_stop(conversation: Conversation, deltas: int) -> None:
    for count, _ in enumerate(conversation.say(SAYINGS[0], GREEDY), start=1):
        if count == deltas:
            conversation.stop()


def interrupted_by_closing(conversation: Conversation, deltas: int) -> None:
    stream = conversation.say(SAYINGS[0], GREEDY)
    for _ in range(deltas):
        next(stream)
    stream.close()  # type: ignore[attr-defined]


@pytest.mark.parametrize("speculate", [0, 3])
@pytest.mark.parametrize("interrupt", [interrupted_by_stop, interrupted_by_closing])
def test_an_interrupted_answer_stays_and_the_conversation_goes_on(
    model: Model, interrupt: object, speculate: int
) -> None:
    conversation = Conversation(model, speculate=speculate)
    interrupt(conversation, 5)  # type: ignore[operator]
    assert conversation.turn is not None
    assert conversation.turn.finish_reason == "interrupted"
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    [tokens] = talk(conversation, SAYINGS[1:2])
    assert tokens == from_nothing(conversation)


def test_a_turn_that_is_stopped_before_its_first_word_is_taken_back(model: Model) -> None:
    run, stops = model_step(model.lm), [True]

    def stopping(batch: Batch, cache: KVCache) -> Tensor:
        if stops and stops.pop():
            conversation.stop()
        return run(batch, cache)

    conversation = Conversation(model, step=stopping)
    chunks = "x" * 600  # a first chunk of the prompt is computed, and then no more
    assert tokens_of(conversation.say(chunks, GREEDY)) == []
    assert conversation.messages == []
    held = len(conversation.cached_ids)
    assert 0 < held < 600
    [tokens] = talk(conversation, [chunks])
    assert tokens == from_nothing(conversation)
    assert conversation.turn is not None
    assert conversation.turn.cached_tokens == held


def test_an_interrupt_within_a_step_leaves_a_conversation_that_goes_on(model: Model) -> None:
    run, calls = model_step(model.lm), iter(range(1000))

    def interrupted(batch: Batch, cache: KVCache) -> Tensor:
        logits = run(batch, cache)
        if next(calls) == 3:
            raise KeyboardInterrupt
        return logits

    conversation = Conversation(model, step=interrupted)
    with pytest.raises(KeyboardInterrupt):
        tokens_of(conversation.say(SAYINGS[0], GREEDY))
    assert [message["role"] for message in conversation.messages] == ["user", "assistant"]
    [tokens] = talk(conversation, SAYINGS[1:2])
    assert tokens == from_nothing(conversation)


def test_a_turn_that_fails_is_taken_back(model: Model) -> None:
    run, calls = model_step(model.lm), iter(range(1000))

    def failing(batch: Batch, cache: KVCache) -> Tensor:
        logits = run(batch, cache)
        return logits * torch.nan if next(calls) == 3 else logits

    conversation = Conversation(model, step=failing)
    with pytest.raises(NumericalError):
        tokens_of(conversation.say(SAYINGS[0], GREEDY))
    assert (conversation.messages, conversation.cached_ids) == ([], ())
    assert talk(conversation) == talk(Conversation(model))


def test_an_answer_that_ends_within_a_thought_gets_its_end(model: Model) -> None:
    script = Script(model, "<think>\nLet me think", "No.")
    conversation = Conversation(model, step=script)
    params = kvist.SamplingParams(max_tokens=6)
    tokens_of(conversation.say("Is it?", params))
    assert conversation.turn is not None
    assert conversation.turn.finish_reason == "length"
    assert conversation.messages[1]["content"].endswith("\n</think>\n\n")


def test_a_message_that_leaves_no_room_for_an_answer_is_refused(model: Model) -> None:
    conversation = Conversation(model, context=64)
    talk(conversation, SAYINGS[:1])
    before = conversation.messages, conversation.cached_ids
    with pytest.raises(ContextTooLong, match=r"takes \d+ tokens, and the context is 64"):
        conversation.say("and then " * 20, GREEDY)
    assert (conversation.messages, conversation.cached_ids) == before


def test_an_answer_ends_where_the_context_does(model: Model) -> None:
    conversation = Conversation(model, layout="static", context=48)
    tokens_of(conversation.say("Hi", kvist.SamplingParams(temperature=0, ignore_eos=True)))
    turn = conversation.turn
    assert turn is not None
    assert turn.prompt_tokens + turn.output_tokens == 48
    assert turn.finish_reason == "length"


def test_a_seed_gives_the_same_conversation_and_other_draws_each_turn(model: Model) -> None:
    params = kvist.SamplingParams(temperature=1.0, seed=7, max_tokens=8, ignore_eos=True)
    run = model_step(model.lm)

    def indifferent(batch: Batch, cache: KVCache) -> Tensor:
        return torch.zeros_like(run(batch, cache))

    def chat() -> list[list[int]]:
        conversation = Conversation(model, step=indifferent)
        return [tokens_of(conversation.say("Hi", params)) for _ in range(2)]

    first, second = chat()
    assert first != second
    assert chat() == [first, second]


@pytest.mark.parametrize(
    "params", [kvist.SamplingParams(n=2), kvist.SamplingParams(num_beams=2, temperature=0)]
)
def test_more_than_one_answer_is_refused(model: Model, params: kvist.SamplingParams) -> None:
    with pytest.raises(RequestError, match="one answer"):
        Conversation(model).say("Hi", params)


def test_a_second_answer_waits_for_the_first(model: Model) -> None:
    conversation = Conversation(model)
    stream = conversation.say("Hi", GREEDY)
    next(stream)
    with pytest.raises(RequestError, match="still under way"):
        conversation.say("Hi again", GREEDY)
    tokens_of(stream)
    tokens_of(conversation.say("Hi again", GREEDY))


@pytest.mark.parametrize("context", [0, 100_000])
def test_a_context_that_the_model_cannot_have_is_refused(model: Model, context: int) -> None:
    with pytest.raises(RequestError, match=f"not {context}"):
        Conversation(model, context=context)


def test_a_model_without_a_chat_template_is_refused(model: Model) -> None:
    tokenizer = replace(model.require_tokenizer(), chat_template=None)
    with pytest.raises(RequestError, match="no chat template"):
        Conversation(replace(model, tokenizer=tokenizer))


def test_a_template_that_takes_no_system_message_is_refused_and_nothing_changes(
    model: Model,
) -> None:
    source = (
        "{% for m in messages %}{% if m.role == 'system' %}"
        "{{ raise_exception('System role not supported') }}{% endif %}"
        "<|im_start|>{{ m.content }}<|im_end|>{% endfor %}"
    )
    tokenizer = replace(model.require_tokenizer(), chat_template=source)
    conversation = Conversation(replace(model, tokenizer=tokenizer))
    with pytest.raises(RequestError, match="System role not supported"):
        conversation.set_system("Be brief.")
    assert conversation.system is None
    assert len(talk(conversation)) == 3


# Saved conversations.


@pytest.mark.parametrize("codec", CODECS)
@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_saved_conversation_goes_on_as_if_it_had_not_been_interrupted(
    model: Model, tmp_path: Path, layout: str, codec: str
) -> None:
    unbroken = Conversation(model, codec, layout, system="Be brief.")
    talk(unbroken, SAYINGS[:2])
    unbroken.save(tmp_path / "chat")
    resumed = Conversation(model)
    resumed.restore(tmp_path / "chat")
    assert resumed.messages == unbroken.messages
    assert (resumed.layout, resumed.codec.name) == (layout, codec)
    assert talk(resumed, SAYINGS[2:]) == talk(unbroken, SAYINGS[2:])
    assert resumed.cached_ids == unbroken.cached_ids
    assert resumed.turn is not None
    assert unbroken.turn is not None
    assert resumed.turn.cached_tokens == unbroken.turn.cached_tokens > 0


@pytest.mark.parametrize("layout", LAYOUTS)
def test_a_window_is_saved_with_the_conversation(
    sliding: Model, tmp_path: Path, layout: str
) -> None:
    unbroken = Conversation(sliding, layout=layout, retention=kvist.SlidingWindow(24, sinks=4))
    talk(unbroken, SAYINGS[:2])
    unbroken.save(tmp_path / "chat")
    resumed = Conversation(sliding)
    resumed.restore(tmp_path / "chat")
    assert resumed.retention == kvist.SlidingWindow(24, sinks=4)
    assert talk(resumed, SAYINGS[2:]) == talk(unbroken, SAYINGS[2:])


def test_an_interrupted_conversation_can_be_saved(model: Model, tmp_path: Path) -> None:
    unbroken = Conversation(model, speculate=3)
    interrupted_by_closing(unbroken, 3)
    unbroken.save(tmp_path / "chat")
    resumed = Conversation(model, speculate=3)
    resumed.restore(tmp_path / "chat")
    assert talk(resumed) == talk(unbroken)


def test_a_conversation_without_a_word_can_be_saved(model: Model, tmp_path: Path) -> None:
    Conversation(model, system="Be brief.").save(tmp_path / "chat")
    resumed = Conversation(model)
    talk(resumed)
    resumed.restore(tmp_path / "chat")
    assert resumed.messages == [{"role": "system", "content": "Be brief."}]
    assert talk(resumed) == talk(Conversation(model, system="Be brief."))


def test_the_conversation_of_another_model_is_refused_and_nothing_changes(
    model: Model, sliding: Model, tmp_path: Path
) -> None:
    other = Conversation(sliding, "int8")
    talk(other, SAYINGS[:1])
    other.save(tmp_path / "chat")
    conversation = Conversation(model)
    talk(conversation, SAYINGS[:1])
    before = conversation.messages, conversation.cached_ids, conversation.codec.name
    with pytest.raises(CacheError, match="another model"):
        conversation.restore(tmp_path / "chat")
    assert (conversation.messages, conversation.cached_ids, conversation.codec.name) == before
    [tokens] = talk(conversation, SAYINGS[1:2])
    assert tokens == from_nothing(conversation)


def test_a_conversation_that_is_longer_than_the_context_is_refused(
    model: Model, tmp_path: Path
) -> None:
    conversation = Conversation(model)
    talk(conversation)
    conversation.save(tmp_path / "chat")
    with pytest.raises(ContextTooLong, match="the context is 32"):
        Conversation(model, context=32).restore(tmp_path / "chat")


def test_a_cache_without_messages_is_no_conversation(model: Model, tmp_path: Path) -> None:
    cache = new_cache(model)
    save_cache(cache, tmp_path / "cache", model="m", tokenizer="t", tokens=[[]])  # type: ignore[arg-type]
    with pytest.raises(CacheError, match="no conversation"):
        Conversation(model).restore(tmp_path / "cache")


def test_a_place_that_cannot_be_written_is_named(model: Model, tmp_path: Path) -> None:
    with pytest.raises(CacheError, match=r"/nowhere/chat cannot be written: No such file"):
        Conversation(model).save(tmp_path / "nowhere" / "chat")


def test_nothing_but_the_file_is_left_behind(model: Model, tmp_path: Path) -> None:
    conversation = Conversation(model)
    talk(conversation, SAYINGS[:1])
    for _ in range(2):
        conversation.save(tmp_path / "chat")
    assert [path.name for path in tmp_path.iterdir()] == ["chat"]


IN_ANOTHER_PROCESS = """
import json, sys, kvist
from pathlib import Path
from kvist.cache.saved import save_cache
from kvist.chat import Conversation

name, file, text = sys.argv[1:]
conversation = Conversation(kvist.load(name))
conversation.restore(Path(file))
params = kvist.SamplingParams(temperature=0, max_tokens=12)
tokens = [t for delta in conversation.say(text, params) for t in delta.token_ids]
print(json.dumps([tokens, conversation.turn.prefilled_tokens]))
"""


def resumed_in_another_process(name: str, file: Path, text: str) -> list[Any]:
    command = [sys.executable, "-c", IN_ANOTHER_PROCESS, name, str(file), text]
    child = subprocess.run(command, capture_output=True, text=True, check=False)
    assert child.returncode == 0, child.stderr
    answer: list[Any] = json.loads(child.stdout)
    return answer


def test_another_process_goes_on_with_the_same_tokens(model: Model, tmp_path: Path) -> None:
    conversation = Conversation(model, "int8", "ring")
    talk(conversation, SAYINGS[:2])
    conversation.save(tmp_path / "chat")
    [tokens] = talk(conversation, SAYINGS[2:])
    assert conversation.turn is not None
    there = resumed_in_another_process(model.name, tmp_path / "chat", SAYINGS[2])
    assert there == [tokens, conversation.turn.prefilled_tokens]


@pytest.mark.smollm2
def test_smollm2_goes_on_in_another_process_with_the_same_tokens(
    smollm2: Model, tmp_path: Path
) -> None:
    conversation = Conversation(kvist.load(smollm2.name))  # as it comes, like the other process
    tokens_of(conversation.say("What is a KV cache?", GREEDY))
    conversation.save(tmp_path / "chat")
    tokens = tokens_of(conversation.say("Say it in one word.", GREEDY))
    assert tokens == from_nothing(conversation)
    assert conversation.turn is not None
    assert conversation.turn.prefilled_tokens < 20
    there = resumed_in_another_process(smollm2.name, tmp_path / "chat", "Say it in one word.")
    assert there == [tokens, conversation.turn.prefilled_tokens]
