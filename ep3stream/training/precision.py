"""The precision that `auto` stands for: three products of bfloat16 where a GPU is found to gain by them.

A kernel block of many features is nearly all of a step, and most GPUs multiply numbers of bfloat16 far faster than
numbers of float32: by reckoning an H100 forms the block five times as fast in `bf16x3` (docs/scaling.md). Others do
not, so that neither the gain nor the error is taken for granted: both are measured on rows of the data.
"""

from __future__ import annotations

import logging
import time
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import Tensor

from ep3stream.config import Precision, PrecisionChoice
from ep3stream.solver.blocks import BatchBlock, fuses, kernel_matrix
from ep3stream.solver.gpu import multiplies_half
from ep3stream.solver.kernels import Kernel, RadialKernel

logger = logging.getLogger(__name__)

# Rows whose kernel values are compared with those in float64.
_CHECKED = 512
# Mean error of kernel values that is taken, beside that of float32. Emulated, `bf16x3` errs up to six times as much as
# float32 (`tests/test_precision.py`).
_MOST_TIMES, _MOST_MORE = 10.0, 1e-6
# So many times as fast as float32 it has to be, at least.
_GAIN = 1.25
# Points, at most, and rows of the block that is timed, the fastest of so many times.
_POINTS, _ROWS, _ROUNDS = 8192, 1024, 5


def found_precision(
    asked: PrecisionChoice,
    kernel: Kernel,
    x: Tensor,
    n_outputs: int,
    n_points: int = _POINTS,
    clock: Callable[[], float] = time.perf_counter,
) -> Precision:
    """`asked`; for `auto` float32, or `bf16x3` where it is possible, errs little and takes less time.

    kernel: in float32. x: (n, d), scaled rows on the device. n_points: how many centers a device has. clock: tells
    seconds, by which both are timed on a GPU: some milliseconds on a large one.
    """
    if asked != "auto":
        return asked
    device = x.device
    if (
        not isinstance(kernel, RadialKernel)
        or not multiplies_half(device)
        or fuses(kernel, device, n_outputs)
    ):
        return "float32"
    short = replace(kernel, precision="bf16x3")
    try:
        if not _errs_little(kernel, short, x[:_CHECKED]):
            logger.warning(
                "kernel blocks are in float32: in bf16x3, which takes less time on most GPUs, they have larger errors "
                "here than they should"
            )
            return "float32"
        n_points = min(n_points, _POINTS)
        plain_s, short_s = (_fastest_s(each, x, n_outputs, n_points, clock) for each in (kernel, short))
    except RuntimeError as error:  # A GPU or a library that does not multiply bfloat16 so.
        logger.warning("kernel blocks are in float32, since bf16x3 does not run here: %.300s", error)
        return "float32"
    gain = plain_s / short_s
    logger.info("kernel blocks in bf16x3 take 1/%.2g of the time of float32", gain)
    return "bf16x3" if gain >= _GAIN else "float32"


def compared_bytes(point_bytes: int, n_points: int, n_outputs: int) -> int:
    """Bytes that `found_precision` takes at most. point_bytes: of a point prepared for blocks in `bf16x3`."""
    n_points = min(n_points, _POINTS)
    # Points as they are, as they are prepared and once more while they are; a block; weights, predictions.
    timed = (
        3 * point_bytes * (n_points + _ROWS) + 4 * (n_points + n_outputs) * _ROWS + 4 * n_outputs * n_points
    )
    checked = 3 * point_bytes * _CHECKED + 8 * 8 * _CHECKED**2
    return max(timed, checked)


def _fastest_s(
    kernel: RadialKernel, x: Tensor, n_outputs: int, n_points: int, clock: Callable[[], float]
) -> float:
    """Seconds of a block and its product with weights, for rows of x, (n, d), repeated."""
    rows = x.repeat(-(-(n_points + _ROWS) // len(x)), 1)
    left, right = kernel.left(rows[:n_points]), kernel.right(rows[n_points : n_points + _ROWS])
    memory = torch.zeros(n_points * _ROWS, device=x.device)
    weights = torch.full((n_outputs, n_points), 1 / n_points, device=x.device)
    took = []
    for _ in range(1 + _ROUNDS):
        began = clock()
        float(BatchBlock(kernel, left, right, memory).left_times(weights).sum())  # Waits for the device.
        took.append(clock() - began)
    return max(min(took[1:]), 1e-9)  # The first one compiles.


def _errs_little(kernel: RadialKernel, short: RadialKernel, x: Tensor) -> bool:
    """Whether `short` errs little more than `kernel` between rows of x, (n, d), by the mean and on the diagonal."""
    truth = kernel_matrix(kernel, x.double())
    plain, found = ((kernel_matrix(each, x) - truth).abs() for each in (kernel, short))
    limits = [_MOST_TIMES * errors + _MOST_MORE for errors in (plain.mean(), plain.diagonal().max())]
    return bool(found.mean() <= limits[0]) and bool(found.diagonal().max() <= limits[1])
