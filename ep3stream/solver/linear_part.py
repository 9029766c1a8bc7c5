"""The linear part of a model: what a ridge regression tells of the targets, for the kernel to learn the rest.

    f(x) = sum_i alpha_i K(x, z_i) + W' s(x) + b,      s(x): the scaled inputs

A kernel learns a linear function of many columns as it learns any other, from as many rows as its roughness asks for; a
ridge regression needs but a few times d rows. And what is linear hides what is not: a column that acts in pairs alone
looks like noise to a kernel of small weights, which the linear part of other columns drowns. It is the semi-parametric
model of kriging with a trend (Cressie, Statistics for Spatial Data, 1993, section 3.4), with the trend fitted first.
The model has a linear part only where rows that were left out are predicted better by it than by their mean, and by a
small model with it than without.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any, NamedTuple

import torch
from torch import Tensor

from ep3stream.solver.column_screen import telling_columns
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.small_regression import SmallRegression

_LOGGER = logging.getLogger(__name__)

# Of the description in set-ups and models.
LINEAR_VERSION = 1
# A Cholesky factor of the second moments is taken for every ridge. Of more inputs, these are used.
MOST_INPUTS = 2048
# Rows that a linear part is fitted to: so many, or these for each input where that is more.
_ROWS, _ROWS_PER_INPUT = 1 << 15, 100
# Ridges that are compared, times the number of rows, for inputs in their units.
_RIDGES = (1e-5, 1e-4, 1e-3, 3e-3, 1e-2, 3e-2, 0.1, 0.3, 1.0, 3.0)
_CHUNK = 4096
# The mean square must fall by so many standard errors, against the mean, and against a small model without it.
_CLEAR, _CLEAR_GAIN = 3.0, 2.0

WEIGHTS, CONSTANT, RANGE = "linear_weights", "linear_constant", "linear_range"
LINEAR_TENSORS = (WEIGHTS, CONSTANT, RANGE)


@dataclass(frozen=True, slots=True)
class LinearPart:
    """A linear function of scaled inputs, in the unit of coded targets.

    weights: (D, c), constant: (c,). reach: (2, D), lowest and highest values, which inputs beyond are taken for: those
    of the rows that it was fitted to, and as far again on both sides, so that one absurd value cannot do any harm.
    """

    weights: Tensor
    constant: Tensor
    reach: Tensor

    def __call__(self, points: Tensor) -> Tensor:
        """The outputs, (n, c), of points, (n, D), scaled."""
        return torch.addmm(self.constant, points.clamp(self.reach[0], self.reach[1]), self.weights)

    def left_of(self, rows: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
        """Points, (n, D), scaled, and what their targets, (n, c), are less the outputs."""
        points, targets = rows
        return points, targets - self(points)

    def add_(self, predictions: Tensor, points: Tensor) -> None:
        """Adds the outputs for points, (n, D), to predictions, (R c, n), for each of R ridges, in place."""
        predictions.view(-1, len(self.constant), len(points)).add_(self(points).T)

    def mixed(self, mixing: Tensor) -> LinearPart:
        """The same for combinations of the targets, y @ mixing of (c, k)."""
        return LinearPart(self.weights @ mixing, self.constant @ mixing, self.reach)

    def to(self, device: torch.device) -> LinearPart:
        """The same on another device."""
        return LinearPart(*(each.to(device) for each in (self.weights, self.constant, self.reach)))

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a set-up or a model."""
        return {WEIGHTS: self.weights, CONSTANT: self.constant, RANGE: self.reach}

    @staticmethod
    def description() -> dict[str, Any]:
        """What `tensors` leaves out, as JSON."""
        return {"version": LINEAR_VERSION}

    @classmethod
    def described(
        cls, tensors: Mapping[str, Tensor], found: Mapping[str, Any] | None, n_inputs: int, n_outputs: int
    ) -> LinearPart | None:
        """From what `tensors` and `description` gave; KeyError, TypeError or ValueError if impossible.

        None where a model has none.
        """
        if found is None:
            return None
        if found["version"] != LINEAR_VERSION:
            raise ValueError(f"linear has version {found['version']!r:.50}, not {LINEAR_VERSION}")
        shapes = {WEIGHTS: (n_inputs, n_outputs), CONSTANT: (n_outputs,), RANGE: (2, n_inputs)}
        for name, shape in shapes.items():
            tensor = tensors[name]
            if tensor.dtype != torch.float32 or tuple(tensor.shape) != shape:
                raise ValueError(f"{name} is {tensor.dtype} {tuple(tensor.shape)}, not float32 {shape}")
        # Copies, which are aligned as what a fit computes is, so that products are rounded alike; a file's may not be.
        return cls(*(tensors[name].clone() for name in shapes))


class LinearFit(NamedTuple):
    """A linear part, fitted to all rows, and what it is worth.

    of_others: the same fitted to the rows that were not held out alone. explained: the share of the variance of
    held-out targets that this one explains. sizes: (D,), the standard deviation of each input's term, over all outputs.
    """

    part: LinearPart
    of_others: LinearPart
    explained: float
    sizes: Tensor

    def among(self, places: Tensor, n_inputs: int) -> LinearFit:
        """The same for so many inputs, of which it uses those at some places."""

        def spread(tensor: Tensor, dim: int) -> Tensor:
            shape = [*tensor.shape]
            shape[dim] = n_inputs
            return tensor.new_zeros(shape).index_copy_(dim, places.to(tensor.device), tensor)

        part, of_others = (
            LinearPart(spread(each.weights, 0), each.constant, spread(each.reach, 1))
            for each in (self.part, self.of_others)
        )
        return LinearFit(part, of_others, self.explained, spread(self.sizes, 0))


def n_linear_rows(n_inputs: int) -> int:
    """How many rows a linear part is fitted to, where there are so many."""
    return max(_ROWS, _ROWS_PER_INPUT * min(n_inputs, MOST_INPUTS))


def fitted_linear(
    x: Tensor,
    y: Tensor,
    is_category: Tensor,
    n_held: int,
    generator: torch.Generator,
    checked: tuple[Tensor, Tensor] | None = None,
) -> LinearFit | None:
    """The ridge regression that suits held-out rows best; None where it is not better than the mean, beyond chance.

    Of all numbers, or of those that tell of the targets (`column_screen.py`) where that is better: many that tell
    nothing would make it noisy. Of more than 2048, those that vary most with the targets (Fan and Lv, Sure independence
    screening, 2008).

    x: (n, D), scaled, y: (n, c), coded targets, of rows in random order, of which the first `n_held` are held out.
    is_category: (D,), which inputs are none of numbers. checked: such rows of another split to hold out in place of
    these. O(n D^2 + D^3) time.
    """
    is_category = is_category.cpu()
    n_numbers = int((~is_category).sum())
    if not n_numbers or n_held < 2 or len(x) - n_held < 2:
        return None
    held, rows = checked or (x[:n_held], y[:n_held]), slice(n_held, n_held + n_linear_rows(n_numbers))
    if n_numbers > MOST_INPUTS:
        kept = _most_telling(x[rows], y[rows], ~is_category)
        some = None if checked is None else (checked[0][:, kept], checked[1])
        fit = fitted_linear(x[:, kept], y, is_category[kept.cpu()], n_held, generator, some)
        return None if fit is None else fit.among(kept, x.shape[1])
    origin = x[:_CHUNK].mean(0)
    moments = _Moments.of(x[rows], y[rows], origin)
    telling = telling_columns(x[rows], y[rows], is_category, generator) & ~is_category
    before = (held[1] - moments.mean_y.to(held[1])).double().square().sum(1)
    sets = [~is_category, *([telling] if 0 < int(telling.sum()) < n_numbers else [])]
    tried = [(some, ridge) for some in sets for ridge in _RIDGES]
    parts = [part for some in sets for part in moments.solved(some, _RIDGES)]
    squares = [(part(held[0]) - held[1]).double().square().sum(1) for part in parts]
    best = min(range(len(tried)), key=lambda place: float(squares[place].mean()))
    of_others, after = parts[best], squares[best]
    fall = before - after
    if not float(fall.mean()) > _CLEAR * float(fall.std()) / len(fall) ** 0.5:
        return None
    variance = float((held[1] - held[1].mean(0)).double().square().sum(1).mean())
    whole = moments.plus(_Moments.of(x[:n_held], y[:n_held], origin))
    is_used, ridge = tried[best]
    (part,) = whole.solved(is_used, [ridge])
    sizes = (part.weights.double().square().sum(1) * whole.variance().to(part.weights.device)).sqrt()
    return LinearFit(part, of_others, 1 - float(after.mean()) / (variance or 1.0), sizes.cpu())


def reduces_error(
    linear: LinearPart,
    kernel: Kernel,
    pool: tuple[Tensor, Tensor],
    checked: tuple[Tensor, Tensor],
    n_centers: int,
    clear: float = _CLEAR_GAIN,
) -> bool:
    """Whether a small model of what a linear part leaves errs less on `checked` than one without, beyond chance.

    clear: how many standard errors less.

    With many rows for each column it does not: the kernel learns what is linear as well, and the linear part is never
    quite right. On blood values, batting and illnesses it cost .0013, .005 of R2 and .004 of accuracy, on
    images 2% of the mean square.
    """
    without = SmallRegression.of(kernel, pool, checked, n_centers)
    left_checked = linear.left_of(checked)
    beside = SmallRegression.of(kernel, linear.left_of(pool), left_checked, n_centers)
    gains = (without.squares(*checked) - beside.squares(*left_checked)).double().sum(1)
    _LOGGER.debug("%.4g less error with a linear part", float(gains.mean()))
    return bool(gains.mean() > clear * gains.std() / math.sqrt(len(gains)))


def _most_telling(x: Tensor, y: Tensor, is_number: Tensor) -> Tensor:
    """The places, in order, of the 2048 numbers of the largest covariances with y, in their units; O(n D c) time."""
    variance, mean = torch.var_mean(x, 0, correction=0)
    covariances = ((x - mean).T @ (y - y.mean(0))).square().sum(1)
    units = _units(variance, mean, torch.stack([x.amin(0), x.amax(0)]))
    scores = torch.where(is_number.to(x.device), covariances / units.square(), -1.0)
    return scores.topk(MOST_INPUTS).indices.sort().values


def _units(variance: Tensor, mean: Tensor, range_: Tensor) -> Tensor:
    """(D,), what each input is divided by: its standard deviation, or the step between its two values; inf for one.

    The standard deviation of a category that few rows have is small, and a ridge would hardly hold its weight back. The
    variance is at most (mean - low) (high - mean) (Bhatia and Davis, 2000), which two values alone reach.
    """
    low, high = range_
    has_two = variance >= (1 - 1e-4) * (mean - low) * (high - mean)
    units = torch.where(has_two, high - low, variance.sqrt())
    return torch.where(units > 0, units, torch.inf)


@dataclass(frozen=True, slots=True)
class _Moments:
    """Sums over n rows, in float64: x, (D,), y, (c,), x x', (D, D), and x y', (D, c); and the range of x, (2, D).

    In the sums x is less `origin`, (D,), which is near its mean, so that products may be of float32.
    """

    n: int
    origin: Tensor
    x: Tensor
    y: Tensor
    xx: Tensor
    xy: Tensor
    range: Tensor

    @classmethod
    def of(cls, x: Tensor, y: Tensor, origin: Tensor) -> _Moments:
        d, c = x.shape[1], y.shape[1]
        sums, xx, xy = (torch.zeros(*k, dtype=torch.float64, device=x.device) for k in ((d,), (d, d), (d, c)))
        for some_x, some_y in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
            some_x = some_x - origin
            sums += some_x.sum(0, dtype=torch.float64)
            xx += some_x.T @ some_x
            xy += some_x.T @ some_y
        range_ = torch.stack([x.amin(0), x.amax(0)])
        return cls(len(x), origin, sums, y.sum(0, dtype=torch.float64), xx, xy, range_)

    def plus(self, other: _Moments) -> _Moments:
        """Of the rows of both."""
        range_ = torch.stack(
            [
                torch.minimum(self.range[0], other.range[0]),
                torch.maximum(self.range[1], other.range[1]),
            ]
        )
        return _Moments(
            self.n + other.n,
            self.origin,
            self.x + other.x,
            self.y + other.y,
            self.xx + other.xx,
            self.xy + other.xy,
            range_,
        )

    @property
    def mean_y(self) -> Tensor:
        """(c,)."""
        return self.y / self.n

    def variance(self) -> Tensor:
        """(D,), the variance of each input, 0 where rounding alone is left of it."""
        mean = self.x / self.n
        square = self.xx.diagonal() / self.n
        variance = square - mean.square()
        return torch.where(variance > 1e-10 * square, variance, 0.0).clamp_min(0)

    def solved(self, is_used: Tensor, ridges: Sequence[float]) -> list[LinearPart]:
        """The ridge regressions on some inputs, (D,), in their units, with the penalties n ridge |W|^2."""
        mean, variance = self.x / self.n, self.variance()
        units = _units(variance, self.origin + mean, self.range)
        inverse = torch.where(is_used.to(units.device) & (variance > 0), 1 / units, 0.0)
        centred = self.xx / self.n - torch.outer(mean, mean)
        moment = self.xy / self.n - torch.outer(mean, self.mean_y)
        system = centred * inverse[:, None] * inverse
        low, high = self.range
        reach = torch.stack([low - (high - low), high + (high - low)])
        found = []
        for ridge in ridges:
            damped = system + torch.diag(ridge + (inverse == 0).double())
            factor = torch.linalg.cholesky(damped)
            weights = inverse[:, None] * torch.cholesky_solve(moment * inverse[:, None], factor)
            constant = self.mean_y - (self.origin + mean) @ weights
            found.append(LinearPart(weights.float().contiguous(), constant.float(), reach))
        return found
