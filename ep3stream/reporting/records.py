"""The files of a run directory as the report reads them: leniently, for a crash may have cut any of them short.

A missing file, a damaged line and a value of another type leave something out; they never raise.
"""

from __future__ import annotations

import json
import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import numpy.typing as npt

from ep3stream.disk import read_small_file
from ep3stream.reporting.run_json import PlanRecord, Record, as_float, as_list, as_record, as_texts
from ep3stream.run.directory import RunDirectory
from ep3stream.run.event_log import MAX_LINES_BYTES

Floats = npt.NDArray[np.float64]

SECONDS_FIELDS = (
    "elapsed_s", "compute_s", "wait_s", "stalled_s", "validate_s",
    "read_s", "decode_s", "segments_s", "gather_s", "copy_s",
)  # fmt: skip

STEP_FIELDS = ("step", "epoch", "rows", "loss", "batch_loss", "rows_per_s", "step_size", *SECONDS_FIELDS)

# A longer fit loses every second record whenever it has so many: 40 MB at most.
_MOST_STEPS = 1 << 16
_MOST_UNDONE = 20


def as_floats(value: object) -> Floats:
    """A JSON list as a 1-d float array, with NaN for each item that is not a number."""
    return np.array([as_float(item) for item in as_list(value)], dtype=np.float64)


@dataclass(frozen=True, slots=True)
class Steps:
    """Step records by column, each (n,), NaN where a record lacks the field."""

    columns: Mapping[str, Floats]

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

    def rows_per_s(self) -> float:
        """The mean over the whole fit; NaN if nothing was timed."""
        elapsed = self.last("elapsed_s")
        return self.last("rows") / elapsed if elapsed > 0 else math.nan


@dataclass(slots=True)
class _Replay:
    """Replays metrics.jsonl: a record of step k takes back the records of later steps, as the fit did."""

    steps: list[tuple[float, ...]] = field(default_factory=list)
    validations: list[Record] = field(default_factory=list)
    undone: list[list[tuple[float, ...]]] = field(default_factory=list)
    events: list[Record] = field(default_factory=list)

    def add(self, record: Record) -> None:
        kind, step = record.get("kind"), as_float(record.get("step"))
        if kind == "event":
            self.events.append(record)
        if kind not in ("step", "validation") or not math.isfinite(step):
            return
        self._take_back(step, include_step=kind == "step")
        if kind == "step":
            self.steps.append(tuple(as_float(record.get(name)) for name in STEP_FIELDS))
            if len(self.steps) > _MOST_STEPS:
                del self.steps[1::2]
        else:
            while self.validations and as_float(self.validations[-1]["step"]) == step:
                self.validations.pop()
            self.validations.append(record)

    def _take_back(self, step: float, include_step: bool) -> None:
        taken = []
        while self.steps and (self.steps[-1][0] > step or (include_step and self.steps[-1][0] == step)):
            taken.append(self.steps.pop())
        while self.validations and as_float(self.validations[-1]["step"]) > step:
            self.validations.pop()
        if taken:
            self.undone = [*self.undone, taken[::-1]][-_MOST_UNDONE:]


@dataclass(frozen=True, slots=True)
class RunRecords:
    """All that a page is drawn from.

    summary: run.json as it is, and its parts: store (the fitted store: path, fingerprint, split, task, sizes), setup
    (seconds of the stages, eigenvalues, mu, lambda_max), environment (device and versions), statistics (of columns and
    classes). undone: the steps that a roll-back or a resume has taken back later, one item for each time.
    """

    name: str
    summary: Record
    store: Record
    plan: PlanRecord
    setup: Record
    environment: Record
    statistics: Record
    target_names: list[str]
    class_names: list[str]
    config: str
    steps: Steps
    undone: tuple[Steps, ...]
    validations: tuple[Record, ...]
    events: tuple[Record, ...]
    evaluations: tuple[Record, ...]

    @classmethod
    def read(cls, run: Path) -> RunRecords:
        """What is readable of run.json, config.toml, metrics.jsonl and evaluations.jsonl.

        Raises InputError only if `run` holds nothing of a run.
        """
        RunDirectory(run).require()
        replay = _Replay()
        for record in _json_lines(run / "metrics.jsonl"):
            replay.add(record)
        summary = _json_object("".join(_lines(run / "run.json")))
        parts = ("store", "setup", "environment", "statistics")
        store, setup, environment, statistics = (as_record(summary.get(part)) for part in parts)
        return cls(
            name=run.resolve().name,
            summary=summary,
            store=store,
            plan=PlanRecord.of(summary.get("plan")),
            setup=setup,
            environment=environment,
            statistics=statistics,
            target_names=as_texts(summary.get("target_names")),
            class_names=as_texts(summary.get("class_names")),
            config="".join(_lines(run / "config.toml")),
            steps=Steps.of(replay.steps),
            undone=tuple(Steps.of(rows) for rows in replay.undone),
            validations=tuple(replay.validations),
            events=tuple(replay.events),
            evaluations=tuple(_json_lines(run / "evaluations.jsonl")),
        )

    @property
    def setup_s(self) -> float:
        """The seconds of all stages of the set-up together."""
        stages = as_record(self.setup.get("elapsed_s"))
        return math.fsum(s for s in map(as_float, stages.values()) if math.isfinite(s))


def _lines(path: Path) -> Iterator[str]:
    """The lines of a text file; none if it cannot be read."""
    try:
        yield from read_small_file(path, MAX_LINES_BYTES).decode(errors="replace").splitlines(keepends=True)
    except OSError:
        return


def _json_lines(path: Path) -> Iterator[Record]:
    return (record for line in _lines(path) if (record := _json_object(line)))


def _json_object(text: str) -> Record:
    try:
        return as_record(json.loads(text))
    except (ValueError, RecursionError):
        return {}
