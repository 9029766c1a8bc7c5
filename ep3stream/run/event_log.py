"""metrics.jsonl and evaluations.jsonl: records of a run, one JSON object a line, appended as the fit goes on.

A record has a `kind`: step, validation or event. A line cut short by a crash is never read, and never spoils the next.
"""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ep3stream.disk import no_link, read_small_file, write_file
from ep3stream.errors import InputError
from ep3stream.run.text import json_text

if TYPE_CHECKING:
    from ep3stream.run.checkpoint import Progress

logger = logging.getLogger(__name__)

# A fit of a week writes about 1 MB.
MAX_LINES_BYTES = 64 << 20
_WARNINGS = {"rollback", "checkpoint_failed", "no_better"}


class EventLog:
    """Writes what happens in a fit: records to the file `metrics` and to `draw`, events to the log too.

    Only the leader's writes records. A disk that refuses them costs lines, never the fit: the first one missing is
    told in the log. draw: takes each record, such as for TensorBoard; to be set by the caller.
    """

    def __init__(self, metrics: Path, is_leader: bool) -> None:
        self.draw: Callable[[Mapping[str, Any]], None] = lambda record: None
        self._metrics, self._is_leader, self._is_losing = metrics, is_leader, False

    def note(self, record: Mapping[str, Any]) -> None:
        """Appends a record."""
        if not self._is_leader:
            return
        try:
            append_line(self._metrics, record)
            self._is_losing = False
        except InputError as error:
            if not self._is_losing:
                logger.warning("lines are missing from now on: %s", error)
            self._is_losing = True
        self.draw(record)

    def event(self, event: str, progress: Progress, message: str) -> None:
        """Appends an event at the step of `progress`, and logs the message, as a warning for some events."""
        record = {"kind": "event", "event": event, "step": progress.step, "elapsed_s": progress.elapsed_s}
        self.note(record | {"message": message})
        logger.log(logging.WARNING if event in _WARNINGS else logging.INFO, message)


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends a record, on a line of its own even after a line cut short; InputError where it cannot be written."""
    try:
        with open(path, "ab+", opener=no_link) as file:
            file.seek(max(0, file.tell() - 1))
            is_cut = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * is_cut + json_text(record).encode() + b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); free space or correct permissions") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file, none where there is no file; lines that are no JSON objects are left out.

    Raises InputError where the file cannot be read.
    """
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


def drop_after(path: Path, step: int) -> None:
    """Removes steps and validations after `step`, which a resumed fit does again, from the file. Events stay."""

    def is_kept(record: Mapping[str, Any]) -> bool:
        # Nobody can tell when a record without a step was made: it goes.
        made_at = record.get("step")
        return record.get("kind") == "event" or (made_at if isinstance(made_at, int) else math.inf) <= step

    if path.exists():
        lines = [json_text(record) + "\n" for record in read_lines(path) if is_kept(record)]
        write_file(path, "".join(lines).encode())


def starved_between(before: Mapping[str, Any], after: Mapping[str, Any]) -> float | None:
    """The share of the time between two step records that the fit waited for data; None if no time has passed.

    before: empty for the beginning of the fit.
    """
    waited, elapsed = (number_of(after, name) - number_of(before, name) for name in ("wait_s", "elapsed_s"))
    return min(max(waited / elapsed, 0.0), 1.0) if elapsed > 0 else None


def number_of(record: Mapping[str, Any], name: str) -> float:
    """A field of a record; 0 where the field is missing or no number."""
    value = record.get(name)
    return float(value) if isinstance(value, int | float) else 0.0
