"""Random rows of a whole split, read by segments.

Segments of a split in the order asked for, with the next ones being read.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Generator, Iterable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import READ_TIMEOUT_S
from ep3stream.store.manifest import SplitInfo
from ep3stream.store.reader import SplitReader
from ep3stream.stream.order import Rows
from ep3stream.stream.segment_reads import ATTEMPTS, Hung, Read, ReadThreads, hung_error, read_patiently

_MAX_SEGMENTS = 64


def sample_rows(info: SplitInfo, n_rows: int, *stream: int) -> Rows:
    """`n_rows` distinct row numbers of the split in random order, a function of the integers `stream`.

    They lie in at most 64 random segments, unless it takes more to hold twice as many rows: drawing from
    all of 10^9 rows would read the whole store. n_rows may not exceed the split's rows.
    """
    generator = np.random.default_rng(stream)
    n_segments = max(_MAX_SEGMENTS, -(-2 * n_rows // info.segment_rows))
    if info.n_segments <= n_segments:
        return generator.choice(info.n_rows, n_rows, replace=False).astype(np.int64)
    # The last segment may be shorter; leaving it out keeps every other row equally likely.
    segments = generator.choice(info.n_segments - 1, n_segments, replace=False).astype(np.int64)
    pool = generator.choice(n_segments * info.segment_rows, n_rows, replace=False).astype(np.int64)
    return segments[pool // info.segment_rows] * info.segment_rows + pool % info.segment_rows


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
