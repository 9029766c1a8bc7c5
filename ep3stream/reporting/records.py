"""What a run directory says about its fit, read leniently: a crash may have cut lines short."""

from __future__ import annotations

import json
import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from ep3stream.disk import read_small_file
from ep3stream.reporting.curves import Floats
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import MAX_LINES_BYTES

Table = dict[str, Any]

SECONDS_FIELDS = (
    "elapsed_s", "compute_s", "wait_s", "stalled_s", "validate_s",
    "read_s", "decode_s", "segments_s", "gather_s", "copy_s",
)  # fmt: skip

STEP_FIELDS = ("step", "epoch", "rows", "loss", "batch_loss", "rows_per_s", "step_size", *SECONDS_FIELDS)

_MOST_STEPS = 1 << 16

_MOST_UNDONE = 20


def table(value: object) -> Table:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def real(value: object) -> float:
    """`value` as a float, NaN unless it is a JSON number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def reals(value: object) -> Floats:
    """A JSON list as a 1-d float array, NaN for whatever is not a number; empty unless it is a list."""
    return np.array([real(v) for v in value] if isinstance(value, list) else [], dtype=np.float64)


def texts(value: object) -> list[str]:
    """A JSON list of names as strings; empty unless it is a list."""
    return [str(v) for v in value] if isinstance(value, list) else []


@dataclass(frozen=True, slots=True)
class Steps:
    """Step records by column, each (n,), NaN where a record lacks the field."""

    columns: dict[str, Floats]

    @classmethod
    def of(cls, rows: list[tuple[float, ...]]) -> Steps:
        """Columns from records in the order of STEP_FIELDS."""
        values = np.array(rows, dtype=np.float64).reshape(len(rows), len(STEP_FIELDS))
        return cls({name: values[:, i] for i, name in enumerate(STEP_FIELDS)})

    def __getitem__(self, name: str) -> Floats:
        return self.columns[name]

    def last(self, name: str) -> float:
        """The last finite value of a column, NaN if there is none."""
        finite = self[name][np.isfinite(self[name])]
        return float(finite[-1]) if len(finite) else math.nan


@dataclass(slots=True)
class _Replay:
    """The metrics replayed: a record of step k takes back what was recorded beyond k, as the fit did."""

    steps: list[tuple[float, ...]] = field(default_factory=list)
    validations: list[Table] = field(default_factory=list)
    undone: list[list[tuple[float, ...]]] = field(default_factory=list)
    events: list[Table] = field(default_factory=list)

    def add(self, record: Table) -> None:
        kind, step = record.get("kind"), real(record.get("step"))
        if kind == "event":
            self.events.append(record)
        if kind not in ("step", "validation") or not math.isfinite(step):
            return
        self._take_back(step, include_step=kind == "step")
        if kind == "step":
            self.steps.append(tuple(real(record.get(name)) for name in STEP_FIELDS))
            if len(self.steps) > _MOST_STEPS:
                del self.steps[1::2]
        else:
            while self.validations and real(self.validations[-1]["step"]) == step:
                self.validations.pop()
            self.validations.append(record)

    def _take_back(self, step: float, include_step: bool) -> None:
        taken = []
        while self.steps and (self.steps[-1][0] > step or (include_step and self.steps[-1][0] == step)):
            taken.append(self.steps.pop())
        while self.validations and real(self.validations[-1]["step"]) > step:
            self.validations.pop()
        if taken:
            self.undone = [*self.undone, taken[::-1]][-_MOST_UNDONE:]


@dataclass(frozen=True, slots=True)
class RunRecords:
    """Everything the page is drawn from. undone: steps later taken back by a roll-back or a resume."""

    name: str
    run: Table
    config: str
    steps: Steps
    undone: tuple[Steps, ...]
    validations: tuple[Table, ...]
    events: tuple[Table, ...]
    evaluations: tuple[Table, ...]

    @classmethod
    def read(cls, run: Path) -> RunRecords:
        """Whatever of run.json, config.toml, metrics.jsonl and evaluations.jsonl is there and readable.

        Raises InputError only if nothing of a run is there.
        """
        RunDirectory(run).require()
        replay = _Replay()
        for record in _json_lines(run / "metrics.jsonl"):
            replay.add(record)
        return cls(
            name=run.resolve().name,
            run=_parse("".join(_lines(run / "run.json"))),
            config="".join(_lines(run / "config.toml")),
            steps=Steps.of(replay.steps),
            undone=tuple(Steps.of(rows) for rows in replay.undone),
            validations=tuple(replay.validations),
            events=tuple(replay.events),
            evaluations=tuple(_json_lines(run / "evaluations.jsonl")),
        )


def _lines(path: Path) -> Iterator[str]:
    """Lines of a text file; none if it cannot be read."""
    try:
        yield from read_small_file(path, MAX_LINES_BYTES).decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return


def _json_lines(path: Path) -> Iterator[Table]:
    return (record for line in _lines(path) if (record := _parse(line)))


def _parse(text: str) -> Table:
    """A JSON object, empty if `text` is anything else or cut short."""
    try:
        return table(json.loads(text))
    except (ValueError, RecursionError):
        return {}
