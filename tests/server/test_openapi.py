"""The published description is true: whatever it allows is answered as it says, never with a 500.

`KVIST_CASES=200 pytest tests/server/test_openapi.py` tries more than the few of each run.
"""

import os
from collections.abc import Iterator
from typing import Any

import pytest
import schemathesis
from hypothesis import HealthCheck, given, settings
from running import Running, running
from schemathesis.checks import not_a_server_error
from schemathesis.specs.openapi.checks import (
    content_type_conformance,
    response_schema_conformance,
    status_code_conformance,
)

import kvist

CASES = int(os.environ.get("KVIST_CASES", "12"))
CHECKS = [
    not_a_server_error,
    status_code_conformance,
    content_type_conformance,
    response_schema_conformance,
]


@pytest.fixture(scope="module")
def small(model: kvist.Model) -> Iterator[Running]:
    """A server whose answers are short."""
    own = kvist.AsyncLLM(model, cache_memory=8 << 20, max_model_len=96, max_num_seqs=16)
    with running(model, own, ui=False, embeddings=True, default_max_tokens=4) as started:
        yield started
    own.close()


@pytest.fixture(scope="module")
def described(small: Running) -> Any:
    """What the server says of itself."""
    return schemathesis.openapi.from_url(f"{small.url}/openapi.json")


def test_every_answer_is_as_described(described: Any) -> None:
    tried = 0
    for operation in described.get_all_operations():

        @settings(
            max_examples=CASES,
            deadline=None,
            derandomize=CASES < 50,
            database=None,
            suppress_health_check=list(HealthCheck),
        )
        @given(case=operation.ok().as_strategy())
        def answers(case: Any) -> None:
            nonlocal tried
            tried += 1
            # A random name is refused at once; most cases should come further.
            if isinstance(case.body, dict) and "model" in case.body and len(str(case.body)) % 4:
                case.body["model"] = "dense_tied"
            case.call_and_validate(checks=CHECKS)

        answers()
    print(f"{tried} cases")


def test_the_server_has_survived(small: Running) -> None:
    assert small.http.get("/ready").status_code == 200
    assert small.served.gate.samples == 0


def test_the_description_names_every_endpoint(small: Running) -> None:
    described = small.http.get("/openapi.json").json()
    assert {
        "/v1/chat/completions", "/v1/completions", "/v1/models", "/v1/models/{model}",
        "/v1/responses", "/v1/embeddings", "/v1/cache", "/tokenize", "/detokenize", "/health",
        "/ready", "/metrics",
    } == described["paths"].keys()  # fmt: skip
    for path in described["paths"].values():
        for operation in path.values():
            assert "422" not in operation["responses"]
            assert operation["responses"]["400"]["content"]["application/json"]["schema"] == {
                "$ref": "#/components/schemas/ErrorBody"
            }


def test_people_can_read_the_description_without_a_network(small: Running) -> None:
    page = small.http.get("/docs")
    assert page.status_code == 200
    for name in ("/v1/chat/completions", "temperature", "number &gt;= 0, &lt;= 100", "ErrorBody"):
        assert name in page.text
    assert "<script" not in page.text
    assert "http://" not in page.text
