"""The step size and the batch size, measured on batches of the data.

For a batch of m rows let B = Q K(Z, X_b) W K(X_b, Z), W = diag(w) the rows' weights, and let beta be the momentum. The
leverage kappa(x) = w K(x, Z) Q K(Z, x) is how far a step on row x alone moves f(x). Two limits hold for the step size:

    eta <= safety / lambda_max(B)                for the leading direction of the batch;
    eta <= safety (1 - beta) / kappa_max         for nearly each row: momentum repeats its push 1 / (1 - beta)
                                                 times before the row comes again.

The first limit falls with m, the second does not depend on m. Ma, Bassily and Belkin ("The power of interpolation",
2018) call the m at which the two meet critical: a larger batch wastes rows, a smaller one wastes steps.

`PublishedStep` is the rule of EigenPro2 and 3, which measures nothing. `measure_stability` measures both limits for
one projection. `StepProbe` serves the stages of a fit: it keeps the kernel blocks of its batches for many projections.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import LeftPoints
from ep3stream.solver.projection import NystromProjection, Projection
from ep3stream.solver.spectrum import LeverageProfile
from ep3stream.solver.tiles import column_strips, tiles

# Vectors of a Krylov space at most, and before it may be taken to be large enough: when one more adds less than 1%.
_KRYLOV_VECTORS, _LEAST_VECTORS, _GROWN = 10, 3, 1.01

# Of CPUs: rows whose leverage is computed at once, and the largest number of their kernel values.
_LEVERAGE_ROWS = 256
_LEVERAGE_VALUES = 1 << 23

# The leverage that limits the step: so many times that of all rows measured but a hundredth, within these shares of the
# largest. By tools/bench_problems.py a step half as long is better for some problems and one twice as long for others.
_COMMON_ROWS, _COMMON_MARGIN, _OF_LARGEST = 0.99, 1.1, (0.6, 0.9)

# The leading eigenvalue of another batch is taken to be at most this many times that of the batch measured.
_ONE_BATCH_MARGIN = 1.25


@dataclass(frozen=True, slots=True)
class Stability:
    """The largest eigenvalue and the limiting leverage of batches of `batch_size` rows."""

    batch_size: int
    lambda_max: float
    kappa_max: float

    def step_size(self, momentum: float, safety: float = 1.0) -> float:
        """The smaller of the two limits."""
        return safety * min(1 / self.lambda_max, (1 - momentum) / self.kappa_max)

    def critical_batch_size(self, momentum: float) -> float:
        """The m at which the two limits meet, with lambda_max taken as proportional to m."""
        return self.batch_size * self.kappa_max / ((1 - momentum) * self.lambda_max)


def limiting_leverage(leverages: Tensor) -> float:
    """kappa_max from the leverages of some rows, (n,).

    The largest of a thousand rows is a matter of chance and would be the step of all others: in two draws from
    Fashion-MNIST it is .093 and .185, where a hundredth of the rows has more than .071 and .075. A row diverges where
    its leverage is twice what limits the step; below that its error alternates and dies away.
    """
    common, largest = float(torch.quantile(leverages.double(), _COMMON_ROWS)), float(leverages.max())
    least, most = (share * largest for share in _OF_LARGEST)
    return min(max(_COMMON_MARGIN * common, least), most)


@dataclass(frozen=True, slots=True)
class PublishedStep:
    """The published rule, from beta, the largest K(x, x), and lambda_{q+1}, the first eigenvalue not flattened.

        m* = beta / lambda_{q+1}                             rounded down, at least 1
        eta = 1 / (2 beta)                                   for m < beta / lambda_{q+1} + 1
        eta = 0.99 / (beta + (m - 1) lambda_{q+1})           beyond

    for the sum of a batch's gradients (Ma, Belkin, 2019, section 4, halved as in EigenPro3's code). The fit can
    diverge: both numbers come from the preconditioner's own sample, and the rule takes them to hold for all data, and
    the projection to be exact.
    """

    beta: float
    next_eigenvalue: float

    @classmethod
    def of(cls, kernel: Kernel, sample: Tensor, next_eigenvalue: float) -> PublishedStep:
        """The rule with beta the largest K(x, x) of a sample, (s, d)."""
        return cls(float(kernel.diagonal(sample).max()), next_eigenvalue)

    @property
    def critical_batch_size(self) -> int:
        """m* of the rule."""
        return max(1, int(self.beta / self.next_eigenvalue))

    def lambda_max(self, batch_size: int) -> float:
        """The bound beta + (m - 1) lambda_{q+1} of a batch's largest eigenvalue."""
        return self.beta + (batch_size - 1) * self.next_eigenvalue

    def step_size(self, batch_size: int) -> float:
        """The eta of the rule for batches of m = batch_size rows."""
        if batch_size < self.beta / self.next_eigenvalue + 1:
            return 0.5 / self.beta
        return 0.99 / self.lambda_max(batch_size)


@dataclass(frozen=True, slots=True)
class Penalty:
    """What changes the operator of a step besides the batch: a ridge, and weights of rows.

    ridge: the largest of any output. row_weights: for each batch, those of its rows, (m,); None where all are 1.
    heaviest: the largest weight that any row can have.
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
    """The largest leading eigenvalue and leverage of a few batches, each (m, d) and the same on every rank.

    lambda_max is a lower bound, within 10% of the largest of these batches; for it to hold for the next batch, the
    batches need a few hundred rows in all. A ridge lambda adds m lambda Q K^ to B, whose eigenvalues are at most
    m lambda since K^ is at most what Q inverts, so lambda_max grows by at most that (Weyl's inequality).
    Memory: O(p), besides the blocks.
    """
    penalty = penalty or Penalty()
    lambdas: list[float] = []
    kappas: list[Tensor] = []
    for number, x in enumerate(batches):
        weights = None if penalty.row_weights is None else penalty.row_weights[number]
        block = block_of(x)
        lambdas.append(largest_eigenvalue(block, x, weights, projection, mesh, generator))
        slices = _leverage_slices(projection, x, block.n_centers)
        kappas += [projection.leverage(block.columns(rows), x[rows]) for rows in slices]
    tiny = torch.finfo(torch.float32).tiny
    m = len(batches[0])
    lambda_max = max(*lambdas, tiny) + m * penalty.ridge
    return Stability(m, lambda_max, max(limiting_leverage(torch.cat(kappas)), tiny) * penalty.heaviest)


def _leverage_slices(projection: Projection, x: Tensor, n_centers: int) -> Iterator[slice]:
    """Slices of a few rows each: a projection may need several times the memory of their kernel values.

    The Nystrom projection works by tiles of centers, and takes all rows at once.
    """
    if isinstance(projection, NystromProjection):
        return iter([slice(0, len(x))])
    if x.device.type == "cuda":
        return column_strips(n_centers, len(x), x.device)
    return tiles(len(x), max(1, min(_LEVERAGE_ROWS, _LEVERAGE_VALUES // max(1, n_centers))))


def largest_eigenvalue(
    block: BatchBlock,
    x: Tensor,
    weights: Tensor | None,
    projection: Projection,
    mesh: Mesh,
    generator: torch.Generator,
) -> float:
    """The largest eigenvalue of W^(1/2) K(X_b, Z) Q K(Z, X_b) W^(1/2), (m, m), which are those of B.

    Arnoldi's method (Saad, "Numerical methods for large eigenvalue problems", 2011, chapter 6), which is Lanczos'
    where the operator is symmetric, as it is for all projections but EigenPro's. Its products, ten at most, tell more
    than as many steps of a power iteration. weights: the diagonal of W, (m,), None for the identity.
    """
    half = x.new_ones(len(x)) if weights is None else weights.sqrt()

    def times_operator(vector: Tensor) -> Tensor:
        residual = (vector * half)[None]
        gradient = projection.preconditioned(block.times(residual), x, residual)
        return mesh.all_reduce(block.left_times(projection.direction(gradient)))[0] * half

    start = mesh.broadcast(torch.randn(len(x), generator=generator).to(x))
    return _largest_ritz_value(times_operator, start / start.norm(), min(_KRYLOV_VECTORS, len(x)))


def _largest_ritz_value(times_operator: Callable[[Tensor], Tensor], start: Tensor, n_vectors: int) -> float:
    """The largest absolute eigenvalue of the operator's section on the Krylov space of `start`; nan if not finite.

    The space grows until this value hardly does, to `n_vectors` at most.
    """
    basis, found = [start], 0.0
    section = torch.zeros(n_vectors, n_vectors, dtype=torch.float64)
    for j in range(n_vectors):
        image = times_operator(basis[j])
        size = float(image.norm())
        known = torch.stack(basis)
        # Orthogonalised twice: otherwise the rounding error along a leading direction would be found again as a second.
        along = known @ image
        image = image - along @ known
        again = known @ image
        image = image - again @ known
        section[: j + 1, j] = (along + again).double().cpu()
        left, last = float(image.norm()), found
        within = section[: j + 1, : j + 1]
        found = (
            float(torch.linalg.eigvals(within).abs().max()) if bool(within.isfinite().all()) else float("nan")
        )
        # `not ... >`, so that a nan ends the loop too.
        is_settled = j >= _LEAST_VECTORS and not found > _GROWN * last
        if (
            j + 1 == n_vectors
            or is_settled
            or not left > torch.finfo(image.dtype).eps * len(image) ** 0.5 * size
        ):
            break
        section[j + 1, j] = left
        basis.append(image / left)
    return found


class _Slot(NamedTuple):
    """Memory for one block, and the batch, by number, whose block is in it."""

    number: int
    memory: Tensor
    block: BatchBlock


@dataclass(frozen=True, slots=True)
class StepProbe:
    """Batches of equal size to measure steps on, with the blocks K(Z_shard, X) of the first batches kept.

    batches: each (m, d). n_kept: how many blocks there is memory for, at least one; the block of any further batch is
    formed again whenever it is asked for, in the memory of the last one.
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
        """The block of a batch. One that is not kept is valid until the next call for another such batch."""
        x, place = self.batches[number], min(number, self.n_kept - 1)
        slot = self._slots.get(place)
        if slot is None or slot.number != number:
            memory = x.new_empty(len(self.shard) * len(x)) if slot is None else slot.memory
            block = BatchBlock(self.kernel, self.shard, self.kernel.right(x), memory)
            slot = self._slots[place] = _Slot(number, memory, block)
        return slot.block

    def leverage_profile(self, projection: NystromProjection | ExactProjection) -> LeverageProfile:
        """The leverage profile of all rows; O(prm) a batch for `nystrom`."""
        parts = []
        # Backwards, so that the first blocks stay: they are asked for again.
        for number in reversed(range(len(self.batches))):
            x, whole = self.batches[number], self.block(number).whole()
            parts += [
                projection.leverage_profile(whole[:, rows], x[rows])
                for rows in _leverage_slices(projection, x, len(self.shard))
            ]
        return LeverageProfile.cat(parts)

    def leading_eigenvalue(self, projection: NystromProjection | ExactProjection, limit: float) -> float:
        """The leading eigenvalue of the step's operator, without the ridge: the largest of all batches.

        If 1.25 times that of the first batch is at most `limit`, this product is returned, as an upper bound, and no
        other batch is measured. limit: the value up to which lambda_max does not limit the step.
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
        # Broadcast, since decisions depend on this number and devices may differ in the last bit.
        return float(self.mesh.broadcast_object(lambda: found))
