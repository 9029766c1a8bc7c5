"""The report page's charts, each built from a run's records, or None where the run has nothing to draw."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ep3stream.reporting.curves import (
    COUNTS,
    MOST_POINTS,
    SECONDS,
    Axis,
    Chart,
    Floats,
    Mark,
    Series,
    Units,
    axis,
    draw,
    number,
    thin,
)
from ep3stream.reporting.records import RunRecords, Steps, Table, real, reals, table

X_AXES: Mapping[str, tuple[str, Units]] = {"rows": ("rows seen", COUNTS), "elapsed_s": ("time", SECONDS)}

"""What the loss is drawn against: a step record's field, its name on the page and its units."""

_EVENT_NAMES = {"resume": "resumed", "rollback": "rolled back"}

_MOST_MARKS = 40

_MOST_WINDOWS = 120


def _curve(name: str, role: str, steps: Steps, x: str, y: str, most: int = MOST_POINTS) -> Series:
    return Series(name, role, *thin(steps[x], steps[y], most))


def loss_chart(records: RunRecords, x: str) -> Chart | None:
    """Running, batch and validation loss against `x` (a key of X_AXES), resumes and roll-backs marked."""
    loss = _curve("running loss", "main", records.steps, x, "loss")
    at, mse = (np.array([real(v.get(name)) for v in records.validations]) for name in (x, "mse"))
    validation = Series("validation", "point", *thin(at, mse))
    up = np.concatenate([loss.y, validation.y])
    if not np.any(up > 0):
        return None
    name, units = X_AXES[x]
    series = [
        _curve("each batch", "faint", records.steps, x, "batch_loss"),
        *(_curve("taken back", "undone", steps, x, "loss", most=200) for steps in records.undone),
        loss,
        validation,
    ]
    return draw(
        f"Running loss against {name}",
        axis(name, np.concatenate([loss.x, validation.x]), snug=True, units=units),
        # The axis follows what counts; single batches and diverging steps may leave the frame.
        axis("mean squared error", up, log=True),
        [s for s in series if len(s.x)],
        _event_marks(records, x),
    )


def accuracy_chart(records: RunRecords, x: str) -> Chart | None:
    """The share of validated rows that were classified rightly, against `x` (a key of X_AXES)."""
    at, right = (np.array([real(v.get(name)) for v in records.validations]) for name in (x, "accuracy"))
    at, right = thin(at, 100 * right)
    if not len(right):
        return None
    name, units = X_AXES[x]
    role = "main" if len(right) > 1 else "point"
    seen = np.concatenate([records.steps[x], at])
    # Not from zero: what counts is how much of the rest each pass still wins.
    low, high = float(right.min()), float(right.max())
    up = axis("percent right", np.array([low, high]), log=low > 0)
    return draw(
        f"Validation accuracy against {name}",
        axis(name, seen, snug=True, units=units),
        up,
        [Series("accuracy", role, at, right)],
    )


def _event_marks(records: RunRecords, x: str) -> list[Mark]:
    told = [e for e in records.events if str(e.get("event")) in _EVENT_NAMES][-_MOST_MARKS:]
    at = np.array([real(e.get("elapsed_s" if x == "elapsed_s" else "step")) for e in told])
    if x != "elapsed_s" and len(records.steps[x]):
        # Events carry no row count: read it off the steps around them.
        at = np.interp(at, records.steps["step"], records.steps[x])
    kinds = [str(e["event"]) for e in told]
    return [Mark(_EVENT_NAMES[kind], kind, x=float(place)) for kind, place in zip(kinds, at, strict=True)]


def rate_chart(records: RunRecords) -> Chart | None:
    """Rows per second over time: as logged, and the rise of rows in each window."""
    logged = _curve("as logged", "faint", records.steps, "elapsed_s", "rows_per_s")
    mean = _windowed("window mean", records.steps, "rows")
    up = axis("rows per second", np.concatenate([logged.y, mean.y, [0.0]]), units=COUNTS)
    return _over_time("Throughput", [logged, mean], up)


def wait_chart(records: RunRecords) -> Chart | None:
    """Percent of the time spent waiting for data, in each window."""
    waited = _windowed("waiting for data", records.steps, "wait_s")
    percent = replace(waited, y=np.clip(100 * waited.y, 0, 100))
    return _over_time("Waiting for data", [percent], axis("percent of time", np.array([0.0, 100.0])))


def _windowed(name: str, steps: Steps, field: str) -> Series:
    """(rise of `field`) / (rise of elapsed_s) over up to _MOST_WINDOWS windows of five steps or more."""
    n, elapsed = len(steps[field]), steps["elapsed_s"]
    n_windows = max(1, min(_MOST_WINDOWS, n // 5))
    ends = np.unique(np.linspace(0, n - 1, n_windows + 1).astype(np.int64)) if n else np.arange(0)
    spans = np.diff(elapsed[ends])
    rates = np.diff(steps[field][ends]) / np.where(spans > 0, spans, np.nan)
    return Series(name, "main", *thin(elapsed[ends][1:], rates))


def _over_time(label: str, series: list[Series], up: Axis) -> Chart | None:
    if max(len(s.x) for s in series) < 2:
        return None
    name, units = X_AXES["elapsed_s"]
    across = axis(name, np.concatenate([s.x for s in series]), snug=True, units=units)
    return draw(label, across, up, [s for s in series if len(s.x)])


def step_size_chart(records: RunRecords) -> Chart | None:
    """The step size by step, None if it never changed."""
    series = _curve("step size", "main", records.steps, "step", "step_size")
    if len(np.unique(series.y)) < 2:
        return None
    return draw("Step size", axis("step", series.x, snug=True), axis("step size", series.y), [series])


def spectra(records: RunRecords) -> list[Chart]:
    """The eigenvalues of the data and of the model preconditioner by index, with rank and mu marked."""
    plan, setup = table(records.run.get("plan")), table(records.run.get("setup"))
    rank = _data_rank(plan, records)
    drawn = [
        _spectrum(
            "Data preconditioner",
            reals(setup.get("data_eigenvalues")),
            rank,
            others=_other_stages(plan, rank),
        ),
        _spectrum(
            "Model preconditioner",
            reals(setup.get("model_eigenvalues")),
            real(plan.get("model_rank")),
            real(setup.get("mu")),
        ),
    ]
    return [chart for chart in drawn if chart]


def _data_rank(plan: Table, records: RunRecords) -> float:
    """How many directions the stage that the fit has come to flattens; the plan's rank for a fit without stages."""
    rows = records.steps.last("rows")
    begun = [stage for stage in _stages(plan) if real(stage.get("first_row")) <= rows]
    return real(begun[-1].get("n_flattened", plan.get("data_rank")) if begun else plan.get("data_rank"))


def _stages(plan: Table) -> list[Table]:
    stages = plan.get("stages")
    return [table(stage) for stage in stages] if isinstance(stages, list) else []


def _other_stages(plan: Table, rank: float) -> list[float]:
    """How many directions the stages before and after the present one flatten."""
    told = {real(stage.get("n_flattened")) for stage in _stages(plan)} - {rank}
    return sorted(n for n in told if n > 0)


def _spectrum(
    label: str, values: Floats, rank: float, mu: float = 0.0, others: Sequence[float] = ()
) -> Chart | None:
    index = np.arange(1.0, len(values) + 1)
    positive = np.isfinite(values) & (values > 0)
    if np.count_nonzero(positive) < 2:
        return None
    # Thinned in log(index), as it is drawn: the few leading eigenvalues fill half of the axis.
    log_index, shown = thin(np.log(index[positive]), values[positive])
    # The basis may have fewer columns than were asked for, where the kernel's rank is numerically lower.
    rank = min(rank, float(len(values)))
    marks = [Mark(f"rank {rank:,.0f}", "rank", x=rank)] if rank > 0 else []
    marks += [Mark(f"μ = {number(mu)}", "level", y=mu)] if mu > 0 else []
    listed = "other stages: " + ", ".join(f"{n:,.0f}" for n in others)
    marks += [Mark(listed, "stage", x=n) for n in others]
    series = Series("eigenvalue", "main", np.exp(log_index), shown)
    across, up = axis("index", index, log=True, snug=True), axis("eigenvalue", shown, log=True)
    return draw(label, across, up, [series], marks)
