"""Weights of classes and targets in whole runs, and as many classes as would not fit one-hot."""

from __future__ import annotations

import json
from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import make_store, smooth_rows
from test_fit import settings

import ep3stream
from ep3stream.errors import ConfigError
from ep3stream.prediction.scores import ClassScores
from ep3stream.run.setup import Setup
from ep3stream.solver.targets import TargetCode

RARE = 0.03


@pytest.fixture(scope="module")
def rare(tmp_path_factory) -> Path:
    """Two classes, `1` in three rows of a hundred."""
    folder = tmp_path_factory.mktemp("rare")
    x, y = smooth_rows(4000)
    np.save(folder / "x.npy", x)
    noisy = y[:, 0] + 2 * np.random.default_rng(1).standard_normal(len(y))
    np.save(folder / "y.npy", (noisy > np.quantile(noisy, 1 - RARE)).astype(np.int64))
    splits = ep3stream.ConvertConfig(splits={"train": 0.7, "test": 0.3})
    store = folder / "s.zarr"
    ep3stream.convert([], store, splits, x_file=folder / "x.npy", y_file=folder / "y.npy")
    return store


def recall(run: Path, store: Path) -> float:
    with ep3stream.open_store(store) as rows:
        reader = rows.split("test")
        x, y = reader.read_rows(np.arange(reader.info.n_rows))
    return float((ep3stream.load(run).predict(x[y == 1]) == 1).mean())


def test_balanced_classes_find_the_rare_one(rare, tmp_path):
    runs = {
        weights: ep3stream.fit(rare, tmp_path / weights, settings(solver={"class_weights": weights}))
        for weights in ("none", "balanced")
    }
    assert recall(runs["balanced"], rare) > recall(runs["none"], rare) + 0.3
    setup = Setup.load(runs["balanced"] / "setup")
    counts = np.array(ep3stream.inspect(rare)["splits"]["train"]["class_counts"])
    assert np.allclose(setup.tensors["target_weights"], counts.sum() / (2 * counts))
    assert np.allclose(setup.tensors["target_offset"], 0.5)


def test_weights_by_name_leave_the_other_classes_at_one(rare, tmp_path):
    run = ep3stream.fit(rare, tmp_path / "run", settings(solver={"class_weights": {"1": 5}}))
    assert Setup.load(run / "setup").tensors["target_weights"].tolist() == [1, 5]


def test_the_loss_of_a_weighted_fit_is_not_weighted(rare, tmp_path):
    losses = []
    for weights in ("none", "balanced"):
        run = ep3stream.fit(
            rare, tmp_path / weights, settings(solver={"class_weights": weights, "epochs": 1})
        )
        lines = (run / "metrics.jsonl").read_text().splitlines()
        losses.append(next(r for r in map(json.loads, lines) if r["kind"] == "step"))
    assert losses[1]["loss"] < 10 * losses[0]["loss"]
    assert losses[1]["loss"] < 1


@pytest.mark.parametrize(
    ("task", "solver", "words"),
    [
        (
            "classification",
            {"class_weights": {"9": 2}},
            r"class_weights has '9', which is no class; use some of 0, 1, 2",
        ),
        ("classification", {"output_weights": {"y": 2}}, "targets are classes; use class_weights"),
        ("regression", {"class_weights": "balanced"}, "targets are numbers; use output_weights"),
        (
            "regression",
            {"output_weights": {"y": 2}, "ridge": 0.1},
            "output_weights has 'y', which is no target",
        ),
        ("regression", {"output_weights": {"y0": 2}}, "without a ridge or patience they change nothing"),
    ],
)
def test_weights_that_do_not_fit_the_task_are_named(tmp_path, task, solver, words):
    store = make_store(tmp_path / "s.zarr", task)
    with pytest.raises(ConfigError, match=words):
        ep3stream.fit(store, tmp_path / "run", settings(solver=solver))


def test_a_heavy_target_is_penalised_less(tmp_path):
    store = make_store(tmp_path / "s.zarr")
    names = list(ep3stream.inspect(store)["target_names"])
    errors = []
    for weight in (1.0, 100.0):
        config = settings(solver={"ridge": 0.3, "output_weights": {names[0]: weight}, "epochs": 4})
        run = ep3stream.fit(store, tmp_path / f"run{weight}", config)
        with ep3stream.open_store(store) as rows:
            x, y = rows.split("test").read_rows(np.arange(250))
        errors.append(np.square(ep3stream.load(run).predict(x) - y).mean(0))
    assert errors[1][0] < 0.8 * errors[0][0]
    assert errors[1][1] == pytest.approx(errors[0][1], rel=0.2)


C = 1000


def test_a_thousand_classes_take_the_memory_of_a_few_rows_not_of_all(tmp_path, monkeypatch):
    """The 6000 rows to score are one segment: their outputs at once would be 6 million numbers."""
    generator = np.random.default_rng(0)
    means = generator.standard_normal((C, 8)).astype(np.float32) * 3
    labels = np.concatenate([np.arange(C), generator.integers(0, C, 19_000)])
    np.save(
        tmp_path / "x.npy", means[labels] + 0.3 * generator.standard_normal((20_000, 8)).astype(np.float32)
    )
    np.save(tmp_path / "y.npy", labels)
    config = ep3stream.ConvertConfig(splits={"train": 0.7, "test": 0.3})
    ep3stream.convert([], tmp_path / "s.zarr", config, x_file=tmp_path / "x.npy", y_file=tmp_path / "y.npy")
    values = {"centers": 400, "class_weights": "balanced", "patience": 5, "batch_size": 256, "epochs": 1}
    sizes = []
    add = ClassScores.add
    monkeypatch.setattr(
        ClassScores, "add", lambda self, outputs, y: (sizes.append(outputs.size), add(self, outputs, y))[1]
    )
    run = ep3stream.fit(
        tmp_path / "s.zarr", tmp_path / "run", settings(solver=values, data={"validate": "test"})
    )
    assert ep3stream.evaluate(run, tmp_path / "s.zarr")["accuracy"] > 20 / C
    assert 0 < max(sizes) <= 1 << 22 < 5000 * C


def test_the_residual_of_a_thousand_classes_is_formed_without_one_hot_rows(monkeypatch):
    targets = TargetCode(True, torch.full((C,), 1 / C), torch.ones(C), torch.ones(C))
    prediction, y = torch.zeros(C, 8), torch.arange(8)
    monkeypatch.setattr(torch.nn.functional, "one_hot", None)
    targets.subtract_(prediction, y)
    targets.weigh_(prediction, y)
    assert prediction.sum(0).allclose(torch.zeros(8), atol=1e-5)
