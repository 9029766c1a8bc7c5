"""Holes of files: ranges that take no room on the disk, because nothing was ever written there.

They are read as zeros. A writer that reserves an array and stops half-way leaves one (np.lib.format.open_memmap, a
contiguous dataset of HDF5, an interrupted download), and so does a copy that leaves zeros out: nobody can tell these
apart, so holes are told and not refused. File systems without holes show none.
"""

from __future__ import annotations

import errno
import logging
import os
from pathlib import Path

_logger = logging.getLogger(__name__)

# A file in more pieces than this is looked at no further.
_MAX_PIECES = 10_000


def tell_holes(name: str, file: Path, first_byte: int, end_byte: int) -> None:
    """Warns if some of these bytes of the file were never written; `name` is what they are called."""
    n_bytes = hole_bytes(file, first_byte, end_byte)
    if n_bytes:
        _logger.warning(
            "%s: %d of its %d bytes were never written, or are zeros that were left out of the file; they are read as "
            "0; write them if they were lost",
            name,
            n_bytes,
            end_byte - first_byte,
        )


def hole_bytes(file: Path, first_byte: int, end_byte: int) -> int:
    """The number of bytes of the range that lie in holes; one or two system calls for a file without any."""
    n_bytes = 0
    handle = os.open(file, os.O_RDONLY)
    try:
        end_byte = min(end_byte, os.fstat(handle).st_size)
        at = first_byte
        for _ in range(_MAX_PIECES):
            if at >= end_byte:
                break
            data = min(_next(handle, at, os.SEEK_DATA, end_byte), end_byte)
            n_bytes += data - at
            at = _next(handle, data, os.SEEK_HOLE, end_byte) if data < end_byte else end_byte
    finally:
        os.close(handle)
    return n_bytes


def _next(handle: int, at: int, what: int, end_byte: int) -> int:
    """Where the next data or hole begins; the end if there is none. What nobody can tell is taken as data."""
    try:
        return os.lseek(handle, at, what)
    except OSError as error:
        return at if what == os.SEEK_DATA and error.errno != errno.ENXIO else end_byte
