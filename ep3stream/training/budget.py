"""Centers and epochs from a budget of time: how large a model of how many passes the minutes of a fit allow.

A fit of p centers with e passes over n rows takes as long as p (e n + s) kernel evaluations, where s stands for its
set-up and its validations. What an evaluation takes, with its share of a step, and a center in the set-up, is measured
on the device (`Speed`); `sizes_for` is a pure function of the result. `StageTimes` tells what a set-up has taken.
"""

from __future__ import annotations

import logging
import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.solver.blocks import BatchBlock, fuses
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.set_up import MIN_BATCH, MIN_COLUMNS_BATCH
from ep3stream.solver.skinny import few_times_transposed, plus_few_times
from ep3stream.training.plan import COLUMNS_MODEL_RANK, MODEL_RANK

logger = logging.getLogger(__name__)

Limit = Literal["time", "rows", "memory", "epochs"]

# Of the minutes: the rest is for what is not counted here, such as reading, checkpoints and the report.
USED_SHARE = 0.8
# Of validations without a better model, where the epochs are chosen here.
PATIENCE = 3

# Centers are not trained on, and many of them learn noise: on flights, batting and blood values an eighth of the rows
# with more epochs was better than a quarter with fewer. Small tables need a quarter.
_ROWS_PER_CENTER, _ROWS_PER_FEW_CENTERS, _FEW_CENTERS = 8, 4, 5000
# Fewer centers than these are not taken for want of time: a part of an epoch is better.
_FEWEST_CENTERS = 2000
_PREFERRED_EPOCHS, _MOST_EPOCHS = 2, 10
_LEAST_EPOCHS = 0.01
# The set-up forms kernel values of each center with landmarks and samples.
_SETUP_ROWS = 5000
# Scores of rows, for a validation or for effects of cells, have one product with the block where a step has two.
_VALIDATION_SHARE = 0.7
# 10 steps to ten times as many, each rounded to a number that is easy to read.
_GRID = (1000, 1250, 1600, 2000, 2500, 3200, 4000, 5000, 6300, 8000)

# Of the step that is measured: centers, rows and columns of the basis as they usually are, with kernels on columns and
# with others, and how often a projection passes over its basis both ways.
_CENTERS, _GPU_CENTERS = 4096, 32_768
_COLUMNS_SIZES, _SIZES = (MIN_COLUMNS_BATCH, COLUMNS_MODEL_RANK), (MIN_BATCH, MODEL_RANK)
_PASSES = 3
# Products of landmarks with the rank that a center takes in the set-up, measured on CPUs with 10,000 to 32,000 centers.
_LANDMARKS, _SETUP_PRODUCTS = 2000, 7
_ROUNDS = 25
# Of rows that are often the same: on those of five categories 2000 centers for the 251 rows that occur were as good as
# 20,000 and 4000, 800 worse by .0005 of R2, 50,000 by .004.
_CENTERS_PER_DISTINCT = 16


@dataclass(frozen=True, slots=True)
class FitSizes:
    """How many centers and epochs a fit has, and what keeps it from having more."""

    n_centers: int
    epochs: float
    limit: Limit


@dataclass(frozen=True, slots=True)
class Speed:
    """Seconds of a kernel evaluation with its share of a step, and of a center in the set-up."""

    evaluation_s: float
    center_s: float


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """What bounds the sizes of a fit, beside time.

    n_rows: rows to train on and to draw centers of. most_in_memory: the largest number of centers whose fit fits the
    memory. n_validated: rows that are scored after each epoch. centers, epochs: those that are given; None to have them
    chosen. setup_rows: kernel evaluations that take as long as a center in the set-up. most_distinct: how many centers
    are of use where rows are often the same (`most_distinct`). n_for_effects: rows of the first epoch that are scored
    at the end, to learn effects of cells from.
    """

    n_rows: int
    most_in_memory: int
    n_validated: int = 0
    centers: int | None = None
    epochs: float | None = None
    setup_rows: float = _SETUP_ROWS
    most_distinct: int | None = None
    n_for_effects: int = 0

    def at(self, speed: Speed) -> SizeLimits:
        """The limits with a set-up of this speed."""
        return replace(self, setup_rows=_SETUP_ROWS + speed.center_s / speed.evaluation_s)

    @property
    def most_centers(self) -> int:
        """The number of centers that are given, or the largest that rows and memory allow; at least 1."""
        return self.centers or on_grid(min(self.most_for_rows, self.most_in_memory))

    @property
    def most_for_rows(self) -> int:
        """The largest number of centers that leaves enough rows to train on, before it is rounded to the grid."""
        few = min(self.n_rows // _ROWS_PER_FEW_CENTERS, _FEW_CENTERS)
        most = max(few, self.n_rows // _ROWS_PER_CENTER)
        return most if self.most_distinct is None else min(most, self.most_distinct)

    def rows_per_center(self, epochs: float) -> float:
        """Kernel evaluations of a fit with so many epochs, for each center."""
        scored = math.ceil(epochs) * self.n_validated + min(epochs * self.n_rows, self.n_for_effects)
        return epochs * self.n_rows + scored * _VALIDATION_SHARE + self.setup_rows


def most_distinct(x: NDArray[Any]) -> int | None:
    """How many centers are of use to rows of which x, (n, d), are some: None for as many as there can be.

    Where a sixteenth of these rows or fewer are distinct, as combinations of a few categories are, nearly all that
    occur are among them. Centers drawn from the rows repeat the frequent ones: sixteen times as many find the others.
    """
    most = _CENTERS_PER_DISTINCT * len(np.unique(x, axis=0))
    return most if most <= len(x) else None


def sizes_for(limits: SizeLimits, evaluations: float) -> FitSizes:
    """The sizes of the fit that is expected to do best with so many kernel evaluations.

    Two epochs with as many centers as there is time for; where rows or memory allow fewer centers, more epochs, up to
    10; where two epochs allow fewer than 2000 centers, these with fewer epochs, or a part of one. Chosen centers lie on
    a grid of ten steps to a tenfold, so that runs can be compared.
    """
    most = limits.most_centers
    epochs = limits.epochs or _PREFERRED_EPOCHS
    affordable = evaluations / limits.rows_per_center(epochs)
    if limits.centers is None and limits.epochs is not None:
        return _with_centers(limits, affordable, epochs)
    if limits.centers is None and affordable < most:
        if affordable >= min(most, _FEWEST_CENTERS):
            return _with_centers(limits, affordable, epochs)
        most = min(most, _FEWEST_CENTERS)
    if limits.epochs is not None:
        return FitSizes(most, limits.epochs, "epochs")
    epochs = _affordable_epochs(limits, evaluations / most)
    if epochs < _MOST_EPOCHS:
        return FitSizes(most, epochs, "time")
    is_of_memory = limits.centers is None and limits.most_in_memory < limits.most_for_rows
    return FitSizes(most, _MOST_EPOCHS, "memory" if is_of_memory else "rows")


def _with_centers(limits: SizeLimits, affordable: float, epochs: float) -> FitSizes:
    """As many centers as are affordable, at least 2000 where there are as many to choose, for so many epochs."""
    most = limits.most_centers
    if affordable >= most:
        is_of_memory = limits.most_in_memory < limits.most_for_rows
        return FitSizes(most, epochs, "memory" if is_of_memory else "rows")
    return FitSizes(max(on_grid(int(affordable)), min(most, _FEWEST_CENTERS)), epochs, "time")


def _affordable_epochs(limits: SizeLimits, rows_per_center: float) -> float:
    """The largest number of epochs, whole or below 1, that takes at most so many evaluations for each center."""
    whole = bisect_right(range(1, _MOST_EPOCHS + 1), rows_per_center, key=limits.rows_per_center)
    if whole:
        return whole
    left = rows_per_center - limits.rows_per_center(0) - limits.n_validated
    scored = min(left / (1 + _VALIDATION_SHARE), limits.n_for_effects)
    part = (left - _VALIDATION_SHARE * scored) / limits.n_rows
    return max(_LEAST_EPOCHS, math.floor(100 * part) / 100)


def on_grid(number: int) -> int:
    """The largest number of the grid 1000, 1250, 1600, 2000, ... times powers of ten that is at most `number`.

    Below 100 the number itself, and 1 for 0.
    """
    if number < 100:
        return max(1, number)
    scale: int = 10 ** (len(str(number)) - 1)
    return max(step * scale // 1000 for step in _GRID if step * scale // 1000 <= number)


def measured_speed(
    kernel: Kernel, x: Tensor, n_outputs: int, clock: Callable[[], float] = time.perf_counter
) -> Speed:
    """The speed of this device: of a block with the two products and a projection, and of products in the set-up.

    x: (n, d), scaled rows on the device, repeated where they are fewer than a block needs. Steps of 512 rows (1024 with
    a kernel on columns) and 4096 centers, 32,768 on a GPU. About a second on a core.
    """
    device, n_centers = x.device, _GPU_CENTERS if x.device.type == "cuda" else _CENTERS
    batch, rank = _COLUMNS_SIZES if isinstance(kernel, ColumnKernel) else _SIZES
    rows = x.repeat(-(-(n_centers + batch) // len(x)), 1)
    left, right = kernel.left(rows[:n_centers]), kernel.right(rows[n_centers : n_centers + batch])
    is_fused = fuses(kernel, device, 2 * n_outputs)
    memory = None if is_fused else torch.zeros(n_centers * batch, device=device)
    weights = torch.full((n_outputs, n_centers), 1 / n_centers, device=device)
    basis = torch.full((rank, n_centers), 1 / n_centers, device=device)
    by_loops = isinstance(kernel, ColumnKernel)
    landmarks, vectors = (torch.ones(size, _LANDMARKS, device=device) for size in (batch, rank))

    def step() -> None:
        block = BatchBlock(kernel, left, right, memory)
        residual = block.left_times(weights).contiguous()
        gradient = block.times(residual)
        for _ in range(_PASSES):
            inside = few_times_transposed(gradient, basis, by_loops)
            gradient = plus_few_times(gradient, inside, basis, -1, by_loops)
        float(gradient.sum())  # Waits for the device.

    def product() -> None:
        float((landmarks @ vectors.T).sum())

    evaluation_s = _usual_seconds(step, clock) / (n_centers * batch)
    return Speed(evaluation_s, _SETUP_PRODUCTS * _usual_seconds(product, clock) / batch)


def _usual_seconds(work: Callable[[], None], clock: Callable[[], float]) -> float:
    """Of a call: the lower quartile of 25, after a first one, which a passing disturbance changes little."""
    work()
    took = []
    for _ in range(_ROUNDS):
        began = clock()
        work()
        took.append(clock() - began)
    return max(statistics.quantiles(took)[0], 1e-9)


class StageTimes:
    """Seconds of each stage of a set-up, by its name. logs: whether the log tells of each as it ends."""

    def __init__(self, clock: Callable[[], float] = time.perf_counter, logs: bool = True) -> None:
        self.elapsed_s: dict[str, float] = {}
        self.clock, self._logs = clock, logs

    @contextmanager
    def stage(self, name: str) -> Iterator[None]:
        """Measures the seconds of the block and keeps them under `name`."""
        began = self.clock()
        yield
        self.elapsed_s[name] = self.clock() - began
        if self._logs:
            logger.info("set-up: %s, %.1f s", name, self.elapsed_s[name])
