"""How numbers with long tails are bent: by asinh, whose origin and unit are chosen for each from a sample of rows.

asinh((x - origin) / unit) is linear within a unit of the origin and logarithmic beyond. By the mean and standard
deviation neither can be chosen: a few codes for gaps, such as 99999, or a lognormal tail make the deviation so large
that all other values become one. So the spread is that of the quartiles, and of several units the one is taken with
which the middle of the values looks most like a normal sample: the logarithm for lognormal values, next to nothing for
normal ones among which a few lie far out.
"""

from __future__ import annotations

from functools import lru_cache
from typing import NamedTuple

import torch
from torch import Tensor

# A number with values so many robust deviations from the median is bent.
_LONG_TAIL = 8.0
# The largest unit, in robust deviations: where values are dense the bend is hardly seen.
_LARGEST_UNIT = 0.5
# Smaller units: these quantiles of the distances from the origin. One must be better by so much to be taken.
_UNITS, _CLEAR = (0.5, 0.25, 0.1, 0.05, 0.02), 0.003
# float32 holds no more units than the square of this.
_MOST_UNITS = 1e18
# An origin is the median, or one of these quantiles where it is so few robust deviations from the median.
_EDGES, _NEAR = (0.01, 0.99), 3.0
# What is compared with a normal sample: without as much at both ends.
_TRIMMED = 0.05
# The quartiles, and where those of a normal sample lie, in standard deviations.
_QUARTERS, _QUARTILE = (0.25, 0.5, 0.75), 0.6745


class Bend(NamedTuple):
    """x becomes asinh((x - origin) * factor) * scale, whose distinct values have the standard deviation 1."""

    origin: float
    factor: float
    scale: float


def chosen_bend(ordered: Tensor, low: float, high: float) -> Bend | None:
    """The bend for a column, None where its tails are short. ordered: (n,), float64, of random rows, sorted.

    low, high: the least and the largest value of all rows. O(n log n).
    """
    first, median, third = _quantiles(ordered, *_QUARTERS)
    spread = max(third - median, median - first) / _QUARTILE
    reach = max(high - median, median - low)
    least = spread
    if spread == 0:
        # Half of the values or more are the same: the others tell how far they spread, and whether they are rare.
        others = (ordered - median).abs()
        others = others[others > 0].sort().values
        spread = _quantiles(others, 0.5)[0] if len(others) else reach
        least = min(spread, float(ordered.std(correction=0)))
    if not reach > _LONG_TAIL * least:
        return None
    edges = [edge for edge in _quantiles(ordered, *_EDGES) if abs(edge - median) <= _NEAR * spread]
    best, origin, unit = -1.0, median, max(_LARGEST_UNIT * spread, reach / _MOST_UNITS)
    for tried, some_unit in _units(ordered, [median, *edges], unit):
        found = _normality(torch.asinh((ordered - tried) / some_unit))
        if found > best + _CLEAR:
            best, origin, unit = found, tried, some_unit
    distinct = torch.cat([ordered, ordered.new_tensor([low, high])]).unique()
    deviation = float(torch.asinh((distinct - origin) / unit).std())
    return Bend(origin, 1 / unit, 1 / deviation)


def may_be_bent(ordered: Tensor, low: Tensor, high: Tensor) -> Tensor:
    """(d,), where `chosen_bend` may find one: the others are told at once. ordered: (d, n); low, high: (d,)."""
    places = [round(share * (ordered.shape[1] - 1)) for share in _QUARTERS]
    first, median, third = ordered[:, places].double().T
    spread = torch.maximum(third - median, median - first) / _QUARTILE
    reach = torch.maximum(high - median, median - low)
    return (low < high) & ((spread == 0) | (reach > _LONG_TAIL * spread))


def _units(ordered: Tensor, origins: list[float], largest: float) -> list[tuple[float, float]]:
    """Origins and units to try, largest units first: they bend least."""
    found = [(origin, largest) for origin in origins]
    for origin in origins:
        distances = (ordered - origin).abs()
        distances = distances[distances > largest / _MOST_UNITS].sort().values
        if len(distances):
            found += [(origin, unit) for unit in _quantiles(distances, *_UNITS) if unit < largest]
    return sorted(found, key=lambda each: -each[1])


def _normality(ordered: Tensor) -> float:
    """The correlation of the middle of sorted values, (n,), with normal scores: 1 for a normal sample."""
    inside, scores = _normal_scores(len(ordered))
    middle = ordered[inside] - ordered[inside].mean()
    size = float(middle.norm())
    return float(middle @ scores) / size if size else 0.0


@lru_cache(maxsize=4)
def _normal_scores(n: int) -> tuple[slice, Tensor]:
    """Which of n sorted values are the middle, and the normal scores of these, of norm 1."""
    shares = (torch.arange(1, n + 1, dtype=torch.float64) - 0.375) / (n + 0.25)
    n_trimmed = int((shares < _TRIMMED).sum())
    inside = slice(n_trimmed, n - n_trimmed)
    scores = torch.special.ndtri(shares[inside])
    return inside, scores / scores.norm().clamp_min(torch.finfo(torch.float64).tiny)


def _quantiles(ordered: Tensor, *shares: float) -> list[float]:
    """Of sorted values, (n,), those of these ranks."""
    return [float(ordered[round(share * (len(ordered) - 1))]) for share in shares]
