"""How well an order mixes: how far apart rows that lie side by side in the store end up in an epoch."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep3stream.data.streaming.order import RowOrder, Rows

SHARES = (0.05, 0.25, 0.5, 0.75, 0.95)
_MAX_WINDOWS = 32


@dataclass(frozen=True, slots=True)
class OrderQuality:
    """Distances, in rows of an epoch, between rows that are neighbours in the store.

    distances: at each of SHARES, the distance below which that share of neighbours ends up; perfect: the same of a
    perfect shuffle. same_batch, perfect_same_batch: the share of neighbours that meet in one batch. window_rows:
    rows that are mixed together; n_pairs: neighbours looked at.
    """

    n_rows: int
    window_rows: int
    batch_rows: int
    n_pairs: int
    distances: tuple[float, ...]
    perfect: tuple[float, ...]
    same_batch: float
    perfect_same_batch: float

    @property
    def relative(self) -> float:
        """The median distance as a share of a perfect shuffle's."""
        middle = SHARES.index(0.5)
        return self.distances[middle] / self.perfect[middle]


def order_quality(order: RowOrder, epoch: int = 0) -> OrderQuality:
    """Measured on all windows of an epoch, or on 32 of them spread over it; O(rows of these) time.

    Two places drawn at random from n are at most t n apart with the probability 1 - (1 - t)^2.
    """
    segments = order.segments(epoch)
    ends = order.window_ends(segments)
    n_looked_at = min(order.n_windows, _MAX_WINDOWS)
    looked_at = np.unique(np.linspace(0, order.n_windows - 1, n_looked_at).astype(np.int64))
    distances, batches = [], []
    for index in looked_at.tolist():
        first = int(ends[index - 1]) if index else 0
        for places in _neighbours(order, epoch, index, order.window(segments, index)):
            distances.append(np.abs(places[1] - places[0]))
            # The last step whose first row, floor(rows * step / steps), is not behind the place.
            of_batch = ((places + first + 1) * order.steps_per_epoch - 1) // order.epoch_rows
            batches.append(of_batch[0] == of_batch[1])
    apart = np.concatenate(distances) if distances else np.zeros(0, np.int64)
    n_rows, batch_rows = order.epoch_rows, -(-order.epoch_rows // order.steps_per_epoch)
    return OrderQuality(
        n_rows=n_rows,
        window_rows=int(np.diff(ends, prepend=0).max()),
        batch_rows=batch_rows,
        n_pairs=len(apart),
        distances=tuple(np.quantile(apart, SHARES).tolist()) if len(apart) else (0.0,) * len(SHARES),
        perfect=tuple(n_rows * (1 - math.sqrt(1 - share)) for share in SHARES),
        same_batch=float(np.concatenate(batches).mean()) if batches else 0.0,
        perfect_same_batch=(batch_rows - 1) / max(1, n_rows - 1),
    )


def _neighbours(order: RowOrder, epoch: int, index: int, window: Rows) -> Iterator[NDArray[np.int64]]:
    """Places within the window, (2, pairs), of rows that follow one another in a segment of it."""
    rows = order.window_rows(epoch, index, window)
    place = np.full(len(window) * order.segment_rows, -1, np.int64)
    place[rows] = np.arange(len(rows))
    for start in range(0, len(place), order.segment_rows):
        within = place[start : start + order.segment_rows]
        pairs = np.stack([within[:-1], within[1:]])
        yield pairs[:, (pairs >= 0).all(0)]  # Rows that became centers have no place.
