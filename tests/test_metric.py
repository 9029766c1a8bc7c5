"""Fits that learn a metric first: what it finds, that a killed one goes on, and which round is taken."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from small_stores import plain_config
from test_fit import Stop, model_bytes

import ep3stream
from ep3stream import FitConfig
from ep3stream.errors import ConfigError
from ep3stream.mesh import Mesh
from ep3stream.planning.forecast import describe_plan
from ep3stream.run.bundle import write_bundle
from ep3stream.run.directory import RunDirectory
from ep3stream.store.reader import open_store
from ep3stream.training import metric
from ep3stream.training.metric import learn_metric

D = 12


@pytest.fixture(scope="module")
def store(tmp_path_factory) -> Path:
    """y depends on the first two columns, and on their sum most of all."""
    path = tmp_path_factory.mktemp("stores") / "rows.zarr"
    x = np.random.default_rng(0).standard_normal((2500, D)).astype(np.float32)
    y = np.sin(1.5 * (x[:, 0] + x[:, 1])) + 0.3 * x[:, 1]
    config = ep3stream.ConvertConfig(splits={"train": 0.8, "test": 0.2}, segment_bytes=1 << 14)
    ep3stream.convert((x, y), path, config)
    return path


def settings(kind: str, **changes: dict) -> FitConfig:
    given = {
        "data": {"metric": kind, "metric_rounds": 2, "validate": "auto"},
        "solver": {"centers": 150, "model_rank": 40, "batch_size": 32, "epochs": 2},
        "run": {"checkpoint_steps": 7},
    }
    return plain_config(**given).with_settings(changes, "test")


@pytest.fixture(scope="module")
def run(store, tmp_path_factory) -> Path:
    return ep3stream.fit(store, tmp_path_factory.mktemp("runs") / "run", settings("diagonal"))


def test_a_diagonal_metric_finds_the_columns_that_matter(store, run, tmp_path):
    told = ep3stream.inspect(run)["metric"]
    assert [column["name"] for column in told["columns"][:2]] in (["x1", "x0"], ["x0", "x1"])
    assert sum(column["importance"] for column in told["columns"][:2]) > 0.8
    assert told["round"] == len(told["errors"]) - 1 == 2
    directions = ep3stream.load(run).inputs.directions
    assert directions.shape == (D,)
    assert float(directions[:2].min()) > 2 * float(directions[2:].max())
    assert not any((run / "rounds" / "round-0" / each).exists() for each in ("setup", "checkpoints", "model"))
    none = ep3stream.fit(store, tmp_path / "none", settings("none"))
    r2, plain = (ep3stream.evaluate(each, store)["r2"] for each in (run, none))
    assert 1 - r2 < 0.5 * (1 - plain)


@pytest.mark.parametrize(("rank", "width"), [("full", D), (2, 2)])
def test_a_full_metric_finds_the_direction_that_matters(store, tmp_path, rank, width):
    run = ep3stream.fit(store, tmp_path / "run", settings("full", data={"inputs_rank": rank}))
    model = ep3stream.load(run)
    assert model.inputs.directions.shape == (D, D)
    assert (model.inputs.leading is None) == (rank == "full")
    first = model.inputs.directions[:, 0]
    if model.inputs.leading is not None:
        assert model.inputs.leading.basis.shape == (D, width)
        first = model.inputs.directions @ model.inputs.leading.basis[:, 0]
    along = torch.zeros(D).index_fill(0, torch.tensor([0, 1]), 0.5**0.5)
    assert abs(float(first @ along) / float(first.norm())) > 0.9
    assert ep3stream.evaluate(run, store)["r2"] > 0.9


class Killer:
    """Raises at the given call of an observer, counted over all rounds."""

    def __init__(self, at: int) -> None:
        self.left = at

    def __call__(self, progress: object) -> None:
        self.left -= 1
        if not self.left:
            raise Stop


def test_killed_in_any_round_or_after_them_it_ends_with_the_same_bytes(store, run, tmp_path):
    for at in (3, 9, 9, 9):
        with pytest.raises(Stop):
            ep3stream.fit(store, tmp_path / "run", settings("diagonal"), observe=Killer(at))
    assert (tmp_path / "run" / "rounds" / "round-2").is_dir()
    ep3stream.fit(store, tmp_path / "run", settings("diagonal"))
    assert model_bytes(tmp_path / "run") == model_bytes(run)


def test_rounds_of_other_settings_are_made_again(store, run, tmp_path):
    other = settings("diagonal", run={"seed": 1})
    with pytest.raises(Stop):
        ep3stream.fit(store, tmp_path / "run", other, observe=Killer(9))
    assert (tmp_path / "run" / "rounds" / "round-0" / "metric").is_dir()
    ep3stream.fit(store, tmp_path / "run", settings("diagonal"))
    assert model_bytes(tmp_path / "run") == model_bytes(run)


@pytest.mark.slow
def test_two_ranks_learn_the_metric_of_one(store, run, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    ranks = ep3stream.fit(store, tmp_path / "run", settings("diagonal"), devices=2)
    mine, theirs = (ep3stream.load(each).inputs.directions for each in (run, ranks))
    torch.testing.assert_close(mine, theirs, rtol=1e-2, atol=1e-3)


@pytest.mark.parametrize(
    ("errors", "best", "n_rounds"),
    [([3, 2, 1], 2, 3), ([3, 2, 2.5], 1, 3), ([1, 2, 0.5], 0, 2), ([None, 1, 2], 1, 3)],
)
def test_the_best_round_is_taken_and_the_first_that_is_no_better_is_the_last(
    store, tmp_path, errors, best, n_rounds
):
    directory, made = RunDirectory(tmp_path), []
    with open_store(store) as opened:
        reader = opened.split("train")

        def fit_round(place, config, learnt):
            raise AssertionError("all rounds are finished")

        for number, error in enumerate(errors):
            told = {"error": error, "shares": [number] * D, "store_fingerprint": reader.manifest.fingerprint}
            made.append(torch.full((D,), float(number)))
            place = directory.rounds / f"round-{number}" / "metric"
            write_bundle(place, "round of a metric", {"directions": made[-1]}, told)
        found = learn_metric(
            directory, reader, settings("diagonal"), fit_round, Mesh(0, 1, torch.device("cpu"))
        )
    assert found.told["round"] == best
    assert len(found.told["errors"]) == n_rounds
    assert found.told["columns"][0]["importance"] == best
    if best:
        assert torch.equal(found.directions, made[best - 1])
    else:
        assert found.directions is None


def test_a_metric_asks_for_distances_and_for_rows_to_validate_on(store, tmp_path):
    product = settings("full", kernel={"name": "product"})
    with pytest.raises(ConfigError, match="metric is 'full', but the product kernel takes no distances"):
        ep3stream.fit(store, tmp_path / "product", product)
    with pytest.raises(ConfigError, match="metric is 'full', but the callable kernel takes no distances"):
        ep3stream.fit(
            store, tmp_path / "own", settings("full"), kernel=lambda z, x: torch.exp(-torch.cdist(z, x))
        )
    with pytest.raises(ConfigError, match="no rows are validated"):
        ep3stream.fit(store, tmp_path / "none", settings("diagonal", data={"validate": "none"}))
    assert not list(tmp_path.iterdir())


def test_a_kernel_that_is_left_open_takes_distances_where_a_metric_is_asked_for(store, tmp_path):
    config = settings("diagonal", kernel={"name": "auto"}, data={"metric_rounds": 1})
    run = ep3stream.fit(store, tmp_path / "run", config)
    assert ep3stream.inspect(run)["plan"]["kernel"] == "laplacian"
    assert ep3stream.inspect(run / "rounds" / "round-0")["plan"]["kernel"] == "laplacian"
    assert len(ep3stream.inspect(run)["metric"]["errors"]) == 2


def test_a_full_metric_of_too_many_inputs_is_refused_before_anything_is_fitted(store, tmp_path, monkeypatch):
    monkeypatch.setattr(metric, "_MOST_INPUTS", D - 1)
    with pytest.raises(ConfigError, match="metric is 'full', but there are 12 inputs, more than 11"):
        ep3stream.fit(store, tmp_path / "run", settings("full"))


def test_plan_counts_the_rounds(store):
    plain, learnt = (ep3stream.plan(store, settings(kind)) for kind in ("none", "diagonal"))
    assert plain.expected.metric_s == 0 < learnt.expected.metric_s
    # Three rounds of one epoch, and the fit itself of two.
    assert learnt.evaluations == pytest.approx(2.5 * plain.evaluations, rel=0.05)
    assert "of learning the metric" in describe_plan(learnt)
    with pytest.raises(ConfigError, match="takes no distances"):
        ep3stream.plan(store, settings("full", kernel={"name": "product"}))
