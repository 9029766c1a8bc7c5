"""Leading eigenpairs of symmetric positive semidefinite matrices, in float64.

Eigenpairs of the kernel matrix of the landmarks, and how many of them a basis should have.

More pairs cost set-up and a longer step, and are worth it in two cases: where the eigenvalues fall fast, and where the
rank asked for would cut a level of the spectrum.

How far the leading directions of the data are shrunk: to one threshold, which falls as rows are seen.

A step that is safe for every row, eta kappa = 1 - beta, moves direction j, of eigenvalue tau_j, by
rho_j = m tau_j' / kappa of what is left of it, tau_j' = min(tau_j, t). Within n rows it gets n tau_j' / kappa
e-foldings: a fixed stock of n to be shared out, for kappa is about the sum of all tau'. A high threshold t gives it
to a few leading directions, a low one to many. So the threshold of n rows is the lowest that gives the flattened
directions `FOLDINGS` e-foldings in n rows,

    n t / kappa(t) = FOLDINGS,

and since a fit has always seen some rows, the fit starts with the threshold of its first thousand and passes to
that of twice as many whenever it has seen so many: what matters most is learnt first, with the fewest rows,
and no number of rows has to be known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.kernels import Kernel

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


_LEVEL_ROWS = 128

# What the data put on a unit of eigenvalue beyond the rank, as a share of what they put on one of the last fifth
# within: .69 and more in the midst of a level, .05 to .4 elsewhere, but up to .6 where the eigenvalues fall fast.
_LEVEL_SHARE, _LEVEL_SHARE_IF_FAST = 0.5, 0.75

# The mean eigenvalue beyond the rank, of the first: from .6 to .8 where 1 / mu does for all of them.
_SPREAD_SHARE = 0.5


@dataclass(frozen=True, slots=True)
class LandmarkPairs:
    """The `rank` leading eigenpairs of K(L, L) and the next one; points: L, (r', d). The same on every rank.

    completes_a_level: whether the rank is wider than asked for because that one would have cut a level.
    """

    points: Tensor
    values: Tensor
    vectors: Tensor
    rank: int
    completes_a_level: bool

    @classmethod
    def of(
        cls,
        kernel: Kernel,
        landmarks: Tensor,
        sample: Tensor,
        ranks: tuple[int, int],
        mesh: Mesh,
        generator: torch.Generator,
    ) -> LandmarkPairs:
        """As many pairs as the first of `ranks` says, or the second where it is wider and helps much.

        landmarks: (r', d), of which those that a wider rank takes are used; sample: of the data, (s, d).
        """
        rank, widest_rank = ranks
        k_ll = kernel.block(kernel.left(landmarks), kernel.right(landmarks)).double()
        k_ll = mesh.broadcast((k_ll + k_ll.T) / 2)
        values, vectors = _pairs(k_ll, rank, mesh, generator)
        is_fast = is_cut = False
        if rank < widest_rank:
            rows = kernel.right(sample[:_LEVEL_ROWS])
            k_lx = mesh.broadcast(kernel.block(kernel.left(landmarks), rows).double())
            left_over = float(k_ll.trace() - values.sum())
            is_fast = falls_fast(values, left_over, len(k_ll))
            share = _LEVEL_SHARE_IF_FAST if is_fast else _LEVEL_SHARE
            is_cut = cuts_a_level(values, vectors, left_over, k_lx, share)
        if is_fast or is_cut:
            rank = widest_rank
            landmarks = landmarks[: rank + rank // 3]
            values, vectors = _pairs(k_ll[: len(landmarks), : len(landmarks)], rank, mesh, generator)
        return cls(landmarks, values, vectors, rank, is_cut)


def _pairs(k_ll: Tensor, rank: int, mesh: Mesh, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    values, vectors = leading_eigenpairs(k_ll, rank + 1, generator, SPANNING)
    return mesh.broadcast(values), mesh.broadcast(vectors)


def falls_fast(values: Tensor, left_over: float, n_landmarks: int) -> bool:
    """Whether the eigenvalues that follow these r + 1 leading ones fall faster than 1/j^3, by what is left for them.

    Then a few times as many pairs leave many times less. Where they fall slower, as those of a Laplacian do in more
    than one dimension, mu hardly falls with more of them.
    """
    rank, last = len(values) - 1, float(values[-1])
    return last > 0 and left_over < last * rank * (1 - (rank / n_landmarks) ** 2) / 2


def cuts_a_level(
    values: Tensor, vectors: Tensor, left_over: float, k_lx: Tensor, share: float = _LEVEL_SHARE
) -> bool:
    """Whether the directions beyond these r + 1 matter to the data as the last ones do, and have lower eigenvalues.

    Functions that a symmetry makes equal, such as all those of the third degree, are a level: the data see each of
    them alike. Where the centers are hardly more than the functions, their eigenvalues of K(Z, Z) spread over a wide
    range all the same (Marchenko and Pastur, 1967). The exact projection undoes that; with 1 / mu for all beyond r, one
    of eigenvalue l is learnt mu / l times slower than the last ones within.

    tau_j = mean_x (v_j' k_x)^2 / l_j is the speed at which the exact one learns direction j, but for a factor.
    Its mean beyond r, weighted with l_j, is to be above `share` of that over the last fifth within. k_lx: K(L, X),
    (r', n).
    """
    rank, n_landmarks = len(values) - 1, len(vectors)
    beyond = float(values[-1]) * (n_landmarks - len(values))
    if not 0 < left_over < _SPREAD_SHARE * beyond:
        return False
    energy = (vectors.T @ k_lx).square().sum(1)
    last = slice(rank - max(1, rank // 5), rank)
    within = float(energy[last].sum() / values[last].sum())
    return float(k_lx.square().sum() - energy.sum()) / left_over > share * within


FOLDINGS = 7

_FIRST_ROWS = 1024

_GROWTH = 2

_BISECTIONS = 40

# A threshold less than this much lower is not worth a stage.
_LEAST_FALL = 0.8


@dataclass(frozen=True, slots=True)
class Flattening:
    """The eigenpairs of the preconditioned data operator that a threshold is set among.

    eigenvalues: tau, (q,), descending, none if the sample is a single row; least: the lowest threshold, that of as many
    directions as are to be flattened at most, or below which the rounding of the first ones would be amplified.
    """

    eigenvalues: Tensor
    least: float

    def shrink(self, threshold: float) -> Tensor:
        """What is left of each direction, (q,): t / tau_j above the threshold, 1 below."""
        return torch.where(self.eigenvalues > threshold, threshold / self.eigenvalues, 1.0)

    def fixed(self, data_rank: int) -> float:
        """The threshold that shrinks `data_rank` directions to the next one's eigenvalue."""
        if not len(self.eigenvalues):
            return self.least
        return max(float(self.eigenvalues[min(data_rank, len(self.eigenvalues) - 1)]), self.least)

    def falling(self, profile: LeverageProfile, n_rows: int) -> list[tuple[int, float]]:
        """From how many rows on which threshold; the first from 0 on, none from `n_rows` on but the first."""
        lowest = max([self.least, *self.eigenvalues[-1:].tolist()])
        stages: list[tuple[int, float]] = []
        rows = _FIRST_ROWS
        while not stages or rows < n_rows:
            threshold = self._threshold(profile, rows, lowest)
            if not stages:
                stages.append((0, threshold))
            elif threshold <= _LEAST_FALL * stages[-1][1]:
                stages.append((rows, threshold))
            if threshold <= lowest:
                break
            rows *= _GROWTH
        return stages

    def _threshold(self, profile: LeverageProfile, n_rows: int, lowest: float) -> float:
        low, high = lowest, float(max([lowest, *self.eigenvalues[:1].tolist()]))

        def enough(threshold: float) -> bool:
            return n_rows * threshold >= FOLDINGS * profile.largest(self.shrink(threshold))

        if enough(low):
            return low
        for _ in range(_BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


@dataclass(frozen=True, slots=True)
class LeverageProfile:
    """kappa(x) = K(x, Z) Q K(Z, x) of some rows x, for any shrink of the directions.

    along: (q, n), what each direction adds unshrunk; beyond: (n,), what none of them holds. float64.
    """

    along: Tensor
    beyond: Tensor

    @classmethod
    def cat(cls, parts: list[LeverageProfile]) -> LeverageProfile:
        """Of all their rows."""
        return cls(torch.cat([p.along for p in parts], 1), torch.cat([p.beyond for p in parts]))

    def largest(self, shrink: Tensor) -> float:
        """The largest kappa."""
        return float((shrink @ self.along + self.beyond).max())
