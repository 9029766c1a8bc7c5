"""The command line: `ep3stream convert | tune | plan | fit | status | evaluate | predict | export | report | inspect |
verify | completion`.

Exit codes: 0 done; 2 bad usage, input or disk; 3 damaged data; 4 diverged; 5 a process of several devices died;
75 interrupted, checkpoint saved; 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import logging
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from rich.console import Console
from rich.highlighter import NullHighlighter
from rich.logging import RichHandler

from ep3stream.cli import convert, fit, plan, report, status, tune, use
from ep3stream.cli.options import JSON_LOGS, JSON_LOGS_HELP, QUIET, JsonConsole, JsonLines, Parser, error_line
from ep3stream.errors import Ep3streamError
from ep3stream.mesh import is_main_process
from ep3stream.store.json_files import created_by

_LOGGER = logging.getLogger("ep3stream")


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. An error is one line on stderr."""
    as_json = JSON_LOGS in (sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parsed(arguments)
        if "command" not in options:
            _parser().print_help()
            return 2  # Nothing was done: a script whose command came out empty must learn of it.
        code = int(options.command(options, _stderr(options.quiet or not is_main_process(), as_json)) or 0)
        sys.stdout.flush()  # A reader that has gone away shows here, where it can be told.
        return code
    except Ep3streamError as error:
        # Of several ranks with the same error, the one that had it first tells of it.
        return error.exit_code if error.told_by is not None else _fail(str(error), error.exit_code, as_json)
    except KeyboardInterrupt as error:
        return _fail("; ".join(["interrupted", *map(str, error.args)]), 130, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}; free memory or disk space, or correct permissions"
        return _fail(reason, 2, as_json)
    finally:
        _LOGGER.handlers.clear()


def _fail(message: str, code: int, as_json: bool) -> int:
    words = " ".join(message.split())
    print(error_line(words, code) if as_json else f"ep3stream: {words}", file=sys.stderr)
    return code


def _stderr(quiet: bool, as_json: bool) -> Console:
    """The console of messages and bars, which log records go to as well; plain lines unless it is a terminal."""
    is_terminal = sys.stderr.isatty()
    # Not left to rich, which takes a file for a terminal when FORCE_COLOR is set.
    console = Console(stderr=True, quiet=quiet, force_terminal=None if is_terminal else False)
    handler: logging.Handler = logging.StreamHandler()
    if as_json:
        console = JsonConsole(stderr=True, force_terminal=False)
        handler.setFormatter(JsonLines())
    elif is_terminal:
        handler = RichHandler(
            console=console, show_path=False, show_time=False, show_level=False, highlighter=NullHighlighter()
        )
    _LOGGER.setLevel(logging.WARNING if quiet else logging.INFO)
    _LOGGER.addHandler(handler)
    return console


def _parsed(arguments: Sequence[str] | None) -> argparse.Namespace:
    parser = _parser()
    options, more = parser.parse_known_args(arguments)
    if "paths" in options and not any(word.startswith("-") for word in more):
        # argparse takes a list from one place, but the store may well stand behind the options.
        options.paths += map(Path, more)
    elif more:
        parser.error(f"unrecognized arguments: {' '.join(more)}")
    return options


def _parser() -> argparse.ArgumentParser:
    parser = Parser(
        "ep3stream",
        description="Large kernel machines on data that does not fit in memory.",
        epilog="Exit codes: 0 done, 2 bad usage, input or disk, 3 damaged data, 4 diverged, 5 a device's process "
        "died, 75 interrupted and saved, 130 interrupted at once.",
    )
    parser.add_argument("--version", action="version", version=created_by())
    parser.add_argument("--quiet", action="store_true", help=QUIET)
    parser.add_argument(JSON_LOGS, action="store_true", help=JSON_LOGS_HELP)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    convert.add(commands)
    plan.add(commands)
    fit.add(commands)
    tune.add(commands)
    use.add(commands)
    report.add(commands)
    status.add(commands, parser)
    return parser
