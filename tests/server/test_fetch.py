"""Pictures are fetched from listed, public hosts only, and from the address that was checked."""

import http.server
import threading
from collections.abc import Iterator

import pytest

from kvist.errors import RequestError
from kvist.server import fetch as module
from kvist.server.fetch import fetch

FILE = b"not really a picture"


class Handler(http.server.BaseHTTPRequestHandler):
    def do_GET(self) -> None:
        if self.path == "/moved":
            self.send_response(302)
            self.send_header("Location", "http://127.0.0.1/secret")
            self.end_headers()
            return
        assert self.headers["Host"].startswith("pictures.example")
        self.send_response(200)
        self.end_headers()
        self.wfile.write(FILE)

    def log_message(self, format: str, *args: object) -> None:
        pass


@pytest.fixture
def port(monkeypatch: pytest.MonkeyPatch) -> Iterator[int]:
    """A listed host that counts as public for once."""
    server = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=server.serve_forever, daemon=True).start()
    monkeypatch.setattr(module.ipaddress.IPv4Address, "is_global", True)
    yield server.server_address[1]
    server.shutdown()
    server.server_close()


def resolve(*addresses: str) -> module.Resolve:
    return lambda host, port: addresses


def test_a_listed_public_host_gives_its_file(port: int) -> None:
    url = f"http://pictures.example:{port}/x.png?a=b"
    assert fetch(url, ["pictures.example"], 100, resolve("127.0.0.1")) == FILE


def test_a_large_file_and_a_redirect_are_refused(port: int) -> None:
    hosts = ["pictures.example"]
    with pytest.raises(RequestError, match="more than 5 bytes"):
        fetch(f"http://pictures.example:{port}/x", hosts, 5, resolve("127.0.0.1"))
    with pytest.raises(RequestError, match="answered 302"):
        fetch(f"http://pictures.example:{port}/moved", hosts, 99, resolve("127.0.0.1"))


@pytest.mark.parametrize(
    "address",
    [
        "127.0.0.1", "10.0.0.8", "192.168.1.1", "172.16.0.1", "169.254.169.254", "0.0.0.0",
        "100.64.0.1", "::1", "fe80::1", "fd00::1", "::ffff:127.0.0.1",
    ],
)  # fmt: skip
def test_a_listed_host_with_a_private_address_is_not_asked(address: str) -> None:
    with pytest.raises(RequestError, match="not a public address"):
        fetch("https://pictures.example/x", ["pictures.example"], 99, resolve("8.8.8.8", address))


@pytest.mark.parametrize(
    "url",
    [
        "http://other.example/x",
        "http://pictures.example.evil.example/x",
        "http://pictures.example@127.0.0.1/x",
        "http://127.0.0.1#pictures.example",
        "http://[::1]/x",
        "http://2130706433/",
        "https:///x",
        "http://pictures.example:99999/x",
        "http://[bad/x",
    ],
)
def test_what_is_not_listed_is_not_even_looked_up(url: str) -> None:
    def never(host: str, port: int) -> list[str]:
        raise AssertionError(host)

    with pytest.raises(RequestError):
        fetch(url, ["pictures.example"], 99, never)
