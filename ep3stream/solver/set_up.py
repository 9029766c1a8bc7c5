"""A solver's set-up: from centers and sampled rows to a projection, a step size, stages and center damping.

`SolverBuilder.projection` builds the projection that the settings name. `SolverBuilder.settled` settles all the rest:

1. the batch size and the step size, measured on probes or by the published rule (`step_size.py`);
2. the stages, whose thresholds fall as rows are seen (`spectrum.Flattening`), each with a step size of its own;
3. the weights to start from (`least_squares.HeadStart`);
4. the damping of centers that the basis does not explain (`NystromProjection.with_center_damping`).
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Protocol

import torch
from torch import Tensor

from ep3stream.config import SolverConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.eigenpro import build_eigenpro
from ep3stream.solver.exact import ExactProjection, build_exact
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.kernels import Kernel, RadialKernel
from ep3stream.solver.least_squares import HeadStart, head_start, is_worth_it
from ep3stream.solver.linear_part import LinearPart
from ep3stream.solver.points import LeftPoints, UnpreparedPoints
from ep3stream.solver.projection import (
    NystromProjection,
    Projection,
    Spectra,
    build_nystrom,
    unexplained_diagonal,
)
from ep3stream.solver.step import Stage
from ep3stream.solver.step_size import (
    Penalty,
    PublishedStep,
    Stability,
    StepProbe,
    limiting_leverage,
    measure_stability,
)
from ep3stream.solver.tail import Grouping
from ep3stream.solver.targets import TargetCode
from ep3stream.solver.tiles import tile_rows, tiles

# A step size is measured on PROBES batches. The worst of three small batches says little, so there are more of them,
# until they have PROBE_ROWS rows in all, but at most _MAX_PROBES.
PROBES = 2
PROBE_ROWS = 1024
_MAX_PROBES = 64

# Fewer rows than this besides the sample are too few to measure on.
_FEW_ROWS = 256

# Stages are planned for so many epochs, whatever the settings ask for: more or fewer may be asked for on the way.
_STAGED_EPOCHS = 4
# With smaller batches a step costs more than its kernel values; the blocks of kernels on columns cost less.
MIN_BATCH, MIN_COLUMNS_BATCH = 512, 1024

# What a step does once for all its rows, with the basis and the tail, takes as long as the kernel values of so many
# rows, for each number that these have of a center, over 10 + d: on 2 cores 900 rows with 756 numbers and d = 9. A
# batch grows until that is a third of a step, if the fit keeps so many steps: in few steps a row of a larger batch
# brings less.
_ROWS_A_NUMBER, _MANY_STEPS, _MOST_GROWN = 23.0, 1000, 4096

# Of the leverage at which a row diverges. Just below that leverage the row's error alternates and dies away slowly.
_STABLE_SHARE = 0.75

# Centers that U explains less well than this share of all centers are rare; the probes have met rows near the others.
_KNOWN_SHARE = 0.98


class PreconditionerSizes(Protocol):
    """Sizes that are decided before a set-up: ranks, landmarks and the largest batch."""

    @property
    def model_rank(self) -> int:
        """r, the rank of the model preconditioner."""
        ...

    @property
    def widest_rank(self) -> int:
        """The rank to which r may be raised where that helps much."""
        ...

    @property
    def data_rank(self) -> int:
        """q, the number of eigenvalues of the data to flatten."""
        ...

    @property
    def n_landmarks(self) -> int:
        """r', the number of centers that the basis is built from."""
        ...

    @property
    def max_batch_size(self) -> int:
        """The largest m whose kernel block fits the memory."""
        ...

    @property
    def group_size(self) -> int:
        """The centers of a group of the local tail, neighbours in the centers' order; 0 for no tail."""
        ...


@dataclass(frozen=True, slots=True)
class StepLimits:
    """Batch size and step size, with the largest eigenvalue and leverage they rest on, measured or assumed."""

    batch_size: int
    step_size: float
    lambda_max: float
    kappa_max: float


@dataclass(frozen=True, slots=True)
class Settled:
    """What a set-up has settled: the stages, the step size of the first stage, and the weights to start from.

    limits: those of the last stage. start: None for a start at zero.
    """

    stages: tuple[Stage, ...]
    step_size: float
    limits: StepLimits
    start: HeadStart | None = None

    @property
    def batch_size(self) -> int:
        """m, the same in all stages."""
        return self.limits.batch_size

    @property
    def projection(self) -> Projection:
        """The projection of the first stage."""
        return self.stages[0].projection


@dataclass(frozen=True, slots=True)
class SolverBuilder:
    """What a set-up starts from. Methods change nothing of it, except that they draw from `generator`.

    centers: all, (p, d), in host memory or on the device; `exact` brings all of them to the device, the others a shard.
    inputs: scales the centers where they are needed, on the device, so that no scaled copy of all is kept; None where
    they are scaled.
    sample: X_s, (s, d), scaled, whole on every device; sample_y: its targets, for a head start, or None.
    linear: what the model has beside the kernel, if anything.
    targets: for weights of rows and for a head start, or None. ridge_factors: multiples of the ridge that are fitted.
    """

    kernel: Kernel
    centers: Tensor
    sample: Tensor
    sizes: PreconditionerSizes
    settings: SolverConfig
    mesh: Mesh
    generator: torch.Generator
    targets: TargetCode | None = None
    inputs: InputScaling | None = None
    sample_y: Tensor | None = None
    linear: LinearPart | None = None
    ridge_factors: tuple[float, ...] = (1.0,)

    def projection(self) -> tuple[Projection, Spectra]:
        """The projection that the settings name, for this rank's shard of the centers, and the spectra it rests on."""
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
        # At random: centers that a user gives may be sorted, and the first ones say little about the others.
        drawn = torch.randperm(n_centers, generator=self.generator)[: sizes.n_landmarks]
        return build_nystrom(
            kernel,
            self._unprepared_shard().whole(),
            self._diagonal(),
            self._scaled(self.centers[drawn.to(self.centers.device)]),
            self.sample,
            n_centers,
            sizes.model_rank,
            sizes.data_rank,
            self.mesh,
            self.generator,
            sizes.widest_rank,
            Grouping(sizes.group_size, n_centers, self._some_centers) if sizes.group_size else None,
        )

    def settled(
        self,
        projection: Projection,
        spectra: Spectra,
        probes: Tensor,
        epoch_rows: int,
        probe_y: Tensor | None = None,
    ) -> Settled:
        """Stages, batch size and step size, by the rule that the settings name.

        probes: (n, d), scaled rows to measure on; probe_y: their targets, needed only for weights of classes.
        epoch_rows: the number of rows to train on. The batch size is the one of the settings, or the best one found.
        """
        if self.settings.used_step == "published":
            rule = PublishedStep.of(self.kernel, self.sample, spectra.data[-1])
            return self._with_center_damping([Stage(0, projection)], [self._published(rule, epoch_rows)])
        start = self._head_start(projection, epoch_rows)
        if self.settings.data_rank or not isinstance(projection, NystromProjection | ExactProjection):
            stages = [Stage(0, projection)]
            found = [self._measured(projection, probes, epoch_rows, probe_y)]
        else:
            rho = 0.0 if start is None else start.rho
            stages, found = self._staged(projection, probes, epoch_rows, probe_y, rho)
        momentum = self.settings.used_momentum
        limits = [
            StepLimits(each.batch_size, each.step_size(momentum), each.lambda_max, each.kappa_max)
            for each in found
        ]
        return replace(self._with_center_damping(stages, limits), start=start)

    def _published(self, rule: PublishedStep, epoch_rows: int) -> StepLimits:
        """The published step size for the batch size asked for, or the critical one, as memory and rows allow."""
        asked = self.settings.batch_size
        batch_size = min(asked or rule.critical_batch_size, self.sizes.max_batch_size, epoch_rows)
        # The rule knows no weights. A row of weight w pushes like w rows, so the step is safe for the heaviest.
        heaviest = self._heaviest()
        lambda_max, kappa_max = rule.lambda_max(batch_size) * heaviest, rule.beta * heaviest
        return StepLimits(batch_size, rule.step_size(batch_size) / heaviest, lambda_max, kappa_max)

    def _measured(
        self, projection: Projection, probes: Tensor, epoch_rows: int, probe_y: Tensor | None
    ) -> Stability:
        """Measured at the batch size asked for, or at the best one by a first measurement."""
        first = self.stability(projection, probes, self._first_batch(epoch_rows), probe_y)
        batch_size = self._best_batch(first, epoch_rows)
        if batch_size == first.batch_size:
            return first
        return self.stability(projection, probes, batch_size, probe_y)

    def stability(
        self, projection: Projection, probes: Tensor, batch_size: int, probe_y: Tensor | None = None
    ) -> Stability:
        """The largest eigenvalue and leverage of a projection, measured on batches of the probes.

        Where there are fewer probes than a batch has rows, the eigenvalue is scaled up in proportion, which bounds it.
        """
        batches = _batches(probes, batch_size)
        shard, n_rows = self._left_shard(), len(batches[0])
        room = torch.zeros(len(shard) * n_rows, device=self.mesh.device)

        def block_of(x: Tensor) -> BatchBlock:
            return BatchBlock(self.kernel, shard, self.kernel.right(x), room)

        penalty = self._penalty(probe_y, batches)
        found = measure_stability(block_of, batches, projection, self.mesh, self.generator, penalty)
        return replace(found, batch_size=batch_size, lambda_max=found.lambda_max * batch_size / n_rows)

    def _first_batch(self, epoch_rows: int) -> int:
        """The batch size to measure first: the one asked for, or the least as far as memory and rows go."""
        if self.settings.batch_size:
            return min(self.settings.batch_size, epoch_rows)
        largest = _largest_batch(self.settings, self.sizes.max_batch_size, epoch_rows)
        return min(self._least_batch, largest)

    @property
    def _least_batch(self) -> int:
        return MIN_COLUMNS_BATCH if isinstance(self.kernel, ColumnKernel) else MIN_BATCH

    def _best_batch(self, first: Stability, epoch_rows: int) -> int:
        """The batch size asked for, or else a power of two near a quarter of the critical one, at least 512.

        With kernels on columns at least 1024. At a quarter of it rows, not steps, limit the progress, with room for
        batches that are worse than the probes. In a fit of many steps with a cheap kernel the batch is larger, up to
        twice the critical one: a row then costs less, and brings as much.
        """
        if self.settings.batch_size:
            return first.batch_size
        critical = first.critical_batch_size(self.settings.used_momentum)
        largest = _largest_batch(self.settings, self.sizes.max_batch_size, epoch_rows)
        best = min(1 << int(math.log2(max(critical / 4, self._least_batch))), largest)
        most = min(2 * critical, largest, _most_grown(self.settings, epoch_rows))
        while best < 2 * self._rows_of_the_rest and 2 * best <= most:
            best *= 2
        return best

    @property
    def _rows_of_the_rest(self) -> float:
        """How many rows have kernel values that take as long as the rest of a step; 0 where that is not known."""
        if not isinstance(self.kernel, RadialKernel) or self.settings.projection != "nystrom":
            return 0.0
        numbers = 2 * self.sizes.model_rank + self.sizes.group_size
        return _ROWS_A_NUMBER * numbers / (10 + self.kernel.centre.numel())

    def _penalty(self, probe_y: Tensor | None, batches: tuple[Tensor, ...]) -> Penalty:
        """The ridge and the weights of the rows in `batches`, the first of the probes."""
        ridge, targets = self.settings.used_ridge * max(self.ridge_factors), self.targets
        if targets is None or targets.weights is None:
            return Penalty(ridge)
        n_rows = sum(map(len, batches))
        if probe_y is None or (weights := targets.row_weights(probe_y[:n_rows])) is None:
            return Penalty(float(targets.ridges(ridge).max()))
        return Penalty(ridge, weights.split(len(batches[0])), self._heaviest())

    def _heaviest(self) -> float:
        """The largest weight that a row can have."""
        targets = self.targets
        if targets is None or targets.weights is None or not targets.is_classification:
            return 1.0
        return float(targets.weights.max())

    def _staged(
        self,
        projection: NystromProjection | ExactProjection,
        probes: Tensor,
        epoch_rows: int,
        probe_y: Tensor | None,
        rho: float,
    ) -> tuple[list[Stage], list[Stability]]:
        """The stages with falling thresholds, and the stability of each; the batch size is the best of the last.

        rho: the ridge of the head start, which knows all directions with an eigenvalue above rho, or 0. Stages with
        a threshold above rho are left out, except the last one.
        """
        flattening = projection.flattening
        assert flattening is not None
        batch_size = self._first_batch(epoch_rows)
        shard = self._left_shard()
        probe = self._step_probe(shard, probes, probe_y, batch_size)
        profile = probe.leverage_profile(projection)
        falling = flattening.falling(profile, epoch_rows * _STAGED_EPOCHS)
        if rho:
            left = [each for each in falling if each[1] <= rho] or falling[-1:]
            falling = [(0, left[0][1]), *left[1:]]
        stages = [Stage(first_row, projection.flattened(threshold)) for first_row, threshold in falling]
        kappas = [
            limiting_leverage(profile.at(flattening.eigenvalue_scale(t))) * self._heaviest()
            for _, t in falling
        ]
        last = self._stage_stability(probe, stages[-1], kappas[-1], batch_size)
        best = self._best_batch(last, epoch_rows)
        if best > max(batch_size, last.critical_batch_size(self.settings.used_momentum)):
            probe = self._step_probe(shard, probes, probe_y, best)
            last = self._stage_stability(probe, stages[-1], kappas[-1], best)
        elif best > batch_size:
            # The leverage limits the step already, and the leading eigenvalue grows at most as the number of rows.
            last = replace(last, batch_size=best, lambda_max=last.lambda_max * best / batch_size)
        return stages, [*self._earlier_stabilities(probe, stages[:-1], kappas[:-1], last), last]

    def _step_probe(
        self, shard: LeftPoints, probes: Tensor, probe_y: Tensor | None, batch_size: int
    ) -> StepProbe:
        batches = _batches(probes, batch_size)
        n_kept = max(1, self.sizes.max_batch_size // len(batches[0]))
        penalty = self._penalty(probe_y, batches)
        return StepProbe(self.kernel, shard, batches, penalty, self.mesh, self.generator, n_kept)

    def _stage_stability(
        self, probe: StepProbe, stage: Stage, kappa_max: float, batch_size: int
    ) -> Stability:
        """The stability of a stage with a known leverage; lambda_max is an upper bound where the leverage decides."""
        projection = stage.projection
        assert isinstance(projection, NystromProjection | ExactProjection)
        # With fewer probes than a batch has rows, the eigenvalue is scaled up in proportion, which bounds it.
        growth = max(1, batch_size / len(probe.batches[0]))
        ridge = batch_size * probe.penalty.ridge
        tiny = torch.finfo(torch.float32).tiny
        kappa_max = max(kappa_max, tiny)
        limit = kappa_max / (1 - self.settings.used_momentum)
        lambda_max = growth * probe.leading_eigenvalue(projection, (limit - ridge) / growth) + ridge
        return Stability(batch_size, max(lambda_max, tiny), kappa_max)

    def _earlier_stabilities(
        self, probe: StepProbe, stages: list[Stage], kappas: list[float], last: Stability
    ) -> list[Stability]:
        """The stability of every stage before the last one, whose stability is known.

        As the thresholds fall, so does Q (in the order of semidefinite matrices). The leading eigenvalue of a stage
        therefore bounds that of the next stage from above. Where this bound does not limit the step more than the
        leverage does, it is taken and nothing is measured. The leading eigenvalue of the last stage bounds all others
        from below; a measured value, which may be too small, is raised to it.
        """
        found: list[Stability] = []
        for stage, kappa in zip(stages, kappas, strict=True):
            bound = replace(found[-1], kappa_max=kappa) if found else None
            if bound is not None and bound.lambda_max * (1 - self.settings.used_momentum) <= kappa:
                found.append(bound)
            else:
                found.append(self._stage_stability(probe, stage, kappa, last.batch_size))
        return [replace(each, lambda_max=max(each.lambda_max, last.lambda_max)) for each in found]

    def _head_start(self, projection: Projection, epoch_rows: int) -> HeadStart | None:
        """The weights to start from; None where zero is as good, or the sample has no targets or too many rows."""
        if not isinstance(projection, NystromProjection) or not is_worth_it(len(self.sample), epoch_rows):
            return None
        if self.sample_y is None or self.targets is None:
            return None
        assert projection.sample_features is not None
        told = None if self.linear is None else self.linear(self.sample).T
        found = head_start(
            projection.sample_features,
            projection.half,
            self.sample_y,
            self.targets,
            self.settings.used_ridge,
            told,
        )
        # The leader's rho on every rank: it decides the stages, and devices may differ in the last bit.
        rho = self.mesh.broadcast_object(lambda: None if found is None else found.rho)
        return None if found is None or rho is None else replace(found, rho=rho)

    def _with_center_damping(self, stages: list[Stage], limits: list[StepLimits]) -> Settled:
        """The stages with damped centers, so that rows that the probes did not meet do not diverge either.

        A row of leverage kappa diverges where eta kappa > 2 (1 - beta), since momentum repeats its push on itself. The
        leverage through one center is damped to _STABLE_SHARE of this, for the longest step of all stages, but not
        below the leverage at the least explained of the centers that are not rare.
        """
        longest = max(each.step_size for each in limits)
        projections = [stage.projection for stage in stages]
        if isinstance(first := projections[0], NystromProjection) and first.tail is not None:
            # The tail has its own damping.
            projections = [
                replace(each, flattening=None, sample_features=None)
                for each in projections
                if isinstance(each, NystromProjection)
            ]
        elif isinstance(first, NystromProjection):
            unexplained = unexplained_diagonal(self._diagonal(), first.basis, first.eigenvalues)
            whole = self.mesh.all_gather_rows(unexplained, len(self.centers))
            known = float(torch.quantile(whole, _KNOWN_SHARE)) ** 2 / first.damping
            leverage = _STABLE_SHARE * 2 * (1 - self.settings.used_momentum) / longest
            damped = first.with_center_damping(unexplained, max(leverage, known))
            projections = [
                replace(each, center_damping=damped.center_damping, flattening=None, sample_features=None)
                for each in projections
                if isinstance(each, NystromProjection)
            ]
        first_step = limits[0].step_size
        settled = tuple(
            Stage(stage.first_row, projection, each.step_size / first_step)
            for stage, projection, each in zip(stages, projections, limits, strict=True)
        )
        return Settled(settled, first_step, limits[-1])

    def _some_centers(self, numbers: range) -> Tensor:
        """Centers by number, scaled, (n, d), on the device."""
        return self._scaled(self.centers[numbers.start : numbers.stop])

    def _shard(self) -> Tensor:
        """This rank's centers, scaled, (p_shard, d), on the device."""
        owned = self.mesh.shard_range(len(self.centers))
        return self._scaled(self.centers[owned.start : owned.stop])

    def _diagonal(self) -> Tensor:
        """K(z, z) of this rank's centers, (p_shard,)."""
        mine = self._unprepared_shard().points
        some = tiles(len(mine), tile_rows(self.mesh.device, mine.shape[1]))
        return torch.cat([self.kernel.diagonal(self._scaled(mine[rows])) for rows in some])

    def _left_shard(self) -> LeftPoints:
        """This rank's centers for the left side of blocks; on CPUs prepared by tiles, to save memory."""
        shard = self._unprepared_shard()
        return shard if self.mesh.device.type == "cpu" else shard.whole()

    def _unprepared_shard(self) -> UnpreparedPoints:
        owned = self.mesh.shard_range(len(self.centers))
        mine = self.centers[owned.start : owned.stop]
        return UnpreparedPoints(mine, lambda centers: self.kernel.left(self._scaled(centers)))

    def _scaled(self, centers: Tensor) -> Tensor:
        here = centers.to(self.mesh.device)
        return here if self.inputs is None else self.inputs(here)


def probes_of(rows: Tensor, n_samples: int) -> Tensor:
    """The rows after the first `n_samples`, which the preconditioner has seen; all rows where too few are left."""
    return rows[n_samples:] if len(rows) > n_samples + _FEW_ROWS else rows


def n_probes(settings: SolverConfig, max_batch_size: int, epoch_rows: int) -> int:
    """The largest number of rows that the step size is measured on."""
    largest = settings.batch_size or _largest_batch(settings, max_batch_size, epoch_rows)
    if not settings.data_rank and not settings.batch_size and settings.projection != "eigenpro":
        # The batch size of stages follows from batches of so many rows.
        largest = min(largest, max(PROBE_ROWS, _most_grown(settings, epoch_rows)))
    return max(PROBES * largest, PROBE_ROWS)


def _batches(probes: Tensor, batch_size: int) -> tuple[Tensor, ...]:
    """The batches to measure on, each (m, d), m at most the number of probes."""
    n_rows = min(batch_size, len(probes))
    n_batches = min(max(PROBES, min(PROBE_ROWS // n_rows, _MAX_PROBES)), len(probes) // n_rows)
    return tuple(probes[: n_batches * n_rows].split(n_rows))


def _most_grown(settings: SolverConfig, epoch_rows: int) -> int:
    """The largest power of two that leaves an epoch, or a part of one, many steps."""
    rows = int(epoch_rows * min(1, settings.used_epochs)) // _MANY_STEPS
    return min(1 << max(0, rows.bit_length() - 1), _MOST_GROWN)


def _largest_batch(settings: SolverConfig, max_batch_size: int, epoch_rows: int) -> int:
    """The largest batch size that memory allows and that leaves an epoch, or a part of one, 32 steps if it can."""
    # A fit of few steps learns little, however much the hardware prefers large batches.
    short = int(epoch_rows * min(1, settings.used_epochs)) // 32
    return max(1, min(max_batch_size, max(short, 16), epoch_rows))
