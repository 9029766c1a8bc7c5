"""The training loop. `fit`, `KernelModel`, the estimators and the pilot run of `plan` all take their steps here.

A trainer holds a solver, the progress of the fit (state, guard, running scores), and losses that nobody has read yet.
Reading a loss waits for the device, so the losses of several steps are read at once. What happens beside the steps
(checkpoints, metrics, validations, signals) is the recorder's.
"""

from __future__ import annotations

import math
from collections.abc import Iterable
from typing import Protocol

import torch
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.errors import DivergedError
from ep3stream.mesh import Mesh
from ep3stream.run.checkpoint import Progress
from ep3stream.run.setup import Setup
from ep3stream.solver.guard import Guard
from ep3stream.solver.kernels import CallableKernel, KernelFunction
from ep3stream.solver.model import ModelShard
from ep3stream.solver.step import StepErrors
from ep3stream.stream.batch_slots import Batch

# The guard sees the losses, and the average is scored, every so many steps of the whole fit.
WATCH_STEPS = 8


class Recorder(Protocol):
    """What a trainer tells of its steps, to whoever keeps records of them."""

    def after_step(self, batch: Batch) -> None:
        """A step was taken on the batch."""
        ...

    def after_watch(
        self, losses: list[float], rows: list[int], inexactness: float, rolled_back: bool
    ) -> None:
        """The guard has seen the losses of the steps since the last time, on batches of so many rows each.

        inexactness: the projection's error at the last step, nan where it was not measured. rolled_back: the guard
        has put the last good weights back and cut the step size.
        """
        ...

    def on_divergence(self) -> None:
        """The guard gives up; it has put the last good weights back. The trainer raises DivergedError next."""
        ...

    def is_over(self) -> bool:
        """Whether the loop ends after this step. It may raise, as for a signal to stop."""
        ...


class Trainer:
    """Steps of one fit, the same on every rank. `start` or `resume` comes before the first step.

    progress: what a checkpoint saves. rows_seen: how many rows the fit has trained on, which decides its stage.
    """

    progress: Progress
    rows_seen: int

    def __init__(self, setup: Setup, config: FitConfig, function: KernelFunction | None, mesh: Mesh) -> None:
        self.mesh = mesh
        self.solver = setup.solver(config, function, mesh)
        self.setup = setup.without_centers()
        self.inputs = setup.inputs().to(mesh.device)
        self._unread: list[tuple[StepErrors, int]] = []
        self._unseen_rows: list[int] = []

    def start(self) -> None:
        """Begins at the head start of the set-up, or at zero."""
        state = self.setup.initial_state(self.solver)
        self.progress = Progress(0, state, Guard.start(state, self.setup.plan.step_size), [])
        self.rows_seen = 0

    def resume(self, progress: Progress, rows_seen: int) -> None:
        """Goes on from `progress`."""
        self.progress, self.rows_seen = progress, rows_seen

    def train(
        self,
        batches: Iterable[Batch],
        recorder: Recorder,
        *,
        step_scale: float = 1.0,
        rows_per_step: int | None = None,
    ) -> None:
        """Takes a step on each batch, until there are no more or the recorder says that the fit is over.

        step_scale: of the step size, for batches smaller than those it was measured for. rows_per_step: how many rows
        a step counts for in `rows_seen`; None for those of its batch. Raises DivergedError when the guard gives up.
        """
        for batch in batches:
            self.step(batch.x, batch.y, step_scale, rows_per_step)
            recorder.after_step(batch)
            if self.progress.step % WATCH_STEPS == 0:
                self.watch(recorder)
            if recorder.is_over():
                break
        self.read_losses()

    def step(self, x: Tensor, y: Tensor, step_scale: float = 1.0, n_rows: int | None = None) -> StepErrors:
        """One step on x, (m, d), unscaled, and y; it counts for `n_rows` rows, for m if None."""
        progress = self.progress
        errors = self.solver.step(
            progress.state,
            self.inputs(x),
            y,
            progress.guard.step_size * step_scale,
            score=(progress.step + 1) % WATCH_STEPS == 0,
            rows_seen=self.rows_seen,
        )
        self._unread.append((errors, len(x)))
        progress.step += 1
        self.rows_seen += len(x) if n_rows is None else n_rows
        return errors

    def read_losses(self) -> float:
        """Reads the errors of the steps since the last reading; on a GPU this waits for them.

        Returns the inexactness of the last step, nan where it was not measured. Every rank takes the leader's errors:
        where devices differ in the last bit, the guards must not. Raises ConfigError where a callable kernel on a GPU
        has returned a value that is not finite.
        """
        if not self._unread:
            return math.nan
        unread, self._unread = self._unread, []
        kernel = self.solver.kernel
        if isinstance(kernel, CallableKernel) and kernel.not_finite is not None:
            self.mesh.all_or_raise(kernel.require_finite)
        n_each = len(StepErrors._fields)
        read = self.mesh.broadcast_object(
            lambda: torch.stack([e for errors, _ in unread for e in errors]).tolist()
        )
        losses, averages, zeros, inexactness = (read[place::n_each] for place in range(n_each))
        self.progress.unseen_losses += losses
        self._unseen_rows += [n_rows for _, n_rows in unread]
        for loss, zero_loss in zip(averages, zeros, strict=True):
            self.progress.running_score = self.progress.running_score.after(loss, zero_loss)
        return float(inexactness[-1])

    def watch(self, recorder: Recorder) -> None:
        """Shows the guard all losses that it has not seen; raises DivergedError when it gives up."""
        inexactness = self.read_losses()
        losses, self.progress.unseen_losses = self.progress.unseen_losses, []
        rows, self._unseen_rows = self._unseen_rows, []
        if not losses:
            return
        try:
            rolled_back = self.progress.guard.watch(self.progress.step, losses, self.progress.state)
        except DivergedError:
            recorder.on_divergence()
            raise
        recorder.after_watch(losses, rows, inexactness, rolled_back)

    def step_size(self) -> float:
        """The step size of the next step: the guard's, in the stage that the fit is in."""
        return self.progress.guard.step_size * self.solver.stage(self.rows_seen).step_scale

    def model_shard(self) -> ModelShard:
        """This rank's share of the model that the tail average is."""
        solver, average = self.solver, self.progress.state.average
        return ModelShard(
            solver.kernel,
            solver.centers,
            average,
            self.inputs,
            solver.targets,
            self.mesh,
            linear=solver.linear,
        )
