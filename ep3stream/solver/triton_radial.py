"""Radial kernels on GPUs in Triton: a product with K(A, B) that never forms it, and phi in one pass over a block.

`times_radial` is for few features. Without it an entry of a block crosses the device's memory about ten times:
between the product that gives the distances, the passes of phi, and the two products with the block. At d = 9 that
takes some thirty times as long as the arithmetic. Here a tile of distances is formed from differences, in registers,
and used up there,

    out[k, n] = sum_i w[k, i] phi(sum_j (a_ij - b_nj)^2),

at 2 d + O(1) operations an entry. Differences do not cancel, so K(x, x) is 1. The sum over i is cut into stretches
whose partial sums are added in a fixed order: the result has the same bits each time.

`radial_profile` is for many features, whose distances come from a matrix product: it applies phi in one pass.

Kernels are told apart by a number, their place in `gpu.KINDS`; which kernels, devices and sizes are served is decided
in gpu.py. The formulas of phi are those of kernels.py, to which the tests compare these.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

_LOG2_E = tl.constexpr(1.4426950408889634)
_BLOCK_OUT, _BLOCK_SUM = 64, 64

# Programs to run at once: several for each of the 132 multiprocessors of an H100.
_PROGRAMS = 1024
_PROFILE_ENTRIES = 4096

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
def _times_radial(
    w, a, b, out, n_rows, n_sum, n_out, w_stride, a_stride, b_stride, a_unit, b_unit, shape, stretch,
    kind: tl.constexpr, d: tl.constexpr, rows: tl.constexpr, block_sum: tl.constexpr, block_out: tl.constexpr,
    precision: tl.constexpr,
):  # fmt: skip
    """One stretch of the sum over i, for one run of columns of `out`, (stretches, n_rows, n_out)."""
    columns = tl.program_id(0) * block_out + tl.arange(0, block_out)
    part = tl.program_id(1)
    each = tl.arange(0, rows)
    total = tl.zeros((rows, block_out), dtype=tl.float32)
    last = min((part + 1) * stretch, n_sum)
    for first in range(part * stretch, last, block_sum):
        places = first + tl.arange(0, block_sum)
        squared = tl.zeros((block_sum, block_out), dtype=tl.float32)
        for j in tl.static_range(d):
            left = tl.load(a + places.to(tl.int64) * a_stride + j, mask=places < last, other=0.0) * a_unit
            right = tl.load(b + columns.to(tl.int64) * b_stride + j, mask=columns < n_out, other=0.0) * b_unit
            difference = left[:, None] - right[None, :]
            squared += difference * difference
        # Beyond the last center the weight is 0, so that phi of the padding does not matter.
        inside = (each[:, None] < n_rows) & (places[None, :] < last)
        weights = tl.load(w + each[:, None].to(tl.int64) * w_stride + places[None, :], mask=inside, other=0.0)
        total += tl.dot(weights, _phi(squared, shape, kind), input_precision=precision)
    inside = (each[:, None] < n_rows) & (columns[None, :] < n_out)
    place = (part * n_rows + each[:, None]).to(tl.int64) * n_out + columns[None, :]
    tl.store(out + place, total, mask=inside)


@triton.jit
def _profile(squared, out, n_columns, stride, out_stride, shape, kind: tl.constexpr, block: tl.constexpr):
    row = tl.program_id(1).to(tl.int64)
    columns = tl.program_id(0) * block + tl.arange(0, block)
    values = tl.load(squared + row * stride + columns, mask=columns < n_columns, other=0.0)
    tl.store(out + row * out_stride + columns, _phi(values, shape, kind), mask=columns < n_columns)


def times_radial(
    weights: Tensor,
    a: Tensor,
    b: Tensor,
    units: tuple[float, float],
    kind: int,
    shape: float,
    d: int,
    is_exact: bool = True,
) -> Tensor:
    """weights @ K(A, B), (k, n_b), for weights of (k, n_a); k <= 128 and d <= 32. O(k n_b) memory.

    a, b: (n_a, d or more) and (n_b, d or more); the first d columns, times the number in `units`, are the points in
    the unit of phi. is_exact: the products with weights are in float32, otherwise in TF32, with 10 bits a factor.
    """
    (n_rows, n_sum), n_out = weights.shape, len(b)
    assert weights.stride(1) == a.stride(1) == b.stride(1) == 1
    if not n_sum or not n_out:
        return weights.new_zeros(n_rows, n_out)
    n_runs = triton.cdiv(n_out, _BLOCK_OUT)
    n_parts = max(1, min(triton.cdiv(_PROGRAMS, n_runs), triton.cdiv(n_sum, 4 * _BLOCK_SUM)))
    stretch = triton.cdiv(triton.cdiv(n_sum, n_parts), _BLOCK_SUM) * _BLOCK_SUM
    n_parts = triton.cdiv(n_sum, stretch)
    parts = weights.new_empty(n_parts, n_rows, n_out)
    _times_radial[(n_runs, n_parts)](
        weights, a, b, parts, n_rows, n_sum, n_out, weights.stride(0), a.stride(0), b.stride(0), *units, shape, stretch,
        kind=kind, d=d, rows=max(16, triton.next_power_of_2(n_rows)),
        block_sum=_BLOCK_SUM, block_out=_BLOCK_OUT, precision="ieee" if is_exact else "tf32",
    )  # fmt: skip
    return parts.sum(0)


def radial_profile(squared: Tensor, kind: int, shape: float, out: Tensor) -> None:
    """Writes phi of squared distances, (n, m), none negative, in the unit of phi, into `out`; it may be `squared`."""
    assert squared.stride(1) == out.stride(1) == 1
    n_rows, n_columns = squared.shape
    n_runs = triton.cdiv(n_columns, _PROFILE_ENTRIES)
    for first in range(0, n_rows if n_runs else 0, _MAX_GRID):
        rows = slice(first, first + _MAX_GRID)
        _profile[(n_runs, len(squared[rows]))](
            squared[rows], out[rows], n_columns, squared.stride(0), out.stride(0), shape,
            kind=kind, block=_PROFILE_ENTRIES,
        )  # fmt: skip
