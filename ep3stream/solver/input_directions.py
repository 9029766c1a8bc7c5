"""Leading directions of wide inputs: points of fewer features, so that a block of a kernel of distances costs less.

Points x are projected onto the leading eigenvectors V of the covariance C of a sample, and stretched by one number:

    x -> (tr C / tr V'CV)^(1/2) V'x,

so that squared distances keep their mean and K(x, x) stays 1.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import Literal

import torch
from torch import Tensor

from ep3stream.solver.kernels import Kernel

# `auto` leaves none out of fewer or more features, nor where more than this share of them would stay.
_FEWEST_INPUTS, _MOST_INPUTS, _MOST_SHARE = 64, 2048, 0.5
# The root mean square error of K(x, z) over pairs of rows that `auto` allows.
PAIR_ERROR = 0.015
_PAIRED_ROWS = 1024


def narrowing(
    points: Tensor, rank: int | Literal["auto"], kernel: Callable[[Tensor], Kernel]
) -> Tensor | None:
    """The directions, (D, k), for points of which (n, D) are a sample in random order; None to keep all.

    rank: k, or `auto` for the fewest that keep the error of K on pairs of rows, as a root mean square, below 0.015; of
    rows that the directions were not measured on. None where these are more than half of D. kernel: the kernel for
    given points, with its bandwidth measured on them. O(min(n, D)^2 max(n, D)) time.
    """
    n, d = points.shape
    if rank != "auto":
        return leading(points, rank) if rank < d else None
    high, half = int(_MOST_SHARE * d), n // 2
    if not _FEWEST_INPUTS <= d <= _MOST_INPUTS or half < high:
        return None
    first, others = points[:half], points[half : half + _PAIRED_ROWS]
    basis, expected = leading(first, high), _pairs(kernel(points), others)
    kept = points @ basis
    total, parts = points.double().var(0).sum(), kept.double().var(0).cumsum(0)

    def error(k: int) -> float:
        narrow = kept[:, :k] * float((total / parts[k - 1]).sqrt())
        found = _pairs(kernel(narrow), narrow[half : half + _PAIRED_ROWS])
        return float((found - expected).square().mean().sqrt())

    low, high = 0, basis.shape[1]
    if error(high) > PAIR_ERROR:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= PAIR_ERROR else (middle, high)
    return leading(points, high)


def leading(points: Tensor, k: int) -> Tensor:
    """(D, k), the k leading directions of points, (n, D), stretched; fewer where there are not so many.

    From eigenvectors in float64 of the covariance or, with fewer rows than features, of the rows' products.
    """
    centred = points.double() - points.double().mean(0)
    n, d = centred.shape
    values, vectors = torch.linalg.eigh(centred.T @ centred if d <= n else centred @ centred.T)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    n_kept = min(k, int((values > torch.finfo(points.dtype).eps * values[0]).sum()))
    values, vectors, total = values[:n_kept], vectors[:, :n_kept], values.sum()
    if d > n:
        vectors = (centred.T @ vectors) / values.sqrt()
    stretch = (total / values.sum()).sqrt()
    found: Tensor = (stretch * vectors).to(points.dtype).contiguous()
    return found


def _pairs(kernel: Kernel, points: Tensor) -> Tensor:
    """K of the first half of the points with the second."""
    half = len(points) // 2
    return kernel.block(kernel.left(points[:half]), kernel.right(points[half:]))
