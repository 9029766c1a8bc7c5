"""Segments of a split in the order asked for, with the next ones being read."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

from numpy.typing import NDArray

from ep3stream.config import READ_TIMEOUT_S
from ep3stream.data.store import SplitReader
from ep3stream.data.streaming.read_threads import Hung, Read, ReadThreads
from ep3stream.data.streaming.segment_reads import ATTEMPTS, hung_error, read_patiently

_AHEAD = 2

Segment = tuple[NDArray[Any], NDArray[Any]]


def scan(
    reader: SplitReader, segments: Iterable[int] | None = None, timeout_s: float = READ_TIMEOUT_S
) -> Generator[Segment, None, None]:
    """Yields x (rows, d) and y of each of the segments, all of them unless said; at most three are in memory.

    Reads that fail or hang are begun again, as those of a BatchStream. Raises DamagedDataError naming the segment
    that is not as written, or does not come.
    """
    with ReadThreads(_AHEAD, timeout_s, "ep3stream-scan") as threads:

        def begin(segment: int) -> Read[Segment]:
            return threads.submit(lambda: read_patiently(reader, segment)[:2])

        def end(segment: int, read: Read[Segment]) -> Segment:
            for _ in range(ATTEMPTS - 1):
                try:
                    return read.result()
                except Hung:
                    read = begin(segment)
            try:
                return read.result()
            except Hung:
                raise hung_error(reader, segment, timeout_s) from None

        reads: deque[tuple[int, Read[Segment]]] = deque()
        for segment in range(reader.info.n_segments) if segments is None else segments:
            reads.append((segment, begin(segment)))
            if len(reads) > _AHEAD:
                yield end(*reads.popleft())
        while reads:
            yield end(*reads.popleft())
