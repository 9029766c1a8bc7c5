"""The step: projected, doubly preconditioned SGD with momentum and a tail average.

One step on a batch (X_b, y_b), with weights alpha and velocity v, is algorithm 1 of Abedsoltan, Belkin, Pandit (2023),
with Nesterov's look-ahead and polynomial-decay averaging (Shamir and Zhang, 2013) added:

    g = K(X_b, Z)(alpha + beta v) - y_b                 (R c, m), summed over the shards; y_b less the linear part
    h = K(Z, X_b) W g                                   W = diag(w), the weights of the rows' classes
    theta = Q (h + m lambda K^ (alpha + beta v))        K^ ~ K(Z, Z)
    v = beta v - eta theta;  alpha += v
    average += a / (t + a) (alpha - average)            the weights themselves for a = 0

Q and K^ are those of projection.py or exact.py; eigenpro.py has beta = a = lambda = 0.
It minimises 1/(2n) sum_i w_i |f(x_i) - y_i|^2 + lambda/2 alpha' K^ alpha, with K^ as the projection defines it.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.gpu import float32_products
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.linear_part import LinearPart
from ep3stream.solver.points import Points
from ep3stream.solver.projection import Projection
from ep3stream.solver.targets import TargetCode


@dataclass(slots=True)
class SolverState:
    """The tensors that a step changes, each (R c, p_shard); averaged: the number of steps in the average."""

    weights: Tensor
    velocity: Tensor
    average: Tensor
    averaged: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in checkpoints."""
        return {"weights": self.weights, "velocity": self.velocity, "average": self.average}


@dataclass(frozen=True, slots=True)
class Stage:
    """The projection from row `first_row` of the fit on, and its step size as a multiple of the first stage's."""

    first_row: int
    projection: Projection
    step_scale: float = 1.0


class StepErrors(NamedTuple):
    """Errors of one step, 0-d tensors. The three losses are mean squared errors on the batch before the step.

    loss: of the look-ahead point alpha + beta v. average_loss: of the average, which becomes the model. zero_loss: of
    the zero model, which predicts the mean. All in the squared unit of y. inexactness: |K(Z, Z) theta - h| / |h|, nan
    unless the projection is iterative. All but the first are nan unless asked for.
    """

    loss: Tensor
    average_loss: Tensor
    zero_loss: Tensor
    inexactness: Tensor


@dataclass(frozen=True, slots=True)
class Solver:
    """All that a step reads. It changes nothing of this except `block_memory`, where the kernel block is formed.

    projection: of the first stage; later: the stages after it, in their order. centers: this rank's shard, prepared
    for the left side of blocks. momentum: beta; averaging: a; ridge: lambda. block_memory: room for p_shard m numbers;
    None to form the block anew for each product. linear: what the model has beside the kernel, if anything.
    """

    kernel: Kernel
    centers: Points
    projection: Projection
    targets: TargetCode
    momentum: float
    averaging: float
    mesh: Mesh
    block_memory: Tensor | None = None
    ridge: float = 0.0
    later: tuple[Stage, ...] = ()
    linear: LinearPart | None = None

    def initial_state(self) -> SolverState:
        """The state of the zero model."""
        zero = self.centers.prepared.new_zeros(self.targets.n_columns, len(self.centers))
        return SolverState(zero, zero.clone(), zero.clone())

    def stage(self, rows_seen: int) -> Stage:
        """The stage of the fit after `rows_seen` rows."""
        begun = [stage for stage in self.later if stage.first_row <= rows_seen]
        return begun[-1] if begun else Stage(0, self.projection)

    def block(self, x: Tensor) -> BatchBlock:
        """K(Z_shard, X) for x of (m, d), in the solver's block memory."""
        return BatchBlock(self.kernel, self.centers, self.kernel.right(x), self.block_memory)

    @float32_products()
    def step(
        self,
        state: SolverState,
        x: Tensor,
        y: Tensor,
        step_size: float,
        score: bool = False,
        rows_seen: int = 0,
    ) -> StepErrors:
        """One step on x, (m, d), and y. Changes `state` and returns the errors, all of them with `score`.

        step_size: of the first stage. rows_seen: the rows that the fit has seen so far, which decide the stage.

        The losses leave out weights and ridge, and are honest estimates as long as the rows are new to the fit.
        `score` costs one skinny product more, and for an iterative projection a product with K(Z, Z). The errors stay
        on the device: to read them is to wait for it.
        """
        stage, block = self.stage(rows_seen), self.block(x)
        ahead = torch.add(state.weights, state.velocity, alpha=self.momentum)
        both = torch.cat([ahead, state.average]) if score else ahead
        predicted = self.mesh.all_reduce(block.left_times(both))
        if self.linear is not None:
            self.linear.add_(predicted, x)
        residual, scored = predicted.tensor_split([len(ahead)])
        residual = residual.contiguous()
        self.targets.subtract_(residual, y)
        loss = self.targets.mean_squared_error(residual)
        average_loss = zero_loss = inexactness = torch.full_like(loss, torch.nan)
        if score:
            self.targets.subtract_(scored, y)
            average_loss = self.targets.mean_squared_error(scored)
            self.targets.subtract_(scored.zero_(), y)
            zero_loss = self.targets.mean_squared_error(scored)
        self.targets.weigh_(residual, y)
        gradient = stage.projection.preconditioned(block.times(residual), x, residual)
        penalized = len(x) * self.targets.ridges(self.ridge)[:, None] * ahead if self.ridge else None
        theta = stage.projection.direction(gradient, penalized)
        if score:
            inexactness = stage.projection.inexactness(theta, gradient)
        state.velocity.mul_(self.momentum).add_(theta, alpha=-step_size * stage.step_scale)
        state.weights.add_(state.velocity)
        share = self.averaging / (state.averaged + self.averaging) if self.averaging else 1.0
        state.average.lerp_(state.weights, share)
        state.averaged += 1
        return StepErrors(loss, average_loss, zero_loss, inexactness)
