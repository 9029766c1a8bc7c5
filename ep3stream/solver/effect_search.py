"""Which columns to cross, and the effects of their cells, from what a kernel model leaves of the targets.

Crosses are chosen one after the other, greedily, by how much of the residual's square each would explain of rows that
are left out of its own estimate. That has a closed form. Let a cell have N rows with residuals of the sum S and the sum
of squares Q; its effect is S / (N + shrinkage), and without row i it is a (S - r_i), a = 1 / (N - 1 + shrinkage). So

    sum_i r_i^2 - (r_i - a (S - r_i))^2 = 2 a (1 + a) S^2 - ((1 + a)^2 - 1) Q - N a^2 S^2.

Pairs are tried first, and what is about to be chosen is tried with one more column. Then the effects of all crosses are
fitted to all rows by backfitting (Buja, Hastie and Tibshirani, Annals of Statistics 1989). Held-out rows decide which
crosses stay, how many sweeps are best, and whether the model is better at all.
"""

from __future__ import annotations

import heapq
import itertools
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ep3stream.solver.cell_effects import Cross, Factor, n_cells

Values = NDArray[np.float64]
Levels = NDArray[np.uint16]

# What may shrink the effects of a cross: rows of a cell that only half believe in its mean.
_SHRINKAGES = 2.0 ** np.arange(-1, 10)
_NOISE = 10.0


@dataclass(frozen=True, slots=True)
class SearchLimits:
    """What bounds the work and the memory of a search.

    features: so many, those that alone tell most of the targets. width: factors of a cross. crosses: how many are
    chosen. cells: of one cross, and all_cells: of all. rows: of those that crosses are chosen by, and evaluations: of
    crosses on them. gain: a cross that explains less of the residual's square is left out, and one that explains no
    more than noise may. sweeps: of backfitting.
    """

    features: int = 20
    width: int = 4
    crosses: int = 32
    cells: int = 1 << 22
    all_cells: int = 1 << 24
    rows: int = 1 << 18
    evaluations: int = 2500
    gain: float = 5e-5
    sweeps: int = 6


@dataclass(frozen=True, slots=True)
class Choice:
    """A cross, what shrinks its effects, and the share of the residual's square that it explained when chosen."""

    cross: Cross
    shrinkage: float
    gain: float


@dataclass(frozen=True, slots=True)
class CellRows:
    """Rows as a search sees them: levels, (factors, n); what the model leaves of their coded targets, (c, n)."""

    levels: Levels
    residual: Values

    def first(self, n: int) -> CellRows:
        """The first n rows, or all where there are fewer."""
        return CellRows(self.levels[:, :n], self.residual[:, :n])


def chosen_crosses(
    factors: Sequence[Factor], rows: CellRows, targets: Values, limits: SearchLimits
) -> list[Choice]:
    """The crosses that explain most of the residual, coarse ones first. targets: coded, (c, n)."""
    rows = rows.first(limits.rows)
    if not rows.residual.any():
        return []
    search = _Search(factors, rows, limits)
    for cross in _singles_and_pairs(factors, rows.levels, targets[:, : limits.rows], limits.features):
        search.offer(cross)
    chosen: list[Choice] = []
    left = limits.all_cells
    while len(chosen) < limits.crosses and (best := search.best()) is not None:
        size = n_cells(factors, best.cross)
        if size <= left:
            left -= size
            chosen.append(best)
            search.take(best)
    return sorted(chosen, key=lambda choice: n_cells(factors, choice.cross))


def _singles_and_pairs(
    factors: Sequence[Factor], levels: Levels, targets: Values, n_features: int
) -> list[Cross]:
    """Each factor of the features that alone tell most of the targets, and each pair of two of these features."""
    told: dict[int, float] = {}
    for number, factor in enumerate(factors):
        gain, _ = _Cells.of(factors, levels, (number,)).left_out_gain(targets)
        told[factor.feature] = max(told.get(factor.feature, 0.0), gain)
    features = set(sorted(told, key=lambda feature: -told[feature])[:n_features])
    kept = [number for number, factor in enumerate(factors) if factor.feature in features]
    pairs = itertools.combinations(kept, 2)
    return [(number,) for number in kept] + [
        pair for pair in pairs if factors[pair[0]].feature != factors[pair[1]].feature
    ]


class _Search:
    """Crosses on offer, by what they explain of what those taken so far leave of held-out residuals.

    The gain of a cross falls as others are taken, as a rule: so only the one that seems best is looked at again, until
    it stays ahead of what the others were worth before (lazy greedy search; Minoux, 1978).
    """

    def __init__(self, factors: Sequence[Factor], rows: CellRows, limits: SearchLimits) -> None:
        self._factors, self._levels, self._limits = factors, rows.levels, limits
        self._residual = rows.residual.copy()
        self._whole = float(np.square(rows.residual).sum())
        # Of noise alone a cross seems to explain a few times 1 / n.
        self._least = self._whole * max(limits.gain, _NOISE / self._residual.shape[1])
        self._on_offer: list[tuple[float, Cross]] = []
        self._seen: set[Cross] = set()
        self._singles: set[int] = set()
        self._n_left = limits.evaluations

    def offer(self, cross: Cross) -> None:
        """Puts a cross on offer, once, unless it has too many cells or explains next to nothing."""
        if cross in self._seen or self._n_left <= 0 or n_cells(self._factors, cross) > self._limits.cells:
            return
        self._seen.add(cross)
        self._singles.update(cross if len(cross) == 1 else ())
        self._put_back(self._judged(cross))

    def best(self) -> Choice | None:
        """The cross that explains most, once no cross of it and one more factor explains more; None for none."""
        while self._on_offer and self._n_left > 0:
            _, cross = heapq.heappop(self._on_offer)
            found = self._judged(cross)
            if self._is_ahead(found) and len(cross) < self._limits.width:
                features = {self._factors[number].feature for number in cross}
                for number in sorted(self._singles):
                    if self._factors[number].feature not in features:
                        self.offer(tuple(sorted((*cross, number))))
            if self._is_ahead(found):
                return found
            self._put_back(found)
        return None

    def take(self, choice: Choice) -> None:
        """Leaves to the others what this cross leaves of each row when it is fitted to the rows beside it."""
        cells = _Cells.of(self._factors, self._levels, choice.cross)
        self._residual -= cells.left_out_effects(self._residual, choice.shrinkage)

    def _judged(self, cross: Cross) -> Choice:
        self._n_left -= 1
        gain, shrinkage = _Cells.of(self._factors, self._levels, cross).left_out_gain(self._residual)
        return Choice(cross, shrinkage, gain / self._whole)

    def _is_ahead(self, found: Choice) -> bool:
        gain = found.gain * self._whole
        return gain >= self._least and (not self._on_offer or gain >= -self._on_offer[0][0])

    def _put_back(self, found: Choice) -> None:
        gain = found.gain * self._whole
        if gain >= self._least:
            heapq.heappush(self._on_offer, (-gain, found.cross))


@dataclass(frozen=True, slots=True)
class _Cells:
    """The cell of each row, (n,), of one cross; size: how many cells there are; rows: of each cell, (size,)."""

    of_row: NDArray[np.intp]
    size: int
    rows: NDArray[np.intp]

    @classmethod
    def of(cls, factors: Sequence[Factor], levels: Levels, cross: Cross) -> _Cells:
        cells = cells_of(factors, levels, cross)
        size = n_cells(factors, cross)
        return cls(cells, size, np.bincount(cells, minlength=size))

    def sums(self, values: Values) -> Values:
        """Of each row of values, (c, n), the sum in each cell: (c, size)."""
        return np.stack([np.bincount(self.of_row, each, self.size) for each in values])

    def left_out_gain(self, residual: Values) -> tuple[float, float]:
        """By how much the cross lowers the square of the residual, each row left out of its own effect, at its best.

        Returns it and the shrinkage, which has it; (0, 1) where none is of use.
        """
        met = np.flatnonzero(self.rows > 1)
        rows = self.rows[met]
        squared_sum = np.square(self.sums(residual)[:, met]).sum(0)
        squares = np.bincount(self.of_row, np.square(residual).sum(0), self.size)[met]
        best = (0.0, 1.0)
        for shrinkage in _SHRINKAGES.tolist():
            a = 1 / (rows - 1 + shrinkage)
            gain = float(((2 * (1 + a) - rows * a) * a * squared_sum - (2 + a) * a * squares).sum())
            best = max(best, (gain, shrinkage))
        return best

    def left_out_effects(self, residual: Values, shrinkage: float) -> Values:
        """What the other rows of its cell say of each row, (c, n)."""
        others = self.sums(residual)[:, self.of_row] - residual
        return others / (self.rows[self.of_row] - 1 + shrinkage)


def cells_of(factors: Sequence[Factor], levels: Levels, cross: Cross) -> NDArray[np.intp]:
    """The cell of each row, (n,), within a cross."""
    cells: NDArray[np.intp] = levels[cross[0]].astype(np.intp)
    for number in cross[1:]:
        cells *= factors[number].n_levels
        cells += levels[number]
    return cells


@dataclass(frozen=True, slots=True)
class FittedEffects:
    """Effects of the crosses that are of use, and what they do to the held-out rows.

    effects: (cells, c) float32, those of the first of `chosen`, and so on. before, after: the sum of squares of what is
    left of each held-out row, (rows,), without the effects and with them.
    """

    chosen: list[Choice]
    effects: NDArray[np.float32]
    before: Values
    after: Values

    def is_better(self, errors: float = 3.0) -> bool:
        """Whether the mean square falls by more than so many standard errors, both on the same rows."""
        fall = self.before - self.after
        return bool(self.chosen) and float(fall.mean()) > errors * float(fall.std()) / len(fall) ** 0.5


def fitted_effects(
    factors: Sequence[Factor], chosen: Sequence[Choice], rows: CellRows, held_out: CellRows, n_sweeps: int
) -> FittedEffects:
    """The effects of those of the crosses that lower the held-out rows' squares, by backfitting; O(rows) time for each.

    It takes as many sweeps as are best on held-out rows. A cross that raises their squares when it is first fitted is
    left out: rows beside one another in time, say, tell of each other, but not of later ones.
    """
    backfit = _Backfit(factors, rows, held_out)
    before = np.square(held_out.residual).sum(0)
    best, kept = before, []
    for choice in chosen:
        backfit.fit(choice)
        after = backfit.squares()
        if after.mean() < best.mean():
            best = after
            kept.append(choice)
        else:
            backfit.drop(choice)
    effects = backfit.effects(kept)
    for _ in range(n_sweeps - 1):
        for choice in kept:
            backfit.fit(choice)
        after = backfit.squares()
        if after.mean() >= best.mean():
            break
        best, effects = after, backfit.effects(kept)
    return FittedEffects(kept, effects, before, best)


class _Backfit:
    """Effects under way, each cross fitted to what the others leave."""

    def __init__(self, factors: Sequence[Factor], rows: CellRows, held_out: CellRows) -> None:
        self._factors, self._levels, self._elsewhere = factors, rows.levels, held_out.levels
        self._residual, self._left = rows.residual.copy(), held_out.residual.copy()
        self._effects: dict[Cross, NDArray[np.float32]] = {}

    def fit(self, choice: Choice) -> None:
        """Fits the effects of a cross again, or for the first time."""
        cells = _Cells.of(self._factors, self._levels, choice.cross)
        elsewhere = cells_of(self._factors, self._elsewhere, choice.cross)
        if (own := self._effects.get(choice.cross)) is not None:
            self._residual += own[:, cells.of_row]
            self._left += own[:, elsewhere]
        own = (cells.sums(self._residual) / (cells.rows + choice.shrinkage)).astype(np.float32)
        self._residual -= own[:, cells.of_row]
        self._left -= own[:, elsewhere]
        self._effects[choice.cross] = own

    def drop(self, choice: Choice) -> None:
        """Takes the effects of a cross away."""
        own = self._effects.pop(choice.cross)
        self._residual += own[:, cells_of(self._factors, self._levels, choice.cross)]
        self._left += own[:, cells_of(self._factors, self._elsewhere, choice.cross)]

    def squares(self) -> Values:
        """What is left of each held-out row: the sum of its squares, (rows,)."""
        squares: Values = np.square(self._left).sum(0)
        return squares

    def effects(self, chosen: Sequence[Choice]) -> NDArray[np.float32]:
        """Of all cells of these crosses behind one another, (cells, c)."""
        parts = [self._effects[choice.cross] for choice in chosen]
        return (
            np.ascontiguousarray(np.concatenate(parts, 1).T)
            if parts
            else np.empty((0, len(self._left)), np.float32)
        )
