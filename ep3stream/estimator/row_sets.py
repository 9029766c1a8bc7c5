"""Rows for the estimators that have no fixed place: blocks of Dask arrays, and rows that count as often as they weigh.

Both give batches of their own (`online.sources.BatchSource`). Arrays in memory and splits of stores are sources of
`KernelModel` already.
"""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import accumulate
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.conversion.numbers import Moments
from ep3stream.errors import InputError
from ep3stream.formats.python_objects import computed_ahead
from ep3stream.online.sources import Pair
from ep3stream.solver.model import unmasked
from ep3stream.store.manifest import ColumnStatistics
from ep3stream.stream.order import Rows
from ep3stream.values.offsets import Offsets, shifted

_BATCH_ROWS = 4096
_MAX_BLOCKS = 64

# Purposes of random numbers.
_CENTERS, ORDERS, DRAWS, _BLOCKS = 7, 4, 5, 6

# Whole numbers up to so many on average are taken as they are, so that an epoch is that of the repeated rows.
_MOST_COPIES = 8
NO_ROWS = np.empty(0, np.int64)


@dataclass(frozen=True, slots=True)
class DaskRows:
    """Blocks of rows, computed one after another with the next under way: O(window_blocks) blocks of memory.

    x: (n, d), y: (n,) or (n, c), of the same row chunks. The rows of `window_blocks` blocks are mixed, in random
    order of blocks, so rows sorted by target need smaller blocks or more of them at a time. offsets: what is subtracted
    from x and y, in float64, before x is rounded.
    """

    x: Any
    y: Any
    window_blocks: int
    excluded: Rows = field(default_factory=lambda: NO_ROWS)
    offsets: Offsets | None = None

    @classmethod
    def of(cls, x: Any, y: Any, memory_bytes: int) -> DaskRows:
        """Rows of x and y, mixed in windows of an eighth of the memory. InputError where x and y do not match."""
        x, y = _row_blocks(x), _row_blocks(y)
        if len(x) != len(y) or not len(x):
            raise InputError(f"x has {len(x)} rows and y {len(y)}; give as many of both, at least one")
        y = y.rechunk({0: x.chunks[0]})
        block_bytes = max(x.chunks[0]) * (4 * x.shape[1] + 8 * math.prod(y.shape[1:]))
        return cls(x, y, max(1, memory_bytes // 8 // block_bytes))

    def first_rows(self, n_rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """x and y of the first rows as they are; of numbers that float32 holds whole, none: nothing can be lost."""
        if all(np.can_cast(each.dtype, np.float32) for each in (self.x, self.y)):
            return np.empty((0, self.x.shape[1]), np.float32), np.empty((0, *self.y.shape[1:]), np.float32)
        ends = [*accumulate(self.x.chunks[0])]
        n_blocks = next((i for i, end in enumerate(ends, 1) if end >= n_rows), len(ends))
        x, y = _Block((self.x.blocks[:n_blocks], self.y.blocks[:n_blocks])).compute()
        return np.asarray(x)[:n_rows], np.asarray(y)[:n_rows]

    @property
    def n_rows(self) -> int:
        """Rows of an epoch."""
        return len(self.x) - len(self.excluded)

    def statistics(self) -> ColumnStatistics:
        """Statistics of the features, from one pass over the blocks."""
        moments = Moments.empty(self.x.shape[1])
        for (block,) in self._computed(range(self.x.numblocks[0]), with_y=False):
            moments = moments.merge(Moments.of(block))
        return _statistics(moments)

    def draw_centers(self, n_rows: int, seed: int) -> Rows:
        """Numbers of the rows that become centers, in random order."""
        return self._draw(n_rows, seed, _CENTERS)

    def _draw(self, n_rows: int, seed: int, purpose: int) -> Rows:
        """Distinct row numbers of 64 random blocks, or of as many as hold twice the rows: each has to be computed."""
        generator = np.random.default_rng((seed, purpose))
        starts, sizes = self._starts(), np.array(self.x.chunks[0])
        blocks = generator.permutation(len(sizes))
        enough = int(np.searchsorted(np.cumsum(sizes[blocks]), 2 * n_rows)) + 1
        chosen = np.sort(blocks[: max(_MAX_BLOCKS, enough)])
        pool = np.concatenate([starts[block] + np.arange(sizes[block]) for block in chosen])
        return pool[generator.permutation(len(pool))[:n_rows]].astype(np.int64)

    def drawn(self, n_rows: int, seed: int) -> Pair:
        """Random rows, none of them excluded, in random order."""
        rows = self._draw(n_rows + len(self.excluded), seed, DRAWS)
        return self.take(rows[~np.isin(rows, self.excluded)][:n_rows])

    def take(self, rows: Rows) -> Pair:
        """x, (m, d), and y of these row numbers; computes the blocks that hold them."""
        starts = self._starts()
        order = np.argsort(rows, kind="stable")
        in_block = np.searchsorted(starts, rows[order], side="right") - 1
        blocks, begins = np.unique(in_block, return_index=True)
        x = np.empty((len(rows), self.x.shape[1]), np.float32)
        y_dtype = self.y.dtype if self.offsets is None or not self.offsets.y.any() else np.dtype(np.float64)
        y = np.empty((len(rows), *self.y.shape[1:]), y_dtype)
        parts = np.split(order, begins[1:])
        for block, places, (block_x, block_y) in zip(
            blocks, parts, self._computed(blocks.tolist()), strict=True
        ):
            within = rows[places] - starts[block]
            x[places], y[places] = block_x[within], block_y[within]
        return x, y

    def epoch(self, seed: int, epoch: int) -> Iterator[Pair]:
        """Blocks in random order, the rows of a window of them mixed."""
        excluded, generator = self.excluded, np.random.default_rng((seed, _BLOCKS, epoch))
        blocks, starts = generator.permutation(self.x.numblocks[0]), self._starts()
        computed = self._computed(blocks.tolist())
        for first in range(0, len(blocks), self.window_blocks):
            window = []
            for block in blocks[first : first + self.window_blocks]:
                block_x, block_y = next(computed)
                bounds = np.searchsorted(excluded, [starts[block], starts[block] + len(block_x)])
                kept = np.delete(np.arange(len(block_x)), excluded[slice(*bounds)] - starts[block])
                window.append((block_x[kept], block_y[kept]))
            x, y = (np.concatenate(parts) for parts in zip(*window, strict=True))
            order = generator.permutation(len(x))
            for rows in batches_of(len(x)):
                yield x[order[rows]], y[order[rows]]

    def all(self) -> Iterator[Pair]:
        """Every row once, block by block."""
        yield from self._computed(range(self.x.numblocks[0]))  # type: ignore[misc]

    def _starts(self) -> Rows:
        return np.array([0, *accumulate(self.x.chunks[0])][:-1], np.int64)

    def _computed(self, blocks: Any, with_y: bool = True) -> Iterator[tuple[NDArray[Any], ...]]:
        pairs = (
            _Block((self.x.blocks[i], self.y.blocks[i]) if with_y else (self.x.blocks[i],)) for i in blocks
        )
        for x, *rest in computed_ahead(list(pairs)):
            parts = [np.asarray(unmasked(x, "X")), *(np.asarray(unmasked(part, "y")) for part in rest)]
            if self.offsets is not None:
                parts = [
                    shifted(part, own)
                    for part, own in zip(parts, (self.offsets.x, self.offsets.y), strict=False)
                ]
            yield (np.asarray(parts[0], np.float32), *parts[1:])


@dataclass(frozen=True, slots=True)
class _Block:
    parts: tuple[Any, ...]

    def compute(self) -> tuple[Any, ...]:
        """Computes all parts as one Dask graph, so that a common part is computed once."""
        from dask.base import compute

        parts: tuple[Any, ...] = compute(*self.parts)
        return parts


@dataclass(frozen=True, slots=True)
class WeightedRows:
    """Rows that come as often as they weigh, instead of steps as long as they weigh.

    An epoch has floor(C_i + u) - floor(C_{i-1} + u) copies of row i, C the running sum of `copies` and u uniform on
    [0, 1), drawn anew each epoch (systematic resampling: Kitagawa, 1996): copies_i on average, and for whole numbers
    always. The sum of weighted squares is what SGD then makes small, and neither step size nor batch size has to bow to
    the heaviest row (Needell, Ward, Srebro, "Stochastic gradient descent, weighted sampling, and the randomized
    Kaczmarz algorithm", 2014).
    """

    x: NDArray[Any]
    y: NDArray[Any]
    copies: NDArray[np.float64]
    excluded: Rows = field(default_factory=lambda: NO_ROWS)

    @classmethod
    def of(cls, x: NDArray[Any], y: NDArray[Any], weights: NDArray[np.float64]) -> WeightedRows:
        """weights: (n,), positive; only their ratios count, as the objective is their mean."""
        mean = weights.mean()
        is_count = bool((weights == np.round(weights)).all()) and mean <= _MOST_COPIES
        return cls(x, y, weights if is_count else weights / mean)

    @property
    def n_rows(self) -> int:
        """Rows that are not excluded, each counted once."""
        return len(self.x) - len(self.excluded)

    def statistics(self) -> ColumnStatistics:
        """Weighted mean and standard deviation of the features, and their plain range."""
        x, share = self.x, self.copies / self.copies.sum()
        mean, squares = np.zeros(x.shape[1]), np.zeros(x.shape[1])
        for rows in batches_of(len(x)):
            mean += share[rows] @ x[rows].astype(np.float64)
        for rows in batches_of(len(x)):
            squares += share[rows] @ np.square(x[rows] - mean)
        plain = _statistics(Moments.of(x))
        return ColumnStatistics(
            mean=tuple(mean.tolist()),
            std=tuple(np.sqrt(squares).tolist()),
            minimum=plain.minimum,
            maximum=plain.maximum,
            missing=plain.missing,
        )

    def draw_centers(self, n_rows: int, seed: int) -> Rows:
        """Distinct row numbers, each with a chance that grows with its weight (Efraimidis and Spirakis, 2006)."""
        keys = np.random.default_rng((seed, _CENTERS)).exponential(size=len(self.x)) / self.copies
        return np.argsort(keys)[:n_rows]

    def drawn(self, n_rows: int, seed: int) -> Pair:
        """The first rows of an epoch of their own, heavy rows more than once: steps are measured on these."""
        return self.take(self._repeated(np.random.default_rng((seed, DRAWS)))[:n_rows])

    def take(self, rows: Rows) -> Pair:
        """A copy of these rows."""
        return self.x[rows], self.y[rows]

    def epoch(self, seed: int, epoch: int) -> Iterator[Pair]:
        """The copies of one epoch, in random order."""
        order = self._repeated(np.random.default_rng((seed, ORDERS, epoch)))
        for rows in batches_of(len(order)):
            yield self.take(order[rows])

    def all(self) -> Iterator[Pair]:
        """Every row once, in the order of the arrays."""
        for rows in batches_of(len(self.x)):
            yield self.x[rows], self.y[rows]

    def _repeated(self, generator: Any) -> Rows:
        """Row numbers of an epoch. Of an excluded row one copy is left out: the one which became a center."""
        copies = self.copies.copy()
        copies[self.excluded] = np.maximum(copies[self.excluded] - 1, 0)
        ends = np.floor(np.cumsum(copies) + generator.random()).astype(np.int64)
        return generator.permutation(np.repeat(np.arange(len(self.x)), np.diff(ends, prepend=0)))  # type: ignore[no-any-return]


def _statistics(moments: Moments) -> ColumnStatistics:
    return moments.statistics(np.zeros(len(moments.mean), np.int64))


def batches_of(n_rows: int) -> Iterator[slice]:
    """Slices of up to 4096 consecutive rows."""
    for start in range(0, n_rows, _BATCH_ROWS):
        yield slice(start, min(start + _BATCH_ROWS, n_rows))


def _row_blocks(array: Any) -> Any:
    """A Dask array cut along its rows only. Unknown block sizes, as of a DataFrame, are found by computing it."""
    if np.isnan(array.shape[0]):
        array = array.compute_chunk_sizes()
    return array.rechunk(dict.fromkeys(range(1, array.ndim), -1))
