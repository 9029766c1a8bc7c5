"""Random rows of a whole split, read by segments."""

from __future__ import annotations

import numpy as np

from ep3stream.data.manifest import SplitInfo
from ep3stream.data.streaming.order import Rows

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
