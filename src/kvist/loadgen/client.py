"""As much of an HTTP/1.1 client as a load generator needs, on asyncio's streams.

One request streams at a time over a connection, idle connections are used again, and the time of
every event is taken as soon as its bytes are there. It is not a general client: no redirects, no
cookies, no compression.
"""

import asyncio
import json
import ssl
from collections.abc import AsyncGenerator
from contextlib import aclosing
from dataclasses import dataclass
from typing import Any
from urllib.parse import urlsplit

from kvist.errors import ConfigError

Parts = AsyncGenerator[bytes, None]
Connection = tuple[asyncio.StreamReader, asyncio.StreamWriter]
LINE = 1 << 20  # bytes of the longest line


class HttpError(Exception):
    """The server answered with another status than 200, or broke off."""

    def __init__(self, status: int, message: str) -> None:
        """`status` is 0 where there was no answer at all."""
        super().__init__(message)
        self.status = status


@dataclass(frozen=True)
class Endpoint:
    """Where a server is."""

    host: str
    port: int
    path: str
    secure: bool

    @classmethod
    def parse(cls, url: str) -> "Endpoint":
        """From a URL, with or without `/v1` at its end; raises ConfigError if it is none."""
        try:
            parts = urlsplit(url)
            port = parts.port
        except ValueError:
            parts, port = urlsplit(""), None
        if parts.scheme not in ("http", "https") or not parts.hostname:
            raise ConfigError(f"{url!r} is no URL of a server; write http://127.0.0.1:8000")
        secure = parts.scheme == "https"
        path = parts.path.rstrip("/").removesuffix("/v1")
        return cls(parts.hostname, port or (443 if secure else 80), path, secure)


class Client:
    """A server, and the idle connections to it."""

    def __init__(self, url: str, api_key: str | None = None) -> None:
        """Nothing is connected yet; raises ConfigError if the URL is none."""
        self.endpoint = Endpoint.parse(url)
        self._ssl = ssl.create_default_context() if self.endpoint.secure else None
        self._idle: list[Connection] = []
        self._auth = f"Authorization: Bearer {api_key}\r\n" if api_key else ""

    async def get(self, path: str) -> Any:
        """The JSON at a path; raises HttpError."""
        body = b"".join([part async for part in self._request("GET", path, b"")])
        try:
            return json.loads(body)
        except ValueError as error:
            raise HttpError(200, f"{path} is no JSON") from error

    async def events(self, path: str, body: dict[str, Any]) -> AsyncGenerator[str, None]:
        """The data of each server-sent event that answers a POST; raises HttpError."""
        rest = b""
        async with aclosing(self._request("POST", path, json.dumps(body).encode())) as parts:
            async for part in parts:
                *lines, rest = (rest + part).split(b"\n")
                for line in lines:
                    if line.startswith(b"data:"):
                        yield line[5:].strip().decode()

    def close(self) -> None:
        """Close the idle connections."""
        for _, writer in self._idle:
            writer.close()
        self._idle.clear()

    async def _request(self, method: str, path: str, body: bytes) -> Parts:
        """Send, and yield the body's parts as they come; a kept connection may have been closed."""
        while True:
            kept = bool(self._idle)
            connection = self._idle.pop() if kept else await self._connect()
            try:
                status, headers = await self._ask(connection, method, path, body)
                break
            except HttpError:
                raise
            except (OSError, asyncio.IncompleteReadError) as error:
                connection[1].close()
                if not kept:
                    raise HttpError(0, f"the connection broke: {error}") from error
        reader, writer = connection
        whole = False
        try:
            if status != 200:
                text = b"".join([part async for part in _body(reader, headers)])
                whole = True
                raise HttpError(status, _message(text, status))
            async for part in _body(reader, headers):
                yield part
            whole = True
        except (OSError, asyncio.IncompleteReadError, ValueError) as error:
            raise HttpError(0, f"the answer broke off: {error}") from error
        finally:
            if whole and headers.get("connection", "").lower() != "close":
                self._idle.append(connection)
            else:
                writer.close()

    async def _connect(self) -> Connection:
        where = self.endpoint
        try:
            return await asyncio.open_connection(where.host, where.port, ssl=self._ssl, limit=LINE)
        except OSError as error:
            raise HttpError(0, f"cannot connect to {where.host}:{where.port}: {error}") from error

    async def _ask(
        self, connection: Connection, method: str, path: str, body: bytes
    ) -> tuple[int, dict[str, str]]:
        reader, writer = connection
        where = self.endpoint
        head = (
            f"{method} {where.path}{path} HTTP/1.1\r\nHost: {where.host}:{where.port}\r\n"
            f"Accept: */*\r\n{self._auth}Content-Type: application/json\r\n"
            f"Content-Length: {len(body)}\r\n\r\n"
        )
        writer.write(head.encode() + body)
        await writer.drain()
        lines = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").split("\r\n")
        try:
            status = int(lines[0].split()[1])
        except (IndexError, ValueError):
            raise HttpError(0, f"no HTTP answer: {lines[0][:80]!r}") from None
        pairs = (line.partition(":") for line in lines[1:] if line)
        return status, {name.strip().lower(): value.strip() for name, _, value in pairs}


async def _body(reader: asyncio.StreamReader, headers: dict[str, str]) -> Parts:
    """The body's bytes as they come, whichever way its length is told."""
    if headers.get("transfer-encoding", "").lower() == "chunked":
        while size := int((await reader.readuntil(b"\r\n")).split(b";")[0], 16):
            yield (await reader.readexactly(size + 2))[:-2]
        while await reader.readuntil(b"\r\n") != b"\r\n":
            pass  # trailers
    elif "content-length" in headers:
        yield await reader.readexactly(int(headers["content-length"]))
    else:
        headers["connection"] = "close"
        while part := await reader.read(LINE):
            yield part


def _message(body: bytes, status: int) -> str:
    """What the server says is wrong, in OpenAI's shape or as it is."""
    try:
        told = json.loads(body)
        message = told["error"]["message"]
    except (ValueError, KeyError, TypeError):
        message = body[:200].decode(errors="replace").strip()
    return f"{status}: {message}" if message else str(status)
