"""Where a model errs, summed over batches of rows in memory that does not grow with their number.

For a regression the residuals, y - f(x), and how wide they are where predictions are small and large; for classes which
are taken for which, and whether a row said to be of a class with 80% is so in 80% of cases. For the report, not for
ranking: `scores.py` has the exact figures.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.prediction.scores import nearest_in_simplex

if TYPE_CHECKING:
    from ep3stream.solver.model import Predictor


_MOST_TARGETS = 4

_MOST_CLASSES = 25

_MOST_PAIRS = 20

# A matrix of c^2 counts: 2 MiB at the most.
_MOST_COUNTED_CLASSES = 512

# Predictions, in standard deviations of the fit's y about its mean: linear, what lies beyond in the last cells.
_REACH = 8.0

_PLACES = 256

# Residuals, in the same unit: their logarithm beyond _FINE, so that no range has to be known beforehand.
_FINE = 0.01  # and 10^6 at the most

_WIDTHS = 512

_SHARP_WIDTHS = 8192

_SPAN = np.log1p(1e6 / _FINE)

_GROUPS = 20

_BARS = 41

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)

_BINS = 100

# A share of right rows among fewer than these is mostly chance.
_LEAST_SHARE = 0.05

_LEAST_ROWS = 30

Floats = NDArray[np.float64]

Counts = NDArray[np.int64]


def diagnosis_for(model: Predictor) -> ClassDiagnosis | RegressionDiagnosis:
    """What suits the model's task."""
    if model.class_names is not None:
        return ClassDiagnosis(model.class_names)
    offset, scale = (values.double().numpy() for values in (model.targets.offset, model.targets.scale))
    return RegressionDiagnosis(model.target_names, offset, scale)


class RegressionDiagnosis:
    """Counts of (prediction, residual) for each of the first few targets; 1.1 MiB each.

    offset, scale: of all targets, (c,), the middle and the unit of the grids, not limits: the mean and the standard
    deviation of the fit's own y.
    """

    def __init__(self, names: Sequence[str], offset: Floats, scale: Floats) -> None:
        self._names = tuple(names)[:_MOST_TARGETS]
        self._offset, self._scale = offset[: len(self._names)], scale[: len(self._names)]
        self._grids = np.zeros((len(self._names), _PLACES, _WIDTHS), np.int64)
        self._predicted = np.zeros((len(self._names), _PLACES))
        self._sharp = np.zeros((len(self._names), _SHARP_WIDTHS), np.int64)
        self._squares = np.zeros(len(self._names))

    def add(self, outputs: Floats, y: NDArray[Any]) -> None:
        """Outputs and targets, both (rows, c)."""
        for j, (offset, scale) in enumerate(zip(self._offset, self._scale, strict=True)):
            predicted, residual = outputs[:, j], (y[:, j] - outputs[:, j]) / scale
            at = (predicted - offset) / scale
            place = np.clip((at + _REACH) * (_PLACES / (2 * _REACH)), 0, _PLACES - 1).astype(np.int64)
            cell = place * _WIDTHS + _width_of(residual, _WIDTHS)
            self._grids[j] += np.bincount(cell, minlength=_PLACES * _WIDTHS).reshape(_PLACES, _WIDTHS)
            self._predicted[j] += np.bincount(place, predicted, minlength=_PLACES)
            self._sharp[j] += np.bincount(_width_of(residual, _SHARP_WIDTHS), minlength=_SHARP_WIDTHS)
            self._squares[j] += float(np.square(residual).sum())

    def result(self) -> dict[str, Any]:
        """{"residuals": one object for each target}, as JSON; quantities in the unit of the target.

        histogram: counts of equally wide bars from low to high, with how many rows lie below and above.
        bands: about 20 groups of rows by their prediction; of each the rows, the mean prediction, and the 5, 25, 50,
        75 and 95% quantiles of the residuals, to 7% of their size.
        """
        found = [self._target(j) for j in range(len(self._names))]
        return {"residuals": found}

    def _target(self, j: int) -> dict[str, Any]:
        scale = float(self._scale[j])
        n_rows = int(self._sharp[j].sum())
        rmse = float(np.sqrt(self._squares[j] / max(n_rows, 1)))
        reach = 3.5 * rmse if rmse > 0 else 1.0
        middles = _middles(_SHARP_WIDTHS)
        bars, _ = np.histogram(middles, _BARS, (-reach, reach), weights=self._sharp[j])
        return {
            "target": self._names[j],
            "histogram": {
                "low": -reach * scale,
                "high": reach * scale,
                "counts": bars.astype(np.int64).tolist(),
                "below": int(self._sharp[j][middles < -reach].sum()),
                "above": int(self._sharp[j][middles > reach].sum()),
            },
            "bands": [
                {"rows": rows, "predicted": predicted, "quantiles": [q * scale for q in quantiles]}
                for rows, predicted, quantiles in self._bands(j)
            ],
        }

    def _bands(self, j: int) -> list[tuple[int, float, list[float]]]:
        """Neighbouring places of the grid, joined until a group holds a twentieth of the rows."""
        rows = self._grids[j].sum(1)
        before = np.cumsum(rows) - rows
        group = before * _GROUPS // max(int(rows.sum()), 1)
        bands = []
        for g in np.unique(group[rows > 0]):
            members = group == g
            counts, n_rows = self._grids[j][members].sum(0), int(rows[members].sum())
            predicted = float(self._predicted[j][members].sum()) / n_rows
            bands.append((n_rows, predicted, _quantiles(counts, _middles(_WIDTHS))))
        return bands


class ClassDiagnosis:
    """Counts of (class, predicted class) and of (confidence, right or wrong); O(c^2) memory, c up to 512."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = tuple(class_names)
        n = len(self._names) if len(self._names) <= _MOST_COUNTED_CLASSES else 0
        self._confusion = np.zeros((n, n), np.int64)
        self._rows, self._right = np.zeros(_BINS, np.int64), np.zeros(_BINS, np.int64)
        self._confidence = np.zeros(_BINS)

    def add(self, outputs: Floats, y: NDArray[Any]) -> None:
        """Outputs, (rows, classes), and class ids, (rows,)."""
        predicted, n = outputs.argmax(1), len(self._confusion)
        if n:
            cells = y.astype(np.int64) * n + predicted
            self._confusion += np.bincount(cells, minlength=n * n).reshape(n, n)
        confidence = nearest_in_simplex(outputs).max(1)
        bins = np.minimum((confidence * _BINS).astype(np.int64), _BINS - 1)
        self._rows += np.bincount(bins, minlength=_BINS)
        self._right += np.bincount(bins[predicted == y], minlength=_BINS)
        self._confidence += np.bincount(bins, confidence, minlength=_BINS)

    def result(self) -> dict[str, Any]:
        """confusion, mistakes and calibration, as JSON.

        confusion: counts by class and predicted class, for up to 25 classes. mistakes: the most frequent pairs, for
        up to 512. calibration: of each range of confidences, as wide as it must be to hold a twentieth of the rows,
        how many, the mean confidence (the largest of the probabilities that `KernelClassifier.predict_proba` gives)
        and the share of them that is right.
        """
        few = 0 < len(self._confusion) <= _MOST_CLASSES
        confusion = {"classes": list(self._names), "counts": self._confusion.tolist()} if few else None
        return {"confusion": confusion, "mistakes": self._mistakes(), "calibration": self._calibration()}

    def _calibration(self) -> list[dict[str, Any]]:
        least = max(_LEAST_ROWS, _LEAST_SHARE * self._rows.sum())
        groups: list[Floats] = []
        bins = np.stack([self._rows, self._confidence, self._right], 1)
        for one in bins[self._rows > 0]:
            if groups and groups[-1][0] < least:
                groups[-1] = groups[-1] + one
            else:
                groups.append(one)
        if len(groups) > 1 and groups[-1][0] < least:
            groups[-2:] = [groups[-2] + groups[-1]]
        return [
            {"rows": int(rows), "confidence": float(confidence / rows), "accuracy": float(right / rows)}
            for rows, confidence, right in groups
        ]

    def _mistakes(self) -> list[dict[str, Any]]:
        wrong = self._confusion.copy()
        np.fill_diagonal(wrong, 0)
        order = np.argsort(-wrong, axis=None, kind="stable")[:_MOST_PAIRS]
        of_class = self._confusion.sum(1)
        return [
            {
                "class": self._names[i],
                "predicted": self._names[j],
                "rows": int(wrong[i, j]),
                "of": int(of_class[i]),
            }
            for i, j in zip(*np.unravel_index(order, wrong.shape), strict=True)
            if wrong[i, j]
        ]


def _width_of(residual: Floats, n: int) -> NDArray[np.intp]:
    """The cell of each residual, out of n: even in sign(r) log(1 + |r| / _FINE), zero in the middle."""
    at = np.sign(residual) * np.log1p(np.abs(residual) / _FINE) / _SPAN
    cells: NDArray[np.intp] = np.clip((at + 1) * (n / 2), 0, n - 1).astype(np.intp)
    return cells


def _middles(n: int) -> Floats:
    """The residual in the middle of each of n cells."""
    at = (np.arange(n) + 0.5) * 2 / n - 1
    middles: Floats = np.sign(at) * np.expm1(np.abs(at) * _SPAN) * _FINE
    return middles


def _quantiles(counts: Counts, values: Floats) -> list[float]:
    """QUANTILES of `values` that occur so often; values ascending."""
    reached = np.cumsum(counts)
    places = np.searchsorted(reached, np.array(QUANTILES) * reached[-1])
    return [float(values[min(int(place), len(values) - 1)]) for place in places]
