"""The server's log: one line a request, as JSON or for people, with what the cache did for it.

Prompts, outputs and keys are never in it.
"""

import json
import logging
import sys
from datetime import UTC, datetime
from typing import Any

from kvist.core.record import RequestRecord
from kvist.server.settings import Settings

# What a handler puts beside the message: `log.info("request", extra={"fields": {...}})`.
FIELDS = "fields"


class JSONLines(logging.Formatter):
    """One JSON object a line."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message, then the fields."""
        line: dict[str, Any] = {
            "time": _time(record),
            "level": record.levelname.lower(),
            "logger": record.name,
            "message": record.getMessage(),
        }
        line |= getattr(record, FIELDS, {})
        if record.exc_info:
            line["exception"] = self.formatException(record.exc_info)
        return json.dumps(line, default=str)


class PlainLines(logging.Formatter):
    """The same for a terminal."""

    def format(self, record: logging.LogRecord) -> str:
        """Time, level, message, then the fields as name=value."""
        values = getattr(record, FIELDS, {})
        pairs = " ".join(f"{name}={value}" for name, value in values.items() if value != {})
        line = f"{_time(record)} {record.levelname:7} {record.getMessage()} {pairs}".rstrip()
        return f"{line}\n{self.formatException(record.exc_info)}" if record.exc_info else line


def configure(settings: Settings) -> None:
    """Send the server's and uvicorn's log to stderr, as the settings want it."""
    handler = logging.StreamHandler(sys.stderr)
    handler.setFormatter(JSONLines() if settings.log_format == "json" else PlainLines())
    for name in ("kvist", "uvicorn"):
        logger = logging.getLogger(name)
        logger.handlers, logger.propagate = [handler], False
        logger.setLevel(settings.log_level.upper())
    # uvicorn's own words on each start and stop say less than ours.
    logging.getLogger("uvicorn.error").setLevel(max(logging.WARNING, logging.root.level))


def record_fields(record: RequestRecord) -> dict[str, Any]:
    """What the cache did for one output, for the log."""
    return {
        "reason": record.reason,
        "prompt_tokens": record.prompt_tokens,
        "output_tokens": record.output_tokens,
        "cached": {
            "device": record.cached_device,
            "host": record.cached_host,
            "fork": record.cached_fork,
        },
        "misses": [f"{miss.kind}[{miss.start}:{miss.stop}]" for miss in record.misses],
        "preemptions": record.preemptions,
        "lost_tokens": record.lost_tokens,
        "queue_s": round(record.queue_time, 6),
        "prefill_s": round(record.prefill_time, 6),
        "decode_s": round(record.decode_time, 6),
    }


def _time(record: logging.LogRecord) -> str:
    return datetime.fromtimestamp(record.created, UTC).isoformat(timespec="milliseconds")
