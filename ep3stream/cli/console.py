"""What a command says on stderr: lines for people, or, with --json-logs, one JSON object a line for machines."""

from __future__ import annotations

import logging
import sys
import time
from datetime import UTC, datetime
from typing import Any

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ep3stream.run.text import json_text

_LOGGER = logging.getLogger("ep3stream")


def open_console(quiet: bool, as_json: bool) -> Console:
    """The console of messages and bars, which the package's log records go to as well; plain lines in a pipe."""
    is_terminal = sys.stderr.isatty()
    # Not left to rich, which takes a file for a terminal when FORCE_COLOR is set.
    console = Console(stderr=True, quiet=quiet, force_terminal=None if is_terminal else False)
    handler: logging.Handler = logging.StreamHandler()
    if as_json:
        console = _JsonConsole(stderr=True, force_terminal=False)
        handler.setFormatter(_JsonLines())
    elif is_terminal:
        handler = RichHandler(
            console=console, show_path=False, show_time=False, show_level=False, highlighter=NullHighlighter()
        )
    _LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    _LOGGER.addHandler(handler)
    return console


def close_console() -> None:
    """Takes the handlers away that `open_console` gave to the package's logger."""
    _LOGGER.handlers.clear()


def say(console: Console, text: str) -> None:
    """Prints a line on stderr, unless --quiet was given."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def say_error(message: str, exit_code: int, as_json: bool) -> int:
    """Prints the one line of a command that failed, and returns its exit code."""
    words = " ".join(message.split())
    line = json_text(_line("error", words, time.time()) | {"exit_code": exit_code})
    print(line if as_json else f"ep3stream: {words}", file=sys.stderr)
    return exit_code


class _JsonLines(logging.Formatter):
    """time (UTC), level, message and logger; the line of a bar also has its numbers, under `progress`."""

    def format(self, record: logging.LogRecord) -> str:
        content = _line(record.levelname.lower(), record.getMessage(), record.created)
        content["logger"] = record.name
        progress = getattr(record, "progress", None)
        return json_text(content if progress is None else content | {"progress": progress})


class _JsonConsole(Console):
    """A console that makes log records of its lines, and so JSON."""

    def print(self, *objects: Any, **_: Any) -> None:
        logging.getLogger("ep3stream.cli").info("%s", " ".join(map(str, objects)))


def _line(level: str, message: str, created: float) -> dict[str, Any]:
    return {"time": datetime.fromtimestamp(created, UTC).isoformat(), "level": level, "message": message}
