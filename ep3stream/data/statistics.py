"""Column statistics of a stream of rows, in one pass and in memory that does not depend on the rows."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.data.manifest import ColumnStatistics

# Rows are taken in float64 blocks of about this size, which stay in a core's cache.
_BLOCK_BYTES = 1 << 20


@dataclass(frozen=True, slots=True)
class Moments:
    """Per column (all of shape (columns,)): finite values seen, their mean, sum of squared deviations, range.

    Moments of two sets of rows merge into the moments of their union by Chan, Golub and LeVeque's formula
    (The American Statistician 37, 1983), which does not cancel where the mean is large and the spread small.
    """

    count: NDArray[np.int64]
    missing: NDArray[np.int64]
    mean: NDArray[np.float64]
    squares: NDArray[np.float64]
    minimum: NDArray[np.float64]
    maximum: NDArray[np.float64]

    @classmethod
    def empty(cls, n_columns: int) -> Moments:
        """The moments of no rows; what merging leaves unchanged."""
        count = np.zeros(n_columns, np.int64)
        zero = np.zeros(n_columns)
        return cls(count, count, zero, zero, np.full(n_columns, np.inf), np.full(n_columns, -np.inf))

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Moments:
        """Moments of rows (n x columns), in float64; a value that is not finite counts as missing."""
        n_columns = rows.shape[1]
        block_rows = max(1, _BLOCK_BYTES // (8 * n_columns))
        total = cls.empty(n_columns)
        for start in range(0, len(rows), block_rows):
            total = total.merge(_block_moments(rows[start : start + block_rows]))
        return total

    def merge(self, other: Moments) -> Moments:
        """Moments of the union of two disjoint sets of rows, in O(columns)."""
        count = self.count + other.count
        weight = other.count / np.maximum(count, 1)
        delta = other.mean - self.mean
        return Moments(
            count=count,
            missing=self.missing + other.missing,
            mean=self.mean + delta * weight,
            squares=self.squares + other.squares + delta * delta * weight * self.count,
            minimum=np.minimum(self.minimum, other.minimum),
            maximum=np.maximum(self.maximum, other.maximum),
        )

    def statistics(self) -> ColumnStatistics:
        """Mean, population standard deviation and range; zeros for a column without any finite value."""
        seen = self.count > 0
        return ColumnStatistics(
            mean=tuple(self.mean.tolist()),
            std=tuple(np.sqrt(self.squares / np.maximum(self.count, 1)).tolist()),
            minimum=tuple(np.where(seen, self.minimum, 0.0).tolist()),
            maximum=tuple(np.where(seen, self.maximum, 0.0).tolist()),
            missing=tuple(self.missing.tolist()),
        )


def _block_moments(rows: NDArray[Any]) -> Moments:
    # Contiguous columns reduce at full speed, and sum pairwise, for one column as for a thousand.
    columns = np.array(rows.T, dtype=np.float64, order="C")
    lost = ~np.isfinite(columns)
    missing = lost.sum(axis=1, dtype=np.int64)
    count = len(rows) - missing
    if missing.any():
        columns[lost] = 0.0
        minimum = np.where(lost, np.inf, columns).min(axis=1)
        maximum = np.where(lost, -np.inf, columns).max(axis=1)
    else:
        minimum, maximum = columns.min(axis=1), columns.max(axis=1)
    mean = columns.sum(axis=1) / np.maximum(count, 1)
    columns -= mean[:, None]
    if missing.any():
        columns[lost] = 0.0
    return Moments(count, missing, mean, np.einsum("ij,ij->i", columns, columns), minimum, maximum)
