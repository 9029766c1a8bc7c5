"""Progress on stderr: a bar where a person is looking, silence in a pipe."""

from __future__ import annotations

from collections.abc import Callable, Iterator
from contextlib import contextmanager

from rich.console import Console
from rich.progress import BarColumn, Progress, TaskID, TextColumn

from ep3stream.data.conversion.convert import ConvertProgress
from ep3stream.data.verify import VerifyProgress
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
    """A bar for each stage of `convert`, with rows/s, MB/s and the time to go; bytes of the source, then rows'."""
    columns = (TextColumn("{task.description:<5}"), BarColumn(), TextColumn("{task.fields[text]}"))
    with Progress(*columns, console=console, transient=False, disable=not console.is_terminal) as progress:
        tasks: dict[str, TaskID] = {}

        def show(now: ConvertProgress) -> None:
            if now.stage not in tasks:
                for task in tasks.values():
                    progress.update(task, completed=1.0)
                tasks[now.stage] = progress.add_task(now.stage, total=1.0, text="")
            seconds = max(now.elapsed_s, 1e-9)
            text = (
                f"{_count(now.rows)} rows  {_count(now.rows / seconds)} rows/s  "
                f"{now.n_bytes / seconds / 1e6:.0f} MB/s  {_clock(now.eta_s)} to go"
            )
            if now.stage == "sync":
                text = "bringing all of it to the disk"
            progress.update(tasks[now.stage], completed=now.share, text=text)

        yield show


@contextmanager
def verify_bar(console: Console) -> Iterator[Callable[[VerifyProgress], None]]:
    """A bar for `verify`, with MB/s."""
    columns = (TextColumn("verify"), BarColumn(), TextColumn("{task.percentage:>3.0f}% {task.fields[text]}"))
    with Progress(*columns, console=console, transient=True, disable=not console.is_terminal) as progress:
        task = progress.add_task("", total=None, text="")

        def show(now: VerifyProgress) -> None:
            rate = now.bytes_read / max(now.elapsed_s, 1e-9)
            left_s = (now.bytes_total - now.bytes_read) / max(rate, 1e-9)
            text = f"{now.bytes_read / 1e6:,.0f} MB  {rate / 1e6:.0f} MB/s  {_clock(left_s)} to go"
            progress.update(task, total=now.bytes_total, completed=now.bytes_read, text=text)

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
