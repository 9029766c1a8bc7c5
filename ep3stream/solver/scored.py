"""The running loss of the averaged model, and how often it is any better than the zero model."""

from __future__ import annotations

import math
from dataclasses import dataclass

# Over the last this many batches scored.
_MEMORY = 16


@dataclass(frozen=True, slots=True)
class Scored:
    """loss: running mean squared error of the average over the last of n batches scored, none of which it had seen;
    no_better: on what share of the last of them it was not below the zero model's.
    """

    loss: float = 0.0
    n: int = 0
    no_better: float = 0.0

    def after(self, loss: float, zero_loss: float) -> Scored:
        """With one more batch's losses, of the average and of the zero model; nan for one that was not scored."""
        if not math.isfinite(loss):
            return self
        share = 1 / min(self.n + 1, _MEMORY)
        return Scored(
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
