"""Sizes as people write them: `24GiB`, `512MB`, `32k`. Parsed for options, written for people."""

import re

from kvist.errors import RequestError

_DECIMAL = {"": 1, "kb": 10**3, "mb": 10**6, "gb": 10**9, "tb": 10**12}
_BINARY = {"kib": 2**10, "mib": 2**20, "gib": 2**30, "tib": 2**40}
_TOKENS = {"": 1, "k": 2**10, "m": 2**20}
_NUMBER = re.compile(r"(\d+(?:[_,]\d{3})*(?:\.\d+)?)\s*([a-z]*)", re.IGNORECASE)


def parse_bytes(text: str) -> int:
    """Bytes of a size such as `24GiB` (2**30 each), `512MB` (10**6 each), `16g` or `1000000`.

    Raises:
        RequestError: it is none, or nothing.
    """
    units = _DECIMAL | _BINARY | {unit[0]: factor for unit, factor in _BINARY.items()}
    return _parse(text, units, "a size in bytes, such as 24GiB or 512MB")


def parse_tokens(text: str) -> int:
    """Tokens of a count such as `4096` or `32k`, which is 32 x 1024 as in models' names.

    Raises:
        RequestError: it is none, or nothing.
    """
    return _parse(text, _TOKENS, "a number of tokens, such as 4096 or 32k")


def _parse(text: str, units: dict[str, int], what: str) -> int:
    match = _NUMBER.fullmatch(text.strip())
    factor = units.get(match[2].lower()) if match else None
    if match is None or factor is None:
        raise RequestError(f"{text!r} is not {what}")
    value = float(match[1].replace("_", "").replace(",", "")) * factor
    if value < 1:
        raise RequestError(f"{text!r} is nothing; give {what}")
    return int(value)


def bytes_text(nbytes: float) -> str:
    """`1.25 GiB`, `64 KiB`, `12 B`: three significant digits, in binary units."""
    units = ["B", "KiB", "MiB", "GiB", "TiB"]
    size, power = float(nbytes), 0
    while abs(size) >= 1000 and power < len(units) - 1:
        size, power = size / 1024, power + 1
    digits = 0 if power == 0 or abs(size) >= 100 else 1 if abs(size) >= 10 else 2
    return f"{size:,.{digits}f} {units[power]}"
