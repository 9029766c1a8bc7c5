"""Random rows of a whole split, and (from the store's own `scan`) the split's segments one after another."""

from __future__ import annotations

import numpy as np

from ep3stream.store.manifest import SplitInfo
from ep3stream.store.scan import Segment as Segment
from ep3stream.store.scan import scan as scan
from ep3stream.stream.order import Rows

_MAX_SEGMENTS = 64


def sample_rows(info: SplitInfo, n_rows: int, *stream: int) -> Rows:
    """`n_rows` distinct row numbers of the split in random order, a function of the integers `stream`.

    The rows lie in at most 64 random segments, or in as many as hold twice as many rows where 64 do not: rows drawn
    from all of 10^9 would have the whole store read. n_rows may not exceed the split's rows.
    """
    generator = np.random.default_rng(stream)
    n_segments = max(_MAX_SEGMENTS, -(-2 * n_rows // info.segment_rows))
    if info.n_segments <= n_segments:
        return generator.choice(info.n_rows, n_rows, replace=False).astype(np.int64)
    # The last segment may be shorter; leaving it out keeps every other row equally likely.
    segments = generator.choice(info.n_segments - 1, n_segments, replace=False).astype(np.int64)
    pool = generator.choice(n_segments * info.segment_rows, n_rows, replace=False).astype(np.int64)
    return segments[pool // info.segment_rows] * info.segment_rows + pool % info.segment_rows
