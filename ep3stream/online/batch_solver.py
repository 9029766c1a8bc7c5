"""A solver for batches of any size, set up from the first rows it is shown, and watched by the guard."""

from __future__ import annotations

import logging
import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, replace
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import KernelConfig, SolverConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.guard import Guard, RunningLoss, RunningScore
from ep3stream.solver.kernels import CallableKernel, Kernel, KernelFunction
from ep3stream.solver.named_kernels import measured_kernel
from ep3stream.solver.set_up import PROBE_ROWS, Settled, SolverBuilder, probes_of
from ep3stream.solver.step import Solver, SolverState, StepErrors
from ep3stream.solver.step_size import PublishedStep
from ep3stream.solver.targets import TargetCode
from ep3stream.training.plan import Plan, Shape

logger = logging.getLogger(__name__)

# As in `fit`: on a GPU each reading of the losses waits for it.
_WATCH_STEPS = 8

_LEAST_MEASURED_ROWS = 16

_GUARD_NUMBERS = ("step_size", "good_averaged", "good_step", "due_step", "n_cuts")


@dataclass(frozen=True, slots=True)
class BatchSolverSpec:
    """What is fixed before any row is seen.

    centers: (p, d); sample: X_s, (s, d), given, or None to take the first `settings.nystrom_samples` rows.
    """

    centers: Tensor
    kernel: KernelConfig | KernelFunction
    settings: SolverConfig
    sample: Tensor | None
    memory_bytes: int
    seed: int

    @property
    def n_held(self) -> int:
        """Rows that the set-up asks for: to probe the step size, and for the sample unless it is given."""
        return PROBE_ROWS + (self.settings.nystrom_samples if self.sample is None else 0)

    def generator(self, purpose: int) -> torch.Generator:
        """A function of the seed and the purpose, so that nothing depends on what was drawn before."""
        return torch.Generator().manual_seed((self.seed * 8192 + purpose) % 2**64)

    def kernel_for(self, sample: Tensor) -> Kernel:
        """Its bandwidth measured on the sample if it is `median`, its centre the mean of the centers."""
        if isinstance(self.kernel, KernelConfig):
            return measured_kernel(self.kernel, sample, self.centers.double().mean(0).to(sample))
        return CallableKernel.checked(self.kernel, sample)


@dataclass(frozen=True, slots=True)
class SetupRows:
    """What a set-up is a function of, beside the spec: enough to do it again, with the same bits.

    x: (n, d), the rows held or drawn for it, and their y, which only weights of classes ask for; targets: their code;
    shape: of the problem, as far as it is known.
    """

    x: Tensor
    y: Tensor
    targets: TargetCode
    shape: Shape


@dataclass(slots=True)
class BatchSolver:
    """Steps on batches of any size; a batch above the safe size is split into equal parts.

    step_sizes: by power of two, each measured on `probes` when a batch of that size first comes; probe_y: their y,
    where it counts.
    scored: the running loss of the average.
    rows_seen: how many were trained on; loss_sum, loss_rows: of the batches read since `mean_loss` was last asked for.
    """

    rows: SetupRows
    builder: SolverBuilder
    solver: Solver
    settled: Settled
    probes: Tensor
    probe_y: Tensor | None
    next_eigenvalue: float
    window_segments: int
    spec: BatchSolverSpec
    state: SolverState
    guard: Guard
    step: int = 0
    rows_seen: int = 0
    step_sizes: dict[int, float] = field(default_factory=dict)
    running_score: RunningScore = field(default_factory=RunningScore)
    unread: list[tuple[StepErrors, int]] = field(default_factory=list)
    loss_sum: float = 0.0
    loss_rows: int = 0

    @classmethod
    def of(cls, spec: BatchSolverSpec, rows: SetupRows) -> BatchSolver:
        """The set-up; ConfigError where the model does not fit the memory or the kernel is not usable."""
        given = spec.sample
        sample = rows.x[: spec.settings.nystrom_samples] if given is None else given
        settings = replace(spec.settings, nystrom_samples=len(sample))
        plan = Plan.of(rows.shape, settings, len(spec.centers), spec.memory_bytes)
        mesh = Mesh(0, 1, spec.centers.device)
        kernel = spec.kernel_for(sample)
        builder = SolverBuilder(
            kernel, spec.centers, sample, plan, settings, mesh, spec.generator(0), rows.targets
        )
        projection, spectra = builder.projection()
        probes, probe_y = _probes(rows, sample, given)
        settled = builder.settled(projection, spectra, probes, rows.shape.n_rows, probe_y)
        batch_size, step_size = settled.batch_size, settled.step_size
        logger.info("set-up: batches of up to %d rows, step size %.3g", batch_size, step_size)
        solver = Solver(
            kernel=kernel,
            centers=kernel.left(spec.centers),
            projection=settled.projection,
            targets=rows.targets,
            momentum=settings.used_momentum,
            averaging=settings.used_averaging,
            mesh=mesh,
            block_memory=torch.zeros(len(spec.centers) * batch_size, device=mesh.device),
            ridge=settings.ridge,
            later=settled.stages[1:],
        )
        state = solver.initial_state()
        guard = Guard.start(state, step_size)
        return cls(
            rows,
            builder,
            solver,
            settled,
            probes,
            probe_y,
            spectra.data[-1],
            plan.window_segments,
            spec,
            state,
            guard,
        )

    def train(self, x: Tensor, y: Tensor) -> None:
        """One step, or one on each part; DivergedError once the guard gives up, the last good weights in place."""
        n_parts = -(-len(x) // self.settled.batch_size)
        for part, targets in zip(x.tensor_split(n_parts), y.tensor_split(n_parts), strict=True):
            # The guard cuts the step size of the largest batch; the others keep their ratio to it.
            step_size = self.guard.step_size * self.step_size(len(part)) / self.settled.step_size
            is_scored = (self.step + 1) % _WATCH_STEPS == 0
            errors = self.solver.step(
                self.state, part, targets, step_size, is_scored, rows_seen=self.rows_seen
            )
            self.unread.append((errors, len(part)))
            self.step += 1
            self.rows_seen += len(part)
            if len(self.unread) >= _WATCH_STEPS:
                self.watch()

    def step_size(self, n_rows: int) -> float:
        """The first stage's for a batch of this size: of the next power of two, whose batches have it as a part.

        The leading eigenvalue of a part is at most that of the whole, so that the step of the whole is safe.
        """
        size = max(_LEAST_MEASURED_ROWS, 1 << (n_rows - 1).bit_length())
        if size >= self.settled.batch_size:
            return self.settled.step_size
        if size not in self.step_sizes:
            self.step_sizes[size] = self._step_size_at(size)
        return self.step_sizes[size]

    def _step_size_at(self, size: int) -> float:
        settings = self.builder.settings
        if settings.used_step == "published":
            rule = PublishedStep.of(self.builder.kernel, self.builder.sample, self.next_eigenvalue)
            return rule.step_size(size)
        limits, last = self.settled.limits, self.settled.stages[-1].projection
        if limits.step_size * limits.lambda_max < 1:
            return self.settled.step_size  # The leverage limits it, which is the same for every size.
        builder = replace(self.builder, generator=self.spec.generator(size))
        found = builder.stability(last, self.probes, size, self.probe_y).step_size(settings.used_momentum)
        # What is safe for the largest batch is so for its parts, which the probes may by chance show as worse.
        # Earlier stages gain no less: the leverage limits the last one most.
        return max(found / limits.step_size, 1.0) * self.settled.step_size

    def watch(self) -> None:
        """Shows the guard the losses of the steps since the last time."""
        if not self.unread:
            return
        columns = zip(*(errors[:3] for errors, _ in self.unread), strict=True)
        losses, averages, zeros = (torch.stack(column).tolist() for column in columns)
        sizes = [n_rows for _, n_rows in self.unread]
        self.unread.clear()
        self.loss_sum += sum(loss * size for loss, size in zip(losses, sizes, strict=True))
        self.loss_rows += sum(sizes)
        for average, zero in zip(averages, zeros, strict=True):
            self.running_score = self.running_score.after(average, zero)
        if self.guard.watch(self.step, losses, self.state):
            good, size = self.guard.good_step, self.guard.step_size
            logger.warning("the loss blew up; back to step %d's weights, step size %.3g", good, size)

    def mean_loss(self) -> float:
        """Over the rows trained on since it was last asked for, each before its step; nan for none."""
        self.watch()
        mean = self.loss_sum / self.loss_rows if self.loss_rows else math.nan
        self.loss_sum, self.loss_rows = 0.0, 0
        return mean

    def state_dict(self) -> dict[str, Any]:
        """Tensors and numbers from which `load` goes on with the same bits. The tensors are copies."""
        self.watch()
        guard, rows = self.guard, self.rows
        tensors = {"rows": rows.x, "target_offset": rows.targets.offset, "target_scale": rows.targets.scale}
        if rows.targets.weights is not None:
            tensors |= {"row_targets": rows.y, "target_weights": rows.targets.weights}
        tensors |= self.state.tensors() | guard.tensors()
        numbers = {name: getattr(guard, name) for name in _GUARD_NUMBERS}
        return {
            **{name: tensor.clone() for name, tensor in tensors.items()},
            "shape": asdict(rows.shape),
            "step": self.step,
            "rows_seen": self.rows_seen,
            "averaged": self.state.averaged,
            "scored": asdict(self.running_score),
            "guard": {**numbers, "loss": asdict(guard.loss), "good_loss": asdict(guard.good_loss)},
        }

    @classmethod
    def load(cls, spec: BatchSolverSpec, is_classification: bool, saved: Mapping[str, Any]) -> BatchSolver:
        """Does the set-up again from the rows in `saved`, and takes over the rest."""
        device = spec.centers.device
        tensors = {name: value.to(device) for name, value in saved.items() if isinstance(value, Tensor)}
        weights = tensors.get("target_weights")
        targets = TargetCode(is_classification, tensors["target_offset"], tensors["target_scale"], weights)
        y = tensors.get("row_targets", tensors["rows"].new_empty(0))
        solver = cls.of(spec, SetupRows(tensors["rows"], y, targets, Shape(**saved["shape"])))
        state, guard = solver.state, saved["guard"]
        for name, tensor in (state.tensors() | solver.guard.tensors()).items():
            tensor.copy_(tensors[name])
        state.averaged, solver.step = saved["averaged"], saved["step"]
        solver.rows_seen = saved["rows_seen"]
        solver.running_score = RunningScore(**saved.get("scored", {}))  # The first versions did not keep it.
        for name in _GUARD_NUMBERS:
            setattr(solver.guard, name, guard[name])
        solver.guard.loss = RunningLoss(**guard["loss"])
        solver.guard.good_loss = RunningLoss(**guard["good_loss"])
        return solver


def _probes(rows: SetupRows, sample: Tensor, given: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """The rows to measure a step on, and their y where weights of classes ask for it."""
    if rows.targets.weights is None or not rows.targets.is_classification:
        return probes_of(rows.x if given is None else torch.cat([given, rows.x]), len(sample)), None
    if given is not None:
        return rows.x, rows.y
    return probes_of(rows.x, len(sample)), probes_of(rows.y, len(sample))
