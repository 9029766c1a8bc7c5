"""Where the model errs: residuals, confusions and calibration, drawn from the diagnosis of an evaluation."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ep3stream.prediction.diagnosis import QUANTILES
from ep3stream.reporting.curves import Axis, Chart, Mark, Series, axis, draw
from ep3stream.reporting.quantities import count, percent
from ep3stream.reporting.records import Floats, RunRecords, as_floats
from ep3stream.reporting.run_json import Record, as_float, as_list, as_record, as_texts
from ep3stream.reporting.summary import headline_scores

_MOST_CLASSES = 25
_MOST_MISTAKES = 10
_MOST_TARGETS = 4
_NAME_WIDTH = 24

Cell = tuple[str, float, str]
"""A count as text, its share of the table's row in percent, and both in words."""


@dataclass(frozen=True, slots=True)
class Confusion:
    """Rows by class (down) and predicted class (across); each row is (class, cells)."""

    classes: tuple[str, ...]
    rows: tuple[tuple[str, tuple[Cell, ...]], ...]


@dataclass(frozen=True, slots=True)
class Diagnosis:
    """The section of the page: the name of the rows, charts in pairs, a confusion matrix, frequent mistakes."""

    rows_name: str
    charts: tuple[Chart, ...]
    confusion: Confusion | None
    mistakes: tuple[tuple[str, str, str, str], ...]


def diagnosis(records: RunRecords) -> Diagnosis | None:
    """The diagnosis in the evaluation of the headline, or else in the newest evaluation that has one."""
    by_age = [
        (f"{count(e.get('n'))} {e.get('split', 'evaluated')} rows", e) for e in reversed(records.evaluations)
    ]
    for rows_name, scores in (headline_scores(records), *by_age):
        if recorded := as_record(scores.get("diagnosis")):
            charts = [*_residual_charts(recorded), *_calibration_chart(recorded)]
            shown = Diagnosis(rows_name, tuple(charts), _confusion(recorded), _mistakes(recorded))
            return shown if charts or shown.confusion or shown.mistakes else None
    return None


def _residual_charts(recorded: Record) -> list[Chart]:
    """For each target its bands and its histogram, in this order, where it has them."""
    targets = [as_record(target) for target in as_list(recorded.get("residuals"))[:_MOST_TARGETS]]
    charts = []
    for target in targets:
        of_target = f" of {_short(target.get('target'))}" if len(targets) > 1 else ""
        pair = (_bands(target, of_target), _histogram(as_record(target.get("histogram")), of_target))
        charts += [chart for chart in pair if chart]
    return charts


def _bands(target: Record, of_target: str) -> Chart | None:
    bands = [
        (as_float(band.get("predicted")), quantiles)
        for band in map(as_record, as_list(target.get("bands")))
        if len(quantiles := as_floats(band.get("quantiles"))) == len(QUANTILES)
    ]
    if len(bands) < 2:
        return None
    x, quantiles = np.array([predicted for predicted, _ in bands]), np.stack([q for _, q in bands])
    if not (np.all(np.isfinite(x)) and np.all(np.isfinite(quantiles)) and x.max() > x.min()):
        return None
    series = [
        _area("nine tenths of the rows", "wide-band", x, quantiles[:, 0], quantiles[:, -1]),
        _area("half of the rows", "band", x, quantiles[:, 1], quantiles[:, -2]),
        Series("median", "main", x, quantiles[:, 2]),
    ]
    return draw(
        f"Residuals{of_target} by prediction",
        _prediction_axis(x),
        axis("truth less prediction", quantiles.ravel()),
        series,
        [Mark("no error", "level", y=0.0)],
    )


def _prediction_axis(predicted: Floats) -> Axis:
    """Logarithmic where all predictions are far from zero, at which a linear axis would begin."""
    low, high = float(predicted.min()), float(predicted.max())
    return axis("prediction", predicted, log=low >= 0 and low >= 0.5 * high, snug=True)


def _area(name: str, role: str, x: Floats, low: Floats, high: Floats) -> Series:
    return Series(name, role, np.concatenate([x, x[::-1]]), np.concatenate([high, low[::-1]]))


def _histogram(bars: Record, of_target: str) -> Chart | None:
    counts, low, high = as_floats(bars.get("counts")), as_float(bars.get("low")), as_float(bars.get("high"))
    if not (0 < len(counts) <= 1000 and np.all(counts >= 0) and counts.max() > 0 and low < high):
        return None
    if not np.isfinite([low, high, counts.max()]).all():
        return None
    edges = np.repeat(np.linspace(low, high, len(counts) + 1), 2)
    heights = np.concatenate([[0.0], np.repeat(counts, 2), [0.0]])
    beyond = as_float(bars.get("below")) + as_float(bars.get("above"))
    return draw(
        f"Residuals{of_target}",
        axis("truth less prediction", np.array([low, high]), snug=True),
        axis(f"rows ({count(beyond)} more lie beyond)" if beyond > 0 else "rows", counts),
        [Series("rows", "bars", edges, heights)],
        [Mark("no error", "level", x=0.0)],
    )


def _calibration_chart(recorded: Record) -> list[Chart]:
    bins = [as_record(item) for item in as_list(recorded.get("calibration"))]
    x, y = (np.array([as_float(item.get(name)) for item in bins]) for name in ("confidence", "accuracy"))
    known = np.isfinite(x) & np.isfinite(y)
    if np.count_nonzero(known) < 2:
        return []
    unit = np.array([0.0, 1.0])
    series = [
        Series("as often as said", "level", unit, unit),
        Series("of rows with this confidence", "main", x[known], y[known]),
    ]
    across, up = axis("confidence", unit, snug=True), axis("share that is right", unit, snug=True)
    return [draw("Calibration", across, up, series)]


def _confusion(recorded: Record) -> Confusion | None:
    content = as_record(recorded.get("confusion"))
    names = as_texts(content.get("classes"))
    counts = [as_floats(line) for line in as_list(content.get("counts"))]
    n = len(names)
    if not 2 <= n <= _MOST_CLASSES or len(counts) != n or any(len(line) != n for line in counts):
        return None
    matrix = np.nan_to_num(np.stack(counts), nan=0.0, posinf=0.0, neginf=0.0).clip(0)
    shares = 100 * matrix / np.maximum(matrix.sum(1, keepdims=True), 1)

    def cell(i: int, j: int) -> Cell:
        share = float(shares[i, j])
        text = count(matrix[i, j]) if matrix[i, j] else ""
        return text, round(share, 1), f"{names[i]} taken for {names[j]}: {percent(share / 100)}"

    short = tuple(map(_short, names))
    return Confusion(short, tuple((short[i], tuple(cell(i, j) for j in range(n))) for i in range(n)))


def _mistakes(recorded: Record) -> tuple[tuple[str, str, str, str], ...]:
    """(class, predicted class, rows, their share of the class), most frequent first."""
    pairs = [as_record(item) for item in as_list(recorded.get("mistakes"))[:_MOST_MISTAKES]]

    def share(pair: Record) -> str:
        of_class = as_float(pair.get("of"))
        return percent(as_float(pair.get("rows")) / of_class) if of_class > 0 else ""

    return tuple(
        (_short(pair.get("class")), _short(pair.get("predicted")), count(pair.get("rows")), share(pair))
        for pair in pairs
        if pair
    )


def _short(name: object) -> str:
    text = str(name)
    return text if len(text) <= _NAME_WIDTH else f"{text[: _NAME_WIDTH - 1]}…"
