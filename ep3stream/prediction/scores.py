"""Scores of a model, summed over batches of rows in memory that does not grow with their number; probabilities."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

Outputs = NDArray[np.float64]

# The AUC is that of scores rounded to so many leading bits of float32: two histograms of 8 MiB.
_AUC_BITS = 20
_TOP = 5


class RegressionScores:
    """mse and rmse over all rows and targets; r2 = 1 - residual / total sum of squares, averaged over the targets."""

    def __init__(self) -> None:
        self._n = 0
        self._shift: Outputs | None = None
        self._squares: Any = 0.0
        self._sum: Any = 0.0
        self._total: Any = 0.0

    def add(self, outputs: Outputs, y: NDArray[Any]) -> None:
        """Adds rows: their outputs and targets, both (rows, c)."""
        if self._shift is None:
            # Sums of squares about a value near the mean lose few digits by cancellation.
            self._shift = y.mean(0, dtype=np.float64)
        centred = y - self._shift
        self._n += len(y)
        self._squares = self._squares + np.square(outputs - y).sum(0)
        self._sum = self._sum + centred.sum(0)
        self._total = self._total + np.square(centred).sum(0)

    def result(self) -> dict[str, Any]:
        """n, mse, rmse and r2; r2 is nan if a target is constant."""
        mse = self._squares / self._n
        variance = self._total / self._n - np.square(self._sum / self._n)
        with np.errstate(divide="ignore", invalid="ignore"):
            r2 = np.where(variance > 0, 1 - mse / variance, np.nan)
        mean = float(mse.mean())
        return {"n": self._n, "mse": mean, "rmse": mean**0.5, "r2": float(r2.mean())}


class ClassScores:
    """mse against one-hot rows, accuracy, top5 (always 1 for up to five classes), and auc for two classes."""

    def __init__(self, class_names: tuple[str, ...]) -> None:
        self._n_classes = len(class_names)
        self._n = self._hits = self._top_hits = 0
        self._squares = 0.0
        size = 1 << _AUC_BITS if self._n_classes == 2 else 0
        self._histograms = np.zeros((2, size), np.int64)

    def add(self, outputs: Outputs, y: NDArray[Any]) -> None:
        """Adds rows: their outputs, (rows, classes), and their class ids, (rows,)."""
        of_class = np.take_along_axis(outputs, y[:, None].astype(np.int64), 1)[:, 0]
        self._n += len(y)
        # The sum of (outputs - onehot)^2 without the one-hot rows.
        self._squares += float(np.square(outputs).sum() - 2 * of_class.sum() + len(y))
        self._hits += int((outputs.argmax(1) == y).sum())
        self._top_hits += int(((outputs > of_class[:, None]).sum(1) < _TOP).sum())
        if self._n_classes == 2:
            bins = _ordered_bins(outputs[:, 1] - outputs[:, 0])
            for label in (0, 1):
                self._histograms[label] += np.bincount(bins[y == label], minlength=self._histograms.shape[1])

    def result(self) -> dict[str, Any]:
        """n, mse, accuracy, top5, and auc if there are two classes."""
        result = {
            "n": self._n,
            "mse": self._squares / (self._n * self._n_classes),
            "accuracy": self._hits / self._n,
            "top5": self._top_hits / self._n,
        }
        if self._n_classes == 2:
            result["auc"] = self._auc()
        return result

    def _auc(self) -> float:
        """The chance that a row of class 1 scores higher than a row of class 0, ties counted half.

        nan if all rows are of one class.
        """
        negative, positive = self._histograms
        below = np.cumsum(negative) - negative
        pairs = float(negative.sum()) * float(positive.sum())
        return float((positive * (below + negative / 2)).sum() / pairs) if pairs else float("nan")


def _ordered_bins(scores: Outputs) -> NDArray[np.int64]:
    """The leading bits of float32 scores as integers in the same order: 11 bits of precision at any magnitude."""
    bits = (scores.astype(np.float32) + np.float32(0)).view(np.uint32)
    negative = bits >> np.uint32(31) == 1
    ordered = np.where(negative, ~bits, bits | np.uint32(1 << 31))
    return (ordered >> np.uint32(32 - _AUC_BITS)).astype(np.int64)


def nearest_in_simplex(outputs: NDArray[Any]) -> NDArray[Any]:
    """A classifier's outputs, (n, c), as probabilities: each row's nearest point of {p >= 0, sum p = 1}.

    The Euclidean projection of Duchi, Shalev-Shwartz, Singer and Chandra, ICML 2008, figure 1: p_k = max(f_k - t, 0),
    with t from the sorted row. O(n c log c) time.
    """
    values = outputs.astype(np.float64)
    descending = -np.sort(-values, axis=1)
    excess = np.cumsum(descending, axis=1) - 1
    counts = np.arange(1, values.shape[1] + 1)
    n_kept = (descending * counts > excess).sum(1)
    threshold = excess[np.arange(len(values)), n_kept - 1] / n_kept
    nearest: NDArray[Any] = np.maximum(values - threshold[:, None], 0.0).astype(outputs.dtype)
    return nearest
