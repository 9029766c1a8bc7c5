"""`RowArray`: an array whose rows are read in order, and the three ways to read them.

From the plain bytes of a file, from a packed stream, and from chunks. The modules of the formats choose one.
"""

from __future__ import annotations

import math
import zlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.errors import SourceError
from ep3stream.formats.file_holes import tell_holes
from ep3stream.formats.source import reading

# Chunks up to this size are read once and whole, even if the reader asks for less at a time.
_CHUNK_BYTES = 256 << 20
_READ_BYTES = 1 << 20

# Rows, and how many bytes of the file have been read to get them.
RowBlocks = Iterator[tuple[NDArray[Any], int]]

# Opens an unpacked stream, with a function that says how many bytes of the packed file have been read.
OpenStream = Callable[[], AbstractContextManager[tuple[Any, Callable[[], int]]]]


@dataclass(frozen=True, slots=True, eq=False)
class RowArray:
    """An array whose rows can be read in order, any number of times.

    name: what messages call it. files: the files read, that of the rows first; directories for Zarr, none for an
    array of Python.
    blocks(block_rows, start_row): the rows from `start_row` on, about `block_rows` at a time; masked arrays where
    an array of Python is masked.
    is_costly: whether a second reading should be avoided.
    is_raw: whether the bytes of a block are those of the file.
    """

    name: str
    files: tuple[Path, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[int, int], RowBlocks]
    is_costly: bool = False
    is_raw: bool = False

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def row_bytes(self) -> int:
        """The size of one row in the array's own type."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


@dataclass(frozen=True, slots=True)
class StoredSum:
    """The CRC-32 that a file states of a range of its bytes: from `first_byte` to the end of the array."""

    crc: int
    first_byte: int


def plain_array(
    name: str, file: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], order: str,
    stored: StoredSum | None = None,
) -> RowArray:  # fmt: skip
    """An array that lies unpacked in the file from byte `offset` on, by rows (C) or by columns (F).

    stored: a sum to be checked while the rows are read; rows before a restart are read again for it.
    """
    row_bytes, end_byte = math.prod(shape[1:]) * dtype.itemsize, offset + math.prod(shape) * dtype.itemsize
    if file.stat().st_size < end_byte:
        raise SourceError(
            f"{name}: cannot be read (it has {file.stat().st_size} bytes, its header says {end_byte}); "
            "it is truncated"
        )
    if stored is None:
        tell_holes(name, file, offset, end_byte)

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        crc = 0
        if stored is not None:
            before = end_byte if order == "F" else offset + start_row * row_bytes
            crc = _sum_of(file, stored.first_byte, before, name)
            if order == "F" and crc != stored.crc:
                raise _damaged(name)
        for row in range(start_row, shape[0], block_rows):
            stop = min(row + block_rows, shape[0])
            if order == "C":
                rows = np.empty((stop - row, *shape[1:]), dtype)
                data = rows.reshape(-1).view(np.uint8).data if rows.size else memoryview(b"")
                _read_into(data, file, offset + row * row_bytes, name)
                if stored is not None:
                    crc = zlib.crc32(data, crc)
                    if stop == shape[0] and crc != stored.crc:
                        raise _damaged(name)
            else:
                # Mapped anew for each block: pages of a map that was dropped do not stay in the process.
                rows = np.memmap(file, dtype, "r", offset, shape, "F")[row:stop]
            yield rows, offset + stop * row_bytes

    return RowArray(name, (file,), shape, dtype, blocks, is_raw=order == "C")


def _sum_of(file: Path, first_byte: int, end_byte: int, name: str) -> int:
    """The CRC-32 of a range of a file's bytes."""
    memory, crc = memoryview(bytearray(_READ_BYTES)), 0
    for at in range(first_byte, end_byte, _READ_BYTES):
        piece = memory[: min(_READ_BYTES, end_byte - at)]
        _read_into(piece, file, at, name)
        crc = zlib.crc32(piece, crc)
    return crc


def _damaged(name: str) -> SourceError:
    return SourceError(f"{name}: does not have the CRC-32 that the file states; it is damaged: restore it")


def _read_into(data: memoryview, file: Path, offset: int, name: str) -> None:
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while data:
            n_bytes = stream.readinto(data)
            if not n_bytes:
                raise SourceError(f"{name}: became shorter while it was read; convert it when it is complete")
            data = data[n_bytes:]


def packed_array(
    name: str, file: Path, opened: OpenStream, header_bytes: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> RowArray:
    """An array that must be unpacked from its beginning; the rows before a restart are skipped."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        with reading(file), opened() as (stream, position):
            skip_bytes(stream, header_bytes + start_row * row_bytes, name)
            for row in range(start_row, shape[0], block_rows):
                n_rows = min(block_rows, shape[0] - row)
                data = read_exactly(stream, n_rows * row_bytes, name)
                if row + n_rows == shape[0]:
                    require_end(stream, name)
                yield np.frombuffer(data, dtype).reshape(n_rows, *shape[1:]), position()

    return RowArray(name, (file,), shape, dtype, blocks)


def read_exactly(stream: Any, n_bytes: int, name: str) -> bytes:
    """The next bytes of a stream; raises SourceError if it ends before them."""
    pieces: list[bytes] = []
    while n_bytes:
        piece = stream.read(n_bytes)
        if not piece:
            raise SourceError(f"{name}: cannot be read (it ends {n_bytes} bytes early); it is truncated")
        pieces.append(piece)
        n_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def skip_bytes(stream: Any, n_bytes: int, name: str) -> None:
    """Passes over the next bytes; raises SourceError if the stream ends before them."""
    while n_bytes:
        n_bytes -= len(read_exactly(stream, min(n_bytes, _READ_BYTES), name))


def require_end(stream: Any, name: str) -> None:
    """Raises SourceError if the stream goes on; a stream that has a checksum compares it at its end."""
    if stream.read(1):
        raise SourceError(f"{name}: holds more than its header says; it is damaged")


def chunked_array(
    name: str, files: tuple[Path, ...], shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int,
    opened: Callable[[], AbstractContextManager[Any]],
) -> RowArray:  # fmt: skip
    """An array in chunks of rows, each of which is read once; `opened()` gives an array to slice by rows."""
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    n_bytes = 0 if files[0].is_dir() else files[0].stat().st_size

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        whole = chunk_rows if chunk_rows * row_bytes <= _CHUNK_BYTES else 1
        step = max(1, block_rows // whole) * whole
        with reading(name), opened() as array:
            row = start_row
            while row < shape[0]:
                end = min((row // step + 1) * step, shape[0])
                read = np.asarray(array[row:end])
                if read.shape != (end - row, *shape[1:]):
                    raise SourceError(
                        f"{name}: became shorter while it was read; convert it when it is complete"
                    )
                for at in range(0, len(read), block_rows):
                    yield read[at : at + block_rows], n_bytes * end // shape[0]
                row = end

    return RowArray(name, files, shape, dtype, blocks)
