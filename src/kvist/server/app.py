"""The application: endpoints, guards and errors around one engine.

    >>> app = create_app(AsyncLLM("smollm2-135m"), Settings())

It is an ASGI application like any other; `run.serve` is how `kvist serve` runs it.
"""

from collections.abc import AsyncIterator
from contextlib import asynccontextmanager
from typing import Any

from fastapi import FastAPI
from fastapi.responses import HTMLResponse
from starlette.middleware.cors import CORSMiddleware

import kvist
from kvist.async_engine import AsyncLLM
from kvist.server import chat, completions, embeddings, errors, page, responses, small
from kvist.server.door import Door
from kvist.server.reference import reference_page
from kvist.server.served import Served
from kvist.server.settings import Settings

DESCRIPTION = """OpenAI's API on kvist, whose cache is at its centre: every answer's usage tells how
much of its prompt was cached, and `/v1/cache` shows what the cache holds."""

_REFUSALS: dict[int | str, dict[str, Any]] = {
    400: {"model": errors.ErrorBody, "description": "Something is wrong with the request."},
    401: {"model": errors.ErrorBody, "description": "No key, or one that is not known."},
    403: {"model": errors.ErrorBody, "description": "Asked by a name that is not its own."},
    404: {"model": errors.ErrorBody, "description": "No such model."},
    413: {"model": errors.ErrorBody, "description": "The body is too large."},
    429: {"model": errors.ErrorBody, "description": "Too much at a time; see Retry-After."},
    500: {"model": errors.ErrorBody, "description": "The server has failed."},
    503: {"model": errors.ErrorBody, "description": "About to stop, or the engine has ended."},
    504: {"model": errors.ErrorBody, "description": "It took too long."},
}


def create_app(engine: AsyncLLM, settings: Settings | None = None) -> FastAPI:
    """Make the application.

    The engine is the caller's: closing the application leaves it open.

    Raises:
        ConfigError: settings that cannot be served, such as no keys on a public address.
    """
    settings = settings or Settings()
    served = Served.around(engine, settings)

    @asynccontextmanager
    async def lifespan(app: FastAPI) -> AsyncIterator[None]:
        yield
        served.workers.shutdown(wait=False, cancel_futures=True)

    app = FastAPI(
        title="kvist",
        summary="LLM inference with the KV cache at its centre.",
        description=DESCRIPTION,
        version=kvist.__version__,
        lifespan=lifespan,
        docs_url=None,
        redoc_url=None,
    )
    app.state.served = served
    engine.on_step(served.metrics.step)
    errors.install(app)
    routers = [chat.router, completions.router, responses.router, small.router]
    if settings.embeddings:
        routers.append(embeddings.router)
    for router in routers:
        app.include_router(router, responses=_REFUSALS)
    if settings.ui:
        # Tenants must not read each other's prompts on it.
        together = served.keys.open or settings.share_prefixes
        ended = served.gate.draining.is_set
        app.include_router(page.page_routes(engine, show_text=together, ended=ended))
    app.add_middleware(Door, served=served)
    if settings.cors_origins:
        app.add_middleware(
            CORSMiddleware,
            allow_origins=list(settings.cors_origins),
            allow_methods=["GET", "POST"],
            allow_headers=["Authorization", "Content-Type", "X-Request-Id"],
            expose_headers=["X-Request-Id", "Retry-After"],
        )
    _tell_the_truth(app)

    @app.get("/docs", include_in_schema=False)
    def reference() -> HTMLResponse:
        return HTMLResponse(reference_page(app.openapi()), headers=page.HEADERS | STYLED)

    return app


# The page has its style in itself; everything else stays forbidden.
STYLED = {"Content-Security-Policy": "default-src 'none'; style-src 'unsafe-inline'"}


def _tell_the_truth(app: FastAPI) -> None:
    """Describe what really happens: a wrong body is a 400, and keys are Bearer's."""
    describe = app.openapi

    def openapi() -> dict[str, Any]:
        if app.openapi_schema is None:
            described = describe()
            schemas = described["components"]["schemas"]
            for name in ("HTTPValidationError", "ValidationError"):
                schemas.pop(name, None)
            described["components"]["securitySchemes"] = {
                "key": {"type": "http", "scheme": "bearer"}
            }
            described["security"] = [{}, {"key": []}]
            for path in described["paths"].values():
                for operation in path.values():
                    operation["responses"].pop("422", None)
            app.openapi_schema = described
        return app.openapi_schema

    app.openapi = openapi  # type: ignore[method-assign]
