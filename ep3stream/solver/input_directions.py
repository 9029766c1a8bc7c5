"""Leading directions of wide inputs: points of fewer features, so that a block of a kernel of distances costs less.

Points x are projected onto the k leading eigenvectors V of the covariance of a sample with mean m. How far x lies from
their span stays as one more feature, so that points that lie far out do not look like points near the mean; and all
features are stretched by one number s, so that squared distances keep their mean:

    x -> s (V'(x - m), |(I - V V')(x - m)|).

The kernel is one of points in a space of k + 1 dimensions: positive semidefinite, and K(x, x) stays 1.
"""

from __future__ import annotations

import logging
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep3stream.solver.kernels import Kernel
from ep3stream.solver.small_regression import SmallRegression

_LOGGER = logging.getLogger(__name__)

# `auto` leaves none out of fewer or more features, nor where more than this share of them would stay.
_FEWEST_INPUTS, _MOST_INPUTS, _MOST_SHARE = 64, 2048, 0.5
# The root mean square error of K(x, z) over pairs of rows that `auto` allows.
PAIR_ERROR = 0.015
_PAIRED_ROWS = 1024
# Eigenvalues of a product of float32 that are smaller, in units of its rounding, are none.
_ROUNDING = 10
# Of the small models that are compared: the centers.
_SMALL_CENTERS = 512

BASIS, ORIGIN = "input_leading", "input_origin"


@dataclass(frozen=True, slots=True)
class LeadingDirections:
    """Maps points, (n, D), to (n, k + 1): along k leading directions, and the distance from their span.

    basis: V, (D, k), orthonormal columns; origin: m, (D,); stretch: s.
    """

    basis: Tensor
    origin: Tensor
    stretch: float = 1.0

    @property
    def n_features(self) -> int:
        """k + 1."""
        return self.basis.shape[1] + 1

    def __call__(self, points: Tensor) -> Tensor:
        """The features of points, (n, D) or (D,): (n, k + 1) or (k + 1,)."""
        centred = points - self.origin.to(points)
        along = centred @ self.basis.to(points)
        # By Pythagoras: what rounding adds to squared distances is as small as what it adds in a block.
        squares = [torch.linalg.vecdot(each, each) for each in (centred, along)]
        rest = (squares[0] - squares[1]).clamp_min(0).sqrt()
        return torch.cat([along, rest[..., None]], -1).mul_(self.stretch)

    @property
    def main_inputs(self) -> Tensor:
        """The number of the input that has the largest part in each feature, (k + 1,)."""
        squares = self.basis.square()
        return torch.cat([squares.argmax(0), (1 - squares.sum(1)).argmax()[None]])

    def to(self, device: torch.device) -> LeadingDirections:
        """The same on another device."""
        return replace(self, basis=self.basis.to(device), origin=self.origin.to(device))

    def tensors(self) -> dict[str, Tensor]:
        """By name, for a set-up or a model."""
        return {BASIS: self.basis, ORIGIN: self.origin}

    def description(self) -> dict[str, Any]:
        """What `tensors` leaves out, as JSON."""
        return {"shape": list(self.basis.shape), "stretch": self.stretch}

    @classmethod
    def described(
        cls, tensors: Mapping[str, Tensor], found: Mapping[str, Any], n_inputs: int
    ) -> LeadingDirections:
        """From what `tensors` and `description` gave; KeyError, TypeError or ValueError if impossible."""
        basis, origin, stretch = tensors[BASIS], tensors[ORIGIN], found["stretch"]
        is_possible = (
            basis.ndim == 2 and len(basis) == n_inputs and basis.numel() and origin.shape == (n_inputs,)
        )
        if not is_possible or list(basis.shape) != found["shape"]:
            raise ValueError(
                f"inputs has leading directions {found['shape']!r:.50}, but they are {tuple(basis.shape)} and "
                f"{tuple(origin.shape)} for {n_inputs} features"
            )
        if type(stretch) is not float or not 0 < stretch < math.inf:
            raise ValueError(f"inputs has the stretch {stretch!r:.50}")
        return cls(basis, origin, stretch)


def may_narrow(n_inputs: int) -> bool:
    """Whether directions are worth looking for among so many inputs, and can be found in seconds."""
    return _FEWEST_INPUTS <= n_inputs <= _MOST_INPUTS


def narrowing(
    points: Tensor, targets: Tensor, kernel: Callable[[Tensor], Kernel]
) -> LeadingDirections | None:
    """The fewest directions that are good enough for points of which (n, D) are a sample in random order, if any.

    The error of K on pairs of rows, as a root mean square, is below 0.015, with at most half as many directions as
    inputs; and on the second half of the rows, a small model of these directions errs no more than one of all inputs,
    by a standard error. Otherwise None.

    targets: (n, c), coded. kernel: the kernel for given points, with its bandwidth measured on them.
    O(min(n, D)^2 max(n, D)) time.
    """
    n, d = points.shape
    most, half = int(_MOST_SHARE * d), n // 2
    if not may_narrow(d) or half < most:
        return None
    first, others = points[:half], points[half:]
    found = fewest(first, others[:_PAIRED_ROWS], most, kernel)
    if found is None:
        return None
    expected, narrow = (
        _squares(points if directions is None else directions(points), targets, half, kernel)
        for directions in (None, found)
    )
    excess = (narrow - expected).double().sum(1)
    mean, error = float(excess.mean()), float(excess.std()) / math.sqrt(len(excess))
    _LOGGER.debug(
        "%d directions of %d: %.4g more error, standard error %.2g", found.basis.shape[1], d, mean, error
    )
    return found if mean <= error else None


def fewest(
    points: Tensor, others: Tensor, most: int, kernel: Callable[[Tensor], Kernel]
) -> LeadingDirections | None:
    """The fewest leading directions of points, (n, D), by which K of pairs of `others` errs by less than 0.015.

    None where that takes more than `most`.
    """
    widest, expected = _unstretched(points, most), _pairs(kernel(others), others)
    total, features = float(others.double().var(0).sum()), widest(others)

    def error(k: int) -> float:
        narrow = _first(features, k)
        narrow = narrow * _stretch(total, narrow)
        return float((_pairs(kernel(narrow), narrow) - expected).square().mean().sqrt())

    low, high = 0, widest.basis.shape[1]
    if error(high) > PAIR_ERROR:
        return None
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (low, middle) if error(middle) <= PAIR_ERROR else (middle, high)
    return _stretched(replace(widest, basis=widest.basis[:, :high].contiguous()), points)


def leading(points: Tensor, k: int) -> LeadingDirections | None:
    """The k leading directions of points, (n, D), or fewer where there are not so many; None for as many as inputs."""
    return _stretched(_unstretched(points, k), points) if k < points.shape[1] else None


def _unstretched(points: Tensor, k: int) -> LeadingDirections:
    """The k leading directions of points, (n, D); fewer where there are not so many.

    From eigenvectors of the covariance or, with fewer rows than features and then in float64, of the rows' products.
    """
    origin = points.mean(0)
    centred = points - origin
    n, d = centred.shape
    products = centred.T @ centred if d <= n else (centred @ centred.T).double()
    values, vectors = torch.linalg.eigh(products)
    values, vectors = values.flip(0).clamp_min(0), vectors.flip(1)
    n_kept = min(k, int((values > _ROUNDING * torch.finfo(points.dtype).eps * values[0]).sum()))
    vectors = vectors[:, :n_kept]
    if d > n:
        vectors = (centred.double().T @ vectors) / values[:n_kept].sqrt()
    return LeadingDirections(vectors.to(points.dtype).contiguous(), origin)


def _first(features: Tensor, k: int) -> Tensor:
    """Features of the k first of more directions, (n, k + 1), from those of all; the rest by Pythagoras."""
    along, beyond = features[:, :k], features[:, k:]
    return torch.cat([along, torch.linalg.vector_norm(beyond, dim=1, keepdim=True)], 1)


def _stretched(directions: LeadingDirections, points: Tensor) -> LeadingDirections:
    """Directions of stretch 1 with the stretch for points, (n, D)."""
    total = float(points.double().var(0).sum())
    return replace(directions, stretch=_stretch(total, directions(points)))


def _stretch(total: float, features: Tensor) -> float:
    """What features, (n, k + 1), are multiplied by, so that squared distances have the mean that 2 `total` is."""
    kept = float(features.double().var(0).sum())
    return math.sqrt(total / kept) if kept > 0 else 1.0


def _squares(points: Tensor, targets: Tensor, half: int, kernel: Callable[[Tensor], Kernel]) -> Tensor:
    """(f(x) - y)^2 of each row and output of the second half, for a small model of the first."""
    rows, held = (points[:half], targets[:half]), (points[half:], targets[half:])
    return SmallRegression.with_squares(kernel(points), rows, held, min(_SMALL_CENTERS, half))[1]


def _pairs(kernel: Kernel, points: Tensor) -> Tensor:
    """K of the first half of the points with the second."""
    half = len(points) // 2
    return kernel.block(kernel.left(points[:half]), kernel.right(points[half:]))
