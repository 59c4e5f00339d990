"""Outputs of `LLM` and `AsyncLLM` held to JSON, expressions and choices."""

import asyncio
import json
import re
import sys
from collections.abc import Sequence
from typing import Any

import pytest
from jsonschema_rs import is_valid

import kvist
from kvist import LLM, AsyncLLM, SamplingParams
from kvist.errors import MissingDependency, RequestError
from kvist.loading.model import Model

FREE = SamplingParams(temperature=1.0, seed=3, max_tokens=80)
PROMPTS = ["the cat", "once upon a time", "the cat"]
SCHEMA = {
    "type": "object",
    "properties": {
        "city": {"enum": ["Málaga", "京都"]},
        "size": {"type": "integer", "minimum": 0, "maximum": 99},
    },
    "required": ["city", "size"],
    "additionalProperties": False,
}


@pytest.fixture(scope="module")
def llm(model: Model) -> LLM:
    return LLM(model, cache_memory=1 << 20, block_size=4)


def test_every_output_fits_the_schema_and_ends(llm: LLM) -> None:
    params = SamplingParams(temperature=1.0, seed=3, max_tokens=80, n=3)
    results = llm.generate(PROMPTS, params, grammar=llm.grammars.json(SCHEMA))
    assert [r.finish_reason for r in results] == ["stop"] * 9
    assert all(is_valid(SCHEMA, json.loads(r.text)) for r in results)
    assert len({r.text for r in results}) > 1
    assert all(r.text == json.dumps(json.loads(r.text), ensure_ascii=False) for r in results)


def test_an_expression_is_matched_whole_and_a_choice_is_made(llm: LLM) -> None:
    for result in llm.generate(PROMPTS, FREE, grammar=llm.grammars.regex(r"[a-c]{2}/[0-9]\n")):
        assert re.fullmatch(r"[a-c]{2}/[0-9]\n", result.text)
    texts = ['say "yes"', "no/never", "京都"]
    for result in llm.generate(PROMPTS, FREE, grammar=llm.grammars.choice(texts)):
        assert result.text in texts


def test_a_conversation_is_held_to_any_object_or_to_a_grammar_of_ones_own(llm: LLM) -> None:
    talk = [{"role": "user", "content": "hello, who is there?"}]
    [result] = llm.chat(talk, FREE, grammar=llm.grammars.json())
    assert result.text.startswith("{")
    [result] = llm.chat(talk, FREE, grammar=llm.grammars.compile('start: "a" "b"+ "c"'))
    assert re.fullmatch("ab+c", result.text)


def test_each_prompt_may_have_a_grammar_of_its_own_or_none(llm: LLM) -> None:
    yes, no = llm.grammars.choice(["yes"]), llm.grammars.choice(["no"])
    first, free, last = llm.generate(PROMPTS, FREE, grammar=[yes, None, no])
    assert (first.text, last.text) == ("yes", "no")
    assert free.token_ids == kvist.generate(llm.model, PROMPTS, FREE)[1].token_ids


def test_one_grammar_serves_many_requests_at_once_and_both_engines_agree(
    model: Model, llm: LLM
) -> None:
    offline = llm.generate(PROMPTS, FREE, grammar=llm.grammars.json(SCHEMA))

    async def online() -> list[str]:
        async with AsyncLLM(model, cache_memory=1 << 20) as served:
            grammar = served.grammars.json(SCHEMA)

            async def one(prompt: str) -> str:
                return "".join(
                    [delta.text async for delta in served.submit(prompt, FREE, grammar=grammar)]
                )

            return await asyncio.gather(*map(one, PROMPTS))

    assert asyncio.run(online()) == [result.text for result in offline]


def test_what_cannot_be_held_to_is_refused_before_anything_runs(model: Model, llm: LLM) -> None:
    yes = llm.grammars.choice(["yes"])
    refused: list[tuple[str, Any, SamplingParams]] = [
        ("2 grammars for 3 prompts", [yes, None], FREE),
        ("another engine", LLM(model, cache_memory=1 << 20).grammars.choice(["yes"]), FREE),
        ("ignore_eos", yes, SamplingParams(ignore_eos=True)),
        ("min_tokens", yes, SamplingParams(min_tokens=2)),
    ]
    for message, grammar, params in refused:
        with pytest.raises(RequestError, match=message):
            llm.generate(PROMPTS, params, grammar=grammar)
    assert not llm.engine.has_unfinished


@pytest.mark.parametrize(
    ("kind", "given", "message"),
    [
        ("json", {"type": "thing"}, "Invalid type: thing"),
        ("json", int, "model_json_schema"),
        ("regex", "(?=a)b", "invalid regex"),
        ("choice", [], "at least one"),
        ("choice", "yes", "a list of texts"),
        ("compile", "start: nowhere", "nowhere"),
    ],
)
def test_a_wrong_grammar_is_refused_with_what_is_wrong(
    llm: LLM, kind: str, given: Any, message: str
) -> None:
    with pytest.raises(RequestError, match=message):
        getattr(llm.grammars, kind)(given)


@pytest.mark.parametrize(
    ("kind", "given"), [("json", SCHEMA), ("regex", "a"), ("choice", ["a"]), ("compile", "start: ")]
)
def test_without_llguidance_the_extra_is_named(
    model: Model, monkeypatch: pytest.MonkeyPatch, kind: str, given: Sequence[str]
) -> None:
    monkeypatch.setitem(sys.modules, "llguidance", None)
    llm = LLM(model, cache_memory=1 << 20)
    with pytest.raises(MissingDependency, match=r"pip install 'kvist\[grammars\]'"):
        getattr(llm.grammars, kind)(given)
