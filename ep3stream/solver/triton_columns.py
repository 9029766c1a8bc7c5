"""Kernels on columns on GPUs, in Triton: blocks, and the sums that slopes by weights and shares are made of.

Numbers come first among the columns of points, then categories. The loops over columns are not unrolled: one compiled
program serves any number of columns. What is computed is said in columns.py, to which the tests compare this.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

# Chosen, as the tiles of triton_products.py, by what `tools/triton_registers.py` tells.
BLOCK = {"rows": 8, "columns": 256, "num_warps": 4, "num_stages": 1}


@triton.jit
def _exponents(a, b, of_a, of_b, n_a, n_b, power, degree: tl.constexpr):
    """|a_i - b_n|^power of a number; degree: 1 or 2, which `power` then is, or 0 for any power."""
    left = tl.load(a + of_a, mask=of_a < n_a, other=0.0)
    right = tl.load(b + of_b, mask=of_b < n_b, other=0.0)
    distance = tl.abs(left[:, None] - right[None, :])
    if degree == 1:
        return distance
    if degree == 2:
        return distance * distance
    return tl.where(distance > 0, tl.exp2(tl.log2(tl.where(distance > 0, distance, 1.0)) * power), 0.0)


@triton.jit
def _differing(a, b, of_a, of_b, n_a, n_b):
    left = tl.load(a + of_a, mask=of_a < n_a, other=0.0)
    right = tl.load(b + of_b, mask=of_b < n_b, other=0.0)
    return left[:, None] != right[None, :]


@triton.jit
def column_tile(
    a, b, constants, of_a, of_b, n_a, n_b, power, n_numbers, n_columns,
    is_anova: tl.constexpr, degree: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """K(a[of_a], b[of_b]), (rows, columns), in registers. a, b: (n_columns, n_a) and (n_columns, n_b)."""
    product = tl.full((rows, columns), 1.0, dtype=tl.float32)
    exponent = tl.zeros((rows, columns), dtype=tl.float32)
    for j in range(n_numbers):
        e = _exponents(a, b, of_a, of_b, n_a, n_b, power, degree)
        if is_anova:
            product *= tl.load(constants + j) + tl.load(constants + n_columns + j) * tl.exp2(-e)
        else:
            exponent += e
        a += n_a
        b += n_b
    for j in range(n_numbers, n_columns):
        differs = _differing(a, b, of_a, of_b, n_a, n_b)
        if is_anova:
            product = tl.where(differs, product * tl.load(constants + j), product)
        else:
            exponent = tl.where(differs, exponent + tl.load(constants + j), exponent)
        a += n_a
        b += n_b
    if is_anova:
        return product
    return tl.exp2(-exponent)


@triton.jit
def _column_block(
    a, b, constants, out, n_a, n_b, stride, power, n_numbers, n_columns, n_runs,
    is_anova: tl.constexpr, degree: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    of_a = tl.program_id(0) // n_runs * rows + tl.arange(0, rows)
    of_b = tl.program_id(0) % n_runs * columns + tl.arange(0, columns)
    tile = column_tile(
        a, b, constants, of_a, of_b, n_a, n_b, power, n_numbers, n_columns, is_anova, degree, rows, columns
    )
    place = of_a[:, None].to(tl.int64) * stride + of_b[None, :]
    tl.store(out + place, tile, mask=(of_a[:, None] < n_a) & (of_b[None, :] < n_b))


@triton.jit
def _column_sums(
    a, b, constants, weighted, out, n_a, n_b, stride, power, n_numbers, n_columns, n_runs,
    is_anova: tl.constexpr, degree: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """The sums over one tile, into its part of `out`, (tiles, 2, n_columns)."""
    of_a = tl.program_id(0) // n_runs * rows + tl.arange(0, rows)
    of_b = tl.program_id(0) % n_runs * columns + tl.arange(0, columns)
    place = of_a[:, None].to(tl.int64) * stride + of_b[None, :]
    inside = (of_a[:, None] < n_a) & (of_b[None, :] < n_b)
    parts = tl.load(weighted + place, mask=inside, other=0.0)
    out += tl.program_id(0).to(tl.int64) * 2 * n_columns
    for j in range(n_numbers):
        e = _exponents(a, b, of_a, of_b, n_a, n_b, power, degree)
        t = parts
        if is_anova:
            shared = tl.load(constants + n_columns + j) * tl.exp2(-e)
            t = parts * shared / (tl.load(constants + j) + shared)
        tl.store(out + j, tl.sum(tl.sum(t, 0), 0))
        tl.store(out + n_columns + j, tl.sum(tl.sum(t * e, 0), 0))
        a += n_a
        b += n_b
    for j in range(n_numbers, n_columns):
        differing = tl.where(_differing(a, b, of_a, of_b, n_a, n_b), parts, 0.0)
        tl.store(out + j, 0.0)
        tl.store(out + n_columns + j, tl.sum(tl.sum(differing, 0), 0))
        a += n_a
        b += n_b


def column_block(
    a: Tensor, b: Tensor, constants: Tensor, n_numbers: int, is_anova: bool, power: float, out: Tensor
) -> None:
    """Writes K(A, B), (n_a, n_b), into `out`.

    a, b: (k, n_a) and (k, n_b), contiguous: numbers, `n_numbers` of them, then codes of categories. constants: (2, k).
    With anova the first row has 1 / (1 + c) of numbers and what a category that differs keeps, the second row
    c / (1 + c) of numbers. Otherwise the first row has the exponent, to base 2, of a category that differs.
    """
    assert out.stride(1) == 1
    n_tiles, n_runs = _tiles(out)
    _column_block[(n_tiles,)](
        a, b, constants, out, a.shape[1], b.shape[1], out.stride(0), power, n_numbers, len(a), n_runs,
        is_anova=is_anova, degree=_degree(power), **BLOCK,
    )  # fmt: skip


def column_sums(
    a: Tensor, b: Tensor, constants: Tensor, n_numbers: int, is_anova: bool, power: float, weighted: Tensor
) -> Tensor:
    """For each column the sum of t and the sum of t e over all pairs of rows, (2, k), float64.

    e: |a_j - b_j|^power. t: `weighted`, (n_a, n_b), with anova times c k_j / (1 + c k_j). For a category 0, and the sum
    of `weighted` where the values differ. The others as for `column_block`.
    """
    assert weighted.stride(1) == 1
    n_tiles, n_runs = _tiles(weighted)
    parts = weighted.new_empty(n_tiles, 2, len(a))
    _column_sums[(n_tiles,)](
        a, b, constants, weighted, parts, a.shape[1], b.shape[1], weighted.stride(0), power, n_numbers, len(a), n_runs,
        is_anova=is_anova, degree=_degree(power), **BLOCK,
    )  # fmt: skip
    found: Tensor = parts.double().sum(0)
    return found


def _tiles(matrix: Tensor) -> tuple[int, int]:
    """The number of tiles, and of those in a row."""
    n_runs = triton.cdiv(matrix.shape[1], BLOCK["columns"])
    return triton.cdiv(len(matrix), BLOCK["rows"]) * n_runs, n_runs


def _degree(power: float) -> int:
    return int(power) if power in (1, 2) else 0
