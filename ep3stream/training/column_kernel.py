"""What a fit learns of columns before its first step, from a pool of rows: a linear part, and a kernel's weights."""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterable, Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor

from ep3stream.config import FitConfig, KernelConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.column_weights import (
    FEWEST_ROWS,
    POOL_ROWS,
    Learnt,
    grown,
    held_rows,
    learnt_weights,
    ridge_of,
)
from ep3stream.solver.columns import COLUMN_KERNELS, ColumnKernel
from ep3stream.solver.expected_error import ExpectedError
from ep3stream.solver.kernels import Kernel
from ep3stream.solver.linear_part import LinearFit, LinearPart, fitted_linear, n_linear_rows, reduces_error

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

# Of the small models that tell whether a linear part helps.
_SMALL_ROWS, _SMALL_CENTERS = 8192, 1024
# Standard errors. A kernel of distances gains more in a fit than in a small model, which is solved to the end.
_LIKELY_GAIN = 1.0


def wants_linear(config: FitConfig) -> bool:
    """Whether a fit, its kernel settled, tries a linear part."""
    asked, is_of_columns = config.solver.linear, config.kernel.name in COLUMN_KERNELS
    is_tried = asked == "tried" or (asked == "auto" and is_of_columns)
    return is_tried and config.solver.class_weights == "none"


def pool_rows(config: FitConfig, n_rows: int, n_features: int, n_outputs: int) -> int:
    """How many rows are learnt from before a fit, 1/32 of the memory at most; 0 where there is nothing to learn.

    For the weights of a kernel 400,000, for a linear part alone 32,768, or 100 for each feature.
    """
    is_of_columns = config.kernel.name in COLUMN_KERNELS
    if not is_of_columns and not wants_linear(config):
        return 0
    row_bytes = 4 * (n_features + 2 * n_outputs)  # Targets are coded, and then lie row by row.
    most = POOL_ROWS if is_of_columns else n_linear_rows(n_features)
    return min(n_rows, most, max(FEWEST_ROWS, int(config.run.memory_bytes * _POOL_SHARE) // row_bytes))


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
    """What was learnt before a fit, the same on every rank: weights for any number of centers, and a linear part.

    known: the kernel on columns that suits `n_known` centers; 0 of them where its weights are for any number, None for
    another kernel. growth: the power of the number of centers that the weights grow with. noise: the ridge that suits
    it, times the number of rows, None where it is not known. told: what to tell of the columns, as JSON; None where
    nothing was learnt. sharpness: a factor of all weights, as the settings have it. errors: on the leader alone, where
    a small model is expected to err; None where that is the same everywhere, or not known. linear: the linear part, if
    any, and told_linear what to tell of it, as JSON.
    """

    known: ColumnKernel | None
    n_known: int = 0
    growth: float = 0.0
    noise: float | None = None
    told: dict[str, Any] | None = None
    sharpness: float = 1.0
    errors: ExpectedError | None = None
    linear: LinearPart | None = None
    told_linear: dict[str, Any] | None = None

    def for_centers(self, n_centers: int) -> ColumnKernel:
        """The kernel on columns for a fit with so many centers."""
        assert self.known is not None
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
    tries_linear: bool = False,
) -> LearntColumns:
    """Weights learnt from x, (n, d), scaled, and coded targets y, (n, c); n_centers: as many as the fit may have.

    tries_linear: whether a linear part is fitted too, which stays where it helps.

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
    kept: list[Learnt] = []

    def learn() -> dict[str, Any]:
        generator = torch.Generator().manual_seed(_SEED)
        learnt = learnt_weights(plain, x, y, n_centers, generator, checked, effort, tries_linear)
        kept.append(learnt)
        return {
            "metric": learnt.known.metric.tolist(),
            "n_known": learnt.n_known,
            "growth": learnt.growth,
            "noise": learnt.noise,
            "told": _told(learnt, names),
        }

    found = mesh.broadcast_object(learn)
    known = ColumnKernel.of(plain.name, torch.tensor(found["metric"]), plain.power)
    if len(known.used) > _MANY_COLUMNS:
        _LOGGER.warning(
            "the %s kernel has %d columns to go through for each of its values, which is slow; a kernel of distances, "
            "such as laplacian, takes a fraction of the time",
            plain.name,
            len(known.used),
        )
    suits = found["n_known"], found["growth"], found["noise"]
    columns = LearntColumns(known, *suits, found["told"], errors=kept[0].errors if kept else None)
    return _with_linear(columns, kept[0].linear if kept else None, names, mesh)


def learnt_linear(
    x: Tensor,
    y: Tensor,
    kernel: Callable[[Tensor], Kernel],
    names: Sequence[str],
    n_centers: int,
    mesh: Mesh,
    checked: tuple[Tensor, Tensor] | None = None,
) -> LearntColumns:
    """A linear part alone, of all of x, (n, D), scaled, for a kernel that learns no weights; only if it helps.

    kernel: for given points, with its bandwidth measured on them. names: of the D inputs. n_centers, checked: as in
    `learnt_columns`.
    """
    found: list[LinearFit | None] = []

    def learn() -> None:
        generator = torch.Generator().manual_seed(_SEED)
        no_categories = torch.zeros(x.shape[1], dtype=torch.bool)
        n_held = held_rows(len(x))
        fit = fitted_linear(x, y, no_categories, n_held, generator, checked)
        if fit is not None:
            held, pool = (x[:n_held], y[:n_held]), (x[n_held:][:_SMALL_ROWS], y[n_held:][:_SMALL_ROWS])
            n_small = min(n_centers, _SMALL_CENTERS, max(1, len(pool[0]) // 4))
            if not reduces_error(
                fit.of_others, kernel(pool[0]), pool, checked or held, n_small, _LIKELY_GAIN
            ):
                fit = None
        found.append(fit)

    mesh.on_leader(learn)
    return _with_linear(LearntColumns(None), found[0] if found else None, names, mesh)


def _with_linear(
    columns: LearntColumns, fit: LinearFit | None, names: Sequence[str], mesh: Mesh
) -> LearntColumns:
    """The same with the leader's linear part, if it has one."""
    told = mesh.broadcast_object(lambda: None if fit is None else _told_linear(fit, names))
    if told is None:
        return columns
    tensors = [None] * 3 if fit is None else [tensor.cpu() for tensor in fit.part.tensors().values()]
    part = LinearPart(*(mesh.replicate(tensor) for tensor in tensors))
    _LOGGER.info(
        "a linear part explains %.3g%% of the variance of rows left out; the kernel learns the rest (--linear none "
        "does without)",
        100 * told["explained"],
    )
    return replace(columns, linear=part, told_linear=told)


def _told_linear(fit: LinearFit, names: Sequence[str]) -> dict[str, Any]:
    """What to tell of a linear part, as JSON: the inputs whose terms vary most, in standard deviations of targets."""
    order = torch.argsort(fit.sizes, descending=True, stable=True)[:_TOLD_COLUMNS].tolist()
    columns = [{"name": names[j], "size": float(fit.sizes[j])} for j in order if fit.sizes[j] > 0]
    return {"explained": fit.explained, "columns": columns}


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
