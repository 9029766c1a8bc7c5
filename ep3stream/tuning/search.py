"""The search of `tune`: candidates on rungs of ever more rows and centers, compared on the same held-out rows.

The first candidate is what `fit` does by default. Every rung fits the default and the candidates that are left, the
best first, then neighbours of the best one. A candidate is left out once it is worse than the best by more than two
standard errors of the difference. The rungs grow until the size of the fit is reached or the time is used. At the end
the default is kept unless another candidate, fitted to as much, is better by more than two standard errors: the best
of many is better than it will prove.
"""

from __future__ import annotations

import logging
import math
import time
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ep3stream.config import KERNEL_DEFAULTS, KernelConfig, KernelName
from ep3stream.errors import ConfigError, DivergedError
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.tuning.trials import Candidate, Size, Trial

# A candidate that is worse by so many standard errors is left out; the next one to climb from has to be better by so
# many, and the choice by so many.
_WORSE, _BETTER, _CHOSEN = 2.0, 1.0, 2.0
# Of the loss: models that are almost the same differ by less, however small the error of that.
_LEAST_GAIN = 1e-4

# The default and the best of the others: a rung on which only one of them was fitted decides nothing.
_COMPARED = 2

# Of the time that is left the first rung may take a third. The later ones share a half, but for the last.
_FIRST_SHARE, _MIDDLE_SHARE = 1 / 3, 1 / 2
# A last rung of less than the size of the fit is worth its time from this factor to the rung before.
_LEAST_STEP = 1.4
# How much shorter a rung gets for each try to fit it into the time.
_SHRINKING = 0.92

# Rungs: centers of the first at least, and rows per center at most, but for the last one.
_FIRST_CENTERS, _MOST_ROWS_PER_CENTER = 250, 64

_BANDWIDTH_FACTORS = (1.0, 0.5, 2.0)
_POWERS = (1.0, 2.0)
_SHAPES = {"dispersal": (1.0, 0.7, 1.5), "rational_quadratic": (1.0, 0.5, 2.0)}
# Neighbours: so many times as sharp or wide on the first rung and on later ones; noises; powers.
_FIRST_STEP, _LATER_STEP = 2.0, math.sqrt(2)
_NOISES = (0.0, 0.1, 1.0, 10.0, 100.0)
_NEAR_POWERS = (0.7, 1.0, 1.4, 2.0)
_LOGGER = logging.getLogger(__name__)


def rungs(n_rows: int, n_centers: int) -> list[Size]:
    """Sizes from a few hundred centers up to that of the fit, each with about twice the centers of the one before."""
    each = min(n_rows / n_centers, _MOST_ROWS_PER_CENTER)
    sizes = [Size(n_centers, n_rows)]
    while sizes[0].n_centers >= 2 * _FIRST_CENTERS:
        n_fewer = sizes[0].n_centers // 2
        sizes.insert(0, Size(n_fewer, int(each * n_fewer)))
    return sizes


def first_candidates(
    default: Candidate, names: Iterable[KernelName], bandwidth: Callable[[KernelConfig], float]
) -> list[Candidate]:
    """The default, and of each kernel some powers, shapes or bandwidths around the median."""
    found = [default]
    for name in names:
        if name in COLUMN_KERNELS:
            kernels = [_with_power(KernelConfig(name), power) for power in _POWERS]
        else:
            kernels = [KernelConfig(name, shape=shape) for shape in _SHAPES.get(name, (None,))]
            if "bandwidth" in KERNEL_DEFAULTS[name]:
                kernels = [_wider(each, x, bandwidth) for each in kernels for x in _BANDWIDTH_FACTORS]
        found += [Candidate(kernel, default.noise) for kernel in kernels]
    return list(dict.fromkeys(found))


def _wider(kernel: KernelConfig, factor: float, bandwidth: Callable[[KernelConfig], float]) -> KernelConfig:
    """The kernel with a bandwidth `factor` times as large, in the four digits that are written."""
    return kernel if factor == 1 else replace(kernel, bandwidth=float(f"{bandwidth(kernel) * factor:.4g}"))


def _with_power(kernel: KernelConfig, power: float) -> KernelConfig:
    """The kernel on columns with this power, left out where it is the kernel's own: so equals are equal."""
    return replace(kernel, power=None if power == KERNEL_DEFAULTS[kernel.name]["power"] else power)


@dataclass(slots=True)
class Costs:
    """Seconds of a fit, a + b n p, with a and b of each kernel fitted to all that was measured of it."""

    _measured: dict[tuple[str, float | None], list[tuple[float, float]]] = field(default_factory=dict)

    def note(self, candidate: Candidate, size: Size, seconds: float) -> None:
        """Records how long a fit took."""
        of_kernel = self._measured.setdefault(_family(candidate), [])
        of_kernel.append((size.n_centers * size.n_rows, max(seconds, 1e-6)))

    def seconds(self, candidate: Candidate, size: Size) -> float:
        """How long a fit is likely to take; as the slowest kernel's where this one has not been seen; else 0."""
        work = size.n_centers * size.n_rows
        known = self._measured.get(_family(candidate))
        if known is not None:
            return _line(known, work)
        return max((_line(each, work) for each in self._measured.values()), default=0.0)


def _family(candidate: Candidate) -> tuple[str, float | None]:
    return candidate.kernel.name, candidate.kernel.power


def _line(measured: Sequence[tuple[float, float]], work: float) -> float:
    """a + b work, a and b >= 0, of least relative squared errors; in proportion to the work where one size is known."""
    done, seconds = np.array(measured).T
    only_slope = np.array([0.0, 1 / np.mean(done / seconds)])
    if np.ptp(done) == 0:
        a, b = only_slope
    else:
        a, b = np.linalg.lstsq(np.stack([1 / seconds, done / seconds], 1), np.ones(len(done)))[0]
        if b <= 0 or a < 0:
            a, b = only_slope
    return float(a + b * work)


@dataclass(frozen=True, slots=True)
class Verdict:
    """What a search has found: the chosen trial, and that of the default on the same rung."""

    best: Trial
    default: Trial

    @property
    def is_default(self) -> bool:
        """Whether the default is kept."""
        return self.best is self.default


@dataclass(slots=True)
class Search:
    """The rungs, and every trial so far.

    fit: makes a trial. learning_seconds: of what a kernel has to learn before its first trial. bandwidth: of a
    kernel, as a number. has_one_ridge: whether trials of a candidate have one ridge, so that others are tried for it.
    late: what there was no time for.
    """

    fit: Callable[[Candidate, Size], Trial]
    learning_seconds: Callable[[KernelConfig], float]
    bandwidth: Callable[[KernelConfig], float]
    sizes: Sequence[Size]
    ends_at: float
    has_one_ridge: Callable[[Candidate], bool] = lambda _: True
    clock: Callable[[], float] = time.monotonic
    costs: Costs = field(default_factory=Costs)
    trials: list[Trial] = field(default_factory=list)
    late: set[tuple[Candidate, Size]] = field(default_factory=set)

    def run(self, candidates: Sequence[Candidate]) -> Verdict:
        """Tries the candidates, the default first, and neighbours of the best, for as long as there is time."""
        given, default = candidates, candidates[0]
        for place, size in enumerate(self.sizes):
            fitting = self._fitting_size(candidates[:2], size, place)
            if fitting is None:
                break
            until = self._until(place) if fitting == size else self.ends_at
            tried = self._try(candidates, fitting, until, n_sure=_COMPARED)
            if place and len(tried) < _COMPARED:
                break
            last = self._climb(tried, until, place)
            candidates = self._kept(last, default)
            if fitting != size:
                break
        # What there was no time for on the first rung.
        known = {trial.candidate for trial in self.trials}
        new = [each for each in given if each not in known]
        last += self._try(new, last[0].size, self.ends_at)
        last = self._climb(last, self.ends_at, place)
        of_default = next(trial for trial in last if trial.candidate == default)
        better = [trial for trial in last if _is_better(trial, of_default, _CHOSEN)]
        return Verdict(_best(better or [of_default]), of_default)

    def _until(self, place: int) -> float:
        """When a rung has to end, so that there is time for those behind it."""
        now, n_left = self.clock(), len(self.sizes) - 1 - place
        if not n_left:
            return self.ends_at
        share = _FIRST_SHARE if place == 0 else _MIDDLE_SHARE / n_left
        return now + share * (self.ends_at - now)

    def _fitting_size(self, candidates: Sequence[Candidate], size: Size, place: int) -> Size | None:
        """The rung's size, or the largest below it for which there is time; None where that is no step forward."""
        if place == 0:
            return size
        before, fitting = self.sizes[place - 1], size
        while self.clock() + sum(self.costs.seconds(each, fitting) for each in candidates) > self.ends_at:
            fitting = fitting.shrunk(_SHRINKING)
            if fitting.n_centers < _LEAST_STEP * before.n_centers:
                return None
        return fitting

    def _try(self, candidates: Iterable[Candidate], size: Size, until: float, n_sure: int = 0) -> list[Trial]:
        """Fits candidates for as long as there is time; the first one of the search in any case.

        n_sure: how many may take time of the later rungs.
        """
        trials: list[Trial] = []
        for candidate in candidates:
            end = self.ends_at if len(trials) < n_sure else until
            needed = self.costs.seconds(candidate, size) + self.learning_seconds(candidate.kernel)
            if self.trials and self.clock() + needed > end:
                self.late.add((candidate, size))
                continue
            try:
                trial = self.fit(candidate, size)
            except (ConfigError, DivergedError) as error:
                if not self.trials:
                    raise
                _LOGGER.info("%s is left out: %s", candidate.kernel.name, error)
                continue
            self.costs.note(candidate, size, trial.elapsed_s)
            trials.append(trial)
            self.trials.append(trial)
        return trials

    def _climb(self, trials: list[Trial], until: float, place: int) -> list[Trial]:
        """The trials of a rung and those of neighbours of the best, until none is better by a standard error."""
        best, step = _best(trials), _LATER_STEP if place else _FIRST_STEP
        while True:
            tried = {trial.candidate for trial in self.trials if trial.size == best.size}
            new = [each for each in self._neighbours(best.candidate, step) if each not in tried]
            more = self._try(new, best.size, until)
            trials = trials + more
            better = _best([best, *more])
            if better is best or not _is_better(better, best, _BETTER):
                break
            best = better
        found = _best(trials)
        _LOGGER.info(
            "%d fits of %d centers to %d rows: best %s, loss %.4g",
            len(trials), found.size.n_centers, found.size.n_rows, found.candidate.kernel.name, found.loss,
        )  # fmt: skip
        return trials

    def _neighbours(self, candidate: Candidate, step: float) -> list[Candidate]:
        kernel, found = candidate.kernel, []
        if kernel.name in COLUMN_KERNELS:
            found = [
                replace(kernel, sharpness=float(f"{kernel.sharpness * x:.4g}")) for x in (step, 1 / step)
            ]
            power = kernel.parameters()["power"]
            found += [_with_power(kernel, near) for near in _nearest(_NEAR_POWERS, power)]
        elif "bandwidth" in KERNEL_DEFAULTS[kernel.name]:
            found = [_wider(kernel, x, self.bandwidth) for x in (step, 1 / step)]
        ridges = _nearest(_NOISES, _noise(candidate)) if self.has_one_ridge(candidate) else []
        return [
            *(replace(candidate, kernel=each) for each in found),
            *(replace(candidate, noise=noise) for noise in ridges),
        ]

    def _kept(self, trials: Sequence[Trial], default: Candidate) -> list[Candidate]:
        """The default, then those that are not worse than the best by two standard errors, the best first."""
        best = _best(trials)
        order = sorted(trials, key=lambda trial: trial.loss)
        kept = [trial.candidate for trial in order if not _is_better(best, trial, _WORSE)]
        return list(dict.fromkeys([default, *kept]))


def _noise(candidate: Candidate) -> float:
    """The candidate's noise; where the fit finds its own, that of a target of which most is noise, or none."""
    if candidate.noise is None:
        return 1.0 if candidate.kernel.name in COLUMN_KERNELS else 0.0
    return candidate.noise


def _nearest(values: Sequence[float], value: float) -> list[float]:
    """The next smaller and the next larger of `values`, where there are such."""
    below = [each for each in values if each < value]
    above = [each for each in values if each > value]
    return [*below[-1:], *above[:1]]


def _best(trials: Iterable[Trial]) -> Trial:
    return min(trials, key=lambda trial: trial.loss)


def _is_better(one: Trial, other: Trial, errors: float) -> bool:
    """Whether the loss of one is below the other's by more than so many standard errors, and by what matters."""
    excess, error = one.excess(other)
    return excess < -max(errors * error, _LEAST_GAIN * other.loss)
