"""Leading eigenpairs of symmetric positive semidefinite matrices, in float64."""

from __future__ import annotations

import torch
from torch import Tensor

_SUBSPACE_ITERATIONS = 6


def leading_eigenpairs(matrix: Tensor, n_pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """The `n_pairs` largest eigenvalues, descending, and their eigenvectors as columns; all s if there are fewer.

    Subspace iteration with a Rayleigh-Ritz step (Halko, Martinsson, Tropp, "Finding structure with randomness",
    2011, algorithm 4.4) costs O(s^2 n_pairs) for an s x s matrix; when most pairs are asked for, the
    dense O(s^3) solver is as fast. matrix: (s, s) float64.
    """
    size = matrix.shape[0]
    width = n_pairs + max(32, n_pairs // 4)
    if 2 * width > size:
        values, vectors = torch.linalg.eigh(matrix)
        return values.flip(0)[:n_pairs], vectors.flip(1)[:, :n_pairs].contiguous()
    start = torch.randn(size, width, dtype=matrix.dtype, generator=generator)
    basis = torch.linalg.qr(start.to(matrix.device))[0]
    for _ in range(_SUBSPACE_ITERATIONS):
        basis = torch.linalg.qr(matrix @ basis)[0]
    values, rotation = torch.linalg.eigh(basis.T @ (matrix @ basis))
    return values.flip(0)[:n_pairs], (basis @ rotation.flip(1)[:, :n_pairs]).contiguous()
