"""`ep3stream report`."""

from __future__ import annotations

import argparse
from pathlib import Path
from typing import Any

from rich.console import Console

from ep3stream.cli.options import command, disk_path, say
from ep3stream.errors import ConfigError

_COMPARISON = Path("comparison.html")


def add(commands: Any) -> None:
    """Adds `report` to the command line."""
    report = command(
        commands,
        "report",
        _report,
        "draw a run's page anew, or one that compares several runs",
        "ep3stream report runs/first",
        "ep3stream report runs/first runs/second --out comparison.html",
    )
    report.add_argument("runs", type=disk_path, nargs="+", metavar="RUN")
    report.add_argument(
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
