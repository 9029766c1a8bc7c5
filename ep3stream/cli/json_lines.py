"""What is said on stderr as JSON, one object a line, for machines that collect logs."""

from __future__ import annotations

import logging
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console

from ep3stream.run.records.json_text import json_text


class JsonLines(logging.Formatter):
    """time (UTC), level, logger, message; a progress line has its numbers under `progress` besides."""

    def format(self, record: logging.LogRecord) -> str:
        """One line."""
        content = _line(record.levelname.lower(), record.getMessage(), record.created) | {
            "logger": record.name
        }
        progress = getattr(record, "progress", None)
        return json_text(content if progress is None else content | {"progress": progress})


class JsonConsole(Console):
    """A console whose lines are log records, and so JSON like those."""

    def print(self, *objects: Any, **_: Any) -> None:
        """At the level `info`."""
        logging.getLogger("ep3stream.cli").info("%s", " ".join(map(str, objects)))


def error_line(message: str, exit_code: int) -> str:
    """The last line of a command that failed."""
    return json_text(_line("error", message, time.time()) | {"exit_code": exit_code})


def _line(level: str, message: str, created: float) -> dict[str, Any]:
    return {"time": datetime.fromtimestamp(created, UTC).isoformat(), "level": level, "message": message}
