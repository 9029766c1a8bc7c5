"""The exact projection: Q = M^(1/2) (I - W D W') M^(1/2) with M = K(Z, Z)^(-1), by Cholesky.

O(p^2) memory and O(p^3) set-up: for small models and as the yardstick of the other projections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import tiles
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.projection import Spectra
from ep3stream.solver.spectrum import Flattening, LeverageProfile, leading_eigenpairs

_JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class ExactProjection:
    """factor: L of K(Z, Z) = L L', (p, p); directions: W, (p, q); shrink: D, (q,). All float64, on every rank.

    flattening: for other thresholds, while there is a set-up to choose them.
    """

    factor: Tensor
    directions: Tensor
    shrink: Tensor
    mesh: Mesh
    flattening: Flattening | None = None

    def flattened(self, threshold: float) -> ExactProjection:
        """The same with another threshold, for the directions above it."""
        assert self.flattening is not None
        return replace(self, shrink=1 - self.flattening.shrink(threshold))

    @property
    def n_flattened(self) -> int:
        """How many directions of the data are shrunk."""
        return int((self.shrink > 0).sum())

    def leverage_profile(self, k_zb: Tensor, x: Tensor) -> LeverageProfile:
        """Of each row of x, (m, d), from k_zb of (p_shard, m); O(p^2 m)."""
        inner = self._whitened(k_zb)
        along = (self.directions.T @ inner).square()
        return LeverageProfile(along, (inner.square().sum(0) - along.sum(0)).clamp_min(0))

    @classmethod
    def cost_bytes(cls, n_centers: int) -> int:
        """K(Z, Z) and its factor in float64."""
        return 2 * 8 * n_centers**2

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """As it is."""
        return gradient

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """nan."""
        return gradient.new_full((), torch.nan)

    def direction(self, gradient: Tensor) -> Tensor:
        """Theta = L^(-T) (I - W D W') L^(-1) h; O(p^2 c)."""
        inner = self._preconditioned(
            torch.linalg.solve_triangular(self.factor, self._whole(gradient), upper=False)
        )
        return self._mine(torch.linalg.solve_triangular(self.factor.T, inner, upper=True), gradient)

    def gram_times(self, weights: Tensor) -> Tensor:
        """K(Z, Z) alpha = L L' alpha, so that a ridge penalises |f|^2 in the kernel's space; O(p^2 c)."""
        return self._mine(self.factor @ (self.factor.T @ self._whole(weights)), weights)

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        """K(x, Z) Q K(Z, x), (m,); O(p^2 m)."""
        inner = self._whitened(k_zb)
        leverage: Tensor = (inner * self._preconditioned(inner)).sum(0).to(k_zb)
        return leverage

    def tensors(self) -> dict[str, Tensor]:
        """Factor, directions and shrink."""
        return {"factor": self.factor, "directions": self.directions, "shrink": self.shrink}

    def _whitened(self, k_zb: Tensor) -> Tensor:
        """L^(-1) K(Z, X_b), (p, m), float64."""
        whole = self.mesh.gather_rows(k_zb, len(self.factor)).double()
        inner: Tensor = torch.linalg.solve_triangular(self.factor, whole, upper=False)
        return inner

    def _whole(self, shard: Tensor) -> Tensor:
        """(c, p_shard) -> (p, c), float64."""
        return self.mesh.gather_rows(shard.T.contiguous(), len(self.factor)).double()

    def _mine(self, whole: Tensor, like: Tensor) -> Tensor:
        """(p, c) -> (c, p_shard)."""
        rows = self.mesh.owned(len(self.factor))
        return whole[rows.start : rows.stop].T.to(like)

    def _preconditioned(self, inner: Tensor) -> Tensor:
        return inner - self.directions @ (self.shrink[:, None] * (self.directions.T @ inner))


def build_exact(
    kernel: Kernel,
    centers: Tensor,
    sample: Tensor,
    data_rank: int,
    mesh: Mesh,
    generator: torch.Generator,
) -> tuple[ExactProjection, Spectra]:
    """From all centers, (p, d), and the sample X_s, (s, d), whole on every rank; O(p^3 + p^2 s) time.

    A jitter of 1e-6 of the mean diagonal, the rounding of a float32 kernel, keeps the factor finite when
    centers coincide.
    """
    left = kernel.left(centers)
    # Distances in float64: in float32 the rounding of nearly coincident centers makes K(Z, Z) indefinite.
    exact_left = kernel.left(centers.double())
    k_zz = torch.empty(len(centers), len(centers), dtype=torch.float64, device=centers.device)
    right = kernel.right(centers.double())
    for rows in tiles(len(centers)):
        k_zz[rows] = kernel.block(exact_left[rows], right)
    # Cholesky reads the lower triangle alone: no symmetric copy, which would cost p^2 more memory.
    jitter = _JITTER * float(k_zz.diagonal().mean())
    k_zz.diagonal().add_(jitter)
    factor, failed_at = torch.linalg.cholesky_ex(k_zz)
    if int(failed_at):
        raise ConfigError(
            f"K(Z, Z) of {len(centers)} centers is not positive definite in float64; "
            "remove centers that coincide, or use --projection nystrom"
        )
    factor = mesh.broadcast(factor.contiguous())
    k_zs = torch.empty(len(centers), len(sample), dtype=torch.float64, device=centers.device)
    columns = kernel.right(sample)
    for rows in tiles(len(centers)):
        k_zs[rows] = kernel.block(left[rows], columns).double()
    whitened = torch.linalg.solve_triangular(factor, k_zs, upper=False)
    tau, e = leading_eigenpairs(whitened.T @ whitened / len(sample), data_rank + 1, generator)
    tau, e = mesh.broadcast(tau), mesh.broadcast(e)
    threshold = float(tau[-1].clamp_min(1e-10 * float(tau[0])))
    rank = int((tau > threshold).sum())
    directions = whitened @ e[:, :rank] / (len(sample) * tau[:rank]).sqrt()
    flattening = Flattening(tau[:rank], threshold)
    shrink = 1 - flattening.shrink(threshold)
    projection = ExactProjection(factor, directions, shrink, mesh, flattening)
    return projection, Spectra((), tuple(tau.tolist()), jitter)
