"""metrics.jsonl and evaluations.jsonl: one JSON object a line, appended as the fit goes on.

What a sitting of a fit tells: lines of metrics.jsonl, curves, and the log; by the leader alone.

A fit's records as curves in TensorBoard, beside metrics.jsonl, which has them all anyway.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.util import find_spec
from pathlib import Path
from typing import Any

from ep3stream.config import FitConfig
from ep3stream.disk import no_link, read_small_file, write_file
from ep3stream.errors import ConfigError, InputError
from ep3stream.run.checkpoint import Progress
from ep3stream.run.directory import RunDirectory
from ep3stream.run.text import json_text

logger = logging.getLogger(__name__)

# A week's fit writes some 1 MB.
MAX_LINES_BYTES = 64 << 20


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one record, on a line of its own even after a line cut short by a crash; raises InputError."""
    try:
        with open(path, "ab+", opener=no_link) as file:
            file.seek(max(0, file.tell() - 1))
            is_cut = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * is_cut + json_text(record).encode() + b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); free space or correct permissions") from error


class Journal:
    """Appends to one file for as long as a fit goes on, whatever the disk says: that costs lines, never the fit."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._is_losing = False

    def append(self, record: Mapping[str, Any]) -> None:
        """As `append_line`; the first of the lines that cannot be written is told in the log."""
        try:
            append_line(self.path, record)
            self._is_losing = False
        except InputError as error:
            if not self._is_losing:
                logger.warning("lines are missing from now on: %s", error)
            self._is_losing = True


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line cut short by a crash is left out. InputError for one that cannot be read."""
    try:
        text = read_small_file(path, MAX_LINES_BYTES).decode(errors="replace")
    except FileNotFoundError:
        return []
    except OSError as error:
        raise InputError(f"{path} cannot be read ({error}); restore it or remove it") from error
    records = []
    for line in text.splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def starved_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """The share of the time between two step records spent waiting for data; `before` may be empty: the beginning."""
    waited, elapsed = (number_of(after, name) - number_of(before, name) for name in ("wait_s", "elapsed_s"))
    return min(max(waited / elapsed, 0.0), 1.0) if elapsed > 0 else None


def number_of(record: Mapping[str, Any], name: str) -> float:
    """A field of a record; 0 where it has none, or something else."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0


def drop_after(path: Path, step: int) -> None:
    """Removes the steps and validations after `step`, which a resumed fit will do again. Events stay."""
    if path.exists():
        kept = [r for r in read_lines(path) if r.get("kind") == "event" or _step(r) <= step]
        write_file(path, "".join(json_text(record) + "\n" for record in kept).encode())


def _step(record: Mapping[str, Any]) -> float:
    """Infinite for a record that names none: nobody can tell when it was made."""
    step = record.get("step")
    return step if isinstance(step, int) else math.inf


_WARNINGS = {"rollback", "checkpoint_failed", "no_better"}


class EventLog:
    """Appends to the metrics at a path. draw: takes each record too."""

    def __init__(self, metrics: Path, is_leader: bool) -> None:
        self.draw: Callable[[Mapping[str, Any]], None] = lambda record: None
        self._journal, self._is_leader = Journal(metrics), is_leader

    def note(self, record: Mapping[str, Any]) -> None:
        """A line of metrics."""
        if self._is_leader:
            self._journal.append(record)
            self.draw(record)

    def event(self, event: str, progress: Progress, message: str) -> None:
        """Something that has happened at this step, in words for the log too."""
        record = {"kind": "event", "event": event, "step": progress.step, "elapsed_s": progress.elapsed_s}
        self.note(record | {"message": message})
        logger.log(logging.WARNING if event in _WARNINGS else logging.INFO, message)


Record = Mapping[str, Any]

# Field of a step's record -> the curve's name; what stands before the slash is a group of curves.
_STEP_CURVES = {
    "loss": "loss/running",
    "batch_loss": "loss/batch",
    "step_size": "solver/step_size",
    "projection_error": "solver/projection_error",
    "rows_per_s": "speed/rows_per_s",
}

_NOT_SCORES = {"kind", "step", "epoch", "rows", "elapsed_s", "split", "n"}

_FLUSH_S = 10


def require_tensorboard(config: FitConfig) -> None:
    """ConfigError where it is asked for but not installed: before anything else is done."""
    if config.run.tensorboard and find_spec("tensorboard") is None:
        raise ConfigError(
            "tensorboard is asked for but not installed; pip install 'ep3stream[tensorboard]', or leave it out"
        )


@contextmanager
def curves(directory: RunDirectory, place: bool | str, step: int) -> Iterator[Callable[[Record], None]]:
    """What takes each record of a sitting that begins after `step`, and draws its numbers at `place`, if there is one.

    place: as the setting `tensorboard`.
    A resumed fit goes on in the same curves: TensorBoard is told to forget what an earlier sitting wrote after `step`.
    A disk that takes no more costs curves, never the fit.
    """
    if not place:
        yield lambda record: None
        return
    steps = [record for record in read_lines(directory.metrics) if record.get("kind") == "step"]
    path = directory.tensorboard if place is True else Path(place)
    with _Writer(path, step, steps[-1] if steps else {}) as writer:
        yield writer.add


class _Writer:
    """`before`: the last record of the sitting before, since when the time is counted."""

    def __init__(self, place: Path, step: int, before: Record) -> None:
        self._place, self._step, self._before = place, step, before
        self._writer: Any = None

    def __enter__(self) -> _Writer:
        from torch.utils.tensorboard import SummaryWriter

        self._attempt(lambda: self._open(SummaryWriter))
        return self

    def _open(self, make: Any) -> None:
        self._writer = make(str(self._place), purge_step=self._step + 1, flush_secs=_FLUSH_S)

    def __exit__(self, *_: object) -> None:
        if self._writer is not None:
            self._attempt(self._writer.close)

    def add(self, record: Record) -> None:
        if self._writer is not None:
            self._attempt(lambda: self._write(record))

    def _write(self, record: Record) -> None:
        for name, value in self._values(record):
            self._writer.add_scalar(name, value, record["step"])

    def _values(self, record: Record) -> Iterator[tuple[str, float]]:
        if record["kind"] == "step":
            yield from ((curve, record[field]) for field, curve in _STEP_CURVES.items() if field in record)
            if (starved := starved_between(self._before, record)) is not None:
                yield "speed/starved", starved
            self._before = record
        elif record["kind"] == "validation":
            scores = ((name, value) for name, value in record.items() if name not in _NOT_SCORES)
            yield from ((f"{record['split']}/{name}", value) for name, value in scores)

    def _attempt(self, write: Callable[[], object]) -> None:
        """The writer's own thread meets the disk; what it met is raised by the next call."""
        try:
            write()
        except OSError as error:
            logger.warning("TensorBoard's curves end here, the fit goes on: %s", error)
            self._writer = None
