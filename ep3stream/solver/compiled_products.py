"""Loops for products of a few vectors with a block, compiled by Numba for the processor at hand.

With 2 to 8 vectors the libraries that torch calls pack the block first, which takes as long as the product, and use one
thread (`tools/bench_skinny.py`). Here every value of the block is read once.
"""

from __future__ import annotations

from typing import Any

import numpy as np

from ep3stream.solver.compiling import REORDERED, compiled

# Columns of the block at a time: their part of all vectors stays in the nearest cache.
_STRETCH = 1024
_UNROLLED = 4
_ZERO = np.float32(0)


@compiled(REORDERED)
def add_product(few: Any, block: Any, start: int, stop: int, out: Any) -> None:
    """out[:, start:stop] += few @ block[:, start:stop].

    few: (k, n), block: (n, m), out: (k, m); all float32, contiguous. Each value of `out` gets its terms four at a time
    in the order of the block's rows, whatever the other arguments are.
    """
    last = len(block) - 1
    for first in range(start, stop, _STRETCH):
        end = min(stop, first + _STRETCH)
        for r in range(0, len(block), _UNROLLED):
            # Four rows at a time, the last one again, with the weight 0, where there are fewer.
            r1, r2, r3 = min(r + 1, last), min(r + 2, last), min(r + 3, last)
            b0, b1, b2, b3 = (
                block[r, first:end],
                block[r1, first:end],
                block[r2, first:end],
                block[r3, first:end],
            )
            for c in range(len(few)):
                w0 = few[c, r]
                w1 = few[c, r1] if r1 == r + 1 else _ZERO
                w2 = few[c, r2] if r2 == r + 2 else _ZERO
                w3 = few[c, r3] if r3 == r + 3 else _ZERO
                sums = out[c, first:end]
                for i in range(end - first):
                    sums[i] += (w0 * b0[i] + w1 * b1[i]) + (w2 * b2[i] + w3 * b3[i])


@compiled(REORDERED)
def set_product(few: Any, block: Any, first_row: int, out: Any) -> None:
    """out[:, first_row + r] = few @ block[r] for every row r of the block.

    few: (k, m), block: (rows, m), out: (k, n); all float32, contiguous. A value depends on its row of the block and
    on `few` alone.
    """
    k, last = len(few), len(block) - 1
    out[:, first_row : first_row + len(block)] = _ZERO
    for first in range(0, few.shape[1], _STRETCH):
        end = min(few.shape[1], first + _STRETCH)
        for r in range(0, len(block), 2):
            # Two rows at a time, the last one twice where there is one.
            b0, b1 = block[r, first:end], block[min(r + 1, last), first:end]
            at, is_pair = first_row + r, r < last
            for c in range(0, k - k % _UNROLLED, _UNROLLED):
                f0, f1, f2, f3 = (
                    few[c, first:end],
                    few[c + 1, first:end],
                    few[c + 2, first:end],
                    few[c + 3, first:end],
                )
                s0 = s1 = s2 = s3 = t0 = t1 = t2 = t3 = _ZERO
                for i in range(end - first):
                    s0 += f0[i] * b0[i]
                    s1 += f1[i] * b0[i]
                    s2 += f2[i] * b0[i]
                    s3 += f3[i] * b0[i]
                    t0 += f0[i] * b1[i]
                    t1 += f1[i] * b1[i]
                    t2 += f2[i] * b1[i]
                    t3 += f3[i] * b1[i]
                out[c, at] += s0
                out[c + 1, at] += s1
                out[c + 2, at] += s2
                out[c + 3, at] += s3
                if is_pair:
                    out[c, at + 1] += t0
                    out[c + 1, at + 1] += t1
                    out[c + 2, at + 1] += t2
                    out[c + 3, at + 1] += t3
            for c in range(k - k % _UNROLLED, k):
                f0 = few[c, first:end]
                s0 = t0 = _ZERO
                for i in range(end - first):
                    s0 += f0[i] * b0[i]
                    t0 += f0[i] * b1[i]
                out[c, at] += s0
                if is_pair:
                    out[c, at + 1] += t0
