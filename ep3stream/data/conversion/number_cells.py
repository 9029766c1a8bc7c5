"""Numbers on their way into rows: cast row by row, checked, averaged, and their rounding measured."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.data.conversion.codebook import Place
from ep3stream.data.conversion.finite import all_finite
from ep3stream.errors import SourceError

# Of one block: what is written is read again for its check while it is in the cache.
_BLOCK_BYTES = 1 << 17


def fill(out: NDArray[Any], pieces: Sequence[NDArray[Any]]) -> bool:
    """Cast pieces, (b,) or (b, k) each, into the columns of out, (b, d), left to right; whether all are finite.

    An overflow becomes infinite. One pass: block by block, so that columns are turned into rows in the cache.
    """
    block_rows = max(16, _BLOCK_BYTES // max(1, out.strides[0]))
    targets = list(_columns(out, pieces))
    finite = True
    with np.errstate(over="ignore", under="ignore", invalid="ignore"):
        for start in range(0, len(out), block_rows):
            rows = slice(start, start + block_rows)
            for columns, piece in targets:
                columns[rows] = piece[rows]
            finite = finite and all_finite(out[rows])
    return finite


def _columns(
    out: NDArray[Any], pieces: Sequence[NDArray[Any]]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """Each piece with its place in `out`, of the same shape: (b,) is much faster to fill than (b, 1)."""
    first = 0
    for piece in pieces:
        width = 1 if piece.ndim == 1 else piece.shape[1]
        yield (out[:, first] if piece.ndim == 1 else out[:, first : first + width]), piece
        first += width


def missing_cells(
    out: NDArray[Any], pieces: Sequence[NDArray[Any]], names: Sequence[str], where: Place
) -> NDArray[np.bool_]:
    """Which cells of filled `out` are missing, (b, d); raises SourceError for an infinite one, by name.

    What is missing becomes the one usual NaN, so that equal rows have equal bits.
    """
    missing: NDArray[np.bool_] = np.isnan(out)
    infinite = np.isinf(out)
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        value = np.concatenate([piece[row].reshape(-1) for piece in pieces])[column]
        raise SourceError(_not_finite(where.of(names[column], int(row)), value, out.dtype))
    out[missing] = np.nan
    return missing


def _not_finite(place: str, value: Any, dtype: np.dtype[Any]) -> str:
    if np.isfinite(value):
        remedy = "use --dtype float32 or scale the column" if dtype == np.float16 else "scale the column"
        return f"{place}: {value} is beyond {np.finfo(dtype).max}, the largest {dtype}; {remedy}"
    return f"{place}: the value is not finite ({value}); correct it or leave the row out"


class ColumnMeans:
    """Count and sum of each column's values, in float64, added row after row.

    The order of the additions, and so the last bit, does not depend on where batches begin and end.
    """

    def __init__(self, n_columns: int) -> None:
        self.count = np.zeros(n_columns, np.int64)
        # The last column stays 0: of a single column numpy would add pairs, in an order of its own.
        self._total = np.zeros(n_columns + 1)

    def add(self, x: NDArray[Any]) -> None:
        """The rows of x, (m, k); NaN is skipped."""
        block_rows = max(16, _BLOCK_BYTES // (8 * len(self._total)))
        for start in range(0, len(x), block_rows):
            rows = x[start : start + block_rows]
            missing = np.isnan(rows)
            terms = np.zeros((1 + len(rows), len(self._total)))
            terms[0] = self._total
            terms[1:, :-1] = np.where(missing, 0, rows)
            self._total = np.add.reduce(terms, axis=0)
            self.count += len(rows) - np.count_nonzero(missing, axis=0)

    def means(self) -> NDArray[np.float64]:
        """(k,), NaN for a column without a value."""
        means = np.full(len(self.count), np.nan)
        np.divide(self._total[:-1], self.count, out=means, where=self.count > 0)
        return means

    def state(self) -> dict[str, Any]:
        """For `restore`; JSON keeps every bit of a float."""
        return {"count": self.count.tolist(), "total": self._total.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self.count, self._total = np.array(state["count"], np.int64), np.array(state["total"], np.float64)


class Rounding:
    """What storing numbers as float16 loses, by column, over all values that were read.

    relative: largest |stored - value| / |value| of what is not stored as 0; underflows: values not 0 stored as
    0; shift, sums: n, sum(v - shift), sum((v - shift)^2), sum((stored - v)^2), for the spread and the error.
    """

    def __init__(self, n_columns: int) -> None:
        self._relative = np.zeros(n_columns)
        self._underflows = np.zeros(n_columns, np.int64)
        self._shift: NDArray[np.float64] | None = None
        self._sums = np.zeros((4, n_columns))

    def add(self, pieces: Sequence[NDArray[Any]], stored: NDArray[Any]) -> None:
        """Values as they were read, (b,) or (b, k) each, and as they are stored, (b, d)."""
        block_rows = max(16, _BLOCK_BYTES // (8 * max(1, stored.shape[1])))
        for start in range(0, len(stored), block_rows):
            rows = slice(start, start + block_rows)
            values = np.empty(stored[rows].shape)
            for columns, piece in _columns(values, [piece[rows] for piece in pieces]):
                columns[...] = piece
            self._add_block(values, stored[rows].astype(np.float64))

    def _add_block(self, values: NDArray[np.float64], stored: NDArray[np.float64]) -> None:
        if self._shift is None:
            self._shift = np.nan_to_num(values[0])
        missing = np.isnan(values)
        if has_missing := bool(missing.any()):
            values = np.where(missing, self._shift, values)
            stored = np.where(missing, self._shift, stored)
        size, error = np.abs(values), np.abs(stored - values)
        # Where the value is 0 the error is 0 too.
        relative = error / np.maximum(size, np.finfo(np.float64).tiny)
        underflows = (stored == 0) & (size > 0)
        if underflows.any():
            relative[underflows] = 0
            self._underflows += np.count_nonzero(underflows, axis=0)
        np.maximum(self._relative, relative.max(axis=0), out=self._relative)
        centred = values - self._shift
        count = len(values) - np.count_nonzero(missing, axis=0) if has_missing else len(values)
        squares = [np.einsum("ij,ij->j", one, one) for one in (centred, error)]
        self._sums += np.stack([np.broadcast_to(count, self._relative.shape), centred.sum(axis=0), *squares])

    def report(self, names: Sequence[str]) -> dict[str, Any]:
        """The largest relative error, the column it is in, and how many values underflowed to 0."""
        worst = int(np.argmax(self._relative))
        return {
            "max_relative_error": float(self._relative[worst]),
            "column": names[worst],
            "underflows": int(self._underflows.sum()),
        }

    def error_per_std(self) -> NDArray[np.float64]:
        """Root mean square of the error over the standard deviation, (d,); 0 for a constant column."""
        count, total, square, error = self._sums
        variance = square - total**2 / np.maximum(count, 1)
        # Less than this is what cancellation leaves of a constant column.
        known = variance > 1e-12 * square
        return np.sqrt(np.divide(error, variance, out=np.zeros_like(error), where=known))

    def state(self) -> dict[str, Any]:
        """For `restore`."""
        return {
            "relative": self._relative.tolist(),
            "underflows": self._underflows.tolist(),
            "shift": None if self._shift is None else self._shift.tolist(),
            "sums": self._sums.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from a `state`."""
        self._relative = np.array(state["relative"], np.float64)
        self._underflows = np.array(state["underflows"], np.int64)
        self._shift = None if state["shift"] is None else np.array(state["shift"], np.float64)
        self._sums = np.array(state["sums"], np.float64)
