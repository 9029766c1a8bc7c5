"""Nystrom ridge regressions of some thousand rows in float64: what they err by on held-out rows, and its slopes.

The formulas are in column_weights.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Generic, TypeVar

import torch
from torch import Tensor

from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.tiles import predicted_rows, tiles

K = TypeVar("K", bound=Kernel)

_JITTER = 1e-7
# The ridges that are compared, times the number of rows: the noise's variance, by which a Gaussian process is given.
_NOISES = (0.03, 0.1, 0.3, 1.0, 3.0, 10.0)
_CHUNK = 2048
# Of a triangle of K' K: more leave out more, and make matrix products too narrow to be fast.
_GRAM_STRIPS = 4


def gradients_of(
    kernel: ColumnKernel,
    log_rho: Tensor,
    x: Tensor,
    y: Tensor,
    n_centers: int,
    room: Tensor | None = None,
) -> tuple[float, Tensor, Tensor, Tensor]:
    """The loss, and its slopes by log w, log c, (d,) each, and log rho.

    x: (2n, d), y: (2n, c): n rows to train on, of which the first `n_centers` are the centers, then n held out.
    room: (2n, n_centers), to be overwritten by the block.
    """
    n, rho = len(x) // 2, float(log_rho.exp())
    z = x[:n_centers]
    block = kernel.block(kernel.left(x), kernel.right(z), out=room)
    trained, held, k_zz = block[:n], block[n:], block[:n_centers]
    gram = torch.zeros(n_centers, n_centers, dtype=torch.float64, device=x.device)
    _add_gram(trained, gram)
    factor = _factor(gram.div_(n).add_(k_zz, alpha=rho))
    weights = torch.cholesky_solve(_turned_product(trained, y[:n]).double() / n, factor).to(y)
    fitted = block @ weights
    errors = fitted[n:] - y[n:]
    adjoint = torch.cholesky_solve(_turned_product(held, errors).double() * (2 / n), factor).to(y)
    of_rho = (adjoint * fitted[:n_centers]).sum().double().cpu() * -rho  # K_zz a is part of K_tz a.
    # dL/dK of all rows is left @ right'.
    right = torch.cat([weights, adjoint], 1)
    of_trained = torch.cat([trained @ adjoint * -1, y[:n] - fitted[:n]], 1)
    left = torch.cat([of_trained, torch.cat([errors * 2, torch.zeros_like(errors)], 1)]) / n
    left[:n_centers, : y.shape[1]] -= adjoint * rho
    of_weights, of_shares = torch.zeros(2, x.shape[1], dtype=torch.float64)
    for rows in tiles(len(x), predicted_rows(x.device, n_centers, x.shape[1])):
        slopes = kernel.slopes(x[rows], z, (left[rows] @ right.T).mul_(block[rows]))
        of_weights += slopes[0]
        of_shares += slopes[1]
    return float(errors.square().sum() / n), of_weights, of_shares, of_rho


@dataclass(frozen=True, slots=True)
class SmallRegression(Generic[K]):
    """A Nystrom ridge regression, with the ridge, noise / n, of a few that suits the held-out rows. weights: (m, c)."""

    kernel: K
    z: Tensor
    weights: Tensor
    noise: float
    loss: float

    @classmethod
    def of(
        cls,
        kernel: K,
        pool: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor],
        m: int,
    ) -> SmallRegression[K]:
        """Of all rows of the pool, with the first m of them as centers; O(n m^2) time."""
        return cls.with_squares(kernel, pool, held, m)[0]

    @classmethod
    def with_squares(
        cls,
        kernel: K,
        pool: tuple[Tensor, Tensor],
        held: tuple[Tensor, Tensor],
        m: int,
    ) -> tuple[SmallRegression[K], Tensor]:
        """What `of` gives, and its (f(x) - y)^2 of each held-out row and output."""
        x, y = pool
        z, n = x[:m], len(x)
        right = kernel.right(z)
        gram = torch.zeros(m, m, dtype=torch.float64, device=x.device)
        moment = torch.zeros(m, y.shape[1], dtype=torch.float64, device=x.device)
        for some_x, some_y in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True):
            block = kernel.block(kernel.left(some_x), right)
            _add_gram(block, gram)
            moment += _turned_product(block, some_y)
        k_zz = kernel.block(kernel.left(z), right)
        gram, moment = gram.div_(n), moment.div_(n)
        solved = [
            torch.cholesky_solve(moment, _factor(torch.add(gram, k_zz, alpha=noise / n))).to(y)
            for noise in _NOISES
        ]
        # All ridges with the same blocks: forming these is most of the work.
        together = cls(kernel, z, torch.cat(solved, 1), 0.0, 0.0)
        squares = together.squares(held[0], held[1].repeat(1, len(_NOISES))).unflatten(1, (len(_NOISES), -1))
        losses = squares.double().mean(0).sum(1).tolist()
        best = losses.index(min(losses))
        return cls(kernel, z, solved[best], _NOISES[best], losses[best]), squares[:, best]

    def error(self, x: Tensor, y: Tensor) -> float:
        """Mean of |f(x) - y|^2."""
        return float(self.squares(x, y).sum(1).double().mean())

    def squares(self, x: Tensor, y: Tensor) -> Tensor:
        """(f(x) - y)^2 of each row and output, (n, c)."""
        right = self.kernel.right(self.z)
        found = [
            self.kernel.block(self.kernel.left(some_x), right) @ self.weights - some_y
            for some_x, some_y in zip(x.split(_CHUNK), y.split(_CHUNK), strict=True)
        ]
        return torch.cat(found).square()


def _add_gram(block: Tensor, gram: Tensor) -> None:
    """Adds K' K to the lower triangle of `gram`, (m, m); what it adds above is arbitrary. block: K, (n, m).

    In a few strips, of which each leaves out what lies to its right: 5/8 of the work of the whole product.
    """
    for strip in tiles(len(gram), max(1, -(-len(gram) // _GRAM_STRIPS))):
        gram[strip, : strip.stop] += block[:, strip].T @ block[:, : strip.stop]


def _turned_product(block: Tensor, y: Tensor) -> Tensor:
    """K' Y, (m, c). With few outputs this order takes a tenth of the time of the other on CPUs."""
    return (y.T @ block).T


def _factor(matrix: Tensor) -> Tensor:
    """The Cholesky factor of a matrix that is positive semidefinite but for the rounding of float32; overwrites it."""
    jitter = _JITTER
    while True:
        matrix.diagonal().add_(jitter)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(matrix)
        if not int(failed):
            return factor
        jitter *= 10
