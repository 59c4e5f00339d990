"""Traces of real traffic: when requests came, how long they were, and what they shared.

Two formats in the open: Mooncake's JSON lines (`timestamp` in ms, `input_length`, `output_length`,
`hash_ids` of blocks of 512 tokens) and Azure's CSV (TIMESTAMP, ContextTokens, GeneratedTokens).
Neither has a text, so texts are made up; blocks of equal hash ids say the same.
"""

import csv
import json
from collections.abc import Iterator
from dataclasses import dataclass
from datetime import datetime
from itertools import islice
from pathlib import Path
from typing import Any

from kvist.errors import ConfigError
from kvist.loadgen.workload import Call, block_words, words

BLOCK = 512  # tokens of one hash id in Mooncake's traces
_AZURE = ("TIMESTAMP", "ContextTokens", "GeneratedTokens")


@dataclass(frozen=True, slots=True)
class Row:
    """One request of a trace; `hash_ids` is empty where nothing is known of what it shares."""

    at: float
    input_tokens: int
    output_tokens: int
    hash_ids: tuple[int, ...] = ()


def read_trace(path: Path, limit: int | None = None) -> list[Row]:
    """The first `limit` requests of a trace; times in seconds after the first.

    Raises:
        ConfigError: it cannot be read, or is in neither format; names the line.
    """
    try:
        with path.open(encoding="utf-8", newline="") as lines:
            first = lines.readline()
            lines.seek(0)
            read = _mooncake if first.lstrip().startswith("{") else _azure
            rows = list(islice(read(lines, path), limit))
    except (OSError, UnicodeDecodeError) as error:
        raise ConfigError(f"{path}: cannot be read as a trace: {error}") from error
    if not rows:
        raise ConfigError(f"{path}: has no request in it")
    begin = min(row.at for row in rows)
    return [Row(r.at - begin, r.input_tokens, r.output_tokens, r.hash_ids) for r in rows]


def replay(rows: list[Row], *, speed: float = 1.0, scale: float = 1.0, seed: int = 0) -> list[Call]:
    """The trace's requests.

    Args:
        rows: from `read_trace`.
        speed: how many times as fast as they came.
        scale: shortens prompts and answers, and the blocks that they share, alike.
        seed: of the words of what nobody shares.
    """
    if not (speed > 0 and scale > 0):
        raise ConfigError(f"speed {speed} and scale {scale} of a trace must be above 0")
    block = max(1, round(BLOCK * scale))
    calls = []
    for i, row in enumerate(rows):
        length = max(1, round(row.input_tokens * scale))
        shared = " ".join(block_words(one, block) for one in row.hash_ids).split()[:length]
        rest = words(length - len(shared), f"{seed} row {i}")
        text = " ".join([*shared, rest]) if rest else " ".join(shared)
        answer = max(1, round(row.output_tokens * scale))
        calls.append(Call(row.at / speed, text, answer, conversation=i))
    return sorted(calls, key=lambda call: call.at)


def _mooncake(lines: Any, path: Path) -> Iterator[Row]:
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            row = json.loads(line)
            yield Row(
                row["timestamp"] / 1000,
                int(row["input_length"]),
                int(row["output_length"]),
                tuple(map(int, row.get("hash_ids", ()))),
            )
        except (ValueError, KeyError, TypeError) as error:
            raise _wrong(path, number, error) from error


def _azure(lines: Any, path: Path) -> Iterator[Row]:
    table = csv.DictReader(lines)
    if not set(_AZURE) <= set(table.fieldnames or ()):
        raise ConfigError(
            f"{path}: begins like no trace known here; give Mooncake's JSON lines, or a CSV with "
            f"the columns {', '.join(_AZURE)}"
        )
    for number, row in enumerate(table, 2):
        try:
            # Seven digits of a second are one more than Python reads.
            time = datetime.fromisoformat(row["TIMESTAMP"][:26]).timestamp()
            yield Row(time, int(row["ContextTokens"]), int(row["GeneratedTokens"]))
        except (ValueError, TypeError) as error:
            raise _wrong(path, number, error) from error


def _wrong(path: Path, number: int, error: Exception) -> ConfigError:
    reason = f"no {error}" if isinstance(error, KeyError) else str(error)
    return ConfigError(f"{path}, line {number}: not a request of a trace: {reason}")
