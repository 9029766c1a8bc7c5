"""Where a model errs, summed over batches of rows in memory that does not grow with their number.

For regression: the residuals, y - f(x), and their spread where predictions are small and large. For classification:
which classes are confused, and whether rows with a confidence of 80% are classified correctly in 80% of the cases.
These figures are rounded, for the report; `scores.py` has the exact scores.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import TYPE_CHECKING, Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.prediction.scores import nearest_in_simplex

if TYPE_CHECKING:
    from ep3stream.solver.model import Predictor

Floats = NDArray[np.float64]

Counts = NDArray[np.int64]

QUANTILES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MOST_TARGETS = 4
_MOST_CLASSES = 25
_MOST_PAIRS = 20

# A matrix of c^2 counts: 2 MiB at most.
_MOST_COUNTED_CLASSES = 512

# Bins of predictions: linear, up to so many standard deviations of the fit's y from its mean; the outermost are open.
_REACH = 8.0
_PREDICTION_BINS = 256

# Bins of residuals, in standard deviations of the fit's y: linear below _FINE and logarithmic beyond it, up to 10^6, so
# that their range need not be known in advance. Fewer bins for each bin of predictions, more for all rows together.
_FINE = 0.01
_LOG_RANGE = np.log1p(1e6 / _FINE)
_RESIDUAL_BINS = 512
_FINE_RESIDUAL_BINS = 8192

# Groups of predictions and bars of the histogram, as reported.
_GROUPS = 20
_BARS = 41
_CONFIDENCE_BINS = 100

# Bins of confidence are joined until they hold this share of the rows and this many: fewer are mostly chance.
_LEAST_SHARE = 0.05
_LEAST_ROWS = 30


def diagnosis_for(model: Predictor) -> ClassDiagnosis | RegressionDiagnosis:
    """An empty diagnosis of the kind that suits the model's task."""
    if model.class_names is not None:
        return ClassDiagnosis(model.class_names)
    offset, scale = (values.double().numpy() for values in (model.targets.offset, model.targets.scale))
    shown = np.zeros_like(offset) if model.offsets is None else model.offsets.y
    return RegressionDiagnosis(model.target_names, offset, scale, shown)


class RegressionDiagnosis:
    """Counts of predictions and residuals for each of the first few targets; 1.1 MiB each.

    offset, scale: (c,), the mean and the standard deviation of the fit's y, from which the bins are laid out.
    shown: (c,), what is added to predictions where they are reported; 0 by default.
    """

    def __init__(
        self, names: Sequence[str], offset: Floats, scale: Floats, shown: Floats | None = None
    ) -> None:
        shown = np.zeros_like(offset) if shown is None else shown
        targets = list(zip(names, offset, scale, shown, strict=True))[:_MOST_TARGETS]
        self._targets = [_TargetDiagnosis(*target) for target in targets]

    def add(self, outputs: Floats, y: NDArray[Any]) -> None:
        """Adds rows: their outputs and targets, both (rows, c)."""
        for j, target in enumerate(self._targets):
            target.add(outputs[:, j], y[:, j])

    def result(self) -> dict[str, Any]:
        """{"residuals": one object for each target}, as JSON; quantities in the unit of the target.

        histogram: counts of bars of equal width from `low` to `high`, and the numbers of rows below and above.
        bands: about 20 groups of rows by their prediction, each with the number of rows, the mean prediction, and the
        5, 25, 50, 75 and 95% quantiles of the residuals, to 7% of their size.
        """
        return {"residuals": [target.result() for target in self._targets]}


class _TargetDiagnosis:
    def __init__(self, name: str, offset: float, scale: float, shown: float) -> None:
        self._name, self._offset, self._scale, self._shown = name, offset, scale, float(shown)
        self._counts = np.zeros((_PREDICTION_BINS, _RESIDUAL_BINS), np.int64)
        self._predicted = np.zeros(_PREDICTION_BINS)
        self._fine_counts = np.zeros(_FINE_RESIDUAL_BINS, np.int64)
        self._squares = 0.0

    def add(self, predicted: Floats, y: NDArray[Any]) -> None:
        residual = (y - predicted) / self._scale
        at = ((predicted - self._offset) / self._scale + _REACH) * (_PREDICTION_BINS / (2 * _REACH))
        bins = np.clip(at, 0, _PREDICTION_BINS - 1).astype(np.int64)
        cells = bins * _RESIDUAL_BINS + _residual_bins(residual, _RESIDUAL_BINS)
        self._counts += np.bincount(cells, minlength=self._counts.size).reshape(self._counts.shape)
        self._predicted += np.bincount(bins, predicted, minlength=_PREDICTION_BINS)
        fine_bins = _residual_bins(residual, _FINE_RESIDUAL_BINS)
        self._fine_counts += np.bincount(fine_bins, minlength=_FINE_RESIDUAL_BINS)
        self._squares += float(np.square(residual).sum())

    def result(self) -> dict[str, Any]:
        scale, counts = float(self._scale), self._fine_counts
        rmse = float(np.sqrt(self._squares / max(int(counts.sum()), 1)))
        reach = 3.5 * rmse if rmse > 0 else 1.0
        centers = _bin_centers(_FINE_RESIDUAL_BINS)
        bars, _ = np.histogram(centers, _BARS, (-reach, reach), weights=counts)
        return {
            "target": self._name,
            "histogram": {
                "low": -reach * scale,
                "high": reach * scale,
                "counts": bars.astype(np.int64).tolist(),
                "below": int(counts[centers < -reach].sum()),
                "above": int(counts[centers > reach].sum()),
            },
            "bands": self._bands(scale),
        }

    def _bands(self, scale: float) -> list[dict[str, Any]]:
        """Neighbouring bins of predictions, joined until a group holds a twentieth of the rows."""
        rows = self._counts.sum(1)
        group_of_bin = (np.cumsum(rows) - rows) * _GROUPS // max(int(rows.sum()), 1)
        bands = []
        for group in np.unique(group_of_bin[rows > 0]):
            members = group_of_bin == group
            n_rows = int(rows[members].sum())
            quantiles = _quantiles(self._counts[members].sum(0), _bin_centers(_RESIDUAL_BINS))
            bands.append(
                {
                    "rows": n_rows,
                    "predicted": float(self._predicted[members].sum()) / n_rows + self._shown,
                    "quantiles": [quantile * scale for quantile in quantiles],
                }
            )
        return bands


class ClassDiagnosis:
    """Counts of (class, predicted class), O(c^2) memory for c up to 512, and of rows by confidence."""

    def __init__(self, class_names: Sequence[str]) -> None:
        self._names = tuple(class_names)
        n = len(self._names) if len(self._names) <= _MOST_COUNTED_CLASSES else 0
        self._confusion = np.zeros((n, n), np.int64)
        self._rows, self._right = np.zeros(_CONFIDENCE_BINS, np.int64), np.zeros(_CONFIDENCE_BINS, np.int64)
        self._confidence = np.zeros(_CONFIDENCE_BINS)

    def add(self, outputs: Floats, y: NDArray[Any]) -> None:
        """Adds rows: their outputs, (rows, classes), and their class ids, (rows,)."""
        predicted, n = outputs.argmax(1), len(self._confusion)
        if n:
            cells = y.astype(np.int64) * n + predicted
            self._confusion += np.bincount(cells, minlength=n * n).reshape(n, n)
        confidence = nearest_in_simplex(outputs).max(1)
        bins = np.minimum((confidence * _CONFIDENCE_BINS).astype(np.int64), _CONFIDENCE_BINS - 1)
        self._rows += np.bincount(bins, minlength=_CONFIDENCE_BINS)
        self._right += np.bincount(bins[predicted == y], minlength=_CONFIDENCE_BINS)
        self._confidence += np.bincount(bins, confidence, minlength=_CONFIDENCE_BINS)

    def result(self) -> dict[str, Any]:
        """confusion, mistakes and calibration, as JSON.

        confusion: counts by class and predicted class, for up to 25 classes. mistakes: the most frequent pairs of
        them, for up to 512 classes. calibration: for each range of confidences, wide enough to hold a twentieth of the
        rows, the number of rows, their mean confidence, and the share that is classified correctly. The confidence of
        a row is the largest of the probabilities that `KernelClassifier.predict_proba` gives.
        """
        few = 0 < len(self._confusion) <= _MOST_CLASSES
        confusion = {"classes": list(self._names), "counts": self._confusion.tolist()} if few else None
        return {"confusion": confusion, "mistakes": self._mistakes(), "calibration": self._calibration()}

    def _calibration(self) -> list[dict[str, Any]]:
        least = max(_LEAST_ROWS, _LEAST_SHARE * self._rows.sum())
        groups: list[Floats] = []
        bins = np.stack([self._rows, self._confidence, self._right], 1)
        for sums in bins[self._rows > 0]:
            if groups and groups[-1][0] < least:
                groups[-1] = groups[-1] + sums
            else:
                groups.append(sums)
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


def _residual_bins(residual: Floats, n: int) -> NDArray[np.intp]:
    """The bin of each residual r, out of n: of equal width in sign(r) log(1 + |r| / _FINE), with 0 in the middle."""
    at = np.sign(residual) * np.log1p(np.abs(residual) / _FINE) / _LOG_RANGE
    bins: NDArray[np.intp] = np.clip((at + 1) * (n / 2), 0, n - 1).astype(np.intp)
    return bins


def _bin_centers(n: int) -> Floats:
    """The residual in the middle of each of n bins."""
    at = (np.arange(n) + 0.5) * 2 / n - 1
    centers: Floats = np.sign(at) * np.expm1(np.abs(at) * _LOG_RANGE) * _FINE
    return centers


def _quantiles(counts: Counts, values: Floats) -> list[float]:
    """The QUANTILES of ascending `values`, each of which occurs `counts` times."""
    cumulated = np.cumsum(counts)
    places = np.searchsorted(cumulated, np.array(QUANTILES) * cumulated[-1])
    return [float(values[min(int(place), len(values) - 1)]) for place in places]
