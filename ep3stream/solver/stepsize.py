"""The step size and the batch size, measured on batches of the data at hand.

Two limits hold for a batch of m rows, B = Q K(Z, X_b) K(X_b, Z) and momentum beta:

    eta <= safety / lambda_max(B)                the step along the batch's own leading direction;
    eta <= safety (1 - beta) / kappa_max         kappa(x) = K(x, Z) Q K(Z, x), the push of one row on itself:
                                                 momentum repeats it 1 / (1 - beta) times before the row returns.

The first grows with m, the second does not (Ma, Bassily, Belkin, "The power of interpolation", 2018, call
the m at which the two meet critical): beyond it rows are wasted, below it steps are.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.projection import Projection

_POWER_ITERATIONS = 15
_LEVERAGE_ROWS = 64


@dataclass(frozen=True, slots=True)
class Stability:
    """Largest eigenvalue and largest leverage seen on batches of `batch_size` rows."""

    batch_size: int
    lambda_max: float
    kappa_max: float

    def step_size(self, momentum: float, safety: float = 1.0) -> float:
        """The smaller of the two limits."""
        return safety * min(1 / self.lambda_max, (1 - momentum) / self.kappa_max)

    def critical_batch_size(self, momentum: float) -> float:
        """The m at which the two limits meet, lambda_max taken as proportional to m."""
        return self.batch_size * self.kappa_max / ((1 - momentum) * self.lambda_max)


def measure_stability(
    block_of: Callable[[Tensor], BatchBlock],
    batches: Sequence[Tensor],
    projection: Projection,
    mesh: Mesh,
    generator: torch.Generator,
) -> Stability:
    """Power iterations and leverages on a few batches, each (m, d) and the same on every rank; keeps the largest.

    lambda_max is a lower bound, within 10% of the batches' own; a few hundred rows or more in all are
    needed for it to hold for the next batch. O(p) memory beyond what `block_of` keeps.
    """
    lambdas: list[float] = []
    kappas: list[float] = []
    for x in batches:
        lambdas.append(_largest_eigenvalue(block_of(x), x, projection, mesh, generator))
        # A few rows at a time: a whole block, p x m, may be more than there is memory for.
        kappas += [
            float(projection.leverage(block_of(part).whole()).max()) for part in x.split(_LEVERAGE_ROWS)
        ]
    tiny = torch.finfo(torch.float32).tiny
    return Stability(len(batches[0]), max(*lambdas, tiny), max(*kappas, tiny))


def _largest_eigenvalue(
    block: BatchBlock, x: Tensor, projection: Projection, mesh: Mesh, generator: torch.Generator
) -> float:
    """Of K(X_b, Z) Q K(Z, X_b), (m, m), which has the eigenvalues of B, by power iteration on two vectors."""
    vectors = mesh.broadcast(torch.randn(2, len(x), generator=generator).to(x))
    growth = 0.0
    for _ in range(_POWER_ITERATIONS):
        vectors = vectors / vectors.norm(dim=1, keepdim=True).clamp_min(torch.finfo(vectors.dtype).tiny)
        vectors = mesh.all_reduce(block.left_times(projection.direction(block.times(vectors))))
        growth = float(vectors.norm(dim=1).max())
    return growth
