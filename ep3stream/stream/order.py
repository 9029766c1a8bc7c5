"""The order in which a fit sees the rows, a pure function of (seed, epoch); how well it mixes; and random samples.

The segments of a split are permuted and taken in windows of a few; then the rows of each window are permuted. The order
is held in memory for one window at a time. Permutations come from a 64-bit counter hash and not from a library's
generator, so that an order outlives library versions: a fit resumed years later goes on with the rows it has not seen.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep3stream.errors import InputError
from ep3stream.store.manifest import SplitInfo

Rows = NDArray[np.int64]
NO_ROWS: Rows = np.empty(0, np.int64)

# Which permutation is meant: one word of the hash's key.
_SEGMENTS, _ROWS = 1, 2
# Random rows are read from so many segments.
SAMPLED_SEGMENTS = 64
# So many times as many rows are drawn as are needed, where some must not be drawn.
_EXCESS = 1.1

# The quantiles that OrderQuality gives.
SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MAX_WINDOWS = 32


@dataclass(frozen=True, slots=True, eq=False)
class WindowVisit:
    """One window of one epoch: its segments, in order, and how many of its rows earlier steps have used."""

    epoch: int
    index: int
    segments: Rows
    used: int


@dataclass(frozen=True, slots=True, eq=False)
class RowOrder:
    """Which rows each step of each epoch takes.

    excluded: sorted numbers of rows that never appear, because they became centers or are held out; every other row
    appears exactly once an epoch. An epoch has `steps_per_epoch` steps, whose batches differ by at most one row.
    shards: the number of readers that share an epoch; the number of steps is a multiple of it. Raises InputError for
    sizes below 1, for excluded rows that are not sorted, repeat or do not exist, and for fewer rows than shards.
    """

    seed: int
    n_rows: int
    segment_rows: int
    window_segments: int
    batch_size: int
    excluded: Rows
    shards: int = 1

    def __post_init__(self) -> None:
        if self.seed < 0:
            raise InputError(f"seed is {self.seed}; use 0 or more")
        for name in ("n_rows", "segment_rows", "window_segments", "batch_size", "shards"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; use 1 or more")
        rows = self.excluded
        if len(rows) and (rows[0] < 0 or rows[-1] >= self.n_rows or (np.diff(rows) <= 0).any()):
            raise InputError(
                f"excluded has {len(rows)} rows that are not sorted, repeat or do not exist; "
                f"use each of 0 to {self.n_rows - 1} at most once, sorted"
            )
        if not self.epoch_rows:
            raise InputError(f"excluded has all {self.n_rows} rows, so none is left to stream; exclude fewer")
        if self.shards > self.epoch_rows:
            raise InputError(f"{self.shards} readers share {self.epoch_rows} rows; use fewer workers")

    @property
    def epoch_rows(self) -> int:
        """The number of rows of one epoch: all but the excluded ones."""
        return self.n_rows - len(self.excluded)

    @property
    def steps_per_epoch(self) -> int:
        """ceil(epoch_rows / batch_size), rounded up to a multiple of `shards`."""
        return -(-self.epoch_rows // (self.batch_size * self.shards)) * self.shards

    @property
    def n_segments(self) -> int:
        """The number of segments of the split."""
        return -(-self.n_rows // self.segment_rows)

    @property
    def n_windows(self) -> int:
        """The number of windows of one epoch."""
        return -(-self.n_segments // self.window_segments)

    def batch_bounds(self, step: int) -> tuple[int, int]:
        """The first row of a step and the row behind its last one; rows and steps are counted within the epoch."""
        steps = self.steps_per_epoch
        return self.epoch_rows * step // steps, self.epoch_rows * (step + 1) // steps

    def segments(self, epoch: int) -> Rows:
        """The epoch's permutation of the segments, (n_segments,)."""
        return _permutation(self.n_segments, self.seed, epoch, _SEGMENTS, 0)

    def window(self, segments: Rows, index: int) -> Rows:
        """The segments of one window, out of `segments`, the epoch's permutation."""
        return segments[index * self.window_segments : (index + 1) * self.window_segments]

    def window_ends(self, segments: Rows) -> Rows:
        """How many rows of the epoch lie in windows 0 to w, for each w: (n_windows,)."""
        bounds = np.minimum(np.arange(self.n_segments + 1) * self.segment_rows, self.n_rows)
        kept = np.diff(bounds) - np.diff(np.searchsorted(self.excluded, bounds))
        sizes = np.add.reduceat(kept[segments], np.arange(0, self.n_segments, self.window_segments))
        return np.cumsum(sizes)

    def window_rows(self, epoch: int, index: int, window: Rows) -> Rows:
        """The window's rows in the order of their use.

        Each is a position in the window's segments laid one behind the other: place of the segment * segment_rows +
        row within the segment.
        """
        kept = [
            place * self.segment_rows + self._kept_rows(segment)
            for place, segment in enumerate(window.tolist())
        ]
        rows = np.concatenate(kept)
        return rows[_permutation(len(rows), self.seed, epoch, _ROWS, index)]

    def _kept_rows(self, segment: int) -> Rows:
        """The rows of a segment that are not excluded, counted within the segment."""
        first = segment * self.segment_rows
        stop = min(first + self.segment_rows, self.n_rows)
        inside = slice(*np.searchsorted(self.excluded, (first, stop)).tolist())
        return np.delete(np.arange(stop - first), self.excluded[inside] - first)

    def visits(self, start: int, stop: int) -> Iterator[WindowVisit]:
        """Yield, in order, the windows that hold the rows of steps start to stop - 1, counted over all epochs."""
        steps = self.steps_per_epoch
        for epoch in range(start // steps, -(-stop // steps)):
            segments = self.segments(epoch)
            ends = self.window_ends(segments)
            begins = np.concatenate([[0], ends[:-1]])
            first_row, _ = self.batch_bounds(max(start - epoch * steps, 0))
            end_row, _ = self.batch_bounds(min(stop - epoch * steps, steps))
            for index in np.flatnonzero((ends > first_row) & (begins < end_row) & (ends > begins)).tolist():
                used = max(first_row - int(begins[index]), 0)
                yield WindowVisit(epoch, index, self.window(segments, index), used)


def sample_rows(
    info: SplitInfo,
    n_rows: int,
    *stream: int,
    without: Rows = NO_ROWS,
    n_segments: int = SAMPLED_SEGMENTS,
) -> Rows:
    """`n_rows` distinct row numbers of the split in random order, a function of the integers `stream`.

    The rows lie in at most `n_segments` random segments, or in as many as hold twice as many rows where that is too
    few: rows drawn from all of 10^9 would have the whole store read. Rows that were shuffled before they were stored
    are as random where they lie in one segment. without: row numbers that are not drawn. n_rows may not exceed the
    split's rows without them.
    """
    if not len(without):
        return _drawn_rows(info, n_rows, n_segments, stream)
    n_drawn = n_rows
    while True:
        # So many that enough are left, but for bad luck.
        n_drawn = min(info.n_rows, math.ceil(_EXCESS * n_drawn * info.n_rows / (info.n_rows - len(without))))
        drawn = _drawn_rows(info, n_drawn, n_segments, stream)
        kept = drawn[~np.isin(drawn, without)]
        if len(kept) >= n_rows:
            return kept[:n_rows]
        if n_drawn == info.n_rows:
            raise InputError(
                f"{n_rows} rows of split {info.name} were to be drawn, but without {len(without)} that are held out "
                f"only {len(kept)} are left; ask for fewer"
            )


def _drawn_rows(info: SplitInfo, n_rows: int, n_segments: int, stream: tuple[int, ...]) -> Rows:
    generator = np.random.default_rng(stream)
    n_segments = max(n_segments, -(-2 * n_rows // info.segment_rows))
    if info.n_segments <= n_segments:
        return generator.choice(info.n_rows, n_rows, replace=False).astype(np.int64)
    # The last segment may be shorter; leaving it out keeps every other row equally likely.
    segments = generator.choice(info.n_segments - 1, n_segments, replace=False).astype(np.int64)
    pool = generator.choice(n_segments * info.segment_rows, n_rows, replace=False).astype(np.int64)
    return segments[pool // info.segment_rows] * info.segment_rows + pool % info.segment_rows


def _permutation(size: int, *stream: int) -> Rows:
    """A permutation of range(size), a function of the integers `stream`. O(size log size) time."""
    key: NDArray[np.uint64] = np.zeros(1, np.uint64)
    for word in stream:
        key = _mix(np.add(key, np.uint64(word)))
    # No two keys are equal, because _mix is a bijection: every way of sorting gives the same permutation.
    return np.argsort(_mix(np.add(key, np.arange(size, dtype=np.uint64))))


def _mix(values: NDArray[np.uint64]) -> NDArray[np.uint64]:
    """splitmix64 (Steele, Lea, Flood, 2014): a bijection of the 64-bit integers whose values look random."""
    values = values + np.uint64(0x9E3779B97F4A7C15)
    values = (values ^ (values >> np.uint64(30))) * np.uint64(0xBF58476D1CE4E5B9)
    values = (values ^ (values >> np.uint64(27))) * np.uint64(0x94D049BB133111EB)
    return values ^ (values >> np.uint64(31))


@dataclass(frozen=True, slots=True)
class OrderQuality:
    """Distances, in rows of an epoch, between rows that are neighbours in the store.

    distances: the quantiles of the distance at SHARES; perfect: those of a perfect shuffle. same_batch,
    perfect_same_batch: the share of neighbours that meet in one batch. window_rows: rows that are mixed together.
    n_pairs: pairs of neighbours measured.
    """

    n_rows: int
    window_rows: int
    batch_rows: int
    n_pairs: int
    distances: tuple[float, ...]
    perfect: tuple[float, ...]
    same_batch: float
    perfect_same_batch: float

    @property
    def relative(self) -> float:
        """The median distance, divided by that of a perfect shuffle."""
        middle = SHARES.index(0.5)
        return self.distances[middle] / self.perfect[middle]


def order_quality(order: RowOrder, epoch: int = 0) -> OrderQuality:
    """The quality of an epoch's order, measured on at most 32 windows spread over the epoch; O(rows of these) time.

    For a perfect shuffle: two places drawn at random from n are at most t n apart with probability 1 - (1 - t)^2.
    """
    segments = order.segments(epoch)
    ends = order.window_ends(segments)
    n_measured = min(order.n_windows, _MAX_WINDOWS)
    measured = np.unique(np.linspace(0, order.n_windows - 1, n_measured).astype(np.int64))
    distances, batches = [], []
    for index in measured.tolist():
        first = int(ends[index - 1]) if index else 0
        for places in _neighbours(order, epoch, index, order.window(segments, index)):
            distances.append(np.abs(places[1] - places[0]))
            # The last step whose first row, floor(rows * step / steps), is not behind the place.
            of_batch = ((places + first + 1) * order.steps_per_epoch - 1) // order.epoch_rows
            batches.append(of_batch[0] == of_batch[1])
    apart = np.concatenate(distances) if distances else np.zeros(0, np.int64)
    n_rows, batch_rows = order.epoch_rows, -(-order.epoch_rows // order.steps_per_epoch)
    return OrderQuality(
        n_rows=n_rows,
        window_rows=int(np.diff(ends, prepend=0).max()),
        batch_rows=batch_rows,
        n_pairs=len(apart),
        distances=tuple(np.quantile(apart, SHARES).tolist()) if len(apart) else (0.0,) * len(SHARES),
        perfect=tuple(n_rows * (1 - math.sqrt(1 - share)) for share in SHARES),
        same_batch=float(np.concatenate(batches).mean()) if batches else 0.0,
        perfect_same_batch=(batch_rows - 1) / max(1, n_rows - 1),
    )


def _neighbours(order: RowOrder, epoch: int, index: int, window: Rows) -> Iterator[NDArray[np.int64]]:
    """Yield the places within the window, (2, pairs), of rows that follow one another in one of its segments."""
    rows = order.window_rows(epoch, index, window)
    place = np.full(len(window) * order.segment_rows, -1, np.int64)
    place[rows] = np.arange(len(rows))
    for start in range(0, len(place), order.segment_rows):
        within = place[start : start + order.segment_rows]
        pairs = np.stack([within[:-1], within[1:]])
        yield pairs[:, (pairs >= 0).all(0)]  # Rows that became centers have no place.
