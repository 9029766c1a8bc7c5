"""A pilot run: a small fit in memory that measures what a large one will cost on this machine.

The pilot goes through the set-up and the trainer of every fit, with the settings of the fit that is planned: its
precision, its projection, fused products where they are fused.
"""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable
from contextlib import closing
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.mesh import Mesh
from ep3stream.planning.costs import Rates, Sizes, evaluations_of_step, projection_flops
from ep3stream.solver.eigenpro import EigenProProjection
from ep3stream.solver.gpu import usual_device
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.projection import NystromProjection
from ep3stream.solver.set_up import PROBE_ROWS, PROBES
from ep3stream.store.reader import SplitReader
from ep3stream.store.scan import scan
from ep3stream.training.budget import StageTimes
from ep3stream.training.plan import ProblemSize, SizePlan
from ep3stream.training.problem import (
    input_scaling,
    problem_of_split,
    require_varied_features,
    require_varied_targets,
)
from ep3stream.training.set_up import narrowed, set_up
from ep3stream.training.set_up_rows import SetUpRows
from ep3stream.training.trainer import WATCH_STEPS, Trainer

Clock = Callable[[], float]

# Beyond these centers every cost grows in proportion to them, or as a formula says; below, it is all measured.
_MOST_CENTERS = 2048
_READERS = 2
_MOST_READ_BYTES = 96 << 20
_READ_FOR_S = 2.0
_STEP_FOR_S = 1.0
_FEW_CENTERS = 16


@dataclass(frozen=True, slots=True)
class PilotRun:
    """What was measured: sizes of the small fit, rates, and seconds of its set-up.

    segment_s: to read one segment with nothing else to do. preconditioner_s, step_size_s: the stages of the
    set-up. step_s: of a step.
    """

    sizes: Sizes
    rates: Rates
    segment_s: float
    preconditioner_s: float
    step_size_s: float
    step_s: float


def run_pilot(
    reader: SplitReader,
    shape: ProblemSize,
    config: FitConfig,
    function: KernelFunction | None,
    plan: SizePlan,
    clock: Clock = time.perf_counter,
) -> PilotRun:
    """Reads a few segments, and fits up to 2048 of their rows as centers to the other rows for about a second.

    O(p m) memory as the fit itself, for at most 2048 centers, and some seconds. Raises what the set-up of the fit
    would: ConfigError for a kernel, scaling or targets that cannot be used.
    """
    require_varied_features(reader)
    require_varied_targets(reader)
    mesh = Mesh.of_this_process(usual_device())
    n_wanted = _MOST_CENTERS + plan.nystrom_samples + max(PROBES * plan.max_batch_size, PROBE_ROWS)
    x, y, segment_s, read_bytes_per_s = _read(reader, shape, n_wanted, clock)
    n_centers = min(plan.n_centers, _MOST_CENTERS, max(1, len(x) // 2))
    memory_bytes = config.run.memory_bytes
    small = SizePlan.of(shape, config.solver, n_centers, memory_bytes)
    # The fit trains on as many rows as there are, less its centers; which ones makes no difference here.
    excluded = np.arange(n_centers)
    rows = SetUpRows.parted(
        x[:n_centers], excluded, x[n_centers:], y[n_centers:], min(small.nystrom_samples, len(x) - n_centers)
    )
    times = StageTimes(clock, logs=False)
    problem = replace(problem_of_split(reader, config, input_scaling(reader, config)), shape=shape)
    problem = narrowed(problem, config, function, mesh, times, lambda n: (x[:n], y[:n]))
    setup = set_up(problem, rows, small, config, function, mesh, memory_bytes, times).setup
    trainer = Trainer(setup, config, function, mesh)
    trainer.start()
    projection = trainer.solver.projection
    passes = projection.passes.limit if isinstance(projection, EigenProProjection) else 1
    sizes = sizes_of(shape, small, config, setup.plan.batch_size, passes=passes)
    sizes = replace(sizes, n_expanded=problem.inputs.n_inputs - shape.n_features)
    if isinstance(projection, NystromProjection):
        group_size = 0 if projection.tail is None else projection.tail.group_size
        # Smooth kernels get a higher rank than planned, and no tail.
        sizes = replace(sizes, model_rank=projection.basis.shape[1], group_size=group_size)
    step_s = _step_seconds(trainer, x, y, setup.plan.batch_size, clock)
    rates = _rates(trainer, sizes, step_s, read_bytes_per_s, x, y, clock)
    return PilotRun(
        sizes, rates, segment_s, times.elapsed_s["preconditioner"], times.elapsed_s["step size"], step_s
    )


def sizes_of(
    shape: ProblemSize, plan: SizePlan, config: FitConfig, batch_size: int, devices: int = 1, passes: int = 1
) -> Sizes:
    """The sizes in the letters of `costs`, with the rows that are left to train on."""
    is_drawn = config.solver.centers == "auto" or isinstance(config.solver.centers, int)
    left_out = plan.n_centers if is_drawn and not config.data.keep_center_rows else 0
    return Sizes(
        max(1, shape.n_left - left_out),
        shape.n_features,
        shape.n_outputs,
        plan.n_centers,
        batch_size,
        plan.data_rank,
        plan.model_rank,
        plan.nystrom_samples,
        plan.n_landmarks,
        shape.row_bytes,
        config.solver.projection,
        passes,
        devices,
        shape.n_expanded,
        plan.group_size,
        len(shape.ridge_factors),
    )


def _read(
    reader: SplitReader, shape: ProblemSize, n_rows: int, clock: Clock
) -> tuple[Tensor, Tensor, float, float]:
    """x and y of about n_rows rows of segments from all over the split; seconds a segment, and bytes a second.

    The seconds are those of one thread, which reads for the set-up; the rate is that of as many as a fit has. Takes
    about two seconds, or a few segments.
    """
    info = reader.info
    least = 1 + 2 * _READERS
    wanted = max(least, -(-n_rows // info.segment_rows))
    most = max(least, _MOST_READ_BYTES // (info.segment_rows * shape.row_bytes))
    numbers = np.unique(np.linspace(0, info.n_segments - 1, min(wanted, most)).astype(np.int64)).tolist()
    began = clock()
    parts = list(scan(reader, numbers[:1]))
    segment_s = clock() - began
    n_alone, read_began = len(parts[0][0]), time.perf_counter()
    with closing(scan(reader, numbers[1:])) as others:
        for part in others:
            parts.append(part)
            read_s = time.perf_counter() - read_began
            if read_s > _READ_FOR_S:
                break
    x, y = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    n_read = len(x) - n_alone
    rate = n_read * shape.row_bytes / read_s if n_read else n_alone * shape.row_bytes / max(segment_s, 1e-9)
    order = np.random.default_rng(0).choice(len(x), min(n_rows, len(x)), replace=False)
    return torch.from_numpy(x[order]).float(), torch.from_numpy(y[order]), segment_s, rate


def _step_seconds(trainer: Trainer, x: Tensor, y: Tensor, batch_size: int, clock: Clock) -> float:
    """Seconds of a step on so many of the rows, which are repeated where there are fewer: the median of rounds.

    A round is as many steps as a fit takes between two readings of its losses; the last of them is scored.
    """
    device = trainer.mesh.device
    n_copies = -(-batch_size // len(x))
    batch_x = x.repeat(n_copies, 1)[:batch_size].to(device)
    batch_y = y.repeat(n_copies, *[1] * (y.ndim - 1))[:batch_size].to(device)

    def one_round() -> None:
        for _ in range(WATCH_STEPS):
            # A step of length 0, lest the weights grow: it costs the same.
            trainer.step(batch_x, batch_y, step_scale=0.0)
        trainer.read_losses()

    return _median_seconds(one_round, clock) / WATCH_STEPS


def _direction_seconds(trainer: Trainer, clock: Clock) -> float:
    """Seconds of the projection alone, on a gradient of ones."""
    solver = trainer.solver
    gradient = torch.ones_like(trainer.progress.state.weights)
    penalized = gradient if solver.ridge else None

    def one_round() -> None:
        for _ in range(WATCH_STEPS):
            theta = solver.projection.direction(gradient, penalized)
        float(theta.sum())

    return _median_seconds(one_round, clock) / WATCH_STEPS


def _rates(
    trainer: Trainer,
    sizes: Sizes,
    step_s: float,
    read_bytes_per_s: float,
    x: Tensor,
    y: Tensor,
    clock: Clock,
) -> Rates:
    """The seconds of a step, shared out: the overhead of any step, the projection, and the rest to kernel values."""
    overhead_s = min(_overhead_seconds(trainer, x, y, clock), 0.5 * step_s)
    flop_s, projected_s = 0.0, 0.0
    # EigenPro's projection is made of kernel values itself.
    if sizes.projection != "eigenpro":
        projected_s = min(_direction_seconds(trainer, clock), 0.9 * (step_s - overhead_s))
        flop_s = projected_s / projection_flops(sizes)
    evaluation_s = (step_s - overhead_s - projected_s) / evaluations_of_step(sizes)
    return Rates(evaluation_s, flop_s, overhead_s, read_bytes_per_s)


class _NoProjection:
    """A projection that costs nothing."""

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        return gradient

    def direction(self, gradient: Tensor, penalized: Tensor | None = None) -> Tensor:
        return gradient

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        return theta.new_full((), torch.nan)

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        return x[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        return {}


def _overhead_seconds(trainer: Trainer, x: Tensor, y: Tensor, clock: Clock) -> float:
    """Seconds of a step with next to no centers, one row, and no projection."""
    solver, device = trainer.solver, trainer.mesh.device
    few = solver.kernel.left(trainer.inputs(x[:_FEW_CENTERS].to(device)))
    room = torch.zeros(len(few), device=device)
    small = replace(solver, centers=few, projection=_NoProjection(), block_memory=room, later=())
    state, one_x, one_y = small.initial_state(), x[:1].to(device), y[:1].to(device)

    def one_round() -> None:
        for step in range(WATCH_STEPS):
            errors = small.step(state, trainer.inputs(one_x), one_y, 0.0, step == WATCH_STEPS - 1)
        float(errors.loss)

    return _median_seconds(one_round, clock) / WATCH_STEPS


def _median_seconds(work: Callable[[], None], clock: Clock) -> float:
    """Seconds of a call, after a first one: the median of as many as take a second, at least three."""
    work()
    took: list[float] = []
    while len(took) < 3 or sum(took) < _STEP_FOR_S:
        began = clock()
        work()
        took.append(clock() - began)
    return statistics.median(took)
