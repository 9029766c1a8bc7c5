"""Segments of a split in a given order, with the next two being read."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Generator, Iterable
from typing import Any

from numpy.typing import NDArray

from ep3stream.store.backend import SegmentReader
from ep3stream.store.read_threads import ReadThreads
from ep3stream.store.retries import finish_read

_AHEAD = 2

Segment = tuple[NDArray[Any], NDArray[Any]]


def scan(reader: SegmentReader, segments: Iterable[int] | None = None) -> Generator[Segment, None, None]:
    """Yield x (rows, d) and y of each of the segments, by default of all; at most three segments are in memory.

    Reads that fail or hang are begun again as `finish_read` says. Raises DamagedDataError naming a segment whose rows
    are not those written, or which does not come.
    """
    with ReadThreads(_AHEAD, reader.read_timeout_s, "ep3stream-scan") as threads:
        reads: deque[tuple[int, Callable[[], Segment]]] = deque()

        def begin(segment: int) -> Callable[[], Segment]:
            return threads.submit(lambda: reader.read_segment(segment)).result

        def finish() -> Segment:
            segment, read = reads.popleft()
            return finish_read(reader, segment, read, lambda: begin(segment))

        for segment in range(reader.info.n_segments) if segments is None else segments:
            reads.append((segment, begin(segment)))
            if len(reads) > _AHEAD:
                yield finish()
        while reads:
            yield finish()
