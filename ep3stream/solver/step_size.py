"""The step size and the batch size, measured on batches of the data at hand.

Two limits hold for a batch of m rows, B = Q K(Z, X_b) W K(X_b, Z) with W the rows' weights, and momentum beta:

    eta <= safety / lambda_max(B)                the step along the batch's own leading direction;
    eta <= safety (1 - beta) / kappa_max         kappa(x) = w K(x, Z) Q K(Z, x), the push of one row on itself:
                                                 momentum repeats it 1 / (1 - beta) times before the row returns.

The first grows with m, the second does not (Ma, Bassily, Belkin, "The power of interpolation", 2018, call
the m at which the two meet critical): beyond it rows are wasted, below it steps are. `PublishedStep` is the rule
of EigenPro2 and 3, which assumes both from two numbers instead.

What is measured on a few batches of rows, from kernel blocks that are formed once where memory allows.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock, tiles
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import LeftPoints
from ep3stream.solver.projection import NystromProjection, Projection
from ep3stream.solver.spectrum import LeverageProfile

_KRYLOV_VECTORS = 10

_LEVERAGE_ROWS = 256

_LEVERAGE_VALUES = 1 << 23


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


@dataclass(frozen=True, slots=True)
class PublishedStep:
    """The published rule, from beta, the largest K(x, x), and lambda_{q+1}, the first eigenvalue not shrunk.

        m* = beta / lambda_{q+1}                             rounded down, at least 1
        eta = 1 / (2 beta)                                   for m < beta / lambda_{q+1} + 1
        eta = 0.99 / (beta + (m - 1) lambda_{q+1})           beyond

    for the sum of a batch's gradients (Ma, Belkin, 2019, section 4, halved as in EigenPro3's code). It takes both
    numbers, which come from the preconditioner's own sample, for those of all data and of an exact projection: it
    can diverge.
    """

    beta: float
    next_eigenvalue: float

    @classmethod
    def of(cls, kernel: Kernel, sample: Tensor, next_eigenvalue: float) -> PublishedStep:
        """With beta the largest on the sample, (s, d)."""
        return cls(float(kernel.diagonal(sample).max()), next_eigenvalue)

    @property
    def critical_batch_size(self) -> int:
        """m*."""
        return max(1, int(self.beta / self.next_eigenvalue))

    def lambda_max(self, batch_size: int) -> float:
        """The bound beta + (m - 1) lambda_{q+1} of a batch's largest eigenvalue."""
        return self.beta + (batch_size - 1) * self.next_eigenvalue

    def step_size(self, batch_size: int) -> float:
        """Eta."""
        if batch_size < self.beta / self.next_eigenvalue + 1:
            return 0.5 / self.beta
        return 0.99 / self.lambda_max(batch_size)


@dataclass(frozen=True, slots=True)
class Penalty:
    """What changes a step's operator beside the batch: the largest ridge of an output, and weights of rows.

    row_weights: those of each batch's rows, each (m,); heaviest: the largest of any row, met in a batch or not.
    """

    ridge: float = 0.0
    row_weights: Sequence[Tensor] | None = None
    heaviest: float = 1.0


def measure_stability(
    block_of: Callable[[Tensor], BatchBlock],
    batches: Sequence[Tensor],
    projection: Projection,
    mesh: Mesh,
    generator: torch.Generator,
    penalty: Penalty | None = None,
) -> Stability:
    """Leading eigenvalues and leverages on a few batches, each (m, d) and the same on every rank; keeps the largest.

    lambda_max is a lower bound, within 10% of the batches' own; a few hundred rows or more in all are
    needed for it to hold for the next batch. O(p) memory beyond what `block_of` keeps. A ridge adds m lambda Q K^
    to B, whose eigenvalues are at most m lambda, K^ being at most what Q preconditions (Weyl's inequality).
    """
    penalty = penalty or Penalty()
    lambdas: list[float] = []
    kappas: list[float] = []
    for number, x in enumerate(batches):
        weights = None if penalty.row_weights is None else penalty.row_weights[number]
        block = block_of(x)
        lambdas.append(largest_eigenvalue(block, x, weights, projection, mesh, generator))
        slices = leverage_slices(len(x), block.n_centers)
        kappas += [float(projection.leverage(block.columns(rows), x[rows]).max()) for rows in slices]
    tiny = torch.finfo(torch.float32).tiny
    m = len(batches[0])
    lambda_max = max(*lambdas, tiny) + m * penalty.ridge
    return Stability(m, lambda_max, max(*kappas, tiny) * penalty.heaviest)


def leverage_slices(n_rows: int, n_centers: int) -> Iterator[slice]:
    """A few rows at a time: a projection may need several times their kernel values."""
    return tiles(n_rows, max(1, min(_LEVERAGE_ROWS, _LEVERAGE_VALUES // max(1, n_centers))))


def largest_eigenvalue(
    block: BatchBlock,
    x: Tensor,
    weights: Tensor | None,
    projection: Projection,
    mesh: Mesh,
    generator: torch.Generator,
) -> float:
    """Of W^(1/2) K(X_b, Z) Q K(Z, X_b) W^(1/2), (m, m), which has the eigenvalues of B.

    Arnoldi's method, which is Lanczos' where the operator is symmetric, all but EigenPro's being so (Saad, "Numerical
    methods for large eigenvalue problems", 2011, chapter 6): ten products tell more than ten of a power iteration.
    weights: the diagonal of W, (m,), None for the identity.
    """
    half = x.new_ones(len(x)) if weights is None else weights.sqrt()

    def times_operator(vector: Tensor) -> Tensor:
        residual = (vector * half)[None]
        gradient = projection.preconditioned(block.times(residual), x, residual)
        return mesh.all_reduce(block.left_times(projection.direction(gradient)))[0] * half

    start = mesh.broadcast(torch.randn(len(x), generator=generator).to(x))
    return _largest_ritz_value(times_operator, start / start.norm(), min(_KRYLOV_VECTORS, len(x)))


def _largest_ritz_value(times_operator: Callable[[Tensor], Tensor], start: Tensor, n_vectors: int) -> float:
    """The largest absolute value among the eigenvalues of the operator's section on the Krylov space of `start`."""
    basis = [start]
    section = torch.zeros(n_vectors, n_vectors, dtype=torch.float64)
    for j in range(n_vectors):
        image = times_operator(basis[j])
        size = float(image.norm())
        known = torch.stack(basis)
        # Twice: what rounding leaves of a leading direction would be found again as a second one.
        along = known @ image
        image = image - along @ known
        again = known @ image
        image = image - again @ known
        section[: j + 1, j] = (along + again).double().cpu()
        left = float(image.norm())
        # Written so that a nan ends it too.
        if j + 1 == n_vectors or not left > torch.finfo(image.dtype).eps * len(image) ** 0.5 * size:
            break
        section[j + 1, j] = left
        basis.append(image / left)
    found = section[: len(basis), : len(basis)]
    return float(torch.linalg.eigvals(found).abs().max()) if bool(found.isfinite().all()) else float("nan")


# What another batch's leading eigenvalue may be of the one measured.
_ONE_BATCH_MARGIN = 1.25


class _Slot(NamedTuple):
    """Memory of a block, and whose it is."""

    number: int
    memory: Tensor
    block: BatchBlock


@dataclass(frozen=True, slots=True)
class StepProbe:
    """Batches of equal size, each (m, d), with K(Z_shard, X) of the first `n_kept`; others are formed when asked for.

    n_kept: at least one, as many as the memory of a fit's largest block holds.
    """

    kernel: Kernel
    shard: LeftPoints
    batches: Sequence[Tensor]
    penalty: Penalty
    mesh: Mesh
    generator: torch.Generator
    n_kept: int
    _slots: dict[int, _Slot] = field(default_factory=dict, init=False, repr=False)

    def block(self, number: int) -> BatchBlock:
        """That of a batch; those not kept share the last one's memory, and hold until the next of them."""
        x, place = self.batches[number], min(number, self.n_kept - 1)
        slot = self._slots.get(place)
        if slot is None or slot.number != number:
            memory = x.new_empty(len(self.shard) * len(x)) if slot is None else slot.memory
            block = BatchBlock(self.kernel, self.shard, self.kernel.right(x), memory)
            slot = self._slots[place] = _Slot(number, memory, block)
        return slot.block

    def leverage_profile(self, projection: NystromProjection | ExactProjection) -> LeverageProfile:
        """Of all rows; O(prm) a batch for `nystrom`."""
        parts = []
        # Backwards: the first ones, which are asked for again, are those that stay.
        for number in reversed(range(len(self.batches))):
            x, whole = self.batches[number], self.block(number).whole()
            parts += [
                projection.leverage_profile(whole[:, rows], x[rows])
                for rows in leverage_slices(len(x), len(self.shard))
            ]
        return LeverageProfile.cat(parts)

    def leading_eigenvalue(self, projection: NystromProjection | ExactProjection, limit: float) -> float:
        """Of the step's operator on a batch, but for the ridge; the largest of all batches unless the first decides.

        It does where another batch's, a quarter larger, would stay below `limit`: it comes back so much larger.
        """
        first = _ONE_BATCH_MARGIN * self._eigenvalue(0, projection)
        if first <= limit:
            return first
        others = [self._eigenvalue(number, projection) for number in range(1, len(self.batches))]
        return max(first / _ONE_BATCH_MARGIN, *others, 0)

    def _eigenvalue(self, number: int, projection: NystromProjection | ExactProjection) -> float:
        x, row_weights = self.batches[number], self.penalty.row_weights
        weights = None if row_weights is None else row_weights[number]
        found = largest_eigenvalue(self.block(number), x, weights, projection, self.mesh, self.generator)
        # Decisions hang on it, which all ranks must take alike, though their devices may differ in the last bit.
        return float(self.mesh.broadcast_object(lambda: found))
