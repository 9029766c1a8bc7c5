"""Reading every segment of a store to see whether it is as written, a few at once and in bounded memory."""

from __future__ import annotations

import time
from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import TYPE_CHECKING

from ep3stream.errors import DamagedDataError
from ep3stream.store.backend import row_bytes

if TYPE_CHECKING:
    from ep3stream.store.reader import SplitReader


@dataclass(frozen=True, slots=True)
class VerifyProgress:
    """How far a check has come: bytes read so far and in all (of rows, decoded; of files in a run), seconds."""

    bytes_read: int
    bytes_total: int
    elapsed_s: float


@dataclass(frozen=True, slots=True)
class DamagedSegment:
    """A segment that is not as written, and what its reader said."""

    split: str
    index: int
    message: str


def damaged_segments(
    readers: Sequence[SplitReader], progress: Callable[[VerifyProgress], None] | None = None
) -> list[DamagedSegment]:
    """Reads all segments of all splits; those that raise DamagedDataError, in order.

    O(bytes of the store) time; two segments of memory, more where many are worth reading at once.
    """
    began, n_read, damaged = time.perf_counter(), 0, []
    n_total = sum(reader.info.n_rows * row_bytes(reader.manifest) for reader in readers)
    for reader in readers:
        for index, message in enumerate(_read_all(reader)):
            n_read += reader.info.rows_of_segment(index) * row_bytes(reader.manifest)
            if message is not None:
                damaged.append(DamagedSegment(reader.info.name, index, message))
            if progress is not None:
                progress(VerifyProgress(n_read, n_total, time.perf_counter() - began))
    return damaged


def _read_all(reader: SplitReader) -> Iterator[str | None]:
    """For each segment in order: None, or what is wrong with it."""

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
