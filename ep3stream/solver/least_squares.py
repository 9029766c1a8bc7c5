"""Ridge regression solved directly: of a small problem for all ridges at once, and of the sample, where a fit starts.

`RidgePath`. The objective is that of a fit,

    1/(2n) sum_j |f(x_j) - y_j|^2 + lambda/2 |f|_H^2,     f(x) = sum_{i<=p} alpha_i K(x, z_i),

and its weights solve (K_zx K_xz + n lambda K_zz) alpha = K_zx Y. With K_zz = L L', and V and b the eigenvectors and
eigenvalues of L^-1 K_zx K_xz L^-T / n,

    alpha = L^-T V (b + lambda)^-1 V' L^-1 K_zx Y / n,

so that one Cholesky factor and one eigendecomposition serve every ridge (Rudi, Camoriano and Rosasco 2015, eq. 8).
In float64: float32 would lose the smaller eigenvalues of a smooth kernel's K_zz.

`HeadStart`. The set-up of the Nystrom projection has the features of its sample X_s, phi_i = W' L^(-1/2) U'K(Z, x_i)
with L = diag(l + mu), whose second moments are the eigenvalues tau (`projection.py`). So the ridge regression of these
s rows within the basis,

    b = argmin 1/(2s) sum_i w_i |b' phi_i - y_i|^2 + rho/2 |b|^2,        alpha = U H b,

costs next to nothing, and steps would need several times as many rows to learn its leading directions as well. rho has
the smallest leave-one-out residuals r_i / (1 - h_i), h the diagonal of the hat matrix (Allen, "The relationship between
variable selection and data augmentation", 1974). Directions with tau above rho are known as well as s rows allow, so
the fit leaves out the stages with a threshold above rho (`set_up.py`).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import Points
from ep3stream.solver.targets import TargetCode
from ep3stream.solver.tiles import tile_rows, tiles

# Shares of the mean of diag(K_zz) added to the diagonal, one try after the other. Rounding is some 1e-14 of this mean.
_JITTERS = (1e-12, 1e-10, 1e-8)

# Directions below this share of the largest eigenvalue are rounding; only a ridge of 0 would use them.
_NEGLIGIBLE = 1e-12

# A head start takes at most one of this many rows: the running loss is honest on rows that the fit has not seen.
_MOST_OF_ROWS = 8

# The values of rho tried: from the largest tau down by so many decades.
_DECADES, _PER_DECADE = 8, 4
_RHOS_AT_ONCE = 8

# The largest number of outputs that choose rho for all.
_JUDGES = 64


@dataclass(frozen=True, slots=True)
class RidgePath:
    """The solutions of one problem for all ridges.

    centers: p points, prepared; basis: L^-T V, (p, p); eigenvalues: b, (p,); moments: V' L^-1 K_zx Y / n, (p, c).
    """

    kernel: Kernel
    centers: Points
    targets: TargetCode
    basis: Tensor
    eigenvalues: Tensor
    moments: Tensor

    @classmethod
    def of(cls, kernel: Kernel, centers: Tensor, x: Tensor, y: Tensor, targets: TargetCode) -> RidgePath:
        """The path for centers, (p, d), rows x, (n, d), and their y as `targets` takes it; O(n p (p + d) + p^3) time.

        Memory: 5 p^2 + 1024 p float64 numbers and two copies of the centers; never n x p. Raises ConfigError where
        K_zz is not positive definite within rounding.
        """
        centers = centers.double()
        z = kernel.left(centers)
        gram = centers.new_zeros(len(centers), len(centers))
        moments = centers.new_zeros(len(centers), targets.n_outputs)
        for rows in tiles(len(x), tile_rows(x.device, len(centers))):
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
        """alpha, (p, c), for lambda = ridge >= 0; the least-norm solution for a ridge of 0."""
        return self.basis @ self._coordinates(ridge)

    def held_out(self, x: Tensor, y: Tensor, ridges: Sequence[float]) -> tuple[Tensor, Tensor]:
        """Scores of every ridge on rows x, (h, d), and y: O(h p (p + d)) time, memory for 1024 p numbers.

        Returns the mean squared coded error of each output, (len(ridges), c), and the share of rows whose largest
        output is that of their class, (len(ridges),), nan for regression.
        """
        squares = self.moments.new_zeros(len(ridges), self.targets.n_outputs)
        hits = self.moments.new_zeros(len(ridges))
        solutions = [self._coordinates(ridge) for ridge in ridges]
        for rows in tiles(len(x), tile_rows(x.device, len(self.centers))):
            block = self.kernel.block(self.centers, self.kernel.right(x[rows].double()))
            features = block.T @ self.basis
            coded = _coded(self.targets, y[rows])
            for place, solution in enumerate(solutions):
                outputs = (features @ solution).T
                squares[place] += (outputs - coded).square().sum(1)
                if self.targets.is_classification:
                    scores = outputs + self.targets.offset[:, None]
                    hits[place] += (scores.argmax(0) == y[rows]).sum()
        return squares / len(x), hits / len(x) if self.targets.is_classification else hits * torch.nan

    def _coordinates(self, ridge: float) -> Tensor:
        """(b + lambda)^-1 times the moments, (p, c)."""
        damped = self.eigenvalues + ridge
        kept = damped > _NEGLIGIBLE * self.eigenvalues[-1]
        return torch.where(kept, 1 / damped, 0.0)[:, None] * self.moments


def _factor(kernel: Kernel, k_zz: Tensor) -> Tensor:
    """L of K_zz = L L', with a larger jitter on the diagonal where centers coincide."""
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
    """The coded targets, (c, m), in float64."""
    coded = torch.zeros(targets.n_outputs, len(y), dtype=torch.float64, device=y.device)
    targets.subtract_(coded, y)
    return coded.neg_()


@dataclass(frozen=True, slots=True)
class HeadStart:
    """Weights to start from, alpha = U coefficients, learnt from `n_rows` rows with the ridge rho.

    coefficients: H b, (r, c), float64.
    """

    coefficients: Tensor
    rho: float
    n_rows: int


def is_worth_it(n_samples: int, epoch_rows: int) -> bool:
    """Whether the sample is at most an eighth of the rows; more would spoil the running loss of the first epoch."""
    return 0 < n_samples * _MOST_OF_ROWS <= epoch_rows


def head_start(
    features: Tensor,
    half: Tensor,
    y: Tensor,
    targets: TargetCode,
    ridge: float,
    told: Tensor | None = None,
) -> HeadStart | None:
    """The head start from a sample; None where zero weights have residuals as small.

    features: phi, (r, s), float64; half: H, (r, r); y: of the sample, (s,) or (s, c); told: what the model
    predicts beside the kernel, (c, s). O(s r c) time, or O(s r^2) where
    rows have weights; O(s r) memory.
    """
    n_rows = features.shape[1]
    residual = features.new_zeros(targets.n_outputs, n_rows, dtype=targets.offset.dtype)
    if told is not None:
        residual += told
    targets.subtract_(residual, y)
    coded = -residual.to(features)
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


def _best_rho(features: Tensor, tau: Tensor, moments: Tensor, coded: Tensor, least: float) -> float | None:
    """The rho > `least` with the smallest sum of squared leave-one-out residuals; None if zero weights have less."""
    n_rows = features.shape[1]
    shares = 10.0 ** (
        -torch.arange(1, _DECADES * _PER_DECADE, dtype=tau.dtype, device=tau.device) / _PER_DECADE
    )
    rhos = (tau.max() * shares)[tau.max() * shares > least]
    best, smallest = None, float(coded.square().sum())
    squares = features.square()
    for some in rhos.split(_RHOS_AT_ONCE):
        weights = 1 / (tau + some[:, None])
        kept = 1 - (weights @ squares) / n_rows
        found = ((moments.T * weights[:, None]).flatten(0, 1) @ features).unflatten(
            0, (len(some), len(coded))
        )
        left_out = (coded - found) / kept.clamp_min(1e-9)[:, None]
        for rho, error in zip(some.tolist(), left_out.square().sum((1, 2)).tolist(), strict=True):
            if error < smallest:
                best, smallest = rho, error
    return best
