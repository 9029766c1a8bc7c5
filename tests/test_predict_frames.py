"""A model takes DataFrames by the names of their columns, and gives labels as they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from small_stores import plain_config

import ep3stream
from ep3stream import (
    ConvertConfig,
    InputError,
    KernelClassifier,
    KernelModel,
    KernelRegressor,
)
from ep3stream.prediction.predict import is_table, predict_tables

random = np.random.default_rng(0)
N = 60
RAW = pd.DataFrame(
    {
        "when": pd.Timestamp("2026-03-01") + pd.to_timedelta(random.integers(0, 900, N), "h"),
        "city": random.choice(["Oslo", "Bergen", "Hamar"], N),
        "price": random.normal(size=N),
        "is_new": random.random(N) < 0.5,
    }
)
VALUE = RAW["price"] + (RAW["city"] == "Oslo") + RAW["is_new"]
PLAIN = pd.DataFrame(random.normal(size=(N, 3)), columns=["a", "b", "c"])


def fitted(folder: Path, table: pd.DataFrame, y: object, **settings: object) -> Path:
    ep3stream.convert(table.assign(y=y), folder / "s.zarr", ConvertConfig(target="y", **settings))
    return ep3stream.fit(folder / "s.zarr", folder / "run", plain_config(solver={"centers": 30}))


@pytest.fixture(scope="module")
def raw(tmp_path_factory) -> Path:
    return fitted(tmp_path_factory.mktemp("raw"), RAW, VALUE)


@pytest.fixture(scope="module")
def plain(tmp_path_factory) -> Path:
    return fitted(tmp_path_factory.mktemp("plain"), PLAIN, PLAIN["a"] + 3 * PLAIN["b"])


@pytest.mark.parametrize(
    "frame",
    [
        PLAIN,
        PLAIN[["c", "a", "b"]],
        PLAIN.assign(extra="x")[["extra", "b", "c", "a"]],
        PLAIN.astype("float32")[["b", "a", "c"]],
        pa.Table.from_pandas(PLAIN[["c", "b", "a"]]),
        pa.Table.from_pandas(PLAIN[["c", "b", "a"]]).to_batches()[0],
        PLAIN.set_axis(range(3), axis=1),
        PLAIN.set_index(np.arange(N) + 7)[["b", "a", "c"]],
        PLAIN.to_numpy(),
    ],
    ids=["same", "reordered", "extra", "float32", "arrow", "batch", "unnamed", "index", "array"],
)  # fmt: skip
def test_columns_of_numbers_are_found_by_name(plain, frame, caplog):
    model = ep3stream.load(plain)
    expected = model.predict(PLAIN.to_numpy())
    np.testing.assert_allclose(model.predict(frame), expected, atol=1e-5)
    np.testing.assert_allclose(model.decision_function(frame)[:, 0], expected, atol=1e-5)
    assert ("no column 'extra', so left out" in caplog.text) == ("extra" in getattr(frame, "columns", ()))


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.drop(columns="b"), "has no column 'b' of the model; did you mean"),
        (lambda t: t.rename(columns={"a": "A"}), "has no column 'a' of the model"),
        (lambda t: t.set_axis(["x", "y", "z"], axis=1), "has no column 'a', 'b', 'c' of the model"),
        (lambda t: t[["a", "b"]].set_axis(range(2), axis=1), "the model takes .n, 3. features"),
        (lambda t: t.assign(b="x"), "'x' is no number|holds string"),
    ],
)
def test_frames_that_do_not_fit_are_refused_by_name(plain, change, message):
    with pytest.raises(InputError, match=message):
        ep3stream.load(plain).predict(change(PLAIN))


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: t[["is_new", "price", "when", "city"]],
        lambda t: t.assign(y=0.0),
        lambda t: t.assign(city=t["city"].astype("category")),
        lambda t: t.assign(when=t["when"].astype("datetime64[s]")),
        lambda t: t.assign(when=t["when"].astype(str)),
        lambda t: t.assign(is_new=t["is_new"].astype(int)),
        lambda t: pa.Table.from_pandas(t),
    ],
    ids=["same", "reordered", "target", "category", "seconds", "texts", "flags", "arrow"],
)
def test_columns_of_the_store_s_files_are_read_as_those_were(raw, change, tmp_path):
    pq.write_table(pa.Table.from_pandas(RAW), tmp_path / "rows.parquet")
    predict_tables(raw, tmp_path / "rows.parquet", tmp_path / "out.csv")
    expected = pd.read_csv(tmp_path / "out.csv")["y"].to_numpy()
    np.testing.assert_allclose(ep3stream.load(raw).predict(change(RAW)), expected, atol=1e-4)
    if isinstance(change(RAW), pd.DataFrame):
        np.testing.assert_allclose(KernelRegressor.load(raw).predict(change(RAW)), expected, atol=1e-4)


def test_features_may_be_given_by_their_own_names(raw):
    store = ep3stream.open_store(raw.parent / "s.zarr")
    names = list(store.manifest.feature_names)
    x = store.split("train").read_rows(np.arange(N))[0] + store.manifest.offsets.x
    model = ep3stream.load(raw)
    frame = pd.DataFrame(x, columns=names)[names[::-1]]
    np.testing.assert_allclose(model.predict(frame), model.predict(x), atol=1e-4)
    with pytest.raises(InputError, match="has no column 'city' of the model"):
        model.predict(RAW.drop(columns="city"))
    with pytest.raises(InputError, match="'city', row 1: 'Moss' is not among"):
        model.predict(RAW.assign(city="Moss"))
    assert model.predict(RAW[:0]).shape == (0,)


def test_a_model_of_arrays_takes_frames_by_position_with_the_number_checked(tmp_path):
    x = PLAIN.to_numpy()
    ep3stream.convert((x, x[:, 0]), tmp_path / "s.zarr")
    run = ep3stream.fit(tmp_path / "s.zarr", tmp_path / "run", plain_config(solver={"centers": 30}))
    model = ep3stream.load(run)
    np.testing.assert_allclose(model.predict(PLAIN), model.predict(x), atol=1e-5)
    named = PLAIN.set_axis(["x2", "x0", "x1"], axis=1)
    np.testing.assert_allclose(model.predict(named), model.predict(x[:, [1, 2, 0]]), atol=1e-5)
    with pytest.raises(InputError, match="has no column"):
        model.predict(PLAIN[["a", "b"]])


def test_kernel_model_finds_the_columns_of_a_store_by_name(plain):
    model = KernelModel(PLAIN.to_numpy()[:20], "gaussian", 1, bandwidth=1.0, task="regression")
    model.fit_epoch(ep3stream.open_store(plain.parent / "s.zarr").split("train"))
    expected = model.predict(PLAIN.to_numpy())
    np.testing.assert_allclose(model.predict(PLAIN[["c", "b", "a"]]), expected, atol=1e-5)


# -- Labels

LABELS = {
    "whole numbers": (np.where(PLAIN["a"] > 0, 3, -1), {"task": "classification"}),
    "0 and 1": ((PLAIN["a"] > 0).astype(int), {"task": "classification"}),
    "small integers": ((PLAIN["a"] > 0).astype("int8"), {"task": "classification"}),
    "unsigned": ((PLAIN["a"] > 0).astype("uint16"), {"task": "classification"}),
    "many digits": (np.where(PLAIN["a"] > 0, 10, 9), {"task": "classification"}),
    "whole floats": ((PLAIN["a"] > 0).astype(float), {"task": "classification"}),
    "booleans": ((PLAIN["a"] > 0), {}),
    "texts": (np.where(PLAIN["a"] > 0, "yes", "no"), {}),
    "texts of numbers with zeros": (np.where(PLAIN["a"] > 0, "01", "2"), {}),
    "three classes": (np.digitize(PLAIN["a"], [-0.4, 0.4]) * 100, {"task": "classification"}),
}  # fmt: skip


@pytest.mark.parametrize("kind", LABELS)
def test_labels_come_back_as_they_were(kind, tmp_path):
    y, settings = LABELS[kind]
    y = np.asarray(y)
    run = fitted(tmp_path, PLAIN, y, **settings)
    x = PLAIN
    estimator = KernelClassifier.load(run)
    fresh = KernelClassifier(n_centers=30, random_state=0).fit(tmp_path / "s.zarr")
    for predicted in (ep3stream.load(run).predict(PLAIN), estimator.predict(x), fresh.predict(x)):
        assert predicted.dtype.kind == ("i" if y.dtype.kind in "uf" else y.dtype.kind)
        assert set(predicted) <= set(y.tolist())
        assert (predicted == y).mean() > 0.55
    assert estimator.score(x, y if y.dtype.kind != "f" else y.astype(int)) > 0.55
    assert estimator.classes_.tolist() == sorted(set(y.tolist()))
    fresh.partial_fit(tmp_path / "s.zarr")
    fresh.save(tmp_path / "saved")
    assert KernelClassifier.load(tmp_path / "saved").classes_.tolist() == fresh.classes_.tolist()
    assert ep3stream.load(tmp_path / "saved").predict(x).dtype.kind == fresh.classes_.dtype.kind


def test_class_weights_of_a_store_are_given_by_label_or_by_name(tmp_path):
    fitted(tmp_path, PLAIN, (PLAIN["a"] > 0).astype(int), task="classification")
    models = [
        KernelClassifier(n_centers=30, random_state=0, class_weight=weights).fit(tmp_path / "s.zarr")
        for weights in ({0: 1.0, 1: 5.0}, {"0": 1.0, "1": 5.0})
    ]
    one, other = (model.decision_function(PLAIN) for model in models)
    np.testing.assert_array_equal(one, other)


# -- Several tables


def test_predict_takes_several_files_directories_and_patterns(plain, tmp_path):
    for number, part in enumerate((PLAIN[:20], PLAIN[20:50], PLAIN[50:], PLAIN[:0])):
        (tmp_path / "d").mkdir(exist_ok=True)
        pq.write_table(pa.Table.from_pandas(part, preserve_index=False), tmp_path / "d" / f"{number}.parquet")
    expected = ep3stream.load(plain).predict(PLAIN)
    sources = (tmp_path / "d", tmp_path / "d" / "*.parquet", sorted((tmp_path / "d").iterdir()))
    for number, source in enumerate(sources):
        assert predict_tables(plain, source, tmp_path / f"{number}.csv") == N
        np.testing.assert_allclose(pd.read_csv(tmp_path / f"{number}.csv")["y"], expected, atol=1e-5)
    assert [is_table(place) for place in (tmp_path / "d", tmp_path / "*.csv", plain, plain.parent / "s.zarr")] == [
        True, True, False, False,
    ]  # fmt: skip


def test_predict_reads_svmlight_and_folders_that_name_columns(tmp_path):
    x = PLAIN.to_numpy().round(3)
    lines = (f"{row[0]} " + " ".join(f"{j}:{v}" for j, v in enumerate(row)) for row in x)
    (tmp_path / "t.svm").write_text("\n".join(lines) + "\n")
    ep3stream.convert(tmp_path / "t.svm", tmp_path / "s.zarr", ConvertConfig(index_base=0))
    run = ep3stream.fit(tmp_path / "s.zarr", tmp_path / "run", plain_config(solver={"centers": 30}))
    assert predict_tables(run, tmp_path / "t.svm", tmp_path / "out.csv") == N
    np.testing.assert_allclose(
        pd.read_csv(tmp_path / "out.csv")["y"], ep3stream.load(run).predict(x), atol=1e-5
    )
    for key in (1, 2):
        (tmp_path / "p" / f"a={key}").mkdir(parents=True)
        PLAIN.assign(y=key * PLAIN["b"])[["b", "c", "y"]].to_parquet(
            tmp_path / "p" / f"a={key}" / "r.parquet"
        )
    ep3stream.convert(tmp_path / "p", tmp_path / "p.zarr", ConvertConfig(target="y"))
    run = ep3stream.fit(tmp_path / "p.zarr", tmp_path / "p-run", plain_config(solver={"centers": 30}))
    assert predict_tables(run, tmp_path / "p", tmp_path / "p.csv") == 2 * N
    file = tmp_path / "p" / "a=2" / "r.parquet"
    assert predict_tables(run, file, tmp_path / "q.csv", partitions=True) == N
    whole, part = (pd.read_csv(tmp_path / f"{name}.csv")["y"].to_numpy() for name in "pq")
    np.testing.assert_allclose(whole[N:], part, atol=1e-5)
