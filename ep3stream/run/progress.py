"""Progress on stderr: a bar where a person is looking, silence in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TextColumn

from ep3stream.data.convert import ConvertProgress
from ep3stream.run.fit import FitProgress


@contextmanager
def fit_bar(console: Console) -> Iterator[Callable[[FitProgress], None]]:
    """A bar for `fit`, with rows/s, running loss, share of time starved of data and the time to go."""
    columns = (TextColumn("fit"), BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.fields[text]}"))
    with Progress(*columns, console=console, transient=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, text="set-up")

        def show(now: FitProgress) -> None:
            text = (
                f"epoch {now.epoch:.2f}  {_count(now.rows_per_s)} rows/s  loss {now.loss:.4g}  "
                f"starved {100 * now.starved:.0f}%  {_clock(now.eta_s)} to go"
            )
            progress.update(task, total=now.n_steps, completed=now.step, text=text)

        yield show


@contextmanager
def convert_bar(console: Console) -> Iterator[Callable[[ConvertProgress], None]]:
    """A bar for `convert`, with stage, rows/s and MB/s of the source."""
    columns = (TextColumn("{task.description}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=False, disable=not console.is_terminal) as progress:
        task = progress.add_task("convert", total=None, text="")

        def show(now: ConvertProgress) -> None:
            seconds = max(now.elapsed_s, 1e-9)
            text = (
                f"{_count(now.rows)} rows  {_count(now.rows / seconds)} rows/s  "
                f"{now.bytes_read / seconds / 1e6:.0f} MB/s"
            )
            progress.update(
                task, description=now.stage, total=now.bytes_total, completed=now.bytes_read, text=text
            )

        yield show


def _count(number: float) -> str:
    for size, letter in ((1e9, "G"), (1e6, "M"), (1e3, "k")):
        if number >= size:
            return f"{number / size:.1f}{letter}"
    return f"{number:.0f}"


def _clock(seconds: float) -> str:
    hours, rest = divmod(round(seconds), 3600)
    minutes, seconds = divmod(rest, 60)
    return f"{hours}:{minutes:02d}:{seconds:02d}" if hours else f"{minutes}:{seconds:02d}"
