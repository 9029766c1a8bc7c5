"""A masked value is a missing value, wherever rows come from: the number under the mask is never used."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import dask.array as da
import numpy as np
import pandas as pd
import pytest

import ep3stream
from ep3stream import ConvertConfig, KernelClassifier, KernelModel, KernelRegressor
from ep3stream.errors import Ep3streamError, SourceError

N = 48
X = np.random.default_rng(0).normal(size=(N, 3)).astype("f4")
Y = X.sum(axis=1).astype("f8")
LABELS = np.arange(N) % 3
GAPS = np.arange(N) % 7 == 2

# Under the mask lies what would be seen at once.
MASKED_X = np.ma.masked_array(
    np.where(GAPS[:, None], np.float32(6e4), X), np.repeat(GAPS[:, None], 3, axis=1)
)
MASKED_Y = np.ma.masked_array(np.where(GAPS, 1e6, Y), GAPS)
MASKED_LABELS = np.ma.masked_array(np.where(GAPS, 99, LABELS), GAPS)


def chunked(array: Any) -> Any:
    return da.from_array(array, chunks=(10, *array.shape[1:]))


SOURCES: dict[str, tuple[Any, Any, Any]] = {
    "x": ((MASKED_X, Y), X, Y),
    "x in float16": ((MASKED_X.astype("f2"), Y), X.astype("f2"), Y),
    "x of integers": ((np.ma.masked_array((X * 9).astype("i4"), MASKED_X.mask), Y), (X * 9).astype("i4"), Y),
    "x of booleans": ((np.ma.masked_array(X > 0, MASKED_X.mask), Y), X > 0, Y),
    "x, infinite under the mask": ((np.ma.masked_array(np.where(GAPS[:, None], np.inf, X), MASKED_X.mask), Y), X, Y),
    "x with a hard mask": ((np.ma.masked_array(MASKED_X.data, MASKED_X.mask, hard_mask=True), Y), X, Y),
    "x, a few columns": ((np.ma.masked_array(X, np.array([[True, False, False]]) & GAPS[:, None]), Y), X, Y),
    "y": ((X, MASKED_Y), X, Y),
    "y of two columns": ((X, np.ma.column_stack([MASKED_Y, Y])), X, np.column_stack([Y, Y])),
    "labels": ((X, MASKED_LABELS), X, LABELS),
    "labels beyond float64": ((X, MASKED_LABELS + 2**60), X, LABELS),
    "boolean labels": ((X, np.ma.masked_array(LABELS > 0, GAPS)), X, (LABELS > 0).astype(int)),
    "both": ((MASKED_X, MASKED_LABELS), X, LABELS),
    "Dask": ((chunked(MASKED_X), chunked(Y)), X, Y),
    "labels of Dask": ((chunked(X), chunked(MASKED_LABELS)), X, LABELS),
    "batches": ([(MASKED_X[:20], MASKED_LABELS[:20]), (MASKED_X[20:], MASKED_LABELS[20:])], X, LABELS),
    "a later batch": ([(X[:2], LABELS[:2]), (MASKED_X[2:], MASKED_LABELS[2:])], X, LABELS),
    "lists of masked rows": ([(list(MASKED_X), Y)], X, Y),
    "DataFrame with NA": ((pd.DataFrame(X).astype("Float64").mask(MASKED_X.mask), Y), X, Y),
    "Series with NA": ((X, pd.Series(LABELS).astype("Int64").mask(GAPS)), X, LABELS),
}  # fmt: skip


@pytest.mark.parametrize(("source", "x", "y"), SOURCES.values(), ids=SOURCES)
def test_rows_with_a_masked_value_are_left_out_by_drop_and_named_by_error(tmp_path, source, x, y):
    config = ConvertConfig(missing="drop", shuffle=False)
    manifest = ep3stream.convert(source, tmp_path / "s", config)
    assert manifest.conversion["dropped_rows"] == GAPS.sum()
    with ep3stream.open_store(tmp_path / "s") as store:
        read_x, read_y = store.split("train").read_rows(np.arange(N - GAPS.sum()))
    np.testing.assert_allclose(read_x, x[~GAPS].astype("f4"), rtol=1e-6)
    np.testing.assert_allclose(np.squeeze(read_y), y[~GAPS].astype(read_y.dtype), rtol=1e-6)
    with pytest.raises(SourceError, match=r"row 3: the (value|label) is missing"):
        ep3stream.convert(source, tmp_path / "t", ConvertConfig(missing="error"))
    assert sorted(path.name for path in tmp_path.iterdir()) == ["s"]


def test_masked_values_become_the_mean_of_the_others(tmp_path):
    config = ConvertConfig(missing="mean", shuffle=False)
    names = ep3stream.convert((MASKED_X, Y), tmp_path / "s", config).feature_names
    with ep3stream.open_store(tmp_path / "s") as store:
        x, _ = store.split("train").read_rows(np.arange(N))
    np.testing.assert_allclose(
        x[GAPS][:, [names.index(f"x{j}") for j in range(3)]],
        np.tile(X[~GAPS].mean(axis=0), (GAPS.sum(), 1)),
        rtol=1e-5,
    )


@pytest.mark.parametrize("mask", [np.ma.nomask, np.zeros(X.shape, bool)])
def test_a_mask_of_nothing_changes_nothing(tmp_path, mask):
    ep3stream.convert(
        (np.ma.masked_array(X, mask), Y), tmp_path / "s", ConvertConfig(shuffle=False, missing="error")
    )
    with ep3stream.open_store(tmp_path / "s") as store:
        np.testing.assert_array_equal(store.split("train").read_rows(np.arange(N))[0], X)


def regressor() -> KernelRegressor:
    return KernelRegressor("laplacian", n_centers=10, epochs=1, random_state=0)


def classifier() -> KernelClassifier:
    return KernelClassifier("laplacian", n_centers=10, epochs=1, random_state=0)


def kernel_model() -> KernelModel:
    return KernelModel(X[:10], n_outputs=1, task="regression", seed=0)


def trained() -> KernelModel:
    model = kernel_model()
    model.fit((X, Y), epochs=1)
    return model


USES: dict[str, Callable[[], Any]] = {
    "fit x": lambda: regressor().fit(MASKED_X, Y),
    "fit y": lambda: regressor().fit(X, MASKED_Y),
    "fit list of rows": lambda: regressor().fit(list(MASKED_X), Y),
    "fit labels": lambda: classifier().fit(X, MASKED_LABELS),
    "fit weights": lambda: regressor().fit(X, Y, sample_weight=np.ma.masked_array(np.ones(N), GAPS)),
    "fit Dask x": lambda: regressor().fit(chunked(MASKED_X), chunked(Y)),
    "fit Dask y": lambda: regressor().fit(chunked(X), chunked(MASKED_Y)),
    "fit Dask labels": lambda: classifier().fit(chunked(X), chunked(MASKED_LABELS)),
    "fit Dask x, masked y": lambda: regressor().fit(chunked(X), MASKED_Y),
    "partial_fit x": lambda: regressor().partial_fit(MASKED_X, Y),
    "partial_fit labels": lambda: classifier().partial_fit(X, MASKED_LABELS, classes=[0, 1, 2]),
    "partial_fit classes": lambda: classifier().partial_fit(X, LABELS, np.ma.masked_array([0, 1, 2], [0, 0, 1])),
    "predict": lambda: regressor().fit(X, Y).predict(MASKED_X),
    "predict of Dask": lambda: regressor().fit(X, Y).predict(chunked(MASKED_X)).compute(),
    "predict_proba": lambda: classifier().fit(X, LABELS).predict_proba(MASKED_X),
    "decision_function": lambda: classifier().fit(X, LABELS).decision_function(MASKED_X),
    "score x": lambda: regressor().fit(X, Y).score(MASKED_X, Y),
    "score y": lambda: regressor().fit(X, Y).score(X, MASKED_Y),
    "score labels": lambda: classifier().fit(X, LABELS).score(X, MASKED_LABELS),
    "score weights": lambda: classifier().fit(X, LABELS).score(X, LABELS, np.ma.masked_array(np.ones(N), GAPS)),
    "score of Dask": lambda: regressor().fit(X, Y).score(chunked(X), chunked(MASKED_Y)),
    "model predict": lambda: regressor().fit(X, Y).model_.predict(MASKED_X),
    "model of rows": lambda: regressor().fit(X, Y).model_.predict(list(MASKED_X)),
    "KernelModel centers": lambda: KernelModel(MASKED_X[:10], n_outputs=1, task="regression"),
    "KernelModel fit": lambda: kernel_model().fit((MASKED_X, Y), epochs=1),
    "KernelModel fit y": lambda: kernel_model().fit((X, MASKED_Y), epochs=1),
    "KernelModel loader": lambda: kernel_model().fit([(X, Y), (MASKED_X, Y)], epochs=1),
    "KernelModel predict": lambda: trained().predict(MASKED_X),
}  # fmt: skip


@pytest.mark.parametrize("use", USES.values(), ids=USES)
def test_fits_scores_and_predictions_take_no_masked_value(use):
    with pytest.raises(
        Ep3streamError, match="has masked values, which are missing ones; fill them in"
    ) as caught:
        use()
    assert isinstance(caught.value, ValueError)
    assert "\n" not in str(caught.value)
