"""Which columns tell of the targets, alone or in pairs, by their products' correlations: a start for learnt weights.

A kernel with small weights is nearly linear in each column, so that columns which act in pairs alone have no slope that
rises above noise, and among a hundred columns they would lose their weights before their pair is seen. But a product of
functions of two columns shows itself at once. With the Hermite polynomials h_1(x) = x and h_2(x) = (x^2 - 1) / sqrt(2)
of standardised columns, and r the centred targets,

    z_ij = sum_n r_n h(x_ni) h(x_nj) / sqrt(sum_n (r_n h(x_ni) h(x_nj))^2)

is close to a standard normal number where there is nothing, whatever the scatter of r, and takes two matrix products
for all pairs. Alone a column shows itself by h_1, h_2 and h_3. That is screening by marginal correlations (Fan and Lv,
Journal of the Royal Statistical Society B 2008) with interactions.
"""

from __future__ import annotations

import math

import torch
from torch import Tensor

# The products that the screening takes bound its rows, of which there are at least and at most so many.
_MOST_PRODUCTS = 1e10
_FEWEST_ROWS, _MOST_ROWS = 4096, 50_000
# Outputs that are looked at, random combinations of more of them.
_OUTPUTS = 2
# Standardised values beyond are taken for these.
_FAR = 3.0
# z of the largest of T numbers that mean nothing is near sqrt(2 log T).
_BEYOND_CHANCE = 0.75
_CHUNK = 2048


def telling_columns(x: Tensor, y: Tensor, is_category: Tensor, generator: torch.Generator) -> Tensor:
    """(d,), whether a column tells of the targets, alone or in a pair; of categories, which are few, it is taken so.

    x: (n, d), rows in random order; y: (n, c), targets. O(n d^2) time, of at most 50,000 rows.
    """
    numbers = (~is_category).nonzero()[:, 0].to(x.device)
    telling = is_category.clone().cpu()
    if len(numbers) < 2:
        return torch.ones_like(telling)
    if y.shape[1] > _OUTPUTS:
        y = y @ (torch.randn(y.shape[1], _OUTPUTS, generator=generator) / math.sqrt(_OUTPUTS)).to(y)
    affordable = int(_MOST_PRODUCTS / (16 * len(numbers) ** 2 * y.shape[1]))
    n = min(len(x), _MOST_ROWS, max(_FEWEST_ROWS, affordable))
    values, y = x[:n, numbers], y[:n] - y[:n].mean(0)
    values = ((values - values.mean(0)) / values.std(0).clamp_min(1e-30)).clamp(-_FAR, _FAR)
    largest = torch.zeros(len(numbers), device=x.device)
    for r in y.T:
        largest = torch.maximum(largest, _largest_z(values, r))
    n_tests = y.shape[1] * (3 * len(numbers) + 2 * len(numbers) ** 2)
    telling[numbers.cpu()] = (largest > math.sqrt(2 * math.log(n_tests)) + _BEYOND_CHANCE).cpu()
    return telling


def _largest_z(values: Tensor, r: Tensor) -> Tensor:
    """The largest |z| of each column, (d,), of standardised values, (n, d), alone and in pairs, with r, (n,)."""
    d = values.shape[1]
    sums, squares = values.new_zeros(2, 2 * d, 2 * d)
    alone, alone_squares = values.new_zeros(2, 3 * d)
    for some, some_r in zip(values.split(_CHUNK), r.split(_CHUNK), strict=True):
        square = some.square()
        second, third = (square - 1) / math.sqrt(2), some * (square - 3) / math.sqrt(6)
        weighted = torch.cat([some, second, third], 1) * some_r[:, None]
        alone += weighted.sum(0)
        alone_squares += weighted.square().sum(0)
        functions = torch.cat([some, second], 1)
        sums.addmm_(functions.T, weighted[:, : 2 * d])
        squares.addmm_(functions.square().T, weighted[:, : 2 * d].square())
    tiny = torch.finfo(values.dtype).tiny
    found = (alone / alone_squares.clamp_min(tiny).sqrt()).abs().view(3, d).amax(0)
    paired = (sums / squares.clamp_min(tiny).sqrt()).abs().amax(1).view(2, d).amax(0)
    return torch.maximum(found, paired)
