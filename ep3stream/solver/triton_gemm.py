"""Blocks of radial kernels of many features, in Triton: one matrix product, with phi and a second product in it.

    block[i, n] = phi(a_i . b_n),   out[k, n] = sum_i w[k, i] block[i, n]

torch's product writes squared distances, phi reads and writes them, and the product with weights reads them again: 16
bytes an entry. Here squared distances stay in the registers of the program that multiplies, which makes phi of them
and multiplies it with the weights. A block that is kept is written once: 4 bytes. A block that is not kept never
exists.

a and b are the factors of `gpu.factors`. Their products are squared distances to which nothing is added: norms that
were added after the product would leave K(x, x) as far from 1 as tensor cores cut off.

The rows of a tile are points of b, so that a tile is the left factor of its product with weights, which tensor cores
take from registers. That product keeps float32's digits: each factor is cut into three numbers of bfloat16, and six of
the nine products are added. A quarter of a tile at a time: more of them at once, or a Matern kernel, spill registers.

A program takes one run of columns of the block and one stretch of its rows. Partial sums of the stretches are added in
a fixed order: the result has the same bits each time.
"""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from ep3stream.solver.triton_radial import _phi

# A tile is so large that its loads from the second-level cache take no longer than its products on an H100. It fills
# the registers of a multiprocessor (`tools/triton_registers.py`).
BLOCK = {"block_out": 128, "block_sum": 256, "num_warps": 8, "num_stages": 4}
BLOCK_BYTES = 128

# Programs to run: many times the 132 multiprocessors of an H100, so that few wait for the last ones.
_PROGRAMS = 2048

# Numbers of one row of the factors at least: loads of 16 bytes.
_EIGHT = tl.constexpr(8)


@triton.jit
def _leading(x):
    """x, float32, without its last 16 bits: a number of bfloat16."""
    return (x.to(tl.uint32, bitcast=True) & 0xFFFF0000).to(tl.float32, bitcast=True)


@triton.jit
def _added(totals, tile, weights, short: tl.constexpr):
    """totals + tile @ weights, to 24 bits, by six products of numbers of bfloat16, of the type `short`."""
    high, w_high = _leading(tile), _leading(weights)
    rest, w_rest = tile - high, weights - w_high
    middle, w_middle = _leading(rest), _leading(w_rest)
    w_low = (w_rest - w_middle).to(short)
    w_high, w_middle = w_high.to(short), w_middle.to(short)
    totals = tl.dot(high.to(short), w_low, totals)
    totals = tl.dot(high.to(short), w_middle, totals)
    totals = tl.dot(high.to(short), w_high, totals)
    totals = tl.dot(middle.to(short), w_middle, totals)
    totals = tl.dot(middle.to(short), w_high, totals)
    return tl.dot((rest - middle).to(short), w_high, totals)


@triton.jit
def _finished(
    squared, totals, w, block, columns, first, last, n_rows, n_sum, n_out, stride, shape,
    kind: tl.constexpr, short: tl.constexpr, is_kept: tl.constexpr, padded: tl.constexpr, block_sum: tl.constexpr,
):  # fmt: skip
    """Makes phi of a part of a tile of squared distances, stores it, and adds its product with weights to `totals`."""
    places = first + tl.arange(0, block_sum)
    # Not tl.maximum, which would make 0 of nan.
    tile = _phi(tl.where(squared < 0, 0.0, squared), shape, kind)
    if is_kept:
        inside = (places[None, :] < last) & (columns[:, None] < n_out)
        tl.store(block + places.to(tl.int64)[None, :] * stride + columns[:, None], tile, mask=inside)
    if padded:
        each = tl.arange(0, padded)[None, :]
        inside = (each < n_rows) & (places[:, None] < last)
        weights = tl.load(w + each.to(tl.int64) * n_sum + places[:, None], mask=inside, other=0.0)
        totals = _added(totals, tile, weights, short)
    return totals


@triton.jit
def _halves(tile, rows: tl.constexpr, columns: tl.constexpr):
    """The first and the last half of the columns of a tile."""
    return tl.split(tl.permute(tl.reshape(tile, (rows, 2, columns // 2)), (0, 2, 1)))


@triton.jit(do_not_specialize=["n_rows", "n_sum", "eighths", "stretch"])
def _gemm(
    a, b, w, block, out, n_rows, n_sum, n_out, eighths, stride, shape, stretch,
    kind: tl.constexpr, short: tl.constexpr, is_kept: tl.constexpr, padded: tl.constexpr,
    block_out: tl.constexpr, block_sum: tl.constexpr, block_width: tl.constexpr,
):  # fmt: skip
    """One stretch of rows of the block and of the sum over i, for one run of columns. padded: 0 for no product."""
    width = _EIGHT * eighths
    columns = tl.program_id(0) * block_out + tl.arange(0, block_out)
    part = tl.program_id(1)
    features = tl.arange(0, block_width)
    # In the place of points beyond the last is the last again; what becomes of it is not stored, and weighs 0.
    rights = b + tl.minimum(columns, n_out - 1).to(tl.int64)[:, None] * width + features[None, :]
    totals = tl.zeros((block_out, padded if padded else 16), dtype=tl.float32)
    last = min((part + 1) * stretch, n_sum)
    for first in range(part * stretch, last, block_sum):
        places = first + tl.arange(0, block_sum)
        lefts = a + tl.minimum(places, n_sum - 1).to(tl.int64)[None, :] * width + features[:, None]
        squared = tl.zeros((block_out, block_sum), dtype=tl.float32)
        for begun in range(0, width, block_width):
            right = tl.load(rights + begun, mask=features[None, :] < width - begun, other=0.0)
            left = tl.load(lefts + begun, mask=features[:, None] < width - begun, other=0.0)
            squared = tl.dot(right, left, squared, input_precision="tf32")
        half, other = _halves(squared, block_out, block_sum)
        quarters = _halves(half, block_out, block_sum // 2) + _halves(other, block_out, block_sum // 2)
        for number in tl.static_range(4):
            totals = _finished(
                quarters[number], totals, w, block, columns, first + number * (block_sum // 4), last,
                n_rows, n_sum, n_out, stride, shape, kind, short, is_kept, padded, block_sum // 4,
            )  # fmt: skip
    if padded:
        each = tl.arange(0, padded)[None, :]
        place = (part * n_rows + each).to(tl.int64) * n_out + columns[:, None]
        tl.store(out + place, totals, mask=(each < n_rows) & (columns[:, None] < n_out))


def padded(n_outputs: int) -> int:
    """Outputs of the program that serves so many; 0 for no product."""
    return max(16, triton.next_power_of_2(n_outputs)) if n_outputs else 0


def radial_gemm(
    a: Tensor, b: Tensor, kind: int, shape: float, weights: Tensor | None = None, block: Tensor | None = None
) -> Tensor | None:
    """Writes phi of a @ b', (n_a, n_b), into `block`, and returns weights @ phi, (k, n_b), whichever is given.

    a, b: (n_a, w) and (n_b, w), contiguous, both in float32, with no more bits than TF32, or both in bfloat16; w is a
    multiple of 8. weights: (k, n_a), contiguous. block: of stride 1 along its rows. kind: a place in `gpu.KINDS`.
    """
    assert (a.dtype, a.shape[1]) == (b.dtype, b.shape[1])
    assert a.shape[1] % _EIGHT.value == 0
    assert block is None or block.stride(1) == 1
    n_sum, n_out, n_rows = len(a), len(b), 0 if weights is None else len(weights)
    if not n_sum or not n_out:
        return None if weights is None else weights.new_zeros(n_rows, n_out)
    n_runs = triton.cdiv(n_out, BLOCK["block_out"])
    n_tiles = triton.cdiv(n_sum, BLOCK["block_sum"])
    stretch = triton.cdiv(n_tiles, min(n_tiles, triton.cdiv(_PROGRAMS, n_runs))) * BLOCK["block_sum"]
    n_parts = triton.cdiv(n_sum, stretch)
    parts = None if weights is None else weights.new_empty(n_parts, n_rows, n_out)
    # The interpreter multiplies no bfloat16.
    short = tl.bfloat16 if a.device.type == "cuda" else tl.float32
    _gemm[(n_runs, n_parts)](
        a, b, a if weights is None else weights, a if block is None else block, a if parts is None else parts,
        n_rows, n_sum, n_out, a.shape[1] // _EIGHT.value, 0 if block is None else block.stride(0), shape, stretch,
        kind=kind, short=short, is_kept=block is not None, padded=padded(n_rows),
        block_width=BLOCK_BYTES // a.element_size(), **BLOCK,
    )  # fmt: skip
    if parts is None:
        return None
    return parts[0] if n_parts == 1 else parts.sum(0)
