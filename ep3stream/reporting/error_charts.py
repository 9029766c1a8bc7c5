"""Where the model errs, for the report page: residuals, confusions, calibration, drawn from an evaluation's record."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np

from ep3stream.prediction.diagnosis import QUANTILES
from ep3stream.reporting.curves import Axis, Chart, Floats, Mark, Series, axis, draw
from ep3stream.reporting.records import RunRecords, Table, real, reals, table, texts
from ep3stream.reporting.words import count, judgement, share

_MOST_CLASSES = 25

_MOST_MISTAKES = 10

_MOST_TARGETS = 4

_NAME_WIDTH = 24

Cell = tuple[str, float, str]

"""A count as text, its share of the row in percent, and what it counts, in words."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Rows by class (down) and predicted class (across); each row is (class, cells)."""

    classes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """What the section shows: on which rows, charts in pairs, a matrix or none, the most frequent mistakes."""

    unseen: str
    charts: tuple[Chart, ...]
    confusion: Confusion | None
    mistakes: tuple[tuple[str, str, str, str], ...]


def diagnosis(records: RunRecords) -> Diagnosis | None:
    """That of the evaluation which the headline tells of, or else of the newest that has one."""
    told = [judgement(records), *((_rows_of(e), e) for e in reversed(records.evaluations))]
    for unseen, figures in told:
        if found := table(figures.get("diagnosis")):
            charts = [*_residual_charts(found), *_calibration_chart(found)]
            made = Diagnosis(unseen, tuple(charts), _confusion(found), _mistakes(found))
            return made if charts or made.confusion or made.mistakes else None
    return None


def _rows_of(evaluation: Table) -> str:
    return f"{count(evaluation.get('n'))} {evaluation.get('split', 'evaluated')} rows"


def _residual_charts(found: Table) -> list[Chart]:
    """Of each target the bands and the histogram, in this order, where there are any."""
    targets = [table(one) for one in _items(found.get("residuals"))[:_MOST_TARGETS]]
    charts = []
    for one in targets:
        of = f" of {_short(one.get('target'))}" if len(targets) > 1 else ""
        charts += [c for c in (_bands(one, of), _histogram(table(one.get("histogram")), of)) if c]
    return charts


def _bands(target: Table, of: str) -> Chart | None:
    bands = [table(band) for band in _items(target.get("bands"))]
    kept = [
        (real(band.get("predicted")), quantiles)
        for band in bands
        if len(quantiles := reals(band.get("quantiles"))) == len(QUANTILES)
    ]
    if len(kept) < 2:
        return None
    x, quantiles = np.array([at for at, _ in kept]), np.stack([q for _, q in kept])
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(quantiles)) and x.max() > x.min()):
        return None
    series = [
        _area("nine tenths of the rows", "wide-band", x, quantiles[:, 0], quantiles[:, -1]),
        _area("half of the rows", "band", x, quantiles[:, 1], quantiles[:, -2]),
        Series("median", "main", x, quantiles[:, 2]),
    ]
    return draw(
        f"Residuals{of} by prediction",
        _between("prediction", x),
        axis("truth less prediction", quantiles.ravel()),
        series,
        [Mark("no error", "level", y=0.0)],
    )


def _between(label: str, values: Floats) -> Axis:
    """A linear axis that need not begin at zero: predictions may all be far from it."""
    low, high = float(values.min()), float(values.max())
    if low < 0 or low < 0.5 * high:
        return axis(label, values, snug=True)
    return axis(label, values, log=True, snug=True)


def _area(name: str, role: str, x: Floats, low: Floats, high: Floats) -> Series:
    return Series(name, role, np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]))


def _histogram(bars: Table, of: str) -> Chart | None:
    counts, low, high = reals(bars.get("counts")), real(bars.get("low")), real(bars.get("high"))
    if not (0 < len(counts) <= 1000 and np.all(counts >= 0) and counts.max() > 0 and low < high):
        return None
    if not np.isfinite([low, high, counts.max()]).all():
        return None
    edges = np.repeat(np.linspace(low, high, len(counts) + 1), 2)
    steps = np.concatenate([[0.0], np.repeat(counts, 2), [0.0]])
    beyond = real(bars.get("below")) + real(bars.get("above"))
    told = f"rows ({count(beyond)} more lie beyond)" if beyond > 0 else "rows"
    return draw(
        f"Residuals{of}",
        axis("truth less prediction", np.array([low, high]), snug=True),
        axis(told, counts),
        [Series("rows", "bars", edges, steps)],
        [Mark("no error", "level", x=0.0)],
    )


def _calibration_chart(found: Table) -> list[Chart]:
    bins = [table(one) for one in _items(found.get("calibration"))]
    x, y = (np.array([real(one.get(name)) for one in bins]) for name in ("confidence", "accuracy"))
    known = np.isfinite(x) & np.isfinite(y)
    if np.count_nonzero(known) < 2:
        return []
    diagonal = Series("as often as said", "level", np.array([0.0, 1.0]), np.array([0.0, 1.0]))
    points = Series("of rows with this confidence", "main", x[known], y[known])
    unit = np.array([0.0, 1.0])
    up, across = axis("share that is right", unit, snug=True), axis("confidence", unit, snug=True)
    return [draw("Calibration", across, up, [diagonal, points])]


def _confusion(found: Table) -> Confusion | None:
    content = table(found.get("confusion"))
    names, lines = texts(content.get("classes")), _items(content.get("counts"))
    counts = [reals(line) for line in lines]
    n = len(names)
    if not 2 <= n <= _MOST_CLASSES or len(counts) != n or any(len(line) != n for line in counts):
        return None
    matrix = np.nan_to_num(np.stack(counts), nan=0.0, posinf=0.0, neginf=0.0).clip(0)
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)
    short = tuple(_short(name) for name in names)
    rows = tuple(
        (
            name,
            tuple(
                (
                    count(matrix[i, j]) if matrix[i, j] else "",
                    round(float(shares[i, j]), 1),
                    f"{names[i]} taken for {names[j]}: {share(float(shares[i, j]) / 100)}",
                )
                for j in range(n)
            ),
        )
        for i, name in enumerate(short)
    )
    return Confusion(short, rows)


def _mistakes(found: Table) -> tuple[tuple[str, str, str, str], ...]:
    """(class, what it was taken for, rows, share of the class), most frequent first."""
    told = [table(one) for one in _items(found.get("mistakes"))[:_MOST_MISTAKES]]
    return tuple(
        (_short(m.get("class")), _short(m.get("predicted")), count(m.get("rows")), _part(m))
        for m in told
        if m
    )


def _part(mistake: Table) -> str:
    of = real(mistake.get("of"))
    return share(real(mistake.get("rows")) / of) if of > 0 else ""


def _items(value: Any) -> list[Any]:
    return value if isinstance(value, list) else []


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= _NAME_WIDTH else f"{text[: _NAME_WIDTH - 1]}…"
