"""The projection of the published EigenPro3: an iteration for K(Z, Z) theta = h, and two separate preconditioners.

Abedsoltan, Belkin, Pandit, "Toward Large Kernel Models", 2023, algorithm 2. On a batch X_b with residual g, with the
top-q eigenpairs (lambda, E) of K(X_s, X_s) / s and D = (1 - lambda_{q+1} / lambda) / (lambda s):

    h = K(Z, X_b) g - F E' K(X_s, X_b) g,            F = K(Z, X_s) E D
    theta ~ K(Z, Z)^(-1) h                           passes of EigenPro2 (Ma, Belkin, "Kernel machines that
                                                     adapt to GPUs", 2019) over the centers, from zero

A pass takes batches B of the centers in a fixed random order, S the first s' centers, (lambda', E') those of
K(S, S) / s' and D' = (1 - (lambda'_{r+1} / lambda')^a) / (lambda' s'), a = 0.95 as in the authors' code:

    e = K(Z_B, Z) theta - h_B
    theta_B -= eta e;    theta_S += eta E' D' E'' K(S, Z_B) e

theta depends on h only, so a checkpoint holds nothing of the iteration. The authors stop after two passes, or at a mean
squared error of 1e-6 on the first 1000 centers, which a small h meets at once. Here the passes stop at an error of
`tolerance` |h| over all centers.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import kernel_block, kernel_times, times_kernel
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import Points, UnpreparedPoints
from ep3stream.solver.projection import Spectra
from ep3stream.solver.spectrum import leading_eigenpairs
from ep3stream.solver.step_size import PublishedStep
from ep3stream.solver.tiles import tiles_of

_MODEL_EXPONENT = 0.95
_MAX_CENTER_BATCH = 4096

# How many passes after a pass its error decides whether there is another one. On a GPU the host queues one more pass
# before it waits for the error, so that the GPU always has work; that pass changes nothing where none was needed.
_KNOWN_AFTER = {"cpu": 1, "cuda": 2}


@dataclass(frozen=True, slots=True)
class CenterBatch:
    """One batch of a pass: `size` centers, of which those at `places` in the batch are `rows` of this rank's shard."""

    size: int
    rows: Tensor
    places: Tensor


@dataclass(frozen=True, slots=True)
class EigenProTensors:
    """The tensors of the projection that a set-up holds, whole except for `basis`, which is this rank's shard.

    basis: F, (p_shard, q); sample: X_s, (s, d); data_vectors: E, (s, q); model_vectors: E', (s', r), of the first s'
    centers; model_weights: D', (r,); center_order: (p,), the order in which a pass takes the centers.
    """

    basis: Tensor
    sample: Tensor
    data_vectors: Tensor
    model_vectors: Tensor
    model_weights: Tensor
    center_order: Tensor

    def by_name(self) -> dict[str, Tensor]:
        """The tensors by their names on disk."""
        return {name: getattr(self, name) for name in self.__slots__}


@dataclass(frozen=True, slots=True)
class Passes:
    """At most `limit` passes in batches of `batch_size` centers; they stop at an error of `tolerance` |h|."""

    batch_size: int
    step_size: float
    limit: int
    tolerance: float


@dataclass(frozen=True, slots=True)
class EigenProProjection:
    """The inexact projection on this rank's shard of the centers; O(p^2 c) time a pass, O(pq + sq) memory.

    Every pass forms K(Z, Z) again, a tile at a time. rows, columns: the shard, prepared for the left and the right
    side of a block. sample, data_vectors: this rank's share of the rows of X_s and of E. model_vectors: the rows of E'
    whose centers this rank has, which are the first of its shard. stored: the tensors of a set-up.
    """

    kernel: Kernel
    rows: Points
    columns: Points
    sample: Points
    data_vectors: Tensor
    basis: Tensor
    model_vectors: Tensor
    model_weights: Tensor
    batches: tuple[CenterBatch, ...]
    passes: Passes
    stored: EigenProTensors
    mesh: Mesh

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        rows: Points,
        columns: Points,
        tensors: EigenProTensors,
        passes: Passes,
        mesh: Mesh,
    ) -> EigenProProjection:
        """The projection from the shard's centers, prepared for the left and the right side, and a set-up's tensors."""
        share = mesh.shard_range(len(tensors.sample))
        owned = mesh.shard_range(len(tensors.center_order))
        return cls(
            kernel,
            rows,
            columns,
            kernel.left(tensors.sample[share.start : share.stop]),
            tensors.data_vectors[share.start : share.stop],
            tensors.basis,
            tensors.model_vectors[owned.start : owned.stop],
            tensors.model_weights,
            _center_batches(tensors.center_order, passes.batch_size, owned),
            passes,
            tensors,
            mesh,
        )

    @classmethod
    def cost_bytes(
        cls, n_centers: int, n_features: int, n_landmarks: int, samples: int, ranks: tuple[int, int]
    ) -> int:
        """Bytes of the projection on one device, in float32; ranks: q of the data and r of the model."""
        data_rank, model_rank = ranks
        block = (n_landmarks + 1024) * min(_MAX_CENTER_BATCH, n_centers)
        vectors = (n_centers + samples) * data_rank + n_landmarks * model_rank
        points = (n_centers + 2 * samples) * (n_features + 2)
        return 4 * (block + vectors + points) + 8 * 3 * n_centers

    def preconditioned(self, gradient: Tensor, x: Tensor, residual: Tensor) -> Tensor:
        """h = K(Z, X_b) g - F E' K(X_s, X_b) g; O(smc + (s + p) qc). Each rank has some rows of K(X_s, X_b)."""
        k_sb_g = kernel_times(self.kernel, self.sample, self.kernel.right(x), residual.T)
        coefficients = self.mesh.all_reduce(k_sb_g.T @ self.data_vectors)
        return torch.addmm(gradient, coefficients, self.basis.T, alpha=-1)

    def direction(self, gradient: Tensor, penalized: Tensor | None = None) -> Tensor:
        """theta, (c, p_shard), for h of that shape. Raises ConfigError for `penalized`.

        A ridge would need the data preconditioner applied to lambda f as well, at O(psc).

        The error of a pass is the error of each batch just before its update. This costs nothing more, and is an
        upper bound of the final error as long as the passes converge.
        """
        if penalized is not None:
            raise ConfigError("ridge is given, but the published EigenPro has none; use nystrom or exact")
        theta = torch.zeros_like(gradient)
        room = gradient.new_empty(len(self.model_vectors), self.passes.batch_size)
        enough = self.passes.tolerance**2 * self._squared_norm(gradient)
        known_after = _KNOWN_AFTER[gradient.device.type]
        needed: list[Tensor] = [torch.ones_like(enough, dtype=torch.bool)]
        for number in range(self.passes.limit):
            if number >= known_after and not bool(needed[number + 1 - known_after]):
                break
            squared = self._pass(theta, gradient, room, needed[-1])
            needed.append(needed[-1] & (squared <= enough).logical_not())
        return theta

    def inexactness(self, theta: Tensor, gradient: Tensor) -> Tensor:
        """|K(Z, Z) theta - h| / |h|, 0-d; at least half the work of a pass."""
        squared = gradient.new_zeros((), dtype=torch.float64)
        for batch in self.batches:
            columns = self._columns(batch)
            predicted = times_kernel(self.kernel, theta, self.rows, columns)
            squared += self._error(predicted, gradient, batch).double().square().sum()
        tiny = torch.finfo(torch.float64).tiny
        return (squared / self._squared_norm(gradient).clamp_min(tiny)).sqrt().to(gradient)

    def leverage(self, k_zb: Tensor, x: Tensor) -> Tensor:
        """K(x, Z) theta(x), (m,), for each row of x alone with the residual 1; costs passes for m outputs."""
        each = torch.eye(len(x), dtype=x.dtype, device=x.device)
        theta = self.direction(self.preconditioned(k_zb.T.contiguous(), x, each))
        return self.mesh.all_reduce((k_zb * theta.T).sum(0))

    def tensors(self) -> dict[str, Tensor]:
        """The fields of `EigenProTensors` by name."""
        return self.stored.by_name()

    def _pass(self, theta: Tensor, gradient: Tensor, room: Tensor, is_needed: Tensor) -> Tensor:
        """Updates theta by one pass; returns the sum of squared errors before each of its updates.

        room: for K(S, Z_B), (s'_shard, batch size). is_needed: 0-d; if false, theta stays as it is.
        """
        n_landmarks = len(self.model_vectors)
        step_size = (is_needed * self.passes.step_size).to(gradient)
        squared = gradient.new_zeros((), dtype=torch.float64)
        for batch in self.batches:
            columns = self._columns(batch)
            k_sb = room.view(-1)[: n_landmarks * batch.size].view(n_landmarks, batch.size)
            # The rows of S serve both the error and its correction.
            kernel_block(self.kernel, self.rows[:n_landmarks], columns, out=k_sb)
            predicted = times_kernel(
                self.kernel, theta[:, n_landmarks:], self.rows[n_landmarks:], columns
            ).addmm_(theta[:, :n_landmarks], k_sb)
            error = self._error(predicted, gradient, batch)
            squared += error.double().square().sum()
            along = (
                self.mesh.all_reduce((error @ k_sb.T) @ self.model_vectors) * self.model_weights * is_needed
            )
            theta[:, batch.rows] -= step_size * error[:, batch.places]
            theta[:, :n_landmarks].addmm_(along, self.model_vectors.T, alpha=self.passes.step_size)
        return squared

    def _columns(self, batch: CenterBatch) -> Points:
        """The centers of the batch, prepared for the right side, collected from the ranks that own them."""
        shard = self.columns.prepared
        points = shard.new_zeros(batch.size, shard.shape[1])
        points[batch.places] = shard[batch.rows]
        return Points(self.mesh.all_reduce(points))

    def _error(self, predicted: Tensor, gradient: Tensor, batch: CenterBatch) -> Tensor:
        """K(Z_B, Z) theta - h_B, (c, batch size); predicted: this shard's part of K(Z_B, Z) theta, overwritten."""
        predicted[:, batch.places] -= gradient[:, batch.rows]
        return self.mesh.all_reduce(predicted)

    def _squared_norm(self, gradient: Tensor) -> Tensor:
        return self.mesh.all_reduce(gradient.double().square().sum())


def build_eigenpro(
    kernel: Kernel,
    centers: Tensor,
    landmarks: Tensor,
    sample: Tensor,
    n_centers: int,
    ranks: tuple[int, int],
    passes: tuple[int, float],
    mesh: Mesh,
    generator: torch.Generator,
) -> tuple[EigenProProjection, Spectra]:
    """The projection with both preconditioners; batch and step size of its passes follow the published rule.

    centers: (p_shard, d), this rank's shard of the `n_centers`. landmarks: (s', d), the first of all centers; sample:
    (s, d); both whole on every rank. ranks: (q, r); passes: their largest number and the tolerance.
    O(s^2 q + s'^2 r + psd) time, O(s^2 + s'^2) memory. Raises ConfigError where the kernel is zero.
    """
    data_rank, model_rank = ranks
    data_values, data_vectors = _eigensystem(kernel, sample, data_rank, mesh, generator)
    model_values, model_vectors = _eigensystem(kernel, landmarks, model_rank, mesh, generator)
    data_weights = _weights(data_values, len(sample), 1.0)
    weighted = (data_vectors * data_weights).to(sample)
    rows, columns = (UnpreparedPoints(centers, side).whole() for side in (kernel.left, kernel.right))
    order = mesh.broadcast(torch.randperm(n_centers, generator=generator).to(centers.device))
    tensors = EigenProTensors(
        kernel_times(kernel, rows, kernel.right(sample), weighted),
        sample,
        data_vectors.to(sample),
        model_vectors.to(sample),
        _weights(model_values, len(landmarks), _MODEL_EXPONENT).to(sample),
        order,
    )
    first, tail = float(model_values[0]), float(model_values[-1])
    inner = PublishedStep.of(kernel, landmarks, first * (tail / first) ** _MODEL_EXPONENT)
    batch_size = min(inner.critical_batch_size, _MAX_CENTER_BATCH, n_centers)
    settled = Passes(batch_size, inner.step_size(batch_size), *passes)
    projection = EigenProProjection.of(kernel, rows, columns, tensors, settled, mesh)
    # In the units of the other projections: eigenvalues of K(Z, Z), and of the data operator K(X_s, X_s) / s.
    spectra = Spectra(
        tuple((model_values * n_centers).tolist()), tuple(data_values.tolist()), tail * n_centers
    )
    return projection, spectra


def _eigensystem(
    kernel: Kernel, points: Tensor, rank: int, mesh: Mesh, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The leading rank + 1 eigenvalues of K(X, X) / n and `rank` eigenvectors, float64; rank is cut to n - 1."""
    rank = min(rank, len(points) - 1)
    left, right = kernel.left(points), kernel.right(points)
    matrix = torch.empty(len(points), len(points), dtype=torch.float64, device=points.device)
    for rows in tiles_of(matrix):
        matrix[rows] = kernel.block(left[rows], right).double()
    matrix = (matrix + matrix.T).div_(2 * len(points))
    values, vectors = leading_eigenpairs(matrix, rank + 1, generator)
    values, vectors = mesh.broadcast(values), mesh.broadcast(vectors)
    if not float(values[0]) > 0:
        raise ConfigError(
            f"kernel {kernel.name!r} has no positive eigenvalue on {len(points)} points; "
            "it must be positive semidefinite, and not zero at the centers"
        )
    # Eigenvalues below the rounding of the kernel are noise: raised to one level, they get the weight 0.
    floor = 4 * torch.finfo(points.dtype).eps * float(values[0])
    return values.clamp_min(floor), vectors[:, :rank].contiguous()


def _weights(values: Tensor, n_points: int, exponent: float) -> Tensor:
    """The diagonal of D, (1 - (lambda_{q+1} / lambda)^a) / (lambda n), (q,), from q + 1 eigenvalues."""
    leading = values[:-1]
    return (1 - (values[-1] / leading) ** exponent) / (leading * n_points)


def _center_batches(order: Tensor, batch_size: int, owned: range) -> tuple[CenterBatch, ...]:
    """The batches of a pass for the rank with the centers `owned`; the batches are the same for any number of ranks."""
    batches = []
    for ids in order.split(batch_size):
        places = ((ids >= owned.start) & (ids < owned.stop)).nonzero()[:, 0]
        batches.append(CenterBatch(len(ids), ids[places] - owned.start, places))
    return tuple(batches)
