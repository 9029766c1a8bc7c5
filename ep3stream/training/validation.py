"""Validations of a fit: on which rows, after which steps, and which model has been the best."""

from __future__ import annotations

import logging
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from ep3stream.config import FitConfig
from ep3stream.errors import ConfigError
from ep3stream.prediction.evaluate import score_ridges
from ep3stream.run.checkpoint import Best
from ep3stream.run.setup import HELD_ROWS, Setup
from ep3stream.solver.model import ModelShard
from ep3stream.store.manifest import Manifest, SplitInfo
from ep3stream.store.reader import RowStore, SplitReader
from ep3stream.stream.order import NO_ROWS, Rows, sample_rows

logger = logging.getLogger(__name__)

_MAX_ROWS = 50_000

# Splits that are there to be validated on, by name; never `test`, on which a model must not be chosen.
VALIDATION_SPLITS = ("validation", "valid", "val", "dev")
# Of a split with fewer rows none are held out.
_FEWEST_ROWS = 1000
HELD_SHARE, _MOST_HELD = 0.1, 20_000

# Purposes of random numbers; the set-up has 1 and 2.
_ROWS, _HELD = 3, 6


@dataclass(frozen=True, slots=True)
class ValidationRows:
    """Which rows a fit is validated on, as settled when its set-up is made.

    split: the split they are of; None for a fit without validations. n_held: how many rows of the split that is fitted
    are held out of the training; 0 where another split is validated.
    """

    split: str | None
    n_held: int = 0

    @classmethod
    def of(cls, config: FitConfig, manifest: Manifest) -> ValidationRows:
        """What the settings say; `auto` is a split for validation, or else some rows of the split that is fitted.

        Raises ConfigError for a patience without rows to validate on.
        """
        named = config.data.validate
        found = _automatic(config, manifest) if named == "auto" else cls(None if named == "none" else named)
        found._require_patience(config)
        return found

    @classmethod
    def of_setup(cls, config: FitConfig, setup: Setup) -> ValidationRows:
        """What the settings say of a fit whose set-up is made; `auto` is what the set-up has recorded."""
        named = config.data.validate
        # Set-ups of earlier versions have no record: they had validations only on a split that was named.
        recorded = cls(**setup.description.get("validation", {"split": None}))
        found = recorded if named == "auto" else cls(None if named == "none" else named)
        found._require_patience(config)
        return found

    def _require_patience(self, config: FitConfig) -> None:
        if self.split is None and config.solver.used_patience:
            why = ": there are too few rows to hold some out" if config.data.validate == "auto" else ""
            raise ConfigError(
                f"patience is {config.solver.patience} but no rows are validated{why}; give a split with "
                "--validate, or leave patience out"
            )

    def n_rows(self, manifest: Manifest) -> int:
        """How many rows each validation scores."""
        if self.split is None:
            return 0
        return self.n_held or min(manifest.splits[self.split].n_rows, _MAX_ROWS)

    def held_rows(self, info: SplitInfo, seed: int) -> Rows:
        """Sorted numbers of the rows of the fitted split that are held out, a function of the seed."""
        return np.sort(sample_rows(info, self.n_held, seed, _HELD)) if self.n_held else NO_ROWS

    def recorded(self, setup: Setup, held: Rows) -> Setup:
        """The set-up with a record of these rows."""
        tensors = setup.tensors | ({HELD_ROWS: torch.from_numpy(held)} if len(held) else {})
        return replace(
            setup, tensors=tensors, description={**setup.description, "validation": self.to_json()}
        )

    def to_json(self) -> dict[str, Any]:
        """For RUN/setup and run.json."""
        return {"split": self.split, "n_held": self.n_held}

    def tell(self) -> None:
        """Tells in the log which rows are validated on, where nobody has named them."""
        if self.n_held:
            logger.info(
                "%s rows of %s are held out for validation; --validate none to train on all",
                f"{self.n_held:,}",
                self.split,
            )
        elif self.split is not None:
            logger.info("validated on the split %s; --validate none for no validation", self.split)


NO_VALIDATION = ValidationRows(None)


def _automatic(config: FitConfig, manifest: Manifest) -> ValidationRows:
    fitted = config.data.split
    for split in VALIDATION_SPLITS:
        if split in manifest.splits and split != fitted:
            return ValidationRows(split)
    n_held = n_held_out(manifest.splits[fitted].n_rows)
    return ValidationRows(fitted, n_held) if n_held else NO_VALIDATION


def n_held_out(n_rows: int, share: float = HELD_SHARE) -> int:
    """How many of so many rows are held out: this share of them, 20,000 at most; none of fewer than 1000."""
    return 0 if n_rows < _FEWEST_ROWS else min(int(n_rows * share), _MOST_HELD)


@dataclass(frozen=True, slots=True)
class Validation:
    """Scores on the same h rows of a split, every so many steps and at the end of the fit.

    rows: their numbers, (h,), sorted: those that are held out, or all rows of a split of up to 50,000 rows, else 50,000
    random ones, so that a validation costs O(h p) time however large the split is. name: of these rows, for people.
    """

    reader: SplitReader
    rows: Rows
    every_steps: int
    name: str

    @classmethod
    def of(cls, store: RowStore, config: FitConfig, setup: Setup, steps_per_epoch: int) -> Validation | None:
        """The validation of a fit whose set-up is made; None where it has none."""
        chosen = ValidationRows.of_setup(config, setup)
        if chosen.split is None:
            return None
        reader = store.split(chosen.split)
        every_steps = config.solver.validation_steps(steps_per_epoch)
        if chosen.n_held:
            rows = setup.tensors[HELD_ROWS].numpy()
            return cls(reader, rows, every_steps, f"{chosen.split}, held out")
        n_rows = min(reader.info.n_rows, _MAX_ROWS)
        rows = np.sort(sample_rows(reader.info, n_rows, config.run.seed, _ROWS))
        return cls(reader, rows, every_steps, chosen.split)

    def score(self, model: ModelShard) -> tuple[dict[str, Any], int]:
        """The best model's scores as `evaluate` gives them and `weighted_error`, and the number of its ridge."""
        return best_ridge(score_ridges(model, self.reader.manifest.class_names, self.segments))

    def segments(self) -> Iterator[tuple[NDArray[Any], NDArray[Any]]]:
        """Yields x and y of the rows, those of one segment at a time."""
        starts = np.flatnonzero(np.diff(self.rows // self.reader.info.segment_rows)) + 1
        for part in np.split(self.rows, starts):
            yield self.reader.read_rows(part)


def best_ridge(each: Sequence[dict[str, Any]]) -> tuple[dict[str, Any], int]:
    """The scores of the ridge with the least weighted error, and its number; each: those of all ridges."""
    best = min(range(len(each)), key=lambda number: float(each[number]["weighted_error"]))
    return each[best], best


def after_validation(
    best: Best | None, scores: Mapping[str, Any], average: Tensor, step: int, rows: str = "", ridge: int = 0
) -> Best:
    """The best model after one more validation, on `rows`, of the weights `average`, (c, p_shard), at `step`.

    ridge: the number of their ridge.
    """
    error = float(scores["weighted_error"])
    if best is None or error < best.error or math.isnan(best.error):
        return Best(average.clone(), error, step, 0, rows, ridge)
    return replace(best, n_since=best.n_since + 1)
