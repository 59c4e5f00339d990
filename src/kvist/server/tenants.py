"""Who may ask, and who shares the cache with whom: API keys, tenants, salts.

A tenant is an API key. Its cached prefixes are its own: its salt is part of every prefix's
identity, so that nobody can tell from a fast answer what another has asked. Keys are compared in
constant time and never logged; a name is.
"""

import hashlib
import hmac
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from pathlib import Path

from kvist.errors import ConfigError
from kvist.server.settings import Settings

MIN_LENGTH = 8


@dataclass(frozen=True)
class Tenant:
    """Who asks.

    Args:
        name: for logs and metrics.
        salt: cached prefixes are shared only with requests of the same one.
        digest: of the key.
    """

    name: str
    salt: str = ""
    digest: bytes = field(default=b"", repr=False)

    def cache_salt(self, asked: str | None) -> str:
        """The salt of a request that asked for this one, within the tenant."""
        return f"{self.salt}/{asked}" if asked else self.salt


ANYONE = Tenant("anyone")


class KeyRing:
    """The keys that are let in.

    Args:
        tenants: one for each key; none lets everybody in.
    """

    def __init__(self, tenants: Iterable[Tenant] = ()) -> None:
        self._tenants = tuple(tenants)

    @classmethod
    def from_settings(cls, settings: Settings) -> "KeyRing":
        """Read the keys.

        Raises:
            ConfigError: the file cannot be read, a key is too short to be one, or there are none
                and others than this machine could reach the server.
        """
        keys = [(f"key-{i}", key) for i, key in enumerate(settings.api_keys, start=1)]
        if settings.api_keys_file is not None:
            keys += _read_keys(settings.api_keys_file)
        if not keys and settings.auth and not settings.on_loopback:
            raise ConfigError(
                f"others could reach {settings.host}, and there are no API keys: give "
                "--api-keys-file or KVIST_API_KEYS, or waive them with --no-auth"
            )
        for name, key in keys:
            if len(key) < MIN_LENGTH:
                raise ConfigError(f"the API key {name} has fewer than {MIN_LENGTH} characters")
        return cls(_tenant(name, key, settings.share_prefixes) for name, key in keys)

    @property
    def open(self) -> bool:
        """Whether everybody is let in."""
        return not self._tenants

    def tenant(self, key: str | None) -> Tenant | None:
        """Whose key this is; None if nobody's."""
        if self.open:
            return ANYONE
        digest = _digest(key or "")
        found = None
        for tenant in self._tenants:  # all of them, however soon one fits
            if hmac.compare_digest(tenant.digest, digest):
                found = tenant
        return found


def _tenant(name: str, key: str, shared: bool) -> Tenant:
    # Of another use of the hash than `_digest`, so that neither tells of the other.
    salt = hashlib.sha256(b"kvist prefix salt\0" + key.encode()).hexdigest()[:32]
    return Tenant(name, "" if shared else salt, _digest(key))


def _digest(key: str) -> bytes:
    return hashlib.sha256(key.encode(errors="surrogateescape")).digest()


def _read_keys(file: Path) -> Sequence[tuple[str, str]]:
    """`key` or `name key`, one a line; empty lines and those that begin with # are left out."""
    try:
        lines = file.read_text(encoding="utf-8").splitlines()
    except (OSError, ValueError) as error:
        raise ConfigError(f"{file}: the API keys cannot be read: {error}") from error
    keys = []
    for number, line in enumerate(lines, start=1):
        words = line.split()
        if not words or words[0].startswith("#"):
            continue
        if len(words) > 2:
            raise ConfigError(f"{file}, line {number}: give a key, or a name and a key")
        keys.append((words[0] if len(words) == 2 else f"line-{number}", words[-1]))
    if not keys:
        raise ConfigError(f"{file} has no keys")
    return keys
