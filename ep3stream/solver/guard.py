"""Watches the running loss, and takes a fit back to its last good state when it blows up.

Each time the step size is cut: by half, or to an eighth if the fit has found no good state since the cut before. Three
cuts so save a step size that is up to 2 * 8 * 8 = 128 times too large, and one that is a little too large, which shows
late, costs no more than half of it.

The running loss of the averaged model, and how often it is any better than the zero model.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ep3stream.errors import DivergedError
from ep3stream.solver.step import SolverState

_MEMORY_STEPS = 50

_SETTLING_STEPS = 8

_GOOD_STATE_EVERY_STEPS = 64

_MAX_CUTS = 3

_CUT, _CUT_AT_ONCE = 2, 8


@dataclass(frozen=True, slots=True)
class RunningLoss:
    """Mean of the batch losses over about the last 50 steps; `best` is the least it has been, `first` its start.

    A single batch counts for at most 10 times the mean: targets with heavy tails are no divergence.
    """

    n_steps: int = 0
    mean: float = 0.0
    first: float = math.inf
    best: float = math.inf

    def after(self, loss: float) -> RunningLoss:
        """With one more batch's loss."""
        n_steps = self.n_steps + 1
        settled = n_steps > _SETTLING_STEPS
        if settled and math.isfinite(loss):
            loss = min(loss, 10 * self.mean)
        mean = self.mean + (loss - self.mean) / min(n_steps, _MEMORY_STEPS)
        first = loss if self.n_steps == 0 else self.first
        return RunningLoss(n_steps, mean, first, min(self.best, mean) if settled else self.best)

    @property
    def has_blown_up(self) -> bool:
        """Not finite, or far above both its best and half of what the zero model loses."""
        if not math.isfinite(self.mean):
            return True
        return self.mean > 3 * self.best and self.mean > 0.5 * self.first

    @property
    def is_calm(self) -> bool:
        """Near its best."""
        return self.mean <= 1.5 * self.best


@dataclass(slots=True)
class Guard:
    """The last good state and the step size in force; both are part of a checkpoint.

    The good weights are replaced, never written to: a checkpoint may still be reading them.

    due_step: from here on a calm state is kept as the good one, 64 steps after the last or after a roll-back: a
    step size that is still too large looks calm for a few.
    """

    step_size: float
    loss: RunningLoss
    good_weights: Tensor
    good_average: Tensor
    good_averaged: int = 0
    good_loss: RunningLoss = RunningLoss()
    good_step: int = 0
    due_step: int = _GOOD_STATE_EVERY_STEPS
    n_cuts: int = 0

    @classmethod
    def start(cls, state: SolverState, step_size: float) -> Guard:
        """With the initial state as the good one."""
        return cls(step_size, RunningLoss(), state.weights.clone(), state.average.clone())

    def watch(self, step: int, losses: list[float], state: SolverState) -> bool:
        """Takes in the losses of the steps up to `step`; True if `state` was rolled back.

        Rolling back restores the last good weights, forgets the velocity and cuts the step size; raises
        DivergedError the fourth time.
        """
        for loss in losses:
            self.loss = self.loss.after(loss)
            if self.loss.has_blown_up:
                self._roll_back(step, state)
                return True
        if self.loss.is_calm and step >= self.due_step:
            self.good_weights, self.good_average = state.weights.clone(), state.average.clone()
            self.good_averaged, self.good_loss, self.good_step = state.averaged, self.loss, step
            self.due_step = step + _GOOD_STATE_EVERY_STEPS
        return False

    def _roll_back(self, step: int, state: SolverState) -> None:
        state.weights.copy_(self.good_weights)
        state.average.copy_(self.good_average)
        state.velocity.zero_()
        state.averaged = self.good_averaged
        self.loss = self.good_loss
        has_been_good = self.due_step == self.good_step + _GOOD_STATE_EVERY_STEPS  # Since the last cut.
        self.due_step = step + _GOOD_STATE_EVERY_STEPS
        if self.n_cuts == _MAX_CUTS:
            raise DivergedError(
                f"the loss blew up at step {step} with step size {self.step_size:.3g}, after {_MAX_CUTS} cuts; "
                "try a larger bandwidth, a smaller data_rank or a larger batch_size. The last checkpoint is usable"
            )
        self.n_cuts += 1
        self.step_size /= _CUT if has_been_good else _CUT_AT_ONCE

    def tensors(self) -> dict[str, Tensor]:
        """By name, for checkpoints."""
        return {"good_weights": self.good_weights, "good_average": self.good_average}


# Over the last this many batches scored.
_MEMORY = 16


@dataclass(frozen=True, slots=True)
class RunningScore:
    """loss: running mean squared error of the average over the last of n batches scored, none of which it had seen;
    no_better: on what share of the last of them it was not below the zero model's.
    """

    loss: float = 0.0
    n: int = 0
    no_better: float = 0.0

    def after(self, loss: float, zero_loss: float) -> RunningScore:
        """With one more batch's losses, of the average and of the zero model; nan for one that was not scored."""
        if not math.isfinite(loss):
            return self
        share = 1 / min(self.n + 1, _MEMORY)
        return RunningScore(
            self.loss + share * (loss - self.loss),
            self.n + 1,
            # Of batches, not of the loss: a few rows far out decide that where targets have heavy tails.
            self.no_better + share * ((loss >= zero_loss) - self.no_better),
        )

    @property
    def warning(self) -> str | None:
        """What to tell of a model that is no better than the zero model on most of the last batches."""
        if self.no_better <= 0.5:
            return None
        return (
            f"on {self.no_better:.0%} of the last batches scored, the model is no better than predicting the "
            "mean of the targets; try another bandwidth, more centers, a ridge, or, for targets with a few extreme "
            "values, a transform such as asinh or ranks"
        )
