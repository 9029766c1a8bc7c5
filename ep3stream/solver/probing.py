"""What is measured on a few batches of rows, from kernel blocks that are formed once where memory allows."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import NamedTuple

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.exact import ExactProjection
from ep3stream.solver.flattening import LeverageProfile
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import LeftPoints
from ep3stream.solver.projection import NystromProjection
from ep3stream.solver.stepsize import Penalty, largest_eigenvalue, leverage_slices

# What another batch's leading eigenvalue may be of the one measured.
_ONE_BATCH_MARGIN = 1.25


class _Slot(NamedTuple):
    """Memory of a block, and whose it is."""

    number: int
    memory: Tensor
    block: BatchBlock


@dataclass(frozen=True, slots=True)
class ProbedBatches:
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
        return float(self.mesh.led(lambda: found))
