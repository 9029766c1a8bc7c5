"""Loops of the kernels on columns, compiled by Numba for the processor at hand.

torch makes a pass over a strip for each operation, and each pass loads and stores every value. Here a stretch of a
row goes through four columns at a time in registers, and 2^t is a polynomial that the compiler turns into vector
instructions: no call for each value, no table.

A value depends on its two rows alone: neither on the place in the block nor on the number of threads.
"""

from __future__ import annotations

from typing import Any

import numba
import numpy as np
from llvmlite import ir
from numba.extending import intrinsic

from ep3stream.solver.compiling import ARITHMETIC, compiled

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
_ONE, _ZERO = np.float32(1), np.float32(0)
# Below it 2^t is 0 rather than a number that is too small to be normal, with which processors are slow.
_LEAST, _BELOW = np.float32(-125.5), np.float32(-127)
_MANTISSA_BITS = np.int32(23)
# 2^t and its product with another such power are normal numbers.
_NEAR = np.float32(60)


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


@numba.njit(inline="always", **ARITHMETIC)
def _power_of_two(t: Any) -> Any:
    """2^t for t <= 100, exactly 1 at 0, exactly 0 below -125.5, NaN for NaN."""
    t = _BELOW if t < _LEAST else t
    rounded = t + _ROUNDER
    f = t - (rounded - _ROUNDER)
    of_fraction = _ONE + f * (_P1 + f * (_P2 + f * (_P3 + f * (_P4 + f * _P5))))
    bits = _bits(of_fraction) + (_bits(rounded) << _MANTISSA_BITS)  # type: ignore[call-arg]
    return _number(bits)


@numba.njit(inline="always", **ARITHMETIC)
def _distance(a: Any, b: Any, is_squared: bool) -> Any:
    difference = a - b
    return difference * difference if is_squared else abs(difference)


@numba.njit
def _lay_out(x: Any, columns: Any, first: int, laid_out: Any) -> None:
    """Columns of the rows of x from `first` on, one after the other, into laid_out, (columns, _STRETCH)."""
    for j in range(len(columns)):
        for i in range(min(_STRETCH, len(x) - first)):
            laid_out[j, i] = x[first + i, columns[j]]


@numba.njit(inline="always")
def _smaller(a: Any, b: Any) -> Any:
    """The smaller of a and b; NaN if both are."""
    return b if b < a else a


@numba.njit(**ARITHMETIC)
def _set_powers(t: Any, share: Any, up: Any, down: Any) -> None:
    """sqrt(share) 2^t and sqrt(share) 2^-t for |t| <= 60; something for other t.

    Their product rounds to the share or the next number above.
    """
    root = np.sqrt(share)
    for i in range(len(t)):
        up[i] = root * _power_of_two(_NEAR if abs(t[i]) > _NEAR else t[i])
        inverse = share / up[i] if share > _ZERO else _ZERO
        if up[i] * inverse < share:
            inverse = _number(_bits(inverse) + np.int32(1))  # type: ignore[call-arg]
        down[i] = inverse


@numba.njit(inline="always", **ARITHMETIC)
def _shared(by_parts: Any, near: Any, number: Any, z: Any, share: Any, is_squared: bool) -> Any:
    """share 2^-|number - z|^power: `by_parts`, or where the number is not near, by a power of its own."""
    whole = share * _power_of_two(-_distance(number, z, is_squared))
    return by_parts if abs(number) <= near else whole


@compiled(ARITHMETIC)
def fill_product(
    z: Any, x: Any, numbers: Any, categories: Any, losses: Any, is_squared: bool, out: Any
) -> None:
    """out[r, i] = 2^-(sum_j |z_rj - x_ij|^power + sum_c losses_c [z_rc != x_ic]).

    z: (n, k), x: (m, k), float32, contiguous as all arrays here; numbers, categories: places of columns j and c,
    int64; losses: one for each category, float32; is_squared: power is 2 rather than 1; out: (n, m).
    """
    n_padded = -(-len(numbers) // _UNROLLED) * _UNROLLED
    of_x = np.zeros((n_padded, _STRETCH), np.float32)  # Columns of zeros on both sides fill it up to fours.
    codes = np.zeros((len(categories), _STRETCH), np.float32)
    of_z = np.zeros(n_padded, np.float32)
    total = np.zeros(_STRETCH, np.float32)
    for first in range(0, len(x), _STRETCH):
        _lay_out(x, numbers, first, of_x)
        _lay_out(x, categories, first, codes)
        width = min(_STRETCH, len(x) - first)
        for r in range(len(z)):
            for j in range(len(numbers)):
                of_z[j] = z[r, numbers[j]]
            total[:] = _ZERO
            for j in range(0, n_padded, _UNROLLED):
                z0, z1, z2, z3 = of_z[j], of_z[j + 1], of_z[j + 2], of_z[j + 3]
                x0, x1, x2, x3 = of_x[j], of_x[j + 1], of_x[j + 2], of_x[j + 3]
                for i in range(_STRETCH):
                    d0 = _distance(x0[i], z0, is_squared)
                    d1 = _distance(x1[i], z1, is_squared)
                    d2 = _distance(x2[i], z2, is_squared)
                    d3 = _distance(x3[i], z3, is_squared)
                    total[i] -= (d0 + d1) + (d2 + d3)
            for c in range(len(categories)):
                code, loss, own = z[r, categories[c]], losses[c], codes[c]
                for i in range(_STRETCH):
                    total[i] -= loss if own[i] != code else _ZERO
            row = out[r, first : first + width]
            for i in range(width):
                row[i] = _power_of_two(total[i])


@compiled(ARITHMETIC)
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

    share 2^-|z - x| is the smaller of two products, of 2^z and 2^-x or 2^x and 2^-z, each times sqrt(share), and these
    powers are those of a row rather than of a pair. Where they could overflow, and with the power 2, every pair takes a
    power of its own. On equal rows each factor is 1 or a little more, and what is above 1 in the end is set to 1.
    """
    n_padded = len(numbers) + len(numbers) % 2  # A column that is 1 everywhere fills it up to twos.
    of_x, of_z = np.zeros((n_padded, _STRETCH), np.float32), np.zeros((n_padded, len(z)), np.float32)
    up, down = np.zeros_like(of_x), np.zeros_like(of_x)
    up_of_z, down_of_z = np.zeros_like(of_z), np.zeros_like(of_z)
    rest, share = np.ones(n_padded, np.float32), np.zeros(n_padded, np.float32)
    codes = np.zeros((len(categories), _STRETCH), np.float32)
    is_near = np.zeros(n_padded, np.bool_)
    total = np.zeros(_STRETCH, np.float32)
    for j in range(len(numbers)):
        rest[j], share[j] = rests[j], shares[j]
        for r in range(len(z)):
            of_z[j, r] = z[r, numbers[j]]
        _set_powers(of_z[j], share[j], up_of_z[j], down_of_z[j])
    for first in range(0, len(x), _STRETCH):
        _lay_out(x, numbers, first, of_x)
        _lay_out(x, categories, first, codes)
        width = min(_STRETCH, len(x) - first)
        for j in range(n_padded):
            _set_powers(of_x[j], share[j], up[j], down[j])
            is_near[j] = not is_squared
            for i in range(_STRETCH):
                is_near[j] &= abs(of_x[j, i]) <= _NEAR
        for r in range(len(z)):
            total[:] = _ONE
            for j in range(0, n_padded, 2):
                rest0, up0, down0, z_up0, z_down0 = rest[j], up[j], down[j], up_of_z[j, r], down_of_z[j, r]
                k = j + 1
                rest1, up1, down1, z_up1, z_down1 = rest[k], up[k], down[k], up_of_z[k, r], down_of_z[k, r]
                z0, z1 = of_z[j, r], of_z[k, r]
                near0 = -_ONE if is_squared or abs(z0) > _NEAR else _NEAR
                near1 = -_ONE if is_squared or abs(z1) > _NEAR else _NEAR
                if is_near[j] and is_near[k] and near0 > _ZERO and near1 > _ZERO:
                    for i in range(_STRETCH):
                        factor0 = rest0 + _smaller(up0[i] * z_down0, down0[i] * z_up0)
                        factor1 = rest1 + _smaller(up1[i] * z_down1, down1[i] * z_up1)
                        total[i] *= factor0 * factor1
                    continue
                x0, x1, share0, share1 = of_x[j], of_x[k], share[j], share[k]
                for i in range(_STRETCH):
                    parts0 = _smaller(up0[i] * z_down0, down0[i] * z_up0)
                    parts1 = _smaller(up1[i] * z_down1, down1[i] * z_up1)
                    factor0 = rest0 + _shared(parts0, near0, x0[i], z0, share0, is_squared)
                    factor1 = rest1 + _shared(parts1, near1, x1[i], z1, share1, is_squared)
                    total[i] *= factor0 * factor1
            for c in range(len(categories)):
                code, factor, own = z[r, categories[c]], kept[c], codes[c]
                for i in range(_STRETCH):
                    total[i] *= factor if own[i] != code else _ONE
            row = out[r, first : first + width]
            for i in range(width):
                row[i] = _ONE if total[i] > _ONE else total[i]


@compiled(ARITHMETIC)
def add_differences(
    z: Any, x: Any, numbers: Any, categories: Any, is_squared: bool, weighted: Any, found: Any
) -> None:
    """found[s, j] += sum_ri weighted_ri |z_rj - x_ij|^power, or [z_rj != x_ij] for a category, over the strip s of z.

    weighted: (n, m), float32; found: (-(-n // STRIP_ROWS), columns), float64, numbers first. Sums of a strip are in
    float32, one for each row of a stretch of x.
    """
    n_columns = len(numbers) + len(categories)
    of_x = np.zeros((n_columns, _STRETCH), np.float32)
    sums, part = np.zeros_like(of_x), np.zeros((_UNROLLED, _STRETCH), np.float32)
    p0, p1, p2, p3 = part[0], part[1], part[2], part[3]
    for strip in range(len(found)):
        end = min(len(z), (strip + 1) * STRIP_ROWS)
        for first in range(0, len(x), _STRETCH):
            _lay_out(x, numbers, first, of_x)
            _lay_out(x, categories, first, of_x[len(numbers) :])
            width = min(_STRETCH, len(x) - first)
            sums[:], part[:] = _ZERO, _ZERO
            for r in range(strip * STRIP_ROWS, end, _UNROLLED):
                # Four rows at a time, the last one again, with the weight 0, where there are fewer.
                for row in range(_UNROLLED):
                    if r + row < end:
                        part[row, :width] = weighted[r + row, first : first + width]
                    else:
                        part[row] = _ZERO
                r1, r2, r3 = min(r + 1, end - 1), min(r + 2, end - 1), min(r + 3, end - 1)
                for j in range(len(numbers)):
                    at, own, total = numbers[j], of_x[j], sums[j]
                    z0, z1, z2, z3 = z[r, at], z[r1, at], z[r2, at], z[r3, at]
                    for i in range(_STRETCH):
                        e0 = p0[i] * _distance(own[i], z0, is_squared)
                        e1 = p1[i] * _distance(own[i], z1, is_squared)
                        e2 = p2[i] * _distance(own[i], z2, is_squared)
                        e3 = p3[i] * _distance(own[i], z3, is_squared)
                        total[i] += (e0 + e1) + (e2 + e3)
                for c in range(len(categories)):
                    at, own, total = categories[c], of_x[len(numbers) + c], sums[len(numbers) + c]
                    z0, z1, z2, z3 = z[r, at], z[r1, at], z[r2, at], z[r3, at]
                    for i in range(_STRETCH):
                        e0 = p0[i] * (_ONE if own[i] != z0 else _ZERO)
                        e1 = p1[i] * (_ONE if own[i] != z1 else _ZERO)
                        e2 = p2[i] * (_ONE if own[i] != z2 else _ZERO)
                        e3 = p3[i] * (_ONE if own[i] != z3 else _ZERO)
                        total[i] += (e0 + e1) + (e2 + e3)
            for j in range(n_columns):
                for i in range(width):
                    found[strip, j] += sums[j, i]


@compiled(ARITHMETIC)
def add_shared(
    z: Any, x: Any, numbers: Any, rests: Any, shares: Any, is_squared: bool, weighted: Any, found: Any
) -> None:
    """found[s, 0, j] += sum_ri t_rij and found[s, 1, j] += sum_ri t_rij e_rij over the strip s of z, where

    e = |z_rj - x_ij|^power,   t = weighted_ri shares_j 2^-e / (rests_j + shares_j 2^-e).

    found: (-(-n // STRIP_ROWS), 2, len(numbers)), float64. The others as for `add_differences`.
    """
    of_x = np.zeros((len(numbers), _STRETCH), np.float32)
    sums, with_e = np.zeros_like(of_x), np.zeros_like(of_x)
    part = np.zeros(_STRETCH, np.float32)
    for strip in range(len(found)):
        end = min(len(z), (strip + 1) * STRIP_ROWS)
        for first in range(0, len(x), _STRETCH):
            _lay_out(x, numbers, first, of_x)
            width = min(_STRETCH, len(x) - first)
            sums[:], with_e[:], part[:] = _ZERO, _ZERO, _ZERO
            for r in range(strip * STRIP_ROWS, end):
                part[:width] = weighted[r, first : first + width]
                for j in range(len(numbers)):
                    number, rest, share = z[r, numbers[j]], rests[j], shares[j]
                    own, sums_of_t, sums_of_te = of_x[j], sums[j], with_e[j]
                    for i in range(_STRETCH):
                        e = _distance(own[i], number, is_squared)
                        factor = share * _power_of_two(-e)
                        t = part[i] * factor / (rest + factor)
                        sums_of_t[i] += t
                        sums_of_te[i] += t * e
            for j in range(len(numbers)):
                for i in range(width):
                    found[strip, 0, j] += sums[j, i]
                    found[strip, 1, j] += with_e[j, i]
