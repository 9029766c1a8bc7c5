"""Encoded rows that do not fit in memory, in files on the disk: one file for each time a buffer was full.

The top byte of a row's key is its split. The split and the next bits of the key are the row's cell. In a file the rows
of one cell lie together, and the cells are in ascending order. So a range of keys is one stretch of each file, and any
number of neighbouring cells can be read at once: as many as fit in memory, which is known once all rows are counted.

N.rows holds one section for each part of a row: all keys, then all x, and so on. N.json beside it is written after
N.rows. It holds the number of rows and the digest of each cell, and the `read_state`: what the caller needs to go on
reading after these rows. Neither file is brought to the disk (fsync): `read_spills` checks every byte instead.
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
from ep3stream.conversion.rows import EncodedRows, RowLayout
from ep3stream.errors import DamagedDataError, DiskError
from ep3stream.store.json_files import signed_bytes, signed_object

SPLIT_SHIFT = 56  # The split is the key's bits from this one up.
MAX_SPLITS = 256

# Bits of a cell beside those of its split, for few and for many splits: 16 bits in all, which numpy sorts fastest.
_MANY_BITS, _FEW_BITS = 12, 8
_STAGING_BYTES = 4 * MIB
_VERIFIED_CELLS = 64


def cells_of(keys: NDArray[np.uint64], n_splits: int) -> NDArray[np.uint16]:
    """Returns the cell of each key."""
    return (keys >> np.uint64(SPLIT_SHIFT - _cell_bits(n_splits))).astype(np.uint16)


def cells_of_split(split: int, n_splits: int) -> tuple[int, int]:
    """Returns the first cell of a split and the first cell after the split."""
    bits = _cell_bits(n_splits)
    return split << bits, (split + 1) << bits


def _cell_bits(n_splits: int) -> int:
    return _MANY_BITS if n_splits << _MANY_BITS <= 1 << 16 else _FEW_BITS


@dataclass(frozen=True, slots=True)
class Spill:
    """The rows of one file.

    cells: the numbers of the cells that have rows, ascending, (n_cells,). starts: rows before each cell, and the
    number of all rows, (n_cells + 1,). digests: xxh3_128 of each cell's rows.
    """

    path: Path
    layout: RowLayout
    cells: NDArray[np.int64]
    starts: NDArray[np.int64]
    digests: tuple[str, ...]
    read_state: Mapping[str, Any]

    @property
    def n_rows(self) -> int:
        """Rows in the file."""
        return int(self.starts[-1])

    @classmethod
    def write(
        cls, path: Path, layout: RowLayout, rows: EncodedRows, n_splits: int, read_state: Mapping[str, Any]
    ) -> Spill:
        """Writes the rows by cell; rows of one cell stay in their order. Raises DiskError."""
        cell = cells_of(rows.key, n_splits)
        order = np.argsort(cell, kind="stable")
        counts = np.bincount(cell)
        cells = np.flatnonzero(counts)
        starts = np.concatenate([[0], np.cumsum(counts[cells])])
        hashes = [xxhash.xxh3_128() for _ in cells]
        with _disk_errors_named(path):
            with path.open("wb", buffering=0) as file:
                for part in rows.parts.values():
                    _write_section(file, part, order, starts, hashes)
            digests = tuple(state.hexdigest() for state in hashes)
            # If a kill cuts this write short, the content is not what its digest says, and the spill is not believed.
            content = {
                "cells": cells.tolist(),
                "starts": starts.tolist(),
                "digests": list(digests),
                "mark": read_state,
            }
            path.with_suffix(".json").write_bytes(signed_bytes(content))
        return cls(path, layout, cells, starts, digests, read_state)

    @classmethod
    def read(cls, path: Path, layout: RowLayout) -> Spill:
        """Returns the spill that an earlier process wrote to `path`; its rows are not read.

        Raises FileNotFoundError if there is none, and DamagedDataError if a file is not as written.
        """
        sidecar = path.with_suffix(".json")
        content = signed_object(sidecar.read_bytes(), str(sidecar))
        cells, starts = (np.array(content[name], np.int64) for name in ("cells", "starts"))
        spill = cls(path, layout, cells, starts, tuple(content["digests"]), content["mark"])
        if not path.is_file() or path.stat().st_size != layout.row_bytes * spill.n_rows:
            raise DamagedDataError(f"{path} does not hold its {spill.n_rows} rows")
        return spill

    def count(self, cell: int, end: int) -> int:
        """Returns the number of rows in the cells from `cell` to `end` - 1."""
        first, stop = self._range(cell, end)
        return int(self.starts[stop] - self.starts[first])

    def load(self, cell: int, end: int, out: EncodedRows) -> None:
        """Reads the rows of the cells from `cell` to `end` - 1 into `out`, which has as many rows.

        Raises DamagedDataError if they are not the rows written, and DiskError.
        """
        first, stop = self._range(cell, end)
        start, section = int(self.starts[first]), 0
        with _disk_errors_named(self.path), self.path.open("rb", buffering=0) as file:
            for part in out.parts.values():
                row_bytes = _row_bytes(part)
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
        """Reads every row; raises DamagedDataError."""
        for start in range(0, len(self.cells), _VERIFIED_CELLS):
            cells = self.cells[start : start + _VERIFIED_CELLS]
            first, end = int(cells[0]), int(cells[-1]) + 1
            self.load(first, end, self.layout.empty(self.count(first, end)))

    def _range(self, cell: int, end: int) -> tuple[int, int]:
        """Returns the indices into `self.cells` of the first cell from `cell` on, and of the first from `end` on."""
        first, stop = np.searchsorted(self.cells, [cell, end])
        return int(first), int(stop)


def read_spills(directory: Path, layout: RowLayout) -> list[Spill]:
    """Returns the spills of an earlier process up to the first damaged one; removes all other files.

    Reads every row: after a power failure a file may lack what the system had not yet brought to the disk.
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
    """Returns the path of the rows of spill `number`, counted from 0."""
    return directory / f"{number:06d}.rows"


def _write_section(
    file: Any,
    part: NDArray[Any],
    order: NDArray[np.intp],
    starts: NDArray[np.int64],
    hashes: Sequence[Any],
) -> None:
    """Writes the part's rows in `order`, and adds the bytes of each cell to the cell's hash."""
    row_bytes = _row_bytes(part)
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


def _row_bytes(part: NDArray[Any]) -> int:
    return part.dtype.itemsize * int(np.prod(part.shape[1:]))


def _bytes(array: NDArray[Any]) -> memoryview:
    return array.reshape(-1).view(np.uint8).data if array.size else memoryview(b"")


@contextmanager
def _disk_errors_named(path: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise DiskError(
            f"{path}: rows cannot be kept here while they are put in order ({error.strerror or error}); "
            "free space and run the same command to go on"
        ) from error
