"""Regularised least squares on the span of given centers, solved directly: a small problem's whole ridge path.

The objective is that of a fit,

    1/(2n) sum_j |f(x_j) - y_j|^2 + lambda/2 |f|_H^2,     f(x) = sum_{i<=p} alpha_i K(x, z_i),

whose weights solve (K_zx K_xz + n lambda K_zz) alpha = K_zx Y. With K_zz = L L' and the eigenvectors V and
eigenvalues b of L^-1 K_zx K_xz L^-T / n, they are L^-T V (b + lambda)^-1 V' L^-1 K_zx Y / n: every ridge comes
from one Cholesky factor and one eigendecomposition (Rudi, Camoriano and Rosasco 2015, eq. 8). In float64: float32
leaves a smooth kernel's K_zz without its smaller eigenvalues.

Where a fit starts: at the ridge regression of the sampled rows on the basis, not at zero.

The set-up has the features of its sample X_s already, phi_i = W' L^(-1/2) U'K(Z, x_i), L = diag(l + mu), whose second
moments are the eigenvalues tau (`projection.py`). The least-squares problem of these s rows within the basis,

    b = argmin 1/(2s) sum_i w_i |b' phi_i - y_i|^2 + rho/2 |b|^2,        alpha = U H b,

costs next to nothing then, and solves for the leading directions what steps would take several times as many rows for.
rho is what leave-one-out residuals are smallest for, r_i / (1 - h_i) with h the diagonal of the hat matrix (Allen,
"The relationship between variable selection and data augmentation", 1974). Directions with tau above it are as well
known as s rows let them be: a fit passes over the stages whose threshold is higher (`flattening.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.blocks import TILE_ROWS, tiles
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import Points
from ep3stream.solver.targets import TargetCode

# Of the mean of diag(K_zz), added to it; 100 times as much for the next try. Rounding is some 1e-14 of it.
_JITTERS = (1e-12, 1e-10, 1e-8)

# Directions with less of the largest eigenvalue are rounding, and only a ridge of 0 would ask for them.
_NEGLIGIBLE = 1e-12


@dataclass(frozen=True, slots=True)
class RidgePath:
    """The solutions for all ridges.

    centers: p of them, prepared; basis: L^-T V, (p, p); eigenvalues: b, (p,); moments: V' L^-1 K_zx Y / n, (p, c).
    """

    kernel: Kernel
    centers: Points
    targets: TargetCode
    basis: Tensor
    eigenvalues: Tensor
    moments: Tensor

    @classmethod
    def of(cls, kernel: Kernel, centers: Tensor, x: Tensor, y: Tensor, targets: TargetCode) -> RidgePath:
        """From centers (p, d) and rows x (n, d), y as `targets` takes it; O(n p (p + d) + p^3) time.

        Memory: 5 p^2 + 1024 p numbers of float64, and copies of the centers; never n x p.
        Raises ConfigError where K_zz is not positive definite within rounding.
        """
        centers = centers.double()
        z = kernel.left(centers)
        gram = centers.new_zeros(len(centers), len(centers))
        moments = centers.new_zeros(len(centers), targets.n_outputs)
        for rows in tiles(len(x)):
            block = kernel.block(z, kernel.right(x[rows].double()))
            gram.addmm_(block, block.T, alpha=1 / len(x))
            moments.addmm_(block, _coded(targets, y[rows]).T, alpha=1 / len(x))
        factor = _factor(kernel, kernel.block(z, kernel.right(centers)))
        half = torch.linalg.solve_triangular(factor, gram, upper=False)
        whitened = torch.linalg.solve_triangular(factor, half.T, upper=False)
        eigenvalues, vectors = torch.linalg.eigh((whitened + whitened.T).mul_(0.5))
        basis = torch.linalg.solve_triangular(factor.T, vectors, upper=True)
        return cls(kernel, z, targets, basis, eigenvalues, basis.T @ moments)

    def weights(self, ridge: float) -> Tensor:
        """alpha, (p, c), for lambda = ridge >= 0; the least-norm solution for 0."""
        return self.basis @ self._coordinates(ridge)

    def held_out(self, x: Tensor, y: Tensor, ridges: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Scores of every ridge on rows x (h, d) and y: O(h p (p + d)) time, 1024 x p memory.

        The mean squared coded error of each output, (len(ridges), c), and the share of rows whose largest
        output is that of their class, (len(ridges),), nan for regression.
        """
        squares = self.moments.new_zeros(len(ridges), self.targets.n_outputs)
        hits = self.moments.new_zeros(len(ridges))
        solutions = [self._coordinates(ridge) for ridge in ridges]
        for rows in tiles(len(x)):
            features = kernel_rows(self.kernel, self.centers, x[rows]) @ self.basis
            coded = _coded(self.targets, y[rows])
            for place, solution in enumerate(solutions):
                outputs = (features @ solution).T
                squares[place] += (outputs - coded).square().sum(1)
                if self.targets.is_classification:
                    scores = outputs + self.targets.offset[:, None]
                    hits[place] += (scores.argmax(0) == y[rows]).sum()
        return squares / len(x), hits / len(x) if self.targets.is_classification else hits * torch.nan

    def _coordinates(self, ridge: float) -> Tensor:
        damped = self.eigenvalues + ridge
        kept = damped > _NEGLIGIBLE * self.eigenvalues[-1]
        return torch.where(kept, 1 / damped, 0.0)[:, None] * self.moments


def kernel_rows(kernel: Kernel, centers: Points, x: Tensor) -> Tensor:
    """K(X, Z), (n, p), in float64, for x (n, d) of at most TILE_ROWS rows and prepared centers."""
    assert len(x) <= TILE_ROWS
    return kernel.block(centers, kernel.right(x.double())).T


def _factor(kernel: Kernel, k_zz: Tensor) -> Tensor:
    """L of K_zz = L L'; coinciding centers take a little more on the diagonal."""
    level = float(k_zz.diagonal().mean())
    for jitter in _JITTERS:
        damped = k_zz.clone()
        damped.diagonal().add_(jitter * level)
        factor: Tensor
        factor, failed = torch.linalg.cholesky_ex(damped)
        if not int(failed):
            return factor
    raise ConfigError(
        f"the {kernel.name} kernel with {kernel.parameters} is not positive definite on {len(k_zz)} centers; "
        "use another kernel or a smaller bandwidth"
    )


def _coded(targets: TargetCode, y: Tensor) -> Tensor:
    """Coded targets, (c, m), in float64."""
    coded = torch.zeros(targets.n_outputs, len(y), dtype=torch.float64, device=y.device)
    targets.subtract_(coded, y)
    return coded.neg_()


# Of all rows: the running loss is that of rows not trained on, but for these.
_MOST_OF_ROWS = 8

_DECADES, _PER_DECADE = 8, 4

# Outputs that choose rho for all.
_JUDGES = 64


@dataclass(frozen=True, slots=True)
class HeadStart:
    """coefficients: H b, (r, c), float64, alpha = U H b; rho, and the n_rows it was learnt from."""

    coefficients: Tensor
    rho: float
    n_rows: int


def is_worth_it(n_samples: int, epoch_rows: int) -> bool:
    """Whether the sample is few of the rows: it would spoil the honest running loss of the first epoch."""
    return 0 < n_samples * _MOST_OF_ROWS <= epoch_rows


def head_start(
    features: Tensor, half: Tensor, y: Tensor, targets: TargetCode, ridge: float
) -> HeadStart | None:
    """From features phi, (r, s), float64, H, (r, r), and y of the sample, (s,) or (s, c); None if zero is as good.

    O(s r^2) time for rows with weights of their own, O(s r c) without; O(s r) memory.
    """
    n_rows = features.shape[1]
    coded = -_coded_zero(features, y, targets)
    weights = targets.row_weights(y)
    if weights is None:
        tau, turned = features.square().mean(1), features
        rotation = None
    else:
        root = weights.to(features).sqrt()
        coded, features = coded * root, features * root
        tau, rotation = torch.linalg.eigh(features @ features.T / n_rows)
        turned = rotation.T @ features
    tau = tau.clamp_min(0)
    moments = turned @ coded.T / n_rows
    judges = torch.linspace(0, len(coded) - 1, min(_JUDGES, len(coded)), device=coded.device).long()
    rho = _best_rho(turned, tau, moments[:, judges], coded[judges], float(targets.ridges(ridge).max()))
    if rho is None:
        return None
    b = moments / (tau[:, None] + targets.ridges(ridge).to(tau).clamp_min(rho))
    return HeadStart(half @ (b if rotation is None else rotation @ b), rho, n_rows)


def _coded_zero(features: Tensor, y: Tensor, targets: TargetCode) -> Tensor:
    """The residual of the zero model, (c, s)."""
    residual = features.new_zeros(targets.n_outputs, features.shape[1], dtype=targets.offset.dtype)
    targets.subtract_(residual, y)
    return residual.to(features)


def _best_rho(features: Tensor, tau: Tensor, moments: Tensor, coded: Tensor, least: float) -> float | None:
    """The rho, at least `least`, of the smallest sum of squared leave-one-out residuals; None if those of zero are."""
    n_rows, squares = features.shape[1], features.square()
    best, smallest = None, float(coded.square().sum())
    for step in range(1, _DECADES * _PER_DECADE):
        rho = float(tau.max()) * 10 ** (-step / _PER_DECADE)
        if not rho > least:
            break
        weight = 1 / (tau + rho)
        hat = (weight @ squares) / n_rows
        left_out = (coded - (moments * weight[:, None]).T @ features) / (1 - hat).clamp_min(1e-9)
        error = float(left_out.square().sum())
        if error < smallest:
            best, smallest = rho, error
    return best
