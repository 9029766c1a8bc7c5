"""Successive halving over kernels, bandwidths and feature scales (Jamieson and Talwalkar 2016), for `tune`.

Every candidate is fitted to few rows and centers, the best third of them to three times as many, and so on. Each fit
gives its best ridge at no further cost. The loss of a candidate is its error on held-out rows.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from ep3stream.config import KERNEL_DEFAULTS, KernelConfig, KernelName
from ep3stream.solver.kernels import RADIAL_KERNELS, Kernel, RadialKernel
from ep3stream.solver.least_squares import RidgePath
from ep3stream.solver.model import mean_squared_gradient
from ep3stream.solver.named_kernels import kernel_tensors, measured_kernel, named_kernel
from ep3stream.solver.targets import TargetCode

# One candidate in so many goes on to the next rung.
_HALVING_FACTOR = 3

# The bandwidths of the grid, as powers of two times the median distance, and how far beyond them the search may go.
_DOUBLINGS = (-2.0, -1.0, 0.0, 1.0, 2.0)
_MOST_DOUBLINGS = 8.0
_SHAPES = {"dispersal": (0.7, 1.0, 1.5), "rational_quadratic": (0.5, 1.0, 2.0)}

# n lambda, the noise variance of a Gaussian process with this kernel, which does not depend on n.
_NOISES = (0.0, *(10.0 ** (power / 2) for power in range(-6, 9)))

# A larger ridge must lower the loss to this share of a smaller one's: few epochs already act as a regulariser.
_RIDGE_GAIN = 0.99
_MEDIAN_ROWS = 2000

# By what factor a doubled bandwidth and a smoother kernel have to lower the loss, and how smooth each kernel is.
# Measured on flight delays, scaled: matern32 at 35 beats laplacian at 9 by 1.6% here, and loses by 1% in a fit of one
# epoch.
_DOUBLING_COST, _SMOOTHNESS_COST = 1.005, 1.02
_SMOOTHNESS = {"laplacian": 0, "matern32": 1, "matern52": 2, "rational_quadratic": 3, "gaussian": 3}

# Feature factors are powers of the mean squared gradient; 1/2 is the power of the recursive feature machine.
_SCALE_POWERS = (0.25, 0.5)
_SCALE_ROUNDS = 4

# The rounds end when one lowers the loss to no less than this share.
_SCALE_GAIN = 0.995

# The least squared gradient that counts, as a share of the mean over the features.
_LEAST_GRADIENT = 1e-6
_GRADIENT_ROWS = 1000
logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True)
class Sample:
    """Scaled rows to choose on, in random order.

    centers: (p, d). x, y: the rows to fit, (n, d) and (n, c). held_x, held_y: held-out rows. columns: (d,), the stored
    column that each feature is made of; None where each is one of its own.
    """

    centers: Tensor
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    targets: TargetCode
    columns: Tensor | None = None

    def by_column(self, moment: Tensor) -> Tensor:
        """`moment`, (d,), where the 0/1 features of one column all have the mean of these."""
        if self.columns is None:
            return moment
        sums, counts = (
            torch.zeros_like(moment).index_add(0, self.columns, each)
            for each in (moment, torch.ones_like(moment))
        )
        return (sums / counts.clamp_min(1))[self.columns]

    def scaled(self, factors: Tensor) -> Sample:
        """The sample with its features multiplied by `factors`, (d,)."""
        x, centers, held_x = (rows * factors for rows in (self.x, self.centers, self.held_x))
        return replace(self, x=x, centers=centers, held_x=held_x)


@dataclass(frozen=True, slots=True)
class Rung:
    """How many centers and rows a candidate is fitted to."""

    n_centers: int
    n_rows: int

    @property
    def cost(self) -> float:
        """The cost of one fit, up to a factor: n p^2, of which p^3 is at most a part."""
        return float(self.n_rows * self.n_centers**2)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel, its bandwidth as median * 2^doublings, and whether the features are multiplied by learned factors.

    doublings: None for a kernel without a bandwidth.
    """

    name: KernelName
    doublings: float | None
    shape: float | None = None
    is_scaled: bool = False

    def moved(self, doublings: float) -> Candidate | None:
        """The candidate with a bandwidth 2^doublings times as wide.

        None beyond 2^-8 and 2^8 medians, and for a kernel without a bandwidth.
        """
        if self.doublings is None or abs(self.doublings + doublings) > _MOST_DOUBLINGS:
            return None
        return replace(self, doublings=self.doublings + doublings)


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate fitted on a rung, with its best ridge; `noise` is n lambda.

    loss: what the search minimises: the share of the variance that is left, the mse of classes, or 1 - accuracy.
    mse is in the squared unit of y. r2 is None for classification, accuracy for regression.
    """

    candidate: Candidate
    kernel: KernelConfig
    rung: Rung
    noise: float
    loss: float
    mse: float
    r2: float | None
    accuracy: float | None
    elapsed_s: float

    @property
    def penalised_loss(self) -> float:
        """The loss by which trials are compared: higher for a wider bandwidth and for a smoother kernel.

        A trial is solved exactly, a fit is not: its steps need longer for a kernel whose eigenvalues decay faster, and
        its many centers resolve what a wide bandwidth blurs.
        """
        wider = self.candidate.doublings or 0.0
        smoother = _SMOOTHNESS.get(self.candidate.name, 0)
        return self.loss * math.pow(_DOUBLING_COST, wider) * math.pow(_SMOOTHNESS_COST, smoother)


def _best(trials: Iterable[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.penalised_loss)


@dataclass(slots=True)
class Deadline:
    """When the search has to end. The next fit is assumed to take the last one's time, in proportion to its cost."""

    ends_at: float
    clock: Callable[[], float] = time.monotonic
    _last_seconds: float = 0.0
    _last_cost: float = 1.0

    def allows(self, rung: Rung) -> bool:
        """Whether a fit on `rung` is likely to end in time."""
        return self.clock() + self._last_seconds * rung.cost / self._last_cost < self.ends_at

    def note(self, rung: Rung, seconds: float) -> None:
        """Records how long a fit on `rung` took."""
        self._last_seconds, self._last_cost = seconds, rung.cost


def grid(kernels: Iterable[KernelName], *, is_scaled: bool = False) -> list[Candidate]:
    """The candidates of the first rung: kernels x shapes x bandwidths."""
    return [
        Candidate(name, doublings, shape, is_scaled)
        for name in kernels
        for shape in _SHAPES.get(name, (None,))
        for doublings in (_DOUBLINGS if "bandwidth" in KERNEL_DEFAULTS[name] else (None,))
    ]


@dataclass(slots=True)
class Search:
    """The rungs, and every trial so far. The result depends on the machine's speed only if time runs out."""

    sample: Sample
    rungs: Sequence[Rung]
    by_accuracy: bool
    deadline: Deadline
    trials: list[Trial] = field(default_factory=list)
    feature_scale: Tensor | None = None
    is_cut_short: bool = False

    def run(self, kernels: Sequence[KernelName], learn_scale: bool) -> Trial:
        """Returns the best trial on the last rung that there was time for."""
        trials = self._try_grid(grid(kernels))
        if learn_scale and (factors := self._learn_feature_scale(trials)) is not None:
            self.feature_scale = factors
            trials += self._try_grid(grid(kernels, is_scaled=True))
        _log_best(trials)
        for rung in self.rungs[1:]:
            n_kept = math.ceil(len(trials) / _HALVING_FACTOR)
            # Best first: if time runs out, it was spent on the most promising ones.
            kept = sorted(trials, key=lambda trial: trial.penalised_loss)[:n_kept]
            trials = self._try([trial.candidate for trial in kept], rung) or trials
            _log_best(trials)
        return self._refine(_best(trials))

    def is_at_edge(self, trial: Trial) -> bool:
        """Whether the next bandwidth, on either side of the trial's, has not been tried on the trial's rung."""
        if trial.candidate.doublings is None:
            return False
        return not self._tried_on(trial.rung).issuperset(_neighbours(trial.candidate))

    def _try(self, candidates: Iterable[Candidate], rung: Rung) -> list[Trial]:
        """Fits candidates on a rung for as long as there is time; the first one of the search in any case."""
        trials = []
        for candidate in candidates:
            if self.trials and not self.deadline.allows(rung):
                self.is_cut_short = True
                break
            sample = self.sample
            if candidate.is_scaled:
                assert self.feature_scale is not None
                sample = sample.scaled(self.feature_scale)
            trials.append(self._fit(candidate, sample, rung)[0])
            self.trials.append(trials[-1])
        return trials

    def _try_grid(self, candidates: Iterable[Candidate]) -> list[Trial]:
        """Tries candidates on the first rung, and wider or narrower ones where the best lies at the end of the grid."""
        rung = self.rungs[0]
        families: dict[Candidate, list[Trial]] = {}
        for trial in self._try(candidates, rung):
            families.setdefault(replace(trial.candidate, doublings=None), []).append(trial)
        for family in families.values():
            while (beyond := _beyond(family)) and (more := self._try([beyond], rung)):
                family += more
        return [trial for family in families.values() for trial in family]

    def _refine(self, best: Trial) -> Trial:
        """Descends over bandwidths sqrt(2) apart, on the rung of `best`."""
        while True:
            tried = self._tried_on(best.rung)
            new = [near for near in _neighbours(best.candidate) if near is not None and near not in tried]
            better = _best((best, *self._try(new, best.rung)))
            if better is best:
                return best
            best = better

    def _tried_on(self, rung: Rung) -> set[Candidate | None]:
        return {trial.candidate for trial in self.trials if trial.rung == rung}

    def _learn_feature_scale(self, trials: Sequence[Trial]) -> Tensor | None:
        """Factors of the features, (d,), of root mean square 1; None if there are none that lower the loss.

        In each round the factors become a power of the mean squared gradient of the best radial kernel's model.
        """
        radial = [trial for trial in trials if trial.candidate.name in RADIAL_KERNELS]
        rung = self.rungs[min(1, len(self.rungs) - 1)]
        if not radial or not self.deadline.allows(rung):
            logger.warning("no feature scale: there is no kernel of the distance, or no time to learn one")
            return None
        candidate = _best(radial).candidate
        factors, sample = torch.ones_like(self.sample.x[0]), self.sample
        trial, path = self._fit(candidate, sample, rung)
        unscaled_loss = trial.loss
        for _ in range(_SCALE_ROUNDS):
            if not self.deadline.allows(rung):
                break
            moment = sample.by_column(factors.square() * _squared_gradient(trial, path, sample))
            attempts = []
            for power in _SCALE_POWERS:
                new_factors = _normalised_power(moment, power)
                scaled = self.sample.scaled(new_factors)
                attempts.append((new_factors, scaled, *self._fit(candidate, scaled, rung)))
            best = min(attempts, key=lambda attempt: attempt[2].loss)
            if best[2].loss >= _SCALE_GAIN * trial.loss:
                break
            factors, sample, trial, path = best
        logger.info("feature scale: loss %.4g, without %.4g", trial.loss, unscaled_loss)
        return factors if trial.loss < unscaled_loss else None

    def _fit(self, candidate: Candidate, sample: Sample, rung: Rung) -> tuple[Trial, RidgePath]:
        """Fits a candidate for all ridges and scores each on the held-out rows; the trial has the best of them."""
        began = self.deadline.clock()
        kernel = _kernel(candidate, sample)
        x, y = sample.x[: rung.n_rows], sample.y[: rung.n_rows]
        path = RidgePath.of(kernel, sample.centers[: rung.n_centers], x, y, sample.targets)
        ridges = [noise / rung.n_rows for noise in _NOISES]
        errors, accuracies = path.held_out(sample.held_x, sample.held_y, ridges)
        losses = 1 - accuracies if self.by_accuracy else errors.mean(1)
        best = int((losses * _RIDGE_GAIN <= losses.min()).int().argmax())
        elapsed_s = self.deadline.clock() - began
        self.deadline.note(rung, elapsed_s)
        mse, r2, accuracy = _scores(sample, errors[best], float(accuracies[best]))
        settings = KernelConfig(candidate.name, **kernel.parameters)
        loss = float(losses[best])
        return Trial(candidate, settings, rung, _NOISES[best], loss, mse, r2, accuracy, elapsed_s), path


def _log_best(trials: Sequence[Trial]) -> None:
    best = _best(trials)
    name, n_rows = best.candidate.name, best.rung.n_rows
    logger.info("%d candidates on %d rows: best %s, loss %.4g", len(trials), n_rows, name, best.loss)


def _neighbours(candidate: Candidate) -> list[Candidate | None]:
    """The candidates with bandwidths sqrt(2) times as narrow and as wide; None where there is none."""
    return [candidate.moved(doublings) for doublings in (-0.5, 0.5)]


def _beyond(family: Sequence[Trial]) -> Candidate | None:
    """The next bandwidth if the best of those tried is the widest or the narrowest; else None."""
    tried = [trial.candidate.doublings or 0.0 for trial in family]
    best = _best(family).candidate
    if best.doublings == max(tried):
        return best.moved(1)
    return best.moved(-1) if best.doublings == min(tried) else None


def _kernel(candidate: Candidate, sample: Sample) -> Kernel:
    """The candidate's kernel, with the bandwidth relative to the median distance between rows of this sample."""
    settings = KernelConfig(candidate.name, shape=candidate.shape)
    measured = measured_kernel(settings, sample.x[:_MEDIAN_ROWS], sample.x.mean(0))
    if candidate.doublings is None:
        return measured
    # Rounded to the four digits of the settings, so that the fit gets the bandwidth that was tried.
    bandwidth = float(f"{measured.parameters['bandwidth'] * 2**candidate.doublings:.4g}")
    return named_kernel(
        candidate.name, {**measured.parameters, "bandwidth": bandwidth}, kernel_tensors(measured)
    )


def _scores(sample: Sample, errors: Tensor, accuracy: float) -> tuple[float, float | None, float | None]:
    """mse, r2 or None, and accuracy or None, as `evaluate` gives them.

    errors: (c,), the mean squared error of each output in the units of the fit.
    """
    targets = sample.targets
    mse = float((errors * targets.scale.double().square()).mean())
    if targets.is_classification:
        return mse, None, accuracy
    variances = (sample.held_y.double() / targets.scale).var(0, unbiased=False)
    return mse, float((1 - errors / variances).mean()), None


def _squared_gradient(trial: Trial, path: RidgePath, sample: Sample) -> Tensor:
    """The mean over some rows of the squared derivatives of a trial's model, (d,)."""
    assert isinstance(path.kernel, RadialKernel)
    rung = trial.rung
    weights = path.weights(trial.noise / rung.n_rows)
    rows = sample.x[: min(rung.n_rows, _GRADIENT_ROWS)]
    return mean_squared_gradient(path.kernel, sample.centers[: rung.n_centers], weights, rows).to(rows)


def _normalised_power(moment: Tensor, power: float) -> Tensor:
    """moment^power of root mean square 1, (d,); features without influence keep a small factor."""
    relative = moment / moment.mean().clamp_min(torch.finfo(moment.dtype).tiny)
    factors = relative.clamp_min(_LEAST_GRADIENT) ** power
    return factors / factors.square().mean().sqrt()
