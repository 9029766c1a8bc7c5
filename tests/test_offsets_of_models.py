"""A model of a store with offsets takes and gives the user's values, wherever rows come from."""

from __future__ import annotations

import csv
from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray

import ep3stream
from ep3stream import ConvertConfig, DataConfig, FitConfig, KernelConfig, RunConfig, SolverConfig
from ep3stream.errors import DamagedDataError
from ep3stream.prediction.predict import predict_tables
from ep3stream.solver.model import Predictor

N = np.arange(1200)
START, LEVEL = 1_776_000_000, 1.7e9
SIGNAL = np.sin(2 * np.pi * N / 300)


def table() -> pd.DataFrame:
    """Seconds since 1970, a feature without an offset, and a target of a large mean."""
    return pd.DataFrame({"time": START + N, "n": N % 7 / 7, "y": LEVEL + SIGNAL})


def config(store: Path, **solver: Any) -> FitConfig:
    return FitConfig(
        kernel=KernelConfig("gaussian", bandwidth=0.5),
        solver=SolverConfig(**{"centers": 200, "epochs": 10, "nystrom_samples": 300} | solver),
        data=DataConfig(validate="none"),
        run=RunConfig(),
    )


@pytest.fixture(scope="module")
def made(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A directory with a table, its store, and a run."""
    place = tmp_path_factory.mktemp("offsets")
    table().to_csv(place / "rows.csv", index=False)
    settings = ConvertConfig(target="y", splits={"train": 0.8, "test": 0.2})
    ep3stream.convert(place / "rows.csv", place / "rows.zarr", settings)
    ep3stream.fit(place / "rows.zarr", place / "run", config(place / "rows.zarr"))
    return place


def mean_error(predicted: Any, rows: pd.DataFrame | None = None) -> float:
    found = np.abs(np.asarray(predicted, np.float64) - (table() if rows is None else rows).y.to_numpy())
    return float(found.mean())


def values() -> NDArray[np.float64]:
    return table()[["time", "n"]].to_numpy(np.float64)


def test_predictions_of_arrays_are_of_the_users_values(made: Path) -> None:
    predicted = ep3stream.load(made / "run").predict(values())
    assert predicted.dtype == np.float64
    assert mean_error(predicted) < 0.1


@pytest.mark.parametrize("kind", ["float64 tensor", "int64", "Fortran order"])
def test_values_of_any_type_are_taken(made: Path, kind: str) -> None:
    model, x = ep3stream.load(made / "run"), values()
    x[:, 1] = 0
    given: Any = {
        "float64 tensor": torch.from_numpy(x),
        "int64": x.astype(np.int64),
        "Fortran order": np.asfortranarray(x),
    }[kind]
    np.testing.assert_array_equal(model.predict(given), model.predict(x))


def test_a_saved_model_keeps_its_offsets_and_an_older_reader_refuses_it(made: Path) -> None:
    model = ep3stream.load(made / "run")
    tensors = model.tensors()
    assert {"x_offset", "y_offset"} <= tensors.keys()
    again = Predictor.of(tensors, model.description())
    np.testing.assert_array_equal(again.predict(values()), model.predict(values()))
    with pytest.raises(DamagedDataError, match="x_offset"):
        Predictor.of(tensors | {"x_offset": tensors["x_offset"].float()}, model.description())


def test_a_model_without_offsets_is_as_before(tmp_path: Path) -> None:
    rows = table().assign(time=N / 100, y=SIGNAL)
    ep3stream.convert(rows, tmp_path / "s.zarr", ConvertConfig(target="y"))
    ep3stream.fit(tmp_path / "s.zarr", tmp_path / "run", config(tmp_path / "s.zarr", epochs=1))
    model = ep3stream.load(tmp_path / "run")
    assert model.offsets is None
    assert "x_offset" not in model.tensors()
    assert model.predict(rows[["time", "n"]].to_numpy()).dtype == np.float32


def test_evaluate_scores_as_the_predictions_do(made: Path) -> None:
    scores = ep3stream.evaluate(made / "run", made / "rows.zarr", "test")
    assert scores["r2"] > 0.98
    with ep3stream.open_store(made / "rows.zarr") as store:
        reader, offsets = store.split("test"), store.manifest.offsets
        x, y = reader.read_rows(np.arange(reader.info.n_rows))
    predicted = ep3stream.load(made / "run").predict(x + offsets.x)
    assert np.mean((predicted - (y[:, 0] + offsets.y)) ** 2) == pytest.approx(scores["mse"], rel=1e-3)


def test_a_store_with_other_offsets_is_scored_alike(made: Path, tmp_path: Path) -> None:
    ep3stream.convert(table()[:300], tmp_path / "own.zarr", ConvertConfig(target="y"))
    like = ConvertConfig(like=made / "rows.zarr")
    ep3stream.convert(table()[:300], tmp_path / "like.zarr", like)
    with (
        ep3stream.open_store(tmp_path / "own.zarr") as own,
        ep3stream.open_store(made / "rows.zarr") as first,
    ):
        assert own.manifest.offsets.x[0] != first.manifest.offsets.x[0]
    own, alike = (ep3stream.evaluate(made / "run", tmp_path / f"{name}.zarr") for name in ("own", "like"))
    assert own["mse"] == pytest.approx(alike["mse"], rel=1e-2)


def test_predictions_of_a_split_are_of_the_users_values(made: Path, tmp_path: Path) -> None:
    ep3stream.convert(made / "rows.csv", tmp_path / "s.zarr", ConvertConfig(like=made / "rows.zarr"))
    assert ep3stream.predict(made / "run", tmp_path / "s.zarr", tmp_path / "p.npy") == len(N)
    predicted = np.load(tmp_path / "p.npy")
    assert predicted.dtype == np.float64
    assert mean_error(predicted) < 0.1
    ep3stream.predict(made / "run", tmp_path / "s.zarr", tmp_path / "p.zarr")
    with ep3stream.open_store(tmp_path / "p.zarr") as store:
        x, y = store.split("train").read_rows(N)
        offsets = store.manifest.offsets
    assert mean_error(x[:, 0] + offsets.x) < 0.1
    assert mean_error(y[:, 0] + offsets.y) < 1e-6


def test_predictions_of_a_table_have_all_digits(made: Path, tmp_path: Path) -> None:
    table().drop(columns="y").to_csv(tmp_path / "later.csv", index=False)
    predict_tables(made / "run", tmp_path / "later.csv", tmp_path / "p.csv")
    with (tmp_path / "p.csv").open() as file:
        predicted = [float(row["y"]) for row in csv.DictReader(file)]
    assert mean_error(predicted) < 0.1
    np.testing.assert_allclose(predicted, ep3stream.load(made / "run").predict(values()), atol=1e-5)


def test_predictions_of_dask_arrays_are_of_the_users_values(made: Path) -> None:
    da = pytest.importorskip("dask.array")
    model = ep3stream.load(made / "run")
    lazy = ep3stream.predict(made / "run", da.from_array(values(), chunks=(500, 2)))
    assert lazy.dtype == np.float64
    np.testing.assert_allclose(lazy.compute(), model.predict(values()), atol=1e-5)


def test_the_exported_program_takes_the_users_values(made: Path, tmp_path: Path) -> None:
    import json

    ep3stream.export(made / "run", tmp_path / "out")
    program = torch.export.load(tmp_path / "out" / "program.pt2").module()
    outputs = program(torch.from_numpy(values()))
    assert outputs.dtype == torch.float64
    np.testing.assert_allclose(
        outputs[:, 0].numpy(), ep3stream.load(made / "run").predict(values()), atol=1e-3
    )
    assert json.loads((tmp_path / "out" / "model.json").read_text())["format_version"] == 2


def test_the_report_shows_the_users_values(made: Path) -> None:
    import json

    ep3stream.evaluate(made / "run", made / "rows.zarr", "test")
    summary = json.loads((made / "run" / "run.json").read_text())
    assert summary["statistics"]["targets"][0]["mean"] == pytest.approx(LEVEL, abs=1)
    assert summary["statistics"]["features"][0]["min"] >= START
    record = json.loads((made / "run" / "evaluations.jsonl").read_text().splitlines()[-1])
    (target,) = record["diagnosis"]["residuals"]
    assert all(abs(band["predicted"] - LEVEL) < 2 for band in target["bands"])


@pytest.mark.parametrize("which", ["values", "rows of the store", "split of another store"])
def test_centers_may_be_values_or_rows_of_a_store(made: Path, tmp_path: Path, which: str) -> None:
    some = table()[::6]
    if which == "values":
        np.save(tmp_path / "c.npy", some[["time", "n"]].to_numpy(np.float64))
    elif which == "rows of the store":
        with ep3stream.open_store(made / "rows.zarr") as store:
            np.save(tmp_path / "c.npy", store.split("train").read_rows(np.arange(0, 900, 5))[0])
    else:
        ep3stream.convert(some, tmp_path / "c.zarr", ConvertConfig(target="y", splits={"all": 1.0}))
    centers = tmp_path / ("c.zarr/all" if "split" in which else "c.npy")
    ep3stream.fit(made / "rows.zarr", tmp_path / "run", config(made / "rows.zarr", centers=str(centers)))
    assert mean_error(ep3stream.load(tmp_path / "run").predict(values())) < 0.1


def test_an_unfinished_fit_predicts_the_users_values(made: Path, tmp_path: Path) -> None:
    import shutil

    shutil.copytree(made / "run", tmp_path / "run")
    shutil.rmtree(tmp_path / "run" / "model")
    assert mean_error(ep3stream.load(tmp_path / "run").predict(values())) < 0.1
