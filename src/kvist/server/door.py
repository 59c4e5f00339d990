"""The door that every request goes through, before any endpoint: identity, size, and the log.

Plain ASGI, so that a stream costs nothing extra for each of its chunks.
"""

import logging
import re
import time
from typing import Any
from uuid import uuid4

from starlette.datastructures import Headers, MutableHeaders
from starlette.exceptions import HTTPException
from starlette.types import ASGIApp, Message, Receive, Scope, Send

from kvist.server.errors import ApiError, answer
from kvist.server.gate import closing
from kvist.server.logs import FIELDS
from kvist.server.served import Served
from kvist.server.settings import LOOPBACK

log = logging.getLogger("kvist.server")

# What needs no key, where there are keys: whether it lives, what it is, and the page itself, which
# asks for a key before it shows anything. All else does.
_PUBLIC = ("/", "/health", "/ready", "/openapi.json", "/docs", "/favicon.svg")
_PUBLIC_FILES = "/assets/"
_QUIET = ("/health", "/ready", "/metrics")
_NAME = re.compile(r"[A-Za-z0-9_.-]{1,64}")


class Door:
    """Names each request, lets in who may come, bounds bodies, and writes the log."""

    def __init__(self, app: ASGIApp, served: Served) -> None:
        """Stand before `app`."""
        self._app = app
        self._served = served

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:
        """One connection's request."""
        if scope["type"] != "http":
            await self._app(scope, receive, send)
            return
        began = time.perf_counter()
        headers = Headers(scope=scope)
        asked = headers.get("x-request-id", "")
        name = asked if _NAME.fullmatch(asked) else uuid4().hex
        fields: dict[str, Any] = {"request_id": name, "method": scope["method"]}
        fields["path"] = scope["path"][:200]
        scope.setdefault("state", {}).update(
            request_id=uuid4().hex if asked else name, began=began, log=fields
        )
        status = 0

        async def named(message: Message) -> None:
            nonlocal status
            if message["type"] == "http.response.start":
                status = message["status"]
                MutableHeaders(scope=message)["x-request-id"] = name
            await send(message)

        try:
            refusal = self._refusal(scope, headers, fields)
            if refusal is not None:
                await answer(refusal)(scope, receive, named)
            else:
                await self._app(scope, self._bounded(receive), named)
        except Exception:
            status = 500  # what answers it stands before this door
            raise
        finally:
            self._note(scope, status, time.perf_counter() - began, fields)

    def _refusal(self, scope: Scope, headers: Headers, fields: dict[str, Any]) -> ApiError | None:
        served = self._served
        if not self._is_ours(headers.get("host", "")):
            return ApiError(
                403,
                "a server without keys answers to localhost only, so that no page from elsewhere "
                "can ask it under a name of its own; see --allowed-hosts",
            )
        path = scope["path"].removeprefix(scope.get("root_path", ""))
        if path not in _PUBLIC and not path.startswith(_PUBLIC_FILES):
            tenant = served.keys.tenant(_key(headers))
            if tenant is None:
                return ApiError(
                    401,
                    "give an API key: Authorization: Bearer KEY",
                    code="invalid_api_key",
                    headers={"WWW-Authenticate": "Bearer"},
                )
            scope["state"]["tenant"] = tenant
            if not served.keys.open:
                fields["tenant"] = tenant.name
        if scope["method"] == "POST" and served.gate.draining.is_set():
            return closing()
        length = headers.get("content-length", "0")
        if length.isdecimal() and int(length) > served.settings.max_body:
            return self._too_large()
        return None

    def _is_ours(self, host: str) -> bool:
        """Whether a request means this machine: a foreign name may be made to point here."""
        settings = self._served.settings
        if not (self._served.keys.open and settings.on_loopback):
            return True
        name = host.rpartition(":")[0] if not host.endswith("]") and ":" in host else host
        return name.strip("[]").lower() in (*LOOPBACK, settings.host, *settings.allowed_hosts)

    def _too_large(self) -> ApiError:
        limit = self._served.settings.max_body
        return ApiError(413, f"the body has more than {limit:,} bytes", code="body_too_large")

    def _bounded(self, receive: Receive) -> Receive:
        """`receive`, which also ends bodies that are longer than they said."""
        left = self._served.settings.max_body

        async def bounded() -> Message:
            nonlocal left
            message = await receive()
            left -= len(message.get("body", b""))
            if left < 0:
                raise HTTPException(413, str(self._too_large()))
            return message

        return bounded

    def _note(self, scope: Scope, status: int, took: float, fields: dict[str, Any]) -> None:
        route = scope.get("route")
        path = getattr(route, "path", "other")
        self._served.metrics.requests.labels(path, str(status or 499)).inc()
        level = logging.DEBUG if scope["path"] in _QUIET else logging.INFO
        # 499 as nginx has it: the client left before the answer began.
        fields |= {"status": status or 499, "took_s": round(took, 6)}
        log.log(level, "request", extra={FIELDS: fields})


def _key(headers: Headers) -> str | None:
    scheme, _, key = headers.get("authorization", "").partition(" ")
    return key.strip() if scheme.lower() == "bearer" else None
