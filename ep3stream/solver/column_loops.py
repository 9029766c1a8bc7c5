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
    """Blocks of one kernel on columns, and the sums that its slopes are made of.

    is_anova, is_squared: the form of the kernel, and whether its power is 2 rather than 1. n_numbers: how many of the
    columns of prepared points, the first ones, are numbers; constants: (2, k), as for `triton_columns.column_block`.
    All matrices are float32, contiguous, in host memory.
    """

    loops: Any
    is_anova: bool
    is_squared: bool
    n_numbers: int
    constants: Numbers

    @property
    def _places(self) -> tuple[Numbers, Numbers]:
        """Where numbers are, and where categories."""
        return np.arange(self.n_numbers), np.arange(self.n_numbers, self.constants.shape[1])

    def fill(self, z: Tensor, x: Tensor, out: Tensor) -> None:
        """Writes K(Z, X) into `out`, (n, m), for prepared points of (n, k) and (m, k)."""
        if len(x) < _FEWEST_ROWS <= len(z):  # The matrix is symmetric, to the last bit.
            turned = z.new_empty(len(x), len(z))
            self.fill(x, z, turned)
            out.copy_(turned.T)
            return
        numbers, categories = self._places
        constants: tuple[Numbers, ...] = (self.constants[0, categories],)
        loop = self.loops.fill_product
        if self.is_anova:
            loop, constants = self.loops.fill_anova, (*self.constants[:, numbers], *constants)
        arrays = (numbers, categories, *constants, self.is_squared)

        def fill_rows(rows: slice) -> None:
            loop(z[rows].numpy(), x.numpy(), *arrays, out[rows].numpy())

        _in_threads(fill_rows, len(z), len(x) * self.constants.shape[1])

    def sums(self, z: Tensor, x: Tensor, weighted: Tensor) -> Tensor:
        """For each column the sum of t and of t e, (2, k), float64, as for `triton_columns.column_sums`."""
        numbers, categories = self._places
        n_columns = self.constants.shape[1]
        found = np.zeros((2, n_columns))
        if not self.is_anova:
            loop = self.loops.add_differences
            found[1] = self._summed(loop, z, x, weighted, (numbers, categories), (n_columns,))
            return torch.from_numpy(found)
        if len(numbers):
            arrays = (numbers, *self.constants[:, numbers])
            found[:, numbers] = self._summed(self.loops.add_shared, z, x, weighted, arrays, (2, len(numbers)))
        if len(categories):
            arrays = (numbers[:0], categories)
            found[1, categories] = self._summed(
                self.loops.add_differences, z, x, weighted, arrays, (len(categories),)
            )
        return torch.from_numpy(found)

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

        _in_threads(add, len(sums), height * len(x) * self.constants.shape[1])
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
