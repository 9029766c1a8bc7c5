"""JSON that somebody may have changed, read leniently, and the plan in run.json.

What is missing or of another type reads as NaN, None, an empty text, list or object, and never raises. Imports only
the standard library, so that `status` starts quickly.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any

Record = dict[str, Any]
"""A JSON object."""


def as_record(value: object) -> Record:
    """`value` if it is a JSON object, else an empty one."""
    return value if isinstance(value, dict) else {}


def as_list(value: object) -> list[Any]:
    """`value` if it is a JSON list, else an empty one."""
    return value if isinstance(value, list) else []


def as_float(value: object) -> float:
    """`value` as a float; NaN unless it is a JSON number."""
    if not isinstance(value, int | float) or isinstance(value, bool):
        return math.nan
    try:
        return float(value)
    except OverflowError:
        return math.inf


def as_texts(value: object) -> list[str]:
    """A JSON list of names as strings."""
    return [str(item) for item in as_list(value)]


@dataclass(frozen=True, slots=True)
class PlanStage:
    """One stage of a fit: how many directions are flattened from row `first_row` on; NaN where not recorded."""

    first_row: float
    n_flattened: float


@dataclass(frozen=True, slots=True)
class PlanRecord:
    """The "plan" of run.json; fields are named like its keys, which readers spell nowhere else.

    Where a run of an older version lacks a field, a number is None and a text is empty. memory: planned bytes by
    purpose. stages: in order; none for a fit without stages.
    """

    n_centers: float | None
    kernel: str
    bandwidth: float | None
    n_directions: float | None
    projection: str
    model_rank: float | None
    data_rank: float | None
    ridge: float | None
    step_rule: str
    batch_size: float | None
    step_size: float | None
    steps_per_epoch: float | None
    n_steps: float | None
    memory: Mapping[str, float]
    stages: tuple[PlanStage, ...]

    @classmethod
    def of(cls, plan: object) -> PlanRecord:
        """The fields of a plan as JSON; all of them missing if it is none."""
        record = as_record(plan)
        plain: dict[str, Any] = {}
        for field in fields(cls):
            value = record.get(field.name)
            if field.type == "str":
                plain[field.name] = value if isinstance(value, str) else ""
            elif field.type == "float | None":
                plain[field.name] = value if math.isfinite(as_float(value)) else None
        sizes = {name: as_float(value) for name, value in as_record(record.get("memory")).items()}
        stages = [as_record(stage) for stage in as_list(record.get("stages"))]
        return cls(
            **plain,
            memory={name: n_bytes for name, n_bytes in sizes.items() if math.isfinite(n_bytes)},
            stages=tuple(
                PlanStage(as_float(stage.get("first_row")), as_float(stage.get("n_flattened")))
                for stage in stages
            ),
        )


def column_shares(summary: Mapping[str, Any]) -> dict[str, float]:
    """What each column is worth to a kernel that has learnt it, by name, the most first: shares of their sum.

    From `column_weights` or `metric` of run.json; empty where there are none, or none is worth anything.
    """
    learnt = as_record(summary.get("column_weights")) or as_record(summary.get("metric"))
    columns = map(as_record, as_list(learnt.get("columns")))
    worth = {str(column.get("name")): as_float(column.get("importance")) for column in columns}
    known = {name: value for name, value in worth.items() if 0 < value < math.inf}
    total = math.fsum(known.values())
    return {name: value / total for name, value in sorted(known.items(), key=lambda item: -item[1])}


def linear_explained(summary: Mapping[str, Any]) -> float:
    """The share of the variance that the linear part explains, from `linear` of run.json; NaN where there is none."""
    return as_float(as_record(summary.get("linear")).get("explained"))


def linear_sizes(summary: Mapping[str, Any]) -> dict[str, float]:
    """The standard deviation of each column's term of the linear part, by name, the largest first."""
    columns = map(as_record, as_list(as_record(summary.get("linear")).get("columns")))
    return {str(column.get("name")): as_float(column.get("size")) for column in columns}


@dataclass(frozen=True, slots=True)
class CrossRecord:
    """A cross of columns whose cells have effects in the model. explained: of what the kernel left; NaN if unknown."""

    columns: tuple[str, ...]
    levels: tuple[int, ...]
    explained: float


def crossed_columns(summary: Mapping[str, Any]) -> list[CrossRecord]:
    """From `effects` of run.json, those that explain most first; empty where the model has none."""
    found = []
    for one in map(as_record, as_list(as_record(summary.get("effects")).get("crosses"))):
        levels = tuple(int(level) for level in as_list(one.get("levels")) if math.isfinite(as_float(level)))
        found.append(CrossRecord(tuple(as_texts(one.get("columns"))), levels, as_float(one.get("explained"))))
    return [cross for cross in found if cross.columns]
