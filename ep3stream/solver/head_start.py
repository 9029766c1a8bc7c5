"""Where a fit starts: at the ridge regression of the sampled rows on the basis, not at zero.

The set-up has the features of its sample X_s already, phi_i = W' L^(-1/2) U'K(Z, x_i), L = diag(l + mu), whose second
moments are the eigenvalues tau (`projection.py`). The least-squares problem of these s rows within the basis,

    b = argmin 1/(2s) sum_i w_i |b' phi_i - y_i|^2 + rho/2 |b|^2,        alpha = U H b,

costs next to nothing then, and solves for the leading directions what steps would take several times as many rows for.
rho is what leave-one-out residuals are smallest for, r_i / (1 - h_i) with h the diagonal of the hat matrix (Allen,
"The relationship between variable selection and data augmentation", 1974). Directions with tau above it are as well
known as s rows let them be: a fit passes over the stages whose threshold is higher (`flattening.py`).
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.solver.targets import TargetCode

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
