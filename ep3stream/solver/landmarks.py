"""Eigenpairs of the kernel matrix of the landmarks, and how many of them a basis should have.

More pairs cost set-up and a longer step, and are worth it in two cases: where the eigenvalues fall fast, and where the
rank asked for would cut a level of the spectrum.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.spectrum import SPANNING, leading_eigenpairs

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
