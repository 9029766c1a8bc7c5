"""Running losses of a fit, and the guard that takes the fit back to its last good state when the loss blows up.

Each time it does so the guard cuts the step size: by half, or to an eighth where the fit has had no good state since
the cut before. So three cuts rescue a step size that is up to 2 * 8 * 8 = 128 times too large, and one that is only a
little too large, which shows late, is no more than halved.

`RunningLoss` follows the loss of the weights, for the guard; `RunningScore` that of the average, for reports.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

from torch import Tensor

from ep3stream.errors import DivergedError
from ep3stream.solver.step import SolverState

# Steps that the running loss is a mean of, and those at the start that its best does not count.
_MEMORY_STEPS = 50
_SETTLING_STEPS = 8
_GOOD_STATE_EVERY_STEPS = 64
_MAX_CUTS = 3
_CUT, _CUT_AT_ONCE = 2, 8

# Scored batches that the running score is a mean of.
_MEMORY_SCORES = 16


@dataclass(frozen=True, slots=True)
class RunningLoss:
    """Mean of the batch losses over about the last 50 steps, an immutable value.

    first: the loss of the first batch; best: the least mean since the eighth step. The loss of one batch counts for at
    most 10 times the mean, so that a few extreme targets are not taken for a divergence.
    """

    n_steps: int = 0
    mean: float = 0.0
    first: float = math.inf
    best: float = math.inf

    def after(self, loss: float) -> RunningLoss:
        """The running loss with one more batch."""
        n_steps = self.n_steps + 1
        settled = n_steps > _SETTLING_STEPS
        if settled and math.isfinite(loss):
            loss = min(loss, 10 * self.mean)
        mean = self.mean + (loss - self.mean) / min(n_steps, _MEMORY_STEPS)
        first = loss if self.n_steps == 0 else self.first
        return RunningLoss(n_steps, mean, first, min(self.best, mean) if settled else self.best)

    @property
    def has_blown_up(self) -> bool:
        """Whether the mean is not finite, or above both three times its best and half of the first loss."""
        if not math.isfinite(self.mean):
            return True
        return self.mean > 3 * self.best and self.mean > 0.5 * self.first

    @property
    def is_calm(self) -> bool:
        """Whether the mean is at most 1.5 times its best."""
        return self.mean <= 1.5 * self.best


@dataclass(slots=True)
class Guard:
    """The step size in force and the last good state; both are part of a checkpoint.

    good_weights, good_average: replaced, never written to, since a checkpoint may still be reading them. due_step: the
    first step at which a calm state is kept as good again, 64 steps after the last one or after a roll-back: a step
    size that is still too large looks calm for a few steps.
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
        """A guard with the initial state as its good one."""
        return cls(step_size, RunningLoss(), state.weights.clone(), state.average.clone())

    def watch(self, step: int, losses: list[float], state: SolverState) -> bool:
        """Takes in the losses of the latest steps, up to number `step`; returns whether it rolled `state` back.

        A roll-back restores the last good weights and their average, sets the velocity to zero and cuts the step size.
        Raises DivergedError the fourth time, with the last good weights in place.
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
        # Only a good state kept since the last cut sets the two apart by this many steps.
        has_been_good = self.due_step == self.good_step + _GOOD_STATE_EVERY_STEPS
        self.due_step = step + _GOOD_STATE_EVERY_STEPS
        if self.n_cuts == _MAX_CUTS:
            raise DivergedError(
                f"the loss blew up at step {step} with step size {self.step_size:.3g}, after {_MAX_CUTS} cuts; "
                "try a larger bandwidth, a smaller data_rank or a larger batch_size. The last checkpoint is usable"
            )
        self.n_cuts += 1
        self.step_size /= _CUT if has_been_good else _CUT_AT_ONCE

    def tensors(self) -> dict[str, Tensor]:
        """The tensors by their names in checkpoints."""
        return {"good_weights": self.good_weights, "good_average": self.good_average}


@dataclass(frozen=True, slots=True)
class RunningScore:
    """How well the averaged weights predict batches that they have not seen, over the last 16 batches scored.

    loss: running mean squared error; n: all batches scored so far; no_better: running share of batches on which the
    zero model, which predicts the mean, is at least as good.
    """

    loss: float = 0.0
    n: int = 0
    no_better: float = 0.0

    def after(self, loss: float, zero_loss: float) -> RunningScore:
        """The running score with the losses of the average and of the zero model on one batch; nan: not scored."""
        if not math.isfinite(loss):
            return self
        share = 1 / min(self.n + 1, _MEMORY_SCORES)
        return RunningScore(
            self.loss + share * (loss - self.loss),
            self.n + 1,
            # A share of batches, not of losses: where targets have heavy tails, a few rows decide a loss. Where all
            # targets are the same, nothing is better than their mean.
            self.no_better + share * ((loss >= zero_loss > 0) - self.no_better),
        )

    @property
    def warning(self) -> str | None:
        """The warning where the zero model is at least as good on most of the last batches; else None."""
        if self.no_better <= 0.5:
            return None
        return (
            f"on {self.no_better:.0%} of the last batches scored, the model is no better than predicting the "
            "mean of the targets; try another bandwidth, more centers, a ridge, or, for targets with a few extreme "
            "values, a transform such as asinh or ranks; or the inputs tell nothing of the targets"
        )
