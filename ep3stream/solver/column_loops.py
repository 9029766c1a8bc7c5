"""The way from tensors to the compiled loops of kernels on columns: which loop serves, on what."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from ep3stream.solver.loops import Loops, in_torchs_threads

# At most so many sums of parts of a product are kept until their sum.
_MOST_PARTS = 64

# The loops take rows of the right side in stretches: fewer cost as much as a stretch.
FEWEST_ROWS = 64

Numbers = np.ndarray[Any, np.dtype[Any]]


@dataclass(frozen=True, slots=True)
class ColumnLoops:
    """Blocks of one kernel on columns, and the sums that its slopes are made of.

    is_anova, is_squared: the form of the kernel, and whether its power is 2 rather than 1. n_numbers: how many of the
    columns of prepared points, the first ones, are numbers; constants: (2, k), as for `triton_columns.column_block`.
    All matrices are float32, contiguous, in host memory.
    """

    loops: Loops
    is_anova: bool
    is_squared: bool
    n_numbers: int
    constants: Numbers

    @property
    def _places(self) -> tuple[Numbers, Numbers]:
        """Where numbers are, and where categories."""
        return np.arange(self.n_numbers), np.arange(self.n_numbers, self.constants.shape[1])

    def _filling(self, x: Numbers) -> Callable[[Numbers, Numbers], None]:
        """What writes K(Z, X) into `out`, (n, m), for rows z of (n, k), when it is called with z and out."""
        numbers, categories = self._places
        constants: tuple[Numbers, ...] = (self.constants[0, categories],)
        loop = self.loops.columns.fill_product
        if self.is_anova:
            loop, constants = self.loops.columns.fill_anova, (*self.constants[:, numbers], *constants)
        arrays = (numbers, categories, *constants, self.is_squared)
        return lambda z, out: loop(z, x, *arrays, out)

    def fill(self, z: Tensor, x: Tensor, out: Tensor) -> None:
        """Writes K(Z, X) into `out`, (n, m), for prepared points of (n, k) and (m, k)."""
        if len(x) < FEWEST_ROWS <= len(z):  # The matrix is symmetric, to the last bit.
            turned = z.new_empty(len(x), len(z))
            self.fill(x, z, turned)
            out.copy_(turned.T)
            return
        fill, z_array, out_array = self._filling(x.numpy()), z.numpy(), out.numpy()
        in_torchs_threads(
            lambda rows: fill(z_array[rows], out_array[rows]), len(z), len(x) * self.constants.shape[1]
        )

    def product(
        self, few: Tensor, z: Tensor, x: Tensor, over_left: bool, block: Tensor | None = None
    ) -> Tensor:
        """few @ K(Z, X), (c, m), for few vectors of (c, n) with `over_left`; else few @ K(X, Z), (c, n), for (c, m).

        Strip by strip: each is formed, in `block`, (n, m), where there is one, and multiplied while it is in the cache.
        """
        height, fill, z_array = self.loops.columns.STRIP_ROWS, self._filling(x.numpy()), z.numpy()
        n_strips = -(-len(z) // height)
        # The number of parts does not depend on that of threads, and so the order of additions does not either.
        strips_each = max(1, -(-n_strips // _MOST_PARTS)) if over_left else 1
        n_parts = -(-n_strips // strips_each)
        shape = (n_parts, len(few), len(x)) if over_left else (1, len(few), len(z))
        # By numpy, also the sum: torch's own threads, once woken, stay on their cores for a while.
        found = np.zeros(shape, np.float32)
        products, array = self.loops.products, np.ascontiguousarray(few.numpy())

        def multiply(parts: slice) -> None:
            room = z.new_empty(height if block is None else 0, len(x))
            for strip in range(parts.start * strips_each, min(parts.stop * strips_each, n_strips)):
                rows = slice(strip * height, min((strip + 1) * height, len(z)))
                part = (room[: rows.stop - rows.start] if block is None else block[rows]).numpy()
                fill(z_array[rows], part)
                if over_left:
                    own = np.ascontiguousarray(array[:, rows])
                    products.add_product(own, part, 0, len(x), found[strip // strips_each])
                else:
                    products.set_product(array, part, rows.start, found[0])

        in_torchs_threads(multiply, n_parts, strips_each * height * len(x) * self.constants.shape[1])
        return torch.from_numpy(found.sum(0))

    def sums(self, z: Tensor, x: Tensor, weighted: Tensor) -> Tensor:
        """For each column the sum of t and of t e, (2, k), float64, as for `triton_columns.column_sums`."""
        numbers, categories = self._places
        n_columns = self.constants.shape[1]
        found = np.zeros((2, n_columns))
        if not self.is_anova:
            loop = self.loops.columns.add_differences
            found[1] = self._summed(loop, z, x, weighted, (numbers, categories), (n_columns,))
            return torch.from_numpy(found)
        if len(numbers):
            arrays = (numbers, *self.constants[:, numbers])
            found[:, numbers] = self._summed(
                self.loops.columns.add_shared, z, x, weighted, arrays, (2, len(numbers))
            )
        if len(categories):
            arrays = (numbers[:0], categories)
            found[1, categories] = self._summed(
                self.loops.columns.add_differences, z, x, weighted, arrays, (len(categories),)
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
        height = self.loops.columns.STRIP_ROWS
        sums = np.zeros((-(-len(z) // height), *shape))

        def add(strips: slice) -> None:
            rows = slice(strips.start * height, strips.stop * height)
            loop(z[rows].numpy(), x.numpy(), *arrays, self.is_squared, weighted[rows].numpy(), sums[strips])

        in_torchs_threads(add, len(sums), height * len(x) * self.constants.shape[1])
        found: Numbers = sums.sum(0)
        return found
