"""A target of numbers that looks like classes is told of, with the remedy."""

from __future__ import annotations

import logging
from pathlib import Path

import numpy as np
import pytest
from small_stores import plain_config

import ep3stream
from ep3stream import ConvertConfig

X = np.random.default_rng(0).standard_normal((300, 3)).astype(np.float32)


def told(caplog, y: np.ndarray, place: Path, **config) -> list[str]:
    caplog.clear()
    caplog.set_level(logging.INFO, "ep3stream")
    ep3stream.convert((X, y), place, ConvertConfig(**config))
    return [line for line in caplog.messages if "--task classification" in line]


@pytest.mark.parametrize(("low", "high"), [(0, 1), (-1, 1), (1, 2), (0.1, 0.7), (5e9, 5e9 + 1)])
def test_a_target_of_two_values_is_told_once_with_the_remedy(tmp_path, caplog, low, high):
    y = np.where(X[:, 0] > 1, high, low).astype(np.float64)
    (line,) = told(caplog, y, tmp_path / "s.zarr", splits={"train": 0.8, "test": 0.2})
    assert line.startswith(
        f"target 'y' has two values, {low:.12g} and {high:.12g}, and is fitted as a number"
    )


def test_a_third_value_classes_and_a_task_that_was_said_are_not_told_of(tmp_path, caplog):
    y = (X[:, 0] > 0).astype(np.float64)
    assert not told(caplog, y, tmp_path / "said.zarr", task="regression")
    assert not told(caplog, y.astype(np.int64), tmp_path / "classes.zarr", task="classification")
    y[7] = 0.5
    assert not told(caplog, y, tmp_path / "three.zarr")


def test_of_several_targets_those_are_named(tmp_path, caplog):
    y = np.stack([X[:, 0], X[:, 1] > 0, X[:, 2] > 0], 1).astype(np.float64)
    (line,) = told(caplog, y, tmp_path / "s.zarr")
    assert line.startswith(
        "target 'y1' has two values, 0 and 1 and 'y2' has two values, 0 and 1, and is fitted"
    )


def test_a_fit_tells_of_it_too(tmp_path, caplog):
    told(caplog, (X[:, 0] > 0).astype(np.float64), tmp_path / "s.zarr", task="regression")
    ep3stream.fit(tmp_path / "s.zarr", tmp_path / "run", plain_config(solver={"centers": 20}))
    assert len([line for line in caplog.messages if "--task classification" in line]) == 1
