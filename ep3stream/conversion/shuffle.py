"""Puts rows into splits and into order, a random one or the source's, in bounded memory.

Every row has a 64-bit key whose top byte is its split; sorting by key brings a split's rows together. With
random keys the sorted order is a uniformly random one, and it does not depend on how much memory there was.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
import xxhash
from numpy.typing import NDArray

from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.rows import RowLayout, Rows
from ep3stream.conversion.spill import (
    MAX_SPLITS,
    SPLIT_SHIFT,
    Spill,
    cells_of,
    cells_of_split,
    read_spills,
    spill_path,
)
from ep3stream.errors import InputError

# Sorting needs, beside the rows, their keys once more, sorted keys and order.
_SORT_BYTES = 32

_BUFFERS = 2

_SHUFFLE_PURPOSE = 1


class RowKeys:
    """Gives each row its key: the split from the row's content, the order from its number in the source."""

    def __init__(self, encoder: RowEncoder, splits: Mapping[str, float], seed: int, shuffle: bool) -> None:
        if len(splits) > MAX_SPLITS:
            raise InputError(f"there are {len(splits)} splits; use at most {MAX_SPLITS}")
        self._encoder = encoder
        self._bounds = np.cumsum(list(splits.values()))[:-1]
        # By name, so that a row's split does not depend on the order of the columns either.
        weights = [xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode()) for name in encoder.word_names]
        self._weights = np.array(weights, np.uint64)
        # One 64-bit draw per row in the source's order: row i has the same key however the rows are batched.
        self._generator = np.random.PCG64([seed, _SHUFFLE_PURPOSE]) if shuffle else None

    def skip(self, n_rows: int) -> None:
        """Go on as if n rows had been given their keys."""
        if self._generator is not None:
            self._generator.advance(n_rows)

    def assign(self, rows: Rows) -> NDArray[np.intp]:
        """Set the keys of the next rows: the split, then 56 random bits or zeros; returns the splits."""
        split_ids = self._split_ids(rows) if len(self._bounds) else np.zeros(len(rows), np.intp)
        rows.key[:] = split_ids
        rows.key[:] <<= np.uint64(SPLIT_SHIFT)
        if self._generator is not None:
            rows.key[:] |= self._generator.random_raw(len(rows)) >> np.uint64(64 - SPLIT_SHIFT)
        return split_ids

    def _split_ids(self, rows: Rows) -> NDArray[np.intp]:
        """The split of each row by a hash of its words w, mixed into a fraction of 1; (b,).

        h = sum_j a_j w_j mod 2^64 (multilinear hashing, Lemire and Kaser 2014), then the end of splitmix64,
        because h alone puts evenly spaced values into evenly spaced places.
        """
        mixed = self._encoder.words(rows).astype(np.uint64) @ self._weights
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        fractions = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._bounds, fractions, side="right")


@dataclass(frozen=True, slots=True)
class _Load:
    """Rows put in order together, behind `start` others of their split: cells `cell` to `behind` of the spills."""

    split: int
    start: int
    spills: Sequence[Spill]
    cell: int
    behind: int
    n_rows: int


class RowSorter:
    """Sorts rows by key; rows of equal keys stay in the order they came.

    What does not fit one buffer is spilled, parted by key, and later sorted a range of keys at a time. Holds
    half of `memory_bytes`: two buffers, one being filled while the other is on its way to or from the disk,
    and what sorting one needs. A row is written and read once. A context manager, for its thread.
    """

    def __init__(
        self, directory: Path, layout: RowLayout, memory_bytes: int, n_splits: int, shuffled: bool
    ) -> None:
        self._directory = directory
        self._layout = layout
        self._n_splits = n_splits
        self._shuffled = shuffled
        capacity = max(1, memory_bytes // 2 // _BUFFERS // (layout.row_bytes + _SORT_BYTES))
        # Pages that are never written take no memory.
        self._buffers = [layout.empty(capacity) for _ in range(_BUFFERS)]
        self._filled = 0
        self._mark: Callable[[], Mapping[str, Any]] = dict
        self._spills: list[Spill] = []
        self._spilling: Future[Spill] | None = None
        # Torch's own threads would wait in circles beside those that write; the setting is this thread's alone.
        self._thread = ThreadPoolExecutor(1, "ep3stream-sorter", torch.set_num_threads, (1,))

    def __enter__(self) -> RowSorter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def n_spills(self) -> int:
        """Files of rows on the disk; once `finish` was called, all rows are in them or none."""
        return len(self._spills)

    def restore(self) -> Mapping[str, Any] | None:
        """Take over the spills of an earlier process; the mark of the last, None where there is none."""
        self._spills = read_spills(self._directory, self._layout)
        return self._spills[-1].mark if self._spills else None

    def add(self, rows: Rows, mark: Callable[[], Mapping[str, Any]]) -> None:
        """Take a copy of the rows; `mark` tells the source's state behind them as JSON, for `restore`."""
        if self._filled and self._filled + len(rows) > len(self._buffers[0]):
            self._spill()
        if len(rows) > len(self._buffers[0]):
            self._buffers = [self._layout.empty(len(rows)), self._buffers[1]]
        self._buffers[0].copy_from(self._filled, rows)
        self._filled += len(rows)
        self._mark = mark

    def finish(self) -> None:
        """No rows follow. Rows that all fit the buffer stay there; otherwise all of them are on the disk."""
        if (self._spills or self._spilling) and self._filled:
            self._spill()
        self._settle()

    def _spill(self) -> None:
        """Write the filled buffer in the thread, once the one before is written, and go on with the other."""
        self._settle()
        path = spill_path(self._directory, len(self._spills))
        rows = self._buffers[0][: self._filled]
        self._spilling = self._thread.submit(
            Spill.write, path, self._layout, rows, self._n_splits, self._mark()
        )
        self._buffers.reverse()
        self._filled = 0

    def _settle(self) -> None:
        if self._spilling is not None:
            self._spills.append(self._spilling.result())
            self._spilling = None

    def blocks(self, block_rows: int, done: Sequence[int]) -> Iterator[tuple[int, Rows]]:
        """All rows by ascending key but the first done[s] of split s: the split, and at most `block_rows` rows.

        A block's memory is used again for the next one.
        """
        block = self._layout.empty(block_rows)
        for load, rows, order in self._spilled_loads(done) if self._spills else self._kept_loads():
            for start in range(max(0, done[load.split] - load.start), load.n_rows, block_rows):
                yield load.split, rows.take(order[start : start + block_rows], out=block)

    def _kept_loads(self) -> Iterator[tuple[_Load, Rows, NDArray[np.intp]]]:
        rows = self._buffers[0][: self._filled]
        cells = cells_of(rows.key, self._n_splits)
        for split in range(self._n_splits):
            first, behind = cells_of_split(split, self._n_splits)
            inside = (
                rows.take(np.flatnonzero((cells >= first) & (cells < behind))) if self._n_splits > 1 else rows
            )
            yield _Load(split, 0, (), first, behind, len(inside)), inside, self._order(inside)

    def _spilled_loads(self, done: Sequence[int]) -> Iterator[tuple[_Load, Rows, NDArray[np.intp]]]:
        """Load by load; while one is in use, the next is read and put in order."""
        loads = [load for load in self._loads() if load.start + load.n_rows > done[load.split]]
        largest = max((load.n_rows for load in loads), default=0)
        # A cell alone may have more rows than a buffer, and memory may have become less.
        if largest > min(map(len, self._buffers)):
            self._buffers = [self._layout.empty(largest) for _ in self._buffers]
        following = [self._thread.submit(self._load, load) for load in loads[:1]]
        for index, load in enumerate(loads):
            rows, order = following.pop().result()
            self._buffers.reverse()
            following = [self._thread.submit(self._load, load) for load in loads[index + 1 : index + 2]]
            yield load, rows, order

    def _load(self, load: _Load) -> tuple[Rows, NDArray[np.intp]]:
        rows, start = self._buffers[0][: load.n_rows], 0
        for spill in load.spills:
            count = spill.count(load.cell, load.behind)
            if count:
                spill.load(load.cell, load.behind, rows[start : start + count])
            start += count
        return rows, self._order(rows)

    def _order(self, rows: Rows) -> NDArray[np.intp]:
        """Of the rows of one split: by key, and rows of equal keys as they are."""
        if not self._shuffled:
            return np.arange(len(rows))
        # torch sorts 64-bit integers several times as fast as numpy does.
        low_bits = (rows.key & np.uint64((1 << SPLIT_SHIFT) - 1)).view(np.int64)
        order: NDArray[np.intp] = torch.sort(torch.from_numpy(low_bits), stable=True).indices.numpy()
        return order

    def _loads(self) -> Iterator[_Load]:
        """The loads in order: neighbouring cells that fit one buffer, or spill by spill where order is kept."""
        for split in range(self._n_splits):
            first, behind = cells_of_split(split, self._n_splits)
            if self._shuffled:
                yield from self._shuffled_loads(split, first, behind)
                continue
            start = 0
            for spill in self._spills:
                n_rows = spill.count(first, behind)
                if n_rows:
                    yield _Load(split, start, (spill,), first, behind, n_rows)
                start += n_rows

    def _shuffled_loads(self, split: int, first: int, behind: int) -> Iterator[_Load]:
        counts = np.zeros(behind - first, np.int64)
        for spill in self._spills:
            inside = (spill.cells >= first) & (spill.cells < behind)
            counts[spill.cells[inside] - first] += np.diff(spill.starts)[inside]
        # Half a buffer, so that the first load is soon there and reading, sorting and writing overlap.
        most = max(1, len(self._buffers[0]) // 2)
        start, cell, n_rows = 0, first, 0
        for last, count in enumerate(counts.tolist(), first):
            if n_rows and n_rows + count > most:
                yield _Load(split, start, self._spills, cell, last, n_rows)
                start, cell, n_rows = start + n_rows, last, 0
            n_rows += count
        if n_rows:
            yield _Load(split, start, self._spills, cell, behind, n_rows)
