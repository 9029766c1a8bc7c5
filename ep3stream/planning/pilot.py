"""A small fit in memory, to measure what a large one will cost on this machine: rates, batch size, set-up."""

from __future__ import annotations

import statistics
import time
from collections.abc import Callable, Iterator
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.mesh import Mesh
from ep3stream.planning.costs import Rates, Sizes, evaluations_of_step, projection_flops
from ep3stream.solver.eigenpro import EigenProProjection
from ep3stream.solver.kernels import Kernel, KernelFunction
from ep3stream.solver.projection import NystromProjection, Projection
from ep3stream.solver.set_up import PROBE_ROWS, PROBES, Settled, SolverBuilder, probes_of
from ep3stream.solver.step import Solver
from ep3stream.store.reader import SplitReader
from ep3stream.training.plan import Plan, Shape
from ep3stream.training.set_up import chosen_kernel, input_scaling, target_code, with_weights

Clock = Callable[[], float]

# Beyond these centers every cost grows in proportion to them, or as a formula says; below, it is all measured.
_MOST_CENTERS = 2048

_READERS = 2

_MOST_READ_BYTES = 96 << 20

_READ_FOR_S = 2.0

_STEP_FOR_S = 1.0

_ROUND_STEPS = 8  # Of a fit's steps one of so many scores the averaged model as well.

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
    shape: Shape,
    config: FitConfig,
    function: KernelFunction | None,
    plan: Plan,
    clock: Clock = time.perf_counter,
) -> PilotRun:
    """Reads a few segments, and fits up to 2048 of their rows as centers to the others for about a second.

    O(p m) memory as the fit itself, for at most 2048 centers, and some seconds. Raises what the set-up of the fit
    would: ConfigError for a kernel, scaling or targets that cannot be used.
    """
    device = torch.device("cuda" if torch.cuda.is_available() else "cpu")
    mesh = Mesh.of_this_process(device)
    wanted = _MOST_CENTERS + plan.nystrom_samples + max(PROBES * plan.max_batch_size, PROBE_ROWS)
    x, y, segment_s, read_bytes_per_s = _read(reader, shape, wanted, clock)
    n_centers = min(plan.n_centers, _MOST_CENTERS, max(1, len(x) // 2))
    small = Plan.of(shape, config.solver, n_centers, config.run.memory_bytes)
    inputs = input_scaling(reader, config).to(device)
    targets = with_weights(target_code(reader), reader, config.solver).to(device)
    rows = inputs(x.to(device))
    centers, others = rows[:n_centers], rows[n_centers:]
    sample = others[: small.nystrom_samples]
    kernel = chosen_kernel(reader, config, function, sample, inputs)
    generator = torch.Generator().manual_seed(config.run.seed % 2**64)
    builder = SolverBuilder(kernel, centers, sample, small, config.solver, mesh, generator, targets)
    with _seconds(clock) as preconditioner_s:
        projection, spectra = builder.projection()
    with _seconds(clock) as step_size_s:
        probes, probe_y = (probes_of(each, len(sample)) for each in (others, y[n_centers:].to(device)))
        settled = builder.settled(projection, spectra, probes, shape.n_rows - n_centers, probe_y)
    passes = _passes(settled.projection)
    sizes = sizes_of(shape, small, config, settled.batch_size, passes=passes)
    if isinstance(projection, NystromProjection):
        sizes = replace(sizes, model_rank=projection.basis.shape[1])  # Smooth kernels get more than planned.
    stepping = _Stepping(config, kernel, centers, settled, targets, mesh, x, y, inputs, clock)
    step_s = stepping.seconds(n_centers, settled.projection)
    rates = _rates(stepping, sizes, step_s, read_bytes_per_s)
    return PilotRun(sizes, rates, segment_s, preconditioner_s(), step_size_s(), step_s)


def sizes_of(
    shape: Shape, plan: Plan, config: FitConfig, batch_size: int, devices: int = 1, passes: int = 1
) -> Sizes:
    """In the letters of `costs`, with the rows that are left to train on."""
    is_drawn = config.solver.centers == "auto" or isinstance(config.solver.centers, int)
    left_out = plan.n_centers if is_drawn and not config.data.keep_center_rows else 0
    return Sizes(
        max(1, shape.n_rows - left_out),
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
    )


def _passes(projection: Projection) -> int:
    """Passes over K(Z, Z) of a direction, where it takes any."""
    return projection.passes.limit if isinstance(projection, EigenProProjection) else 1


def _read(
    reader: SplitReader, shape: Shape, n_rows: int, clock: Clock
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
    parts = [reader.read_segment(numbers[0])]
    segment_s = clock() - began
    n_alone, read_began = len(parts[0][0]), time.perf_counter()
    with ThreadPoolExecutor(_READERS, "ep3stream-rehearsal") as pool:
        for start in range(1, len(numbers), _READERS):
            parts += pool.map(reader.read_segment, numbers[start : start + _READERS])
            if time.perf_counter() - read_began > _READ_FOR_S:
                break
    read_s = time.perf_counter() - read_began
    x, y = (np.concatenate(columns) for columns in zip(*parts, strict=True))
    n_read = len(x) - n_alone
    rate = n_read * shape.row_bytes / read_s if n_read else n_alone * shape.row_bytes / max(segment_s, 1e-9)
    order = np.random.default_rng(0).choice(len(x), min(n_rows, len(x)), replace=False)
    return torch.from_numpy(x[order]).float(), torch.from_numpy(y[order]), segment_s, rate


@dataclass(frozen=True, slots=True)
class _Stepping:
    """Steps of a solver with all or a few of the centers, on the same rows again and again."""

    config: FitConfig
    kernel: Kernel
    centers: Tensor
    settled: Settled
    targets: Any
    mesh: Mesh
    x: Tensor
    y: Tensor
    inputs: Callable[[Tensor], Tensor]
    clock: Clock

    def seconds(self, n_centers: int, projection: Projection) -> float:
        """Of a step, the median of rounds."""
        solver, batch = self.config.solver, self.settled.batch_size
        device = self.mesh.device
        made = Solver(
            self.kernel,
            self.kernel.left(self.centers[:n_centers]),
            projection,
            self.targets,
            solver.used_momentum,
            solver.used_averaging,
            self.mesh,
            torch.zeros(n_centers * batch, device=device),
            solver.ridge,
        )
        state = made.initial_state()
        x, y = self._batch(self.x, batch).to(device), self._batch(self.y, batch).to(device)

        def one_round() -> None:
            for step in range(_ROUND_STEPS):
                # No step at all, lest the weights grow: it costs the same.
                errors = made.step(state, self.inputs(x), y, 0.0, step == _ROUND_STEPS - 1)
            float(errors.loss)

        return _median_seconds(one_round, self.clock) / _ROUND_STEPS

    def direction_seconds(self) -> float:
        """Of the projection alone, on a gradient of ones."""
        projection = self.settled.projection
        gradient = torch.ones(self.targets.n_outputs, len(self.centers), device=self.mesh.device)

        def one_round() -> None:
            for _ in range(_ROUND_STEPS):
                theta = projection.direction(gradient)
            float(theta.sum())

        return _median_seconds(one_round, self.clock) / _ROUND_STEPS

    @staticmethod
    def _batch(rows: Tensor, n_rows: int) -> Tensor:
        """`n_rows` of them, repeated where there are fewer."""
        return rows.repeat(-(-n_rows // len(rows)), *[1] * (rows.ndim - 1))[:n_rows]


def _rates(stepping: _Stepping, sizes: Sizes, step_s: float, read_bytes_per_s: float) -> Rates:
    """What a step took, shared out: what any step takes, the projection, and the rest to the kernel values."""
    overhead_s = min(_overhead(stepping), 0.5 * step_s)
    flop_s, projected_s = 0.0, 0.0
    # EigenPro's projection is made of kernel values itself.
    if sizes.projection != "eigenpro":
        projected_s = min(stepping.direction_seconds(), 0.9 * (step_s - overhead_s))
        flop_s = projected_s / projection_flops(sizes)
    evaluation_s = (step_s - overhead_s - projected_s) / evaluations_of_step(sizes)
    return Rates(evaluation_s, flop_s, overhead_s, read_bytes_per_s)


class _Free:
    """A projection that costs nothing."""

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        return gradient

    def direction(self, gradient: Tensor) -> Tensor:
        return gradient

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        return theta.new_full((), torch.nan)

    def gram_times(self, weights: Tensor) -> Tensor:
        return weights

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        return x[:, 0]

    def tensors(self) -> dict[str, Tensor]:
        return {}


def _overhead(stepping: _Stepping) -> float:
    """Of a step with next to no centers, one row, and no projection."""
    limits = replace(stepping.settled.limits, batch_size=1)
    one = replace(stepping, settled=replace(stepping.settled, limits=limits))
    return one.seconds(min(_FEW_CENTERS, len(stepping.centers)), _Free())


def _median_seconds(work: Callable[[], None], clock: Clock) -> float:
    """Of a call, after a first one: the median of those of a second, at least three."""
    work()
    took: list[float] = []
    while len(took) < 3 or sum(took) < _STEP_FOR_S:
        began = clock()
        work()
        took.append(clock() - began)
    return statistics.median(took)


@contextmanager
def _seconds(clock: Clock) -> Iterator[Callable[[], float]]:
    """Gives a function that, once the block is left, says how long it took."""
    began = clock()
    ended: list[float] = []
    yield lambda: ended[0] - began
    ended.append(clock())
