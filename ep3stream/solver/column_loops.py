"""The way from tensors to the compiled loops of kernels on columns: which serve, in which threads.

`compiled_columns.py` is imported at the first use, and with it Numba.
"""

from __future__ import annotations

import functools
import importlib
import itertools
import logging
from collections.abc import Callable
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from types import ModuleType
from typing import Any

import numpy as np
import torch
from torch import Tensor

_LOGGER = logging.getLogger(__name__)

# Fewer differences than this take less time than to wake another thread.
_THREAD_DIFFERENCES = 1 << 19

# The loops take rows of the right side in stretches: fewer cost as much as a stretch.
_FEWEST_ROWS = 64

Numbers = np.ndarray[Any, np.dtype[Any]]


@functools.cache
def compiled_loops() -> ModuleType | None:
    """`compiled_columns.py`, or None where it cannot be used, which is told once."""
    try:
        return importlib.import_module("ep3stream.solver.compiled_columns")
    except ImportError as error:
        _LOGGER.warning(
            "kernels on columns take several times as long, because Numba is not there: %s", error
        )
        return None


@dataclass(frozen=True, slots=True)
class ColumnLoops:
    """Blocks and slopes of one kernel on columns.

    is_anova, is_squared: the form of the kernel, and whether its power is 2 rather than 1. is_category, weights,
    shares: (k,), of the columns of prepared points; weights to base 2, of use for categories. All matrices are float32,
    contiguous, in host memory.
    """

    loops: Any
    is_anova: bool
    is_squared: bool
    is_category: Numbers
    weights: Numbers
    shares: Numbers

    @property
    def _places(self) -> tuple[Numbers, Numbers]:
        """Where numbers are, and where categories."""
        return np.flatnonzero(~self.is_category), np.flatnonzero(self.is_category)

    def fill(self, z: Tensor, x: Tensor, out: Tensor) -> None:
        """Writes K(Z, X) into `out`, (n, m), for prepared points of (n, k) and (m, k)."""
        if len(x) < _FEWEST_ROWS <= len(z):  # The matrix is symmetric, to the last bit.
            turned = z.new_empty(len(x), len(z))
            self.fill(x, z, turned)
            out.copy_(turned.T)
            return
        numbers, categories = self._places
        constants: tuple[Numbers, ...] = (self.weights[categories],)
        loop = self.loops.fill_product
        if self.is_anova:
            shares = self.shares[categories]
            kept = (1 + shares * 2 ** -self.weights[categories]) / (1 + shares)
            loop, constants = self.loops.fill_anova, (*self._rests_and_shares(numbers), kept)
        arrays = (numbers, categories, *(each.astype(np.float32) for each in constants), self.is_squared)

        def fill_rows(rows: slice) -> None:
            loop(z[rows].numpy(), x.numpy(), *arrays, out[rows].numpy())

        _in_threads(fill_rows, len(z), len(x) * len(self.weights))

    def slopes(self, z: Tensor, x: Tensor, weighted: Tensor) -> tuple[Tensor, Tensor]:
        """d L / d log e, e the exponent of a column, and d L / d log c, (k,) each, float64.

        weighted: (n, m), as for `ColumnKernel.slopes`.
        """
        numbers, categories = self._places
        weights, shares = self.weights[categories], self.shares[categories]
        of_exponents, of_shares = np.zeros(len(self.weights)), np.zeros(len(self.weights))
        if not self.is_anova:
            sums = self._summed(
                self.loops.add_differences, z, x, weighted, (numbers, categories), (len(self.weights),)
            )
            of_exponents[numbers] = -sums[: len(numbers)]
            of_exponents[categories] = -weights * sums[len(numbers) :]
            return torch.from_numpy(of_exponents), torch.from_numpy(of_shares)
        if len(numbers):
            arrays = (numbers, *self._rests_and_shares(numbers))
            sums = self._summed(self.loops.add_shared, z, x, weighted, arrays, (2, len(numbers)))
            whole, c = float(weighted.sum(dtype=torch.float64)), self.shares[numbers]
            of_exponents[numbers] = -sums[1]
            of_shares[numbers] = sums[0] - whole * c / (1 + c)
        if len(categories):
            sums = self._summed(
                self.loops.add_differences, z, x, weighted, (numbers[:0], categories), (len(categories),)
            )
            # c k / (1 + c k), for values that differ.
            of_differing = shares * 2**-weights / (1 + shares * 2**-weights)
            of_exponents[categories] = -weights * of_differing * sums
            of_shares[categories] = (of_differing - shares / (1 + shares)) * sums
        return torch.from_numpy(of_exponents), torch.from_numpy(of_shares)

    def _rests_and_shares(self, numbers: Numbers) -> tuple[Numbers, Numbers]:
        """1 / (1 + c) and c / (1 + c), whose sum is 1 in float32 too: rounding loses half of 1's last bit at most."""
        rests = (1 / (1 + self.shares[numbers])).astype(np.float32)
        return rests, 1 - rests

    def _summed(
        self,
        loop: Callable[..., None],
        z: Tensor,
        x: Tensor,
        weighted: Tensor,
        arrays: tuple[Numbers, ...],
        shape: tuple[int, ...],
    ) -> Numbers:
        """The sum of what `loop` adds for each strip of rows of z; of the shape `shape`."""
        height = self.loops.STRIP_ROWS
        sums = np.zeros((-(-len(z) // height), *shape))

        def add(strips: slice) -> None:
            rows = slice(strips.start * height, strips.stop * height)
            loop(z[rows].numpy(), x.numpy(), *arrays, self.is_squared, weighted[rows].numpy(), sums[strips])

        _in_threads(add, len(sums), height * len(x) * len(self.weights))
        found: Numbers = sums.sum(0)
        return found


def _in_threads(work: Callable[[slice], None], n_items: int, differences_each: int) -> None:
    """Calls `work` for consecutive runs of items that cover `n_items`, each in one of torch's number of threads."""
    n_threads = min(torch.get_num_threads(), n_items, n_items * differences_each // _THREAD_DIFFERENCES + 1)
    bounds = [n_items * i // n_threads for i in range(n_threads + 1)]
    mine, *others = (slice(*pair) for pair in itertools.pairwise(bounds))
    if not others:
        work(mine)
        return
    # Threads of this call alone: none is left, and a forked process misses none.
    with ThreadPoolExecutor(len(others), "ep3stream-columns") as pool:
        under_way = [pool.submit(work, items) for items in others]
        work(mine)
        for each in under_way:
            each.result()
