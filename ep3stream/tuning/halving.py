"""Successive halving over kernels, bandwidths and feature scales (Jamieson and Talwalkar 2016), for `tune`.

Every candidate is fitted to few rows and centers, the best third of them to three times as many, and so on; each
fit gives its best ridge at no further cost. A candidate's loss is its error on held-out rows.
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
from ep3stream.solver.named_kernels import measured_kernel, named_kernel
from ep3stream.solver.targets import TargetCode

logger = logging.getLogger(__name__)

_KEPT = 3  # One candidate in so many goes on to the next rung.

_DOUBLINGS = (-2.0, -1.0, 0.0, 1.0, 2.0)

_MOST_DOUBLINGS = 8.0

_SHAPES = {"dispersal": (0.7, 1.0, 1.5), "rational_quadratic": (0.5, 1.0, 2.0)}

# n lambda, the variance of the noise in a Gaussian process with this kernel, which does not change with n.
_NOISES = (0.0, *(10.0 ** (power / 2) for power in range(-6, 9)))

# A larger ridge has to bring the loss below that share of a smaller one's: few epochs regularise by themselves.
_RIDGE_GAIN = 0.99

_MEDIAN_ROWS = 2000

# What a doubled bandwidth and a smoother kernel have to lower the loss by, and how smooth each kernel is. Measured:
# on flight delays, scaled, matern32 at 35 beats laplacian at 9 by 1.6% here and loses by 1% in a fit of one epoch.
_DOUBLING, _SMOOTHER = 1.005, 1.02

_SMOOTHNESS = {"laplacian": 0, "matern32": 1, "matern52": 2, "rational_quadratic": 3, "gaussian": 3}

_SCALE_ROUNDS = 4

_SCALE_POWERS = (0.25, 0.5)  # of the mean squared gradient; 1/2 is the recursive feature machine's

_SCALE_GAIN = 0.995  # A round that lowers the loss by less ends them.

_LEAST_GRADIENT = 1e-6  # of the mean

_GRADIENT_ROWS = 1000


@dataclass(frozen=True, slots=True)
class Sample:
    """Scaled rows to choose on: centers (p, d) and x (n, d) with y, both in random order, and held-out rows."""

    centers: Tensor
    x: Tensor
    y: Tensor
    held_x: Tensor
    held_y: Tensor
    targets: TargetCode

    def scaled(self, factors: Tensor) -> Sample:
        """With features multiplied by `factors`, (d,)."""
        x, centers, held_x = (rows * factors for rows in (self.x, self.centers, self.held_x))
        return replace(self, x=x, centers=centers, held_x=held_x)


@dataclass(frozen=True, slots=True)
class Rung:
    """How many centers and rows a candidate is fitted to."""

    n_centers: int
    n_rows: int

    @property
    def cost(self) -> float:
        """Of one fit, in proportion: n p^2, beside which p^3 is no more."""
        return float(self.n_rows * self.n_centers**2)


@dataclass(frozen=True, slots=True)
class Candidate:
    """A kernel of bandwidth median * 2^doublings; None for one without. is_scaled: on features times factors."""

    name: KernelName
    doublings: float | None
    shape: float | None = None
    is_scaled: bool = False

    def moved(self, doublings: float) -> Candidate | None:
        """With a bandwidth so much wider; None beyond 2^-8 to 2^8 medians, and for a kernel without."""
        if self.doublings is None or abs(self.doublings + doublings) > _MOST_DOUBLINGS:
            return None
        return replace(self, doublings=self.doublings + doublings)


@dataclass(frozen=True, slots=True)
class Trial:
    """A candidate fitted on a rung, with its best ridge: `noise` is n lambda.

    loss is what the search makes small: the share of the variance left, the mse of classes, or 1 - accuracy.
    mse is in the squared unit of y; r2 is None for classes, accuracy for numbers.
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
    def rank(self) -> float:
        """The loss, which a smoother kernel or a wider bandwidth has to lower by something to be preferred.

        A trial is solved to the end. A fit is not: its steps reach the solution of a kernel whose eigenvalues
        fall faster later, and its many centers resolve what a wide bandwidth blurs.
        """
        wider = self.candidate.doublings or 0.0
        smoother = _SMOOTHNESS.get(self.candidate.name, 0)
        return self.loss * math.pow(_DOUBLING, wider) * math.pow(_SMOOTHER, smoother)


def _rank(trial: Trial) -> float:
    return trial.rank


def _tell(trials: Sequence[Trial]) -> None:
    best = min(trials, key=_rank)
    name, n_rows = best.candidate.name, best.rung.n_rows
    logger.info("%d candidates on %d rows: best %s, loss %.4g", len(trials), n_rows, name, best.loss)


@dataclass(slots=True)
class Deadline:
    """When the search has to end, and what its next fit is likely to take: the last one's time by cost."""

    ends_at: float
    clock: Callable[[], float] = time.monotonic
    _seconds: float = 0.0
    _cost: float = 1.0

    def allows(self, rung: Rung) -> bool:
        """Whether a fit on `rung` is likely to end in time."""
        return self.clock() + self._seconds * rung.cost / self._cost < self.ends_at

    def note(self, rung: Rung, seconds: float) -> None:
        """A fit on `rung` took so long."""
        self._seconds, self._cost = seconds, rung.cost


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
    """The rungs, and every trial so far. Its outcome depends on the machine's speed only if it is cut short."""

    sample: Sample
    rungs: Sequence[Rung]
    by_accuracy: bool
    deadline: Deadline
    trials: list[Trial] = field(default_factory=list)
    feature_scale: Tensor | None = None
    is_cut_short: bool = False

    def run(self, kernels: Sequence[KernelName], learn_scale: bool) -> Trial:
        """The best trial on the last rung that there was time for."""
        trials = self._extended(grid(kernels))
        if learn_scale and (factors := self._learned_scale(trials)) is not None:
            self.feature_scale = factors
            trials += self._extended(grid(kernels, is_scaled=True))
        _tell(trials)
        for rung in self.rungs[1:]:
            ranked = sorted(trials, key=_rank)[: -(-len(trials) // _KEPT)]
            # Best first: where time runs out, it was spent on those that promise most.
            trials = self._scored([trial.candidate for trial in ranked], rung) or trials
            _tell(trials)
        return self._refined(min(trials, key=_rank))

    def is_at_edge(self, trial: Trial) -> bool:
        """Whether the next bandwidth on one side of the trial's was not tried on its rung."""
        tried = {t.candidate for t in self.trials if t.rung == trial.rung}
        near = [trial.candidate.moved(step) for step in (-0.5, 0.5)]
        return trial.candidate.doublings is not None and not tried.issuperset(near)

    def _scored(self, candidates: Iterable[Candidate], rung: Rung) -> list[Trial]:
        """Trials for as long as there is time, the very first one always."""
        trials = []
        for candidate in candidates:
            if self.trials and not self.deadline.allows(rung):
                self.is_cut_short = True
                break
            trials.append(self._fitted(candidate, self._sample_of(candidate), rung)[0])
            self.trials.append(trials[-1])
        return trials

    def _sample_of(self, candidate: Candidate) -> Sample:
        if not candidate.is_scaled:
            return self.sample
        assert self.feature_scale is not None
        return self.sample.scaled(self.feature_scale)

    def _extended(self, candidates: Iterable[Candidate]) -> list[Trial]:
        """Trials of `candidates`; where a kernel is best at an end of its bandwidths, with more beyond it."""
        rung = self.rungs[0]
        trials = self._scored(candidates, rung)
        families: dict[Candidate, list[Trial]] = {}
        for trial in trials:
            families.setdefault(replace(trial.candidate, doublings=None), []).append(trial)
        for family in families.values():
            while (beyond := _beyond(family)) and (more := self._scored([beyond], rung)):
                family += more
        return [trial for family in families.values() for trial in family]

    def _refined(self, best: Trial) -> Trial:
        """Downhill over bandwidths sqrt(2) apart, on the rung of `best`."""
        while True:
            tried = {trial.candidate for trial in self.trials if trial.rung == best.rung}
            near = [best.candidate.moved(step) for step in (-0.5, 0.5)]
            new = [candidate for candidate in near if candidate is not None and candidate not in tried]
            found = min((best, *self._scored(new, best.rung)), key=_rank)
            if found is best:
                return best
            best = found

    def _learned_scale(self, trials: Sequence[Trial]) -> Tensor | None:
        """Feature factors, (d,), of root mean square 1, from the best kernel of the distance; None if none helps."""
        radial = [trial for trial in trials if trial.candidate.name in RADIAL_KERNELS]
        rung = self.rungs[min(1, len(self.rungs) - 1)]
        if not radial or not self.deadline.allows(rung):
            logger.warning("no feature scale: there is no kernel of the distance, or no time to learn one")
            return None
        candidate = min(radial, key=_rank).candidate
        factors, sample = torch.ones_like(self.sample.x[0]), self.sample
        trial, path = self._fitted(candidate, sample, rung)
        first = trial.loss
        for _ in range(_SCALE_ROUNDS):
            if not self.deadline.allows(rung):
                break
            moment = factors.square() * _squared_gradient(trial, path, sample)
            tries = []
            for power in _SCALE_POWERS:
                scale = _normalised(moment, power)
                scaled = self.sample.scaled(scale)
                tries.append((scale, scaled, *self._fitted(candidate, scaled, rung)))
            found = min(tries, key=lambda tried: tried[2].loss)
            if found[2].loss >= _SCALE_GAIN * trial.loss:
                break
            factors, sample, trial, path = found
        logger.info("feature scale: loss %.4g, without %.4g", trial.loss, first)
        return factors if trial.loss < first else None

    def _fitted(self, candidate: Candidate, sample: Sample, rung: Rung) -> tuple[Trial, RidgePath]:
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
        used = KernelConfig(candidate.name, **kernel.parameters)
        loss = float(losses[best])
        return Trial(candidate, used, rung, _NOISES[best], loss, mse, r2, accuracy, elapsed_s), path


def _scores(sample: Sample, errors: Tensor, accuracy: float) -> tuple[float, float | None, float | None]:
    """mse, and r2 or accuracy, as `evaluate` gives them, from the mean squared coded error of each output, (c,)."""
    targets = sample.targets
    mse = float((errors * targets.scale.double().square()).mean())
    if targets.is_classification:
        return mse, None, accuracy
    variances = (sample.held_y.double() / targets.scale).var(0, unbiased=False)
    return mse, float((1 - errors / variances).mean()), None


def _kernel(candidate: Candidate, sample: Sample) -> Kernel:
    """With the median of this sample's rows."""
    choice = KernelConfig(candidate.name, shape=candidate.shape)
    measured = measured_kernel(choice, sample.x[:_MEDIAN_ROWS], sample.x.mean(0))
    if candidate.doublings is None:
        return measured
    # Four digits: what the settings hold is what was tried.
    bandwidth = float(f"{measured.parameters['bandwidth'] * 2**candidate.doublings:.4g}")
    return named_kernel(candidate.name, {**measured.parameters, "bandwidth": bandwidth}, sample.x.mean(0))


def _beyond(family: Sequence[Trial]) -> Candidate | None:
    """The bandwidth beyond the end of those tried at which the best one lies."""
    tried = [trial.candidate.doublings or 0.0 for trial in family]
    best = min(family, key=_rank).candidate
    if best.doublings == max(tried):
        return best.moved(1)
    return best.moved(-1) if best.doublings == min(tried) else None


def _squared_gradient(trial: Trial, path: RidgePath, sample: Sample) -> Tensor:
    """Of a trial's model on some of its rows, (d,)."""
    assert isinstance(path.kernel, RadialKernel)
    rung = trial.rung
    weights = path.weights(trial.noise / rung.n_rows)
    rows = sample.x[: min(rung.n_rows, _GRADIENT_ROWS)]
    return mean_squared_gradient(path.kernel, sample.centers[: rung.n_centers], weights, rows).to(rows)


def _normalised(moment: Tensor, power: float) -> Tensor:
    """moment^power, of root mean square 1; a feature that nothing depends on keeps a little."""
    relative = moment / moment.mean().clamp_min(torch.finfo(moment.dtype).tiny)
    factors = relative.clamp_min(_LEAST_GRADIENT) ** power
    return factors / factors.square().mean().sqrt()
