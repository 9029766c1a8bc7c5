"""Products of a few vectors with a large matrix, whose time is that of reading the matrix.

For kernels on columns, with which Numba is there all the same, the loops of `compiled_products.py` form them on CPUs:
for 4 vectors in a half to a quarter of torch's time (`tools/bench_skinny.py`). Otherwise torch does.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from ep3stream.solver.loops import Loops, compiled_loops, in_torchs_threads

# With more vectors torch is as fast.
_MOST_VECTORS = 16


def are_few(vectors: Tensor) -> bool:
    """Whether the compiled loops multiply these vectors, (k, n)."""
    return (
        0 < len(vectors) <= _MOST_VECTORS and vectors.device.type == "cpu" and vectors.dtype == torch.float32
    )


def _loops(few: Tensor, matrix: Tensor, by_loops: bool) -> Loops | None:
    """The loops, where they are wanted, serve these operands and are there."""
    is_plain = matrix.dtype == torch.float32 and matrix.is_contiguous() and matrix.numel() > 0
    return compiled_loops() if by_loops and are_few(few) and is_plain else None


def plus_few_times(onto: Tensor, few: Tensor, matrix: Tensor, scale: float, by_loops: bool) -> Tensor:
    """onto + scale few @ matrix, (k, m), for few of (k, n) and a matrix of (n, m).

    by_loops: by the compiled loops, where they serve these operands and Numba is there.
    """
    if (loops := _loops(few, matrix, by_loops)) is None:
        return torch.addmm(onto, few, matrix, alpha=scale)
    # By numpy: torch's own threads, once woken, stay on their cores for a while.
    found = np.array(onto.numpy(), order="C")
    arrays = np.ascontiguousarray(few.numpy() * np.float32(scale)), matrix.numpy()

    def add(columns: slice) -> None:
        loops.products.add_product(*arrays, columns.start, columns.stop, found)

    in_torchs_threads(add, matrix.shape[1], matrix.shape[0] * len(few))
    return torch.from_numpy(found)


def few_times_transposed(few: Tensor, matrix: Tensor, by_loops: bool) -> Tensor:
    """few @ matrix', (k, n), for few of (k, m) and a matrix of (n, m); by_loops as for `plus_few_times`."""
    if (loops := _loops(few, matrix, by_loops)) is None:
        return few @ matrix.T
    found = np.empty((len(few), len(matrix)), np.float32)
    array, whole = np.ascontiguousarray(few.numpy()), matrix.numpy()

    def set_rows(rows: slice) -> None:
        loops.products.set_product(array, whole[rows], rows.start, found)

    in_torchs_threads(set_rows, matrix.shape[0], matrix.shape[1] * len(few))
    return torch.from_numpy(found)
