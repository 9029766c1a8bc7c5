"""How far the leading directions of the data are shrunk: to one threshold, which falls as rows are seen.

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
