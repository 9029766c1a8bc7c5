"""Column statistics of a stream of rows, in one pass and in memory that does not depend on the rows."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.data.manifest import ColumnStatistics

# Rows are taken in float64 blocks of this size: few enough for the cache, many enough to forget the calls.
_BLOCK_BYTES = 1 << 20
_FOLDED_COLUMNS = 256


@dataclass(frozen=True, slots=True)
class Moments:
    """Rows seen and, per column (columns,), their mean, sum of squared deviations and range. All are finite.

    Moments of two sets of rows merge into the moments of their union by Chan, Golub and LeVeque's formula
    (The American Statistician 37, 1983), which does not cancel where the mean is large and the spread small.
    """

    count: int
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]

    @classmethod
    def empty(cls, n_columns: int) -> Moments:
        """The moments of no rows; what merging leaves unchanged."""
        zero = np.zeros(n_columns)
        return cls(0, zero, zero, np.full(n_columns, np.inf), np.full(n_columns, -np.inf))

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Moments:
        """Moments of finite rows (n x columns), in float64."""
        n_columns = rows.shape[1]
        block_rows = max(1, _BLOCK_BYTES // (8 * max(1, n_columns)))
        memory = np.empty((min(block_rows, len(rows)), n_columns))
        total = cls.empty(n_columns)
        for start in range(0, len(rows), block_rows):
            total = total.merge(_block_moments(rows[start : start + block_rows], memory))
        return total

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets of rows, in O(columns)."""
        count = self.count + other.count
        weight = other.count / max(count, 1)
        delta = other.mean - self.mean
        return Moments(
            count=count,
            mean=self.mean + delta * weight,
            squares=self.squares + other.squares + delta * delta * weight * self.count,
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
        )

    def statistics(self, missing: NDArray[np.int64]) -> ColumnStatistics:
        """Mean, population standard deviation and range; `missing`, (columns,), is the caller's count."""
        return ColumnStatistics(
            mean=tuple(self.mean.tolist()),
            std=tuple(np.sqrt(self.squares / max(self.count, 1)).tolist()),
            minimum=tuple(self.minimum.tolist()),
            maximum=tuple(self.maximum.tolist()),
            missing=tuple(missing.tolist()),
        )

    def state(self) -> dict[str, Any]:
        """As JSON; `from_state` gives back every bit."""
        arrays = {name: getattr(self, name) for name in ("mean", "squares", "minimum", "maximum")}
        return {"count": self.count, **{name: array.tolist() for name, array in arrays.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Moments:
        """What `state` gave."""
        arrays = {name: np.array(state[name]) for name in ("mean", "squares", "minimum", "maximum")}
        return cls(state["count"], **arrays)


def _block_moments(rows: NDArray[Any], memory: NDArray[np.float64]) -> Moments:
    """Two passes over rows that stay in the cache."""
    columns = memory[: len(rows)]
    columns[...] = rows
    mean = _over_rows(np.add, columns) / len(rows)
    columns -= mean
    np.multiply(columns, columns, out=columns)
    lowest, highest = (_over_rows(extreme, rows).astype(np.float64) for extreme in (np.minimum, np.maximum))
    return Moments(len(rows), mean, _over_rows(np.add, columns), lowest, highest)


def _over_rows(operation: np.ufunc, rows: NDArray[Any]) -> NDArray[Any]:
    """operation.reduce(rows, axis=0); several rows are taken as one, so that a pass has long runs for any width.

    Not as a product with ones: BLAS would call its threads, which then wait in circles for the next block.
    """
    n_rows, n_columns = rows.shape
    folds = max(1, min(n_rows, _FOLDED_COLUMNS // max(1, n_columns)))
    whole = n_rows // folds * folds
    folded = operation.reduce(rows[:whole].reshape(-1, folds * n_columns), axis=0)
    found: NDArray[Any] = operation.reduce(folded.reshape(folds, n_columns), axis=0)
    if whole < n_rows:
        found = operation(found, operation.reduce(rows[whole:], axis=0))
    return found
