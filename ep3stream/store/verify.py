"""Checking a whole store: every segment against its digest, every piece of storage against the manifest."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import partial

from ep3stream.errors import DamagedDataError
from ep3stream.store.backend import row_bytes
from ep3stream.store.read_threads import ReadThreads
from ep3stream.store.reader import RowStore, SplitReader
from ep3stream.store.retries import finish_read


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
    A segment that does not come in time is the last one looked at.
    O(bytes of the store) time; memory for as many segments as are worth reading at once (two on a disk).
    """
    problems, damaged = list[str](), list[tuple[tuple[str, ...], str]]()
    try:
        for pieces, message in () if quick else _damaged_segments(store, progress):
            damaged.append((pieces, message))
            problems.append(message)
    except DamagedDataError as error:  # A read that does not end: what is left would hang too.
        return [*problems, str(error)]
    told = {piece for pieces, message in damaged for piece in pieces if piece in message}
    try:
        found = store.backend.inventory()
    except MemoryError:
        raise
    except Exception as error:  # HDF5 and zarr meet damage with errors of many types.
        return [*problems, f"{store.path}: its pieces cannot be listed ({error!r:.300})"]
    return problems + [f"{store.path}: {piece} {what}" for piece, what in found.items() if piece not in told]


def _damaged_segments(
    store: RowStore, progress: Callable[[VerifyProgress], None] | None
) -> Iterator[tuple[tuple[str, ...], str]]:
    """For each segment that is not as written, in order: its pieces of storage, and its reader's message.

    Raises DamagedDataError for one that does not come.
    """
    began, n_read = time.perf_counter(), 0
    bytes_of_row, splits = row_bytes(store.manifest), store.manifest.splits
    n_total = sum(info.n_rows for info in splits.values()) * bytes_of_row
    for name, info in splits.items():
        for index, message in enumerate(_read_all(store.split(name))):
            n_read += info.rows_of_segment(index) * bytes_of_row
            if message is not None:
                yield store.backend.pieces(info, index), message
            if progress is not None:
                progress(VerifyProgress(n_read, n_total, time.perf_counter() - began))


def _read_all(reader: SplitReader) -> Iterator[str | None]:
    """For each segment in order: None, or the message of the error that reading it raised.

    What failed is not read again; what does not come in time is, as elsewhere. Raises DamagedDataError then.
    """

    def read(index: int) -> str | None:
        try:
            reader.read_segment(index)
        except DamagedDataError as error:
            return str(error)
        return None

    with ReadThreads(reader.n_readers, reader.read_timeout_s, "ep3stream-verify") as threads:
        reads: deque[tuple[int, Callable[[], str | None]]] = deque()

        def begin(index: int) -> Callable[[], str | None]:
            return threads.submit(partial(read, index)).result

        def finish() -> str | None:
            index, begun = reads.popleft()
            return finish_read(reader, index, begun, partial(begin, index))

        for index in range(reader.info.n_segments):
            reads.append((index, begin(index)))
            if len(reads) > 2 * reader.n_readers:
                yield finish()
        while reads:
            yield finish()
