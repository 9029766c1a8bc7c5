"""Effects of cells: what a model adds to its kernel for each combination of levels of a few columns.

    f(x) = sum_i alpha_i K(x, z_i) + sum_s b_s[cell_s(x)]

Each feature may be cut into levels, a *factor*: a category's codes, a number's bins. A *cross* is a set of factors of
different features, and its cells are the combinations of their levels, such as an airport on a day. Every cell has an
effect b of its own, shrunk towards 0: the crossed random effects of mixed models (Robinson, Statistical Science 1991).
It is kernel ridge regression with K_s(x, z) = [cell_s(x) = cell_s(z)], a positive semidefinite kernel, and all rows as
centers, and takes O(rows) time and O(cells) memory. So it learns sharp structure, for which centers would be too few.
`effect_search.py` finds crosses and effects.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

# Of the description in models.
EFFECTS_VERSION = 1
# The most effects, of all cells of all crosses, that a model file may ask memory for.
_MOST_EFFECTS = 1 << 27

EDGES, CELLS, VALUES = "effect_edges", "effect_cells", "effect_values"
EFFECT_TENSORS = frozenset({EDGES, CELLS, VALUES})


class Factor(NamedTuple):
    """A feature cut into levels: x has level k where k edges are below it. edges: (levels - 1,) float32, ascending."""

    feature: int
    edges: Tensor

    @property
    def n_levels(self) -> int:
        """One more than there are edges."""
        return len(self.edges) + 1

    def levels(self, x: Tensor) -> Tensor:
        """The level of each row of x, (n, d): (n,), int64."""
        return torch.bucketize(x[:, self.feature].contiguous(), self.edges)


def code_factor(feature: int, n_codes: int) -> Factor:
    """The factor of a category stored as codes: level 0 is the -1 of an unknown category, level k + 1 code k."""
    return Factor(feature, torch.arange(n_codes) - 0.5)


def number_factors(feature: int, values: NDArray[Any], n_bins: tuple[int, ...]) -> list[Factor]:
    """Factors of a number, from a sample of its values, (rows,): bins of as many rows each, ever finer.

    n_bins: ascending. Where a number has no more different values than bins, each of them is a level, and finer bins
    are left out. Edges lie half-way between values.
    """
    different = np.unique(values)
    between = torch.from_numpy((different[1:] + different[:-1]) / 2).float()
    if not len(between):
        return []
    factors: list[Factor] = []
    for n_levels in n_bins:
        if len(different) <= n_levels:
            return [*factors, Factor(feature, between.unique())]
        cuts = np.quantile(values, np.linspace(0, 1, n_levels + 1)[1:-1])
        above = np.searchsorted(different, cuts).clip(1)
        factors.append(Factor(feature, between[torch.from_numpy(above - 1)].unique()))
    return factors


Cross = tuple[int, ...]
"""The numbers of the factors that are crossed, ascending."""


@dataclass(frozen=True, slots=True)
class CellEffects:
    """The effects of all cells of some crosses.

    values: (cells, c) float32, in the unit of coded targets: the cells of the first cross, those of the second, and so
    on; within a cross the last factor's level changes fastest. Cells that no row of the fit was in have the effect 0.
    """

    factors: tuple[Factor, ...]
    crosses: tuple[Cross, ...]
    values: Tensor

    def __call__(self, x: Tensor) -> Tensor:
        """The sum of the effects of each row's cells, (n, c), for x, (n, d), as it is stored."""
        levels = [factor.levels(x) for factor in self.factors]
        total = self.values.new_zeros(x.shape[0], self.values.shape[1])
        first = 0
        for cross in self.crosses:
            cells = torch.zeros_like(levels[0])
            for factor in cross:
                cells = cells * self.factors[factor].n_levels + levels[factor]
            total = total + self.values[cells + first]
            first += n_cells(self.factors, cross)
        return total

    def to(self, device: torch.device) -> CellEffects:
        """The same effects on another device."""
        factors = tuple(factor._replace(edges=factor.edges.to(device)) for factor in self.factors)
        return CellEffects(factors, self.crosses, self.values.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a model file: all edges behind one another, and the cells with an effect and their effects."""
        cells = self.values.any(1).nonzero()[:, 0]
        return {
            EDGES: torch.cat([factor.edges for factor in self.factors]),
            CELLS: cells,
            VALUES: self.values[cells],
        }

    def description(self) -> dict[str, Any]:
        """What `tensors` leaves out, as JSON."""
        return {
            "version": EFFECTS_VERSION,
            "factors": [{"feature": factor.feature, "n_levels": factor.n_levels} for factor in self.factors],
            "crosses": [list(cross) for cross in self.crosses],
        }

    @classmethod
    def described(
        cls, tensors: Mapping[str, Tensor], found: Mapping[str, Any], n_features: int, n_outputs: int
    ) -> CellEffects:
        """From what `tensors` and `description` gave; KeyError, TypeError or ValueError if impossible."""
        if found["version"] != EFFECTS_VERSION:
            raise ValueError(f"effects have version {found['version']!r:.50}, not {EFFECTS_VERSION}")
        edges, cells, values = (tensors[name] for name in (EDGES, CELLS, VALUES))
        counts = [one["n_levels"] - 1 for one in found["factors"]]
        features = [one["feature"] for one in found["factors"]]
        if not all(type(j) is int and 0 <= j < n_features for j in features) or min(counts, default=0) < 1:
            raise ValueError(f"effects have factors of features {features!r:.50} and levels that cannot be")
        if edges.dtype != torch.float32 or edges.shape != (sum(counts),):
            raise ValueError(
                f"effects have {edges.dtype} edges {tuple(edges.shape)} for {sum(counts)} levels"
            )
        factors = tuple(map(Factor, features, edges.split(counts)))
        crosses = tuple(tuple(cross) for cross in found["crosses"])
        for cross in crosses:
            if not cross or not all(type(f) is int and 0 <= f < len(factors) for f in cross):
                raise ValueError(f"effects cross the factors {cross!r:.50} of {len(factors)}")
        total = sum(n_cells(factors, cross) for cross in crosses)
        if not 0 < total * n_outputs <= _MOST_EFFECTS:
            raise ValueError(f"effects have {total} cells, not 1 to {_MOST_EFFECTS // n_outputs}")
        is_inside = not len(cells) or 0 <= int(cells.min()) <= int(cells.max()) < total
        if cells.dtype != torch.int64 or cells.ndim != 1 or not is_inside:
            raise ValueError(
                f"effects have {cells.dtype} cells {tuple(cells.shape)} that are not 0 to {total - 1}"
            )
        if values.dtype != torch.float32 or values.shape != (len(cells), n_outputs):
            raise ValueError(
                f"effects have {values.dtype} values {tuple(values.shape)} for {len(cells)} cells"
            )
        return cls(factors, crosses, values.new_zeros(total, n_outputs).index_copy(0, cells, values))


def n_cells(factors: Sequence[Factor], cross: Cross) -> int:
    """How many cells a cross has."""
    return math.prod(factors[factor].n_levels for factor in cross)
