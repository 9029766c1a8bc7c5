"""metrics.jsonl: one JSON object a line, appended as the fit goes on."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ep3stream.run.bundle import write_file


def append_line(path: Path, record: Mapping[str, Any]) -> None:
    """Appends one record; numbers that JSON cannot hold become null."""
    finite = {
        name: None if isinstance(value, float) and not math.isfinite(value) else value
        for name, value in record.items()
    }
    with path.open("a") as file:
        file.write(json.dumps(finite, allow_nan=False) + "\n")


def read_lines(path: Path) -> list[dict[str, Any]]:
    """The records of a file; a line cut short by a crash is left out."""
    if not path.exists():
        return []
    records = []
    for line in path.read_text(errors="replace").splitlines():
        try:
            record = json.loads(line)
        except ValueError:
            continue
        if isinstance(record, dict):
            records.append(record)
    return records


def drop_after(path: Path, step: int) -> None:
    """Removes the steps and validations after `step`, which a resumed fit will do again. Events stay."""
    if path.exists():
        kept = [r for r in read_lines(path) if r.get("kind") == "event" or r.get("step", 0) <= step]
        write_file(path, "".join(json.dumps(record) + "\n" for record in kept).encode())
