"""What `tune` found, as a table of 80 columns for people."""

from __future__ import annotations

from collections.abc import Mapping
from io import StringIO
from typing import Any

from rich.console import Console
from rich.table import Table

from ep3stream.config import KERNEL_DEFAULTS

_WIDTH = 80
_MAX_LINES = 20
_COLUMNS = ("", "kernel", "bandwidth", "ridge", "scaled", "rows", "mse")
_LONGEST_NAME = 20


def describe_tuning(found: Mapping[str, Any], *, is_terminal: bool = False) -> str:
    """The trials of `TuneResult.as_json`, those on most rows first, and notes; on a terminal with its styles."""
    console = Console(
        file=StringIO(), width=_WIDTH, force_terminal=is_terminal, markup=False, emoji=False, highlight=False
    )
    score = "r2" if found["best"]["accuracy"] is None else "accuracy"
    table = Table(box=None, pad_edge=False, header_style="bold")
    for place, name in enumerate((*_COLUMNS, score)):
        table.add_column(name, justify="right" if place > 1 else "left", no_wrap=True)
    for trial in found["trials"][:_MAX_LINES]:
        chosen = trial == found["best"]
        table.add_row(*_cells(trial, score, chosen), style="bold" if chosen else None)
    with console.capture() as capture:
        console.print(table)
    lines = [line.rstrip() for line in capture.get().splitlines()]
    if (n_more := len(found["trials"]) - _MAX_LINES) > 0:
        lines.append(f"and {n_more} more on fewer rows; --json has all")
    return "\n".join([*lines, "* chosen", *(f"note: {note}" for note in found["notes"])])


def _cells(trial: Mapping[str, Any], score: str, is_chosen: bool) -> tuple[str, ...]:
    others = [name for name in KERNEL_DEFAULTS[trial["kernel"]] if name != "bandwidth"]
    kernel = " ".join([trial["kernel"], *(f"{trial[name]:g}" for name in others)])
    return (
        "*" if is_chosen else "",
        kernel[:_LONGEST_NAME],
        f"{trial['bandwidth']:.4g}" if "bandwidth" in trial else "-",
        f"{trial['ridge']:.2g}",
        "yes" if trial["feature_scale"] else "no",
        f"{trial['n_rows']:,}",
        f"{trial['mse']:.5g}",
        f"{trial[score]:.4f}",
    )
