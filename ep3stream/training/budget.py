"""Centers and epochs from a budget of time: how large a model of how many passes the minutes of a fit allow.

A fit of p centers with e passes over n rows takes p (e n + s) kernel evaluations, where s stands for its set-up and its
validations. What an evaluation takes is measured on the device (`seconds_per_evaluation`); `sizes_for` is a pure
function of the result.
"""

from __future__ import annotations

import math
import statistics
import time
from bisect import bisect_right
from collections.abc import Callable
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.gpu import fuses
from ep3stream.solver.kernels import Kernel

Limit = Literal["time", "rows", "memory", "epochs"]

# Of the minutes: the rest is for what is not counted here, such as reading, checkpoints and the report.
USED_SHARE = 0.8
# Of validations without a better model, where the epochs are chosen here.
PATIENCE = 3

_ROWS_PER_CENTER = 4
# Fewer centers than these are not taken for want of time: a part of an epoch is better.
_FEWEST_CENTERS = 2000
_PREFERRED_EPOCHS, _MOST_EPOCHS = 2, 10
_LEAST_EPOCHS = 0.01
# The set-up forms kernel values of each center with landmarks, samples and probes.
_SETUP_ROWS = 12_000
# A validation has one product with the block where a step has two.
_VALIDATION_SHARE = 0.7
# 10 steps to ten times as many, each rounded to a number that is easy to read.
_GRID = (1000, 1250, 1600, 2000, 2500, 3200, 4000, 5000, 6300, 8000)

_BATCH, _CENTERS, _GPU_CENTERS = 1024, 4096, 32_768
_ROUNDS = 5


@dataclass(frozen=True, slots=True)
class FitSizes:
    """How many centers and epochs a fit has, and what keeps it from having more."""

    n_centers: int
    epochs: float
    limit: Limit


@dataclass(frozen=True, slots=True)
class SizeLimits:
    """What bounds the sizes of a fit, beside time.

    n_rows: rows to train on and to draw centers of. most_in_memory: the largest number of centers whose fit fits the
    memory. n_validated: rows that are scored after each epoch. centers, epochs: those that are given; None to have them
    chosen.
    """

    n_rows: int
    most_in_memory: int
    n_validated: int = 0
    centers: int | None = None
    epochs: float | None = None

    @property
    def most_centers(self) -> int:
        """The number of centers that are given, or the largest that rows and memory allow; at least 1."""
        return self.centers or on_grid(min(self.n_rows // _ROWS_PER_CENTER, self.most_in_memory))

    def rows_per_center(self, epochs: float) -> float:
        """Kernel evaluations of a fit with so many epochs, for each center."""
        validated = math.ceil(epochs) * self.n_validated * _VALIDATION_SHARE
        return epochs * self.n_rows + validated + _SETUP_ROWS


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
    is_of_memory = limits.centers is None and limits.most_in_memory < limits.n_rows // _ROWS_PER_CENTER
    return FitSizes(most, _MOST_EPOCHS, "memory" if is_of_memory else "rows")


def _with_centers(limits: SizeLimits, affordable: float, epochs: float) -> FitSizes:
    """As many centers as are affordable, at least 2000 where there are as many to choose, for so many epochs."""
    most = limits.most_centers
    if affordable >= most:
        is_of_memory = limits.most_in_memory < limits.n_rows // _ROWS_PER_CENTER
        return FitSizes(most, epochs, "memory" if is_of_memory else "rows")
    return FitSizes(max(on_grid(int(affordable)), min(most, _FEWEST_CENTERS)), epochs, "time")


def _affordable_epochs(limits: SizeLimits, rows_per_center: float) -> float:
    """The largest number of epochs, whole or below 1, that takes at most so many evaluations for each center."""
    whole = bisect_right(range(1, _MOST_EPOCHS + 1), rows_per_center, key=limits.rows_per_center)
    if whole:
        return whole
    part = (rows_per_center - limits.rows_per_center(0) - limits.n_validated) / limits.n_rows
    return max(_LEAST_EPOCHS, math.floor(100 * part) / 100)


def on_grid(number: int) -> int:
    """The largest number of the grid 1000, 1250, 1600, 2000, ... times powers of ten that is at most `number`.

    Below 100 the number itself, and 1 for 0.
    """
    if number < 100:
        return max(1, number)
    scale: int = 10 ** (len(str(number)) - 1)
    return max(step * scale // 1000 for step in _GRID if step * scale // 1000 <= number)


def seconds_per_evaluation(
    kernel: Kernel,
    x: Tensor,
    n_outputs: int,
    clock: Callable[[], float] = time.perf_counter,
) -> float:
    """Seconds that a kernel evaluation takes in a step: its share of a block and of the two products with it.

    x: (n, d), scaled rows on the device, repeated where they are fewer than a block needs. The median of five steps of
    1024 rows and 4096 centers, 32,768 on a GPU, after a first one.
    """
    n_centers = _GPU_CENTERS if x.device.type == "cuda" else _CENTERS
    rows = x.repeat(-(-(n_centers + _BATCH) // len(x)), 1)
    left, right = kernel.left(rows[:n_centers]), kernel.right(rows[n_centers : n_centers + _BATCH])
    is_fused = fuses(kernel.name, x.device, x.shape[1], 2 * n_outputs)
    memory = None if is_fused else torch.zeros(n_centers * _BATCH, device=x.device)
    weights = torch.full((n_outputs, n_centers), 1 / n_centers, device=x.device)

    def step() -> None:
        block = BatchBlock(kernel, left, right, memory)
        residual = block.left_times(weights).contiguous()
        float(block.times(residual).sum())  # Waits for the device.

    step()
    took = []
    for _ in range(_ROUNDS):
        began = clock()
        step()
        took.append(clock() - began)
    return max(statistics.median(took), 1e-9) / (n_centers * _BATCH)
