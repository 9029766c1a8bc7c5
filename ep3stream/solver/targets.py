"""How targets enter the least-squares problem and how outputs leave it."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True, slots=True)
class TargetCode:
    """Outputs are offset + scale * f(x). Classes are one-hot rows that are never formed.

    offset, scale: (c,), the unit of y. Regression standardises each target; classes have the offset of
    their frequency and the scale 1.
    """

    is_classification: bool
    offset: Tensor
    scale: Tensor

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

    def mean_squared_error(self, residual: Tensor) -> Tensor:
        """Mean over rows and outputs of a coded residual, (c, m), in the squared unit of y."""
        return (residual * self.scale[:, None]).square().mean()

    def decode(self, prediction: Tensor) -> Tensor:
        """(c, m) -> (m, c) in the unit of y."""
        return torch.addcmul(self.offset, prediction.T, self.scale)
