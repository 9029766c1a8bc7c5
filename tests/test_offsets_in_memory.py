"""Arrays, loaders and Dask arrays whose numbers float32 would merge: models see, and give, the user's values."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import numpy as np
import pandas as pd
import pytest
import torch
from numpy.typing import NDArray
from scipy.sparse import csr_matrix

import ep3stream
from ep3stream import ConvertConfig, InputError, KernelClassifier, KernelModel, KernelRegressor

N = np.arange(2000)
SIGNAL = np.sin(2 * np.pi * N / 600)
Y = SIGNAL + 0.0


def columns(values: Any) -> NDArray[Any]:
    return np.asarray(values)[:, None]


# Inputs of which float32 keeps too little, all of them one step a row.
INPUTS: dict[str, Any] = {
    "seconds": columns(1.76e9 + N),
    "seconds as int64": columns(1_760_000_000 + N),
    "milliseconds": columns(1.76e12 + 1000 * N),
    "nanoseconds as int64": columns(1_760_000_000_000_000_000 + 10**9 * N),
    "uint64 beyond int64": columns(np.uint64(2**63) + N.astype(np.uint64)),
    "negative int64": columns(-(2**60) + N),
    "metres by 0.1": columns(5_432_100 + N / 10),
    "years with fractions": columns(2026 + N * 1e-8),
    "a DataFrame": pd.DataFrame({"time": 1_760_000_000 + N}),
    "a sparse matrix": csr_matrix(columns(1.76e9 + N)),
    "Fortran order": np.asfortranarray(np.column_stack([1.76e9 + N, 0.0 * N])),
}


def regressor(**settings: Any) -> KernelRegressor:
    return KernelRegressor(**{"n_centers": 400, "bandwidth": 0.1, "epochs": 5, "random_state": 0} | settings)


@pytest.mark.parametrize("name", INPUTS)
def test_a_regressor_sees_every_step_of_large_inputs(name: str) -> None:
    x = INPUTS[name]
    assert regressor().fit(x, Y).score(x, Y) > 0.98


def test_a_target_of_a_large_mean_is_fitted_and_given_in_its_own_units() -> None:
    y = 1.7e9 + SIGNAL
    fitted = regressor().fit(columns(N), y)
    predicted = fitted.predict(columns(N))
    assert predicted.dtype == np.float64
    assert fitted.score(columns(N), y) > 0.98
    assert np.abs(predicted - y).max() < 0.5


def test_of_two_targets_only_the_one_that_needs_it_has_an_offset() -> None:
    y = np.column_stack([SIGNAL, 1.7e9 + SIGNAL])
    fitted = regressor().fit(columns(N), y)
    assert fitted.model_.offsets is not None
    assert fitted.model_.offsets.y[0] == 0
    assert fitted.score(columns(N), y) > 0.98


def test_inputs_without_need_have_no_offsets_and_float32_outputs() -> None:
    for x in (columns(N), columns(N / 7), columns(np.float32(1.76e9) + N.astype(np.float32))):
        fitted = regressor(epochs=1).fit(x, Y)
        assert fitted.model_.offsets is None
        assert fitted.predict(x).dtype == np.float32


def test_a_classifier_sees_every_step_of_large_inputs() -> None:
    x, labels = columns(1.76e9 + N), np.where(N // 300 % 2, "on", "off")
    settings: dict[str, Any] = {"n_centers": 400, "bandwidth": 0.1, "epochs": 5, "random_state": 0}
    assert KernelClassifier(**settings).fit(x, labels).score(x, labels) > 0.97


def test_rows_with_weights_and_later_rows_have_the_offsets_of_the_first() -> None:
    x = INPUTS["seconds"]
    weighted = regressor().fit(x, Y, sample_weight=np.ones(len(N)))
    assert weighted.score(x, Y) > 0.98
    order = np.random.default_rng(0).permutation(len(N))
    parted = regressor()
    for rows in [order[:1000], order[1000:]] * 4:
        parted.partial_fit(x[rows], Y[rows])
    assert parted.score(x, Y) > 0.95


def test_an_estimator_saved_and_loaded_keeps_its_offsets(tmp_path: Path) -> None:
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    fitted = regressor().fit(x, y)
    fitted.save(tmp_path / "saved")
    loaded = KernelRegressor.load(tmp_path / "saved")
    np.testing.assert_array_equal(loaded.predict(x), fitted.predict(x))
    np.testing.assert_array_equal(ep3stream.load(tmp_path / "saved").predict(x), fitted.predict(x))
    loaded.partial_fit(x, y)
    assert loaded.score(x, y) > 0.98


def test_dask_arrays_are_taken_less_offsets() -> None:
    da = pytest.importorskip("dask.array")
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    lazy_x, lazy_y = da.from_array(x, chunks=(500, 1)), da.from_array(y, chunks=500)
    fitted = regressor().fit(lazy_x, lazy_y)
    assert fitted.score(lazy_x, lazy_y) > 0.98
    predicted = fitted.predict(lazy_x)
    assert predicted.dtype == np.float64
    np.testing.assert_allclose(predicted.compute(), fitted.predict(x), atol=1e-5)


def test_an_estimator_and_a_store_agree_on_offsets(tmp_path: Path) -> None:
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    ep3stream.convert((x, y), tmp_path / "s.zarr", ConvertConfig())
    fitted = regressor().fit(tmp_path / "s.zarr")
    assert fitted.score(tmp_path / "s.zarr") > 0.98
    assert fitted.score(pd.DataFrame(x, columns=["x0"]), y) > 0.98
    of_store = fitted.predict(tmp_path / "s.zarr")
    assert np.abs(of_store - 1.7e9).max() < 2
    of_arrays = regressor().fit(x, y)
    assert of_arrays.score(tmp_path / "s.zarr") > 0.98


def test_a_store_of_other_offsets_is_not_trained_on(tmp_path: Path) -> None:
    for name, rows in (("1", slice(0, 1000)), ("2", slice(1000, 2000))):
        ep3stream.convert((INPUTS["seconds"][rows], Y[rows]), tmp_path / name, ConvertConfig())
    fitted = regressor(n_centers=100).partial_fit(tmp_path / "1")
    with pytest.raises(ValueError, match="other offsets"):
        fitted.partial_fit(tmp_path / "2")


def test_what_no_offset_mends_is_told_by_column(caplog: pytest.LogCaptureFixture) -> None:
    x = columns(np.where(N % 2, 1_776_000_000 + N, 3_776_000_000 + N))
    regressor(epochs=1).fit(x, Y)
    assert "column 'x0': rounding to float32 keeps" in caplog.text


# KernelModel: inputs are not scaled.


def model(x: Any, **settings: Any) -> KernelModel:
    return KernelModel(x[::5], "gaussian", bandwidth=60.0, nystrom_samples=300, **settings)


def test_a_kernel_model_of_arrays_takes_and_gives_the_users_values() -> None:
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    made = model(x)
    made.fit((x, y), epochs=5)
    assert made.score(x, y)["r2"] > 0.98
    assert made.predict(x).dtype == torch.float64
    assert np.abs(made.predict(x).numpy() - y).max() < 0.5
    np.testing.assert_allclose(made.predictor().predict(x), made.predict(x).numpy(), atol=1e-6)


@pytest.mark.parametrize("kind", ["tensors", "loader", "batches", "float32 centers", "few centers"])
def test_a_kernel_model_takes_values_from_anywhere(kind: str) -> None:
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    order = np.random.default_rng(0).permutation(len(N))
    batches = [(x[rows], y[rows]) for rows in np.array_split(order, 10)]
    made = model(x.astype(np.float32)) if kind == "float32 centers" else model(x)
    if kind == "few centers":
        made = KernelModel(x[::40], "gaussian", bandwidth=60.0, nystrom_samples=300)
    for _ in range(5):
        if kind == "loader":
            made.fit_epoch(batches)
        elif kind == "batches":
            for batch in batches:
                made.fit_batch(*batch)
        else:
            made.fit_epoch((torch.from_numpy(x), torch.from_numpy(y)))
    assert made.score(x, y)["r2"] > 0.9


def test_a_kernel_model_goes_on_from_its_state_with_offsets(tmp_path: Path) -> None:
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    first = model(x)
    first.fit_epoch((x, y))
    second = model(x)
    second.load_state_dict(first.state_dict())
    assert first.state_dict()["version"] == 5
    for each in (first, second):
        each.fit_epoch((x, y))
    assert torch.equal(first.predict(x), second.predict(x))
    first.save(tmp_path / "saved")
    np.testing.assert_array_equal(ep3stream.load(tmp_path / "saved").predict(x), first.predict(x).numpy())


@pytest.mark.parametrize("centers", ["values", "rows of the store"])
def test_a_kernel_model_of_a_store_takes_and_gives_the_users_values(tmp_path: Path, centers: str) -> None:
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    ep3stream.convert((x, y), tmp_path / "s.zarr", ConvertConfig())
    with ep3stream.open_store(tmp_path / "s.zarr") as store:
        reader = store.split("train")
        rows = reader.read_rows(np.arange(0, len(N), 5))[0]
        made = KernelModel(
            x[::5] if centers == "values" else rows, "gaussian", bandwidth=60.0, nystrom_samples=300
        )
        made.fit(reader, epochs=5)
        assert made.fit(reader, epochs=1, validation=reader)[0]["validation"]["r2"] > 0.98
    assert made.score(x, y)["r2"] > 0.98


def test_a_kernel_model_refuses_a_store_of_other_offsets(tmp_path: Path) -> None:
    x, y = INPUTS["seconds"], 1.7e9 + SIGNAL
    ep3stream.convert((x[:1000], y[:1000]), tmp_path / "s.zarr", ConvertConfig())
    made = model(x)
    made.fit_epoch((x, y))
    with ep3stream.open_store(tmp_path / "s.zarr") as store, pytest.raises(InputError, match="other offsets"):
        made.fit_epoch(store.split("train"))
