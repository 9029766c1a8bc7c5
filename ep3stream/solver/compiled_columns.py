"""Loops of the kernels on columns, compiled by Numba for the processor at hand.

torch makes a pass over a strip for each operation, and each pass loads and stores every value. Here a stretch of a
row goes through four columns at a time in registers, and 2^t is a polynomial that the compiler turns into vector
instructions: no call for each value, no table.

Only this module imports Numba, and only `columns.py` imports this module, at the first block that can use it: fits with
other kernels do not wait for it. Machine code is kept beside this file or in the user's cache directory, so that a
process compiles only what none has compiled before. A value depends on its two rows alone: neither on the place in
the block nor on the number of threads.
"""

from __future__ import annotations

import functools
import logging
import threading
from collections.abc import Callable
from typing import Any, TypeVar, cast

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

_LOGGER = logging.getLogger(__name__)
_Function = TypeVar("_Function", bound=Callable[..., None])

# Rows of x whose columns are laid out one after the other in the nearest caches. Shorter stretches write the block in
# pieces too short for the processor to fetch ahead: 128 take half as long again with 7 columns, where the block is not
# in a cache yet; longer ones gain nothing.
_STRETCH = 256
_UNROLLED = 4
# Rows of z whose sums are kept apart, so that the number of threads does not change the order of additions.
STRIP_ROWS = 256

# 2^f = 1 + f (P1 + f (P2 + ...)) for |f| <= 1/2, with a relative error of 9e-8, half a unit in the last place of
# float32: the coefficients of the least largest relative error, found by Lawson's iteration.
_P1, _P2, _P3, _P4, _P5 = (
    np.float32(c)
    for c in (
        0.69314697759733,
        0.24022242082677514,
        0.055507337448247304,
        0.009671512812492143,
        0.0013264727213670516,
    )
)
# Adding 1.5 * 2^23 to a small float32 rounds it to a whole number, which then stands in the lowest bits.
_ROUNDER = np.float32(12582912)
# Products and sums may become one instruction; no other rule of float arithmetic is given up. A check of every division
# would keep loops from becoming vector instructions.
_ARITHMETIC: dict[str, Any] = {"fastmath": {"contract"}, "error_model": "numpy"}
_ONE, _ZERO = np.float32(1), np.float32(0)
# Below it 2^t is 0 rather than a number that is too small to be normal, with which processors are slow.
_LEAST, _BELOW = np.float32(-125.5), np.float32(-127)
_MANTISSA_BITS = np.int32(23)
# 2^t and its product with another such power are normal numbers.
_NEAR = np.float32(60)


def _compiled(function: _Function) -> _Function:
    """The function as machine code from its first call on, which runs without Python's lock.

    The machine code is kept on disk. Where that fails (no place, a full disk, a damaged file), this process compiles
    for itself.
    """
    options: dict[str, Any] = {"nogil": True, **_ARITHMETIC}
    in_use: list[Callable[..., Any]] = []
    lock = threading.Lock()

    def first(*arguments: Any) -> None:
        try:
            found = numba.njit(cache=True, **options)(function)
            found(*arguments)
        except Exception as error:  # Whatever a damaged file may lead to.
            _LOGGER.info("%s: machine code is not kept on disk: %s", function.__name__, error)
            found = numba.njit(**options)(function)
            found(*arguments)
        in_use.append(found)

    @functools.wraps(function)
    def run(*arguments: Any) -> None:
        if not in_use:
            with lock:
                if not in_use:
                    first(*arguments)
                    return
        in_use[0](*arguments)

    return cast("_Function", run)


@intrinsic
def _bits(typing: Any, number: Any) -> Any:
    """The bits of a float32 as an int32."""
    return numba.int32(numba.float32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.IntType(32)
    )


@intrinsic
def _number(typing: Any, bits: Any) -> Any:
    """The float32 of the bits of an int32."""
    return numba.float32(numba.int32), lambda context, builder, signature, arguments: builder.bitcast(
        arguments[0], ir.FloatType()
    )


@numba.njit(inline="always", **_ARITHMETIC)
def _power_of_two(t: Any) -> Any:
    """2^t for t <= 100, exactly 1 at 0, exactly 0 below -125.5, NaN for NaN."""
    t = _BELOW if t < _LEAST else t
    rounded = t + _ROUNDER
    f = t - (rounded - _ROUNDER)
    of_fraction = _ONE + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * _P5))))
    bits = _bits(of_fraction) + (_bits(rounded) << _MANTISSA_BITS)  # type: ignore[call-arg]
    return _number(bits)


@numba.njit(inline="always", **_ARITHMETIC)
def _distance(a: Any, b: Any, is_squared: bool) -> Any:
    difference = a - b
    return difference * difference if is_squared else abs(difference)


@numba.njit
def _lay_out(x: Any, columns: Any, first: int, laid_out: Any) -> None:
    """Columns of the rows of x from `first` on, one after the other, into laid_out, (columns * _STRETCH,)."""
    for j in range(len(columns)):
        for i in range(min(_STRETCH, len(x) - first)):
            laid_out[j * _STRETCH + i] = x[first + i, columns[j]]


@numba.njit(inline="always")
def _smaller(a: Any, b: Any) -> Any:
    """The smaller of a and b, and at most 1; NaN if either is."""
    smaller = b if b < a else a
    return _ONE if smaller > _ONE else smaller


@numba.njit(**_ARITHMETIC)
def _set_powers(t: Any, up: Any, down: Any) -> None:
    """2^t and 2^-t for |t| <= 60, with a product that rounds to 1 or the next number above; something for other t."""
    for i in range(len(t)):
        up[i] = _power_of_two(_NEAR if abs(t[i]) > _NEAR else t[i])
        inverse = _ONE / up[i]
        if up[i] * inverse < _ONE:
            inverse = _number(_bits(inverse) + np.int32(1))  # type: ignore[call-arg]
        down[i] = inverse


@_compiled
def fill_product(
    z: Any, x: Any, numbers: Any, categories: Any, losses: Any, is_squared: bool, out: Any
) -> None:
    """out[r, i] = 2^-(sum_j |z_rj - x_ij|^power + sum_c losses_c [z_rc != x_ic]).

    z: (n, k), x: (m, k), float32, contiguous as all arrays here; numbers, categories: places of columns j and c,
    int64; losses: one for each category, float32; is_squared: power is 2 rather than 1; out: (n, m).
    """
    n_padded = -(-len(numbers) // _UNROLLED) * _UNROLLED
    of_x = np.zeros(n_padded * _STRETCH, np.float32)  # Columns of zeros on both sides fill it up to fours.
    codes = np.zeros(len(categories) * _STRETCH, np.float32)
    of_z = np.zeros(n_padded, np.float32)
    total = np.zeros(_STRETCH, np.float32)
    for first in range(0, len(x), _STRETCH):
        _lay_out(x, numbers, first, of_x)
        _lay_out(x, categories, first, codes)
        for r in range(len(z)):
            for j in range(len(numbers)):
                of_z[j] = z[r, numbers[j]]
            total[:] = _ZERO
            for j in range(0, n_padded, _UNROLLED):
                z0, z1, z2, z3 = of_z[j], of_z[j + 1], of_z[j + 2], of_z[j + 3]
                at = j * _STRETCH
                for i in range(_STRETCH):
                    d0 = _distance(of_x[at + i], z0, is_squared)
                    d1 = _distance(of_x[at + _STRETCH + i], z1, is_squared)
                    d2 = _distance(of_x[at + 2 * _STRETCH + i], z2, is_squared)
                    d3 = _distance(of_x[at + 3 * _STRETCH + i], z3, is_squared)
                    total[i] -= (d0 + d1) + (d2 + d3)
            for c in range(len(categories)):
                code, loss, at = z[r, categories[c]], losses[c], c * _STRETCH
                for i in range(_STRETCH):
                    total[i] -= loss if codes[at + i] != code else _ZERO
            for i in range(min(_STRETCH, len(x) - first)):
                out[r, first + i] = _power_of_two(total[i])


@_compiled
def fill_anova(
    z: Any,
    x: Any,
    numbers: Any,
    categories: Any,
    rests: Any,
    shares: Any,
    kept: Any,
    is_squared: bool,
    out: Any,
) -> None:
    """out[r, i] = prod_j (rests_j + shares_j 2^-|z_rj - x_ij|^power) prod_c (kept_c if z_rc != x_ic else 1).

    rests, shares: two for each of `numbers`, with the sum 1; kept: one for each category. The others as for
    `fill_product`.

    2^-|z - x| is the smaller of 2^z 2^-x and 2^x 2^-z, and these powers are those of a row rather than of a pair. Where
    they could overflow, and with the power 2, every pair takes a power of its own.
    """
    size = len(numbers) * _STRETCH
    of_x, up, down = np.zeros(size, np.float32), np.zeros(size, np.float32), np.zeros(size, np.float32)
    codes = np.zeros(len(categories) * _STRETCH, np.float32)
    is_near = np.zeros(len(numbers), np.bool_)
    total = np.zeros(_STRETCH, np.float32)
    of_z = np.zeros((len(z), len(numbers)), np.float32)
    for r in range(len(z)):
        for j in range(len(numbers)):
            of_z[r, j] = z[r, numbers[j]]
    up_of_z, down_of_z = np.zeros_like(of_z), np.zeros_like(of_z)
    _set_powers(of_z.reshape(-1), up_of_z.reshape(-1), down_of_z.reshape(-1))
    for first in range(0, len(x), _STRETCH):
        _lay_out(x, numbers, first, of_x)
        _lay_out(x, categories, first, codes)
        _set_powers(of_x, up, down)
        for j in range(len(numbers)):
            is_near[j] = not is_squared
            for i in range(j * _STRETCH, (j + 1) * _STRETCH):
                is_near[j] &= abs(of_x[i]) <= _NEAR
        for r in range(len(z)):
            total[:] = _ONE
            for j in range(len(numbers)):
                rest, share, at = rests[j], shares[j], j * _STRETCH
                number, z_up, z_down = of_z[r, j], up_of_z[r, j], down_of_z[r, j]
                is_z_near = not is_squared and abs(number) <= _NEAR
                if is_z_near and is_near[j]:
                    for i in range(_STRETCH):
                        total[i] *= rest + share * _smaller(up[at + i] * z_down, down[at + i] * z_up)
                    continue
                near = _NEAR if is_z_near else -_ONE
                for i in range(_STRETCH):
                    by_parts = _smaller(up[at + i] * z_down, down[at + i] * z_up)
                    whole = _power_of_two(-_distance(of_x[at + i], number, is_squared))
                    total[i] *= rest + share * (by_parts if abs(of_x[at + i]) <= near else whole)
            for c in range(len(categories)):
                code, factor, at = z[r, categories[c]], kept[c], c * _STRETCH
                for i in range(_STRETCH):
                    total[i] *= factor if codes[at + i] != code else _ONE
            for i in range(min(_STRETCH, len(x) - first)):
                out[r, first + i] = total[i]


@_compiled
def add_differences(
    z: Any, x: Any, numbers: Any, categories: Any, is_squared: bool, weighted: Any, found: Any
) -> None:
    """found[s, j] += sum_ri weighted_ri |z_rj - x_ij|^power, or [z_rj != x_ij] for a category, over the strip s of z.

    weighted: (n, m), float32; found: (-(-n // STRIP_ROWS), columns), float64, numbers first. Sums of a strip are in
    float32, one for each row of a stretch of x.
    """
    n_columns = len(numbers) + len(categories)
    of_x = np.zeros(n_columns * _STRETCH, np.float32)
    sums, part = np.zeros_like(of_x), np.zeros(_UNROLLED * _STRETCH, np.float32)
    for strip in range(len(found)):
        end = min(len(z), (strip + 1) * STRIP_ROWS)
        for first in range(0, len(x), _STRETCH):
            _lay_out(x, numbers, first, of_x)
            _lay_out(x, categories, first, of_x[len(numbers) * _STRETCH :])
            width = min(_STRETCH, len(x) - first)
            sums[:], part[:] = _ZERO, _ZERO
            for r in range(strip * STRIP_ROWS, end, _UNROLLED):
                # Four rows at a time, the last one again, with the weight 0, where there are fewer.
                for row in range(_UNROLLED):
                    for i in range(width):
                        part[row * _STRETCH + i] = weighted[r + row, first + i] if r + row < end else _ZERO
                r1, r2, r3 = min(r + 1, end - 1), min(r + 2, end - 1), min(r + 3, end - 1)
                for j in range(len(numbers)):
                    at = j * _STRETCH
                    z0, z1, z2, z3 = z[r, numbers[j]], z[r1, numbers[j]], z[r2, numbers[j]], z[r3, numbers[j]]
                    for i in range(_STRETCH):
                        number = of_x[at + i]
                        e0 = part[i] * _distance(number, z0, is_squared)
                        e1 = part[_STRETCH + i] * _distance(number, z1, is_squared)
                        e2 = part[2 * _STRETCH + i] * _distance(number, z2, is_squared)
                        e3 = part[3 * _STRETCH + i] * _distance(number, z3, is_squared)
                        sums[at + i] += (e0 + e1) + (e2 + e3)
                for c in range(len(categories)):
                    at, place = (len(numbers) + c) * _STRETCH, categories[c]
                    z0, z1, z2, z3 = z[r, place], z[r1, place], z[r2, place], z[r3, place]
                    for i in range(_STRETCH):
                        code = of_x[at + i]
                        e0 = part[i] * (_ONE if code != z0 else _ZERO)
                        e1 = part[_STRETCH + i] * (_ONE if code != z1 else _ZERO)
                        e2 = part[2 * _STRETCH + i] * (_ONE if code != z2 else _ZERO)
                        e3 = part[3 * _STRETCH + i] * (_ONE if code != z3 else _ZERO)
                        sums[at + i] += (e0 + e1) + (e2 + e3)
            for j in range(n_columns):
                for i in range(width):
                    found[strip, j] += sums[j * _STRETCH + i]


@_compiled
def add_shared(
    z: Any, x: Any, numbers: Any, rests: Any, shares: Any, is_squared: bool, weighted: Any, found: Any
) -> None:
    """found[s, 0, j] += sum_ri t_rij and found[s, 1, j] += sum_ri t_rij e_rij over the strip s of z, where

    e = |z_rj - x_ij|^power,   t = weighted_ri shares_j 2^-e / (rests_j + shares_j 2^-e).

    found: (-(-n // STRIP_ROWS), 2, len(numbers)), float64. The others as for `add_differences`.
    """
    of_x = np.zeros(len(numbers) * _STRETCH, np.float32)
    sums, with_e = np.zeros_like(of_x), np.zeros_like(of_x)
    part = np.zeros(_STRETCH, np.float32)
    for strip in range(len(found)):
        end = min(len(z), (strip + 1) * STRIP_ROWS)
        for first in range(0, len(x), _STRETCH):
            _lay_out(x, numbers, first, of_x)
            width = min(_STRETCH, len(x) - first)
            sums[:], with_e[:], part[:] = _ZERO, _ZERO, _ZERO
            for r in range(strip * STRIP_ROWS, end):
                for i in range(width):
                    part[i] = weighted[r, first + i]
                for j in range(len(numbers)):
                    number, rest, share, at = z[r, numbers[j]], rests[j], shares[j], j * _STRETCH
                    for i in range(_STRETCH):
                        e = _distance(of_x[at + i], number, is_squared)
                        factor = share * _power_of_two(-e)
                        t = part[i] * factor / (rest + factor)
                        sums[at + i] += t
                        with_e[at + i] += t * e
            for j in range(len(numbers)):
                for i in range(width):
                    found[strip, 0, j] += sums[j * _STRETCH + i]
                    found[strip, 1, j] += with_e[j * _STRETCH + i]
