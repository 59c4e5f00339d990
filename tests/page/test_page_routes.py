"""What the page is served with: a strict policy, caching that fits, and blocks that explain."""

import asyncio
import json
from collections.abc import Iterator
from typing import Any

import pytest
from fastapi import FastAPI
from fastapi.testclient import TestClient

from kvist import AsyncLLM, SamplingParams
from kvist.loading.model import Model
from kvist.server.page import assets, page_routes

PARAMS = SamplingParams(temperature=0, max_tokens=4, ignore_eos=True)


@pytest.fixture
def llm(model: Model) -> Iterator[AsyncLLM]:
    made = AsyncLLM(model, block_size=4, cache_memory=1 << 18, max_model_len=64)
    yield made
    made.close()


def client_of(llm: AsyncLLM, **options: Any) -> TestClient:
    app = FastAPI()
    app.include_router(page_routes(llm, **options))
    return TestClient(app)


def ask(llm: AsyncLLM, prompt: Any) -> None:
    async def work() -> None:
        async for _ in llm.submit(prompt, PARAMS):
            pass

    asyncio.run(work())


def test_the_page_comes_with_a_policy_that_lets_nothing_else_in(llm: AsyncLLM) -> None:
    response = client_of(llm).get("/")
    assert response.status_code == 200
    assert response.headers["content-type"].startswith("text/html")
    whole = response.headers["content-security-policy"]
    policy = dict(part.split(" ", 1) for part in whole.split("; "))
    assert policy["default-src"] == "'none'"
    assert policy["script-src"] == policy["style-src"] == policy["connect-src"] == "'self'"
    assert "unsafe" not in whole
    assert response.headers["x-content-type-options"] == "nosniff"


def test_nothing_in_the_page_needs_what_the_policy_forbids() -> None:
    html = assets()["index.html"].content.decode()
    assert "<style" not in html
    assert " style=" not in html
    assert " onclick=" not in html
    assert html.count("<script") == html.count('src="./assets/') == 1
    everything = b"".join(asset.content for asset in assets().values()).decode()
    assert ".innerHTML" not in everything
    outside = {word for word in everything.split('"') if word.startswith(("http:", "https:", "//"))}
    assert outside <= {"http://www.w3.org/2000/svg"}


def test_assets_are_kept_for_ever_and_the_page_is_asked_for_again(llm: AsyncLLM) -> None:
    client = client_of(llm)
    [script] = [name for name in assets() if name.endswith(".js")]
    assert "immutable" in client.get(f"/{script}").headers["cache-control"]
    assert "javascript" in client.get(f"/{script}").headers["content-type"]
    page = client.get("/")
    assert page.headers["cache-control"] == "no-cache"
    again = client.get("/", headers={"If-None-Match": page.headers["etag"]})
    assert (again.status_code, again.content) == (304, b"")


@pytest.mark.parametrize(
    "path", ["/assets/nothing.js", "/assets/../page.py", "/assets/%2e%2e/page.py"]
)
def test_nothing_but_the_page_is_served(llm: AsyncLLM, path: str) -> None:
    assert client_of(llm).get(f"/assets/{path}").status_code == 404


def test_the_page_is_small() -> None:
    assert sum(len(asset.content) for asset in assets().values()) < 100_000


def test_a_block_explains_itself(llm: AsyncLLM) -> None:
    client = client_of(llm)
    ask(llm, "once upon a time there was a twig")
    snapshot = asyncio.run(llm.snapshot())
    block = snapshot.groups[0].cached.index(True)
    told = client.get(f"/v1/cache/blocks/0/{block}").json()
    assert (told["cached"], told["owners"], told["num_tokens"]) == (True, [], 4)
    text = "".join(token["text"] for token in told["tokens"])
    assert text.strip()[:4] in "once upon a time there was a twig"
    hidden = client_of(llm, show_text=False).get(f"/v1/cache/blocks/0/{block}").json()
    assert (hidden["tokens"], hidden["num_tokens"]) == ([], 4)


@pytest.mark.parametrize("path", ["0/100000", "0/-1", "7/0", f"0/{10**40}", "0/0?tier=host"])
def test_a_block_that_does_not_exist_is_a_404_with_a_reason(llm: AsyncLLM, path: str) -> None:
    response = client_of(llm).get(f"/v1/cache/blocks/{path}")
    assert response.status_code == 404
    assert "does not exist" in response.json()["error"]["message"]


def test_the_stream_is_one_of_events_that_nobody_buffers(llm: AsyncLLM) -> None:
    client = client_of(llm, ended=lambda: True)  # it would go on for ever else
    with client.stream("GET", "/v1/cache/events") as response:
        assert response.headers["content-type"].startswith("text/event-stream")
        assert response.headers["cache-control"] == "no-store"
        assert response.read() == b""


def test_the_page_is_no_part_of_the_api(llm: AsyncLLM) -> None:
    app = FastAPI()
    app.include_router(page_routes(llm))
    schema = json.loads(json.dumps(app.openapi()))
    assert list(schema["paths"]) == ["/v1/cache/blocks/{group}/{block}"]
