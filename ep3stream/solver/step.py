"""The step: projected, doubly preconditioned SGD with heavy-ball momentum and a tail average.

On a batch (X_b, y_b), with weights alpha and velocity v (Abedsoltan, Belkin, Pandit, 2023, algorithm 1, with
Nesterov's look-ahead and polynomial-decay averaging (Shamir and Zhang, 2013) added):

    g = K(X_b, Z)(alpha + beta v) - y_b             (c, m), summed over the shards
    theta = Q K(Z, X_b) g                           projection.py
    v = beta v - eta theta;  alpha += v
    average += a / (t + a) (alpha - average)        the weights themselves for a = 0
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from ep3stream.mesh import Mesh
from ep3stream.solver.blocks import BatchBlock
from ep3stream.solver.kernels import Kernel, Points
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
class Solver:
    """Everything a step reads and never changes, but for `block_memory`, the room of one kernel block."""

    kernel: Kernel
    centers: Points
    projection: Projection
    targets: TargetCode
    momentum: float
    averaging: float
    mesh: Mesh
    block_memory: Tensor | None = None

    def initial_state(self) -> SolverState:
        """The zero model."""
        zero = self.centers.prepared.new_zeros(self.targets.n_outputs, len(self.centers))
        return SolverState(zero, zero.clone(), zero.clone())

    def block(self, x: Tensor) -> BatchBlock:
        """K(Z_shard, X) for x of (m, d), in the solver's own block memory."""
        return BatchBlock(self.kernel, self.centers, self.kernel.right(x), self.block_memory)

    def step(
        self, state: SolverState, x: Tensor, y: Tensor, step_size: float, score: bool = False
    ) -> tuple[Tensor, Tensor]:
        """One step on x, (m, d), and y; changes `state` and returns two mean squared errors before it.

        That of the look-ahead point alpha + beta v, and with `score` that of the average, which becomes the
        model (else nan): honest estimates on rows not yet used, in the squared unit of y, for one skinny product
        more. They are 0-d tensors: reading them is left to the caller, since it waits for the device.
        """
        block = self.block(x)
        ahead = torch.add(state.weights, state.velocity, alpha=self.momentum)
        both = torch.cat([ahead, state.average]) if score else ahead
        residual, scored = self.mesh.all_reduce(block.left_times(both)).tensor_split([len(ahead)])
        residual = residual.contiguous()
        self.targets.subtract_(residual, y)
        loss = self.targets.mean_squared_error(residual)
        average_loss = torch.full_like(loss, torch.nan)
        if score:
            self.targets.subtract_(scored, y)
            average_loss = self.targets.mean_squared_error(scored)
        theta = self.projection.direction(block.times(residual))
        state.velocity.mul_(self.momentum).add_(theta, alpha=-step_size)
        state.weights.add_(state.velocity)
        share = self.averaging / (state.averaged + self.averaging) if self.averaging else 1.0
        state.average.lerp_(state.weights, share)
        state.averaged += 1
        return loss, average_loss
