"""Leading eigenpairs, the rank of the basis, and the threshold that flattens the spectrum of the data.

`leading_eigenpairs` finds eigenpairs of symmetric positive semidefinite matrices, in float64.

`LandmarkPairs` holds those of the landmarks' kernel matrix, and decides how many. More pairs cost set-up time and make
a step longer. They are worth it in two cases: where the eigenvalues fall fast (`falls_fast`), and where the rank asked
for would cut a level of the spectrum (`cuts_a_level`).

`Flattening` chooses the threshold t: the preconditioner lowers each eigenvalue tau_j of the data operator to
tau_j' = min(tau_j, t). A step that is safe for every row, eta kappa = 1 - beta, takes the share m tau_j' / kappa off
the error along direction j, so that n rows bring n tau_j' / kappa e-foldings of it. As kappa is about the sum of all
tau_j', the e-foldings of all directions add up to about n: a high t gives them to a few leading directions, a low t to
many. The threshold for n rows is the lowest that brings the flattened directions `FOLDINGS` e-foldings,

    n t / kappa(t) = FOLDINGS.

A fit starts with the threshold for its first 1024 rows and, each time the rows seen have doubled, moves to the
threshold for that many. So the directions that matter most are learnt first, from the fewest rows, and the number of
rows need not be known beforehand.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import kernel_matrix
from ep3stream.solver.kernels import Kernel

# Iterations of `leading_eigenpairs`: for the eigenpairs themselves, and for vectors that only have to span.
CONVERGED, SPANNING = 7, 3

# Whether more pairs help is judged at the end of so many, or of a quarter of the landmarks, and on so many landmarks:
# the shares below are theirs, and change with the number.
_JUDGED_RANK, _JUDGED_LANDMARKS = 500, 2000

# Rows of the sample that decide whether the rank cuts a level.
_LEVEL_ROWS = 128

# A rank cuts a level where a unit of eigenvalue beyond the rank has at least this share of the data's energy on a unit
# of the last fifth within. Measured: .69 and more within a level, .05 to .4 elsewhere, but up to .6 where the
# eigenvalues fall fast.
_LEVEL_SHARE, _LEVEL_SHARE_IF_FAST = 0.5, 0.75

# Mean eigenvalue beyond the rank, as a share of the first one there. Measured: .6 to .8 where 1 / mu serves them all.
_SPREAD_SHARE = 0.5

# Stages: the e-foldings of a flattened direction, the rows of the first stage, how the rows grow from stage to stage,
# and the largest share of the threshold before that is worth a new stage.
FOLDINGS = 7
_FIRST_ROWS = 1024
_GROWTH = 2
_LEAST_FALL = 0.8
_BISECTIONS = 40


def leading_eigenpairs(
    matrix: Tensor, n_pairs: int, generator: torch.Generator, n_iterations: int = CONVERGED
) -> tuple[Tensor, Tensor]:
    """The `n_pairs` largest eigenvalues of the matrix, descending, and their eigenvectors as columns; at most s.

    matrix: (s, s), symmetric, float32 or float64. Subspace iteration with a Rayleigh-Ritz step (Halko, Martinsson,
    Tropp, "Finding structure with randomness", 2011, algorithm 4.4) costs O(s^2 n_pairs). The iterations only turn the
    subspace, for which float32 and a triangular basis suffice; one product then gives the pairs within it. Where most
    pairs are asked for, the dense O(s^3) solver is as fast and is used.

    n_iterations: `SPANNING` where the vectors only serve as the V of a Nystrom approximation K V (V'KV)^+ V'K, which is
    one for any V. For 250 of 2000 pairs of Laplacian and Gaussian kernels, the trace that is left over is .2 to 1.6%
    above the optimum with `SPANNING`.
    """
    size = matrix.shape[0]
    width = n_pairs + max(32, n_pairs // 4)
    if 2 * width > size:
        values, vectors = torch.linalg.eigh(matrix.double())
        return values.flip(0)[:n_pairs], vectors.flip(1)[:, :n_pairs].contiguous()
    basis = torch.randn(size, width, generator=generator).to(matrix.device)
    rough = matrix.float()
    for _ in range(n_iterations):
        basis = _spanning(rough @ basis)
    basis = basis.double()
    # Orthonormal by Cholesky, a third of the cost of QR, unless the columns are not independent.
    factor, failed_at = torch.linalg.cholesky_ex(basis.T @ basis)
    if int(failed_at):
        basis = torch.linalg.qr(basis)[0]
    else:
        basis = torch.linalg.solve_triangular(factor.T, basis, upper=True, left=False)
    # In float32 the rounding of the product is as small as that of the kernel values themselves.
    turned = matrix.double() @ basis if n_iterations > SPANNING else (rough @ basis.float()).double()
    small = basis.T @ turned
    values, rotation = torch.linalg.eigh((small + small.T) / 2)
    return values.flip(0)[:n_pairs], basis @ rotation.flip(1)[:, :n_pairs]


def _spanning(columns: Tensor) -> Tensor:
    """A well-conditioned basis of the columns, (s, n), at a quarter of the cost of an orthonormal one: P L of P L U."""
    # Not `lu_factor`, which refuses columns that are not independent.
    factors, pivots, _ = torch.linalg.lu_factor_ex(columns)
    order = list(range(len(columns)))  # P itself would be (s, s).
    for row, pivot in enumerate(pivots.tolist()):
        order[row], order[pivot - 1] = order[pivot - 1], order[row]
    lower = factors.tril(-1)
    lower.diagonal().fill_(1)
    basis = torch.empty_like(lower)
    basis[order] = lower
    return basis


@dataclass(frozen=True, slots=True)
class LandmarkPairs:
    """The `rank` leading eigenpairs of the landmarks' K(L, L), and the next one; the same on every rank.

    points: L, (r', d). judged: at how many pairs it was decided whether more help; `values` and `vectors` may have as
    many. completes_a_level: whether the rank was raised because those cut a level; is_fast: because the eigenvalues
    fall fast.
    """

    points: Tensor
    values: Tensor
    vectors: Tensor
    rank: int
    judged: int
    completes_a_level: bool
    is_fast: bool = False

    def next_eigenvalue(self, n_centers: int) -> float:
        """An estimate of l_{r+1} of K(Z, Z) of so many centers.

        On r' random centers an eigenvalue of K(L, L) is about r'/p times one of K(Z, Z).
        """
        if len(self.values) <= self.rank:
            return 0.0
        return float(self.values[self.rank]) * n_centers / len(self.points)

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
        """The pairs of the first rank in `ranks`, or of the second where it is larger and helps much.

        landmarks: (r', d); a raised rank r uses the first 4 r / 3 of them. sample: (s, d), rows of the data.
        """
        rank, widest_rank = ranks
        k_ll = mesh.broadcast(kernel_matrix(kernel, landmarks))
        values, vectors = _pairs(k_ll, rank, mesh, generator)
        narrow = cls(landmarks, values, vectors, rank, rank, completes_a_level=False)
        if rank >= widest_rank or not may_gain(values, _trace(k_ll), len(k_ll)):
            return narrow
        judged = max(rank, min(_JUDGED_RANK, len(landmarks) // 4))
        if len(k_ll) > _JUDGED_LANDMARKS:
            k_ll, landmarks = k_ll[:_JUDGED_LANDMARKS, :_JUDGED_LANDMARKS], landmarks[:_JUDGED_LANDMARKS]
            values, vectors = _pairs(k_ll, rank, mesh, generator)
        values, vectors = _with_more(k_ll, values, vectors, judged, mesh, generator)
        rows = kernel.right(sample[:_LEVEL_ROWS])
        k_lx = mesh.broadcast(kernel.block(kernel.left(landmarks), rows).double())
        left_over = _trace(k_ll) - float(values.sum())
        is_fast = falls_fast(values, left_over, len(k_ll))
        share = _LEVEL_SHARE_IF_FAST if is_fast else _LEVEL_SHARE
        is_cut = cuts_a_level(values, vectors, left_over, k_lx, share)
        if not (is_fast or is_cut):
            return narrow
        landmarks = landmarks[: widest_rank + widest_rank // 3]
        values, vectors = _pairs(k_ll[: len(landmarks), : len(landmarks)], widest_rank, mesh, generator)
        return cls(landmarks, values, vectors, widest_rank, judged, is_cut, is_fast)


def _trace(matrix: Tensor) -> float:
    return float(matrix.diagonal().double().sum())


def _pairs(k_ll: Tensor, rank: int, mesh: Mesh, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    values, vectors = leading_eigenpairs(k_ll, rank + 1, generator, SPANNING)
    return mesh.broadcast(values), mesh.broadcast(vectors)


def _with_more(
    k_ll: Tensor, values: Tensor, vectors: Tensor, rank: int, mesh: Mesh, generator: torch.Generator
) -> tuple[Tensor, Tensor]:
    """The known pairs of k_ll and those after them, `rank` and the next one in all.

    Those after are the pairs of (I - V V') k_ll (I - V V'), V the known vectors, so that all vectors are orthonormal.
    """
    if rank < len(values):
        return values, vectors
    k_ll = k_ll.double()
    half = k_ll @ vectors - vectors * (values / 2)
    left = k_ll.addmm(half, vectors.T, alpha=-1).addmm_(vectors, half.T, alpha=-1)
    more_values, more_vectors = leading_eigenpairs(left, rank + 1 - len(values), generator, SPANNING)
    more_values, more_vectors = mesh.broadcast(more_values), mesh.broadcast(more_vectors)
    return torch.cat([values, more_values]), torch.cat([vectors, more_vectors], 1)


def may_gain(values: Tensor, trace: float, n_landmarks: int) -> bool:
    """Whether the eigenvalues beyond these r + 1 leading ones, of `trace` in all, spread enough for more pairs to help.

    Where their mean is half of the last of these and more, 1 / mu serves them all, and pairs need not be looked for.
    With more than 2000 landmarks the mean is what it is about with 2000: all eigenvalues fall in proportion.
    """
    beyond = float(values[-1]) * (min(n_landmarks, _JUDGED_LANDMARKS) - len(values))
    return trace - float(values.sum()) < _SPREAD_SHARE * beyond


def falls_fast(values: Tensor, left_over: float, n_landmarks: int) -> bool:
    """Whether the eigenvalues beyond these r + 1 leading ones fall faster than 1/j^3, judged by their sum `left_over`.

    Then a few times as many pairs leave a many times smaller rest. Where eigenvalues fall slower, as those of a
    Laplacian in more than one dimension, mu hardly falls with more pairs.
    """
    rank, last = len(values) - 1, float(values[-1])
    return last > 0 and left_over < last * rank * (1 - (rank / n_landmarks) ** 2) / 2


def cuts_a_level(
    values: Tensor, vectors: Tensor, left_over: float, k_lx: Tensor, share: float = _LEVEL_SHARE
) -> bool:
    """Whether the directions beyond these r + 1 matter to the data as much as the last ones within the rank.

    Functions that a symmetry makes equal, such as all of the third degree, form a level: the data put the same energy
    on each. Where there are hardly more centers than functions, their eigenvalues of K(Z, Z) spread widely all the
    same (Marchenko and Pastur, 1967). The exact projection undoes this spread. With 1 / mu for all directions beyond
    r, one of eigenvalue l is learnt mu / l times slower than the last ones within.

    tau_j = mean_x (v_j' k_x)^2 / l_j is, up to a factor, the speed at which the exact projection learns direction j.
    The result is True where the mean of tau_j beyond r, weighted with l_j, is above `share` times that over the last
    fifth within, and the eigenvalues beyond do spread. left_over: their sum; k_lx: K(L, X), (r', n).
    """
    rank, n_landmarks = len(values) - 1, len(vectors)
    beyond = float(values[-1]) * (n_landmarks - len(values))
    if not 0 < left_over < _SPREAD_SHARE * beyond:
        return False
    energy = (vectors.T @ k_lx).square().sum(1)
    last = slice(rank - max(1, rank // 5), rank)
    within = float(energy[last].sum() / values[last].sum())
    return float(k_lx.square().sum() - energy.sum()) / left_over > share * within


@dataclass(frozen=True, slots=True)
class Flattening:
    """The eigenvalues of the data operator, and the choice of a threshold among them.

    eigenvalues: tau, (q,), descending; empty where the sample is one row. least: no threshold may be lower, for the
    sake of rounding, or to bound the number of flattened directions.
    """

    eigenvalues: Tensor
    least: float

    def eigenvalue_scale(self, threshold: float) -> Tensor:
        """The factor on each eigenvalue, (q,): t / tau_j where tau_j is above the threshold t, otherwise 1."""
        return torch.where(self.eigenvalues > threshold, threshold / self.eigenvalues, 1.0)

    def fixed(self, data_rank: int) -> float:
        """The threshold that lowers `data_rank` eigenvalues to the next one, but not below `least`."""
        if not len(self.eigenvalues):
            return self.least
        return max(float(self.eigenvalues[min(data_rank, len(self.eigenvalues) - 1)]), self.least)

    def falling(self, profile: LeverageProfile, n_rows: int) -> list[tuple[int, float]]:
        """Pairs (first row, threshold), one a stage: the first begins at row 0, none at row `n_rows` or later."""
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
        """The threshold for n_rows, by bisection of n t >= FOLDINGS kappa(t) on a logarithmic scale."""
        low, high = lowest, float(max([lowest, *self.eigenvalues[:1].tolist()]))

        def enough(threshold: float) -> bool:
            return n_rows * threshold >= FOLDINGS * float(profile.at(self.eigenvalue_scale(threshold)).max())

        if enough(low):
            return low
        for _ in range(_BISECTIONS):
            middle = (low * high) ** 0.5
            low, high = (low, middle) if enough(middle) else (middle, high)
        return high


@dataclass(frozen=True, slots=True)
class LeverageProfile:
    """The leverage kappa(x) = K(x, Z) Q K(Z, x) of n rows x, as a function of the eigenvalue scale.

    along: (q, n), the part of each direction at the scale 1; beyond: (n,), the part outside all directions. float64.
    """

    along: Tensor
    beyond: Tensor

    @classmethod
    def cat(cls, parts: list[LeverageProfile]) -> LeverageProfile:
        """The profile of the rows of all parts."""
        return cls(torch.cat([p.along for p in parts], 1), torch.cat([p.beyond for p in parts]))

    def at(self, eigenvalue_scale: Tensor) -> Tensor:
        """kappa of each row, (n,), for a scale of (q,)."""
        return eigenvalue_scale @ self.along + self.beyond
