"""How targets enter the least-squares problem and outputs leave it, and the weights of classes and targets in it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from ep3stream.config import SolverConfig
from ep3stream.errors import ConfigError


@dataclass(frozen=True, slots=True)
class TargetCode:
    """The code of the targets: f(x) is fitted to (y - offset) / scale, and outputs are offset + scale * f(x).

    offset, scale: (c,), in the unit of y. Regression standardises each target. Classes are one-hot rows, which are
    never formed, with their frequency as offset and the scale 1. weights: (c,), the weight of a row of each class, or
    of each target, in the sum of squares that a fit minimises; None for 1 each. The losses leave them out.
    ridge_factors: R multiples of the ridge, each with c columns of alpha of its own, those of the first multiple first:
    the kernel block, which most of the time goes into, serves them all. (1,) for a fit with one ridge.
    """

    is_classification: bool
    offset: Tensor
    scale: Tensor
    weights: Tensor | None = None
    ridge_factors: tuple[float, ...] = (1.0,)

    @property
    def n_outputs(self) -> int:
        """c, the number of targets or classes."""
        return len(self.offset)

    @property
    def n_columns(self) -> int:
        """R c, the number of columns of alpha."""
        return len(self.ridge_factors) * self.n_outputs

    def by_ridge(self, columns: Tensor) -> Tensor:
        """The view (R, c, m) of (R c, m), one row for each column of alpha."""
        return columns.view(len(self.ridge_factors), self.n_outputs, -1)

    def subtract_(self, prediction: Tensor, y: Tensor) -> None:
        """Subtracts the coded targets from prediction, (R c, m), in place. y: (m,) class ids, or (m, c) values."""
        predicted = self.by_ridge(prediction)
        if self.is_classification:
            predicted.add_(self.offset[:, None])
            rows = torch.arange(prediction.shape[1], device=prediction.device)
            predicted[:, y.long(), rows] -= 1
        else:
            predicted.sub_(((y - self.offset) / self.scale).T)

    def to(self, device: torch.device) -> TargetCode:
        """The same code on another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return replace(self, offset=self.offset.to(device), scale=self.scale.to(device), weights=weights)

    def weigh_(self, residual: Tensor, y: Tensor) -> None:
        """Multiplies a coded residual g, (R c, m), by the weights of the rows' classes, in place.

        Weights v of targets are not applied here. Each target has a column of alpha of its own, so that the minimum of
        v |g|^2 / 2n + lambda |f|^2 / 2 is that of |g|^2 / 2n + (lambda / v) |f|^2 / 2: see `ridges`. A smaller ridge,
        unlike a larger weight, asks for no smaller step.
        """
        if (weights := self.row_weights(y)) is not None:
            residual.mul_(weights)

    def row_weights(self, y: Tensor) -> Tensor | None:
        """The weight of each row's class, (m,); None where all are 1."""
        return None if self.weights is None or not self.is_classification else self.weights[y.long()]

    def ridges(self, ridge: float) -> Tensor:
        """lambda of each column of alpha, (R c,): multiples of the ridge, divided by the weight of the target."""
        each = torch.full_like(self.offset, ridge)
        each = each if self.weights is None or self.is_classification else each / self.weights
        return torch.cat([each * factor for factor in self.ridge_factors])

    def weighted_squares(self, outputs: Tensor, y: Tensor) -> Tensor:
        """The weighted sum of squared coded errors of outputs, (m, c), in the unit of y; float64, 0-d."""
        residual = ((outputs - self.offset) / self.scale).T.double()
        self.subtract_(residual, y)
        squares = residual.square()
        if self.weights is not None:
            squares *= self.weights[y.long()] if self.is_classification else self.weights[:, None]
        return squares.sum()

    def mean_squared_error(self, residual: Tensor) -> Tensor:
        """The mean square of a coded residual, (R c, m), in the squared unit of y; float64, 0-d."""
        # In float64: with a unit above 1e19 float32 would overflow, and the guard would see a fit that blows up.
        return (self.by_ridge(residual).square().mean(2).double() * self.scale.double().square()).mean()

    def decode(self, prediction: Tensor) -> Tensor:
        """Outputs in the unit of y, (m, R c), from coded predictions, (R c, m)."""
        n_ridges = len(self.ridge_factors)
        return torch.addcmul(self.offset.repeat(n_ridges), prediction.T, self.scale.repeat(n_ridges))


def require_weights_of_task(is_classification: bool, settings: SolverConfig) -> None:
    """Raises ConfigError for class_weights in a regression, or output_weights in a classification."""
    if is_classification and settings.output_weights:
        raise ConfigError("output_weights are given, but the targets are classes; use class_weights")
    if not is_classification and settings.class_weights != "none":
        raise ConfigError(
            "class_weights are given, but the targets are numbers; use output_weights, or leave them out"
        )


def weighted(
    code: TargetCode, names: Sequence[str], class_counts: Tensor | None, settings: SolverConfig
) -> TargetCode:
    """The code with the weights of the settings; the offset of a class becomes its share of the weighted rows.

    names: of the classes or the targets. class_counts: rows of each class, (c,); None for a regression. Raises
    ConfigError for a weight whose name is not in `names`.
    """
    if class_counts is None:
        given = settings.output_weights
        weights = _by_name("output_weights", "target", given, names).float() if given else None
        return replace(code, weights=weights)
    if settings.class_weights == "none":
        return code
    rows = class_counts.double().cpu()
    if isinstance(settings.class_weights, str):
        # balanced: n / (k n_c) for the k classes with rows. All then weigh the same, and a row 1 on average.
        present = rows > 0
        weights = torch.where(present, rows.sum() / (present.sum() * rows.clamp_min(1)), 1.0)
    else:
        weights = _by_name("class_weights", "class", settings.class_weights, names)
    total = weights * rows
    return replace(code, offset=(total / total.sum()).float(), weights=weights.float())


def _by_name(field: str, what: str, weights: Mapping[str, float], names: Sequence[str]) -> Tensor:
    """The weight of each of `names`, (c,), float64, 1 where not given; ConfigError for a weight of another name."""
    places = {name: place for place, name in enumerate(names)}
    each = torch.ones(len(names), dtype=torch.float64)
    for name, weight in weights.items():
        if name not in places:
            some = ", ".join(list(names)[:10]) + (", ..." if len(names) > 10 else "")
            raise ConfigError(f"{field} has {name!r}, which is no {what}; use some of {some}")
        each[places[name]] = weight
    return each
