"""What is said on stderr as JSON, one object a line, for machines that collect logs.

What the commands share: how options are read, and how a command joins the command line.
"""

from __future__ import annotations

import argparse
import logging
import time
from collections.abc import Callable
from datetime import UTC, datetime
from pathlib import Path
from typing import Any, NoReturn

from rich.console import Console

from ep3stream.errors import ConfigError
from ep3stream.run.text import json_text
from ep3stream.store.files import Location, ObjectUrl, location


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


QUIET = "only warnings and errors on stderr"

UNKNOWN = "categories that the store does not have: an error (default); ignore: set no feature; drop the row"

RENAME_LIKE = "what this file calls a column = what the store does"

JSON_LOGS = "--json-logs"

JSON_LOGS_HELP = "stderr as JSON, one object a line, progress among it"


class Parser(argparse.ArgumentParser):
    """One whose errors are raised, to be told in one line like any other."""

    def error(self, message: str) -> NoReturn:
        """Names the command's --help as the remedy."""
        raise ConfigError(f"{message}; see {self.prog} --help")


def command(
    commands: Any, name: str, run: Callable[[argparse.Namespace, Console], Any], summary: str, *examples: str
) -> argparse.ArgumentParser:
    """The parser of a new command, which `run` carries out; it returns an exit code, or None for 0."""
    parser: argparse.ArgumentParser = commands.add_parser(
        name,
        help=summary,
        description=summary,
        epilog="\n         ".join(["Example: " + examples[0], *examples[1:]]),
        formatter_class=argparse.RawDescriptionHelpFormatter,
    )
    # Without a default of its own, which would undo a --quiet before the command.
    parser.add_argument("--quiet", action="store_true", default=argparse.SUPPRESS, help=QUIET)
    parser.add_argument(JSON_LOGS, action="store_true", default=argparse.SUPPRESS, help=JSON_LOGS_HELP)
    parser.set_defaults(command=run)
    return parser


def given(options: argparse.Namespace, names: dict[str, str]) -> dict[str, Any]:
    """The options that were given, under the names of their settings."""
    return {name: value for option, name in names.items() if (value := getattr(options, option)) is not None}


def say(console: Console, text: str) -> None:
    """A line on stderr, unless --quiet."""
    console.print(text, highlight=False, markup=False, soft_wrap=True)


def checked(parse: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser whose ConfigError argparse shows as a usage error."""

    def parse_or_explain(text: str) -> Any:
        try:
            return parse(text)
        except ConfigError as error:
            raise argparse.ArgumentTypeError(str(error)) from error

    return parse_or_explain


def store_place(text: str) -> Location:
    """A path, or the URL of a store in a bucket."""
    return checked(location)(text)  # type: ignore[no-any-return]


def disk_path(text: str) -> Path:
    """A path on a disk: what a run or predictions need, which are written piece by piece."""
    if isinstance(checked(location)(text), ObjectUrl):
        raise argparse.ArgumentTypeError(f"{text} is in a bucket, where only stores are kept; give a path")
    return Path(text)


def number_or(word: str, number: Callable[[str], Any]) -> Callable[[str], Any]:
    """A parser of numbers that lets one word stand for itself."""

    def parse(text: str) -> Any:
        if text == word:
            return text
        try:
            return number(text)
        except ValueError:
            raise argparse.ArgumentTypeError(f"{text!r} is neither {word!r} nor a number") from None

    return parse


def epochs(text: str) -> int | float:
    """A number of epochs, whole where it is."""
    try:
        number = float(text)
    except ValueError:
        raise argparse.ArgumentTypeError(f"{text!r} is no number; write it like 2 or 0.5") from None
    return int(number) if number.is_integer() else number
