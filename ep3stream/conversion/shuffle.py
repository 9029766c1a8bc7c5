"""Puts rows into splits and into a random order, or the source's order, in bounded memory.

Every row has a 64-bit key whose top byte is its split. Sorting by key brings the rows of a split together. If the other
bits are random, the sorted order is uniformly random. The order does not depend on the memory that sorting may use.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.rows import EncodedRows, RowLayout
from ep3stream.conversion.spill import (
    MAX_SPLITS,
    SPLIT_SHIFT,
    Spill,
    cells_of,
    cells_of_split,
    read_spills,
    spill_path,
)
from ep3stream.errors import ConfigError

# What sorting needs for each row beside the row: two copies of the key, three of the place.
_SORT_BYTES = 40
_BUFFERS = 3

# Of the memory of a conversion: all buffers, and what sorting them takes.
SORTER_SHARE = 3 / 4
_SHUFFLE_PURPOSE = 1  # Of the random numbers: the seed serves other purposes too.


class RowKeys:
    """Gives each row its key: the split depends on the row's content, the order on its number in the source."""

    def __init__(self, encoder: RowEncoder, splits: Mapping[str, float], seed: int, shuffle: bool) -> None:
        self._encoder = encoder
        self._bounds = np.cumsum(list(splits.values()))[:-1]
        # A weight depends on the column's name, so that a row's split does not depend on the order of the columns.
        weights = [xxhash.xxh3_64_intdigest(f"{seed}:{name}".encode()) for name in encoder.word_names]
        self._weights = np.array(weights, np.uint64)
        # One 64-bit draw per row in the source's order: row i has the same key however the rows are batched.
        self._generator = np.random.PCG64([seed, _SHUFFLE_PURPOSE]) if shuffle else None

    def skip(self, n_rows: int) -> None:
        """Goes on as if n rows had been given their keys."""
        if self._generator is not None:
            self._generator.advance(n_rows)

    def assign(self, rows: EncodedRows, split: int | None = None) -> NDArray[np.intp]:
        """Sets the keys of the next b rows: the split, then 56 random bits or zeros. Returns the splits, (b,).

        split: the number of the rows' split, if their file says it.
        """
        if split is None and len(self._bounds):
            split_ids = self._split_ids(rows)
        else:
            split_ids = np.full(len(rows), split or 0, np.intp)
        rows.key[:] = split_ids
        rows.key[:] <<= np.uint64(SPLIT_SHIFT)
        if self._generator is not None:
            rows.key[:] |= self._generator.random_raw(len(rows)) >> np.uint64(64 - SPLIT_SHIFT)
        return split_ids

    def _split_ids(self, rows: EncodedRows) -> NDArray[np.intp]:
        """Returns the split of each row, (b,): a hash of its words w, scaled to [0, 1), falls into a split's share.

        h = sum_j a_j w_j mod 2^64 (multilinear hashing, Lemire and Kaser 2014), then the last steps of splitmix64,
        because h alone maps evenly spaced values to evenly spaced hashes.
        """
        mixed = self._encoder.words(rows).astype(np.uint64) @ self._weights
        for shift, factor in ((30, 0xBF58476D1CE4E5B9), (27, 0x94D049BB133111EB)):
            mixed = (mixed ^ (mixed >> np.uint64(shift))) * np.uint64(factor)
        fractions = ((mixed ^ (mixed >> np.uint64(31))) >> np.uint64(11)) * 2.0**-53
        return np.searchsorted(self._bounds, fractions, side="right")


def random_order(keys: NDArray[np.uint64]) -> NDArray[np.intp]:
    """The places of the random keys of one split, (n,), by ascending key; equal keys keep their order.

    Sorts numbers of which the upper bits are the key's and the lower ones the place: numpy sorts numbers in an
    eighth of the time of finding places. The few keys that differ in the bits left out are put in order after.
    """
    n_bits = len(keys).bit_length()
    marked = keys << np.uint64(64 - SPLIT_SHIFT)
    marked >>= np.uint64(n_bits)
    marked <<= np.uint64(n_bits)
    marked |= np.arange(len(keys), dtype=np.uint64)
    marked.sort()
    order = (marked & np.uint64((1 << n_bits) - 1)).view(np.intp)
    marked >>= np.uint64(n_bits)
    alike = marked[1:] == marked[:-1]
    if alike.any():
        tied = np.flatnonzero(np.concatenate([alike, [False]]) | np.concatenate([[False], alike]))
        places = order[tied]
        order[tied] = places[np.argsort(keys[places], kind="stable")]
    return order


@dataclass(frozen=True, slots=True)
class _SortRange:
    """Rows that are sorted together: those of one split in the cells from `cell` to `end` - 1 of the spills.

    start: rows of the split in the ranges before this one.
    """

    split: int
    start: int
    spills: Sequence[Spill]
    cell: int
    end: int
    n_rows: int


@dataclass(slots=True)
class _Buffer:
    """Memory for rows, of which the first `filled` are there.

    first: its place in the memory of all buffers. read_state: as `RowSorter.add` takes it.
    """

    rows: EncodedRows
    first: int
    filled: int = 0
    read_state: Callable[[], Mapping[str, Any]] = dict


class RowSorter:
    """Sorts rows by key; rows of equal keys stay in the order in which they came.

    Rows that do not fit in three buffers are spilled: written to the disk, grouped by cells of keys, and later read and
    sorted one range of cells at a time. So each row is written once and read once. Holds three quarters of
    `memory_bytes`: the buffers, of which one is filled while others go to or come from the disk, and the memory that
    sorting takes. A context manager, because of its thread.
    """

    def __init__(
        self, directory: Path, layout: RowLayout, memory_bytes: int, n_splits: int, shuffled: bool
    ) -> None:
        if n_splits > MAX_SPLITS:
            raise ConfigError(f"there are {n_splits} splits; use at most {MAX_SPLITS}")
        self._directory = directory
        self._layout = layout
        self._n_splits = n_splits
        self._shuffled = shuffled
        self._spills: list[Spill] = []
        self._spilling: deque[tuple[_Buffer, Future[Spill]]] = deque()
        self._take_memory(
            max(1, int(memory_bytes * SORTER_SHARE) // _BUFFERS // (layout.row_bytes + _SORT_BYTES))
        )
        self._thread = ThreadPoolExecutor(1, "ep3stream-sorter")

    def _take_memory(self, capacity: int) -> None:
        """Makes new buffers of so many rows each, none of which is filled."""
        # Pages that are never written take no memory.
        self._memory = self._layout.empty(_BUFFERS * capacity)
        starts = range(0, len(self._memory), capacity)
        self._free = deque(_Buffer(self._memory[start : start + capacity], start) for start in starts)
        self._current, self._full = self._free.popleft(), deque[_Buffer]()

    def __enter__(self) -> RowSorter:
        return self

    def __exit__(self, *_: object) -> None:
        self._thread.shutdown(wait=True, cancel_futures=True)

    @property
    def n_spills(self) -> int:
        """The number of spills on the disk. After `finish`, the spills hold either all rows or none."""
        return len(self._spills)

    def restore(self) -> Mapping[str, Any] | None:
        """Takes over the spills of an earlier process; returns the read state of the last, None if there is none."""
        self._spills = read_spills(self._directory, self._layout)
        return self._spills[-1].read_state if self._spills else None

    def room(self, n_rows: int) -> EncodedRows:
        """Memory for the next n rows, so that to `add` these copies nothing."""
        if self._current.filled and self._current.filled + n_rows > len(self._current.rows):
            self._change_buffer()
        if n_rows > len(self._current.rows):
            self._spill_all()
            self._take_memory(n_rows)
        return self._current.rows[self._current.filled : self._current.filled + n_rows]

    def add(self, rows: EncodedRows, read_state: Callable[[], Mapping[str, Any]]) -> None:
        """Copies the rows, but those that lie in the last `room`.

        `read_state` returns, as JSON, what is needed to go on reading after them; see `restore`.
        """
        self.room(len(rows))
        self._current.rows.copy_from(self._current.filled, rows)
        self._current.filled += len(rows)
        self._current.read_state = read_state

    def finish(self) -> None:
        """Ends the adding. If any rows were spilled, spills the rest; otherwise all rows stay in memory."""
        if self._spills or self._spilling:
            self._spill_all()

    def _change_buffer(self) -> None:
        """Goes on with a free buffer; without one the full ones are spilled, and this waits for the first."""
        self._full.append(self._current)
        if self._spills or self._spilling or not self._free:
            self._spill_full()
        if not self._free:
            self._wait_for_spill()
        self._current = self._free.popleft()

    def _spill_all(self) -> None:
        self._full.append(self._current)
        self._spill_full()
        while self._spilling:
            self._wait_for_spill()
        self._current = self._free.popleft()

    def _spill_full(self) -> None:
        """Starts to write the full buffers, one after the other, in the thread."""
        while self._full:
            buffer = self._full.popleft()
            if not buffer.filled:
                self._free.append(buffer)
                continue
            path = spill_path(self._directory, len(self._spills) + len(self._spilling))
            rows = buffer.rows[: buffer.filled]
            written = self._thread.submit(
                Spill.write, path, self._layout, rows, self._n_splits, buffer.read_state()
            )
            self._spilling.append((buffer, written))

    def _wait_for_spill(self) -> None:
        """Waits for the oldest spill on its way to the disk, whose buffer is free then."""
        buffer, written = self._spilling.popleft()
        self._spills.append(written.result())
        buffer.filled = 0
        self._free.append(buffer)

    def blocks(self, block_rows: int, done: Sequence[int]) -> Iterator[tuple[int, EncodedRows]]:
        """Yields all rows by ascending key, except the first done[s] rows of each split s.

        Each item is a split and at most `block_rows` rows of it, without their keys; the rows are valid until the next
        item is asked for.
        """
        block = self._layout.empty(block_rows).without_key()
        for part, with_keys, order in self._from_disk(done) if self._spills else self._from_memory():
            rows = with_keys.without_key()
            for start in range(max(0, done[part.split] - part.start), part.n_rows, block_rows):
                yield part.split, rows.take(order[start : start + block_rows], out=block)

    def _from_memory(self) -> Iterator[tuple[_SortRange, EncodedRows, NDArray[np.intp]]]:
        """Yields each split with the memory of all rows and the order of its own."""
        rows = self._memory.without_key()
        buffers = (*self._full, self._current)
        keys = np.concatenate([buffer.rows.key[: buffer.filled] for buffer in buffers])
        cells = cells_of(keys, self._n_splits) if self._n_splits > 1 else None
        for split in range(self._n_splits):
            first, end = cells_of_split(split, self._n_splits)
            if cells is None:
                order = self._order(keys)
            else:
                inside = np.flatnonzero((cells >= first) & (cells < end))
                order = inside[self._order(keys[inside])]
            for before, buffer in pairwise(buffers):
                # The last places of the buffer before may be empty.
                n_rows = before.first + before.filled
                np.add(order, buffer.first - n_rows, out=order, where=order >= n_rows)
            yield _SortRange(split, 0, (), first, end, len(order)), rows, order

    def _from_disk(self, done: Sequence[int]) -> Iterator[tuple[_SortRange, EncodedRows, NDArray[np.intp]]]:
        """Yields each range with its rows and their order; meanwhile the thread reads and sorts the next range."""
        ranges = [part for part in self._sort_ranges() if part.start + part.n_rows > done[part.split]]
        largest = max((part.n_rows for part in ranges), default=0)
        # A single cell may have more rows than a buffer, and this process may have less memory than the one before.
        if largest > len(self._current.rows):
            self._take_memory(largest)
        self._loading = [self._current.rows, self._free[0].rows]
        following = [self._thread.submit(self._load, part) for part in ranges[:1]]
        for index, part in enumerate(ranges):
            rows, order = following.pop().result()
            self._loading.reverse()
            following = [self._thread.submit(self._load, later) for later in ranges[index + 1 : index + 2]]
            yield part, rows, order

    def _load(self, part: _SortRange) -> tuple[EncodedRows, NDArray[np.intp]]:
        """Runs in the thread: reads the rows of a range into the first buffer; returns them and their order."""
        rows, start = self._loading[0][: part.n_rows], 0
        for spill in part.spills:
            count = spill.count(part.cell, part.end)
            if count:
                spill.load(part.cell, part.end, rows[start : start + count])
            start += count
        return rows, self._order(rows.key)

    def _order(self, keys: NDArray[np.uint64]) -> NDArray[np.intp]:
        """Returns the places of one split's rows by ascending key; rows of equal keys keep their order."""
        return random_order(keys) if self._shuffled else np.arange(len(keys))

    def _sort_ranges(self) -> Iterator[_SortRange]:
        """Yields the ranges in the order of the store.

        Shuffled rows: neighbouring cells that fit half a buffer together. Rows in the source's order: the split's rows
        of one spill after the other, because all rows of a split have the same key and so the same cell.
        """
        for split in range(self._n_splits):
            first, end = cells_of_split(split, self._n_splits)
            if self._shuffled:
                yield from self._cell_ranges(split, first, end)
                continue
            start = 0
            for spill in self._spills:
                n_rows = spill.count(first, end)
                if n_rows:
                    yield _SortRange(split, start, (spill,), first, end, n_rows)
                start += n_rows

    def _cell_ranges(self, split: int, first: int, end: int) -> Iterator[_SortRange]:
        counts = np.zeros(end - first, np.int64)
        for spill in self._spills:
            inside = (spill.cells >= first) & (spill.cells < end)
            counts[spill.cells[inside] - first] += np.diff(spill.starts)[inside]
        # Half a buffer: the first range is soon there, and reading, sorting and writing overlap.
        most = max(1, len(self._current.rows) // 2)
        start, cell, n_rows = 0, first, 0
        for last, count in enumerate(counts.tolist(), first):
            if n_rows and n_rows + count > most:
                yield _SortRange(split, start, self._spills, cell, last, n_rows)
                start, cell, n_rows = start + n_rows, last, 0
            n_rows += count
        if n_rows:
            yield _SortRange(split, start, self._spills, cell, end, n_rows)
