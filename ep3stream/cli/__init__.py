"""The command line: `ep3stream convert | tune | plan | fit | status | evaluate | predict | export | report | inspect |
verify | completion`.

Exit codes: 0 done; 2 bad usage, input or disk; 3 damaged data; 4 diverged; 5 a process of several devices died;
75 interrupted, checkpoint saved; 130 interrupted at once.
"""

from __future__ import annotations

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path

from ep3stream.cli.completion import add_completion
from ep3stream.cli.console import close_console, open_console, say_error
from ep3stream.cli.convert import add_convert
from ep3stream.cli.fit import add_fit, add_plan, add_tune
from ep3stream.cli.inspect import add_inspect, add_report, add_status, add_verify
from ep3stream.cli.options import JSON_LOGS, Parser, add_talk
from ep3stream.cli.predict import add_evaluate, add_export, add_predict
from ep3stream.errors import Ep3streamError
from ep3stream.mesh import is_main_process
from ep3stream.store.json_files import created_by


def main(arguments: Sequence[str] | None = None) -> int:
    """Runs one command; returns the exit code. An error is one line on stderr."""
    as_json = JSON_LOGS in (sys.argv[1:] if arguments is None else arguments)
    try:
        options = _parsed(arguments)
        if "command" not in options:
            _parser().print_help()
            return 0
        options.is_own_process = arguments is None
        console = open_console(options.quiet or not is_main_process(), as_json)
        code = int(options.command(options, console) or 0)
        sys.stdout.flush()  # A reader that has gone away shows here, where it can be told.
        return code
    except Ep3streamError as error:
        # Of several ranks with the same error, the one that had it first tells of it.
        return (
            error.exit_code
            if error.from_rank is not None
            else say_error(str(error), error.exit_code, as_json)
        )
    except KeyboardInterrupt as error:
        return say_error("; ".join(["interrupted", *map(str, error.args)]), 130, as_json)
    except BrokenPipeError:
        os.dup2(os.open(os.devnull, os.O_WRONLY), sys.stdout.fileno())
        return 141
    except (OSError, MemoryError) as error:
        reason = f"{type(error).__name__}: {error}; free memory or disk space, or correct permissions"
        return say_error(reason, 2, as_json)
    finally:
        close_console()


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
    add_talk(parser, default=False)
    commands = parser.add_subparsers(title="commands", metavar="COMMAND")
    for add in (
        add_convert,
        add_tune,
        add_plan,
        add_fit,
        add_status,
        add_evaluate,
        add_predict,
        add_export,
        add_report,
        add_inspect,
        add_verify,
    ):
        add(commands)
    add_completion(commands, parser)
    return parser
