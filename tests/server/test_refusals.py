"""What is wrong is refused with 4xx, the parameter's name and a remedy, and the server goes on."""

import json
import time
from typing import Any

import pytest
from running import Running, running

CHAT = "/v1/chat/completions"
FINE: dict[str, Any] = {
    "model": "dense_tied",
    "messages": [{"role": "user", "content": "x"}],
    "max_tokens": 2,
}


def test_the_server_is_unharmed(server: Running) -> None:
    assert server.http.post(CHAT, json=FINE).status_code == 200


@pytest.mark.parametrize(
    ("body", "param"),
    [
        ({"messages": []}, "messages"),
        ({"messages": "hi"}, "messages"),
        ({"messages": [{"role": "wizard", "content": "x"}]}, "messages[0].role"),
        ({"messages": [{"role": "user"}]}, "messages"),
        ({"messages": [{"role": "user", "content": 5}]}, "messages[0].content"),
        (
            {"messages": [{"role": "user", "content": [{"type": "sound"}]}]},
            "messages[0].content[0]",
        ),
        ({"temperature": -1}, "temperature"),
        ({"temperature": "hot"}, "temperature"),
        ({"temperature": 1e308}, "temperature"),
        ({"top_p": 0}, "top_p"),
        ({"top_p": 1.5}, "top_p"),
        ({"n": 0}, "n"),
        ({"n": 10**9}, "n"),
        ({"max_tokens": 0}, "max_tokens"),
        ({"max_tokens": -5}, "max_tokens"),
        ({"max_tokens": 10**30}, "max_tokens"),
        ({"seed": 2**70}, "seed"),
        ({"stop": [""]}, "stop[0]"),
        ({"stop": ["x"] * 100}, "stop"),
        ({"logit_bias": {"no": 1}}, "logit_bias"),
        ({"logit_bias": {"5": 1000}}, "logit_bias"),
        ({"logit_bias": {"100000": 1}}, None),
        ({"presence_penalty": 3}, "presence_penalty"),
        ({"top_logprobs": 3}, None),
        ({"stream_options": {"include_usage": True}}, None),
        ({"tool_choice": "required"}, None),
        ({"tools": [{"type": "function", "function": {"name": "a b"}}]}, "tools[0].function.name"),
        ({"temprature": 1}, "temprature"),
        ({"chat_template": "{{ messages }}"}, "chat_template"),
        ({"chat_template_kwargs": {"messages": []}}, "chat_template_kwargs"),
        ({"min_tokens": 9}, "min_tokens"),
    ],
    ids=lambda value: json.dumps(value)[:60] if isinstance(value, dict) else None,
)
def test_a_wrong_parameter_is_named(server: Running, body: dict[str, Any], param: str) -> None:
    status, error = server.error(CHAT, FINE | body)
    assert status == 400
    assert error["type"] == "invalid_request_error"
    assert error["param"] == param
    assert len(error["message"]) < 400


def test_an_unknown_model_is_not_found(server: Running) -> None:
    status, error = server.error(CHAT, FINE | {"model": "gpt-5"})
    assert (status, error["code"], error["param"]) == (404, "model_not_found", "model")


@pytest.mark.parametrize(
    "content",
    [
        b"",
        b"{",
        b"nonsense",
        b"[1, 2]",
        b'"text"',
        b'{"model": "\xff\xfe"}',
        b"[" * 100_000,
        b"nul",
    ],
    ids=lambda content: repr(content[:12]),
)
def test_what_is_no_json_object_is_refused(server: Running, content: bytes) -> None:
    answer = server.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400
    assert answer.json()["error"]["type"] == "invalid_request_error"


def test_a_form_or_plain_text_is_not_taken_for_json(server: Running) -> None:
    """So that no other site's page can ask in a visitor's name without being allowed to."""
    content = json.dumps(FINE)
    for kind in ("text/plain", "application/x-www-form-urlencoded"):
        answer = server.http.post(CHAT, content=content, headers={"Content-Type": kind})
        assert answer.status_code == 400


def test_lone_surrogates_are_refused(server: Running) -> None:
    body = json.dumps(FINE).replace('"x"', '"\\ud800"')
    answer = server.http.post(CHAT, content=body, headers={"Content-Type": "application/json"})
    assert answer.status_code == 400


def test_values_nested_too_deeply_are_refused(server: Running) -> None:
    deep: Any = "x"
    for _ in range(700):
        deep = [deep]
    message = {"role": "user", "content": "x", "extra": deep}
    for body in (
        {"messages": [message]},
        {"chat_template_kwargs": {"x": deep}},
        {"tools": [{"type": "function", "function": {"name": "f", "parameters": {"x": deep}}}]},
        {"response_format": {"type": "json_schema", "json_schema": {"schema": {"x": deep}}}},
        {"stop": deep},
    ):
        assert server.http.post(CHAT, json=FINE | body).status_code == 400


@pytest.mark.parametrize("chunked", [False, True])
def test_a_body_of_20_mb_is_refused(server: Running, chunked: bool) -> None:
    body = json.dumps(FINE | {"messages": [{"role": "user", "content": "x" * 20_000_000}]})
    content: Any = (body[i : i + 65536].encode() for i in range(0, len(body), 65536))
    if not chunked:
        content = body
    answer = server.http.post(CHAT, content=content, headers={"Content-Type": "application/json"})
    assert answer.status_code == 413
    assert answer.json()["error"]["message"] == "the body has more than 16,777,216 bytes"


def test_a_million_tokens_are_too_many(server: Running) -> None:
    for prompt in ("ab " * 500_000, [5] * 1_000_000):
        body = {"model": "dense_tied", "prompt": prompt}
        status, error = server.error("/v1/completions", body)
        assert (status, error["code"]) == (400, "context_length_exceeded")
        assert "1024" in error["message"]


def test_more_new_tokens_than_there_is_room_for_are_refused(server: Running) -> None:
    status, error = server.error(CHAT, FINE | {"max_tokens": 5000})
    assert (status, error["code"]) == (400, "context_length_exceeded")


def test_what_is_not_there_is_a_404_and_a_wrong_method_a_405(server: Running) -> None:
    assert server.http.get("/v1/nothing").json()["error"]["type"] == "not_found_error"
    answer = server.http.get(CHAT)
    assert (answer.status_code, answer.headers["allow"]) == (405, "POST")


def test_too_many_outputs_are_refused(server: Running) -> None:
    body = {"model": "dense_tied", "prompt": ["x"] * 40, "n": 2, "max_tokens": 1}
    status, error = server.error("/v1/completions", body)
    assert (status, error["param"]) == (400, "prompt")


def deep(levels: int) -> Any:
    schema: Any = {"type": "string"}
    for _ in range(levels):
        schema = {"type": "object", "properties": {"a": schema}}
    return schema


EVIL = {
    "deep": deep(200),
    "wide": {"type": "object", "properties": {f"p{i}": {"type": "string"} for i in range(9000)}},
    "long pattern": {"type": "string", "pattern": "a" * 5000},
    "backtracking": {"type": "string", "pattern": "^(a+)+(b|c*)*\\1$"},
    "lookahead": {"type": "string", "pattern": "(?=a)b(?!c)"},
    "broken": {"type": "string", "pattern": "(("},
    "unknown type": {"type": "thing"},
    "remote": {"$ref": "https://example.com/schema.json"},
    "nowhere": {"$ref": "#/$defs/nothing"},
    "impossible": {"type": "integer", "minimum": 5, "maximum": 3},
    "nothing": False,
    "numbers": {"type": "number", "multipleOf": 1e-300},
}


@pytest.mark.parametrize("name", EVIL)
def test_evil_schemas_are_refused_quickly(server: Running, name: str) -> None:
    shape = {"type": "json_schema", "json_schema": {"name": "x", "schema": EVIL[name]}}
    began = time.perf_counter()
    status, error = server.error(CHAT, FINE | {"response_format": shape})
    assert time.perf_counter() - began < 5
    assert status == 400
    assert len(error["message"]) < 500


def test_a_schema_that_is_only_hard_is_bounded_too(server: Running) -> None:
    """Nothing is wrong with these; each step of them has its limit."""
    patterns = ("^(a+)+$", "(a|aa)*b", "(.*a){20}", "(x+x+)+y", "(((a{0,99}){0,99}){0,99}){0,99}")
    for pattern in patterns:
        shape = {
            "type": "json_schema",
            "json_schema": {"schema": {"type": "string", "pattern": pattern}},
        }
        began = time.perf_counter()
        answer = server.http.post(CHAT, json=FINE | {"response_format": shape, "max_tokens": 20})
        assert answer.status_code in (200, 400, 500)
        assert time.perf_counter() - began < 5
    test_the_server_is_unharmed(server)


def test_a_model_that_is_called_otherwise(model: Any) -> None:
    with running(model, ui=False, served_model_name=("a", "b")) as other:
        assert [one["id"] for one in other.http.get("/v1/models").json()["data"]] == ["a", "b"]
        assert other.http.post(CHAT, json=FINE | {"model": "b"}).json()["model"] == "b"
        assert other.error(CHAT, FINE)[0] == 404
