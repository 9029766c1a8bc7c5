"""The Nystrom projection: from the gradient at the centers, h = K(Z, X_b) g, to the direction theta of the weights.

EigenPro3 (Abedsoltan, Belkin, Pandit, 2023, eq. 10) preconditions the functional gradient with the leading
eigenfunctions of the data, and projects the result onto span{K(., z_i)} by solving K(Z, Z) theta = h. Here one
symmetric positive semidefinite matrix Q on the weights does both, theta = Q h with

    Q = M^(1/2) (I - W D W') M^(1/2),      M ~ K(Z, Z)^(-1),      D = 1 - t / tau.

W holds the top-q eigenvectors of M^(1/2) K(Z, X_s) K(X_s, Z) M^(1/2) / s, and tau their eigenvalues. The threshold t
is tau_{q+1}, or falls in the course of a fit (`spectrum.Flattening`). As Q is symmetric, the step's operator
Q K(Z, X_b) K(X_b, Z) has a real spectrum without negative values for every sample; a data preconditioner applied
beside an approximate projection does not have this property. Moreover, a step needs no kernel block for X_s.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from typing import Protocol

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import kernel_block, kernel_times, times_kernel
from ep3stream.solver.columns import ColumnKernel
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import Points
from ep3stream.solver.skinny import few_times_transposed, plus_few_times
from ep3stream.solver.spectrum import Flattening, LandmarkPairs, LeverageProfile
from ep3stream.solver.tail import Grouping, LocalTail, build_tail
from ep3stream.solver.tiles import tile_rows, tiles, tiles_of

# Eigenvalues below this share of eps times the leading one are noise. The largest part of a kernel matrix's rounding,
# which scales whole rows and columns, is a congruence and spares the small eigenvalues.
_ROUNDING = 0.25

# Directions with an eigenvalue above this many mu are taken out of h before the division by mu. With a tail, mu is so
# much smaller that most are above 3 mu; the rounding of those below 30 mu does no harm.
_LEADING, _LEADING_WITH_TAIL = 3, 30
_LEAST_COLUMNS = 64


class Projection(Protocol):
    """The methods that a step, and the measurement of its size, need of a projection."""

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """h, (c, p_shard), from the gradient K(Z, X_b) g, X_b, (m, d), and the residual g, (c, m).

        The gradient itself, unless the data preconditioner is applied apart from Q.
        """
        ...

    def direction(self, gradient: Tensor, penalized: Tensor | None = None) -> Tensor:
        """theta = Q (h + K^ a), (c, p_shard), for h and a of that shape; without a: Q h.

        K^ is the projection's model of K(Z, Z), by which a ridge penalises the weights.
        """
        ...

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """|K(Z, Z) theta - h| / |h|, 0-d, where theta comes from an iteration; nan where theta has a closed form."""
        ...

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        """K(x, Z) Q K(Z, x), (m,), of each row of x, (m, d), from k_zb = K(Z_shard, X), (p_shard, m)."""
        ...

    def tensors(self) -> dict[str, Tensor]:
        """The tensors that a set-up must hold for `direction` to be the same, by their names on disk."""
        ...


@dataclass(frozen=True, slots=True)
class NystromProjection:
    """Q from a rank-r Nystrom approximation K(Z, Z) ~ U diag(l) U' + mu I. O(prc) a step, no kernel product.

    With W restricted to span(U), s = 1 - D and H = diag(l + mu)^(-1/2) W,

        Q = U H diag(s) H' U' + (I - U U') T (I - U U') / mu.

    With a local tail all of this is in its whitened weights: U and l are the eigenpairs of R' Phi Phi' R, mu is 1, T is
    I, and Q is R times the above times R' (`tail.py`).

    basis: U, (p_shard, r), orthonormal over all shards, descending by eigenvalue; column by column in memory, which
    makes its products with a few vectors 2 to 4 times as fast on CPUs. half: H, (r, q), float64.
    eigenvalue_scale: s = t / tau, (q,), float64, what is left of each eigenvalue of the data, at most 1. damping: mu.
    n_leading: the number of columns of U with l > 3 mu, or 30 mu with a tail. eigenvalues: l, (r,). center_damping: the
    diagonal of T, (p_shard,), at most 1, and below 1 only at the centers `damped_rows`; None for T = I. tail: R, None
    for I. by_loops: products with U are those of compiled loops, where these serve (`skinny.py`).
    Only during a set-up: flattening, which gives the scale for other thresholds; sample_features, H'U'K(Z, X_s),
    (q, s), float64.
    """

    basis: Tensor
    half: Tensor
    eigenvalue_scale: Tensor
    damping: float
    n_leading: int
    mesh: Mesh
    eigenvalues: Tensor
    center_damping: Tensor | None = None
    tail: LocalTail | None = None
    by_loops: bool = False
    flattening: Flattening | None = None
    sample_features: Tensor | None = None
    damped_rows: Tensor = field(init=False, repr=False)

    def __post_init__(self) -> None:
        # Found once: to know how many centers are damped, the host must wait for the GPU.
        damped = () if self.center_damping is None else (self.center_damping < 1).nonzero()[:, 0]
        object.__setattr__(self, "damped_rows", torch.as_tensor(damped, dtype=torch.int64))

    def flattened(self, threshold: float) -> NystromProjection:
        """The projection with another threshold t: eigenvalues of the data above t become t."""
        assert self.flattening is not None
        return replace(self, eigenvalue_scale=self.flattening.eigenvalue_scale(threshold))

    @property
    def n_flattened(self) -> int:
        """The number of directions of the data whose eigenvalue is made smaller."""
        return int((self.eigenvalue_scale < 1).sum())

    def leverage_profile(self, k_zb: Tensor, x: Tensor) -> LeverageProfile:
        """The leverage of each row of x, (m, d), for any threshold, from k_zb of (p_shard, m); O(prm)."""
        inside, outside = self._split(k_zb)
        return LeverageProfile((self.half.T @ inside.double()).square(), outside.double())

    def with_center_damping(self, unexplained: Tensor, leverage: float) -> NystromProjection:
        """The projection with T such that the leverage of a row through one center is at most `leverage`.

        unexplained: (p_shard,), the diagonal of K(Z, Z) - U diag(l) U'. A row at center j, far from all others, has
        the leverage unexplained_j^2 / mu. This is 1 / mu where U does not explain the center at all, as with the few
        centers of a rare category. The step probe hardly ever meets such a row, but every epoch does.
        """
        center_damping = (leverage * self.damping / unexplained.square()).clamp(max=1)
        is_needed = self.mesh.all_reduce((center_damping < 1).sum().to(unexplained)) > 0
        return replace(self, center_damping=center_damping) if is_needed else self

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """The gradient itself: Q has both preconditioners."""
        return gradient

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """nan: theta has a closed form."""
        return gradient.new_full((), torch.nan)

    def direction(self, gradient: Tensor, penalized: Tensor | None = None) -> Tensor:
        """theta = Q (h + K^ a), with K^ = U diag(l) U' + mu (I - U U'); O(prc), and O(pbc) with a tail.

        A ridge then penalises alpha' K^ alpha. For r = p this is |f|^2 in the kernel's space. For r < p it is a little
        more: the part of alpha outside U counts with mu in place of its smaller eigenvalues.
        """
        if self.tail is None:
            return self._direction(gradient, penalized)
        whitened = None if penalized is None else self.tail.solve(penalized)
        return self.tail.unwhiten(self._direction(self.tail.whiten(gradient), whitened))

    def _direction(self, gradient: Tensor, penalized: Tensor | None) -> Tensor:
        """`direction` in whitened weights: U H diag(s) H'(U'h + l U'a) + (I - U U') T (I - U U')(h / mu + a).

        Q makes the leading directions up to 10^10 times smaller. The rounding error that h - U U'h still has along
        them would not be made smaller, but divided by mu. So the leading directions are taken out of h by themselves
        first. In the end theta's part along them is set right as well, since Q must be symmetric. H and s cover the
        same range of sizes, hence float64.
        """
        leading = self.basis[:, : self.n_leading]
        first = self._onto(gradient, leading)
        deflated = self._plus_along(gradient, first, leading, -1)
        both = deflated if penalized is None else torch.cat([deflated, penalized])
        rest, of_penalized = self._onto(both, self.basis).tensor_split([len(gradient)])
        inside = rest.to(torch.float64, copy=True)
        inside[:, : self.n_leading] += first
        theta, within = deflated.mul_(1 / self.damping), rest / self.damping
        if penalized is not None:
            inside += of_penalized.double() * self.eigenvalues
            theta += penalized
            within += of_penalized
        along = (((inside @ self.half) * self.eigenvalue_scale) @ self.half.T).to(theta)
        coefficients = along - within
        if self.center_damping is not None:
            # The part outside U is formed at the few damped centers only: each pass over U costs.
            few = self.basis[self.damped_rows]
            taken = torch.addmm(theta[:, self.damped_rows], within, few.T, alpha=-1)
            taken *= 1 - self.center_damping[self.damped_rows]
            coefficients += self.mesh.all_reduce(taken @ few)
        theta = self._plus_along(theta, coefficients, self.basis)
        if self.center_damping is not None:
            theta[:, self.damped_rows] -= taken
        excess = self._onto(theta, leading) - along[:, : self.n_leading]
        return self._plus_along(theta, excess, leading, -1)

    def _onto(self, weights: Tensor, basis: Tensor) -> Tensor:
        """weights @ basis, (c, r), summed over the shards."""
        return self.mesh.all_reduce(few_times_transposed(weights, basis.T, self.by_loops))

    def _plus_along(self, weights: Tensor, coefficients: Tensor, basis: Tensor, scale: float = 1) -> Tensor:
        """weights + scale coefficients @ basis', (c, p_shard)."""
        return plus_few_times(weights, coefficients, basis.T, scale, self.by_loops)

    def weights_of(self, coefficients: Tensor) -> Tensor:
        """The weights R U b, (c, p_shard), of coefficients b, (r, c), on the basis."""
        whitened = (self.basis @ coefficients.to(self.basis)).T.contiguous()
        return whitened if self.tail is None else self.tail.unwhiten(whitened)

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        """K(x, Z) Q K(Z, x), (m,), of each column of k_zb; O(prm)."""
        inside, outside = self._split(k_zb)
        along: Tensor = self.eigenvalue_scale @ (self.half.T @ inside.double()).square()
        return outside + along.to(outside)

    def tensors(self) -> dict[str, Tensor]:
        """By their names on disk; `basis`, `tail` and `tempering`, the center damping, hold the rows of this shard."""
        center_damping = {} if self.center_damping is None else {"tempering": self.center_damping}
        tail = {} if self.tail is None else {"tail": self.tail.rows}
        return {
            "basis": self.basis,
            "half": self.half,
            "shrink": self.eigenvalue_scale,
            **center_damping,
            **tail,
        }

    def _split(self, k_zb: Tensor) -> tuple[Tensor, Tensor]:
        """Of each column k of k_zb: U'k, (r, m), and the leverage of its part outside U, (m,)."""
        inside, first, squares = coordinates(self.basis, self.n_leading, k_zb, self.mesh, self.tail)
        rest = inside.clone()
        rest[: self.n_leading] -= first
        if self.center_damping is None:
            # By Pythagoras, without a pass over U: the leading directions are out, so that little cancels.
            outside = squares - rest.double().square().sum(0)
            return inside, outside.clamp_min_(0).to(k_zb) / self.damping
        outside = k_zb.new_zeros(k_zb.shape[1])
        for rows in tiles_of(self.basis):
            part = torch.addmm(k_zb[rows], self.basis[rows, : self.n_leading], first, alpha=-1)
            part = part.addmm_(self.basis[rows], rest, alpha=-1).square_()
            outside += self.center_damping[rows] @ part
        return inside, self.mesh.all_reduce(outside) / self.damping


def coordinates(
    basis: Tensor, n_leading: int, k_zb: Tensor, mesh: Mesh, tail: LocalTail | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Of each column k of k_zb, whitened: U'k, (r, m), its leading part U_1'k, (n_leading, m), and |k - U_1 U_1'k|^2.

    U_1, the leading columns of U, are taken out of k before the product with U. The squares are (m,), float64.
    """
    leading, n_columns = basis[:, :n_leading], k_zb.shape[1]
    first, inside = k_zb.new_zeros(n_leading, n_columns), k_zb.new_zeros(basis.shape[1], n_columns)
    squares = k_zb.new_zeros(n_columns, dtype=torch.float64)
    for rows, part in _unwhitened(tail, leading):
        first.addmm_(part.T, k_zb[rows])
    mesh.all_reduce(first)
    for rows, whitened in _whitened(tail, k_zb):
        deflated = torch.addmm(whitened, leading[rows], first, alpha=-1)
        inside.addmm_(basis[rows].T, deflated)
        squares += deflated.square_().sum(0)
    mesh.all_reduce(inside)[:n_leading] += first
    return inside, first, mesh.all_reduce(squares)


def _whitened(tail: LocalTail | None, block: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Pairs of a slice of rows and R' block there, for a block of (p_shard, n); R is the identity without a tail."""
    if tail is not None:
        return tail.whitened(block)
    return ((rows, block[rows]) for rows in tiles_of(block))


def _unwhitened(tail: LocalTail | None, block: Tensor) -> Iterator[tuple[slice, Tensor]]:
    """Pairs of a slice of rows and R block there, for a block of (p_shard, n); R is the identity without a tail."""
    if tail is not None:
        return tail.unwhitened(block)
    return ((rows, block[rows]) for rows in tiles_of(block))


@dataclass(frozen=True, slots=True)
class Spectra:
    """Eigenvalues that a set-up found, for the description of a run.

    model: of K(Z, Z), estimated; data: of the data operator that the data preconditioner flattens; damping: mu.
    """

    model: tuple[float, ...]
    data: tuple[float, ...]
    damping: float


def build_nystrom(
    kernel: Kernel,
    centers: Points,
    diagonal: Tensor,
    landmarks: Tensor,
    sample: Tensor,
    n_centers: int,
    model_rank: int,
    data_rank: int,
    mesh: Mesh,
    generator: torch.Generator,
    widest_rank: int = 0,
    grouping: Grouping | None = None,
) -> tuple[NystromProjection, Spectra]:
    """The projection, with U from `landmarks` and the eigenvalues of the data from `sample`.

    centers: this rank's shard of the `n_centers`, prepared for the left side; diagonal: their K(z, z), (p_shard,).
    landmarks: (r', d), r' >= model_rank, some of all centers; sample: X_s, (s, d), rows of the data; both whole on
    every rank. Streams K(Z, L) and K(Z, X_s) once each:
    O(p (r' + s)(d + r)) time, O(p r + r'^2 + r s) memory. The rank r is `widest_rank` where that helps much
    (`spectrum.LandmarkPairs`), otherwise `model_rank`, and less where the kernel matrix of the landmarks has a lower
    rank in its precision. grouping: of the centers, for a local tail; there is none all the same where the eigenvalues
    fall fast or the pairs leave nothing. Raises ConfigError where that rank is zero.
    """
    pairs = LandmarkPairs.of(kernel, landmarks, sample, (model_rank, widest_rank), mesh, generator)
    features = _nystrom_features(kernel, centers, pairs)
    tail = (
        None if grouping is None or pairs.is_fast else build_tail(kernel, grouping, diagonal, features, mesh)
    )
    if tail is not None:
        for rows, whitened in tail.whitened(features):
            features[rows] = whitened
    basis, eigenvalues = _orthonormal(features, mesh)
    rounding = _ROUNDING * torch.finfo(basis.dtype).eps * float(eigenvalues[0])
    if tail is None:
        unexplained = unexplained_diagonal(diagonal, basis, eigenvalues)
        mean_unexplained = float(mesh.all_reduce(unexplained.double().sum())) / n_centers
        damping = max(pairs.next_eigenvalue(n_centers), mean_unexplained, rounding)
        n_leading = int((eigenvalues > _LEADING * damping).sum())
    else:
        damping = max(1.0, rounding)
        n_leading = int((eigenvalues > _LEADING_WITH_TAIL * damping).sum())
    half, flattening, sample_features = _directions(
        kernel, centers, kernel.right(sample), n_centers, basis, n_leading, eigenvalues + damping, mesh, tail
    )
    if pairs.completes_a_level:
        # The wider basis serves the model of K(Z, Z) only. Beyond the level there is little to learn, and much noise.
        flattening = replace(flattening, least=flattening.fixed(max(data_rank, pairs.judged)))
    scale = flattening.eigenvalue_scale(flattening.fixed(data_rank))
    projection = NystromProjection(
        basis,
        half,
        scale,
        damping,
        n_leading,
        mesh,
        eigenvalues.to(basis),
        None,
        tail,
        isinstance(kernel, ColumnKernel),
        flattening,
        sample_features,
    )
    return projection, Spectra(tuple(eigenvalues.tolist()), tuple(flattening.eigenvalues.tolist()), damping)


def unexplained_diagonal(diagonal: Tensor, basis: Tensor, eigenvalues: Tensor) -> Tensor:
    """The diagonal of K(Z, Z) - U diag(l) U', (p_shard,), not below zero; diagonal: that of K(Z, Z), (p_shard,)."""
    unexplained = diagonal.clone()
    for rows in tiles_of(basis):
        unexplained[rows] -= basis[rows].square() @ eigenvalues.to(basis)
    return unexplained.clamp_min_(0)


def _nystrom_features(kernel: Kernel, centers: Points, pairs: LandmarkPairs) -> Tensor:
    """Phi, (p_shard, r), with Phi Phi' = K(Z, L) K(L, L)^+ K(L, Z), K(L, L) cut to its leading pairs.

    Fewer than r columns where the kernel matrix has no such rank in its precision.
    """
    landmarks, values = pairs.points, pairs.values
    kept = min(pairs.rank, _numerical_rank(values, landmarks.dtype))
    if kept == 0:
        raise ConfigError(
            f"kernel {kernel.name!r} has no positive eigenvalue on {len(landmarks)} landmarks; "
            "it must be positive semidefinite, and not zero at the centers"
        )
    whitened = (pairs.vectors[:, :kept] / values[:kept].sqrt()).to(landmarks)
    return kernel_times(kernel, centers, kernel.right(landmarks), whitened)


def _orthonormal(features: Tensor, mesh: Mesh) -> tuple[Tensor, Tensor]:
    """U and l (float64), the eigenpairs of Phi Phi', for Phi of (p_shard, r), whose memory U takes.

    The eigenvalues are broadcast before they are cut to the numerical rank, so that all ranks cut alike.
    """
    kept = features.shape[1]
    gram = torch.zeros(kept, kept, dtype=torch.float64, device=features.device)
    for rows in tiles_of(features):
        part = features[rows].double()
        gram.addmm_(part.T, part)
    ascending, rotation = torch.linalg.eigh(mesh.all_reduce(gram))
    eigenvalues, rotation = mesh.broadcast(ascending.flip(0)), mesh.broadcast(rotation.flip(1))
    kept = _numerical_rank(eigenvalues, features.dtype)
    eigenvalues, rotation = eigenvalues[:kept], rotation[:, :kept] / eigenvalues[:kept].sqrt()
    # In place: a second (p, r) tensor would be the peak of the set-up's memory.
    basis = features[:, :kept]
    for rows in tiles_of(features):
        basis[rows] = (features[rows].double() @ rotation).to(features)
    return basis, eigenvalues


def _directions(
    kernel: Kernel,
    centers: Points,
    sample: Points,
    n_centers: int,
    basis: Tensor,
    n_leading: int,
    damped: Tensor,
    mesh: Mesh,
    tail: LocalTail | None = None,
) -> tuple[Tensor, Flattening, Tensor]:
    """H, the flattening among the eigenvalues tau, and H'U'K(Z, X_s), (r, s).

    tau and W are the eigenpairs of A A' / s for A = L^(-1/2) U'K(Z, X_s), L = diag(damped), and H = L^(-1/2) W.
    """
    if tail is None:
        found = _sample_coordinates(kernel, centers, sample, n_centers, basis, n_leading, mesh)
    else:
        # By the unwhitened basis, R U: the kernel values are never whitened. With a tail the eigenvalues span so few
        # digits that the leading directions need not be taken out first.
        found = basis.new_zeros(basis.shape[1], len(sample))
        sample = sample.for_products(-(-len(basis) // tile_rows(basis.device, len(sample))))
        for rows, part in tail.unwhitened(basis):
            found += times_kernel(kernel, part.T, centers[rows], sample)
        mesh.all_reduce(found)
    whitened = found.double() / damped.sqrt()[:, None]
    tau, w = torch.linalg.eigh(whitened @ whitened.T / len(sample))
    tau, w = mesh.broadcast(tau.flip(0)), mesh.broadcast(w.flip(1).contiguous())
    # Below this threshold, the rounding of h along the leading direction, divided by mu, would outweigh that direction.
    least = (_ROUNDING * torch.finfo(basis.dtype).eps) ** 2 * float(damped[0] / damped[-1])
    return w / damped.sqrt()[:, None], Flattening(tau, least * float(tau[0])), w.T @ whitened


def _sample_coordinates(
    kernel: Kernel,
    centers: Points,
    sample: Points,
    n_centers: int,
    basis: Tensor,
    n_leading: int,
    mesh: Mesh,
) -> Tensor:
    """U'K(Z, X_s), (r, s), with the leading directions taken out first."""
    # As many columns at a time as take about the memory of a tile of all columns.
    rows_each = tile_rows(basis.device, len(sample))
    n_columns = max(_LEAST_COLUMNS, rows_each * len(sample) * mesh.size // n_centers)
    parts = []
    for columns in tiles(len(sample), n_columns):
        x = sample[columns]
        block = kernel_block(kernel, centers, x, out=basis.new_empty(len(centers), len(x)))
        parts.append(coordinates(basis, n_leading, block, mesh, None)[0])
    return torch.cat(parts, 1)


def _numerical_rank(descending: Tensor, dtype: torch.dtype) -> int:
    """The number of eigenvalues, given in descending order, above the rounding error of a matrix in `dtype`."""
    return int((descending > _ROUNDING * torch.finfo(dtype).eps * descending[0]).sum())
