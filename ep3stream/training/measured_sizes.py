"""Centers and epochs that the minutes of a fit allow, by the speed that is measured on the device.

`fit` and the estimators learn the weights of columns first, `plan` and `tune` reckon what that takes.
"""

from __future__ import annotations

import time
from collections.abc import Callable
from functools import cache, partial
from typing import Any

import torch
from numpy.typing import NDArray

from ep3stream.config import FitConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.column_weights import evaluations_of_learning
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.kernels import Kernel, KernelFunction
from ep3stream.solver.named_kernels import with_precision
from ep3stream.store.reader import Split, SplitReader
from ep3stream.training.budget import Speed, StageTimes, measured_speed, most_distinct
from ep3stream.training.centers import CenterSource
from ep3stream.training.column_kernel import LearntColumns, learning_effort
from ep3stream.training.defaults import is_timed, size_limits, typical_kernel, with_sizes
from ep3stream.training.plan import ProblemSize, automatic_centers
from ep3stream.training.precision import found_precision
from ep3stream.training.problem import Problem, input_scaling, problem_of_split
from ep3stream.training.set_up_rows import first_rows
from ep3stream.training.validation import ValidationRows


def with_measured_sizes(
    problem: Problem,
    split: Split,
    config: FitConfig,
    function: KernelFunction | None,
    n_centers: int | None,
    n_validated: int,
    memory_bytes: int,
    mesh: Mesh,
    learn: Callable[[int], LearntColumns | None],
    began: float,
    times: StageTimes,
    clock: Callable[[], float] = time.perf_counter,
) -> tuple[FitConfig, LearntColumns | None, Speed]:
    """The config with the sizes that its minutes allow, the weights of columns, and the speed of the fit on the device.

    n_centers: the number that is given, None to have it chosen. n_validated: rows that are scored after each epoch.
    learn: learns the weights for at most so many centers. began: when the clock of the minutes did.
    """
    first = cache(partial(first_rows, split))
    distinct = None if n_centers else mesh.broadcast_object(lambda: most_distinct(first()))
    limits = size_limits(problem.shape, config, n_centers, n_validated, memory_bytes, mesh.size, distinct)
    learnt = learn(limits.most_centers)
    with times.stage("speed"):
        speed = speed_of_fit(problem, first, config, function, learnt, mesh, clock)
    return with_sizes(config, limits, speed, clock() - began, mesh), learnt, speed


def speed_of_fit(
    problem: Problem,
    rows: Callable[[], NDArray[Any]],
    config: FitConfig,
    function: KernelFunction | None,
    learnt: LearntColumns | None,
    mesh: Mesh,
    clock: Callable[[], float],
) -> Speed:
    """The speed of the fit with all devices at work, as the leader measures it. rows: gives it x, (n, d), of some."""

    def measure() -> list[float]:
        x = torch.from_numpy(rows()).float().to(mesh.device)
        x = problem.inputs.to(mesh.device)(x)
        kernel: Kernel | None = None if learnt is None else learnt.known
        if kernel is None:
            kernel = typical_kernel(config.kernel, function, x, problem.categories)
        n_columns = problem.shape.n_columns
        kernel = with_precision(
            kernel, found_precision(config.solver.precision, kernel, x, n_columns, clock=clock)
        )
        found = measured_speed(kernel, x, n_columns, clock)
        return [found.evaluation_s / mesh.size, found.center_s / mesh.size]

    return Speed(*mesh.broadcast_object(measure))


def with_expected_sizes(
    split: SplitReader,
    config: FitConfig,
    function: KernelFunction | None,
    validation: ValidationRows,
    shape: ProblemSize,
    memory_bytes: int,
    device: torch.device,
    devices: int = 1,
    clock: Callable[[], float] = time.perf_counter,
) -> FitConfig:
    """The config with the sizes that the minutes of the fit allow, as far as can be told without learning weights.

    A fit leaves out columns without weight, so that it may choose a few more centers. devices: so many like `device`.
    """
    if not is_timed(config):
        return config
    held = validation.held_rows(split.info, config.run.seed)
    n_given = None
    if config.solver.centers != "auto":
        n_given = CenterSource.of(config, split, automatic_centers(shape), held).n_centers
    x, n_validated = first_rows(split), validation.n_rows(split.manifest)
    limits = size_limits(shape, config, n_given, n_validated, memory_bytes, devices, most_distinct(x))
    mesh = Mesh(0, 1, device)
    problem = problem_of_split(split, config, input_scaling(split, config))
    speed = speed_of_fit(problem, lambda: x, config, function, None, mesh, clock)
    if device.type == "cuda":
        speed = Speed(speed.evaluation_s / devices, speed.center_s / devices)
    learning_s = 0.0
    if function is None and config.kernel.name in COLUMN_KERNELS:
        effort = learning_effort(config.run.minutes)
        learning_s = evaluations_of_learning(shape.n_features, effort) * speed.evaluation_s
    return with_sizes(config, limits, speed, learning_s, mesh)
