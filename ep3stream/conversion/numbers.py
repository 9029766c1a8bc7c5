"""Numbers on their way into rows: cast, checked and averaged, the loss of float16 measured, columns summarised.

NaN is a missing value: `missing_cells` finds it, `ColumnMeans` and `Rounding` skip it. An infinite number, also
one that a cast made infinite, is a SourceError. All run in one pass and in memory that does not depend on the rows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.errors import SourceError
from ep3stream.formats.source import BatchOrigin
from ep3stream.store.manifest import ColumnStatistics

# Values that are checked at a time.
_BLOCK = 1 << 16
_FLOAT16_EXPONENT = np.uint16(0x7C00)

# Of rows that are cast at a time: what is written is read again for its check while it is in the cache.
_BLOCK_BYTES = 1 << 17

# Moments take float64 blocks of this size: few enough rows for the cache, many enough to forget the calls.
_MOMENTS_BLOCK_BYTES = 1 << 20
_FOLDED_COLUMNS = 256


def all_finite(values: NDArray[Any]) -> bool:
    """Whether a C-contiguous array holds neither NaN nor infinity."""
    if values.dtype.kind != "f":
        return True
    flat = values.reshape(-1)
    with np.errstate(over="ignore", invalid="ignore"):
        return all(_is_finite(flat[start : start + _BLOCK]) for start in range(0, flat.size, _BLOCK))


def _is_finite(block: NDArray[Any]) -> bool:
    if block.dtype == np.float16:
        return bool(((block.view(np.uint16) & _FLOAT16_EXPONENT) != _FLOAT16_EXPONENT).all())
    # A sum is the fastest pass over numbers. A finite sum has finite terms; an infinite one may have them too.
    return bool(np.isfinite(np.add.reduce(block)) or np.isfinite(block).all())


def _ignored(kind: str, flag: int) -> None:
    """An underflow that nobody asks about."""


def fill(
    out: NDArray[Any], pieces: Sequence[NDArray[Any]], on_underflow: Callable[[str, int], None] | None = None
) -> bool:
    """Cast pieces, (b,) or (b, k) each, into the columns of out, (b, d), left to right; True if all are finite.

    An overflow becomes infinite. `on_underflow` is called if a value is too near to 0 for all of its digits, which the
    processor notices for nothing. One pass: block by block, so that columns are turned into rows in the cache.
    """
    block_rows = max(16, _BLOCK_BYTES // max(1, out.strides[0]))
    targets = list(_columns(out, pieces))
    finite = True
    with np.errstate(over="ignore", under="call", invalid="ignore", call=on_underflow or _ignored):
        for start in range(0, len(out), block_rows):
            rows = slice(start, start + block_rows)
            for columns, piece in targets:
                columns[rows] = piece[rows]
            finite = finite and all_finite(out[rows])
    return finite


def _columns(
    out: NDArray[Any], pieces: Sequence[NDArray[Any]]
) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
    """The columns of `out` that each piece fills, with the piece; (b,) is much faster to fill than (b, 1)."""
    first = 0
    for piece in pieces:
        width = 1 if piece.ndim == 1 else piece.shape[1]
        yield (out[:, first] if piece.ndim == 1 else out[:, first : first + width]), piece
        first += width


def missing_cells(
    out: NDArray[Any], pieces: Sequence[NDArray[Any]], names: Sequence[str], where: BatchOrigin
) -> NDArray[np.bool_]:
    """Which cells of filled `out` are missing, (b, d); raises SourceError, which names an infinite one.

    Every missing cell is set to the usual NaN, so that equal rows have equal bits.
    """
    missing: NDArray[np.bool_] = np.isnan(out)
    infinite = np.isinf(out)
    if infinite.any():
        row, column = np.argwhere(infinite)[0]
        value = np.concatenate([piece[row].reshape(-1) for piece in pieces])[column]
        raise SourceError(_not_finite(where.cell(names[column], int(row)), value, out.dtype))
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
        """Add the rows of x, (m, k); NaN is skipped."""
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
        """The mean of each column, (k,); NaN for a column without a value."""
        means = np.full(len(self.count), np.nan)
        np.divide(self._total[:-1], self.count, out=means, where=self.count > 0)
        return means

    def state(self) -> dict[str, Any]:
        """Counts and sums as JSON for `restore`; JSON keeps every bit of a float."""
        return {"count": self.count.tolist(), "total": self._total.tolist()}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier `state`."""
        self.count, self._total = np.array(state["count"], np.int64), np.array(state["total"], np.float64)


class Rounding:
    """The error of storing numbers as float16, by column, over all values that were read.

    _relative: the largest |stored - value| / |value| of values that are not stored as 0.
    _underflows: how many values other than 0 are stored as 0.
    _shift, _sums: the first value v0, and n, sum(v - v0), sum((v - v0)^2), sum((stored - v)^2), from which the
    spread of the column and the mean square error follow.
    """

    def __init__(self, n_columns: int) -> None:
        self._relative = np.zeros(n_columns)
        self._underflows = np.zeros(n_columns, np.int64)
        self._shift: NDArray[np.float64] | None = None
        self._sums = np.zeros((4, n_columns))

    def add(self, pieces: Sequence[NDArray[Any]], stored: NDArray[Any]) -> None:
        """Add values as they were read, (b,) or (b, k) each, and as they are stored, (b, d)."""
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
        """All sums as JSON for `restore`; JSON keeps every bit of a float."""
        return {
            "relative": self._relative.tolist(),
            "underflows": self._underflows.tolist(),
            "shift": None if self._shift is None else self._shift.tolist(),
            "sums": self._sums.tolist(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier `state`."""
        self._relative = np.array(state["relative"], np.float64)
        self._underflows = np.array(state["underflows"], np.int64)
        self._shift = None if state["shift"] is None else np.array(state["shift"], np.float64)
        self._sums = np.array(state["sums"], np.float64)


@dataclass(frozen=True, slots=True)
class Moments:
    """The number of rows seen and, for each column, mean, sum of squared deviations and range, (columns,).

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
        """The moments of no rows; merging them changes nothing."""
        zero = np.zeros(n_columns)
        return cls(0, zero, zero, np.full(n_columns, np.inf), np.full(n_columns, -np.inf))

    @classmethod
    def of(cls, rows: NDArray[Any]) -> Moments:
        """Moments of finite rows (n x columns), in float64."""
        n_columns = rows.shape[1]
        block_rows = max(1, _MOMENTS_BLOCK_BYTES // (8 * max(1, n_columns)))
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
        """The moments as JSON; `from_state` gives back every bit."""
        arrays = {name: getattr(self, name) for name in ("mean", "squares", "minimum", "maximum")}
        return {"count": self.count, **{name: array.tolist() for name, array in arrays.items()}}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> Moments:
        """The moments from the JSON of `state`."""
        arrays = {name: np.array(state[name]) for name in ("mean", "squares", "minimum", "maximum")}
        return cls(state["count"], **arrays)


def _block_moments(rows: NDArray[Any], memory: NDArray[np.float64]) -> Moments:
    """The moments of one block, in two passes over rows that stay in the cache."""
    columns = memory[: len(rows)]
    columns[...] = rows
    mean = _over_rows(np.add, columns) / len(rows)
    columns -= mean
    np.multiply(columns, columns, out=columns)
    lowest, highest = (_over_rows(extreme, rows).astype(np.float64) for extreme in (np.minimum, np.maximum))
    return Moments(len(rows), mean, _over_rows(np.add, columns), lowest, highest)


def _over_rows(operation: np.ufunc, rows: NDArray[Any]) -> NDArray[Any]:
    """operation.reduce(rows, axis=0), with several rows taken as one, so that a pass has long runs for any width.

    A product with ones would be slower: BLAS wakes its threads, which then spin until the next block.
    """
    n_rows, n_columns = rows.shape
    folds = max(1, min(n_rows, _FOLDED_COLUMNS // max(1, n_columns)))
    whole = n_rows // folds * folds
    folded = operation.reduce(rows[:whole].reshape(-1, folds * n_columns), axis=0)
    found: NDArray[Any] = operation.reduce(folded.reshape(folds, n_columns), axis=0)
    if whole < n_rows:
        found = operation(found, operation.reduce(rows[whole:], axis=0))
    return found
