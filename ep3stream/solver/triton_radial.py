"""Radial kernels on GPUs, in Triton: tiles from few features, and phi in one pass over a block.

`radial_tile` is for few features: squared distances from differences, at 2 d operations an entry. Differences do not
cancel, so K(x, x) is 1. `radial_profile` is for many features, whose distances come from a matrix product.

Kernels are told apart by a number, their place in `gpu.KINDS`; which kernels, devices and sizes are served is decided
in gpu.py. The formulas of phi are those of kernels.py, to which the tests compare these.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
PROFILE_ENTRIES = 4096

# CUDA's limit for the second axis of a grid.
_MAX_GRID = 65_535


@triton.jit
def _phi(s, shape, kind: tl.constexpr):
    """phi(t) from s = factor t^2 >= 0, with the factor of the kernel in `kernels._PROFILES`; kind: a place in KINDS."""
    if kind == 0:
        return tl.exp2(-tl.sqrt(s))
    if kind == 1:
        return tl.exp2(-s)
    if kind == 2:
        t = tl.sqrt(s)
        return (1 + t) * tl.exp2(-t * _LOG2_E)
    if kind == 3:
        t = tl.sqrt(s)
        return (1 + t + s / 3) * tl.exp2(-t * _LOG2_E)
    if kind == 4:
        power = tl.where(s > 0, tl.exp2(tl.log2(tl.where(s > 0, s, 1.0)) * (0.5 * shape)), 0.0)
        return tl.exp2(power * -_LOG2_E)
    u = 0.5 * s / shape
    near = 1 + u
    # log(1 + u) to full precision (Goldberg, 1991, theorem 4): a large shape, near the Gaussian, keeps its digits.
    log1p = tl.where(near == 1, u, tl.log2(near) / _LOG2_E * u / tl.where(near == 1, 1.0, near - 1))
    return tl.exp2(log1p * -shape * _LOG2_E)


@triton.jit
def radial_tile(
    a, b, of_a, of_b, n_a, n_b, shape,
    kind: tl.constexpr, d: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """phi of the distances of a[of_a] and b[of_b], (rows, columns). a, b: (d, n_a) and (d, n_b), in the unit of phi."""
    squared = tl.zeros((rows, columns), dtype=tl.float32)
    # Wholly unrolled, the compiler loads the features of all turns first, and spills registers.
    for _ in tl.range(0, d, loop_unroll_factor=4):
        left = tl.load(a + of_a, mask=of_a < n_a, other=0.0)
        right = tl.load(b + of_b, mask=of_b < n_b, other=0.0)
        difference = left[:, None] - right[None, :]
        squared += difference * difference
        a += n_a
        b += n_b
    return _phi(squared, shape, kind)


@triton.jit
def _profile(squared, out, n_columns, stride, out_stride, shape, kind: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(squared + row * stride + columns, mask=columns < n_columns, other=0.0)
    # Not tl.maximum, which would make 0 of nan.
    values = tl.where(values < 0, 0.0, values)
    tl.store(out + row * out_stride + columns, _phi(values, shape, kind), mask=columns < n_columns)


def radial_profile(squared: Tensor, kind: int, shape: float, out: Tensor) -> None:
    """Writes phi of squared distances, (n, m), in the unit of phi, into `out`; it may be `squared`.

    Negative ones, which are 0 but for rounding, count as 0.
    """
    assert squared.stride(1) == out.stride(1) == 1
    n_rows, n_columns = squared.shape
    n_runs = triton.cdiv(n_columns, PROFILE_ENTRIES)
    for first in range(0, n_rows if n_runs else 0, _MAX_GRID):
        rows = slice(first, first + _MAX_GRID)
        _profile[(n_runs, len(squared[rows]))](
            squared[rows], out[rows], n_columns, squared.stride(0), out.stride(0), shape,
            kind=kind, block=PROFILE_ENTRIES,
        )  # fmt: skip
