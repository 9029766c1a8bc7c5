"""Fits with kernels on columns: weights learnt in the set-up, by every way in, saved, resumed, exported and refused."""

from __future__ import annotations

import logging
import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv
from small_stores import plain_config

import ep3stream
from ep3stream import ConvertConfig, FitConfig, KernelModel
from ep3stream.errors import ConfigError, DamagedDataError
from ep3stream.estimator import KernelClassifier, KernelRegressor
from ep3stream.inspection.describe import describe_path
from ep3stream.mesh import Mesh
from ep3stream.prediction.predict import predict_tables
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.solver import column_weights
from ep3stream.solver.columns import COLUMN_KERNELS
from ep3stream.solver.export import exported_program
from ep3stream.training.set_up import set_up_split

pytestmark = pytest.mark.usefixtures("quick_columns")

SHOPS = ("north", "south", "east", "west")
EFFECTS = {"north": 2.0, "south": -2.0, "east": 0.5, "west": 0.0}


def table(n: int, seed: int = 0) -> pa.Table:
    """Two columns that matter, a number and a category, and three that do not."""
    random = np.random.default_rng(seed)
    shop, day = random.choice(SHOPS, n), random.choice(["mon", "tue", "wed"], n)
    size, noise, other = random.normal(size=(3, n))
    y = np.sin(3 * size) + np.vectorize(EFFECTS.get)(shop) + 0.1 * random.normal(size=n)
    label = np.where(y > 0, "up", "down")
    columns = {"size": size, "noise": noise, "other": other, "shop": shop, "day": day, "y": y, "label": label}
    return pa.table(columns)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    rows = table(3000)
    found = {}
    for task, target, other in (("regression", "y", "label"), ("classification", "label", "y")):
        pq.write_table(rows.drop([other]), folder / f"{task}.parquet")
        config = ConvertConfig(target=target, categories="codes", splits={"train": 0.8, "test": 0.2})
        found[task] = folder / f"{task}.zarr"
        ep3stream.convert(folder / f"{task}.parquet", found[task], config)
    return found


@pytest.fixture(scope="module")
def fitted(stores, tmp_path_factory) -> Path:
    """A fit with the product kernel that all tests may copy."""
    return ep3stream.fit(stores["regression"], tmp_path_factory.mktemp("runs") / "run", settings(epochs=1))


def settings(kernel: str = "product", **solver) -> FitConfig:
    return plain_config(kernel={"name": kernel}, solver={"centers": 200, "epochs": 2} | solver)


def model_bytes(run: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted((run / "model").iterdir())}


@pytest.mark.parametrize("task", ["regression", "classification"])
@pytest.mark.parametrize("kernel", COLUMN_KERNELS)
def test_the_columns_that_matter_are_found_and_told(stores, tmp_path, kernel, task):
    run = ep3stream.fit(stores[task], tmp_path / "run", settings(kernel))
    told = ep3stream.inspect(run)["column_weights"]
    names = [column["name"] for column in told["columns"]]
    assert set(names[:2]) == {"size", "shop"}
    importance = [column["importance"] for column in told["columns"]]
    assert importance == sorted(importance, reverse=True)
    assert min(importance[:2]) > 0.1
    assert max(importance[2:]) < 0.05
    scores = ep3stream.evaluate(run, stores[task])
    assert scores.get("r2", scores.get("accuracy")) > 0.9


@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
def test_every_projection_takes_kernels_on_columns(stores, tmp_path, projection):
    config = settings("anova", projection=projection, epochs=4)
    run = ep3stream.fit(stores["regression"], tmp_path / "run", config)
    # The published method is far from done after so few steps.
    assert ep3stream.evaluate(run, stores["regression"])["r2"] > (0 if projection == "eigenpro" else 0.8)


def test_a_saved_model_predicts_the_same_rows_of_a_table_by_name(stores, fitted, tmp_path):
    run = fitted
    rows = table(50, seed=1)
    with ep3stream.open_store(stores["regression"]) as store:
        assert store.manifest.feature_names == ("size", "noise", "other", "shop", "day")
    pq.write_table(rows.drop(["y", "label"]), tmp_path / "new.parquet")
    predict_tables(run, tmp_path / "new.parquet", tmp_path / "out.csv")
    found = csv.read_csv(tmp_path / "out.csv").column("y").to_numpy()
    expected = rows.column("y").to_numpy()
    assert np.corrcoef(found, expected)[0, 1] > 0.95


def test_an_unseen_category_is_predicted_as_one_that_differs_from_all(fitted):
    model = ep3stream.load(fitted)
    rows = np.zeros((2, 5), np.float32)
    rows[:, 3] = (-1, 99)
    one, other = model.predict(rows)
    assert one == pytest.approx(other)
    assert np.isfinite(one)


@pytest.mark.parametrize("kernel", COLUMN_KERNELS)
def test_an_exported_program_is_the_model(stores, tmp_path, kernel):
    run = ep3stream.fit(stores["regression"], tmp_path / "run", settings(kernel))
    with ep3stream.open_store(stores["regression"]) as store:
        x, _ = store.split("test").read_rows(np.arange(100))
    model = ep3stream.load(run)
    found = exported_program(model).module()(torch.from_numpy(x))
    expected = model.decision_function(x)
    np.testing.assert_allclose(found.numpy(), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize("task", ["regression", "classification"])
def test_every_way_in_ends_with_the_same_bytes(stores, tmp_path, task):
    run = ep3stream.fit(stores[task], tmp_path / "run", settings(nystrom_samples=300))
    expected = ep3stream.load(run)
    with ep3stream.open_store(stores[task]) as store:
        split = store.split("train")
        kind = KernelRegressor if task == "regression" else KernelClassifier
        settled = {"n_centers": 200, "epochs": 2, "nystrom_samples": 300, "validation_fraction": 0}
        estimator = kind("product", **settled, random_state=0)
        found = estimator.fit(split).model_
        assert torch.equal(found.kernel.metric, expected.kernel.metric)
        assert torch.equal(found.weights, expected.weights)


def test_a_kernel_model_on_a_split_learns_the_weights_of_a_fit(stores, tmp_path):
    with ep3stream.open_store(stores["regression"]) as store:
        split = store.split("train")
        centers = split.read_rows(np.arange(100))[0].astype(np.float32)
        np.save(tmp_path / "centers.npy", centers)
        config = settings(centers=str(tmp_path / "centers.npy"), nystrom_samples=300, model_rank=20)
        config = config.with_settings({"data": {"scale": "none"}}, "test")
        run = ep3stream.fit(stores["regression"], tmp_path / "run", config)
        model = KernelModel(centers, "product", nystrom_samples=300, model_rank=20)
        model.fit(split, epochs=2)
    np.testing.assert_allclose(model.predictor().weights, ep3stream.load(run).weights, rtol=1e-2, atol=1e-3)
    assert torch.equal(model.predictor().kernel.metric, ep3stream.load(run).kernel.metric)


def test_a_loader_learns_from_the_rows_held_back_and_its_state_keeps_the_weights(caplog):
    random = np.random.default_rng(0)
    x = random.normal(size=(3000, 3)).astype(np.float32)
    y = np.sin(2 * x[:, 0]).astype(np.float32)

    def new() -> KernelModel:
        return KernelModel(x[:100], "product", nystrom_samples=300, seed=1)

    model = new()
    for start in range(100, 2500, 200):
        model.fit_batch(x[start : start + 200], y[start : start + 200])
    kernel = model.predictor().kernel
    assert int(kernel.weights.argmax()) == 0
    assert float(kernel.weights[0]) > 3 * float(kernel.weights[1:].max())
    again = new()
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.predictor().kernel.metric, kernel.metric)
    for each in (model, again):
        each.fit_batch(x[2500:], y[2500:])
    assert torch.equal(again.predictor().weights, model.predictor().weights)
    assert "too few" not in caplog.text


def test_a_state_keeps_the_ridge_that_came_with_the_weights():
    random = np.random.default_rng(0)
    x = random.normal(size=(3000, 3)).astype(np.float32)
    y = (np.sin(2 * x[:, 0]) + random.normal(size=3000)).astype(np.float32)
    first, again = (KernelModel(x[:100], "product", nystrom_samples=300, seed=1) for _ in range(2))
    first.fit((x, y))
    state = first.state_dict()
    assert state["ridge"] > 1e-5
    again.load_state_dict(state)
    for each in (first, again):
        each.fit_batch(x[2500:], y[2500:])
    assert torch.equal(again.predictor().weights, first.predictor().weights)


def test_with_too_few_rows_all_columns_weigh_the_same_and_a_warning_says_so(caplog):
    x = np.random.default_rng(0).normal(size=(60, 4)).astype(np.float32)
    with caplog.at_level(logging.WARNING):
        model = KernelModel(x[:10], "anova", nystrom_samples=20)
        model.fit((x, x[:, 0]))
    assert torch.equal(model.predictor().kernel.weights, torch.full((4,), 0.25))
    assert "only 60 rows to learn the weights of the anova kernel from" in caplog.text


def test_a_fit_that_was_stopped_ends_with_the_same_bytes(stores, tmp_path):
    whole = ep3stream.fit(stores["regression"], tmp_path / "whole", settings(batch_size=100))
    config = settings(batch_size=100, epochs=1)
    run = ep3stream.fit(stores["regression"], tmp_path / "run", config)
    ep3stream.fit(stores["regression"], run, settings(batch_size=100))
    assert model_bytes(run) == model_bytes(whole)


@pytest.mark.parametrize("precision", ["tf32", "bfloat16"])
def test_other_precisions_are_refused(stores, tmp_path, precision):
    with pytest.raises(ConfigError, match="the kernel 'product' is evaluated in float32"):
        ep3stream.fit(stores["regression"], tmp_path / "run", settings(precision=precision))


@pytest.mark.parametrize(
    "damage",
    [
        lambda metric: metric[:, :-1].contiguous(),
        lambda metric: metric[:2].contiguous(),
        lambda metric: metric.double(),
        lambda metric: torch.full_like(metric, torch.nan),
        lambda metric: -metric,
    ],
)
@pytest.mark.parametrize("part", ["model", "setup"])
def test_a_metric_that_cannot_be_is_damage(stores, fitted, tmp_path, damage, part):
    run = shutil.copytree(fitted, tmp_path / "run")
    path, kind = (run / "model", "model") if part == "model" else (run / "setup", "set-up")
    bundle = read_bundle(path, kind)
    tensors = dict(bundle.tensors) | {"kernel_metric": damage(bundle.tensors["kernel_metric"])}
    write_bundle(path, kind, tensors, bundle.description)
    again = (
        (lambda: ep3stream.load(run))
        if part == "model"
        else (lambda: ep3stream.fit(stores["regression"], run, settings(epochs=2)))
    )
    with pytest.raises(DamagedDataError):
        again()


def test_plan_counts_the_learning_and_does_not_learn(stores, monkeypatch):
    def never(*_):
        raise AssertionError("the pilot learnt")

    monkeypatch.setattr(column_weights, "gradients_of", never)
    seconds = {
        kernel: ep3stream.plan(stores["regression"], settings(kernel)).expected.setup_s
        for kernel in ("laplacian", "product")
    }
    assert seconds["product"] > seconds["laplacian"]


def test_sharpness_multiplies_the_weights_that_are_learnt(stores):
    split = ep3stream.open_store(stores["regression"]).split("train")
    config = settings("product")
    sharper = replace(config, kernel=replace(config.kernel, sharpness=2.0))
    plain, sharp = (
        set_up_split(split, each, None, Mesh(0, 1, torch.device("cpu"))).setup.tensors["kernel_metric"]
        for each in (config, sharper)
    )
    torch.testing.assert_close(sharp[0], 2 * plain[0])
    torch.testing.assert_close(sharp[1:], plain[1:])


def test_inspect_tells_what_matters(fitted):
    lines = describe_path(fitted).splitlines()
    at = lines.index("what matters")
    assert {lines[at + 1].split()[0], lines[at + 2].split()[0]} == {"size", "shop"}


def test_centers_of_clusters_have_codes(stores, tmp_path):
    run = ep3stream.fit(stores["regression"], tmp_path / "run", settings(centers="kmeans:50"))
    centers = ep3stream.load(run).centers
    assert set(centers[:, 3].unique().tolist()) == {0, 1, 2, 3}
    assert set(centers[:, 4].unique().tolist()) <= {0, 1, 2}
    assert ep3stream.evaluate(run, stores["regression"])["r2"] > 0.8


@pytest.mark.parametrize("categories", ["onehot", "codes"])
def test_one_hot_features_are_told_of(tmp_path, caplog, categories):
    pq.write_table(table(600).drop(["label"]), tmp_path / "rows.parquet")
    config = ConvertConfig(target="y", categories=categories)
    ep3stream.convert(tmp_path / "rows.parquet", tmp_path / "rows.zarr", config)
    ep3stream.fit(tmp_path / "rows.zarr", tmp_path / "run", settings(centers=50))
    assert ("convert with --categories codes" in caplog.text) == (categories == "onehot")


@pytest.mark.slow
def test_two_ranks_take_over_what_the_leader_has_learnt(stores, tmp_path, monkeypatch):
    monkeypatch.setenv("OMP_NUM_THREADS", "1")
    found = []
    for devices in (1, 2):
        run = ep3stream.fit(
            stores["regression"], tmp_path / str(devices), settings(batch_size=100), devices=devices
        )
        found.append(ep3stream.load(run))
    one, two = found
    # The processes of two ranks know nothing of this module's small problems.
    assert torch.equal(one.kernel.is_category, two.kernel.is_category)
    assert int(two.kernel.weights.argmax()) in (0, 3)
    assert ep3stream.evaluate(tmp_path / "2", stores["regression"])["r2"] > 0.9


def test_the_ridge_comes_with_the_weights_unless_it_is_given(stores, tmp_path):
    asked = {None: settings(), 0.0: settings(ridge=0.0), 0.5: settings(ridge=0.5)}
    runs = {
        ridge: ep3stream.fit(stores["regression"], tmp_path / str(ridge), one) for ridge, one in asked.items()
    }
    found = {ridge: ep3stream.inspect(run)["plan"]["ridge"] for ridge, run in runs.items()}
    assert found[None] > 0
    assert (found[0.0], found[0.5]) == (0, 0.5)
    assert model_bytes(runs[None]) != model_bytes(runs[0.0])
    distances = ep3stream.fit(stores["regression"], tmp_path / "distances", settings("laplacian"))
    assert ep3stream.inspect(distances)["plan"]["ridge"] == 0
