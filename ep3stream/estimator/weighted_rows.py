"""Rows in memory of which each counts as often as its weight says."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray

from ep3stream.data.manifest import ColumnStatistics
from ep3stream.data.streaming.order import Rows
from ep3stream.estimator.row_sets import DRAWS, ORDERS, ArrayRows, batches_of
from ep3stream.run.batchwise.source import Pair

# Whole numbers up to so many on average are taken as they are, so that an epoch is that of the repeated rows.
_MOST_COPIES = 8


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """Rows that come as often as their weight, in place of steps of that size.

    An epoch has floor(C_i + u) - floor(C_{i-1} + u) copies of row i, C the running sum of `copies` and u uniform on
    [0, 1), drawn anew each epoch (systematic resampling: Kitagawa, 1996): copies_i on average, and for whole numbers
    always. The sum of weighted squares is what SGD then makes small, and neither step size nor batch size has to bow to
    the heaviest row (Needell, Ward, Srebro, "Stochastic gradient descent, weighted sampling, and the randomized
    Kaczmarz algorithm", 2014).
    """

    rows: ArrayRows
    copies: NDArray[np.float64]

    @classmethod
    def of(cls, rows: ArrayRows, weights: NDArray[np.float64]) -> WeightedRows:
        """weights: (n,), positive; only their ratios count, as the objective is their mean."""
        mean = weights.mean()
        is_count = bool((weights == np.round(weights)).all()) and mean <= _MOST_COPIES
        return cls(rows, weights if is_count else weights / mean)

    @property
    def n_rows(self) -> int:
        """n, each counted once."""
        return self.rows.n_rows

    def statistics(self) -> ColumnStatistics:
        """Weighted mean and standard deviation, about the mean."""
        x, share = self.rows.x, self.copies / self.copies.sum()
        mean, squares = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for rows in batches_of(len(x)):
            mean += share[rows] @ x[rows].astype(np.float64)
        for rows in batches_of(len(x)):
            squares += share[rows] @ np.square(x[rows] - mean)
        plain = self.rows.statistics()
        return ColumnStatistics(
            mean=tuple(mean.tolist()),
            std=tuple(np.sqrt(squares).tolist()),
            minimum=plain.minimum,
            maximum=plain.maximum,
            missing=plain.missing,
        )

    def draw(self, n_rows: int, seed: int, purpose: int) -> Rows:
        """Distinct ones, each with a chance that grows with its weight (Efraimidis and Spirakis, 2006)."""
        keys = np.random.default_rng((seed, purpose)).exponential(size=self.n_rows) / self.copies
        return np.argsort(keys)[:n_rows]

    def sample(self, n_rows: int, seed: int, excluded: Rows) -> Rows:
        """The first of an epoch of their own, a heavy row among them more than once: steps are measured on these."""
        return self._repeated(np.random.default_rng((seed, DRAWS)), excluded)[:n_rows]

    def take(self, rows: Rows) -> Pair:
        """A copy."""
        return self.rows.take(rows)

    def epoch(self, seed: int, epoch: int, excluded: Rows, device: torch.device) -> Iterator[Pair]:
        """All copies, mixed."""
        order = self._repeated(np.random.default_rng((seed, ORDERS, epoch)), excluded)
        for rows in batches_of(len(order)):
            yield self.take(order[rows])

    def all(self) -> Iterator[Pair]:
        """Each row once."""
        yield from self.rows.all()

    def _repeated(self, generator: Any, excluded: Rows) -> Rows:
        """Of an excluded row one copy is left out: where rows are repeated, that is the one which became a center."""
        copies = self.copies.copy()
        copies[excluded] = np.maximum(copies[excluded] - 1, 0)
        ends = np.floor(np.cumsum(copies) + generator.random()).astype(np.int64)
        return generator.permutation(np.repeat(np.arange(self.n_rows), np.diff(ends, prepend=0)))  # type: ignore[no-any-return]
