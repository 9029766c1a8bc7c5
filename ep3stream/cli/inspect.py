"""`ep3stream status`, `report`, `inspect` and `verify`: what is there, how it is doing, and whether it is whole."""

from __future__ import annotations

import argparse
import sys
import time
from pathlib import Path
from typing import Any

from rich.console import Console

from ep3stream.cli.console import say
from ep3stream.cli.options import (
    add_command,
    add_json,
    add_read_timeout,
    add_run,
    checked,
    disk_path,
    given_settings,
    store_place,
)
from ep3stream.config import RunConfig, parse_bytes
from ep3stream.errors import ConfigError
from ep3stream.run.text import json_text

_DAMAGED = 3
_COMPARISON = Path("comparison.html")


def add_status(commands: Any) -> None:
    """Adds `status` to the command line."""
    parser = add_command(
        commands,
        "status",
        _status,
        "tell from any shell how a fit is doing: step, loss, time to go, last checkpoint",
        "ep3stream status runs/first",
    )
    add_run(parser)
    add_json(parser)


def _status(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.inspection.status import describe_status, status

    now = status(options.run)
    print(json_text(now) if options.json else describe_status(now))


def add_report(commands: Any) -> None:
    """Adds `report` to the command line."""
    parser = add_command(
        commands,
        "report",
        _report,
        "draw a run's page anew, or one that compares several runs",
        "ep3stream report runs/first",
        "ep3stream report runs/first runs/second --out comparison.html",
    )
    parser.add_argument("runs", type=disk_path, nargs="+", metavar="RUN")
    parser.add_argument(
        "--out", type=disk_path, metavar="FILE.html", help=f"of a comparison; default: {_COMPARISON}"
    )


def _report(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.reporting.compare import write_comparison
    from ep3stream.reporting.report import write_report

    if len(options.runs) > 1:
        say(console, f"comparison in {write_comparison(options.runs, options.out or _COMPARISON)}")
    elif options.out is not None:
        raise ConfigError(f"out is {options.out}, but a run's report lies in the run; leave it out")
    else:
        say(console, f"report in {write_report(options.runs[0])}")


def add_inspect(commands: Any) -> None:
    """Adds `inspect` to the command line."""
    parser = add_command(
        commands,
        "inspect",
        _inspect,
        "tell what a store or a run holds",
        "ep3stream inspect flights.zarr",
        "ep3stream inspect flights.zarr --order --memory 4GiB",
    )
    _add_path(parser)
    parser.add_argument(
        "--order", action="store_true", help="of a store: how far apart a fit's epoch puts neighbouring rows"
    )
    parser.add_argument(
        "--memory", type=checked(parse_bytes), metavar="BYTES", help="of that fit; default: 2GiB"
    )
    add_json(parser)


def _inspect(options: argparse.Namespace, console: Console) -> None:
    from ep3stream.inspection.describe import describe_path
    from ep3stream.inspection.inspect import inspect

    if options.order:
        from ep3stream.inspection.order import describe_order, order_report

        report = order_report(options.path, options.memory)
        print(json_text(report) if options.json else describe_order(report))
    elif options.json:
        print(json_text(inspect(options.path)))
    else:
        print(describe_path(options.path, width=Console().width, is_terminal=sys.stdout.isatty()))


def add_verify(commands: Any) -> None:
    """Adds `verify` to the command line."""
    parser = add_command(
        commands,
        "verify",
        _verify,
        "read a store or a run whole and check it",
        "ep3stream verify flights.zarr",
    )
    _add_path(parser)
    add_read_timeout(parser)
    parser.add_argument(
        "--quick", action="store_true", help="sizes and presence only: misses changed bytes, reads no row"
    )
    add_json(parser)


def _verify(options: argparse.Namespace, console: Console) -> int:
    from ep3stream.cli.progress import verify_bar
    from ep3stream.inspection.describe import describe_soundness
    from ep3stream.inspection.inspect import verify
    from ep3stream.store.verify import VerifyProgress

    read = VerifyProgress(0, 0, 0.0)
    began = time.perf_counter()
    with verify_bar(console) as show:

        def note(now: VerifyProgress) -> None:
            nonlocal read
            read = now
            show(now)

        more = given_settings(options, RunConfig, "run")
        problems = verify(options.path, quick=options.quick, progress=note, **more)
    elapsed_s = time.perf_counter() - began
    if options.json:
        verdict = {"path": str(options.path), "sound": not problems, "problems": problems}
        cost = {"quick": options.quick, "bytes_read": read.bytes_read, "elapsed_s": elapsed_s}
        print(json_text(verdict | cost))
    else:
        sound = describe_soundness(options.path, None if options.quick else read.bytes_read, elapsed_s)
        print("\n".join(" ".join(problem.split()) for problem in problems) or sound)
    return _DAMAGED if problems else 0


def _add_path(parser: argparse.ArgumentParser) -> None:
    parser.add_argument(
        "path",
        type=store_place,
        metavar="PATH",
        help="of a store or a run, or s3://bucket/key of a store",
    )
