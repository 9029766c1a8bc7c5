"""How targets enter the least-squares problem and how outputs leave it.

What rows of each class, or each target, count in the sum of squares that a fit makes small.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep3stream.config import SolverConfig
from ep3stream.errors import ConfigError


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


def require_weights_of_task(is_classification: bool, settings: SolverConfig) -> None:
    """ConfigError for weights of classes where there are none, or of outputs where there are classes."""
    if is_classification and settings.output_weights:
        raise ConfigError("output_weights are given, but the targets are classes; use class_weights")
    if not is_classification and settings.class_weights != "none":
        raise ConfigError(
            "class_weights are given, but the targets are numbers; use output_weights, or leave them out"
        )


def weighted(
    code: TargetCode, names: Sequence[str], class_counts: Tensor | None, settings: SolverConfig
) -> TargetCode:
    """`code` with the weights of the settings; ConfigError for a name that is none of `names`, of classes or targets.

    class_counts: rows of each class, (c,); None for targets. The offset of a class becomes its share of the weighted
    rows, the constant that fits them best.
    """
    if class_counts is None:
        given = settings.output_weights
        each = _by_name("output_weights", "target", given, names).float() if given else None
        return replace(code, weights=each)
    if settings.class_weights == "none":
        return code
    rows = class_counts.double().cpu()
    if isinstance(settings.class_weights, str):
        weights = _balanced(rows)
    else:
        weights = _by_name("class_weights", "class", settings.class_weights, names)
    total = weights * rows
    return replace(code, offset=(total / total.sum()).float(), weights=weights.float())


def _balanced(rows: Tensor) -> Tensor:
    """n / (k n_c) for the k classes that have rows, (c,): the same for each class in all, 1 for a row on average."""
    present = rows > 0
    return torch.where(present, rows.sum() / (present.sum() * rows.clamp_min(1)), 1.0)


def _by_name(field: str, what: str, weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """(c,), float64: 1 for the names left out; ConfigError for one that is none of `names`."""
    places = {name: place for place, name in enumerate(names)}
    each = torch.ones(len(names), dtype=torch.float64)
    for name, weight in weights.items():
        if name not in places:
            some = ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")
            raise ConfigError(f"{field} has {name!r}, which is no {what}; use some of {some}")
        each[places[name]] = weight
    return each
