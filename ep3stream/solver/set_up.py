"""From centers and sampled rows to a projection, and from that to batch and step size: the algebra of a set-up."""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ep3stream.config import SolverConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.eigenpro import build_eigenpro
from ep3stream.solver.exact import ExactProjection, build_exact
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.least_squares import HeadStart, head_start, is_worth_it
from ep3stream.solver.model import InputScaling
from ep3stream.solver.points import LeftPoints, UnpreparedPoints
from ep3stream.solver.projection import (
    NystromProjection,
    Projection,
    Spectra,
    build_nystrom,
    unexplained_diagonal,
)
from ep3stream.solver.step import Stage
from ep3stream.solver.step_size import Penalty, PublishedStep, Stability, StepProbe, measure_stability
from ep3stream.solver.targets import TargetCode

PROBES = 3

PROBE_ROWS = 1024

_MAX_PROBES = 64  # batches

_FEW_ROWS = 256

_STAGED_EPOCHS = 4

_MIN_AUTO_BATCH = 512

# Of the leverage at which a row diverges: below it its error alternates, and dies away slowly near 1.
_STABLE_SHARE = 0.75

# Centers that U explains less than this share of them are rare: a thousand probes have met rows near the others.
_KNOWN_SHARE = 0.98


class Sizes(Protocol):
    """What is settled before: the ranks of the preconditioners, how many landmarks, and the largest batch."""

    @property
    def model_rank(self) -> int:
        """r."""
        ...

    @property
    def widest_rank(self) -> int:
        """What r may be raised to where that helps much."""
        ...

    @property
    def data_rank(self) -> int:
        """q."""
        ...

    @property
    def n_landmarks(self) -> int:
        """r', so many of the centers."""
        ...

    @property
    def max_batch_size(self) -> int:
        """The largest m whose kernel block fits the memory."""
        ...


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Batch and step size, with the largest eigenvalue and leverage they rest on, measured or assumed."""

    batch_size: int
    step_size: float
    lambda_max: float
    kappa_max: float


@dataclass(frozen=True, slots=True)
class Settled:
    """What a fit goes through, and the limits that its last stage's step size rests on.

    step_size: of the first stage. start: the weights it starts from, None for zero.
    """

    stages: tuple[Stage, ...]
    step_size: float
    limits: StepLimits
    start: HeadStart | None = None

    @property
    def batch_size(self) -> int:
        """m."""
        return self.limits.batch_size

    @property
    def projection(self) -> Projection:
        """That of the first stage."""
        return self.stages[0].projection


@dataclass(frozen=True, slots=True)
class SolverBuilder:
    """What a set-up starts from; no method changes it, but each draws from `generator`.

    centers: (p, d), whole for every rank, in host memory or on the device, where all but `exact` bring no more of
    them than their shard; sample: X_s, (s, d), scaled and whole on every device. targets: for weights, if there are
    any. inputs: what scales the centers, None where they are scaled: no scaled copy of them is ever kept. sample_y: the
    y of the sample, for a head start.
    """

    kernel: Kernel
    centers: Tensor
    sample: Tensor
    sizes: Sizes
    settings: SolverConfig
    mesh: Mesh
    generator: torch.Generator
    targets: TargetCode | None = None
    inputs: InputScaling | None = None
    sample_y: Tensor | None = None

    def projection(self) -> tuple[Projection, Spectra]:
        """The one that the settings name, on this rank's shard of the centers."""
        kernel, sizes, settings = self.kernel, self.sizes, self.settings
        if settings.projection == "exact":
            whole = self._scaled(self.centers)
            return build_exact(kernel, whole, self.sample, sizes.data_rank, self.mesh, self.generator)
        n_centers = len(self.centers)
        if settings.projection == "eigenpro":
            return build_eigenpro(
                kernel,
                self._shard(),
                self._scaled(self.centers[: sizes.n_landmarks]),
                self.sample,
                n_centers,
                (sizes.data_rank, sizes.model_rank),
                (settings.projection_passes, settings.projection_tolerance),
                self.mesh,
                self.generator,
            )
        # At random: given centers may be sorted, and the first of them then say little about the others.
        drawn = torch.randperm(n_centers, generator=self.generator)[: sizes.n_landmarks]
        return build_nystrom(
            kernel,
            self._shard(),
            self._scaled(self.centers[drawn.to(self.centers.device)]),
            self.sample,
            n_centers,
            sizes.model_rank,
            sizes.data_rank,
            self.mesh,
            self.generator,
            sizes.widest_rank,
        )

    def settled(
        self,
        projection: Projection,
        spectra: Spectra,
        probes: Tensor,
        epoch_rows: int,
        probe_y: Tensor | None = None,
    ) -> Settled:
        """Stages, batch and step size by the rule of the settings, for batches of the size asked for or the best.

        probes: (n, d), scaled rows to measure on, and their y, which only weights of classes ask for; epoch_rows:
        how many there are to train on.
        """
        if self.settings.used_step == "published":
            limits = self._published(PublishedStep.of(self.kernel, self.sample, spectra.data[-1]), epoch_rows)
            return self._with_center_damping([Stage(0, projection)], [limits])
        start = self._head_start(projection, epoch_rows)
        if self.settings.data_rank or not isinstance(projection, NystromProjection | ExactProjection):
            found = self._measured(projection, probes, epoch_rows, probe_y)
            settled = self._with_center_damping([Stage(0, projection)], [self._limits(found)])
        else:
            rho = 0.0 if start is None else start.rho
            settled = self._staged(projection, probes, epoch_rows, probe_y, rho)
        return replace(settled, start=start)

    def _staged(
        self,
        projection: NystromProjection | ExactProjection,
        probes: Tensor,
        epoch_rows: int,
        probe_y: Tensor | None,
        rho: float,
    ) -> Settled:
        """One stage for each threshold up to `rho`, `flattening.py`; the batch is that of the last."""
        flattening = projection.flattening
        assert flattening is not None
        batch_size = self._first_batch(epoch_rows)
        probed = self._probed(probes, probe_y, batch_size)
        profile = probed.leverage_profile(projection)
        # Whatever the epochs: more or fewer of them may be asked for on the way.
        falling = _passed_over(flattening.falling(profile, epoch_rows * _STAGED_EPOCHS), rho)
        stages = [Stage(first_row, projection.flattened(threshold)) for first_row, threshold in falling]
        kappas = [profile.largest(flattening.shrink(t)) * self._heaviest() for _, t in falling]
        last = self._leading(probed, stages[-1], kappas[-1], batch_size)
        best = self._best_batch(last, epoch_rows)
        if best > last.critical_batch_size(self.settings.used_momentum):
            probed = self._probed(probes, probe_y, best)
            last = self._leading(probed, stages[-1], kappas[-1], best)
        elif best != batch_size:
            # The leverage limits the step already, and the leading eigenvalue grows no faster than the rows.
            growth = max(1, best / batch_size)
            last = replace(last, batch_size=best, lambda_max=last.lambda_max * growth)
        found = self._earlier(probed, stages[:-1], kappas[:-1], last)
        return self._with_center_damping(stages, [self._limits(each) for each in [*found, last]])

    def _earlier(
        self, probed: StepProbe, stages: list[Stage], kappas: list[float], last: Stability
    ) -> list[Stability]:
        """Those of all stages but the last, whose own hold for them too: its Q is no larger.

        Nor is the Q of any larger than those before, whose leading eigenvalue does where the leverage limits the step.
        """
        found: list[Stability] = []
        for stage, kappa in zip(stages, kappas, strict=True):
            if not found or not self._is_limited_by_leverage(replace(found[-1], kappa_max=kappa)):
                found.append(self._leading(probed, stage, kappa, last.batch_size))
            else:
                found.append(replace(found[-1], kappa_max=kappa))
        return [replace(each, lambda_max=max(each.lambda_max, last.lambda_max)) for each in found]

    def _is_limited_by_leverage(self, found: Stability) -> bool:
        return found.lambda_max * (1 - self.settings.used_momentum) <= found.kappa_max

    def _probed(self, probes: Tensor, probe_y: Tensor | None, batch_size: int) -> StepProbe:
        """On a few batches, on more of them if they are small: the worst of three single rows says little."""
        probed = min(batch_size, len(probes))
        n_batches = _n_probed(len(probes), probed)
        return StepProbe(
            self.kernel,
            self._rows(),
            probes[: n_batches * probed].split(probed),
            self._penalty(probe_y, n_batches, probed),
            self.mesh,
            self.generator,
            max(1, self.sizes.max_batch_size // probed),
        )

    def _leading(self, probed: StepProbe, stage: Stage, kappa_max: float, batch_size: int) -> Stability:
        """With the leading eigenvalue as exact as it has to be beside the leverage."""
        # With fewer rows at hand than a batch has, its leading eigenvalue is bounded by theirs in proportion.
        growth = max(1, batch_size / len(probed.batches[0]))
        ridge = batch_size * probed.penalty.ridge
        tiny = torch.finfo(torch.float32).tiny
        kappa_max = max(kappa_max, tiny)
        limit = kappa_max / (1 - self.settings.used_momentum)
        projection = stage.projection
        assert isinstance(projection, NystromProjection | ExactProjection)
        lambda_max = growth * probed.leading_eigenvalue(projection, (limit - ridge) / growth) + ridge
        return Stability(batch_size, max(lambda_max, tiny), kappa_max)

    def _head_start(self, projection: Projection, epoch_rows: int) -> HeadStart | None:
        """The leader's, on every rank; None without a y, or rows enough."""
        if not isinstance(projection, NystromProjection) or not is_worth_it(len(self.sample), epoch_rows):
            return None
        if self.sample_y is None or self.targets is None:
            return None
        assert projection.sampled is not None
        found = head_start(
            projection.sampled, projection.half, self.sample_y, self.targets, self.settings.ridge
        )
        # Which stages there are hangs on it, and devices may differ in the last bit.
        rho = self.mesh.broadcast_object(lambda: None if found is None else found.rho)
        return None if found is None or rho is None else replace(found, rho=rho)

    def _limits(self, found: Stability) -> StepLimits:
        step_size = found.step_size(self.settings.used_momentum)
        return StepLimits(found.batch_size, step_size, found.lambda_max, found.kappa_max)

    def _with_center_damping(self, stages: list[Stage], limits: list[StepLimits]) -> Settled:
        """With projections tempered to the longest step: rows that the probes did not meet shall not diverge either.

        A row of leverage kappa diverges beyond eta kappa = 2 (1 - beta), momentum repeating its own push.
        """
        longest = max(each.step_size for each in limits)
        projections = [stage.projection for stage in stages]
        if isinstance(first := projections[0], NystromProjection):
            unexplained = unexplained_diagonal(self.kernel, self._shard(), first.basis, first.eigenvalues)
            whole = self.mesh.gather_rows(unexplained, len(self.centers))
            known = float(torch.quantile(whole, _KNOWN_SHARE)) ** 2 / first.damping
            leverage = _STABLE_SHARE * 2 * (1 - self.settings.used_momentum) / longest
            tempered = first.with_center_damping(unexplained, max(leverage, known))
            projections = [
                replace(each, center_damping=tempered.center_damping, flattening=None, sampled=None)
                for each in projections
                if isinstance(each, NystromProjection)
            ]
        first_step = limits[0].step_size
        settled = tuple(
            Stage(stage.first_row, projection, each.step_size / first_step)
            for stage, projection, each in zip(stages, projections, limits, strict=True)
        )
        return Settled(settled, first_step, limits[-1])

    def stability(
        self, projection: Projection, probes: Tensor, batch_size: int, probe_y: Tensor | None = None
    ) -> Stability:
        """On a few batches, on more of them if they are small: the worst of three single rows says little."""
        probed = min(batch_size, len(probes))
        n_batches = _n_probed(len(probes), probed)
        batches = probes[: n_batches * probed].split(probed)
        shard = self._rows()
        room = torch.zeros(len(shard) * probed, device=self.mesh.device)

        def block_of(x: Tensor) -> BatchBlock:
            return BatchBlock(self.kernel, shard, self.kernel.right(x), room)

        penalty = self._penalty(probe_y, n_batches, probed)
        found = measure_stability(block_of, batches, projection, self.mesh, self.generator, penalty)
        # With fewer rows at hand than a batch has, its leading eigenvalue is bounded by theirs in proportion.
        return replace(found, batch_size=batch_size, lambda_max=found.lambda_max * batch_size / probed)

    def _penalty(self, probe_y: Tensor | None, n_batches: int, probed: int) -> Penalty:
        ridge, targets = self.settings.ridge, self.targets
        if targets is None or targets.weights is None:
            return Penalty(ridge)
        if probe_y is None or (weights := targets.row_weights(probe_y[: n_batches * probed])) is None:
            return Penalty(float(targets.ridges(ridge).max()))
        return Penalty(ridge, weights.split(probed), self._heaviest())

    def _heaviest(self) -> float:
        """The largest weight of a row."""
        targets = self.targets
        if targets is None or targets.weights is None or not targets.is_classification:
            return 1.0
        return float(targets.weights.max())

    def _shard(self) -> Tensor:
        owned = self.mesh.owned(len(self.centers))
        return self._scaled(self.centers[owned.start : owned.stop])

    def _rows(self) -> LeftPoints:
        """The shard for blocks of many columns. On CPUs not prepared as a whole: it would outlast the blocks."""
        if self.mesh.device.type != "cpu":
            return self.kernel.left(self._shard())
        owned = self.mesh.owned(len(self.centers))
        mine = self.centers[owned.start : owned.stop]
        return UnpreparedPoints(mine, lambda centers: self.kernel.left(self._scaled(centers)))

    def _scaled(self, centers: Tensor) -> Tensor:
        here = centers.to(self.mesh.device)
        return here if self.inputs is None else self.inputs.to(self.mesh.device)(here)

    def _published(self, rule: PublishedStep, epoch_rows: int) -> StepLimits:
        """The critical batch size as far as memory and rows go, or the one asked for."""
        asked = self.settings.batch_size
        batch_size = min(asked or rule.critical_batch_size, self.sizes.max_batch_size, epoch_rows)
        # A row of weight w pushes as w rows do: the rule, which knows no weights, is held to the heaviest.
        heaviest = self._heaviest()
        lambda_max, kappa_max = rule.lambda_max(batch_size) * heaviest, rule.beta * heaviest
        return StepLimits(batch_size, rule.step_size(batch_size) / heaviest, lambda_max, kappa_max)

    def _measured(
        self, projection: Projection, probes: Tensor, epoch_rows: int, probe_y: Tensor | None
    ) -> Stability:
        """At the batch size asked for, or at the one that a first measurement finds critical."""
        first = self.stability(projection, probes, self._first_batch(epoch_rows), probe_y)
        batch_size = self._best_batch(first, epoch_rows)
        if batch_size == first.batch_size:
            return first
        if batch_size < first.batch_size <= first.critical_batch_size(self.settings.used_momentum):
            # The leverage limits the step already, and a part's leading eigenvalue is at most that of the whole.
            return replace(first, batch_size=batch_size)
        return self.stability(projection, probes, batch_size, probe_y)

    def _first_batch(self, epoch_rows: int) -> int:
        """Rows of the batches to measure on first: as asked for, or a thousand."""
        asked = self.settings.batch_size
        return min(asked, epoch_rows) if asked else min(PROBE_ROWS, self._largest_batch(epoch_rows))

    def _largest_batch(self, epoch_rows: int) -> int:
        return _largest_batch(self.settings, self.sizes.max_batch_size, epoch_rows)

    def _best_batch(self, first: Stability, epoch_rows: int) -> int:
        """The batch asked for, or the best by a first measurement."""
        if self.settings.batch_size:
            return first.batch_size
        critical = first.critical_batch_size(self.settings.used_momentum)
        # A quarter of it: rows are then what limits a step's progress, with room for batches worse than the probes.
        return min(1 << int(math.log2(max(critical / 4, _MIN_AUTO_BATCH))), self._largest_batch(epoch_rows))


def n_probes(settings: SolverConfig, max_batch_size: int, epoch_rows: int) -> int:
    """How many rows the step size is measured on at most."""
    largest = settings.batch_size or _largest_batch(settings, max_batch_size, epoch_rows)
    if not settings.data_rank and not settings.batch_size and settings.projection != "eigenpro":
        largest = min(largest, PROBE_ROWS)  # The stages' batch follows from one of so many rows.
    return max(PROBES * largest, PROBE_ROWS)


def _largest_batch(settings: SolverConfig, max_batch_size: int, epoch_rows: int) -> int:
    # A short epoch, or a part of one, of few steps learns little, whatever the hardware prefers.
    short = int(epoch_rows * min(1, settings.epochs)) // 32
    return max(1, min(max_batch_size, max(short, 16), epoch_rows))


def _passed_over(falling: list[tuple[int, float]], rho: float) -> list[tuple[int, float]]:
    """Stages without those whose threshold is above rho, whose directions are known already; but the last stays."""
    if not rho:
        return falling
    left = [stage for stage in falling if stage[1] <= rho] or falling[-1:]
    return [(0, left[0][1]), *left[1:]]


def _n_probed(n_rows: int, batch_size: int) -> int:
    """How many batches of that many rows to measure on."""
    return min(max(PROBES, min(PROBE_ROWS // batch_size, _MAX_PROBES)), n_rows // batch_size)


def probes_of(rows: Tensor, n_samples: int) -> Tensor:
    """Those behind the first `n_samples`, which the preconditioner has seen, unless they are few."""
    return rows[n_samples:] if len(rows) > n_samples + _FEW_ROWS else rows
