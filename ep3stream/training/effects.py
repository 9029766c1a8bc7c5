"""The last stage of a fit: effects of cells, learnt from what the kernel model leaves of the targets."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.solver.cell_effects import CellEffects, Factor, code_factor, number_factors
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.effect_search import (
    CellRows,
    FittedEffects,
    SearchLimits,
    chosen_crosses,
    fitted_effects,
)
from ep3stream.solver.targets import TargetCode

# Every output has effects and residuals of its own.
MOST_OUTPUTS = 8
# A number is cut into so many bins of as many rows each, coarse and fine; those of the first rows tell where.
_BINS = (16, 256)
_BINNED_ROWS = 1 << 17
# Levels are kept in two bytes.
_MOST_LEVELS = 1 << 16
# Of the memory that the solver leaves: for rows with their levels and residuals, and for effects. The most rows, for
# the time that they take.
_ROWS_SHARE, _EFFECTS_SHARE = 1 / 2, 1 / 8
MOST_ROWS = 1 << 22
# Crosses are chosen by so many rows for every minute that the fit may take, divided by the outputs.
_ROWS_A_MINUTE = 1 << 17
_LEAST_MINUTES, _USUAL_MINUTES, _MOST_MINUTES = 0.1, 2.0, 8.0


def wants_effects(config: FitConfig, n_outputs: int) -> bool:
    """Whether a fit that validates, its kernel settled, ends with effects of cells."""
    return (
        config.solver.effects == "auto"
        and config.kernel.name in COLUMN_KERNELS
        and config.solver.class_weights == "none"
        and n_outputs <= MOST_OUTPUTS
    )


def most_rows(spare_bytes: int, n_features: int, n_outputs: int) -> int:
    """How many rows effects are learnt from at most. spare_bytes: of memory, beside the solver's."""
    # Levels and residuals are put together once, and cells and their effects looked up.
    row_bytes = 4 * len(_BINS) * n_features + 56 * n_outputs + 32
    return min(MOST_ROWS, max(0, int(spare_bytes * _ROWS_SHARE) // row_bytes))


@dataclass(frozen=True, slots=True)
class LearntEffects:
    """Effects that make a model better, and what to tell of them, as JSON."""

    effects: CellEffects
    told: dict[str, Any]

    @property
    def message(self) -> str:
        """One line for the log."""
        # The same columns may be crossed with coarse and with fine levels.
        crosses = list(dict.fromkeys(" x ".join(cross["columns"]) for cross in self.told["crosses"]))
        shown = ", ".join(crosses[:3])
        more = f" and {len(crosses) - 3} more" if len(crosses) > 3 else ""
        plural = "" if len(crosses) == 1 else "es"
        return (
            f"effects of {len(crosses)} cross{plural} of columns ({shown}{more}): the mean square error of validated "
            f"rows falls by {100 * self.told['fall']:.3g}%"
        )


Scored = tuple[Tensor, Tensor, Tensor]
"""Rows x, (m, d), as they are stored, the model's outputs, (m, c), and targets, (m, c), or classes, (m,)."""


def learn_effects(
    training: Iterable[Scored],
    held_out: Iterable[Scored],
    targets: TargetCode,
    names: Sequence[str],
    n_codes: Mapping[int, int],
    minutes: float,
    spare_bytes: int,
) -> LearntEffects | None:
    """Effects that lower the error of the held-out rows beyond chance; None where there are none.

    names: of the features. n_codes: how many codes each feature has that holds a category's. minutes: of the whole fit,
    0 where it has no limit. spare_bytes: of memory.
    """
    rows = _Gathered(targets)
    for scored in training:
        rows.add(*scored)
        if rows.n_waiting >= _BINNED_ROWS:
            rows.cut(n_codes)
    rows.cut(n_codes)
    others = _Gathered(targets, rows.factors)
    for scored in held_out:
        others.add(*scored)
    others.cut(n_codes)
    factors = rows.factors
    if not factors or not others.n_rows:
        return None
    limits = _limits(minutes, spare_bytes, rows.n_outputs)
    cell_rows = rows.cell_rows()
    chosen = chosen_crosses(factors, cell_rows, rows.targets(), limits)
    fitted = fitted_effects(factors, chosen, cell_rows, others.cell_rows(), limits.sweeps)
    if not fitted.is_better():
        return None
    values = torch.from_numpy(fitted.effects)
    if rows.is_mirrored:
        values = torch.cat([-values, values], 1)
    crosses = [choice.cross for choice in fitted.chosen]
    used = sorted({number for cross in crosses for number in cross})
    effects = CellEffects(
        tuple(factors[number] for number in used),
        tuple(tuple(map(used.index, cross)) for cross in crosses),
        values,
    )
    return LearntEffects(effects, _told(fitted, factors, names, rows.n_rows))


def _limits(minutes: float, spare_bytes: int, n_outputs: int) -> SearchLimits:
    """What a search may take, by the memory and the minutes of the fit."""
    minutes = min(max(minutes or _USUAL_MINUTES, _LEAST_MINUTES), _MOST_MINUTES)
    cells = int(spare_bytes * _EFFECTS_SHARE) // (8 * n_outputs)
    usual = SearchLimits()
    return replace(
        usual,
        cells=min(usual.cells, cells // 4),
        all_cells=min(usual.all_cells, cells),
        rows=int(_ROWS_A_MINUTE * minutes) // n_outputs,
    )


def _told(
    fitted: FittedEffects, factors: Sequence[Factor], names: Sequence[str], n_rows: int
) -> dict[str, Any]:
    """What to tell of effects, as JSON; the crosses that explain most come first."""
    crosses = [
        {
            "columns": [names[factors[number].feature] for number in choice.cross],
            "levels": [factors[number].n_levels for number in choice.cross],
            "explained": choice.gain,
        }
        for choice in sorted(fitted.chosen, key=lambda choice: -choice.gain)
    ]
    fall = 1 - float(fitted.after.mean() / fitted.before.mean())
    return {"n_rows": n_rows, "n_validated": len(fitted.before), "fall": fall, "crosses": crosses}


class _Gathered:
    """Rows with what a model leaves of them, gathered a few at a time; levels in place of x once `cut` has been called.

    Of two classes, whose outputs mirror one another, the second alone is looked at. factors: those of other rows; empty
    to have them made of these.
    """

    def __init__(self, targets: TargetCode, factors: tuple[Factor, ...] = ()) -> None:
        self.factors = factors
        self.is_mirrored = targets.is_classification and targets.n_outputs == 2
        self.n_outputs = 1 if self.is_mirrored else targets.n_outputs
        self.n_rows = self.n_waiting = 0
        self._code = targets.to(torch.device("cpu"))
        self._waiting: list[Tensor] = []
        self._levels: list[NDArray[np.uint16]] = []
        self._residuals: list[NDArray[np.float64]] = []
        self._targets: list[NDArray[np.float64]] = []

    def add(self, x: Tensor, outputs: Tensor, y: Tensor) -> None:
        """Adds rows, from any device."""
        y = y.cpu()
        predicted = (outputs.cpu() - self._code.offset) / self._code.scale
        for parts, each in ((self._residuals, predicted), (self._targets, torch.zeros_like(predicted))):
            difference = each.T.double().contiguous()
            self._code.subtract_(difference, y)
            parts.append(-difference[-self.n_outputs :].numpy())
        self._waiting.append(x.to("cpu", copy=True))  # The batch is valid only for now.
        self.n_waiting += len(x)
        self.n_rows += len(x)

    def cut(self, n_codes: Mapping[int, int]) -> None:
        """Takes the levels of the rows that have none yet; the first rows tell where numbers are cut."""
        if not self._waiting:
            return
        x = torch.cat(self._waiting)
        self._waiting, self.n_waiting = [], 0
        if not self.factors:
            self.factors = tuple(_factors(x, n_codes))
        if self.factors:
            self._levels.append(np.stack([_levels(factor, x) for factor in self.factors]))

    def cell_rows(self) -> CellRows:
        """All rows, cut."""
        return CellRows(np.concatenate(self._levels, 1), np.concatenate(self._residuals, 1))

    def targets(self) -> NDArray[np.float64]:
        """The coded targets of all rows, (c, n)."""
        return np.concatenate(self._targets, 1)


def _factors(x: Tensor, n_codes: Mapping[int, int]) -> Iterator[Factor]:
    for feature, values in enumerate(x.T.contiguous().numpy()):
        if feature not in n_codes:
            yield from number_factors(feature, values, _BINS)
        elif n_codes[feature] < _MOST_LEVELS:
            yield code_factor(feature, n_codes[feature])


def _levels(factor: Factor, x: Tensor) -> NDArray[np.uint16]:
    return factor.levels(x).numpy().astype(np.uint16)
