"""The kernel on columns of a fit: its weights learnt from a pool of rows, and what to tell of them."""

from __future__ import annotations

import logging
from collections.abc import Iterable, Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import FitConfig, KernelConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.column_weights import FEWEST_ROWS, POOL_ROWS, Learnt, grown, learnt_weights, ridge_of
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.expected_error import ExpectedError

_LOGGER = logging.getLogger(__name__)

# The learning has a generator of its own: it must not depend on what else the set-up draws.
_SEED = 5
# The rows that weights are learnt from take at most this part of the memory.
_POOL_SHARE = 1 / 32
_TOLD_COLUMNS = 20
# Learning takes some thirty seconds of a core where the fit has these minutes; with others a third to nine times that.
_USUAL_MINUTES, _LEAST_EFFORT, _MOST_EFFORT = 2.0, 0.5, 3.0
# The noise that a small problem finds is a guess. With the centers of the fit 1 to 10 times as much was best on tables
# of illnesses, batting, blood values, faces and loads, by 0.3 to 1.3% of the mse, and a tenth on births.
_RIDGE_FACTORS = (1.0, 0.25, 4.0, 16.0)
# A step's products with its kernel block: so many columns of weights take little longer than one.
_MOST_COLUMNS = 16
# With fewer features the products take up to half as long again as the block: land or ocean lost .0014 of accuracy for
# want of centers.
_FEWEST_FEATURES = 4
# Beyond so many columns a block costs several times what a distance kernel's does.
_MANY_COLUMNS = 200


def pool_rows(settings: KernelConfig, n_rows: int, n_features: int, n_outputs: int, memory_bytes: int) -> int:
    """How many rows weights are to be learnt from: 400,000, or what 1/32 of the memory holds; 0 for other kernels."""
    if settings.name not in COLUMN_KERNELS:
        return 0
    row_bytes = 4 * (n_features + 2 * n_outputs)  # Targets are coded, and then lie row by row.
    return min(n_rows, POOL_ROWS, max(FEWEST_ROWS, int(memory_bytes * _POOL_SHARE) // row_bytes))


def tried_ridges(config: FitConfig, n_features: int, n_outputs: int) -> tuple[float, ...]:
    """Multiples of the ridge that learning has found, to be fitted side by side: validations choose of them.

    1 alone where the ridge is given or the kernel learns none, and where columns of weights for each ridge would cost
    more than they bring: with many outputs, or where few features make the block itself cheap.
    """
    solver = config.solver
    learns = config.kernel.name in COLUMN_KERNELS and solver.ridge is None and solver.projection != "eigenpro"
    is_cheap = n_features >= _FEWEST_FEATURES and n_outputs * len(_RIDGE_FACTORS) <= _MOST_COLUMNS
    return _RIDGE_FACTORS if learns and is_cheap else (1.0,)


def learning_effort(minutes: float) -> float:
    """How large the problems of the learning are, 1 for a fit of two minutes or without a limit."""
    return min(max(minutes / _USUAL_MINUTES, _LEAST_EFFORT), _MOST_EFFORT) if minutes else 1.0


def plain_kernel(settings: KernelConfig, n_features: int, categories: Iterable[int]) -> ColumnKernel:
    """All columns with the same weight, so that a typical pair of rows has K near exp(-1).

    categories: the numbers of the features that are codes.
    """
    metric = torch.ones(3, n_features)
    metric[0], metric[1] = 1 / n_features, 0
    metric[1, list(categories)] = 1
    return ColumnKernel.of(settings.name, metric, settings.parameters()["power"])


@dataclass(frozen=True, slots=True)
class LearntColumns:
    """A kernel on columns whose weights were learnt, for any number of centers, the same on every rank.

    known: the kernel that suits `n_known` centers; 0 of them where its weights are for any number. growth: the power of
    the number of centers that the weights grow with. noise: the ridge that suits it, times the number of rows, None
    where it is not known. told: what to tell of the columns, as JSON; None where nothing was learnt. sharpness: a
    factor of all weights, as the settings have it. errors: on the leader alone, where a small model is expected to
    err; None where that is the same everywhere, or not known.
    """

    known: ColumnKernel
    n_known: int = 0
    growth: float = 0.0
    noise: float | None = None
    told: dict[str, Any] | None = None
    sharpness: float = 1.0
    errors: ExpectedError | None = None

    def for_centers(self, n_centers: int) -> ColumnKernel:
        """The kernel for a fit with so many centers."""
        return grown(self.known, self.n_known, self.growth, n_centers).scaled(self.sharpness)

    def ridge(self, n_rows: int) -> float:
        """The ridge of a fit to so many rows; 0 where the noise is not known."""
        return 0.0 if self.noise is None else ridge_of(self.noise, n_rows)

    def told_for(self, n_centers: int) -> dict[str, Any] | None:
        """What to tell, with the weights of `for_centers`."""
        if self.told is None:
            return None
        kernel = self.for_centers(n_centers)
        columns = [
            {
                **column,
                "weight": float(kernel.weights[column["at"]]),
                "share": float(kernel.shares[column["at"]]),
            }
            for column in self.told["columns"]
        ]
        for column in columns:
            del column["at"]
        return {**self.told, "columns": columns}


def learnt_columns(
    plain: ColumnKernel,
    x: Tensor,
    y: Tensor,
    names: Sequence[str],
    n_centers: int,
    mesh: Mesh,
    checked: tuple[Tensor, Tensor] | None = None,
    effort: float = 1.0,
) -> LearntColumns:
    """Weights learnt from x, (n, d), scaled, and coded targets y, (n, c); n_centers: as many as the fit may have.

    checked: x and y of another split, such as the validated one, which the weights have to suit too.
    The leader learns, the other ranks take over its weights. With fewer than 100 rows the kernel stays plain, with a
    warning.
    """
    if len(x) < FEWEST_ROWS:
        _LOGGER.warning(
            "there are only %d rows to learn the weights of the %s kernel from, too few: all columns weigh the same",
            len(x),
            plain.name,
        )
        return LearntColumns(plain)
    if x.shape[1] > _MANY_COLUMNS:
        _LOGGER.warning(
            "the %s kernel has %d columns to go through for each of its values, which is slow; a kernel of distances, "
            "such as laplacian, takes a fraction of the time",
            plain.name,
            x.shape[1],
        )

    errors: list[ExpectedError | None] = []

    def learn() -> dict[str, Any]:
        learnt = learnt_weights(plain, x, y, n_centers, torch.Generator().manual_seed(_SEED), checked, effort)
        errors.append(learnt.errors)
        return {
            "metric": learnt.known.metric.tolist(),
            "n_known": learnt.n_known,
            "growth": learnt.growth,
            "noise": learnt.noise,
            "told": _told(learnt, names),
        }

    found = mesh.broadcast_object(learn)
    known = ColumnKernel.of(plain.name, torch.tensor(found["metric"]), plain.power)
    suits = found["n_known"], found["growth"], found["noise"]
    return LearntColumns(known, *suits, found["told"], errors=errors[0] if errors else None)


def _told(learnt: Learnt, names: Sequence[str]) -> dict[str, Any]:
    """Names, importance and numbers of the columns that matter most, as JSON."""
    order = torch.argsort(learnt.importance, descending=True, stable=True)[:_TOLD_COLUMNS]
    return {
        "explained": learnt.explained,
        "n_used": len(learnt.known.used),
        "columns": [
            {"name": names[j], "importance": float(learnt.importance[j]), "at": j} for j in order.tolist()
        ],
    }
