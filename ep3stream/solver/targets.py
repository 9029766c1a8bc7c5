"""How targets enter the least-squares problem and how outputs leave it."""

from __future__ import annotations

from dataclasses import dataclass, replace

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TargetCode:
    """Outputs are offset + scale * f(x). Classes are one-hot rows that are never formed.

    offset, scale: (c,), the unit of y. Regression standardises each target; classes have the offset of
    their frequency and the scale 1. weights: (c,), what a row of each class, or each target, counts in the sum of
    squares that a fit makes small; None for 1 each. The losses leave them out.
    """

    is_classification: bool
    offset: Tensor
    scale: Tensor
    weights: Tensor | None = None

    @property
    def n_outputs(self) -> int:
        """c."""
        return len(self.offset)

    def subtract_(self, prediction: Tensor, y: Tensor) -> None:
        """prediction, (c, m), minus the coded targets, in place. y: (m,) class ids or (m, c) values."""
        if self.is_classification:
            prediction.add_(self.offset[:, None])
            rows = torch.arange(prediction.shape[1], device=prediction.device)
            prediction[y.long(), rows] -= 1
        else:
            prediction.sub_(((y - self.offset) / self.scale).T)

    def to(self, device: torch.device) -> TargetCode:
        """On another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, offset=self.offset.to(device), scale=self.scale.to(device), weights=weights)

    def weigh_(self, residual: Tensor, y: Tensor) -> None:
        """The gradient of the weighted squares at a coded residual, (c, m), in place: w_y g.

        Targets are left alone. Each has weights alpha of its own, so that v |g|^2 / 2n + lambda |f|^2 / 2 has the
        minimum of |g|^2 / 2n + (lambda / v) |f|^2 / 2, which the step size does not have to bow to: `ridges`.
        """
        if (weights := self.row_weights(y)) is not None:
            residual.mul_(weights)

    def row_weights(self, y: Tensor) -> Tensor | None:
        """w_y, (m,); None where all are 1."""
        return None if self.weights is None or not self.is_classification else self.weights[y.long()]

    def ridges(self, ridge: float) -> Tensor:
        """Lambda of each output, (c,)."""
        each = torch.full_like(self.offset, ridge)
        return each if self.weights is None or self.is_classification else each / self.weights

    def weighted_squares(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The sum over rows and outputs of the weighted squares of outputs, (m, c) in the unit of y; float64, 0-d."""
        residual = ((outputs - self.offset) / self.scale).T.double()
        self.subtract_(residual, y)
        squares = residual.square()
        if self.weights is not None:
            squares *= self.weights[y.long()] if self.is_classification else self.weights[:, None]
        return squares.sum()

    def mean_squared_error(self, residual: Tensor) -> Tensor:
        """Mean over rows and outputs of a coded residual, (c, m), in the squared unit of y; float64, 0-d."""
        # Squares of a unit above 1e19 overflow float32, which the guard would take for a fit that blows up.
        return (residual.square().mean(1).double() * self.scale.double().square()).mean()

    def decode(self, prediction: Tensor) -> Tensor:
        """(c, m) -> (m, c) in the unit of y."""
        return torch.addcmul(self.offset, prediction.T, self.scale)
