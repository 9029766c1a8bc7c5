"""Validations of a fit: on which rows, after which steps, and which model has been the best."""

from __future__ import annotations

import math
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError
from ep3stream.prediction.evaluate import score_rows
from ep3stream.run.checkpoint import Best
from ep3stream.solver.model import ModelShard
from ep3stream.solver.targets import TargetCode
from ep3stream.store.reader import RowStore, SplitReader
from ep3stream.stream.order import Rows, sample_rows

_MAX_ROWS = 50_000

# Purpose of random numbers; the set-up has 1 and 2.
_ROWS = 3


@dataclass(frozen=True, slots=True)
class Validation:
    """Scores on the same h rows of a split, every so many steps and at the end of the fit.

    rows: their numbers, (h,), sorted: all rows of a split of up to 50,000 rows, else 50,000 random ones, so that a
    validation costs O(h p) time however large the split is.
    """

    reader: SplitReader
    rows: Rows
    every_steps: int

    @classmethod
    def of(cls, store: RowStore, config: FitConfig, steps_per_epoch: int) -> Validation | None:
        """The validation of the settings; None where they name no split to validate."""
        if config.data.validate is None:
            return None
        reader = store.split(config.data.validate)
        n_rows = min(reader.info.n_rows, _MAX_ROWS)
        rows = np.sort(sample_rows(reader.info, n_rows, config.run.seed, _ROWS))
        return cls(reader, rows, config.solver.validation_steps(steps_per_epoch))

    def score(self, model: ModelShard, targets: TargetCode) -> dict[str, Any]:
        """The scores that `evaluate` gives, and `weighted_error`, the mean square that the fit minimises."""
        return score_rows(model, self.reader, self._read, targets)

    def _read(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yields x and y of the rows, those of one segment at a time."""
        starts = np.flatnonzero(np.diff(self.rows // self.reader.info.segment_rows)) + 1
        for part in np.split(self.rows, starts):
            yield self.reader.read_rows(part)


def after_validation(best: Best | None, scores: Mapping[str, Any], average: Tensor, step: int) -> Best:
    """The best model after one more validation, of the weights `average`, (c, p_shard), at `step`."""
    error = float(scores["weighted_error"])
    if best is None or error < best.error or math.isnan(best.error):
        return Best(average.clone(), error, step)
    return Best(best.weights, best.error, best.step, best.n_since + 1)


def require_validation(config: FitConfig) -> None:
    """ConfigError for a patience without a split to validate on."""
    if config.solver.patience and config.data.validate is None:
        raise ConfigError(
            f"patience is {config.solver.patience} but no split is validated; give one with --validate, "
            "or leave patience out"
        )
