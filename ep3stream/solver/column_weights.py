"""Learns the weights of a kernel on columns from a sample of rows, before the fit.

The loss is the held-out error of small Nystrom ridge regressions. Two sets of n rows each are drawn afresh for every
step, T to train on and H held out; the centers Z are the first m rows of T:

    A = K_tz' K_tz / n + rho K_zz,   a = A^-1 K_tz' Y_t / n,   L = |K_hz a - Y_h|^2 / n,

and log w, log c and log (n rho) follow the gradient of L by Adam (Kingma, Ba 2015). With r = K_hz a - Y_h and
v = A^-1 K_hz' 2 r / n,

    dL/dK_hz = 2 r a' / n,   dL/dK_tz = ((Y_t - K_tz a) v' - K_tz v a') / n,   dL/dK_zz = -rho v a',

so that a step costs one block, one triangle of K_tz' K_tz and one factorization: dL/dK, of rank 2c, is formed strip by
strip. Held-out rows tell what matters: on the rows trained on the sharpest weights would look best.

A fit has more rows and centers than the small problems, and more of them resolve sharper weights: a column that parts
one day from the next is worth nothing to a few thousand rows of a year. So after some steps on rows of the whole pool
each step takes the neighbourhood of a random row: the rows of the pool with the largest K, as many as have so many
centers in the fit as the small problem has. The last third of the steps of either kind is averaged.
"""

from __future__ import annotations

import logging
import math
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.column_screen import telling_columns
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.expected_error import ExpectedError
from ep3stream.solver.linear_part import LinearFit, LinearPart, fitted_linear, reduces_error
from ep3stream.solver.small_regression import SmallRegression, gradients_of

_LOGGER = logging.getLogger(__name__)

# Rows that the weights are learnt on at most.
POOL_ROWS = 400_000
FEWEST_ROWS = 100
_HELD_SHARE, _MOST_HELD = 0.2, 12_000

# Steps on rows of the whole pool, rows on each side and centers of one, first of a few and then of more; rates of Adam,
# first and last. With 400 centers alone columns of little effect get no weight: with 1200 the mse on blood values fell
# by 0.7%. Many columns take many rows to be told apart: with 12,000, on the 124 columns of `health`, it fell by 1.3%.
_STEPS, _SMALL_STEPS = 40, 20
_ROWS, _CENTERS = 3000, 400
_LARGE_ROWS, _LARGE_CENTERS = 4000, 1200
_ROWS_PER_COLUMN, _MOST_LARGE_ROWS = 100, 12_000
_RATES = (0.25, 0.06)
# Steps on neighbourhoods, the most and fewest rows on each side, and centers.
_NEAR_STEPS, _NEAR_ROWS, _FEWEST_NEAR_ROWS, _NEAR_CENTERS = 60, 8000, 1280, 640
_NEAR_RATES = (0.2, 0.04)
_BETAS, _EPSILON = (0.9, 0.95), 1e-8
# Of the steps of either kind, at the end.
_AVERAGED = 1 / 3
# Neighbourhoods suit fits with at most so many centers. For more they are too small to tell signal from noise: learnt
# for 16,000 centers, weights of `health` were twice as large as is best there, and those of `flights` no better.
_MOST_RESOLVED = 5000
# A step has fewer rows and centers where there are so many columns that this many differences would not do: those of
# few or of near rows, and those of more.
_MOST_DIFFERENCES, _MOST_LARGE_DIFFERENCES = 4e8, 1.5e9

# From this part of the first steps on, columns whose typical exponent has fallen below this are left out.
_PRUNED_FROM, _NEGLIGIBLE = 1 / 2, 1e-3
_FIRST_SHARE, _FIRST_NOISE = 1.0, 6.0
_LOG_RANGE = (-14.0, 9.0)
_OUTPUTS = 16

# Of the small models that compare weights, and tell where a model errs.
_SHARP_ROWS, _SHARP_CENTERS = 12_000, 1200
# More centers than the weights are for resolve sharper ones, by a power of their number: that between the weights of
# the whole pool and of neighbourhoods, 0.6 on flights, 0.1 to 0.3 on blood values, illnesses, faces and loads, at most
# this. Flights with 6000 and 20,000 centers are best at 0.4 to 0.5.
_STEEPEST_GROWTH, _MOST_GROWTH = 0.4, 4.0
# Rows of another split that weights are checked on; in how many neighbourhoods: ten chose the worse ones on `loads`.
# A difference of so many standard errors ends the checks.
CHECKED_ROWS, _CHECKS, _FEWEST_CHECKS, _CLEAR = 12_000, 30, 8, 3.0
_SEARCHED_ROWS = 1 << 14
# Rows that the expected error is learnt from, at most.
_ERROR_ROWS = 24_000

# What columns are worth is measured for so many of them, on as many held-out rows as take so many differences.
_WEIGHED_COLUMNS, _FEWEST_WEIGHED, _WEIGHED_DIFFERENCES = 20, 200, 4e9


@dataclass(frozen=True, slots=True)
class Learnt:
    """A kernel whose weights were learnt, and what each column is worth.

    importance: (d,), by how much the share of the variance that is explained on held-out rows falls when the values
    of the column are shuffled among these rows; of the 20 columns that count most by their size, 0 for the others.
    explained: that share, of a small problem: the fit will do better.
    known: the kernel with the weights that suit `n_known` centers; n_known: 0 where learning has not helped, and the
    weights are those of the start for any number of centers.
    growth: the power of the number of centers that the weights grow with.
    noise: the ridge that suits held-out rows best, times the number of rows that were trained on.
    errors: what the model of `explained` is expected to err by, from place to place; None where that is the same.
    linear: the linear part, which the kernel has learnt the rest of; None where it does not help.
    """

    kernel: ColumnKernel
    importance: Tensor
    explained: float
    known: ColumnKernel
    n_known: int
    growth: float
    noise: float
    errors: ExpectedError | None
    linear: LinearFit | None = None


def grown(known: ColumnKernel, n_known: int, growth: float, n_centers: int) -> ColumnKernel:
    """The kernel for a fit with `n_centers` centers, from the one that suits `n_known`; the same where that is 0.

    growth: the power of the number of centers. The weights become at most 4 times as large or as small.
    """
    if not n_known:
        return known
    factor = (n_centers / n_known) ** growth
    return known.scaled(min(max(factor, 1 / _MOST_GROWTH), _MOST_GROWTH))


def ridge_of(noise: float, n_rows: int) -> float:
    """The ridge of a fit to so many rows. Noise has a variance that does not depend on n, and lambda = variance / n."""
    return float(f"{noise / n_rows:.3g}")


def learnt_weights(
    kernel: ColumnKernel,
    x: Tensor,
    y: Tensor,
    n_centers: int,
    generator: torch.Generator,
    checked: tuple[Tensor, Tensor] | None = None,
    effort: float = 1.0,
    tries_linear: bool = False,
) -> Learnt:
    """The kernel with learnt weights, for a fit with `n_centers` centers.

    From 5000 centers on the same is learnt for any number of centers, and only the last multiple differs: weights may
    be learnt for the largest number there may be, and `grown` gives the kernel for the number there is.

    x: (n, d), scaled rows in random order, float32; y: (n, c), their coded targets. checked: such rows of another
    split, such as a later time, where neighbours may tell less than they do among the rows of one day: if weights that
    are learnt on the whole pool do better there, they are taken. effort: how much larger the problems are; with 2 the
    steps on rows of the whole pool have twice as many rows, and more of them have 1200 centers. tries_linear: whether a
    linear part is fitted too: if a small model with the weights of the whole pool errs less with it, by more than two
    standard errors, the neighbourhoods learn what it leaves.
    Costs at most 40 steps of effort^2 4 x 10^8 differences of two values, 60 of 4 x 10^8, and the like. Deterministic
    for a generator and a number of threads. Raises ConfigError for fewer than 100 rows.
    """
    if len(x) < FEWEST_ROWS:
        raise ConfigError(
            f"the {kernel.name} kernel learns its weights from rows, but there are only {len(x)}; use at least "
            f"{FEWEST_ROWS} rows, or another kernel"
        )
    n_held = held_rows(len(x))
    linear = fitted_linear(x, y, kernel.is_category, n_held, generator, checked) if tries_linear else None
    told = None if linear is None else linear.of_others
    if y.shape[1] > _OUTPUTS:
        mixing = _mixing(y.shape[1], generator).to(y)
        y, checked = y @ mixing, None if checked is None else (checked[0], checked[1] @ mixing)
        told = None if told is None else told.mixed(mixing)
    held, pool = (x[:n_held], y[:n_held]), (x[n_held:], y[n_held:])
    variance = float((held[1] - held[1].mean(0)).square().sum(1).mean())
    start = _start(kernel, *pool, generator)
    descent = _Descent.of(start, pool[0], effort)
    learnt = [descent.run(*pool, generator)]
    n_small = min(n_centers, _SHARP_CENTERS, max(1, min(_SHARP_ROWS, len(pool[0])) // 4))
    if told is not None and not reduces_error(
        told, learnt[0][0], _first_rows(pool), checked or held, n_small
    ):
        linear = told = None
    if told is not None:
        held, pool = told.left_of(held), told.left_of(pool)
        checked = None if checked is None else told.left_of(checked)
    learnt.append(descent.run_near(*pool, n_centers, generator))
    noise, chosen = float(descent.log_noise.exp()), checked or held
    growth = descent.growth(*learnt)
    at_density = [grown(*suited, growth, learnt[1][1]) for suited in learnt]
    is_near = _prefers_last(at_density, pool, chosen, descent.sizes_near(len(pool[0]), n_centers), generator)
    small_pool = _first_rows(pool)

    def small(suited: tuple[ColumnKernel, int]) -> SmallRegression[ColumnKernel]:
        return SmallRegression.of(grown(*suited, growth, n_small), small_pool, held, n_small)

    best, unlearnt = small(learnt[0]), small((start, 0))
    if is_near:
        best, (known, n_known) = min(best, small(learnt[1]), key=lambda each: each.loss), learnt[1]
    else:
        (known, n_known), noise = learnt[0], best.noise
    if unlearnt.loss < best.loss:  # As with targets that are noise.
        best, (known, n_known), noise = unlearnt, (start, 0), unlearnt.noise
    scale = variance or 1.0  # Targets may all be the same.
    importance = _importance(best, held, descent.typical(best.kernel), linear, told) / scale
    explained = (variance - best.loss) / scale
    errors = _expected_errors(best, held, (pool[0][_SHARP_ROWS:], pool[1][_SHARP_ROWS:]))
    kernel = grown(known, n_known, growth, n_centers)
    return Learnt(kernel, importance, explained, known, n_known, growth, noise, errors, linear)


def held_rows(n_rows: int) -> int:
    """How many of the rows that are learnt from are held out, the first ones."""
    return min(int(n_rows * _HELD_SHARE), _MOST_HELD)


def _first_rows(pool: tuple[Tensor, Tensor]) -> tuple[Tensor, Tensor]:
    """Those that small models are fitted to."""
    return pool[0][:_SHARP_ROWS], pool[1][:_SHARP_ROWS]


def _mixing(c: int, generator: torch.Generator) -> Tensor:
    """(c, 16): makes 16 random combinations of c outputs, whose squares have the same sum on average."""
    return torch.randn(c, _OUTPUTS, generator=generator) / math.sqrt(_OUTPUTS)


def _start(kernel: ColumnKernel, x: Tensor, y: Tensor, generator: torch.Generator) -> ColumnKernel:
    """A typical pair of rows has K near exp(-1), and a half of its exponent is that of columns that tell of y.

    All columns that vary have the same share of one half, those that tell of y the same of the other. Without columns
    that do, all that vary weigh the same.
    """
    varies = (x.amax(0) > x.amin(0)).cpu()
    telling = telling_columns(x, y, kernel.is_category, generator) & varies
    _LOGGER.debug("column weights: %d of %d columns tell of the targets", int(telling.sum()), len(telling))
    if not telling.any():
        telling = varies
    shares = sum((each.double() / max(1, int(each.sum())) for each in (varies, telling)), torch.zeros(())) / 2
    each = shares.float() ** torch.where(kernel.is_category, 1.0, 1 / kernel.power)
    return replace(kernel, weights=each, shares=torch.where(varies, _FIRST_SHARE, 0.0))


class _Average:
    """The mean of the last third of so many steps' parameters."""

    def __init__(self, n_steps: int) -> None:
        self._first = math.ceil((1 - _AVERAGED) * n_steps)
        self._kept: list[list[Tensor]] = []

    def add(self, step: int, parameters: list[Tensor]) -> None:
        if step >= self._first:
            self._kept.append([each.clone() for each in parameters])

    def put_into(self, parameters: list[Tensor]) -> None:
        for parameter, values in zip(parameters, zip(*self._kept, strict=True), strict=True):
            parameter.copy_(torch.stack(values).mean(0))


class Adam:
    """Adam (Kingma and Ba, 2015, algorithm 1) on tensors of float64, in place.

    `torch.optim` takes two seconds to import, twenty times as long as all its steps here.
    """

    def __init__(self, parameters: list[Tensor]) -> None:
        self._n_steps = 0
        self._states = [(each, torch.zeros_like(each), torch.zeros_like(each)) for each in parameters]

    def step(self, rate: float, gradients: list[Tensor]) -> None:
        """One step of the size `rate` against the gradients, one for each tensor and of its shape."""
        self._n_steps += 1
        first, second = (1 - beta**self._n_steps for beta in _BETAS)
        for (parameter, mean, square), gradient in zip(self._states, gradients, strict=True):
            mean.lerp_(gradient, 1 - _BETAS[0])
            square.lerp_(gradient.square(), 1 - _BETAS[1])
            parameter.sub_(rate / first * mean / ((square / second).sqrt() + _EPSILON))


@dataclass(slots=True)
class _Descent:
    """The steps of Adam. log_weights, log_shares: (d,), float64; spread: (d,), mean |difference|^power of two rows.

    room: for the block of a step; taking fresh memory for each takes as long as forming the block of a few columns.
    """

    kernel: ColumnKernel
    spread: Tensor
    log_weights: Tensor
    log_shares: Tensor
    log_noise: Tensor
    in_use: Tensor
    effort: float
    room: Tensor

    @classmethod
    def of(cls, start: ColumnKernel, x: Tensor, effort: float) -> _Descent:
        distance = (x - x.roll(1, 0)).abs()
        spread = torch.where(start.is_category.to(x.device), (distance > 0).to(x), distance**start.power)
        in_use = start.weights > 0
        weights, shares = (torch.where(in_use, each, 1.0).double() for each in (start.weights, start.shares))
        log_noise = torch.full((), math.log(_FIRST_NOISE), dtype=torch.float64)
        logs = weights.log(), shares.log(), log_noise
        return cls(start, spread.mean(0).double().cpu(), *logs, in_use, effort, x.new_empty(0))

    def run(self, x: Tensor, y: Tensor, generator: torch.Generator) -> tuple[ColumnKernel, int]:
        """The steps on rows of the whole pool. Returns their average, and the number of centers that it suits."""
        adam, last = Adam(self._parameters()), _Average(_STEPS)
        for step, sizes in enumerate(_pool_sizes(self.effort, int(self.in_use.sum()))):
            n_each, n_centers = sizes.among(int(self.in_use.sum()), len(x))
            rows = torch.randperm(len(x), generator=generator)[: 2 * n_each].to(x.device)
            self._step(adam, _RATES, step / _STEPS, x[rows], y[rows], n_centers)
            if step / _STEPS >= _PRUNED_FROM:
                self._prune()
            last.add(step, self._parameters())
        last.put_into(self._parameters())
        return self.current(), n_centers

    def run_near(
        self, x: Tensor, y: Tensor, n_centers: int, generator: torch.Generator
    ) -> tuple[ColumnKernel, int]:
        """The steps on neighbourhoods. Returns their average, and the number of centers that it suits.

        n_centers: as many as the fit may have.
        """
        n_each, n_small = self.sizes_near(len(x), n_centers)
        adam, last = Adam(self._parameters()), _Average(_NEAR_STEPS)
        for step in range(_NEAR_STEPS):
            kernel = self.current()
            row = x[torch.randint(len(x), (1,), generator=generator).to(x.device)]
            near = _nearest(kernel, row, x, 2 * n_each)
            rows = near[torch.randperm(len(near), generator=generator).to(x.device)]
            self._step(adam, _NEAR_RATES, step / _NEAR_STEPS, x[rows], y[rows] - y[rows].mean(0), n_small)
            last.add(step, self._parameters())
        last.put_into(self._parameters())
        return self.current(), max(1, round(n_small / (2 * n_each) * len(x)))

    def sizes_near(self, n_rows: int, n_centers: int) -> tuple[int, int]:
        """Rows on each side and centers of a neighbourhood, as `run_near` takes them."""
        n_columns, rows = int(self.in_use.sum()), _near_rows(n_rows, n_centers)
        n_each, n_small = _Sizes(rows, _NEAR_CENTERS, _MOST_DIFFERENCES).among(n_columns, n_rows)
        return n_each, min(n_small, max(1, n_each // 2))

    def _parameters(self) -> list[Tensor]:
        return [self.log_weights, self.log_shares, self.log_noise]

    def _step(
        self,
        adam: Adam,
        rates: tuple[float, float],
        done: float,
        x: Tensor,
        y: Tensor,
        n_centers: int,
    ) -> None:
        """One step down."""
        log_rho = self.log_noise - math.log(len(x) // 2)
        if self.room.numel() < len(x) * n_centers:
            self.room = x.new_empty(len(x) * n_centers)
        room = self.room[: len(x) * n_centers].view(len(x), n_centers)
        loss, *gradients = gradients_of(self.current(), log_rho, x, y, n_centers, room)
        _LOGGER.debug("column weights: held-out loss %.4f", loss)
        adam.step(rates[0] * (rates[1] / rates[0]) ** done, gradients)
        for parameter in self._parameters():
            parameter.clamp_(*_LOG_RANGE)

    def current(self) -> ColumnKernel:
        weights, shares = (each.exp().float() for each in (self.log_weights, self.log_shares))
        return replace(
            self.kernel,
            weights=torch.where(self.in_use, weights, 0.0),
            shares=torch.where(self.in_use, shares, 0.0),
        )

    def typical(self, kernel: ColumnKernel) -> Tensor:
        """(d,), the mean exponent of each column for two rows, with `anova` times c / (1 + c)."""
        weights = kernel.weights.double()
        exponents = torch.where(kernel.is_category, weights, weights**kernel.power) * self.spread
        return exponents if kernel.name == "product" else exponents * kernel.shares / (1 + kernel.shares)

    def growth(self, few: tuple[ColumnKernel, int], many: tuple[ColumnKernel, int]) -> float:
        """The power of the number of centers by which exponents grow from one kernel to the other, 0 to 0.4.

        Each with the number of centers that it suits.
        """
        sharper = float(self.typical(many[0]).sum() / self.typical(few[0]).sum())
        if not sharper > 1 or many[1] <= few[1]:
            return 0.0
        return min(math.log(sharper) / math.log(many[1] / few[1]), _STEEPEST_GROWTH)

    def _prune(self) -> None:
        kept = self.in_use & (self.typical(self.current()) > _NEGLIGIBLE)
        if kept.any():
            self.in_use = kept


def _near_rows(n_rows: int, n_centers: int) -> int:
    """Rows on each side of a neighbourhood that has as many centers as the fit to `n_rows` rows would have there."""
    wanted = n_rows * _NEAR_CENTERS // (2 * min(n_centers, _MOST_RESOLVED))
    return min(max(wanted, _FEWEST_NEAR_ROWS), _NEAR_ROWS)


class _Sizes(NamedTuple):
    """Rows on each side and centers of a step, where columns and rows allow them, and the most differences."""

    rows: int
    centers: int
    most: float

    def among(self, n_columns: int, n_rows: int) -> tuple[int, int]:
        """Rows on each side and centers, with so many columns in use and rows to draw from."""
        differences = 2 * self.rows * self.centers * max(1, n_columns)
        fewer = min(1.0, math.sqrt(self.most / differences))
        n_each = min(int(self.rows * fewer), n_rows // 2)
        return n_each, min(max(1, int(self.centers * fewer)), n_each)


def _pool_sizes(effort: float, n_columns: int) -> list[_Sizes]:
    """The sizes of the steps on rows of the whole pool; n_columns: in use at the start."""
    n_small = min(_STEPS, round(_SMALL_STEPS / effort**2))
    rows = min(max(_LARGE_ROWS, _ROWS_PER_COLUMN * n_columns) * effort, _MOST_LARGE_ROWS)
    small = _Sizes(_ROWS, _CENTERS, _MOST_DIFFERENCES * effort**2)
    large = _Sizes(max(_ROWS, round(rows)), _LARGE_CENTERS, _MOST_LARGE_DIFFERENCES * effort**2)
    return [small] * n_small + [large] * (_STEPS - n_small)


def evaluations_of_learning(n_columns: int, effort: float = 1.0) -> int:
    """Kernel evaluations that take as long as the learning, where all columns stay in use: slopes cost two each."""
    near = _Sizes(_NEAR_ROWS, _NEAR_CENTERS, _MOST_DIFFERENCES).among(n_columns, POOL_ROWS)
    pool = [sizes.among(n_columns, POOL_ROWS) for sizes in _pool_sizes(effort, n_columns)]
    evaluations = (_SHARP_ROWS + _MOST_HELD) * _SHARP_CENTERS * 3 + int(_WEIGHED_DIFFERENCES / n_columns)
    evaluations += sum(3 * 2 * n_each * n_centers for n_each, n_centers in [*pool, *[near] * _NEAR_STEPS])
    return evaluations


def _prefers_last(
    kernels: list[ColumnKernel],
    pool: tuple[Tensor, Tensor],
    checked: tuple[Tensor, Tensor],
    sizes: tuple[int, int],
    generator: torch.Generator,
) -> bool:
    """Whether the last kernel errs least around random rows of `checked`, in neighbourhoods like those of `run_near`.

    sizes: rows to train on, which are every other one of a neighbourhood, and centers.
    """
    (x, y), (checked_x, checked_y), (n_rows, n_centers) = pool, checked, sizes
    n_around = max(1, len(checked_x) * n_rows // len(x))  # The inner half.
    gains, last = torch.zeros(0, dtype=torch.float64), kernels[-1]
    for place in torch.randint(len(checked_x), (_CHECKS,), generator=generator).tolist():
        row = checked_x[place : place + 1]
        near = _nearest(last, row, x, 2 * n_rows)
        near = near[torch.randperm(len(near), generator=generator).to(x.device)][:n_rows]
        around = _nearest(last, row, checked_x, n_around)
        mean = y[near].mean(0)
        rows, others = (x[near], y[near] - mean), (checked_x[around], checked_y[around] - mean)
        first_loss, last_loss = (
            SmallRegression.of(kernel, rows, others, n_centers).loss for kernel in kernels
        )
        gains = torch.cat([gains, gains.new_tensor([first_loss - last_loss])])
        if _is_clear(gains):
            break
    _LOGGER.debug("column weights: gains around checked rows %s", gains.tolist())
    return float(gains.sum()) >= 0


def _nearest(kernel: ColumnKernel, row: Tensor, x: Tensor, n: int) -> Tensor:
    """Places of the n rows of x, (N, d), of the largest K to `row`, (1, d)."""
    left = kernel.left(row)
    parts = [kernel.block(left, kernel.right(some))[0] for some in x.split(_SEARCHED_ROWS)]
    return torch.cat(parts).topk(n).indices


def _is_clear(gains: Tensor) -> bool:
    """Whether the mean of gains, (k,), differs from 0 by so many standard errors that more of them are not needed."""
    if len(gains) < _FEWEST_CHECKS:
        return False
    return bool(gains.mean().abs() > _CLEAR * gains.std() / math.sqrt(len(gains)))


def _expected_errors(
    regression: SmallRegression[ColumnKernel], held: tuple[Tensor, Tensor], spare: tuple[Tensor, Tensor]
) -> ExpectedError | None:
    """A regression of the errors on rows that the model has not seen: held out, and `spare` of the pool.

    None where a fifth of these rows is not described better by it than by their mean.
    """
    x, y = (torch.cat(parts)[:_ERROR_ROWS] for parts in zip(spare, held, strict=True))
    sizes = regression.squares(x, y).sum(1, keepdim=True).sqrt()
    mean, n_held = float(sizes.double().mean()), len(x) // 5
    centred = sizes - mean
    # The centers are those of the model, which have no error of their own.
    at_centers = torch.zeros(len(regression.z), 1, device=x.device)
    pool = (torch.cat([regression.z, x[n_held:]]), torch.cat([at_centers, centred[n_held:]]))
    found = SmallRegression.of(regression.kernel, pool, (x[:n_held], centred[:n_held]), len(regression.z))
    if found.loss >= float(centred[:n_held].double().square().mean()):
        return None
    return ExpectedError(found.kernel, found.z, found.weights, mean)


def _importance(
    regression: SmallRegression[ColumnKernel],
    held: tuple[Tensor, Tensor],
    typical: Tensor,
    linear: LinearFit | None,
    told: LinearPart | None,
) -> Tensor:
    """(d,), by how much the held-out loss rises when a column's values change rows.

    Of the 20 columns with the largest `typical` exponents and terms of the linear part; told: that part, for the
    targets of `held`, which are what it leaves.
    """
    size = typical / typical.max().clamp_min(1e-300)
    if linear is not None:
        size = size + linear.sizes / linear.sizes.max().clamp_min(1e-300)
    order = torch.argsort(size, descending=True, stable=True)[:_WEIGHED_COLUMNS]
    columns = order[size[order] > 0].tolist()
    differences = max(1, len(columns) * len(regression.z) * len(regression.kernel.used))
    n_rows = min(len(held[0]), max(_FEWEST_WEIGHED, int(_WEIGHED_DIFFERENCES / differences)))
    x, y = held[0][:n_rows], held[1][:n_rows]
    loss, found = regression.error(x, y), torch.zeros(len(typical), dtype=torch.float64)
    for column in columns:
        shuffled = x.clone()
        shuffled[:, column] = x[:, column].roll(1)  # The rows are in random order already.
        left = y if told is None else y + told(x) - told(shuffled)
        found[column] = max(0.0, regression.error(shuffled, left) - loss)
    return found
