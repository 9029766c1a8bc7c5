"""All rows of a split once, in the store's order, a segment at a time, with the next ones being read."""

from __future__ import annotations

from collections import deque
from collections.abc import Generator
from concurrent.futures import Future, ThreadPoolExecutor
from typing import Any

from numpy.typing import NDArray

from ep3stream.data.store import SplitReader

_AHEAD = 2

Segment = tuple[NDArray[Any], NDArray[Any]]


def scan(reader: SplitReader, first_segment: int = 0) -> Generator[Segment, None, None]:
    """Yields x (rows, d) and y of segment 0, 1, ..., or from a later one; at most three segments are in memory.

    Raises DamagedDataError naming the segment that is not as written.
    """
    with ThreadPoolExecutor(_AHEAD, "ep3stream-scan") as pool:
        reads: deque[Future[Segment]] = deque()
        try:
            for segment in range(first_segment, reader.info.n_segments):
                reads.append(pool.submit(reader.read_segment, segment))
                if len(reads) > _AHEAD:
                    yield reads.popleft().result()
            while reads:
                yield reads.popleft().result()
        finally:
            for read in reads:
                read.cancel()
