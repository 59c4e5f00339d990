"""The page at `/`: a chat beside a live picture of the cache, served from files in the package.

It serves the built page, the stream of what changes in the cache, and what one block holds. The
sources of the page are in `web/`; chatting itself goes through the API like any client's.
"""

import hashlib
import mimetypes
from collections.abc import Callable
from functools import cache
from pathlib import Path
from typing import Any, Literal, NamedTuple

from fastapi import APIRouter, Request
from fastapi.responses import JSONResponse, Response, StreamingResponse

from kvist.async_engine import AsyncLLM
from kvist.errors import CacheError
from kvist.server.live import LiveCache

STATIC = Path(__file__).parent / "static"

# Everything comes from this server and nothing else is reached; pictures may be data URLs.
POLICY = "; ".join(
    [
        "default-src 'none'",
        "script-src 'self'",
        "style-src 'self'",
        "img-src 'self' data: blob:",
        "connect-src 'self'",
        "base-uri 'none'",
        "form-action 'none'",
        "frame-ancestors 'none'",
    ]
)
HEADERS = {
    "Content-Security-Policy": POLICY,
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
}
FOR_EVER = "public, max-age=31536000, immutable"  # names under assets/ carry a hash of the content


class Asset(NamedTuple):
    """One file of the page, ready to be sent."""

    content: bytes
    media_type: str
    headers: dict[str, str]


@cache
def assets() -> dict[str, Asset]:
    """The page's files by their path; read once."""
    found = {}
    for path in STATIC.rglob("*"):
        if not path.is_file() or path.suffix == ".json":
            continue
        name = path.relative_to(STATIC).as_posix()
        content = path.read_bytes()
        kind = mimetypes.guess_type(name)[0] or "application/octet-stream"
        caching = FOR_EVER if name.startswith("assets/") else "no-cache"
        tag = f'"{hashlib.sha256(content).hexdigest()[:20]}"'
        found[name] = Asset(content, kind, {**HEADERS, "Cache-Control": caching, "ETag": tag})
    return found


def page_routes(
    engine: AsyncLLM,
    *,
    show_text: bool = True,
    ended: Callable[[], bool] = lambda: False,
) -> APIRouter:
    """Routes of the page, of `/v1/cache/events` and of `/v1/cache/blocks`.

    Args:
        engine: what the page shows.
        show_text: whether blocks tell what their tokens say; not where users must not read each
            other's prompts.
        ended: whether the server wants to go; streams of events then end within a tick.
    """
    router = APIRouter()
    live = LiveCache(engine, show_text=show_text, ended=ended)

    def serve(name: str, request: Request) -> Response:
        asset = assets().get(name)
        if asset is None:
            return Response("not found\n", 404, HEADERS, "text/plain")
        content, media_type, headers = asset
        if request.headers.get("if-none-match") == headers["ETag"]:
            return Response(status_code=304, headers=headers)
        return Response(content, headers=headers, media_type=media_type)

    @router.get("/", include_in_schema=False)
    def page(request: Request) -> Response:
        return serve("index.html", request)

    @router.get("/favicon.svg", include_in_schema=False)
    def favicon(request: Request) -> Response:
        return serve("favicon.svg", request)

    @router.get("/assets/{name}", include_in_schema=False)
    def asset(name: str, request: Request) -> Response:
        return serve(f"assets/{name}", request)

    @router.get("/v1/cache/events", include_in_schema=False)  # it never ends by itself
    async def events() -> StreamingResponse:
        headers = {"Cache-Control": "no-store", "X-Accel-Buffering": "no"}
        return StreamingResponse(live.frames(), media_type="text/event-stream", headers=headers)

    @router.get("/v1/cache/blocks/{group}/{block}", tags=["cache"])
    async def block(group: int, block: int, tier: Literal["pool", "host"] = "pool") -> JSONResponse:
        """What one block holds: its tokens, where they stand, and which requests own it."""
        try:
            detail = await engine.block(group, block, host=tier == "host")
        except CacheError as error:
            problem = {"message": str(error), "type": "invalid_request_error"}
            return JSONResponse({"error": problem | {"param": "block", "code": None}}, 404)
        tokens: list[Any] = []
        tokenizer = engine.model.tokenizer
        if show_text and tokenizer is not None:
            tokens = [
                {"id": one, "text": tokenizer.decode([one], skip_special_tokens=False)}
                for one in detail.tokens
            ]
        return JSONResponse(
            {
                "group": group,
                "block": block,
                "tier": tier,
                "start": detail.start,
                "num_tokens": len(detail.tokens),
                "tokens": tokens,
                "owners": [{"request": r, "sample": s} for r, s in detail.owners],
                "cached": detail.cached,
                "saved": detail.saved,
            }
        )

    return router
