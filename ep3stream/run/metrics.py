"""metrics.jsonl and evaluations.jsonl: one JSON object a line, appended as the fit goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep3stream.errors import InputError
from ep3stream.run.bundle import write_file


def json_text(value: object) -> str:
    """One line of JSON; numbers that JSON cannot hold become null."""
    return json.dumps(_finite(value), allow_nan=False)


def _finite(value: object) -> object:
    if isinstance(value, Mapping):
        return {name: _finite(item) for name, item in value.items()}
    if isinstance(value, list | tuple):
        return [_finite(item) for item in value]
    return None if isinstance(value, float) and not math.isfinite(value) else value


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one record, on a line of its own even after a line cut short by a crash; raises InputError."""
    try:
        with path.open("ab+") as file:
            file.seek(max(0, file.tell() - 1))
            is_cut = file.read(1) not in (b"", b"\n")
            file.write(b"\n" * is_cut + json_text(record).encode() + b"\n")
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); free space or correct permissions") from error


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except (ValueError, RecursionError):
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def drop_after(path: Path, step: int) -> None:
    """Removes the steps and validations after `step`, which a resumed fit will do again. Events stay."""
    if path.exists():
        kept = [r for r in read_lines(path) if r.get("kind") == "event" or _step(r) <= step]
        write_file(path, "".join(json_text(record) + "\n" for record in kept).encode())


def _step(record: Mapping[str, Any]) -> float:
    """Infinite for a record that names none: nobody can tell when it was made."""
    step = record.get("step")
    return step if isinstance(step, int) else math.inf
