"""The charts of a fit, each drawn from the run's records; None where the run has nothing to draw."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import replace

import numpy as np

from ep3stream.reporting.curves import (
    COUNTS,
    MOST_POINTS,
    SECONDS,
    Axis,
    Chart,
    Mark,
    Series,
    Units,
    axis,
    draw,
    thin,
)
from ep3stream.reporting.quantities import number
from ep3stream.reporting.records import Floats, RunRecords, Steps, as_floats
from ep3stream.reporting.run_json import as_float

# What the loss is drawn against: the field of a step record -> its name on the page and its units.
X_AXES: Mapping[str, tuple[str, Units]] = {"rows": ("rows seen", COUNTS), "elapsed_s": ("time", SECONDS)}
_MARKED_EVENTS = {"resume": "resumed", "rollback": "rolled back"}
_MOST_MARKS = 40
_MOST_WINDOWS = 120


def step_series(name: str, role: str, steps: Steps, x: str, y: str, most: int = MOST_POINTS) -> Series:
    """One field of the step records against another, as a series of at most `most` points."""
    return Series(name, role, *thin(steps[x], steps[y], most))


def validation_series(
    name: str, role: str, records: RunRecords, x: str, y: str, most: int = MOST_POINTS
) -> Series:
    """A score of the validations against the rows or the time at which they were made."""
    at, scores = (np.array([as_float(v.get(field)) for v in records.validations]) for field in (x, y))
    return Series(name, role, *thin(at, scores, most))


def loss_chart(records: RunRecords, x: str) -> Chart | None:
    """Running, batch and validation loss against `x`, a key of X_AXES; resumes and roll-backs are marked."""
    loss = step_series("running loss", "main", records.steps, x, "loss")
    validation = validation_series("validation", "point", records, x, "mse")
    losses = np.concatenate([loss.y, validation.y])
    if not np.any(losses > 0):
        return None
    name, units = X_AXES[x]
    series = [
        step_series("each batch", "faint", records.steps, x, "batch_loss"),
        *(step_series("taken back", "undone", steps, x, "loss", most=200) for steps in records.undone),
        loss,
        validation,
    ]
    return draw(
        f"Running loss against {name}",
        axis(name, np.concatenate([loss.x, validation.x]), snug=True, units=units),
        # The axis spans the running and the validation loss; single batches and diverging steps may leave it.
        axis("mean squared error", losses, log=True),
        [one for one in series if len(one.x)],
        _event_marks(records, x),
    )


def _event_marks(records: RunRecords, x: str) -> list[Mark]:
    events = [e for e in records.events if str(e.get("event")) in _MARKED_EVENTS][-_MOST_MARKS:]
    at = np.array([as_float(e.get("elapsed_s" if x == "elapsed_s" else "step")) for e in events])
    if x != "elapsed_s" and len(records.steps[x]):
        # Events carry no row count: interpolate between the steps around them.
        at = np.interp(at, records.steps["step"], records.steps[x])
    kinds = [str(e["event"]) for e in events]
    return [Mark(_MARKED_EVENTS[kind], kind, x=float(place)) for kind, place in zip(kinds, at, strict=True)]


def accuracy_chart(records: RunRecords, x: str) -> Chart | None:
    """The percentage of the validation rows that are classified correctly, against `x`, a key of X_AXES."""
    accuracy = validation_series("accuracy", "main", records, x, "accuracy")
    if not len(accuracy.y):
        return None
    accuracy = replace(accuracy, role="main" if len(accuracy.y) > 1 else "point", y=100 * accuracy.y)
    name, units = X_AXES[x]
    # Not from zero: what counts is how much of the remaining error each pass removes.
    is_positive = float(accuracy.y.min()) > 0
    return draw(
        f"Validation accuracy against {name}",
        axis(name, np.concatenate([records.steps[x], accuracy.x]), snug=True, units=units),
        axis("percent right", accuracy.y, log=is_positive),
        [accuracy],
    )


def rate_chart(records: RunRecords) -> Chart | None:
    """Rows per second over time: as logged, and the mean over each window."""
    logged = step_series("as logged", "faint", records.steps, "elapsed_s", "rows_per_s")
    mean = _window_rates("window mean", records.steps, "rows")
    up = axis("rows per second", np.concatenate([logged.y, mean.y, [0.0]]), units=COUNTS)
    return _over_time("Throughput", [logged, mean], up)


def wait_chart(records: RunRecords) -> Chart | None:
    """The percentage of the time spent waiting for data, in each window."""
    waited = _window_rates("waiting for data", records.steps, "wait_s")
    percent = replace(waited, y=np.clip(100 * waited.y, 0, 100))
    return _over_time("Waiting for data", [percent], axis("percent of time", np.array([0.0, 100.0])))


def _window_rates(name: str, steps: Steps, field: str) -> Series:
    """(rise of `field`) / (rise of elapsed_s) over up to _MOST_WINDOWS windows of five steps or more."""
    n, elapsed = len(steps[field]), steps["elapsed_s"]
    n_windows = max(1, min(_MOST_WINDOWS, n // 5))
    ends = np.unique(np.linspace(0, n - 1, n_windows + 1).astype(np.int64)) if n else np.arange(0)
    spans = np.diff(elapsed[ends])
    rates = np.diff(steps[field][ends]) / np.where(spans > 0, spans, np.nan)
    return Series(name, "main", *thin(elapsed[ends][1:], rates))


def _over_time(label: str, series: list[Series], up: Axis) -> Chart | None:
    if max(len(one.x) for one in series) < 2:
        return None
    name, units = X_AXES["elapsed_s"]
    across = axis(name, np.concatenate([one.x for one in series]), snug=True, units=units)
    return draw(label, across, up, [one for one in series if len(one.x)])


def step_size_chart(records: RunRecords) -> Chart | None:
    """The step size by step; None if it never changed."""
    series = step_series("step size", "main", records.steps, "step", "step_size")
    if len(np.unique(series.y)) < 2:
        return None
    return draw("Step size", axis("step", series.x, snug=True), axis("step size", series.y), [series])


def spectrum_charts(records: RunRecords) -> list[Chart]:
    """The eigenvalues of the data and of the model preconditioner by index, with rank and mu marked."""
    plan, setup = records.plan, records.setup
    # The stage that the fit has reached says how many directions are flattened; without stages the plan does.
    begun = [stage for stage in plan.stages if stage.first_row <= records.steps.last("rows")]
    is_staged = bool(begun) and math.isfinite(begun[-1].n_flattened)
    data_rank = begun[-1].n_flattened if is_staged else as_float(plan.data_rank)
    others = {stage.n_flattened for stage in plan.stages if stage.n_flattened > 0} - {data_rank}
    charts = [
        _spectrum_chart(
            "Data preconditioner", as_floats(setup.get("data_eigenvalues")), data_rank, others=sorted(others)
        ),
        _spectrum_chart(
            "Model preconditioner",
            as_floats(setup.get("model_eigenvalues")),
            as_float(plan.model_rank),
            as_float(setup.get("mu")),
        ),
    ]
    return [chart for chart in charts if chart]


def _spectrum_chart(
    label: str, values: Floats, rank: float, mu: float = 0.0, others: Sequence[float] = ()
) -> Chart | None:
    index = np.arange(1.0, len(values) + 1)
    positive = np.isfinite(values) & (values > 0)
    if np.count_nonzero(positive) < 2:
        return None
    # Thinned in log(index), the scale of the axis: the few leading eigenvalues fill half of it.
    log_index, shown = thin(np.log(index[positive]), values[positive])
    # The basis may have fewer columns than the plan asked for, where the kernel's numerical rank is lower.
    rank = min(rank, float(len(values)))
    marks = [Mark(f"rank {rank:,.0f}", "rank", x=rank)] if rank > 0 else []
    marks += [Mark(f"μ = {number(mu)}", "level", y=mu)] if mu > 0 else []
    other_ranks = "other stages: " + ", ".join(f"{n:,.0f}" for n in others)
    marks += [Mark(other_ranks, "stage", x=n) for n in others]
    series = Series("eigenvalue", "main", np.exp(log_index), shown)
    across, up = axis("index", index, log=True, snug=True), axis("eigenvalue", shown, log=True)
    return draw(label, across, up, [series], marks)
