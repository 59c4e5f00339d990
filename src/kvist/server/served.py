"""What the endpoints share: the engine, the model, and the parts that guard and count."""

import asyncio
import time
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, TypeVar

from fastapi import Request

from kvist.async_engine import AsyncLLM
from kvist.loading.images import ImageLimits
from kvist.loading.model import Model
from kvist.server.errors import ApiError
from kvist.server.gate import Gate
from kvist.server.metrics import Metrics
from kvist.server.settings import Settings
from kvist.server.tenants import ANYONE, KeyRing, Tenant

T = TypeVar("T")


@dataclass(frozen=True)
class Served:
    """One server.

    Args:
        engine: streams tokens.
        model: as requests may use it: pictures come in requests, never from this machine's files.
        names: what clients may call it; the first is its own.
        workers: threads for what would hold up the event loop: templates, tokenizing, pictures.
    """

    engine: AsyncLLM
    model: Model
    settings: Settings
    names: tuple[str, ...]
    keys: KeyRing
    gate: Gate
    metrics: Metrics
    workers: ThreadPoolExecutor
    created: int = field(default_factory=lambda: int(time.time()))

    @classmethod
    def around(cls, engine: AsyncLLM, settings: Settings) -> "Served":
        """Put the parts together around an engine."""
        model = engine.model
        if model.processor is not None:
            limits = ImageLimits(settings.max_image_bytes, settings.max_image_pixels, False)
            model = replace(model, processor=replace(model.processor, limits=limits))
        return cls(
            engine=engine,
            model=model,
            settings=settings,
            names=settings.served_model_name or _names(model.name),
            keys=KeyRing.from_settings(settings),
            gate=Gate(settings),
            metrics=Metrics(),
            workers=ThreadPoolExecutor(4, thread_name_prefix="kvist-prompts"),
        )

    async def aside(self, work: Callable[[], T]) -> T:
        """Do something on a worker thread."""
        return await asyncio.get_running_loop().run_in_executor(self.workers, work)

    def check_model(self, name: str | None) -> str:
        """The name to answer under.

        Raises:
            ApiError: 404 for a model that is not served here.
        """
        if name is None:
            return self.names[0]
        if name not in self.names:
            raise ApiError(
                404,
                f"the model {name[:80]!r} is not served here; there is {', '.join(self.names)}",
                param="model",
                code="model_not_found",
            )
        return name


def _names(name: str) -> tuple[str, ...]:
    """A file or directory goes by its last part, a hub id by that and as a whole."""
    path = Path(name)
    return (path.name,) if path.exists() or name == path.name else (name, path.name)


def served_by(request: Request) -> Served:
    """The server that a request has come to."""
    served = request.app.state.served
    assert isinstance(served, Served)
    return served


def tenant_of(request: Request) -> Tenant:
    """Who asks."""
    tenant = getattr(request.state, "tenant", ANYONE)
    assert isinstance(tenant, Tenant)
    return tenant


def request_id_of(request: Request, prefix: str) -> str:
    """The id of an answer, made from the request's."""
    return f"{prefix}-{getattr(request.state, 'request_id', 'unknown')}"


def log_fields(request: Request) -> dict[str, Any]:
    """What the request's line in the log says; to be added to."""
    fields = getattr(request.state, "log", None)
    return fields if isinstance(fields, dict) else {}
