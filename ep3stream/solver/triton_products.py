"""Products with a kernel matrix that is never formed, by Triton on GPUs.

    out[k, n] = sum_i w[k, i] K(a_i, b_n)

Without this an entry of a block crosses the device's memory about ten times. At 9 features that takes some thirty times
as long as the arithmetic. Here a tile of K is computed in registers, by `triton_radial.py` or `triton_columns.py`, and
used up there.

Up to 4 outputs: a program is one warp, each of its threads has whole columns of the tile, and the sum over i never
leaves the thread. More outputs: tensor cores multiply, in three TF32 products that together keep float32's digits.
Points lie feature by feature, (d, n), so that threads beside each other load numbers beside each other. With one stage
the compiler issues plain loads. Prefetching to shared memory, its default, spilled registers.

The sum over i is cut into stretches whose partial sums are added in a fixed order: the result has the same bits each
time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ep3stream.solver.triton_columns import column_tile
from ep3stream.solver.triton_radial import radial_tile

FEW_OUTPUTS = 4

# Programs to run at once: an H100 holds 32 of one warp on each of its 132 multiprocessors.
_PROGRAMS = 4096
# By the number of outputs, see `block`; chosen by what `tools/triton_registers.py` tells of an H100.
_FEW, _MANY, _MOST = (16, 64, 1), (32, 128, 4), (32, 128, 8)
_MANY_OUTPUTS = 32


@triton.jit
def _tile(
    a, b, constants, of_a, of_b, n_a, n_b, shape, n_numbers, n_columns,
    kind: tl.constexpr, d: tl.constexpr, degree: tl.constexpr, rows: tl.constexpr, columns: tl.constexpr,
):  # fmt: skip
    """K(a[of_a], b[of_b]), (rows, columns). kind: as for `times`; kinds of columns follow those of radial kernels."""
    if kind < 6:
        tile = radial_tile(a, b, of_a, of_b, n_a, n_b, shape, kind, d, rows, columns)
    else:
        tile = column_tile(
            a, b, constants, of_a, of_b, n_a, n_b, shape, n_numbers, n_columns, kind == 7, degree, rows, columns
        )  # fmt: skip
    return tile


@triton.jit
def _times_few(
    w, a, b, constants, out, n_sum, n_out, shape, n_numbers, n_columns, stretch,
    kind: tl.constexpr, d: tl.constexpr, degree: tl.constexpr, n_rows: tl.constexpr, padded: tl.constexpr,
    block_sum: tl.constexpr, block_out: tl.constexpr,
):  # fmt: skip
    """One stretch of the sum over i, for one run of columns of `out`, (stretches, n_rows, n_out)."""
    columns = tl.program_id(0) * block_out + tl.arange(0, block_out)
    part = tl.program_id(1)
    each = tl.arange(0, padded)[:, None]
    totals = tl.zeros((padded, block_out), dtype=tl.float32)
    last = min((part + 1) * stretch, n_sum)
    for first in range(part * stretch, last, block_sum):
        places = first + tl.arange(0, block_sum)
        tile = _tile(
            a, b, constants, places, columns, n_sum, n_out, shape, n_numbers, n_columns,
            kind, d, degree, block_sum, block_out,
        )  # fmt: skip
        for row in tl.static_range(n_rows):
            # Beyond the last center the weight is 0, so that K of the padding does not matter.
            weights = tl.load(w + row * n_sum + places, mask=places < last, other=0.0)
            found = tl.sum(weights[:, None] * tile, 0)[None, :]
            totals += found if n_rows == 1 else tl.where(each == row, found, 0.0)
    place = (part * n_rows + each).to(tl.int64) * n_out + columns[None, :]
    tl.store(out + place, totals, mask=(each < n_rows) & (columns[None, :] < n_out))


@triton.jit
def _times_many(
    w, a, b, constants, out, n_rows, n_sum, n_out, shape, n_numbers, n_columns, stretch,
    kind: tl.constexpr, d: tl.constexpr, degree: tl.constexpr, padded: tl.constexpr,
    block_sum: tl.constexpr, block_out: tl.constexpr,
):  # fmt: skip
    """As `_times_few`, with the sums by tensor cores."""
    columns = tl.program_id(0) * block_out + tl.arange(0, block_out)
    part = tl.program_id(1)
    each = tl.arange(0, padded)[None, :]
    totals = tl.zeros((block_out, padded), dtype=tl.float32)
    last = min((part + 1) * stretch, n_sum)
    for first in range(part * stretch, last, block_sum):
        places = first + tl.arange(0, block_sum)
        tile = _tile(
            b, a, constants, columns, places, n_out, n_sum, shape, n_numbers, n_columns,
            kind, d, degree, block_out, block_sum,
        )  # fmt: skip
        inside = (each < n_rows) & (places[:, None] < last)
        weights = tl.load(w + each.to(tl.int64) * n_sum + places[:, None], mask=inside, other=0.0)
        totals += tl.dot(tile, weights, input_precision="tf32x3")
    place = (part * n_rows + each).to(tl.int64) * n_out + columns[:, None]
    tl.store(out + place, totals, mask=(each < n_rows) & (columns[:, None] < n_out))


def times(
    weights: Tensor,
    a: Tensor,
    b: Tensor,
    kind: int,
    shape: float,
    constants: Tensor | None = None,
    n_numbers: int = 0,
) -> Tensor:
    """weights @ K(A, B), (k, n_b), for weights of (k, n_a); k <= 128. O(k n_b) memory.

    a, b: (d, n_a) and (d, n_b), contiguous like all matrices here. kind: a place in `gpu.KINDS`; shape: the shape of a
    radial kernel, the power of one on columns. constants, n_numbers: as for `triton_columns.column_block`.
    """
    (n_rows, n_sum), (d, n_out) = weights.shape, b.shape
    if not n_sum or not n_out:
        return weights.new_zeros(n_rows, n_out)
    block_sum, block_out, warps = block(n_rows)
    n_runs = triton.cdiv(n_out, block_out)
    n_parts = max(1, min(triton.cdiv(_PROGRAMS, n_runs), triton.cdiv(n_sum, 4 * block_sum)))
    stretch = triton.cdiv(triton.cdiv(n_sum, n_parts), block_sum) * block_sum
    n_parts = triton.cdiv(n_sum, stretch)
    parts = weights.new_empty(n_parts, n_rows, n_out)
    tiles = {"kind": kind, "degree": int(shape) if shape in (1, 2) else 0, "d": d if constants is None else 0}
    blocks = {"block_sum": block_sum, "block_out": block_out, "num_warps": warps, "num_stages": 1}
    sizes = (n_sum, n_out, shape, n_numbers, d, stretch)
    of_kernel = (a, b, a if constants is None else constants, parts)
    if n_rows <= FEW_OUTPUTS:
        padded = triton.next_power_of_2(n_rows)
        _times_few[(n_runs, n_parts)](
            weights, *of_kernel, *sizes, n_rows=n_rows, padded=padded, **tiles, **blocks
        )
    else:
        padded = max(16, triton.next_power_of_2(n_rows))
        _times_many[(n_runs, n_parts)](weights, *of_kernel, n_rows, *sizes, padded=padded, **tiles, **blocks)
    return parts[0] if n_parts == 1 else parts.sum(0)


def block(n_rows: int) -> tuple[int, int, int]:
    """Rows of the sum and columns of a tile, and warps, for so many outputs."""
    if n_rows <= FEW_OUTPUTS:
        return _FEW
    return _MANY if n_rows <= _MANY_OUTPUTS else _MOST
