"""From the gradient at the centers, h = K(Z, X_b) g, to the direction theta of the weights.

EigenPro3 (Abedsoltan, Belkin, Pandit, 2023, eq. 10) preconditions the functional gradient with the leading
eigenfunctions of the data and projects the result onto span{K(., z_i)} by solving K(Z, Z) theta = h. Both
are one symmetric positive semidefinite matrix Q on the weights here, theta = Q h,

    Q = M^(1/2) (I - W D W') M^(1/2),      M ~ K(Z, Z)^(-1),

W the top-q eigenvectors of M^(1/2) K(Z, X_s) K(X_s, Z) M^(1/2) / s with eigenvalues tau, and
D = 1 - t / tau, t a threshold: tau_{q+1}, or one that falls in the course of a fit (`flattening.py`). Being
symmetric, the step's operator Q K(Z, X_b) K(X_b, Z) has a real spectrum without negative values whatever the
sample, which a preconditioner applied beside an approximate projection has not; and the step needs no kernel block
of its own for X_s.
"""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import TILE_ROWS, kernel_block, kernel_times, tiles
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import Points
from ep3stream.solver.spectrum import Flattening, LandmarkPairs, LeverageProfile

# Of float32's eps times the leading eigenvalue: pairs below are noise. The largest part of a kernel matrix's rounding,
# that of whole rows and columns, is a congruence and spares the small eigenvalues.
_ROUNDING = 0.25

# Those that the complement's 1 / mu would amplify so many times are taken out of it first.
_LEADING = 3

_LEAST_COLUMNS = 64


class Projection(Protocol):
    """What the step needs of a projection."""

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """h from K(Z, X_b) g, (c, p_shard), X_b, (m, d), and g, (c, m): itself where Q has both preconditioners."""
        ...

    def direction(self, gradient: Tensor) -> Tensor:
        """theta = Q h for h of (c, p_shard); returns (c, p_shard)."""
        ...

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """|K(Z, Z) theta - h| / |h|, 0-d, where theta comes from an iteration; nan where it has a closed form."""
        ...

    def gram_times(self, weights: Tensor) -> Tensor:
        """K^ alpha for alpha of (c, p_shard), K^ the projection's own K(Z, Z); the ridge's gradient is lambda of it."""
        ...

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        """K(x, Z) Q K(Z, x) of each row of x, (m, d), from k_zb of (p_shard, m); returns (m,)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """What a checkpoint must hold for `direction` to be the same."""
        ...


@dataclass(frozen=True, slots=True)
class NystromProjection:
    """Q from a rank-r Nystrom approximation K(Z, Z) ~ U diag(l) U' + mu I, mu the `damping`.

    With W restricted to span(U), Q = U H diag(s) H' U' + (I - U U') T (I - U U') / mu, H = diag(l + mu)^(-1/2) W
    and s = 1 - D: O(prc) a step, O(pr) memory, no kernel product. basis U: (p_shard, r), orthonormal over the shards,
    leading columns first; half H: (r, q), and shrink s: (q,), float64; eigenvalues l: (r,). T = diag(tempering),
    (p_shard,), at most 1, and less for a few centers, `tempered_rows`; None for I. While there is a set-up: flattening,
    for other thresholds; sampled, H'U'K(Z, X_s), (q, s), float64, the features of the sample.
    """

    basis: Tensor
    half: Tensor
    shrink: Tensor
    damping: float
    n_leading: int
    mesh: Mesh
    eigenvalues: Tensor
    center_damping: Tensor | None = None
    flattening: Flattening | None = None
    sampled: Tensor | None = None
    damped_rows: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Once, since a GPU must be waited for to know how many they are.
        tempered = () if self.center_damping is None else (self.center_damping < 1).nonzero()[:, 0]
        object.__setattr__(self, "damped_rows", torch.as_tensor(tempered, dtype=torch.int64))

    def flattened(self, threshold: float) -> NystromProjection:
        """The same with another threshold, for the directions above it."""
        assert self.flattening is not None
        return replace(self, shrink=self.flattening.shrink(threshold))

    @property
    def n_flattened(self) -> int:
        """How many directions of the data are shrunk."""
        return int((self.shrink < 1).sum())

    def leverage_profile(self, k_zb: Tensor, x: Tensor) -> LeverageProfile:
        """Of each row of x, (m, d), from k_zb of (p_shard, m); O(prm)."""
        inside, outside = self._split(k_zb)
        return LeverageProfile((self.half.T @ inside.double()).square(), outside.double())

    def with_center_damping(self, unexplained: Tensor, leverage: float) -> NystromProjection:
        """With T such that no row's push on itself through one center is above `leverage`.

        unexplained: (p_shard,), the diagonal of K(Z, Z) - U diag(l) U'. A row at center j, with nothing else near,
        pushes itself by unexplained_j^2 / mu: 1 / mu where U does not know the center at all, say one of the few of
        a rare category. The probes of the step size hardly ever meet such a row; every epoch does. Centers as little
        known as many others are left alone: the probes have met their rows.
        """
        center_damping = (leverage * self.damping / unexplained.square()).clamp(max=1)
        is_needed = self.mesh.all_reduce((center_damping < 1).sum().to(unexplained)) > 0
        return replace(self, center_damping=center_damping) if is_needed else self

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """As it is."""
        return gradient

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """nan."""
        return gradient.new_full((), torch.nan)

    def direction(self, gradient: Tensor) -> Tensor:
        """theta = U H diag(s) H' U'h + (I - U U') T (h - U U'h) / mu.

        The leading directions come out up to 10^10 times smaller than they went in. What rounding leaves of them in
        h would come out at full size, so that they are taken out by themselves first; and out of theta, since Q must
        be symmetric. H and s span that range too, hence float64.
        """
        leading = self.basis[:, : self.n_leading]
        first = self.mesh.all_reduce(gradient @ leading)
        deflated = torch.addmm(gradient, first, leading.T, alpha=-1)
        rest = self.mesh.all_reduce(deflated @ self.basis)
        inside = rest.clone()
        inside[:, : self.n_leading] += first
        along = (((inside.double() @ self.half) * self.shrink) @ self.half.T).to(inside)
        # The part outside U is never formed but at the few centers that are tempered: each pass over U costs.
        coefficients = along - rest / self.damping
        if self.center_damping is not None:
            few = self.basis[self.damped_rows]
            taken = torch.addmm(deflated[:, self.damped_rows], rest, few.T, alpha=-1)
            taken *= (1 - self.center_damping[self.damped_rows]) / self.damping
            coefficients += self.mesh.all_reduce(taken @ few)
        theta = deflated.mul_(1 / self.damping).addmm_(coefficients, self.basis.T)
        if self.center_damping is not None:
            theta[:, self.damped_rows] -= taken
        excess = self.mesh.all_reduce(theta @ leading) - along[:, : self.n_leading]
        return theta.addmm_(excess, leading.T, alpha=-1)

    def gram_times(self, weights: Tensor) -> Tensor:
        """K^ alpha = mu alpha + U (l - mu) U'alpha with K^ = U diag(l) U' + mu (I - U U'); O(prc).

        alpha' K^ alpha, which a ridge then penalises, is |f|^2 in the kernel's space for r = p. For r < p the part
        of alpha that U does not hold counts mu instead of its own smaller eigenvalues: a little more than |f|^2.
        """
        inside = self.mesh.all_reduce(weights @ self.basis) * (self.eigenvalues - self.damping)
        return torch.addmm(weights, inside, self.basis.T, beta=self.damping)

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        """K(x, Z) Q K(Z, x), (m,); O(prm)."""
        inside, outside = self._split(k_zb)
        along: Tensor = self.shrink @ (self.half.T @ inside.double()).square()
        return outside + along.to(outside)

    def tensors(self) -> dict[str, Tensor]:
        """Basis shard, half and shrink, and the tempering shard where there is one."""
        center_damping = {} if self.center_damping is None else {"tempering": self.center_damping}
        return {"basis": self.basis, "half": self.half, "shrink": self.shrink, **center_damping}

    def _split(self, k_zb: Tensor) -> tuple[Tensor, Tensor]:
        """U'k of each column k, (r, m), and what the part outside U adds to its leverage, (m,)."""
        squares = k_zb.new_zeros(k_zb.shape[1], dtype=torch.float64)
        inside, first = coordinates(self.basis, self.n_leading, k_zb, self.mesh, squares)
        rest = inside.clone()
        rest[: self.n_leading] -= first
        if self.center_damping is None:
            # Without a pass over the basis: once the leading directions are out, the two are of one size.
            outside = self.mesh.all_reduce(squares) - rest.double().square().sum(0)
            return inside, outside.clamp_min_(0).to(k_zb) / self.damping
        outside = k_zb.new_zeros(k_zb.shape[1])
        for rows in tiles(len(self.basis)):
            part = torch.addmm(k_zb[rows], self.basis[rows, : self.n_leading], first, alpha=-1)
            part = part.addmm_(self.basis[rows], rest, alpha=-1).square_()
            outside += self.center_damping[rows] @ part
        return inside, self.mesh.all_reduce(outside) / self.damping


def coordinates(
    basis: Tensor, n_leading: int, k_zb: Tensor, mesh: Mesh, squares: Tensor | None = None
) -> tuple[Tensor, Tensor]:
    """U'k of each column k, (r, m), the leading ones taken out of it first, and what was taken, (n_leading, m).

    squares: (m,), float64, to which the squared norms of the shards of what is left of k then are added.
    """
    first = mesh.all_reduce(basis[:, :n_leading].T @ k_zb)
    inside = k_zb.new_zeros(basis.shape[1], k_zb.shape[1])
    for rows in tiles(len(basis)):
        deflated = torch.addmm(k_zb[rows], basis[rows, :n_leading], first, alpha=-1)
        inside.addmm_(basis[rows].T, deflated)
        if squares is not None:
            squares += deflated.square_().sum(0)
    mesh.all_reduce(inside)[:n_leading] += first
    return inside, first


@dataclass(frozen=True, slots=True)
class Spectra:
    """What the set-up saw: eigenvalues of K(Z, Z) (estimated) and of the preconditioned data operator."""

    model: tuple[float, ...]
    data: tuple[float, ...]
    damping: float


def build_nystrom(
    kernel: Kernel,
    centers: Tensor,
    landmarks: Tensor,
    sample: Tensor,
    n_centers: int,
    model_rank: int,
    data_rank: int,
    mesh: Mesh,
    generator: torch.Generator,
    widest_rank: int = 0,
) -> tuple[NystromProjection, Spectra]:
    """Basis from `landmarks`, (r', d) with r' >= model_rank, eigenvalues of the data from `sample`, (s, d).

    Streams K(Z, L) and K(Z, X_s) once each: O(p (r' + s)(d + r)) time, O(p r + r'^2 + r s) memory. The rank is
    `widest_rank` where more pairs than `model_rank` help much (`landmarks.py`). `centers`,
    (p_shard, d), is this rank's shard of the `n_centers`; `landmarks` (some of all centers) and `sample`
    (rows of the data) are whole on every rank. The basis has fewer than `model_rank` columns where the kernel
    matrix of the landmarks has a lower rank in the precision at hand. Raises ConfigError where it is zero.
    """
    shard = kernel.left(centers)
    basis, eigenvalues, next_eigenvalue, completes_a_level = _nystrom_basis(
        kernel, shard, landmarks, sample, n_centers, (model_rank, widest_rank), mesh, generator
    )
    unexplained = unexplained_diagonal(kernel, centers, basis, eigenvalues)
    mean_unexplained = float(mesh.all_reduce(unexplained.double().sum())) / n_centers
    rounding = _ROUNDING * torch.finfo(basis.dtype).eps * float(eigenvalues[0])
    damping = max(next_eigenvalue, mean_unexplained, rounding)
    n_leading = int((eigenvalues > _LEADING * damping).sum())
    half, flattening, sampled = _directions(
        kernel, shard, kernel.right(sample), n_centers, basis, n_leading, eigenvalues + damping, mesh
    )
    if completes_a_level:
        # The basis is wider to model K(Z, Z) better; beyond the level there is little to be learnt, and much noise.
        flattening = replace(flattening, least=flattening.fixed(data_rank))
    shrink = flattening.shrink(flattening.fixed(data_rank))
    projection = NystromProjection(
        basis, half, shrink, damping, n_leading, mesh, eigenvalues.to(basis), None, flattening, sampled
    )
    return projection, Spectra(tuple(eigenvalues.tolist()), tuple(flattening.eigenvalues.tolist()), damping)


def unexplained_diagonal(kernel: Kernel, centers: Tensor, basis: Tensor, eigenvalues: Tensor) -> Tensor:
    """Of K(Z, Z) - U diag(l) U', (p_shard,), not below zero; centers are this rank's shard, (p_shard, d)."""
    unexplained = kernel.diagonal(centers)
    for rows in tiles(len(basis)):
        unexplained[rows] -= basis[rows].square() @ eigenvalues.to(basis)
    return unexplained.clamp_min_(0)


def _nystrom_basis(
    kernel: Kernel,
    centers: Points,
    landmarks: Tensor,
    sample: Tensor,
    n_centers: int,
    ranks: tuple[int, int],
    mesh: Mesh,
    generator: torch.Generator,
) -> tuple[Tensor, Tensor, float, bool]:
    """U, l (float64), an estimate of l_{r+1}, and whether they complete a level.

    U and l are the eigenpairs of K(Z, L) K(L, L)^+ K(L, Z).

    Every rank clips the same broadcast eigenvalues, or the ranks' shapes could differ.
    """
    pairs = LandmarkPairs.of(kernel, landmarks, sample, ranks, mesh, generator)
    landmarks, values, vectors, rank = pairs.points, pairs.values, pairs.vectors, pairs.rank
    kept = min(rank, _numerical_rank(values, landmarks.dtype))
    if kept == 0:
        raise ConfigError(
            f"kernel {kernel.name!r} has no positive eigenvalue on {len(landmarks)} landmarks; "
            "it must be positive semidefinite, and not zero at the centers"
        )
    # On r' random centers an eigenvalue of K(L, L) is about r'/p times one of K(Z, Z).
    next_eigenvalue = float(values[rank]) * n_centers / len(landmarks) if len(values) > rank else 0.0

    whitened = (vectors[:, :kept] / values[:kept].sqrt()).to(landmarks)
    feature = kernel_times(kernel, centers, kernel.right(landmarks), whitened)
    gram = torch.zeros(kept, kept, dtype=torch.float64, device=feature.device)
    for rows in tiles(len(feature)):
        part = feature[rows].double()
        gram.addmm_(part.T, part)
    ascending, rotation = torch.linalg.eigh(mesh.all_reduce(gram))
    eigenvalues, rotation = mesh.broadcast(ascending.flip(0)), mesh.broadcast(rotation.flip(1))
    kept = _numerical_rank(eigenvalues, feature.dtype)
    eigenvalues, rotation = eigenvalues[:kept], rotation[:, :kept] / eigenvalues[:kept].sqrt()
    # In place, the narrower rows moved up: a second (p, r) beside the basis would be the peak of the set-up's memory.
    feature = feature.contiguous()
    basis = feature.view(-1)[: len(feature) * kept].view(len(feature), kept)
    for rows in tiles(len(feature)):
        basis[rows] = (feature[rows].double() @ rotation).to(feature)
    return basis, eigenvalues, next_eigenvalue, pairs.completes_a_level


def _directions(
    kernel: Kernel,
    centers: Points,
    sample: Points,
    n_centers: int,
    basis: Tensor,
    n_leading: int,
    damped: Tensor,
    mesh: Mesh,
) -> tuple[Tensor, Flattening, Tensor]:
    """H, the eigenvalues of A A' / s for A = L^(-1/2) U'K(Z, X_s), damped the diagonal of L, and H'U'K(Z, X_s)."""
    # So many columns of p values that they take about the memory of a tile of all columns.
    n_columns = max(_LEAST_COLUMNS, TILE_ROWS * len(sample) * mesh.size // n_centers)
    parts = []
    for start in range(0, len(sample), n_columns):
        x = sample[start : start + n_columns]
        block = kernel_block(kernel, centers, x, out=basis.new_empty(len(centers), len(x)))
        parts.append(coordinates(basis, n_leading, block, mesh)[0])
    whitened = torch.cat(parts, 1).double() / damped.sqrt()[:, None]
    tau, w = torch.linalg.eigh(whitened @ whitened.T / len(sample))
    tau, w = mesh.broadcast(tau.flip(0)), mesh.broadcast(w.flip(1).contiguous())
    # What the rounding of h alone leaves of the leading direction in the part that 1 / mu amplifies.
    least = (_ROUNDING * torch.finfo(basis.dtype).eps) ** 2 * float(damped[0] / damped[-1])
    return w / damped.sqrt()[:, None], Flattening(tau, least * float(tau[0])), w.T @ whitened


def _numerical_rank(descending: Tensor, dtype: torch.dtype) -> int:
    """How many eigenvalues of a matrix computed in `dtype` are above its rounding error."""
    return int((descending > _ROUNDING * torch.finfo(dtype).eps * descending[0]).sum())
