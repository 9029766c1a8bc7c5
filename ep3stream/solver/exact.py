"""The exact projection: Q = M^(1/2) (I - W D W') M^(1/2) with M = K(Z, Z)^(-1), by Cholesky.

O(p^2) memory, and a set-up of O(p^3) time: for small models, and as the yardstick of the other projections.
"""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.projection import Spectra
from ep3stream.solver.spectrum import Flattening, LeverageProfile, leading_eigenpairs
from ep3stream.solver.tiles import tiles_of

_JITTER = 1e-6


@dataclass(frozen=True, slots=True)
class ExactProjection:
    """Q = L^(-T) (I - W D W') L^(-1), with D = 1 - t / tau as in `projection.py`. All float64, whole on every rank.

    factor: L of K(Z, Z) = L L', (p, p); directions: W, (p, q); eigenvalue_scale: t / tau, (q,), what is left of each
    eigenvalue of the data, at most 1. flattening: gives the scale for other thresholds, only during a set-up.
    """

    factor: Tensor
    directions: Tensor
    eigenvalue_scale: Tensor
    mesh: Mesh
    flattening: Flattening | None = None

    def flattened(self, threshold: float) -> ExactProjection:
        """The projection with another threshold t: eigenvalues of the data above t become t."""
        assert self.flattening is not None
        return replace(self, eigenvalue_scale=self.flattening.eigenvalue_scale(threshold))

    @property
    def n_flattened(self) -> int:
        """The number of directions of the data whose eigenvalue is made smaller."""
        return int((self.eigenvalue_scale < 1).sum())

    def leverage_profile(self, k_zb: Tensor, x: Tensor) -> LeverageProfile:
        """The leverage of each row of x, (m, d), for any threshold, from k_zb of (p_shard, m); O(p^2 m)."""
        inner = self._whitened(k_zb)
        along = (self.directions.T @ inner).square()
        return LeverageProfile(along, (inner.square().sum(0) - along.sum(0)).clamp_min(0))

    @classmethod
    def cost_bytes(cls, n_centers: int) -> int:
        """Bytes of K(Z, Z) and its factor, both in float64."""
        return 2 * 8 * n_centers**2

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """The gradient itself: Q has both preconditioners."""
        return gradient

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """nan: theta has a closed form."""
        return gradient.new_full((), torch.nan)

    def direction(self, gradient: Tensor, penalized: Tensor | None = None) -> Tensor:
        """theta = L^(-T) (I - W D W') (L^(-1) h + L'a); O(p^2 c). K^ is K(Z, Z): a ridge penalises |f|^2."""
        inner = torch.linalg.solve_triangular(self.factor, self._whole(gradient), upper=False)
        if penalized is not None:
            inner += self.factor.T @ self._whole(penalized)
        inner = self._preconditioned(inner)
        return self._mine(torch.linalg.solve_triangular(self.factor.T, inner, upper=True), gradient)

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        """K(x, Z) Q K(Z, x), (m,), of each column of k_zb; O(p^2 m)."""
        inner = self._whitened(k_zb)
        leverage: Tensor = (inner * self._preconditioned(inner)).sum(0).to(k_zb)
        return leverage

    def tensors(self) -> dict[str, Tensor]:
        """By their names on disk, where `shrink` is D = 1 - eigenvalue_scale.

        Reading takes 1 - D again. This does not change D: for a double s in [0, 1] and D = fl(1 - s), fl(1 - D) is
        exact, and so is 1 minus that (Sterbenz).
        """
        return {"factor": self.factor, "directions": self.directions, "shrink": 1 - self.eigenvalue_scale}

    def _whitened(self, k_zb: Tensor) -> Tensor:
        """L^(-1) K(Z, X_b), (p, m), float64, from this rank's shard of K(Z, X_b)."""
        whole = self.mesh.all_gather_rows(k_zb, len(self.factor)).double()
        inner: Tensor = torch.linalg.solve_triangular(self.factor, whole, upper=False)
        return inner

    def _whole(self, shard: Tensor) -> Tensor:
        """(c, p_shard) on each rank -> (p, c) on all, float64."""
        return self.mesh.all_gather_rows(shard.T.contiguous(), len(self.factor)).double()

    def _mine(self, whole: Tensor, like: Tensor) -> Tensor:
        """(p, c) -> (c, p_shard), in the dtype of `like`."""
        rows = self.mesh.shard_range(len(self.factor))
        return whole[rows.start : rows.stop].T.to(like)

    def _preconditioned(self, inner: Tensor) -> Tensor:
        """(I - W D W') applied to each column of `inner`."""
        return inner - self.directions @ ((1 - self.eigenvalue_scale)[:, None] * (self.directions.T @ inner))


def build_exact(
    kernel: Kernel,
    centers: Tensor,
    sample: Tensor,
    data_rank: int,
    mesh: Mesh,
    generator: torch.Generator,
) -> tuple[ExactProjection, Spectra]:
    """The projection from all centers, (p, d), and the sample X_s, (s, d), whole on every rank; O(p^3 + p^2 s) time.

    A jitter of 1e-6 of the mean diagonal, the rounding of a float32 kernel, keeps the factor finite where centers
    coincide. Raises ConfigError where K(Z, Z) is not positive definite all the same.
    """
    factor, jitter = _factored(kernel, centers)
    # Contiguous for the broadcast; this copy and K(Z, Z) never exist at the same time.
    factor = mesh.broadcast(factor.contiguous())
    whitened = torch.linalg.solve_triangular(factor, _block(kernel, centers, sample), upper=False)
    tau, e = leading_eigenpairs(whitened.T @ whitened / len(sample), data_rank + 1, generator)
    tau, e = mesh.broadcast(tau), mesh.broadcast(e)
    threshold = float(tau[-1].clamp_min(1e-10 * float(tau[0])))
    rank = int((tau > threshold).sum())
    directions = whitened @ e[:, :rank] / (len(sample) * tau[:rank]).sqrt()
    flattening = Flattening(tau[:rank], threshold)
    scale = flattening.eigenvalue_scale(threshold)
    projection = ExactProjection(factor, directions, scale, mesh, flattening)
    return projection, Spectra((), tuple(tau.tolist()), jitter)


def _factored(kernel: Kernel, centers: Tensor) -> tuple[Tensor, float]:
    """L of K(Z, Z) = L L', (p, p), float64, and the jitter that was added to the diagonal."""
    # Distances in float64: in float32 the rounding of nearly coincident centers makes K(Z, Z) indefinite.
    exact = centers.double()
    k_zz = _block(kernel, exact, exact)
    # Cholesky reads the lower triangle only. A symmetric copy would cost p^2 more memory.
    jitter = _JITTER * float(k_zz.diagonal().mean())
    k_zz.diagonal().add_(jitter)
    factor, failed_at = torch.linalg.cholesky_ex(k_zz)
    if int(failed_at):
        raise ConfigError(
            f"K(Z, Z) of {len(centers)} centers is not positive definite in float64; "
            "remove centers that coincide, or use --projection nystrom"
        )
    return factor, jitter


def _block(kernel: Kernel, z: Tensor, x: Tensor) -> Tensor:
    """K(Z, X), (len(z), len(x)), in float64, computed in the dtype of the points."""
    left, right = kernel.left(z), kernel.right(x)
    block = torch.empty(len(z), len(x), dtype=torch.float64, device=z.device)
    for rows in tiles_of(block):
        block[rows] = kernel.block(left[rows], right)
    return block
