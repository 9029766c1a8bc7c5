"""metrics.jsonl and evaluations.jsonl: one JSON object a line, appended as the fit goes on."""

from __future__ import annotations

import json
import logging
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep3stream.data.small_files import no_link, read_small_file
from ep3stream.errors import InputError
from ep3stream.run.files.whole_file import write_file
from ep3stream.run.records.json_text import json_text

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
