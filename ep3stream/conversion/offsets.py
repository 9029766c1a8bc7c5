"""Offsets: what is subtracted from a column, in float64, before its numbers are rounded to the store's dtype.

A column is looked at in the first rows of a source. It gets an offset where rounding makes one value of two, or moves
values by a noticeable share of their spread, and an offset helps. What no offset mends is told.
"""

from __future__ import annotations

import logging
import math
from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.formats.source import SourceBatch
from ep3stream.values.offsets import exact_difference, shifted

_LOGGER = logging.getLogger(__name__)

# Offsets are decided by so many rows at the beginning, or by fewer where these would have more values than this.
_SAMPLE_ROWS = 10_000
_SAMPLE_VALUES = 1 << 21
_LEAST_ROWS = 64
_GLANCE_ROWS = 256

# Rounding that moves values by this share of their standard deviation is mended, or told.
MAX_ERROR_PER_STD = 0.01

# Told from this share of the distinct values on: among many random numbers a few are equal by chance.
_MAX_LOST_SHARE = 0.01

# Numbers that should be equal differ by up to about so much of their size if they were computed in two ways.
# Of a narrow range less is noise: nobody writes times to a millisecond for the sake of a rounding error.
_NOISE, _NOISE_PER_SPREAD = 1e-12, 1e-5

# A constant beyond this probably has fractions later that float32 does not keep.
_LARGE_CONSTANT = 1 << 20

# Behind the first rows, the first 64 of every 4096 rows of a file are checked.
_CHECKED_RUN, _CHECKED_EVERY = 64, 4096

# Nothing larger is subtracted: the difference of two such numbers may be beyond float32.
_LARGEST_OFFSET = 1e37

# From here on not even float64 has all whole numbers.
_FLOAT64_WHOLE = 2.0**53

Pieces = Sequence[NDArray[Any]]


@dataclass(frozen=True, slots=True)
class Precision:
    """What storing makes of the values of one column.

    offset: what to subtract first, 0 for nothing. n_distinct: distinct values among `n_rows` rows, of which `n_kept`
    are still distinct when stored. error_per_std: root mean square of the rounding over the standard deviation.
    spacing: of whole numbers beyond 2^53 that came as float64 and lie close, which float64 may have merged; else 0.
    """

    offset: float = 0.0
    n_rows: int = 0
    n_distinct: int = 0
    n_kept: int = 0
    error_per_std: float = 0.0
    spacing: float = 0.0

    @property
    def is_lossy(self) -> bool:
        """Whether the loss is worth a warning."""
        n_lost = self.n_distinct - self.n_kept
        is_moved = self.error_per_std > MAX_ERROR_PER_STD
        return n_lost > _MAX_LOST_SHARE * self.n_distinct or is_moved or self.spacing > 0

    def sentence(self, column: str, dtype: str) -> str:
        """The loss in words, with a remedy."""
        if self.n_kept < self.n_distinct:
            loss = f"rounding to {dtype} keeps {self.n_kept} of {self.n_distinct} distinct values "
            loss += f"among {self.n_rows} sampled rows"
        elif self.spacing:
            loss = f"whole numbers beyond 2^53 are read as float64, which has only every {self.spacing:.0f}th of them"
        else:
            loss = f"rounding to {dtype} moves values by {self.error_per_std:.2g} of their standard deviation"
        return (
            f"{column}: {loss}; leave the column out if it only names rows, take it as a category, or split it "
            "into two columns, such as thousands and the rest"
        )


def precision_of(values: NDArray[Any], dtype: str) -> Precision:
    """What storing as `dtype` makes of `values`, (n,), real numbers with NaN for gaps; O(n log n).

    An offset is proposed where rounding merges or moves values and the offset mends that. Where the range is half of
    the largest size or more, as with a few zeros among large numbers, it must mend more than half of a large loss, and
    keep apart whatever rounding alone keeps apart.
    """
    ordered = _ordered(values)
    if not len(ordered):
        return Precision()
    low, high = ordered[0].item(), ordered[-1].item()
    spread, largest = float(high - low), float(max(abs(low), abs(high)))
    with np.errstate(all="ignore"):
        found = _measured(ordered, 0.0, dtype)
        if largest > _LARGEST_OFFSET:
            return found  # It is refused, or as good as constant.
        if spread < largest / 2:
            if _is_spoiled(ordered, found, largest, dtype):
                width = spread if found.n_distinct > 1 else 0.0  # Noise is not to be made the signal.
                moved = _measured(ordered, _offset(low + (high - low) / 2, width, ordered), dtype)
                is_better = moved.n_kept > found.n_kept or moved.error_per_std < found.error_per_std / 2
                found = moved if is_better or width == 0 else found
        elif found.is_lossy and (dtype != "float16" or _is_whole(ordered)):
            moved = _measured(ordered, _offset(ordered[len(ordered) // 2].item(), spread, ordered), dtype)
            n_lost, n_lost_before = (each.n_distinct - each.n_kept for each in (moved, found))
            if 2 * n_lost < n_lost_before and not _merges_more(ordered, moved.offset, dtype):
                found = moved
        return replace(found, spacing=_merged_spacing(ordered, spread, largest))


def _ordered(values: NDArray[Any]) -> NDArray[Any]:
    """The finite values, sorted; whole numbers that came as long doubles, beside gaps, as integers."""
    if values.dtype.kind != "f":
        return np.sort(values)
    ordered = np.sort(values[np.isfinite(values)])
    if values.dtype.itemsize > 8 and len(ordered) and _is_whole(ordered):
        for dtype in (np.int64, np.uint64):
            limits = np.iinfo(dtype)
            if limits.min <= ordered[0] and ordered[-1] <= limits.max:
                return ordered.astype(dtype)
    return ordered


def _merges_more(ordered: NDArray[Any], offset: float, dtype: str) -> bool:
    """Whether an offset makes one of two values that rounding alone keeps apart, or of which it tells as zeros."""
    plain, moved = ordered.astype(dtype), exact_difference(ordered, offset).astype(dtype)
    is_told = (plain == 0) & (ordered != 0)
    is_apart = (plain[1:] != plain[:-1]) | is_told[1:] | is_told[:-1]
    return bool(((ordered[1:] != ordered[:-1]) & (moved[1:] == moved[:-1]) & is_apart).any())


def _measured(ordered: NDArray[Any], offset: float, dtype: str) -> Precision:
    values = exact_difference(ordered, offset) if offset else ordered
    stored = values.astype(dtype)
    n_distinct, n_kept = (1 + int(count) for count in _steps(ordered, stored))
    std = float(exact_difference(ordered, offset or float(np.rint(ordered[0]))).std())
    error = stored.astype(np.float64) - values.astype(np.float64)
    share = float(np.sqrt(np.mean(np.square(error)))) / std if n_distinct > 1 and std > 0 else 0.0
    return Precision(offset, len(ordered), n_distinct, n_kept, share)


def _steps(ordered: NDArray[Any], stored: NDArray[Any]) -> tuple[NDArray[np.intp], NDArray[np.intp]]:
    """How often the next of ordered values, (n,) or (n, k), is another one, and how often it is when stored as well.

    Numbers with fractions that differ by 1e-12 of the largest or less are equal: they were only computed in two ways.
    Gaps, which are NaN and last, are not counted.
    """
    with np.errstate(all="ignore"):
        if ordered.dtype.kind == "f":
            gaps = ordered[1:] - ordered[:-1]
            highest = np.fmax.reduce(ordered, axis=0)
            noise, spread = _NOISE * np.maximum(np.abs(ordered[0]), highest), highest - ordered[0]
            noise = np.where(spread <= noise, spread, np.minimum(noise, _NOISE_PER_SPREAD * spread))
            is_whole = np.fmin.reduce(np.where(gaps > 0, gaps, np.inf), axis=0, initial=np.inf) >= 1
            other = gaps > np.where(is_whole, 0, noise)
        else:
            other = ordered[1:] != ordered[:-1]
    kept = other & (stored[1:] != stored[:-1])
    return np.count_nonzero(other, axis=0), np.count_nonzero(kept, axis=0)


def _is_spoiled(ordered: NDArray[Any], plain: Precision, largest: float, dtype: str) -> bool:
    """Whether to try an offset for values of a narrow range."""
    if plain.n_distinct == 1:
        is_exact = float(ordered[0].astype(dtype)) == ordered[0].item()
        return not is_exact and (_is_whole(ordered[:1]) or largest >= _LARGE_CONSTANT)
    # Who asks for float16 asks for three digits, but not for one whole number in place of another.
    counts = dtype != "float16" or _is_whole(ordered)
    return (counts and plain.n_kept < plain.n_distinct) or not plain.error_per_std <= MAX_ERROR_PER_STD


def _is_whole(values: NDArray[Any]) -> bool:
    return values.dtype.kind != "f" or bool((values == np.rint(values)).all())


def _offset(middle: float, spread: float, ordered: NDArray[Any]) -> float:
    """A number near `middle` with as few digits as the spread allows.

    First a number of which float32 holds the negative, so that zero is stored as it is; then a whole number, by which
    whole numbers stay whole.
    """
    for unit in (float(np.spacing(np.float32(middle))), 1.0):
        near = float(round(middle / unit) * unit)
        if unit >= 1 and abs(near - middle) <= spread / 4:
            return near
    if spread == 0 or _is_whole(ordered):
        return float(round(middle))
    step = 2.0 ** math.floor(math.log2(spread / 4))
    return round(middle / step) * step


def _merged_spacing(ordered: NDArray[Any], spread: float, largest: float) -> float:
    if ordered.dtype.kind != "f" or not _FLOAT64_WHOLE <= largest < math.inf or not _is_whole(ordered):
        return 0.0
    spacing = float(np.spacing(largest))
    return spacing if 0 < spread < spacing * len(ordered) / _MAX_LOST_SHARE else 0.0


def without_offsets(pieces: Pieces, offsets: NDArray[np.float64]) -> Pieces:
    """The pieces, (b,) or (b, k) each, with the offsets of their columns, left to right, subtracted in float64."""
    if not offsets.any():
        return pieces
    changed, first = [], 0
    for piece in pieces:
        width = 1 if piece.ndim == 1 else piece.shape[1]
        own = offsets[first : first + width]
        first += width
        changed.append(shifted(piece, own))
    return changed


def sample_rows(n_columns: int) -> int:
    """By how many rows offsets are decided: a function of the width alone."""
    return max(_LEAST_ROWS, min(_SAMPLE_ROWS, _SAMPLE_VALUES // max(1, n_columns)))


def _columns_to_see(piece: NDArray[Any], dtype: str) -> Iterator[tuple[int, NDArray[Any]]]:
    """The columns, by number, of a piece (b,) or (b, k) that may lose values.

    These are columns of a range below half of the largest size, and those of which the very first rows lose some.
    """
    if not len(piece) or piece.dtype.kind not in "iuf" or np.can_cast(piece.dtype, dtype):
        return
    block = piece.reshape(len(piece), -1)
    with np.errstate(all="ignore"):
        low, high = (np.asarray(f.reduce(block, axis=0), np.float64) for f in (np.fmin, np.fmax))
        chosen = high - low < np.maximum(np.abs(low), np.abs(high)) / 2
        ordered = np.sort(block[:_GLANCE_ROWS], axis=0)
        stored = ordered.astype(dtype)
        n_distinct, n_kept = _steps(ordered, stored)
        chosen |= n_distinct - n_kept > _MAX_LOST_SHARE * n_distinct
    for column in np.flatnonzero(chosen):
        yield int(column), block[:, column]


def sampled_precision(piece: NDArray[Any], dtype: str) -> dict[int, Precision]:
    """`precision_of` each column of a piece, (b,) or (b, k), that could lose something, by the column's number."""
    return {column: precision_of(values, dtype) for column, values in _columns_to_see(piece, dtype)}


def array_offsets(values: NDArray[Any], names: Sequence[str], what: str = "column") -> NDArray[np.float64]:
    """The offsets of the columns of an array in memory, (n,) or (n, k), decided by its first rows as for a store.

    A warning tells of each column that loses values all the same; `what` it is called there.
    """
    offsets = np.zeros(len(names))
    for column, found in sampled_precision(values[: sample_rows(len(names))], "float32").items():
        offsets[column] = found.offset
        if found.is_lossy:
            _LOGGER.warning("%s", found.sentence(f"{what} {names[column]!r}", "float32"))
    return offsets


class ColumnOffsets:
    """The offsets of a source's numeric columns and targets, decided by its first rows, and the losses to tell.

    names: of the numeric columns; targets: of the targets that are numbers. dtype: of x in the store; targets are
    float32. x, y: the offsets, (k,) and (c,). The same source gives the same offsets, whatever the size of batches.
    """

    def __init__(self, names: Sequence[str], targets: Sequence[str], dtype: str) -> None:
        self._names = (tuple(names), tuple(targets))
        self._dtypes = (dtype, "float32")
        self.x, self.y = (np.zeros(len(each)) for each in self._names)
        self.is_decided = not (names or targets)
        # What is lost, by part (x or y) and column: the worst that was seen.
        self._lost: dict[tuple[int, int], Precision] = {}
        # Values other than 0 that are stored as 0, by column.
        self._zeros: Counter[str] = Counter()

    def take_over(self, known: Mapping[str, float]) -> None:
        """Decides by the offsets of another store, by the name of the column; 0 where there is none."""
        self.x, self.y = (np.array([known.get(name, 0.0) for name in each]) for each in self._names)
        self.is_decided = True

    @property
    def by_name(self) -> dict[str, float]:
        """The offsets other than 0 by the names of the columns."""
        pairs = zip((*self._names[0], *self._names[1]), [*self.x.tolist(), *self.y.tolist()], strict=True)
        return {name: offset for name, offset in pairs if offset}

    def read_ahead(self, batches: Iterator[SourceBatch]) -> Iterator[SourceBatch]:
        """Decides by a source's first batches, if that is still to be done; returns an iterator of all batches.

        Where it was done by other rows, notes what the offsets make of these.
        """
        n_wanted = sample_rows(len(self.x) + len(self.y))
        held: list[SourceBatch] = []
        n_rows = 0
        while n_rows < n_wanted:
            if held and not held[-1].raw:
                # An iterable of the user's may fill the same memory again.
                held[-1] = _copied(held[-1])
            if (batch := next(batches, None)) is None:
                break
            held.append(batch)
            n_rows += batch.n_rows
            if len(held) == 1 and not self._may_lose(batch):
                break
        self.decide(held, n_wanted)
        return _chained(held, batches)

    def decide(self, batches: Sequence[SourceBatch], n_wanted: int) -> None:
        """Decides by the first `n_wanted` rows of the batches, or notes what is lost of them if that was done."""
        was_decided, self.is_decided = self.is_decided, True
        if not batches or not self._may_lose(batches[0]):
            return
        for part, pieces_of in enumerate((_numeric, self._targets)):
            for first, sample in _joined([pieces_of(batch) for batch in batches], n_wanted):
                if was_decided:
                    self._look_at(part, first, sample)
                    continue
                for column, found in sampled_precision(sample, self._dtypes[part]).items():
                    (self.x, self.y)[part][first + column] = found.offset
                    self._note(part, first + column, found)
                    if found.offset:
                        _LOGGER.info(
                            "column %r: %r is subtracted before rounding, and recorded",
                            self._names[part][first + column],
                            found.offset,
                        )

    def _look_at(self, part: int, first: int, sample: NDArray[Any]) -> None:
        """Notes the losses of a sample, (n,) or (n, k), of which the first column is number `first` of the part."""
        dtype, columns = self._dtypes[part], dict(_columns_to_see(sample, dtype=self._dtypes[part]))
        offsets = (self.x, self.y)[part][first:]
        block = sample.reshape(len(sample), -1)
        moved = np.flatnonzero(offsets[: block.shape[1]]).tolist() if block.dtype.kind in "iuf" else []
        for column, values in (columns | {column: block[:, column] for column in moved}).items():
            if len(ordered := _ordered(values)):
                with np.errstate(all="ignore"):
                    self._note(part, first + column, _measured(ordered, float(offsets[column]), dtype))

    def check(self, batch: SourceBatch, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Notes losses among the rows of a batch, of which x, (b, k), and y are stored; looks at one row in 64.

        Only runs of a narrow range are looked at: values of a wider one are hardly ever so near to each other.
        """
        first = -(-batch.first_row // _CHECKED_EVERY) * _CHECKED_EVERY - batch.first_row
        before = first - _CHECKED_EVERY + _CHECKED_RUN  # Of a run that the batch before has begun.
        runs = [
            (max(0, start), min(start + _CHECKED_RUN, batch.n_rows))
            for start in range(first, batch.n_rows, _CHECKED_EVERY)
        ]
        if before > 0:
            runs.insert(0, (0, min(before, batch.n_rows)))
        if not runs or not batch.n_rows or not self._may_lose(batch):
            return
        rows = np.concatenate([np.arange(*run) for run in runs])
        lengths = np.array([stop - start for start, stop in runs])
        for part, pieces, stored in ((0, batch.numeric, x), (1, self._targets(batch), y)):
            if pieces and self._dtypes[part] == "float32":
                self._check_part(part, pieces, stored[rows], rows, lengths)

    def _check_part(
        self,
        part: int,
        pieces: Pieces,
        stored: NDArray[Any],
        rows: NDArray[np.intp],
        lengths: NDArray[np.intp],
    ) -> None:
        """stored, (m, k), of the rows, (m,), of pieces, which are runs of these lengths, (runs,)."""
        starts = np.cumsum(lengths) - lengths
        with np.errstate(invalid="ignore"):
            low, high = (f.reduceat(stored, starts, axis=0) for f in (np.fmin, np.fmax))
            unit = np.finfo(np.float32).eps * np.maximum(np.abs(low), np.abs(high))
            near = high - low < unit * np.float32(_CHECKED_RUN / _MAX_LOST_SHARE)
        narrow = set(np.flatnonzero(near.any(axis=0)).tolist())
        column = 0
        for piece in pieces if narrow else ():
            block = piece.reshape(len(piece), -1)
            for own in range(block.shape[1]):
                if column in narrow and not np.can_cast(piece.dtype, np.float32):
                    chosen = np.repeat(near[:, column], lengths)
                    seen, kept = np.sort(block[rows[chosen], own]), np.sort(stored[chosen, column])
                    n_distinct, n_kept = (1 + int(count) for count in _steps(seen, kept))
                    self._note(part, column, Precision(0.0, int(chosen.sum()), n_distinct, n_kept))
                column += 1

    def _note(self, part: int, column: int, found: Precision) -> None:
        if found.is_lossy and self._dtypes[part] == "float32":
            worst = self._lost.get((part, column))
            if worst is None or found.n_kept / found.n_distinct < worst.n_kept / worst.n_distinct:
                self._lost[part, column] = found

    def count_zeros(self, names: Sequence[str], pieces: Pieces, stored: NDArray[Any]) -> None:
        """Counts the values of pieces other than 0 that are 0 in `stored`, (b, k); `Rounding` does it for float16."""
        if stored.dtype != np.float32:
            return
        values = np.column_stack([piece.reshape(len(piece), -1) for piece in pieces])
        counts = np.count_nonzero((stored == 0) & (values != 0), axis=0)
        self._zeros.update({name: int(n) for name, n in zip(names, counts, strict=True) if n})

    def tell(self) -> None:
        """One warning for each column that loses values."""
        for name, count in sorted(self._zeros.items()):
            _LOGGER.warning(
                "column %r: %d values are stored as 0, for they are nearer to 0 than 1.4e-45, the smallest float32; "
                "multiply the column, or take logarithms",
                name,
                count,
            )
        for (part, column), found in sorted(self._lost.items()):
            what = ("column", "target")[part]
            _LOGGER.warning("%s", found.sentence(f"{what} {self._names[part][column]!r}", self._dtypes[part]))

    def state(self) -> dict[str, Any]:
        """All of it as JSON for `restore`."""
        lost = [
            [part, column, found.n_rows, found.n_distinct, found.n_kept, found.error_per_std, found.spacing]
            for (part, column), found in self._lost.items()
        ]
        return {"decided": self.is_decided, "offsets": self.by_name, "lost": lost, "zeros": dict(self._zeros)}

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from an earlier `state`."""
        self.take_over(state["offsets"])
        self.is_decided, self._zeros = state["decided"], Counter(state["zeros"])
        self._lost = {(part, column): Precision(0.0, *counts) for part, column, *counts in state["lost"]}

    def _targets(self, batch: SourceBatch) -> Pieces:
        return (batch.target,) if len(self.y) and isinstance(batch.target, np.ndarray) else ()

    def _may_lose(self, batch: SourceBatch) -> bool:
        """Whether a type is not held whole by what it becomes; a file has the types of its first rows."""
        x_dtype, y_dtype = self._dtypes
        return any(not np.can_cast(piece.dtype, x_dtype) for piece in batch.numeric) or any(
            not np.can_cast(piece.dtype, y_dtype) for piece in self._targets(batch)
        )


def _numeric(batch: SourceBatch) -> Pieces:
    return batch.numeric


def _joined(parts: Sequence[Pieces], n_rows: int) -> Iterator[tuple[int, NDArray[Any]]]:
    """The pieces of several batches one below the other, at most `n_rows` rows, each with its first column."""
    first = 0
    for pieces in zip(*parts, strict=True):
        whole = pieces[0] if len(pieces) == 1 else np.concatenate(pieces)
        yield first, whole[:n_rows]
        first += 1 if whole.ndim == 1 else whole.shape[1]


def _copied(batch: SourceBatch) -> SourceBatch:
    target = batch.target.copy() if isinstance(batch.target, np.ndarray) else batch.target
    return replace(batch, numeric=tuple(piece.copy() for piece in batch.numeric), target=target)


def _chained(held: list[SourceBatch], rest: Iterator[SourceBatch]) -> Iterator[SourceBatch]:
    """The held batches, each let go as it is given away, then the rest."""
    held.reverse()
    while held:
        yield held.pop()
    yield from rest
