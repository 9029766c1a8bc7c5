"""The rows that a set-up computes with: centers, samples, probes, and those that weights of columns are learnt from.

Of a split they are drawn by seed and purpose, so that the same split, settings and seed give the same rows.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.mesh import Mesh
from ep3stream.solver.column_weights import CHECKED_ROWS
from ep3stream.solver.input_scaling import InputScaling
from ep3stream.solver.set_up import n_probes, probes_of
from ep3stream.store.manifest import SplitInfo
from ep3stream.store.reader import Split, SplitReader
from ep3stream.stream.order import NO_ROWS, Rows, sample_rows
from ep3stream.training.centers import CenterSource, drawn_centers
from ep3stream.training.column_kernel import LearntColumns, pool_rows
from ep3stream.training.plan import SizePlan
from ep3stream.training.validation import ValidationRows

# Purposes of random numbers; others have set_up.py and centers.py.
_SAMPLES, _POOL = 2, 4

# Rows are drawn in excess by this factor, since some of them are centers.
_EXCESS = 1.1
_TIMED_ROWS = 4096


@dataclass(frozen=True, slots=True)
class SetUpRows:
    """The points that a set-up computes with, in the units of the data, in host memory or on the device.

    centers: (p, d); the set-up may put them into another order, in place. excluded: sorted numbers of the rows that are
    not trained on: those that became centers, and those that are held out.
    sample: X_s, (s, d), the Nystrom sample; sample_y: its y, None where it is not known (then there is no head start).
    probes: (n, d), rows to measure the step size on; probe_y: their y, which only class weights ask for.
    pool: x, (n, d), and y of rows to learn a linear part and the weights of columns from; None where there is nothing
    to learn. learnt: what was learnt before.
    """

    centers: Tensor
    excluded: Rows
    sample: Tensor
    sample_y: Tensor | None
    probes: Tensor
    probe_y: Tensor | None
    pool: tuple[Tensor, Tensor] | None = None
    learnt: LearntColumns | None = None

    @classmethod
    def parted(cls, centers: Tensor, excluded: Rows, x: Tensor, y: Tensor, n_samples: int) -> SetUpRows:
        """Rows x and y in random order: the first `n_samples` are the sample, those behind them the probes."""
        probes, probe_y = (probes_of(each, n_samples) for each in (x, y))
        return cls(centers, excluded, x[:n_samples], y[:n_samples], probes, probe_y)


def rows_of_split(
    split: SplitReader,
    source: CenterSource,
    inputs: InputScaling,
    plan: SizePlan,
    config: FitConfig,
    mesh: Mesh,
    held: Rows,
    learnt: LearntColumns | None,
) -> SetUpRows:
    """Centers, sample and probes of a split, read once by one rank of each machine; a function of the seed.

    held: sorted numbers of the rows that are held out, of which none is taken. learnt: tells where centers are needed.
    """
    drawn = None
    if source.points is None:
        errors = None if learnt is None else learnt.errors
        drawn = drawn_centers(split, source.n_centers, errors, inputs, config, mesh, held)
    others = other_rows(split.info, drawn, plan, config, held)

    def read() -> list[Tensor]:
        given = None if source.points is None else source.points(inputs.along(None))
        centers, x, y = read_rows(split, drawn, others)
        return [centers if given is None else given, x, y]

    centers, x, y = mesh.once_per_node(read)
    excluded = held
    if drawn is not None and not config.data.keep_center_rows:
        excluded = np.union1d(drawn, held)
    rows = SetUpRows.parted(centers, excluded, x, y, plan.nystrom_samples)
    return replace(rows, learnt=learnt)


def other_rows(
    info: SplitInfo, drawn: Rows | None, plan: SizePlan, config: FitConfig, held: Rows = NO_ROWS
) -> Rows:
    """Numbers of the rows for sample and probes, in random order; centers only where there are no other rows.

    A center leans far more on its own weight than the rows that are trained on. drawn: the rows that became centers.
    held: rows that are not taken.
    """
    n_drawn, n_left = 0 if drawn is None else len(drawn), info.n_rows - len(held)
    n_wanted = plan.nystrom_samples + n_probes(config.solver, plan.max_batch_size, n_left - n_drawn)
    # So many that enough are left without the centers among them, but for bad luck.
    share = 1 - n_drawn / n_left
    n_more = math.ceil(_EXCESS * n_wanted / share) if share > 0 else n_left
    others = sample_rows(info, min(n_left, n_more), config.run.seed, _SAMPLES, without=held)
    fresh = ~np.isin(others, () if drawn is None else drawn)
    return (others[fresh] if fresh.any() else others)[:n_wanted]


def read_pool(split: Split, config: FitConfig, held: Rows = NO_ROWS) -> tuple[Tensor, Tensor] | None:
    """x, (n, d), and y of rows in random order to learn from before a fit; None where there is nothing to learn.

    held: numbers of rows that are not read.
    """
    manifest, n_left = split.manifest, split.info.n_rows - len(held)
    n_rows = pool_rows(config, n_left, manifest.n_features, manifest.n_outputs)
    if not n_rows:
        return None
    numbers = sample_rows(split.info, n_rows, config.run.seed, _POOL, without=held)
    _, x, y = read_rows(split, None, numbers)
    return x, y


def read_checked(split: SplitReader, validation: ValidationRows, config: FitConfig) -> tuple[Tensor, ...]:
    """x and y of rows of the split that the fit is validated on; nothing where that is the split it is fitted to."""
    if validation.split is None or validation.n_held or validation.split == split.info.name:
        return ()
    validated = split.beside(validation.split)
    n_rows = min(validated.info.n_rows, CHECKED_ROWS)
    numbers = sample_rows(validated.info, n_rows, config.run.seed, _POOL)
    return read_rows(validated, None, numbers)[1:]


def first_rows(split: Split) -> NDArray[Any]:
    """x of the first 4096 rows, or of a segment where that is less, (n, d)."""
    return split.read_rows(np.arange(min(_TIMED_ROWS, split.info.n_rows, split.info.segment_rows)))[0]


def read_rows(split: Split, drawn: Rows | None, others: Rows) -> tuple[Tensor, Tensor, Tensor]:
    """x of the rows `drawn`, then x and y of the rows `others`; each segment is read once."""
    wanted = others if drawn is None else np.concatenate([drawn, others])
    unique, places = np.unique(wanted, return_inverse=True)
    read_x, read_y = split.read_rows(unique)
    x, n_drawn = torch.from_numpy(read_x), len(wanted) - len(others)
    drawn_x, other_x = (x[torch.from_numpy(part)].float() for part in (places[:n_drawn], places[n_drawn:]))
    return drawn_x, other_x, torch.from_numpy(read_y[places[n_drawn:]])
