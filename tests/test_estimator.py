"""The scikit-learn face beyond scikit-learn's own checks: pipelines, Dask arrays, stores, files, probabilities."""

from __future__ import annotations

import datetime
import decimal
import pickle
import subprocess
import sys
from dataclasses import replace
from pathlib import Path

import dask.array as da
import numpy as np
import pandas as pd
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from hypothesis.extra.numpy import arrays
from scipy.sparse import csc_array, csr_array
from sklearn.base import clone
from sklearn.datasets import load_diabetes, load_digits, load_iris
from sklearn.kernel_ridge import KernelRidge
from sklearn.model_selection import GridSearchCV, cross_val_score, train_test_split
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler
from small_stores import make_store, plain_config, smooth_rows

import ep3stream
from ep3stream import InputError, KernelConfig
from ep3stream.estimator import KernelClassifier, KernelRegressor
from ep3stream.estimator.row_sets import DaskRows
from ep3stream.online.sources import ArraySource, RowForm, StoreSource
from ep3stream.prediction.scores import nearest_in_simplex
from ep3stream.stream.order import RowOrder
from ep3stream.training.centers import draw_centers

X, TARGETS = smooth_rows(1200)
Y = TARGETS[:, 0]
LABELS = np.array(["low", "middle", "high"])[np.digitize(Y, np.quantile(Y, [1 / 3, 2 / 3]))]
NONE = np.empty(0, np.int64)
SMALL = {"kernel": "laplacian", "n_centers": 100, "epochs": 4, "random_state": 0}


def regressor(**changes) -> KernelRegressor:
    return KernelRegressor(**SMALL | changes)


def classifier(**changes) -> KernelClassifier:
    return KernelClassifier(**SMALL | changes)


@pytest.fixture(scope="module")
def stores(tmp_path_factory) -> dict[str, Path]:
    folder = tmp_path_factory.mktemp("stores")
    return {task: make_store(folder / f"{task}.zarr", task) for task in ("regression", "classification")}


def test_on_small_data_it_is_as_good_as_the_direct_solution():
    x, y = load_digits(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(x, y, random_state=0)
    assert KernelClassifier(random_state=0).fit(train_x, train_y).score(test_x, test_y) > 0.98
    x, y = load_diabetes(return_X_y=True)
    train_x, test_x, train_y, test_y = train_test_split(StandardScaler().fit_transform(x), y, random_state=0)
    peer = KernelRidge(alpha=0.05, kernel="laplacian", gamma=0.1).fit(train_x, train_y - train_y.mean())
    ours = KernelRegressor(random_state=0).fit(train_x, train_y)
    assert ours.score(test_x, test_y) > peer.score(test_x, test_y - train_y.mean()) - 0.1


def test_it_works_in_a_pipeline_and_a_grid_search():
    search = GridSearchCV(
        make_pipeline(StandardScaler(), classifier(scale="none")),
        {"kernelclassifier__bandwidth": [1.0, 5.0], "kernelclassifier__kernel": ["laplacian", "gaussian"]},
        cv=2,
        scoring="roc_auc_ovr",
    ).fit(X[:800], LABELS[:800])
    assert search.best_score_ > 0.9
    assert search.predict(X[:5]).dtype == LABELS.dtype
    assert cross_val_score(regressor(), X, Y, cv=2).min() > 0.8


def test_a_kernel_may_be_a_name_a_config_or_a_callable():
    def laplacian(x, z):
        import torch

        return (-torch.cdist(x, z, compute_mode="donot_use_mm_for_euclid_dist") / 3).exp()

    by_name = regressor(bandwidth=3.0).fit(X, Y).predict(X)
    by_config = regressor(kernel=KernelConfig("laplacian", 3.0)).fit(X, Y).predict(X)
    by_function = clone(regressor(kernel=laplacian)).fit(X, Y).predict(X)
    assert np.array_equal(by_name, by_config)
    assert np.allclose(by_name, by_function, atol=0.05 * Y.std())


def test_the_same_random_state_gives_the_same_bits_and_another_one_others():
    first, again, other = (regressor(random_state=s).fit(X, Y).predict(X) for s in (1, 1, 2))
    assert np.array_equal(first, again)
    assert not np.array_equal(first, other)


@given(arrays(np.float64, (3, 4), elements=st.floats(-3, 3)))
def test_probabilities_are_the_nearest_point_of_the_simplex(outputs):
    nearest = nearest_in_simplex(outputs)
    assert (nearest >= 0).all()
    assert np.allclose(nearest.sum(1), 1)
    # For all corners e of a convex set, (f - p)'(e - p) <= 0 says that p is its point nearest to f.
    inward = (outputs - nearest)[:, None] * (np.eye(4) - nearest[:, None])
    assert (inward.sum(2) <= 1e-9).all()


def test_probabilities_have_no_larger_brier_score_than_the_outputs():
    model = classifier(epochs=1).fit(X[:600], LABELS[:600])
    truth = LABELS[600:, None] == model.classes_
    scores, chances = model.decision_function(X[600:]), model.predict_proba(X[600:])
    assert ((chances - truth) ** 2).mean() < ((scores - truth) ** 2).mean()
    assert (model.classes_[chances.argmax(1)] == model.predict(X[600:])).all()


@pytest.mark.parametrize(("make", "y"), [(regressor, TARGETS), (regressor, Y), (classifier, LABELS)])
def test_a_dask_array_is_as_good_as_the_array_and_its_predictions_are_lazy(make, y):
    lazy_x, lazy_y = da.from_array(X, chunks=(250, 2)), da.from_array(y, chunks=300)
    model = make().fit(lazy_x, lazy_y)
    assert model.score(X, y) > make().fit(X, y).score(X, y) - 0.03
    predicted = model.predict(lazy_x)
    assert isinstance(predicted, da.Array)
    assert (predicted.shape, predicted.dtype) == (y.shape, model.predict(X).dtype)
    values, whole = predicted.compute(), model.predict(X)
    assert (values == whole).mean() > 0.99 if make is classifier else np.allclose(values, whole, atol=1e-4)
    assert model.score(lazy_x, lazy_y) == pytest.approx(model.score(X, y), abs=1e-3)
    if make is classifier:
        assert model.predict_proba(lazy_x).shape == (1200, 3)
        assert model.decision_function(lazy_x).compute().shape == (1200, 3)


def test_dask_blocks_of_unknown_size_are_counted():
    lazy = da.from_array(X, chunks=250)
    unknown = lazy[da.from_array(np.arange(1200) % 3 > 0, chunks=250)]
    y = Y[np.arange(1200) % 3 > 0]
    assert regressor(random_state=1).fit(unknown, y).score(unknown, y) > 0.8


def test_a_dask_array_is_never_gathered():
    alive: list[int] = []

    def block(_, block_info=None):
        alive.append(block_info[None]["chunk-location"][0])
        return X[:100]

    lazy = da.map_blocks(block, da.zeros((4000, 5), chunks=(100, 5)), dtype=np.float32, meta=X[:0])
    rows = DaskRows.of(lazy, da.zeros(4000, chunks=100), memory_bytes=8 * 2 * 100 * 28)
    assert rows.window_blocks == 2
    alive.clear()
    batches = rows.epoch(0, 0)
    next(batches)
    assert len(set(alive)) <= 6
    batches.close()


@pytest.mark.parametrize("kind", ["array", "store"])
def test_every_row_that_is_not_excluded_comes_once_an_epoch_and_each_epoch_has_its_own_order(kind, stores):
    cpu = torch.device("cpu")
    if kind == "store":
        source = StoreSource(ep3stream.open_store(stores["regression"]).split("train"))
    else:
        source = ArraySource(X, np.arange(len(X)), RowForm(5, 1, "regression", cpu))
    n, x = source.n_rows, np.concatenate([np.asarray(part) for part, _ in source.all()])
    excluded = np.sort(draw_centers(source.split().info, n // 4, 3))
    assert len(set(excluded.tolist())) == n // 4
    assert np.array_equal(source.split().read_rows(excluded)[0], x[excluded])
    order = RowOrder(5, n, source.segment_rows, 1, 64, excluded)
    steps, orders = order.steps_per_epoch, []
    for epoch in (0, 1, 0):
        with source.batches(order, range(epoch * steps, (epoch + 1) * steps), cpu) as batches:
            orders.append(np.concatenate([batch.x.numpy().copy() for batch in batches]))
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    kept = np.delete(x, excluded, 0)
    assert np.array_equal(*(part[np.lexsort(part.T)] for part in (orders[1], kept)))


def test_every_row_of_a_dask_array_that_is_not_excluded_comes_once_an_epoch_in_an_order_of_its_own():
    n = len(X)
    ids = da.from_array(np.arange(n), chunks=100)
    rows = DaskRows.of(da.from_array(X, chunks=170), ids, 1 << 16)
    excluded = np.sort(rows.draw_centers(n // 4, 3))
    assert len(set(excluded.tolist())) == n // 4
    taken, _ = rows.take(excluded)
    assert np.array_equal(taken, X[excluded])
    rows = replace(rows, excluded=excluded)
    drawn, _ = rows.drawn(n // 2, 3)
    assert len(drawn) == n // 2
    assert not {tuple(row) for row in drawn.tolist()} & {tuple(row) for row in taken.tolist()}
    orders = [
        np.concatenate([np.asarray(part).copy() for part, _ in rows.epoch(5, epoch)]) for epoch in (0, 1, 0)
    ]
    assert np.array_equal(orders[0], orders[2])
    assert not np.array_equal(orders[0], orders[1])
    kept = np.delete(X, excluded, 0)
    assert np.array_equal(*(part[np.lexsort(part.T)] for part in (orders[1], kept)))


@pytest.mark.parametrize("form", ["path", "text", "store", "split"])
def test_a_store_is_fitted_scored_and_predicted_in_every_form(form, stores):
    forms = {
        "path": lambda path: path,
        "text": str,
        "store": ep3stream.open_store,
        "split": lambda path: ep3stream.open_store(path).split("train"),
    }
    given_store = forms[form](stores["classification"])
    model = classifier().fit(given_store)
    assert model.score(given_store) > 0.7
    assert set(model.predict(given_store)) == set(model.classes_)
    reader = ep3stream.open_store(stores["classification"]).split("train")
    assert list(model.feature_names_in_) == list(reader.manifest.feature_names)
    assert regressor().fit(stores["regression"]).score(stores["regression"]) > 0.8


@pytest.mark.parametrize("make", [regressor, classifier])
def test_a_saved_estimator_predicts_and_trains_on_with_the_same_bits(make, tmp_path):
    y = LABELS if make is classifier else TARGETS
    model = make().fit(X, y)
    model.save(tmp_path / "saved")
    again = type(model).load(tmp_path / "saved")
    assert again.get_params() == model.get_params()
    assert np.array_equal(model.predict(X), again.predict(X))
    assert np.array_equal(model.predict(X), np.asarray(ep3stream.load(tmp_path / "saved").predict(X)))
    for each in (model, again):
        each.partial_fit(X[:300], y[:300])
    assert np.array_equal(model.predict(X), again.predict(X))
    assert again.losses_ == model.losses_
    assert not list((tmp_path / "saved").rglob("*.pkl"))


@pytest.mark.parametrize("labels", [[3, 7], [True, False], ["a", "bcd"], [-1.0, 1.0]])
def test_labels_of_every_type_come_back_from_a_file_as_they_were(labels, tmp_path):
    y = np.array(labels)[(Y.mean() < Y).astype(int)]
    model = classifier().fit(X, y)
    model.save(tmp_path / "saved")
    again = KernelClassifier.load(tmp_path / "saved")
    assert again.classes_.dtype == model.classes_.dtype == y.dtype
    assert np.array_equal(again.predict(X), model.predict(X))


DATES = ["2020-01-01T01:02:03", "2021-02-03T04:05:06"]


@pytest.mark.parametrize(
    "labels",
    [
        np.array(DATES, "M8[D]"),
        np.array(DATES, "M8[s]"),
        np.array(DATES, "M8[ns]"),
        np.array([1, 2], "m8[h]"),
        np.array(pd.to_datetime(DATES)),
        np.array(["a", "b"], object),
        np.array([1, 2**64 - 1], np.uint64),
        np.array([1, 2], ">i2"),
        np.array([1, 2], np.longdouble),
        np.array(["a", "b"], np.dtypes.StringDType()),
    ],
    ids=lambda labels: str(labels.dtype),
)
def test_labels_that_json_does_not_know_come_back_from_a_file(labels, tmp_path):
    model = classifier(epochs=1).fit(X, labels[(Y.mean() < Y).astype(int)])
    model.save(tmp_path / "saved")
    again = KernelClassifier.load(tmp_path / "saved")
    assert again.classes_.dtype == model.classes_.dtype
    assert np.array_equal(again.predict(X), model.predict(X))
    if labels.dtype.kind == "M":
        assert ep3stream.load(tmp_path / "saved").class_names == tuple(map(str, labels))


@pytest.mark.parametrize(
    ("labels", "message"),
    [
        (np.array([1, "a"], object), "y holds object that are no labels"),
        (np.array([None, "a"], object), "y holds object that are no labels"),
        (np.array([b"a", b"b"]), "are no labels .*bytes"),
        (np.array([datetime.date(2020, 1, 1), datetime.date(2021, 1, 1)]), "Unknown label type"),
        (np.array([decimal.Decimal(1), decimal.Decimal(2)]), "Unknown label type"),
        (np.array(["2020", "NaT"], "M8[D]"), "y is NaT in row 1; leave out rows without a label"),
        (np.array([1.0, np.nan]), "Input y contains NaN"),
    ],
    ids=str,
)
def test_what_is_no_label_is_refused_when_it_is_fitted(labels, message):
    with pytest.raises(ValueError, match=message):
        classifier(epochs=1).fit(X, labels[[1, 0] * 600])


@pytest.mark.parametrize(
    "date", [np.datetime64("2020-01-01"), pd.Timestamp("2020-01-01"), datetime.date(2020, 1, 1)]
)
def test_a_class_weight_of_a_date_is_kept_in_a_file(date, tmp_path):
    y = np.array(["2020-01-01", "2021-02-03"], "M8[D]")[(Y.mean() < Y).astype(int)]
    classifier(epochs=1, class_weight={date: 2.0}).fit(X, y).save(tmp_path / "saved")
    again = KernelClassifier.load(tmp_path / "saved")
    assert again.get_params()["class_weight"] == {np.datetime64("2020-01-01"): 2.0}
    again.partial_fit(X, y)


def test_an_argument_that_no_file_can_hold_leaves_nothing_behind(tmp_path):
    model = classifier(epochs=1).fit(X, LABELS)
    model.class_weight = np.array([1j])[0]
    with pytest.raises(InputError, match="saved cannot be written"):
        model.save(tmp_path / "saved")
    assert not list(tmp_path.iterdir())


def test_a_ridge_shrinks_and_is_tuned_by_a_search():
    fits = [regressor(ridge=ridge).fit(X, Y) for ridge in (0.0, 0.3)]
    small, large = (float(np.square(fit.predict(X) - Y.mean()).mean()) for fit in reversed(fits))
    assert small < 0.9 * large
    search = GridSearchCV(regressor(), {"ridge": [1e-6, 1.0]}, cv=2).fit(X[:600], Y[:600])
    assert search.best_params_ == {"ridge": 1e-6}


@pytest.mark.parametrize("weight", ["balanced", {1: 20.0}])
def test_the_weight_of_a_class_buys_its_recall_and_is_kept_in_a_file(weight, tmp_path):
    noisy = Y + np.random.default_rng(0).standard_normal(1200) * 2 * Y.std()
    rare = (noisy > np.quantile(noisy, 0.93)).astype(int)
    plain, weighted = (classifier(class_weight=each).fit(X, rare) for each in (None, weight))
    recall = [float((fit.predict(X)[rare == 1] == 1).mean()) for fit in (plain, weighted)]
    assert recall[1] > recall[0] + 0.2
    weighted.save(tmp_path / "saved")
    again = KernelClassifier.load(tmp_path / "saved")
    assert again.get_params()["class_weight"] == weight
    assert np.array_equal(again.partial_fit(X, rare).predict(X), weighted.partial_fit(X, rare).predict(X))


def test_a_pickled_estimator_is_the_same():
    model = classifier().fit(X, LABELS)
    assert np.array_equal(pickle.loads(pickle.dumps(model)).predict(X), model.predict(X))


def test_the_model_of_a_run_predicts_but_cannot_be_trained_on(stores, tmp_path):
    ep3stream.fit(stores["classification"], tmp_path / "run", plain_config(solver={"centers": 50}))
    model = KernelClassifier.load(tmp_path / "run")
    assert model.score(stores["classification"]) > 0.6
    with pytest.raises(InputError, match="no training state"):
        model.partial_fit(stores["classification"])
    with pytest.raises(InputError, match=r"use KernelClassifier\.load"):
        KernelRegressor.load(tmp_path / "run")


def test_partial_fit_goes_through_parts_and_ends_where_the_losses_fall():
    model = regressor()
    for _ in range(3):
        for rows in np.array_split(np.random.default_rng(0).permutation(1200), 3):
            model.partial_fit(X[rows], Y[rows])
    assert len(model.losses_) == 9
    assert model.score(X, Y) > regressor().fit(X, Y).score(X, Y) - 0.05
    labels = classifier().partial_fit(X[:400], LABELS[:400], classes=["low", "middle", "high"])
    assert list(labels.partial_fit(X[400:], LABELS[400:]).classes_) == ["high", "low", "middle"]


def noisy(n_rows: int) -> tuple[np.ndarray, np.ndarray]:
    random = np.random.default_rng(3)
    x = random.normal(size=(n_rows, 4)).astype(np.float32)
    return x, np.sin(2 * x[:, 0]) + 2 * random.normal(size=n_rows)


@pytest.mark.parametrize(
    "wrap", [np.asarray, lambda each: da.from_array(each, chunks=500)], ids=["array", "Dask"]
)
def test_held_out_rows_choose_the_epoch(wrap):
    x, y = noisy(3000)
    late = regressor(n_centers=500, epochs=12, bandwidth=1.0)
    held, none = (
        clone(late).set_params(validation_fraction=share).fit(wrap(x), wrap(y)) for share in (0.1, 0)
    )
    truth = np.sin(2 * x[:, 0])
    errors = [np.square(np.asarray(model.predict(x)) - truth).mean() for model in (held, none)]
    assert errors[0] < 0.9 * errors[1]
    best = held._trained()._settled().progress.best
    assert best.step < held._trained()._settled().progress.step


def test_held_out_rows_choose_the_ridge_and_a_file_goes_on_with_it(tmp_path):
    x, y = noisy(1500)
    model = regressor(kernel="auto", n_centers=200, epochs=2, effects="none", random_state=1).fit(x, y)
    ridge = model._trained()._settled().progress.best.ridge
    assert ridge > 0  # Larger than the one that learning finds: most of the target is noise.
    model.save(tmp_path / "saved")
    again = KernelRegressor.load(tmp_path / "saved")
    assert np.array_equal(again.predict(x), model.predict(x))
    for each in (model, again):
        each.partial_fit(x[:700], y[:700])
    assert np.array_equal(again.predict(x), model.predict(x))
    progress = again._trained()._settled().progress
    assert progress.best.ridge == ridge
    assert torch.equal(again.model_.weights.T, progress.state.average[ridge : ridge + 1])


def test_few_rows_weighted_rows_and_parts_are_all_trained_on():
    x, y = noisy(1500)
    for model in (
        regressor().fit(x[:900], y[:900]),
        regressor().fit(x, y, np.ones(1500)),
        regressor().partial_fit(x, y),
    ):
        assert model._trained()._settled().progress.best is None


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (
            lambda s: regressor(validation_fraction=1.0).fit(X, Y),
            "validation_fraction is 1.0; use a number from 0",
        ),
        (lambda s: regressor(validation_fraction="a").fit(X, Y), "validation_fraction is 'a'"),
        (lambda s: classifier().fit(X, np.full(1200, "one")), "one class"),
        (lambda s: classifier().partial_fit(X, LABELS), "classes must be passed"),
        (lambda s: classifier().fit(X, LABELS).partial_fit(X, np.full(1200, "new")), "the label .*'new'"),
        (lambda s: regressor().fit(s["classification"]), "is for classification"),
        (lambda s: regressor().fit(s["regression"], Y), "leave y out"),
        (lambda s: regressor().fit(X, Y).predict(da.from_array(X[:, :3])), "expecting 5 features"),
        (lambda s: regressor().fit(da.from_array(X), da.from_array(Y[:-1])), "1200 rows and y 1199"),
        (lambda s: classifier(class_weight={"new": 2.0}).fit(X, LABELS), "the label 'new' of class_weight"),
        (
            lambda s: classifier(class_weight={LABELS[0]: 0}).fit(X, LABELS),
            f"class_weight of '{LABELS[0]}' is 0",
        ),
        (lambda s: classifier(class_weight={LABELS[0]: "2"}).fit(X, LABELS), "is '2'; use a positive"),
        (lambda s: KernelRegressor("laplacian").fit(X[:1], Y[:1]), "too few to measure a distance"),
        (lambda s: classifier(class_weight=2.0).fit(X, LABELS), "class_weight is 2.0"),
        (lambda s: regressor(n_centers=0).fit(X, Y), "n_centers is 0"),
        (lambda s: regressor(minutes=0).fit(X, Y), "minutes is 0; use None or a positive number"),
        (lambda s: regressor(minutes="2").fit(X, Y), "minutes is '2'"),
        (lambda s: regressor(minutes=1).partial_fit(X, Y), "partial_fit cannot be timed"),
        (lambda s: regressor(minutes=1).fit(X, Y, np.ones(1200)), "rows with sample_weight cannot be timed"),
        (lambda s: regressor(minutes=1).fit(da.from_array(X), da.from_array(Y)), "a Dask array cannot be"),
        (lambda s: regressor(epochs=-1).fit(X, Y), "epochs is -1"),
        (lambda s: regressor(scale="robust").fit(X, Y), "scale is 'robust'"),
        (lambda s: regressor(kernel="sinc").fit(X, Y), "kernel is 'sinc'"),
        (lambda s: regressor().fit(s["regression"]).score(s["regression"], None, [1.0]), "sample_weight"),
        (
            lambda s: regressor().fit(s["regression"], sample_weight=[1.0]),
            "sample_weight .* arrays in memory",
        ),
        (lambda s: regressor().fit(da.from_array(X), da.from_array(Y), np.ones(1200)), "arrays in memory"),
        (lambda s: regressor().fit(X, Y, np.zeros(1200)), "zero for every row|non-zero"),
        (lambda s: regressor().fit(X, Y, np.full(1200, -1.0)), "[Nn]egative"),
        (lambda s: classifier().fit(X, LABELS, LABELS == "low"), "one class"),
    ],
)
def test_what_does_not_fit_is_refused_by_name(call, message, stores):
    with pytest.raises(ValueError, match=message):
        call(stores)


def test_importing_ep3stream_needs_no_scikit_learn():
    code = """
import sys
class Hidden:
    def find_spec(self, name, path=None, target=None):
        if name.partition(".")[0] == "sklearn":
            raise ModuleNotFoundError(name)
sys.meta_path.insert(0, Hidden())
import ep3stream
from ep3stream import *
assert "KernelRegressor" in dir(ep3stream)
try:
    ep3stream.KernelRegressor
except ImportError as error:
    assert "pip install 'ep3stream[sklearn]'" in str(error), error
else:
    raise AssertionError("it was found")
"""
    subprocess.run([sys.executable, "-c", code], check=True)


def test_a_data_frame_gives_its_column_names_to_the_model():
    pandas = pytest.importorskip("pandas")
    frame, y = load_iris(return_X_y=True, as_frame=True)
    assert isinstance(frame, pandas.DataFrame)
    model = classifier().fit(frame, y)
    assert model.model_.feature_names == tuple(frame.columns)
    with pytest.raises(ValueError, match="feature names"):
        model.predict(frame[frame.columns[::-1]])


@pytest.mark.parametrize("estimator", [KernelRegressor, KernelClassifier])
def test_sparse_rows_give_what_the_same_dense_ones_give(estimator):
    x = np.random.default_rng(0).random((300, 6)).astype(np.float32)
    x[x < 0.7] = 0
    y = (x.sum(1) > 1).astype(int)
    dense, sparse = (
        estimator(n_centers=50, epochs=2, random_state=0).fit(rows, y) for rows in (x, csr_array(x))
    )
    assert np.array_equal(dense.predict(x), sparse.predict(csr_array(x)))
    assert sparse.partial_fit(csc_array(x[:100]), y[:100]).predict(x[:3]).shape == (3,)


def test_a_search_over_a_store_says_that_a_store_is_no_array(tmp_path):
    np.savez(tmp_path / "rows.npz", x=np.random.default_rng(0).random((60, 2)), y=np.arange(60) % 2)
    ep3stream.convert([tmp_path / "rows.npz"], tmp_path / "rows.zarr")
    split = ep3stream.open_store(tmp_path / "rows.zarr").split("train")
    with pytest.raises(TypeError, match=r"is a store, not an array: .* or search with `ep3stream tune`"):
        GridSearchCV(KernelClassifier(), {"bandwidth": [1.0, 2.0]}, cv=2).fit(split)


def test_an_estimator_saved_before_the_set_up_of_a_fit_was_its_own_predicts_the_same_and_trains_on():
    """fixtures/estimator-3: 160 smooth rows, 16 centers, state version 3, whose points were scaled."""
    folder = Path(__file__).parent / "fixtures" / "estimator-3"
    x, targets = smooth_rows(160)
    model = KernelRegressor.load(folder)
    expected = np.load(folder / "expected.npy", allow_pickle=False)
    np.testing.assert_allclose(model.predict(x[:20]), expected, rtol=1e-4)
    before = model.score(x, targets[:, 0])
    for _ in range(20):
        model.partial_fit(x, targets[:, 0])
    assert model.score(x, targets[:, 0]) > before
    assert len(model.losses_) == 22
