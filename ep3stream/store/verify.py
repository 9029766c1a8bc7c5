"""Checking a whole store: every segment against its digest, every piece of storage against the manifest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass

from ep3stream.errors import DamagedDataError
from ep3stream.store.backend import row_bytes
from ep3stream.store.reader import RowStore, SplitReader


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far a check has come: bytes read so far and in all (of rows, decoded; of files in a run), seconds."""

    bytes_read: int
    bytes_total: int
    elapsed_s: float


def verify_store(
    store: RowStore, *, quick: bool = False, progress: Callable[[VerifyProgress], None] | None = None
) -> list[str]:
    """A sentence for each damaged, missing or foreign piece of the store; empty for a sound store.

    quick: presence, sizes and metadata only; a changed byte in a row is not seen. progress: called after each segment.
    O(bytes of the store) time; memory for as many segments as are worth reading at once (two on a disk).
    """
    damaged = [] if quick else _damaged_segments(store, progress)
    problems = [message for _, message in damaged]
    told = {piece for pieces, message in damaged for piece in pieces if piece in message}
    try:
        found = store.backend.inventory()
    except Exception as error:  # HDF5 and zarr meet damage with errors of many types.
        return [*problems, f"{store.path}: its pieces cannot be listed ({error!r:.300})"]
    return problems + [f"{store.path}: {piece} {what}" for piece, what in found.items() if piece not in told]


def _damaged_segments(
    store: RowStore, progress: Callable[[VerifyProgress], None] | None
) -> list[tuple[tuple[str, ...], str]]:
    """For each segment that is not as written, in order: its pieces of storage, and its reader's message."""
    began, n_read, damaged = time.perf_counter(), 0, []
    bytes_of_row, splits = row_bytes(store.manifest), store.manifest.splits
    n_total = sum(info.n_rows for info in splits.values()) * bytes_of_row
    for name, info in splits.items():
        for index, message in enumerate(_read_all(store.split(name))):
            n_read += info.rows_of_segment(index) * bytes_of_row
            if message is not None:
                damaged.append((store.backend.pieces(info, index), message))
            if progress is not None:
                progress(VerifyProgress(n_read, n_total, time.perf_counter() - began))
    return damaged


def _read_all(reader: SplitReader) -> Iterator[str | None]:
    """For each segment in order: None, or the message of the error that reading it raised."""

    def read(index: int) -> str | None:
        try:
            reader.read_segment(index)
        except DamagedDataError as error:
            return str(error)
        return None

    with ThreadPoolExecutor(reader.n_readers, "ep3stream-verify") as pool:
        reads: deque[Future[str | None]] = deque()
        try:
            for index in range(reader.info.n_segments):
                reads.append(pool.submit(read, index))
                if len(reads) > 2 * reader.n_readers:
                    yield reads.popleft().result()
            while reads:
                yield reads.popleft().result()
        finally:
            for future in reads:
                future.cancel()
