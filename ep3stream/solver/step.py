"""The step: projected, doubly preconditioned SGD with heavy-ball momentum and a tail average.

On a batch (X_b, y_b), with weights alpha and velocity v (Abedsoltan, Belkin, Pandit, 2023, algorithm 1, with
Nesterov's look-ahead and polynomial-decay averaging (Shamir and Zhang, 2013) added):

    g = K(X_b, Z)(alpha + beta v) - y_b             (c, m), summed over the shards
    h = K(Z, X_b) W g + m lambda K^ (alpha + beta v)    W = diag(w), the weights of the rows' classes; K^ ~ K(Z, Z)
    theta = Q h                                     projection.py, or eigenpro.py with beta = a = lambda = 0
    v = beta v - eta theta;  alpha += v
    average += a / (t + a) (alpha - average)        the weights themselves for a = 0

which makes 1/(2n) sum_i w_i |f(x_i) - y_i|^2 + lambda/2 alpha' K^ alpha small; the projection says what K^ is.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.points import Points
from ep3stream.solver.projection import Projection
from ep3stream.solver.targets import TargetCode


@dataclass(slots=True)
class SolverState:
    """What a step changes, each (c, p_shard). `averaged` counts the steps in the average."""

    weights: Tensor
    velocity: Tensor
    average: Tensor
    averaged: int = 0

    def tensors(self) -> dict[str, Tensor]:
        """By name, for checkpoints."""
        return {"weights": self.weights, "velocity": self.velocity, "average": self.average}


@dataclass(frozen=True, slots=True)
class Stage:
    """From `first_row` of the fit on: another projection, and a step `pace` times as long as the first stage's."""

    first_row: int
    projection: Projection
    step_scale: float = 1.0


class StepErrors(NamedTuple):
    """Before the step, mean squared errors in the squared unit of y; then the projection's own. 0-d tensors.

    loss: of the look-ahead point alpha + beta v. average_loss: of the average, which becomes the model; nan unless
    asked for. zero_loss: of the zero model, which predicts the mean; nan unless asked for. inexactness:
    |K(Z, Z) theta - h| / |h|; nan unless asked for and the projection is iterative.
    """

    loss: Tensor
    average_loss: Tensor
    zero_loss: Tensor
    inexactness: Tensor


@dataclass(frozen=True, slots=True)
class Solver:
    """Everything a step reads and never changes, but for `block_memory`, the room of one kernel block.

    later: the stages that follow the one of `projection`, in their order.
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

    def initial_state(self) -> SolverState:
        """The zero model."""
        zero = self.centers.prepared.new_zeros(self.targets.n_outputs, len(self.centers))
        return SolverState(zero, zero.clone(), zero.clone())

    def stage(self, rows_seen: int) -> Stage:
        """The one in force after so many rows."""
        begun = [stage for stage in self.later if stage.first_row <= rows_seen]
        return begun[-1] if begun else Stage(0, self.projection)

    def block(self, x: Tensor) -> BatchBlock:
        """K(Z_shard, X) for x of (m, d), in the solver's own block memory."""
        return BatchBlock(self.kernel, self.centers, self.kernel.right(x), self.block_memory)

    def step(
        self,
        state: SolverState,
        x: Tensor,
        y: Tensor,
        step_size: float,
        score: bool = False,
        rows_seen: int = 0,
    ) -> StepErrors:
        """One step on x, (m, d), and y; changes `state` and returns its errors, all of them with `score`.

        step_size: that of the first stage; rows_seen: how many rows the fit has seen, which says what stage it is in.

        The losses are honest estimates on rows not yet used, without weights or ridge; that of the average costs one
        skinny product more, an inexactness a product with K(Z, Z). Reading them is left to the caller, since it waits
        for the device.
        """
        stage, block = self.stage(rows_seen), self.block(x)
        ahead = torch.add(state.weights, state.velocity, alpha=self.momentum)
        both = torch.cat([ahead, state.average]) if score else ahead
        residual, scored = self.mesh.all_reduce(block.left_times(both)).tensor_split([len(ahead)])
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
        if self.ridge:
            ridges = len(x) * self.targets.ridges(self.ridge)
            gradient += ridges[:, None] * stage.projection.gram_times(ahead)
        theta = stage.projection.direction(gradient)
        if score:
            inexactness = stage.projection.inexactness(theta, gradient)
        state.velocity.mul_(self.momentum).add_(theta, alpha=-step_size * stage.step_scale)
        state.weights.add_(state.velocity)
        share = self.averaging / (state.averaged + self.averaging) if self.averaging else 1.0
        state.average.lerp_(state.weights, share)
        state.averaged += 1
        return StepErrors(loss, average_loss, zero_loss, inexactness)
