"""Fixtures of the paged tests."""

import pytest
from paged_models import tiny_model

from kvist.models.decoder import Decoder


@pytest.fixture(scope="session", params=["llama", "qwen3"])
def model(request: pytest.FixtureRequest) -> Decoder:
    """Each tiny model; qwen3 mixes full and sliding layers."""
    return tiny_model(request.param)


@pytest.fixture(scope="session")
def mixed() -> Decoder:
    """Full, sliding, sliding, full."""
    return tiny_model("qwen3")


@pytest.fixture(scope="session")
def llama() -> Decoder:
    """Full attention only."""
    return tiny_model("llama")
