"""The load generator on the real server: what it counts is what the server says."""

import json
import threading
import time
from collections.abc import Iterator

import pytest
import uvicorn
from typer.testing import CliRunner

from kvist import AsyncLLM
from kvist.cli.app import app
from kvist.loading.model import Model
from kvist.server.app import create_app
from kvist.server.settings import Settings


@pytest.fixture(scope="module")
def url(model: Model) -> Iterator[str]:
    sizes = {"block_size": 4, "max_model_len": 500, "cache_memory": 1 << 22, "max_num_seqs": 8}
    llm = AsyncLLM(model, **sizes)  # type: ignore[arg-type]
    config = uvicorn.Config(create_app(llm, Settings(ui=False)), port=0, log_level="error")
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run)
    thread.start()
    while not server.started:
        assert thread.is_alive()
        time.sleep(0.01)
    [port] = {sock.getsockname()[1] for one in server.servers for sock in one.sockets}
    yield f"http://127.0.0.1:{port}"
    server.should_exit = True
    thread.join()
    llm.close()


@pytest.mark.parametrize("api", ["chat", "completions"])
def test_conversations_with_a_shared_prefix_hit_the_cache(url: str, api: str) -> None:
    done = CliRunner().invoke(
        app,
        ["bench", "serve", "--url", url, "--api", api, "--rate", "40", "--requests", "4",
         "--turns", "2", "--think-time", "0.1", "--input-tokens", "8", "--output-tokens", "6",
         "--prefix-tokens", "12", "--ignore-eos", "--json"],
    )  # fmt: skip
    assert done.exit_code == 0, done.output
    told = json.loads(done.stdout)
    assert (told["requests"], told["answered"], told["failures"]) == (8, 8, {})
    assert told["output_tokens"] == 8 * 6
    assert 0.2 < told["cached_tokens"] / told["input_tokens"] < 1
    assert told["ttft"]["p50"] > 0
