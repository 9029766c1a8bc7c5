"""The rows of one chunk of a Zarr array, from its bytes in a file straight into the caller's memory.

Codecs are those of our own stores alone (Zarr v3): the rows' bytes, perhaps packed by Blosc, then a crc32c; in
shards, several of these one behind the other, then an index with a crc32c of its own. Zarr's own way takes three
times as long: it copies the rows, and passes each chunk through an event loop.
"""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from ep3stream.data.backend import SplitLayout
from ep3stream.data.store_files import StoreFiles
from ep3stream.data.zarr_files import CHECKSUM_BYTES, chunk_bytes, read_index

Bytes = NDArray[np.uint8]


class ChunkReader:
    """Reads chunks of one store's files. Holds memory for the packed bytes of as many as are read at once."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._spare: list[Bytes] = []

    def read(self, file: str, layout: SplitLayout, array: str, place: int, rows: NDArray[Any]) -> float:
        """Fill `rows`, the first ones of the chunk that is number `place` in `file`; sizes were checked.

        Returns the seconds it took to get the stored bytes. Raises ValueError where their checksum is wrong.
        """
        out = rows.reshape(-1).view(np.uint8)
        start, stored = self._place(file, layout, place)
        if layout.codec == "none":
            return self._read_plain(file, start, stored, out)
        with self._scratch(stored) as packed:
            read_s = self._read(file, start, packed)
            _require_checksum(
                google_crc32c.value(packed[:-CHECKSUM_BYTES]), packed[-CHECKSUM_BYTES:].tobytes()
            )
            _unpack(packed[:-CHECKSUM_BYTES], out, chunk_bytes(layout, array))
        return read_s

    def _place(self, file: str, layout: SplitLayout, place: int) -> tuple[int, int]:
        """First byte and number of bytes of a chunk, its checksum included."""
        size = self._files.size(file)
        if layout.chunks_per_file == 1:
            return 0, size
        index, checksum = read_index(self._files, file, size, layout.chunks_per_file)
        _require_checksum(google_crc32c.value(index.reshape(-1).view(np.uint8)), checksum)
        start, stored = index[place].tolist()
        return start, stored

    def _read_plain(self, file: str, start: int, stored: int, out: Bytes) -> float:
        rest = np.empty(stored - len(out), np.uint8)  # What fills the chunk up, and the checksum.
        read_s = self._read(file, start, out, rest)
        checksum = google_crc32c.extend(google_crc32c.value(out), rest[:-CHECKSUM_BYTES])
        _require_checksum(checksum, rest[-CHECKSUM_BYTES:].tobytes())
        return read_s

    def _read(self, file: str, start: int, *outs: Bytes) -> float:
        began = time.perf_counter()
        self._files.read_into(file, start, *(out.data for out in outs))
        return time.perf_counter() - began

    @contextmanager
    def _scratch(self, n_bytes: int) -> Iterator[Bytes]:
        # The first touch of new memory would take as long as unpacking.
        buffer = self._spare.pop() if self._spare else np.empty(0, np.uint8)
        if len(buffer) < n_bytes:
            buffer = np.empty(n_bytes, np.uint8)
        try:
            yield buffer[:n_bytes]
        finally:
            self._spare.append(buffer)


def _require_checksum(found: int, stored: bytes) -> None:
    if found.to_bytes(CHECKSUM_BYTES, "little") != stored:
        raise ValueError(f"its checksum is {found:08x}, not {int.from_bytes(stored, 'little'):08x} as stored")


def _unpack(packed: Bytes, out: Bytes, n_decoded: int) -> None:
    """Blosc's bytes into `out`, by way of other memory where the chunk is longer."""
    whole = out if len(out) == n_decoded else np.empty(n_decoded, np.uint8)
    numcodecs.Blosc().decode(packed, out=whole)
    if whole is not out:
        out[:] = whole[: len(out)]
