"""Fits to stores whose categories are codes, by kernels that know numbers alone: codes become 0/1 features."""

from __future__ import annotations

import shutil
from dataclasses import replace
from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from pyarrow import csv
from small_stores import plain_config

import ep3stream
from ep3stream import ConvertConfig, FitConfig, KernelConfig, KernelModel, RunConfig, SolverConfig
from ep3stream.errors import ConfigError, DamagedDataError, InputError
from ep3stream.estimator import KernelRegressor
from ep3stream.online.online_trainer import OnlineTrainer
from ep3stream.prediction.predict import predict_tables
from ep3stream.run.bundle import read_bundle, write_bundle
from ep3stream.solver.export import exported_program
from ep3stream.training import measured_sizes
from ep3stream.training.problem import shape_of

pytestmark = pytest.mark.usefixtures("quick_columns")

SHOPS = ("north", "south", "east", "west")
EFFECTS = {"north": 2.0, "south": -2.0, "east": 0.5, "west": 0.0}
WIDTH = 2 + 4 + 3


def table(n: int, seed: int = 0) -> pa.Table:
    random = np.random.default_rng(seed)
    shop, day = random.choice(SHOPS, n), random.choice(["mon", "tue", "wed"], n)
    size, noise = random.normal(size=(2, n))
    y = np.sin(2 * size) + np.vectorize(EFFECTS.get)(shop) + 0.1 * random.normal(size=n)
    return pa.table({"size": size, "shop": shop, "noise": noise, "day": day, "y": y})


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    """The same rows with categories in both ways, each split in one segment, so that the same rows are drawn."""
    folder, found = tmp_path_factory.mktemp("stores"), {}
    pq.write_table(table(2000), folder / "rows.parquet")
    for categories in ("codes", "onehot"):
        config = ConvertConfig(target="y", categories=categories, splits={"train": 0.8, "test": 0.2})
        found[categories] = folder / f"{categories}.zarr"
        ep3stream.convert(folder / "rows.parquet", found[categories], config)
    return found


@pytest.fixture(scope="module")
def fitted(stores, tmp_path_factory) -> Path:
    return ep3stream.fit(stores["codes"], tmp_path_factory.mktemp("runs") / "run", settings(epochs=1))


def settings(kernel: str = "laplacian", scale: str = "standard", **solver) -> FitConfig:
    given = {
        "kernel": {"name": kernel},
        "data": {"scale": scale, "validate": "none"},
        "solver": {"centers": 150, "epochs": 2} | solver,
    }
    return plain_config(**given)


def rows_of(store: Path, split: str = "test") -> np.ndarray:
    with ep3stream.open_store(store) as opened:
        reader = opened.split(split)
        return reader.read_rows(np.arange(reader.info.n_rows))[0]


def model_bytes(run: Path) -> dict[str, bytes]:
    return {item.name: item.read_bytes() for item in sorted((run / "model").iterdir())}


@pytest.mark.parametrize("kernel", ["laplacian", "gaussian", "polynomial", "ntk_relu", "callable"])
def test_codes_are_to_a_kernel_what_one_hot_features_are(stores, tmp_path, kernel):
    found = {}
    own = (lambda z, x: torch.exp(-torch.cdist(z, x, p=1) / 4)) if kernel == "callable" else None
    for name, store in stores.items():
        config = settings("laplacian" if own else kernel, scale="none", epochs=1)
        run = ep3stream.fit(store, tmp_path / name, config, kernel=own)
        found[name] = ep3stream.load(run, kernel=own)
    predictions = [found[name].predict(rows_of(stores[name])) for name in found]
    assert found["codes"].centers.shape[1] == 4
    assert np.std(predictions[0]) > 0.5
    np.testing.assert_allclose(*predictions, rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
def test_every_projection_takes_codes(stores, tmp_path, projection):
    config = settings(projection=projection, epochs=4)
    run = ep3stream.fit(stores["codes"], tmp_path / "run", config)
    assert ep3stream.evaluate(run, stores["codes"])["r2"] > (0.5 if projection == "eigenpro" else 0.9)


def test_the_model_holds_codes_and_predicts_tables_frames_and_stores_alike(stores, fitted, tmp_path):
    model, rows = ep3stream.load(fitted), table(300, seed=1)
    assert model.centers.shape == (150, 4)
    assert model.inputs.n_codes == (0, 4, 0, 3)
    pq.write_table(rows.drop(["y"]), tmp_path / "new.parquet")
    predict_tables(fitted, tmp_path / "new.parquet", tmp_path / "out.csv")
    by_table = csv.read_csv(tmp_path / "out.csv").column("y").to_numpy()
    by_frame = model.predict(rows.drop(["y"]).to_pandas())
    config = ConvertConfig(like=stores["codes"])
    ep3stream.convert(rows, tmp_path / "new.zarr", config)
    ep3stream.predict(fitted, tmp_path / "new.zarr", tmp_path / "out.npy")
    np.testing.assert_allclose(by_frame, by_table, rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.load(tmp_path / "out.npy"), by_table, rtol=1e-4, atol=1e-4)
    assert np.corrcoef(by_table, rows.column("y").to_numpy())[0, 1] > 0.95


def test_an_unknown_category_has_none_of_the_features(fitted):
    rows = np.tile(np.float32([0.5, -1, 0, 1]), (3, 1))
    rows[:, 1] = (-1, 4, 99)
    found = ep3stream.load(fitted).predict(rows)
    assert np.isfinite(found).all()
    np.testing.assert_array_equal(found, found[0])
    rows[0, 1] = 0
    assert abs(ep3stream.load(fitted).predict(rows)[0] - found[1]) > 0.1


@pytest.mark.parametrize("value", [np.nan, np.inf])
def test_a_code_that_is_not_finite_is_refused(fitted, value):
    rows = np.zeros((1, 4), np.float32)
    rows[0, 1] = value
    with pytest.raises(InputError, match="not finite"):
        ep3stream.load(fitted).predict(rows)


def test_an_exported_program_makes_the_features_itself(stores, fitted, tmp_path):
    model, x = ep3stream.load(fitted), rows_of(stores["codes"])
    x[0, 1], x[1, 3] = -1, 17
    found = exported_program(model).module()(torch.from_numpy(x))
    np.testing.assert_allclose(found.numpy(), model.decision_function(x), rtol=1e-4, atol=1e-4)
    ep3stream.export(fitted, tmp_path / "out")
    import json

    described = json.loads((tmp_path / "out" / "model.json").read_text())
    assert described["format_version"] == 3
    assert described["inputs"] == {
        "version": 1,
        "codes": [{"feature": 1, "n_codes": 4}, {"feature": 3, "n_codes": 3}],
    }


def test_a_fit_that_was_stopped_ends_with_the_same_bytes(stores, tmp_path):
    whole = ep3stream.fit(stores["codes"], tmp_path / "whole", settings(batch_size=100))
    run = ep3stream.fit(stores["codes"], tmp_path / "run", settings(batch_size=100, epochs=1))
    ep3stream.fit(stores["codes"], run, settings(batch_size=100))
    assert model_bytes(run) == model_bytes(whole)


@pytest.mark.parametrize("kernel", ["laplacian", "product"])
@pytest.mark.parametrize("value", [0.5, 4.0, -2.0])
def test_given_centers_that_are_no_codes_are_refused(stores, tmp_path, kernel, value):
    centers = rows_of(stores["codes"])[:50]
    centers[7, 1] = value
    np.save(tmp_path / "centers.npy", centers)
    config = settings(kernel, centers=str(tmp_path / "centers.npy"))
    with pytest.raises(ConfigError, match=r"for 'shop', a category .* from 0 to 3, or -1"):
        ep3stream.fit(stores["codes"], tmp_path / "run", config)


def test_centers_of_clusters_are_typical_rows(stores, tmp_path):
    run = ep3stream.fit(stores["codes"], tmp_path / "run", settings(centers="kmeans:60", epochs=4))
    centers = ep3stream.load(run).centers
    assert set(centers[:, 1].unique().tolist()) == {0, 1, 2, 3}
    assert set(centers[:, 3].unique().tolist()) == {0, 1, 2}
    assert ep3stream.evaluate(run, stores["codes"])["r2"] > 0.9


def other_store(tmp_path: Path) -> Path:
    """The same columns with one shop more, so that codes mean something else."""
    rows = table(400)
    shops = ["before all", *rows.column("shop").to_pylist()[1:]]
    ep3stream.convert(
        rows.set_column(1, "shop", pa.array(shops)),
        tmp_path / "other.zarr",
        ConvertConfig(target="y", categories="codes"),
    )
    return tmp_path / "other.zarr"


def test_codes_of_other_categories_are_no_rows_and_no_centers_of_the_model(stores, fitted, tmp_path):
    other = other_store(tmp_path)
    with pytest.raises(InputError, match="other categories of 'shop'"):
        ep3stream.evaluate(fitted, other)
    with pytest.raises(ConfigError, match="whose categories are not those of"):
        ep3stream.fit(stores["codes"], tmp_path / "run", settings(centers=str(other / "train")))


def test_a_kernel_model_on_a_split_ends_with_the_bytes_of_a_fit(stores, tmp_path):
    with ep3stream.open_store(stores["codes"]) as store:
        split = store.split("train")
        centers = split.read_rows(np.arange(100))[0].astype(np.float32)
        np.save(tmp_path / "centers.npy", centers)
        sizes = {"nystrom_samples": 300, "model_rank": 20}
        config = settings(scale="none", centers=str(tmp_path / "centers.npy"), **sizes)
        run = ep3stream.fit(stores["codes"], tmp_path / "run", config)
        model = KernelModel(centers, **sizes)
        model.fit(split, epochs=2)
    assert torch.equal(model.predictor().weights, ep3stream.load(run).weights)
    again = KernelModel(centers, **sizes)
    again.load_state_dict(model.state_dict())
    assert torch.equal(again.predict(rows_of(stores["codes"])), model.predict(rows_of(stores["codes"])))


def test_a_kernel_model_is_told_which_features_are_codes(stores, tmp_path):
    with ep3stream.open_store(stores["codes"]) as store:
        x, y = store.split("train").read_rows(np.arange(1500))
    plain, coded = (KernelModel(x[:100], categories=codes, seed=1) for codes in (None, {1: 4, 3: 3}))
    for model in (plain, coded):
        model.fit((x, y), epochs=2)
    assert coded.predictor().kernel.centre.numel() == WIDTH
    assert plain.predictor().kernel.centre.numel() == 4
    assert coded.score(x, y)["r2"] > plain.score(x, y)["r2"]
    by_loader = KernelModel(x[:100], categories={1: 4, 3: 3}, seed=1)
    by_loader.fit([(x[i : i + 250], y[i : i + 250]) for i in range(0, 1500, 250)], epochs=2)
    assert by_loader.score(x, y)["r2"] > plain.score(x, y)["r2"]
    with pytest.raises(ConfigError, match="features from 0 to 3"):
        KernelModel(x[:100], categories={4: 2})


@pytest.mark.parametrize("is_validated", [False, True], ids=["all rows", "validated"])
@pytest.mark.parametrize("kernel", ["laplacian", "product"])
def test_an_estimator_on_a_split_ends_with_the_bytes_of_a_fit(stores, tmp_path, kernel, is_validated):
    config = settings(kernel, scale="auto", nystrom_samples=300)
    config = replace(config, data=replace(config.data, validate="auto" if is_validated else "none"))
    run = ep3stream.fit(stores["codes"], tmp_path / "run", config)
    with ep3stream.open_store(stores["codes"]) as store:
        estimator = KernelRegressor(
            kernel,
            n_centers=150,
            epochs=2,
            random_state=0,
            nystrom_samples=300,
            validation_fraction=0.1 if is_validated else 0,
        )
        estimator.fit(store.split("train"))
    assert torch.equal(estimator.model_.weights, ep3stream.load(run).weights)
    estimator.save(tmp_path / "saved")
    again = KernelRegressor.load(tmp_path / "saved")
    np.testing.assert_array_equal(again.predict(stores["codes"]), estimator.predict(stores["codes"]))
    again.partial_fit(stores["codes"])


@pytest.mark.parametrize("kernel", ["laplacian", "auto"])
@pytest.mark.parametrize("epochs", ["auto", 2])
def test_an_estimator_with_minutes_takes_the_sizes_of_a_fit(stores, tmp_path, kernel, epochs):
    """Of so few rows the minutes allow more than the rows do, so that no clock decides."""
    solver = SolverConfig(epochs=epochs, nystrom_samples=300)
    config = FitConfig(kernel=KernelConfig(name=kernel), solver=solver, run=RunConfig(minutes=10))
    run = ep3stream.fit(stores["codes"], tmp_path / "run", config)
    with ep3stream.open_store(stores["codes"]) as store:
        n_rows = store.split("train").info.n_rows
        estimator = KernelRegressor(kernel, epochs=epochs, minutes=10, nystrom_samples=300, random_state=0)
        estimator.fit(store.split("train"))
    fitted = ep3stream.load(run)
    assert n_rows // 10 < len(fitted.centers) < n_rows // 4
    assert torch.equal(estimator.model_.weights, fitted.weights)
    if epochs == 2:
        assert len(estimator.losses_) == 2
    else:
        assert len(estimator.losses_) > 2


def test_an_estimator_whose_minutes_are_short_sees_a_part_of_the_rows(stores, monkeypatch):
    seen = []
    train = OnlineTrainer.after_watch
    monkeypatch.setattr(
        OnlineTrainer, "after_watch", lambda *given: (seen.append(sum(given[2])), train(*given))
    )
    for epochs in (0.25, 1):
        monkeypatch.setattr(measured_sizes, "with_sizes", sized(centers=100, epochs=epochs, patience=3))
        with ep3stream.open_store(stores["codes"]) as store:
            KernelRegressor("laplacian", minutes=1, random_state=0).fit(store.split("train"))
        seen.append(0)
    part, whole = (sum(seen[: seen.index(0)]), sum(seen[seen.index(0) :]))
    assert 0 < part < 0.4 * whole


def sized(**sizes):
    """What settles the sizes of a fit, whatever there is time for."""
    return lambda config, *_: config.settled(sizes)


@pytest.mark.parametrize("part", ["model", "setup"])
@pytest.mark.parametrize(
    "inputs",
    [
        {"version": 1, "codes": [{"feature": 1, "n_codes": 5}, {"feature": 3, "n_codes": 3}]},
        {"version": 1, "codes": [{"feature": 9, "n_codes": 4}]},
        {"version": 2, "codes": []},
        {},
    ],
)
def test_inputs_that_cannot_be_are_damage(stores, fitted, tmp_path, part, inputs):
    run = shutil.copytree(fitted, tmp_path / "run")
    path, kind = (run / "model", "model") if part == "model" else (run / "setup", "set-up")
    bundle = read_bundle(path, kind)
    write_bundle(path, kind, bundle.tensors, bundle.description | {"inputs": inputs})
    again = (
        (lambda: ep3stream.load(run))
        if part == "model"
        else (lambda: ep3stream.fit(stores["codes"], run, settings()))
    )
    with pytest.raises(DamagedDataError):
        again()


def test_the_plan_counts_the_features_of_points_for_centers_and_the_codes_for_rows(stores):
    codes, features = (ep3stream.plan(store, settings(), measure=False) for store in stores.values())
    with ep3stream.open_store(stores["codes"]) as store:
        assert shape_of(store.split("train"), settings()).n_inputs == WIDTH
        assert shape_of(store.split("train"), settings("product")).n_inputs == 4
    assert codes.flops == features.flops
    assert codes.sizes.row_bytes < features.sizes.row_bytes
    assert features.memory["centers"] - codes.memory["centers"] == 4 * 150 * (WIDTH - 4)
    ep3stream.plan(stores["codes"], settings())


def test_tune_tries_kernels_of_distances_and_on_columns_on_codes(stores, tmp_path):
    out = tmp_path / "tuned.toml"
    result = ep3stream.tune(
        stores["codes"], settings(), out=out, kernels=["product"], minutes=0.5, n_centers=60
    )
    assert {trial.candidate.kernel.name for trial in result.table} == {"laplacian", "product"}
    # Of four columns two matter, which a kernel of distances cannot know.
    assert result.config.kernel.name == "product"
    run = ep3stream.fit(stores["codes"], tmp_path / "run", result.config)
    assert ep3stream.evaluate(run, stores["codes"])["r2"] > 0.9


def test_a_frame_of_the_stores_features_has_codes(stores, fitted):
    x = rows_of(stores["codes"])
    frame = pd.DataFrame(x, columns=["size", "shop", "noise", "day"])
    shops = sorted(SHOPS)
    named = frame.assign(
        shop=[shops[int(code)] for code in x[:, 1]],
        day=[["mon", "tue", "wed"][int(code)] for code in x[:, 3]],
    )
    model = ep3stream.load(fitted)
    np.testing.assert_allclose(model.predict(named), model.predict(x), rtol=1e-5, atol=1e-5)


def test_kernels_of_a_name_and_a_config_take_codes_alike(stores):
    config = KernelConfig("matern32")
    with ep3stream.open_store(stores["codes"]) as store:
        split = store.split("train")
        found = [
            KernelRegressor(n_centers=50, epochs=1, kernel=kernel, random_state=0).fit(split)
            for kernel in ("matern32", config)
        ]
    assert torch.equal(found[0].model_.weights, found[1].model_.weights)
