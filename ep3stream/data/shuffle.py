"""Puts rows into splits and into order, a random one or the source's, in bounded memory.

Every row has a 64-bit key whose top byte is its split; sorting by key brings a split's rows together. With
random keys the sorted order is a uniformly random one, and it does not depend on how much memory there was.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path

import numpy as np
import xxhash
from numpy.typing import NDArray

from ep3stream.data.encode import RowEncoder, Rows
from ep3stream.errors import InputError

MAX_SPLITS = 256
_SPLIT_SHIFT = 56
# Sorting needs, beside the rows, their keys, prefixes and order.
_SORT_BYTES = 32
_FIRST_BITS = 10
_DIVIDE_BITS = 8
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

    def assign(self, rows: Rows) -> NDArray[np.intp]:
        """Set the keys of the next rows: the split, then 56 random bits or zeros; returns the splits."""
        split_ids = self._split_ids(rows) if len(self._bounds) else np.zeros(len(rows), np.intp)
        rows["key"] = split_ids.astype(np.uint64) << np.uint64(_SPLIT_SHIFT)
        if self._generator is not None:
            rows["key"] |= self._generator.random_raw(len(rows)) >> np.uint64(64 - _SPLIT_SHIFT)
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


def rows_by_split(rows: Rows) -> Iterator[tuple[int, Rows]]:
    """Each split among the rows with its rows, in their order."""
    split_ids = rows["key"] >> np.uint64(_SPLIT_SHIFT)
    present = np.unique(split_ids)
    for split in present:
        yield int(split), rows if len(present) == 1 else rows.take(np.flatnonzero(split_ids == split))


class KeyOrder:
    """Sorts rows by key; rows of equal keys stay in the order they came.

    What does not fit the buffer goes to one file per range of keys, and each file is later sorted by itself.
    Holds half of `memory_bytes`: a buffer, used on the way in and out, and what sorting it needs. A row is
    written and read once, or twice where a range turned out larger than the buffer.
    """

    def __init__(self, directory: Path, dtype: np.dtype[np.void], memory_bytes: int, shuffled: bool) -> None:
        self._directory = directory
        # Pages that are never written take no memory.
        self._buffer = np.empty(max(1, memory_bytes // 2 // (dtype.itemsize + _SORT_BYTES)), dtype)
        self._filled = 0
        self._shuffled = shuffled
        self._shift: int | None = None

    def add(self, rows: Rows, progress: float) -> None:
        """Take a copy of the rows; progress: the share of the source, in (0, 1], read so far."""
        while len(rows):
            if self._filled == len(self._buffer):
                self._spill(progress)
            taken = min(len(rows), len(self._buffer) - self._filled)
            self._buffer[self._filled : self._filled + taken] = rows[:taken]
            self._filled += taken
            rows = rows[taken:]

    def blocks(self, block_rows: int) -> Iterator[Rows]:
        """All rows by ascending key, at most `block_rows` at a time."""
        if self._shift is None:
            yield from _sorted_blocks(self._buffer[: self._filled], block_rows)
            return
        self._spill(1.0)
        yield from self._file_blocks(sorted(self._directory.iterdir()), self._shift, block_rows)

    def _spill(self, progress: float) -> None:
        if self._shift is None:
            # Ranges of half a buffer on average, so that an estimate that is somewhat off does no harm.
            bits = int(np.clip(np.ceil(np.log2(2 / progress)), 1, _FIRST_BITS))
            self._shift = _SPLIT_SHIFT - bits if self._shuffled else _SPLIT_SHIFT
        self._disperse(self._buffer[: self._filled], self._shift)
        self._filled = 0

    def _disperse(self, rows: Rows, shift: int) -> None:
        """Append each row to the file of its key's bits above `shift`."""
        prefixes = rows["key"] >> np.uint64(shift)
        order = np.argsort(prefixes, kind="stable")
        present, starts = np.unique(prefixes[order], return_index=True)
        for prefix, piece in zip(present, np.split(order, starts[1:]), strict=True):
            _append(self._directory / f"{shift:02d}-{prefix:016x}", rows.take(piece))

    def _file_blocks(self, files: list[Path], shift: int, block_rows: int) -> Iterator[Rows]:
        for file in files:
            if self._shuffled and file.stat().st_size > self._buffer.nbytes:
                yield from self._file_blocks(self._divide(file, shift), shift - _DIVIDE_BITS, block_rows)
                continue
            # Several pieces only where all keys of the file are equal.
            for rows in _read_pieces(file, self._buffer):
                yield from _sorted_blocks(rows, block_rows)
            file.unlink()

    def _divide(self, file: Path, shift: int) -> list[Path]:
        """Replace a file of more rows than the buffer holds by files of narrower ranges, in order."""
        for rows in _read_pieces(file, self._buffer):
            self._disperse(rows, shift - _DIVIDE_BITS)
        file.unlink()
        return sorted(self._directory.glob(f"{shift - _DIVIDE_BITS:02d}-*"))


def _sorted_blocks(rows: Rows, block_rows: int) -> Iterator[Rows]:
    order = np.argsort(rows["key"], kind="stable")
    for start in range(0, len(rows), block_rows):
        # Of records, `take` copies several times as many in a second as indexing does.
        yield rows.take(order[start : start + block_rows])


@contextmanager
def _spilling(file: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"{file}: rows cannot be kept here while they are put in order ({error.strerror or error}); "
            "free space beside the store, or put the store elsewhere"
        ) from error


def _append(file: Path, rows: Rows) -> None:
    with _spilling(file), file.open("ab", buffering=0) as stream:
        data = np.ascontiguousarray(rows).view(np.uint8).data
        while data:
            data = data[stream.write(data) :]


def _read_pieces(file: Path, buffer: Rows) -> Iterator[Rows]:
    """The file's rows, as many at a time as the buffer holds; each piece is overwritten by the next."""
    memory = buffer.view(np.uint8).data
    with _spilling(file), file.open("rb") as stream:
        while n_bytes := stream.readinto(memory):
            yield buffer[: n_bytes // buffer.itemsize]
