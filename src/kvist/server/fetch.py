"""Pictures from the network: only from hosts that the operator has listed, and never from within.

A host's name is resolved once, every address it has must be public, and the connection goes to the
address that was checked, so that a name which changes its mind in between gains nothing. Redirects
are not followed. Standard library only; runs on a worker thread.
"""

import http.client
import ipaddress
import socket
import ssl
from collections.abc import Callable, Sequence
from urllib.parse import urlsplit

from kvist.errors import RequestError

TIMEOUT = 10.0

Resolve = Callable[[str, int], Sequence[str]]


def fetch(url: str, hosts: Sequence[str], max_bytes: int, resolve: Resolve | None = None) -> bytes:
    """A file's bytes.

    Args:
        url: http or https.
        hosts: names that may be asked, compared exactly.
        max_bytes: of the file.
        resolve: a name's addresses; the system's by default.

    Raises:
        RequestError: the host is not listed, not public, does not answer with the file, or the
            file is too large.
    """
    try:
        parts = urlsplit(url)
        host, port = parts.hostname or "", parts.port
    except ValueError as error:
        raise RequestError(f"{url[:120]} is not a URL: {error}") from error
    if host not in hosts:
        raise RequestError(
            f"pictures are not fetched from {host or url[:120]!r}; send a data URL"
            + (f", or use one of {', '.join(hosts)}" if hosts else "")
        )
    secure = parts.scheme.lower() == "https"
    port = port or (443 if secure else 80)
    addresses = (resolve or _resolve)(host, port)
    for address in addresses:
        if not _is_public(address):
            raise RequestError(f"{host} is not a public address, so nothing is fetched from it")
    path = (parts.path or "/") + (f"?{parts.query}" if parts.query else "")
    try:
        return _get(host, addresses[0], port, path, secure=secure, max_bytes=max_bytes)
    except (OSError, http.client.HTTPException) as error:
        raise RequestError(f"{host} did not give the picture: {error}") from error


def _is_public(address: str) -> bool:
    parsed = ipaddress.ip_address(address)
    if isinstance(parsed, ipaddress.IPv6Address) and parsed.ipv4_mapped is not None:
        parsed = parsed.ipv4_mapped
    return parsed.is_global and not parsed.is_multicast


def _resolve(host: str, port: int) -> list[str]:
    try:
        found = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)
    except (OSError, UnicodeError) as error:
        raise RequestError(f"{host} cannot be found: {error}") from error
    return [str(address[4][0]).split("%")[0] for address in found]


def _get(host: str, address: str, port: int, path: str, *, secure: bool, max_bytes: int) -> bytes:
    connection = http.client.HTTPConnection(host, port, timeout=TIMEOUT)
    opened = socket.create_connection((address, port), TIMEOUT)
    try:
        if secure:
            opened = ssl.create_default_context().wrap_socket(opened, server_hostname=host)
        connection.sock = opened
        connection.request("GET", path, headers={"User-Agent": "kvist", "Accept": "image/*"})
        response = connection.getresponse()
        if response.status != 200:
            raise RequestError(f"{host} answered {response.status} instead of the picture")
        data = response.read(max_bytes + 1)
    finally:
        connection.close()
        opened.close()
    if len(data) > max_bytes:
        raise RequestError(f"{host} sent more than {max_bytes:,} bytes")
    return data
