"""One server on a tiny model for all tests that only talk to it."""

from collections.abc import Iterator

import openai
import pytest
from running import Running, running

import kvist


@pytest.fixture(scope="session")
def server(model: kvist.Model) -> Iterator[Running]:
    """The smallest model behind the real thing."""
    with running(model, embeddings=True, ui=False) as started:
        yield started


@pytest.fixture(scope="session")
def client(server: Running) -> openai.OpenAI:
    """OpenAI's own client of it."""
    return server.client()
