"""Progress on stderr: a bar where a person is looking, as wide as there is room; a line now and then in a pipe."""

from __future__ import annotations

import logging
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager, nullcontext
from dataclasses import asdict
from typing import TYPE_CHECKING

from rich.console import Console
from rich.progress import BarColumn, Progress, ProgressColumn, TaskID, TextColumn
from rich.table import Column

from ep3stream.run.text import clock_text

if TYPE_CHECKING:  # A fit does not wait for what only a conversion needs, pandas among it.
    from ep3stream.conversion.convert import ConvertProgress
    from ep3stream.run.clock import FitProgress
    from ep3stream.store.verify import VerifyProgress

_LOGGER = logging.getLogger(__name__)

# Time between two lines of a log.
LINE_EVERY_S = 60.0
_BAR_WIDTH = 40
_LEAST_BAR_WIDTH = 8

# The width that the task's name and the spaces between the columns take.
_OTHER_WIDTH = 12


@contextmanager
def fit_bar(console: Console) -> Iterator[Callable[[FitProgress], None]]:
    """For `fit`: the share done, time to go, running loss, rows/s, share of the time spent waiting for data, epoch."""
    with _drawn(console, TextColumn("fit"), *_bar_and_text(console)) as progress:
        task, lines = progress.add_task("", total=None, text="set-up"), _Lines()

        def show(now: FitProgress) -> None:
            pieces = (
                f"{100 * now.step / now.n_steps:.0f}%",
                f"{clock_text(now.eta_s)} to go",
                f"loss {now.loss:.4g}",
                f"{_count(now.rows_per_s)} rows/s",
                f"starved {100 * now.starved:.0f}%",
                f"epoch {now.epoch:.2f}",
            )
            if progress.disable:
                lines.tell("fit", pieces, now)
            text = _joined(pieces, console.width)
            progress.update(task, total=now.n_steps, completed=now.step, text=text)

        yield show


@contextmanager
def convert_bar(console: Console) -> Iterator[Callable[[ConvertProgress], None]]:
    """A bar for each stage of `convert`: time to go, rows/s, MB/s (of the source, then of the store), rows."""
    with _drawn(console, TextColumn("{task.description:<5}"), *_bar_and_text(console)) as progress:
        tasks: dict[str, TaskID] = {}
        lines = _Lines()

        def show(now: ConvertProgress) -> None:
            if now.stage not in tasks:
                for task in tasks.values():
                    progress.update(task, completed=1.0)
                tasks[now.stage] = progress.add_task(now.stage, total=1.0, text="")
            seconds = max(now.elapsed_s, 1e-9)
            pieces = [
                f"{clock_text(now.eta_s)} to go",
                f"{_count(now.rows / seconds)} rows/s",
                f"{now.n_bytes / seconds / 1e6:.0f} MB/s",
                f"{_count(now.rows)} rows",
            ]
            if now.stage == "sync":
                pieces = ["bringing all of it to the disk"]
            if progress.disable:
                lines.tell(now.stage, [f"{100 * now.share:.0f}%", *pieces], now)
            progress.update(tasks[now.stage], completed=now.share, text=_joined(pieces, console.width))

        yield show


@contextmanager
def verify_bar(console: Console) -> Iterator[Callable[[VerifyProgress], None]]:
    """A bar for `verify`: the share read, MB, MB/s, time to go; it goes away at the end."""
    columns = (TextColumn("verify"), BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.fields[text]}"))
    with _drawn(console, *columns, transient=True) as progress:
        task = progress.add_task("", total=None, text="")

        def show(now: VerifyProgress) -> None:
            rate = now.bytes_read / max(now.elapsed_s, 1e-9)
            left_s = (now.bytes_total - now.bytes_read) / max(rate, 1e-9)
            text = f"{now.bytes_read / 1e6:,.0f} MB  {rate / 1e6:.0f} MB/s  {clock_text(left_s)} to go"
            progress.update(task, total=now.bytes_total, completed=now.bytes_read, text=text)

        yield show


@contextmanager
def _drawn(console: Console, *columns: ProgressColumn, transient: bool = False) -> Iterator[Progress]:
    """Shows the columns on a terminal. Elsewhere the Progress is disabled, and never started: rich before 14.3 ends
    a disabled one with an empty line too.
    """
    is_shown = console.is_terminal
    progress = Progress(*columns, console=console, transient=transient, disable=not is_shown)
    with progress if is_shown else nullcontext():
        yield progress


def _bar_and_text(console: Console) -> tuple[BarColumn, TextColumn]:
    width = max(_LEAST_BAR_WIDTH, min(_BAR_WIDTH, (console.width - _OTHER_WIDTH) // 3))
    return BarColumn(bar_width=width), TextColumn("{task.fields[text]}", table_column=Column(no_wrap=True))


def _joined(pieces: Sequence[str], width: int) -> str:
    """The first pieces, which are the most important: as many as a terminal of that width has room for."""
    kept = list(pieces[:1])
    for piece in pieces[1:]:
        if len("  ".join([*kept, piece])) > width - _OTHER_WIDTH - _LEAST_BAR_WIDTH:
            break
        kept.append(piece)
    return "  ".join(kept)


class _Lines:
    """Progress as log lines, at most one each LINE_EVERY_S, the first of them after that time."""

    def __init__(self) -> None:
        self._last = time.monotonic()

    def tell(self, what: str, pieces: Sequence[str], now: FitProgress | ConvertProgress) -> None:
        """Logs a line, with the numbers of `now` for --json-logs, if it is time."""
        if time.monotonic() - self._last >= LINE_EVERY_S:
            self._last = time.monotonic()
            _LOGGER.info("%s: %s", what, ", ".join(pieces), extra={"progress": asdict(now)})


def _count(number: float) -> str:
    """12.3k for 12345."""
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"
