"""`fit`, `KernelModel` and the estimators are one set-up and one training loop: the same bytes of weights."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
from small_stores import make_store, smooth_rows

import ep3stream
from ep3stream import ConvertConfig, DataConfig, FitConfig, KernelConfig, KernelModel, RunConfig, SolverConfig
from ep3stream.estimator import KernelClassifier, KernelRegressor
from ep3stream.planning import pilot
from ep3stream.training import trainer

EPOCHS, SEED, SAMPLES, CENTERS = 3, 5, 200, 60
SOLVER = {"nystrom_samples": SAMPLES, "model_rank": 20}


def config(centers: int | str, scale: str, projection: str, **solver) -> FitConfig:
    return FitConfig(
        data=DataConfig(scale=scale, validate="none"),
        kernel=KernelConfig("laplacian"),
        solver=SolverConfig(centers=centers, projection=projection, epochs=EPOCHS, **SOLVER | solver),
        run=RunConfig(seed=SEED),
    )


@pytest.fixture(params=["regression", "classification"])
def task(request) -> str:
    return request.param


@pytest.fixture
def store(tmp_path, task) -> Path:
    return make_store(tmp_path / "rows.zarr", task, n_rows=2000)


def weights(run: Path) -> np.ndarray:
    return ep3stream.load(run).weights.numpy()


@pytest.mark.parametrize("projection", ["nystrom", "exact", "eigenpro"])
def test_kernel_model_on_a_split_ends_with_the_bytes_of_a_fit(store, tmp_path, task, projection):
    with ep3stream.open_store(store) as rows:
        split = rows.split("train")
        centers = split.read_rows(np.arange(3, 3 + CENTERS))[0].astype(np.float32)
        np.save(tmp_path / "centers.npy", centers)
        run = ep3stream.fit(
            store, tmp_path / "run", config(str(tmp_path / "centers.npy"), "none", projection)
        )
        if projection == "eigenpro":  # It puts given centers into random order.
            centers = ep3stream.load(run).centers.numpy()
        model = KernelModel(
            centers, n_outputs=rows.manifest.n_outputs, task=task, projection=projection, seed=SEED, **SOLVER
        )
        model.fit(split, epochs=EPOCHS)
    assert np.array_equal(model.predictor().weights.numpy(), weights(run))


def estimator(task: str, **settings) -> KernelRegressor | KernelClassifier:
    kind = KernelRegressor if task == "regression" else KernelClassifier
    plain = {"n_centers": CENTERS, "epochs": EPOCHS, "validation_fraction": 0, "random_state": SEED}
    return kind("laplacian", **plain | SOLVER | settings)


@pytest.mark.parametrize("projection", ["nystrom", "exact"])
def test_an_estimator_on_a_split_ends_with_the_bytes_of_a_fit(store, tmp_path, task, projection):
    run = ep3stream.fit(store, tmp_path / "run", config(CENTERS, "standard", projection))
    with ep3stream.open_store(store) as rows:
        model = estimator(task, projection=projection).fit(rows.split("train")).model_
    assert np.array_equal(model.weights.numpy(), weights(run))
    assert np.array_equal(model.centers.numpy(), ep3stream.load(run).centers.numpy())


def test_an_estimator_on_arrays_ends_as_a_fit_to_a_store_of_the_same_rows(tmp_path):
    x, y = smooth_rows(2000)
    ep3stream.convert((x, y), tmp_path / "rows.zarr", ConvertConfig(shuffle=False))
    run = ep3stream.fit(tmp_path / "rows.zarr", tmp_path / "run", config(CENTERS, "standard", "nystrom"))
    found, expected = estimator("regression").fit(x, y).model_, ep3stream.load(run)
    assert np.array_equal(found.centers.numpy(), expected.centers.numpy())
    # The statistics of arrays are summed in other blocks than those of a store, which is all that differs.
    np.testing.assert_allclose(found.weights.numpy(), weights(run), rtol=1e-3, atol=1e-4)


def test_precision_reaches_every_face(store, tmp_path, task):
    outputs = {}
    for precision in ("float32", "bfloat16"):
        run = ep3stream.fit(
            store, tmp_path / precision, config(CENTERS, "standard", "nystrom", precision=precision)
        )
        with ep3stream.open_store(store) as rows:
            model = estimator(task, precision=precision).fit(rows.split("train")).model_
        outputs[precision] = weights(run)
        assert np.array_equal(model.weights.numpy(), outputs[precision])
    assert not np.array_equal(outputs["float32"], outputs["bfloat16"])


def test_models_of_arrays_start_at_the_ridge_regression_of_their_sample():
    x, y = smooth_rows(4000)
    model = KernelModel(x[:100], n_outputs=2, bandwidth=4.0, nystrom_samples=300)
    model.fit((x, y))
    assert "start" in model._trainer.result.setup.tensors
    assert model._trainer.progress.state.averaged > model._trainer.progress.step


def test_the_pilot_run_of_plan_trains_with_the_trainer_of_a_fit_and_in_its_precision(store, monkeypatch):
    seen = []
    step = trainer.Trainer.step

    def noted(self, *arguments, **named):
        seen.append(self.solver.kernel.precision)
        return step(self, *arguments, **named)

    monkeypatch.setattr(trainer.Trainer, "step", noted)
    monkeypatch.setattr(pilot, "_STEP_FOR_S", 0.01)
    for precision in ("float32", "bfloat16"):
        seen.clear()
        ep3stream.plan(store, config(CENTERS, "standard", "nystrom", precision=precision))
        assert seen
        assert set(seen) == {precision}
