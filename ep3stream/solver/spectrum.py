"""Leading eigenpairs of symmetric positive semidefinite matrices, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

CONVERGED, SPANNING = 7, 4


def leading_eigenpairs(
    matrix: Tensor, n_pairs: int, generator: torch.Generator, n_iterations: int = CONVERGED
) -> tuple[Tensor, Tensor]:
    """The `n_pairs` largest eigenvalues, descending, and their eigenvectors as columns; all s if there are fewer.

    Subspace iteration with a Rayleigh-Ritz step (Halko, Martinsson, Tropp, "Finding structure with randomness",
    2011, algorithm 4.4) costs O(s^2 n_pairs) for an s x s matrix; when most pairs are asked for, the
    dense O(s^3) solver is as fast. The iterations only turn the subspace, for which float32 and a triangular basis do;
    a single product in float64 then gives the pairs within it. matrix: (s, s) float64.

    n_iterations: `SPANNING` where the vectors only serve as the V of a Nystrom approximation K V (V'KV)^+ V'K, which
    any V makes one: for 500 of 2000 pairs of Laplacian kernels, what is left of the trace is 1.1 to 1.6% above the
    optimum after four iterations and .3 to .4% after seven, `CONVERGED`.
    """
    size = matrix.shape[0]
    width = n_pairs + max(32, n_pairs // 4)
    if 2 * width > size:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0)[:n_pairs], vectors.flip(1)[:, :n_pairs].contiguous()
    basis = torch.randn(size, width, generator=generator).to(matrix.device)
    rough = matrix.float()
    for _ in range(n_iterations):
        basis = _well_conditioned(rough @ basis)
    basis = _orthonormal(basis.double())
    values, rotation = torch.linalg.eigh(basis.T @ (matrix @ basis))
    return values.flip(0)[:n_pairs], basis @ rotation.flip(1)[:, :n_pairs]


def _well_conditioned(columns: Tensor) -> Tensor:
    """Another basis of their span, (s, k): P L of the LU factors, at a quarter of the cost of an orthonormal one."""
    order, lower, _ = torch.linalg.lu(columns)
    basis: Tensor = lower[order.argmax(1)]
    return basis


def _orthonormal(columns: Tensor) -> Tensor:
    """An orthonormal basis of the span of well-conditioned columns, (s, k), by Cholesky: a third of a QR's cost."""
    factor, failed_at = torch.linalg.cholesky_ex(columns.T @ columns)
    basis: Tensor
    if int(failed_at):
        basis = torch.linalg.qr(columns)[0]
    else:
        basis = torch.linalg.solve_triangular(factor.T, columns, upper=True, left=False)
    return basis
