"""A server for tests: the real application under the real uvicorn, on a loopback port."""

import contextlib
import socket
import threading
from collections.abc import Iterator
from typing import Any

import httpx
import openai
import uvicorn

from kvist import AsyncLLM
from kvist.loading.model import Model
from kvist.server.app import create_app
from kvist.server.served import Served
from kvist.server.settings import Settings

LIMIT = 30  # seconds after which whatever hangs has failed
SIZES: dict[str, Any] = {"block_size": 4, "max_batch_tokens": 256, "max_num_seqs": 8}
MEMORY = 24 << 20


class Running:
    """A server that runs, and its clients."""

    def __init__(self, engine: AsyncLLM, served: Served, url: str) -> None:
        self.engine = engine
        self.served = served
        self.url = url
        self.http = httpx.Client(base_url=url, timeout=LIMIT)

    def client(self, key: str = "none") -> openai.OpenAI:
        """OpenAI's own client."""
        return openai.OpenAI(base_url=f"{self.url}/v1", api_key=key, max_retries=0, timeout=LIMIT)

    def error(self, path: str, body: Any, **options: Any) -> tuple[int, dict[str, Any]]:
        """The status and the error that a body is refused with."""
        answer = self.http.post(path, json=body, **options)
        return answer.status_code, answer.json()["error"]


@contextlib.contextmanager
def running(model: Model, engine: AsyncLLM | None = None, **settings: Any) -> Iterator[Running]:
    """Serve a model while the block runs."""
    own = engine or AsyncLLM(model, cache_memory=MEMORY, **SIZES)
    chosen = Settings(**({"max_num_seqs": SIZES["max_num_seqs"]} | settings))
    app = create_app(own, chosen)
    listening = socket.create_server(("127.0.0.1", 0))
    port = listening.getsockname()[1]
    config = uvicorn.Config(app, log_config=None, access_log=False, timeout_graceful_shutdown=5)
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, args=([listening],), daemon=True)
    thread.start()
    try:
        while not server.started:
            assert thread.is_alive(), "the server did not start"
            thread.join(0.005)
        yield Running(own, app.state.served, f"http://127.0.0.1:{port}")
    finally:
        server.should_exit = True
        thread.join(LIMIT)
        if engine is None:
            own.close()
