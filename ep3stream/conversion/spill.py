"""Encoded rows that do not fit in memory, in files: each holds the rows of one flush, parted by their key.

A key's top byte is the row's split; with the next bits it makes the row's cell, and rows of one cell lie
together in a file. So a range of keys is one piece of each file, and any number of neighbouring cells can
be read at once: as many as fit in memory, which is known when all of them have been counted.

A file N.rows holds one section for each part of a row. N.json beside it names the rows and the
digest of each cell, and the caller's mark: what it must know to go on behind these rows. It is written last.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import xxhash
from numpy.typing import NDArray

from ep3stream.config import MIB
from ep3stream.conversion.rows import RowLayout, Rows
from ep3stream.errors import DamagedDataError, DiskError
from ep3stream.store.json_files import signed_bytes, signed_object

SPLIT_SHIFT = 56

MAX_SPLITS = 256

_MANY_BITS, _FEW_BITS = 12, 8  # of a cell, beside those of its split: 16 in all, which sort fastest

_STAGING_BYTES = 4 * MIB

_VERIFIED_CELLS = 64


def cells_of(keys: NDArray[np.uint64], n_splits: int) -> NDArray[np.uint16]:
    """The cell of each key: its split, then the key's next bits."""
    bits = _cell_bits(n_splits)
    return (keys >> np.uint64(SPLIT_SHIFT - bits)).astype(np.uint16)


def cells_of_split(split: int, n_splits: int) -> tuple[int, int]:
    """First cell of a split and the one behind its last."""
    bits = _cell_bits(n_splits)
    return split << bits, (split + 1) << bits


def _cell_bits(n_splits: int) -> int:
    return _MANY_BITS if n_splits << _MANY_BITS <= 1 << 16 else _FEW_BITS


@dataclass(frozen=True, slots=True)
class Spill:
    """One flush: its file, the rows before each cell, (cells + 1,), the digests and the caller's mark."""

    path: Path
    layout: RowLayout
    cells: NDArray[np.int64]
    starts: NDArray[np.int64]
    digests: tuple[str, ...]
    mark: Mapping[str, Any]

    @property
    def n_rows(self) -> int:
        """Rows in the file."""
        return int(self.starts[-1])

    @classmethod
    def write(
        cls, path: Path, layout: RowLayout, rows: Rows, n_splits: int, mark: Mapping[str, Any]
    ) -> Spill:
        """Write the rows, by cell and within a cell in their order; the .json beside makes them valid."""
        cell = cells_of(rows.key, n_splits)
        order = np.argsort(cell, kind="stable")
        counts = np.bincount(cell)
        cells = np.flatnonzero(counts)
        starts = np.concatenate([[0], np.cumsum(counts[cells])])
        hashes = [xxhash.xxh3_128() for _ in cells]
        with _disk(path), path.open("wb", buffering=0) as file:
            for part in rows.parts.values():
                _write_section(file, part, order, starts, hashes)
        digests = tuple(state.hexdigest() for state in hashes)
        spill = cls(path, layout, cells, starts, digests, mark)
        spill._commit()
        return spill

    def _commit(self) -> None:
        content: dict[str, Any] = {
            "cells": self.cells.tolist(),
            "starts": self.starts.tolist(),
            "digests": list(self.digests),
            "mark": self.mark,
        }
        partial = self.path.with_suffix(".partial")
        with _disk(self.path):
            partial.write_bytes(signed_bytes(content))
            partial.rename(self.path.with_suffix(".json"))

    @classmethod
    def read(cls, path: Path, layout: RowLayout) -> Spill:
        """A flush of an earlier process; raises DamagedDataError where one of its files is not as written."""
        sidecar = path.with_suffix(".json")
        content = signed_object(sidecar.read_bytes(), str(sidecar))
        starts = np.array(content["starts"], np.int64)
        spill = cls(
            path,
            layout,
            np.array(content["cells"], np.int64),
            starts,
            tuple(content["digests"]),
            content["mark"],
        )
        if not path.is_file() or path.stat().st_size != layout.row_bytes * spill.n_rows:
            raise DamagedDataError(f"{path} does not hold its {spill.n_rows} rows")
        return spill

    def count(self, cell: int, behind: int) -> int:
        """Rows of the cells from `cell` to the one before `behind`."""
        first, stop = self._range(cell, behind)
        return int(self.starts[stop] - self.starts[first])

    def load(self, cell: int, behind: int, out: Rows) -> None:
        """Read the rows of these cells into `out`, which has their number; raises DamagedDataError."""
        first, stop = self._range(cell, behind)
        start, section = int(self.starts[first]), 0
        with _disk(self.path), self.path.open("rb", buffering=0) as file:
            for part in out.parts.values():
                row_bytes = part.dtype.itemsize * int(np.prod(part.shape[1:]))
                file.seek(section + start * row_bytes)
                _read_into(file, part)
                section += self.n_rows * row_bytes
        for index in range(first, stop):
            rows = out[int(self.starts[index]) - start : int(self.starts[index + 1]) - start]
            state = xxhash.xxh3_128()
            for part in rows.parts.values():
                state.update(_bytes(part))
            if state.hexdigest() != self.digests[index]:
                raise DamagedDataError(
                    f"{self.path}: rows kept here while they are put in order are not those written; "
                    "remove its directory and convert again"
                )

    def verify(self) -> None:
        """Read every row; raises DamagedDataError."""
        for start in range(0, len(self.cells), _VERIFIED_CELLS):
            cells = self.cells[start : start + _VERIFIED_CELLS]
            first, behind = int(cells[0]), int(cells[-1]) + 1
            self.load(first, behind, self.layout.empty(self.count(first, behind)))

    def _range(self, cell: int, behind: int) -> tuple[int, int]:
        first, stop = np.searchsorted(self.cells, [cell, behind])
        return int(first), int(stop)


def read_spills(directory: Path, layout: RowLayout) -> list[Spill]:
    """The flushes of an earlier process up to the first that is damaged; what lies behind is removed.

    Every row is read: after a crash of the machine a file may lack what the disk had not yet got.
    """
    spills: list[Spill] = []
    with suppress(DamagedDataError, FileNotFoundError):
        while True:
            spill = Spill.read(spill_path(directory, len(spills)), layout)
            spill.verify()
            spills.append(spill)
    kept = {file for spill in spills for file in (spill.path, spill.path.with_suffix(".json"))}
    for file in directory.iterdir():
        if file not in kept:
            file.unlink()
    return spills


def spill_path(directory: Path, number: int) -> Path:
    """ROWS of the flush with this number, counted from 0."""
    return directory / f"{number:06d}.rows"


def _write_section(
    file: Any,
    part: NDArray[Any],
    order: NDArray[np.intp],
    starts: NDArray[np.int64],
    hashes: Sequence[Any],
) -> None:
    """The part's rows in `order`; `hashes` go on with the bytes of their cells."""
    row_bytes = part.dtype.itemsize * int(np.prod(part.shape[1:]))
    if row_bytes == 0:
        return
    staging = np.empty((max(1, _STAGING_BYTES // row_bytes), *part.shape[1:]), part.dtype)
    for start in range(0, len(order), len(staging)):
        places = order[start : start + len(staging)]
        rows = np.take(part, places, axis=0, out=staging[: len(places)], mode="clip")
        first, last = np.searchsorted(starts, [start, start + len(rows) - 1], side="right") - 1
        for index in range(first, last + 1):
            low, high = max(0, starts[index] - start), min(len(rows), starts[index + 1] - start)
            hashes[index].update(_bytes(rows[low:high]))
        data = _bytes(rows)
        while data:
            data = data[file.write(data) :]


def _read_into(file: Any, part: NDArray[Any]) -> None:
    data = _bytes(part)
    while data:
        n_bytes = file.readinto(data)
        if not n_bytes:
            raise DamagedDataError(f"{file.name} ends too soon; remove its directory and convert again")
        data = data[n_bytes:]


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


@contextmanager
def _disk(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: rows cannot be kept here while they are put in order ({error.strerror or error}); "
            "free space and run the same command to go on"
        ) from error
