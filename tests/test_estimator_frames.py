"""Estimators take DataFrames with texts, categories, dates and gaps, as a conversion takes them."""

from __future__ import annotations

import pickle

import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
from sklearn.base import clone
from sklearn.compose import make_column_transformer
from sklearn.model_selection import GridSearchCV
from sklearn.pipeline import make_pipeline
from sklearn.preprocessing import StandardScaler

import ep3stream
from ep3stream import ConvertConfig, InputError, KernelClassifier, KernelConfig, KernelRegressor

pytestmark = pytest.mark.usefixtures("quick_columns")

random = np.random.default_rng(0)
N = 300
FRAME = pd.DataFrame(
    {
        "when": pd.Timestamp("2026-03-01") + pd.to_timedelta(random.integers(0, 9000, N), "h"),
        "city": random.choice(["Oslo", "Bergen", "Hamar"], N),
        "price": random.normal(size=N),
        "is_new": random.random(N) < 0.5,
        "stamp": 1.77e9 + np.arange(N),
        "kind": pd.Categorical(random.choice(["a", "b"], N)),
    }
)
Y = FRAME["price"] + (FRAME["city"] == "Oslo") + FRAME["is_new"] + (FRAME["kind"] == "a")
GAPPY = FRAME.copy()
GAPPY.loc[::7, "price"] = np.nan
GAPPY.loc[::11, "city"] = None
GAPPY.loc[3, "when"] = pd.NaT
SMALL = {"n_centers": 50, "epochs": 3, "random_state": 0}


def regressor(**changes) -> KernelRegressor:
    return KernelRegressor(**{"kernel": "laplacian"} | SMALL | changes)


class Stream:
    """A table that is a stream of arrow, as that of polars is, with categories of string views."""

    def __init__(self, frame: pd.DataFrame) -> None:
        table = pa.Table.from_pandas(frame, preserve_index=False)
        place, kind = table.schema.get_field_index("kind"), table["kind"].combine_chunks()
        views = pa.DictionaryArray.from_arrays(kind.indices, kind.dictionary.cast(pa.string_view()))
        self.table = table.set_column(place, "kind", views)
        self.columns, self.shape = table.column_names, table.shape

    def __len__(self) -> int:
        return len(self.table)

    def __arrow_c_stream__(self, schema=None):
        return self.table.__arrow_c_stream__(schema)


@pytest.fixture(scope="module")
def stores(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stores")
    for name, frame in {"full": FRAME, "gappy": GAPPY}.items():
        for task, y in {"regression": Y, "classification": Y > 1}.items():
            config = ConvertConfig(target="y", shuffle=False)
            ep3stream.convert(frame.assign(y=y), folder / f"{name}-{task}.zarr", config)
    return folder


@pytest.mark.parametrize("kernel", ["laplacian", "product"])
@pytest.mark.parametrize(("name", "frame"), [("full", FRAME), ("gappy", GAPPY)])
@pytest.mark.parametrize("make", [KernelRegressor, KernelClassifier])
def test_a_frame_is_fitted_as_the_store_of_that_frame(stores, kernel, name, frame, make):
    task, y = ("regression", Y) if make is KernelRegressor else ("classification", Y > 1)
    of_store = make(kernel, **SMALL).fit(stores / f"{name}-{task}.zarr")
    of_frame = make(kernel, **SMALL).fit(frame, y)
    expected = of_store.predict(stores / f"{name}-{task}.zarr")
    assert np.array_equal(of_frame.predict(frame), expected)
    assert np.array_equal(of_store.predict(frame), expected)
    assert of_frame.model_.feature_names == of_store.model_.feature_names
    assert of_frame.model_.inputs.n_codes == of_store.model_.inputs.n_codes
    mine, theirs = (each.model_.frames.record["columns"] for each in (of_frame, of_store))
    assert mine["columns"] == theirs["columns"]


def test_attributes_are_those_of_the_frame_and_the_model_those_of_its_features():
    model = regressor().fit(GAPPY, Y)
    assert list(model.feature_names_in_) == list(FRAME.columns)
    assert model.n_features_in_ == 6
    assert "price (missing)" in model.model_.feature_names
    assert "when.weekday" in model.model_.feature_names
    assert model.model_.offsets.x.any()  # Of the stamp, whose seconds float32 does not hold.


PLAIN = pd.DataFrame(
    {"a": random.normal(size=N), "b": random.integers(0, 9, N), "c": random.random(N) < 0.5, "d": 1.77e9 + np.arange(N)}
)  # fmt: skip


@pytest.mark.parametrize(
    "change",
    [
        lambda t: t,
        lambda t: t.astype({"b": "Int64", "c": "boolean"}),
        lambda t: t.astype({"a": object}),
        lambda t: t.set_axis(range(4), axis=1),
        lambda t: pa.Table.from_pandas(t),
    ],
    ids=["as it is", "extension types", "objects", "numbered", "arrow"],
)
def test_a_frame_of_numbers_alone_is_the_array_of_them(change):
    x, y = PLAIN.to_numpy(np.float64), PLAIN["a"] * PLAIN["b"]
    frame = change(PLAIN)
    model = regressor().fit(frame, y)
    expected = regressor().fit(x, y)
    assert model.losses_ == expected.losses_
    assert model.model_.frames is None
    assert np.array_equal(model.predict(frame), expected.predict(x))
    with pytest.raises(ValueError, match="contains NaN"):
        expected.predict(np.full((1, 4), np.nan))


def test_a_gap_alone_makes_a_frame_of_numbers_a_table(caplog):
    frame = PLAIN.assign(a=PLAIN["a"].where(PLAIN["b"] > 0))
    model = regressor().fit(frame, PLAIN["b"])
    assert model.model_.feature_names == ("a", "a (missing)", "b", "c", "d")
    assert "they become the mean" in caplog.text
    assert np.isfinite(model.predict(frame)).all()


def test_columns_are_found_by_name_and_unknown_categories_counted(caplog):
    model = regressor().fit(FRAME, Y)
    expected = model.predict(FRAME)
    assert np.array_equal(model.predict(FRAME[FRAME.columns[::-1]].assign(more=1)), expected)
    assert "no column 'more', so left out" in caplog.text
    assert np.array_equal(model.predict(FRAME.astype({"city": "category", "kind": str})), expected)
    other = model.predict(FRAME.assign(city="Moss"))
    assert "the fitted DataFrame does not have: 'city' in 300 rows ('Moss' 300)" in caplog.text
    assert not np.array_equal(other, expected)
    assert np.isfinite(model.predict(GAPPY)).all()
    with pytest.raises(InputError, match="has no column 'city' of the model"):
        model.predict(FRAME.drop(columns="city"))
    for array in (FRAME.to_numpy(), np.zeros((3, 6)), np.zeros((3, 12))):
        with pytest.raises(InputError, match="X is a ndarray, but KernelRegressor was fitted to a DataFrame"):
            model.predict(array)
        with pytest.raises(InputError, match="X is a ndarray"):
            model.partial_fit(array, Y[: len(array)])


@pytest.mark.parametrize("make", [KernelRegressor, KernelClassifier])
def test_later_parts_keep_the_columns_of_the_first_and_so_does_a_file(make, tmp_path):
    y = Y if make is KernelRegressor else (Y > 1).astype(int)
    classes = {} if make is KernelRegressor else {"classes": [0, 1]}
    model = make("product", **SMALL).partial_fit(GAPPY[:200], y[:200], **classes)
    model.partial_fit(FRAME[200:].assign(city="Moss"), y[200:])
    names = model.model_.feature_names
    model.save(tmp_path / "saved")
    again = make.load(tmp_path / "saved")
    assert again.model_.feature_names == names
    assert list(again.feature_names_in_) == list(FRAME.columns)
    mixed = GAPPY.assign(city="Moss")[FRAME.columns[::-1]]
    assert np.array_equal(again.predict(mixed), model.predict(mixed))
    loaded = ep3stream.load(tmp_path / "saved").predict(GAPPY)
    assert loaded.dtype == model.predict(GAPPY).dtype
    assert np.array_equal(loaded, model.predict(GAPPY))
    for each in (model, again):
        each.partial_fit(FRAME[FRAME.columns[::-1]], y)
    assert np.array_equal(again.predict(GAPPY), model.predict(GAPPY))
    again.save(tmp_path / "more")
    assert np.array_equal(make.load(tmp_path / "more").predict(GAPPY), model.predict(GAPPY))


def test_an_estimator_of_a_store_keeps_its_columns_in_a_file(stores, tmp_path):
    model = regressor().fit(stores / "gappy-regression.zarr")
    model.save(tmp_path / "saved")
    again = KernelRegressor.load(tmp_path / "saved")
    for each in (model, again):
        each.partial_fit(GAPPY, Y)
    assert np.array_equal(again.predict(GAPPY), model.predict(GAPPY))


def test_a_frame_s_model_goes_on_with_a_store_of_the_same_features(stores):
    model = regressor().fit(FRAME, Y)
    store = stores / "full-regression.zarr"
    assert np.array_equal(model.predict(store), model.predict(FRAME))
    assert len(model.partial_fit(store).losses_) == 4
    with pytest.raises(ValueError, match="features"):
        model.partial_fit(stores / "gappy-regression.zarr")


@pytest.mark.parametrize("wrap", [pa.Table.from_pandas, Stream], ids=["arrow", "stream"])
def test_other_tables_are_read_as_pandas(wrap):
    expected = regressor().fit(GAPPY, Y).predict(GAPPY)
    model = regressor().fit(wrap(GAPPY), Y)
    assert np.array_equal(model.predict(wrap(GAPPY)), expected)
    assert np.array_equal(model.predict(GAPPY), expected)


def test_categories_of_numbers_are_categories_and_columns_may_be_numbered():
    frame = pd.DataFrame({0: pd.Categorical(random.choice([10, 20, 30], N)), 1: random.normal(size=N)})
    y = (frame[0].astype(int) == 20) * 1.0
    model = regressor(kernel="product").fit(frame, y)
    assert model.model_.frames.columns["columns"][0]["values"] == [10, 20, 30]
    assert model.score(frame, y) > 0.9
    assert not hasattr(model, "feature_names_in_")
    with pytest.raises(InputError, match="X is a ndarray"):
        model.predict(frame.to_numpy())


@pytest.mark.parametrize("kernel", ["laplacian", "product"])
@pytest.mark.parametrize("scale", ["auto", "none"])
def test_rows_of_a_frame_may_have_weights(kernel, scale):
    frame, weights = GAPPY.drop(columns=["stamp", "when"]), np.arange(N) % 3
    model = regressor(kernel=kernel, scale=scale, epochs=20).fit(frame, Y, weights)
    kept = frame[weights > 0], Y[weights > 0]
    assert model.score(*kept) > 0.7
    plain = regressor(kernel=kernel, scale=scale).fit(*kept)
    assert model.model_.feature_names == plain.model_.feature_names
    assert model.model_.inputs.n_codes == plain.model_.inputs.n_codes
    assert (sum(model.model_.inputs.n_codes) > 0) == (kernel == "laplacian")
    assert model.model_.inputs.scale[2] == 1  # Of the mark of a gap.


def test_auto_is_the_kernel_that_a_fit_takes_and_stays_it_in_a_file(tmp_path):
    model, product = (regressor(kernel=kernel).fit(FRAME, Y) for kernel in ("auto", "product"))
    assert np.array_equal(model.predict(FRAME), product.predict(FRAME))
    model.save(tmp_path / "saved")
    again = KernelRegressor.load(tmp_path / "saved")
    assert again.get_params()["kernel"] == "auto"
    for each in (model, again):
        each.partial_fit(FRAME[:50], Y[:50])
    assert np.array_equal(again.predict(FRAME), model.predict(FRAME))
    with_power = regressor(kernel=KernelConfig(power=2.0)).fit(FRAME[:90], Y[:90])
    assert with_power.model_.kernel.name == "product"
    for laplacian in (regressor(kernel="auto", bandwidth=3.0).fit(FRAME, Y), model.fit(FRAME[:90], Y[:90])):
        assert laplacian.model_.kernel.name == "laplacian"


def test_scikit_learn_s_ways_hold():
    model = clone(regressor(kernel="product"))
    search = GridSearchCV(model, {"n_centers": [20, 50]}, cv=2).fit(GAPPY, Y)
    assert search.best_score_ > 0
    again = pickle.loads(pickle.dumps(search.best_estimator_))
    assert np.array_equal(again.predict(GAPPY), search.predict(GAPPY))
    scaled = make_column_transformer(
        (StandardScaler(), ["price"]), remainder="passthrough", verbose_feature_names_out=False
    ).set_output(transform="pandas")
    pipeline = make_pipeline(scaled, model).fit(GAPPY, Y)
    assert list(pipeline[-1].feature_names_in_) == ["price", *FRAME.columns.drop("price")]
    assert pipeline.score(GAPPY, Y) > 0


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t.assign(price=np.inf), "column 'price', row 1: .*not finite"),
        (lambda t: t.assign(price=np.nan), "'price' has no value in any row"),
        (lambda t: t.assign(city=None), "'city' is empty from row 1 on"),
        (lambda t: t.assign(city=[["a"]] * N), "'city' holds list"),
        (lambda t: t[:0], "has a header but no rows"),
    ],
)
def test_what_no_conversion_takes_is_refused_by_name(change, message):
    with pytest.raises(ValueError, match=message):
        regressor().fit(change(FRAME), Y[: len(change(FRAME))])
    with pytest.raises(ValueError, match="inconsistent numbers of samples"):
        regressor().fit(FRAME, Y[1:])


@pytest.mark.parametrize("tails", ["codes for gaps", "lognormal"])
def test_columns_with_long_tails_tell_as_much_as_without(tails):
    random = np.random.default_rng(0)
    x = random.standard_normal((1500, 3))
    y = np.sin(2 * x[:, 0]) + x[:, 1]
    columns = np.exp(3 * x) if tails == "lognormal" else np.where(random.random(x.shape) < 0.02, 99_999, x)
    for kernel in ("laplacian", "product"):
        made = KernelRegressor(kernel, n_centers=200, epochs=5, random_state=0, effects="none")
        assert made.fit(columns[:1000], y[:1000]).score(columns[1000:], y[1000:]) > 0.75
