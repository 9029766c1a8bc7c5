"""Objects of Python as people have them: read as they are meant, or refused in one line that leaves nothing behind."""

from __future__ import annotations

import datetime
import decimal
from collections.abc import Callable
from typing import Any

import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import scipy.sparse
import torch

import ep3stream
from ep3stream import ConvertConfig
from ep3stream.errors import SourceError

N = 40
X = np.random.default_rng(0).normal(size=(N, 3)).astype("f4")
Y = np.arange(N) / 8
FRAME = pd.DataFrame(X)
TENSOR = torch.from_numpy(X)
NAMES = [("a", "x"), ("a", "z"), ("y", "")]
TUPLES = FRAME.set_axis(pd.MultiIndex.from_tuples(NAMES), axis=1)
DATED = FRAME.set_axis(pd.date_range("2020", periods=3), axis=1)
PARTS = dd.from_pandas(FRAME, npartitions=2)
DATES = [f"2020-01-0{day} 00:00:00" for day in (1, 2, 3)]
TEXTS, TEXT_NAMES = ["u", "v"] * 20, ["a"]
CODES = np.arange(N) % 2
VIEWS = pa.DictionaryArray.from_arrays(pa.array(CODES), pa.array(["u", "v"], pa.string_view()))


def with_column(values: Any) -> pd.DataFrame:
    return pd.DataFrame({"a": values, "y": Y})


def arrow(values: Any) -> pa.Table:
    return pa.table({"a": values, "y": pa.array(Y)})


class Stream:
    """What polars, DuckDB and others hand over."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        return self._table.__arrow_c_stream__(requested_schema)


class BrokenStream:
    def __arrow_c_stream__(self, requested_schema: Any = None) -> Any:
        raise RuntimeError("no rows today")


def blocks(array: Any) -> Any:
    return da.from_array(array, chunks=(10, *array.shape[1:]))


def rows_of(source: Any, target: str | None, path: Any) -> tuple[list[str], np.ndarray]:
    config = ConvertConfig(target=target, shuffle=False, missing="error")
    manifest = ep3stream.convert(source, path, config)
    with ep3stream.open_store(path) as store:
        reader = store.split("train")
        return list(manifest.feature_names), reader.read_rows(np.arange(reader.info.n_rows))[0]


HALVES = [(0, 1), (1, 2)] * (N // 2)
HALF_CODES = np.arange(N) % 2
MONTHS = pd.PeriodIndex(["2026-01", "2026-02"] * (N // 2), freq="M")

TABLES: dict[str, tuple[Any, str, list[str], Any]] = {
    "integer names": (FRAME, "2", ["0", "1"], X[:, :2]),
    "float names": (FRAME.set_axis([0.5, 1.5, 2.5], axis=1), "2.5", ["0.5", "1.5"], X[:, :2]),
    "boolean names": (FRAME.set_axis([True, False, 3], axis=1), "3", ["True", "False"], X[:, :2]),
    "None as a name": (FRAME.set_axis(pd.Index([None, 1, "y"], dtype=object), axis=1), "y", ["None", "1"], X[:, :2]),
    "tuples as names": (TUPLES, str(NAMES[2]), [*map(str, NAMES[:2])], X[:, :2]),
    "dates as names": (FRAME.set_axis(pd.date_range("2020", periods=3), axis=1), DATES[2], DATES[:2], X[:, :2]),
    "Dask, integer names": (dd.from_pandas(FRAME, npartitions=3), "2", ["0", "1"], X[:, :2]),
    "one index for all rows": (FRAME.set_index(pd.Index([7] * N)), "2", ["0", "1"], X[:, :2]),
    "Int64": (with_column(pd.array(range(N), dtype="Int64")), "y", ["a"], np.arange(N)),
    "boolean": (with_column(pd.array([True, False] * 20, dtype="boolean")), "y", ["a"], np.arange(N) % 2 == 0),
    "string": (with_column(pd.array(TEXTS, dtype="string")), "y", TEXT_NAMES, CODES),
    "categories": (with_column(pd.Categorical(TEXTS, ["v", "w", "u"])), "y", TEXT_NAMES, CODES),
    "intervals": (with_column(pd.arrays.IntervalArray.from_tuples(HALVES)), "y", ["a"], HALF_CODES),
    "categories of intervals": (with_column(pd.cut(np.arange(N), [-1, 19, N])), "y", ["a"], np.arange(N) > 19),
    "categories of periods": (with_column(pd.Categorical(MONTHS)), "y", ["a"], np.arange(N) % 2),
    "sparse": (with_column(pd.arrays.SparseArray(np.arange(N) * 1.0)), "y", ["a"], np.arange(N)),
    "sparse integers": (with_column(pd.arrays.SparseArray([0, 1] * 20)), "y", ["a"], np.arange(N) % 2),
    "float16": (with_column(np.arange(N).astype("f2")), "y", ["a"], np.arange(N)),
    "longdouble": (with_column(np.arange(N).astype(np.longdouble)), "y", ["a"], np.arange(N)),
    "arrow's integers": (with_column(pd.array(range(N), dtype="int64[pyarrow]")), "y", ["a"], np.arange(N)),
    "numbers as objects": (with_column(np.array([1, 2.5] * 20, object)), "y", ["a"], [1, 2.5] * 20),
    "decimals as objects": (with_column([decimal.Decimal("1.5")] * N), "y", ["a"], [1.5] * N),
    "durations": (with_column(pd.to_timedelta(np.arange(N), unit="h")), "y", ["a"], np.arange(N) * 3600),
    "decimal256": (arrow(pa.array([decimal.Decimal("1.5")] * N, pa.decimal256(50, 2))), "y", ["a"], [1.5] * N),
    "half": (arrow(pa.array(np.arange(N).astype("f2"))), "y", ["a"], np.arange(N)),
    "large strings": (arrow(pa.array(TEXTS, pa.large_string())), "y", TEXT_NAMES, CODES),
    "string views": (arrow(pa.array(TEXTS, pa.string_view())), "y", TEXT_NAMES, CODES),
    "string views as categories": (arrow(VIEWS), "y", TEXT_NAMES, CODES),
    "dictionary of numbers": (arrow(pa.array([1.5, 2.5] * 20).dictionary_encode()), "y", ["a"], [1.5, 2.5] * 20),
    "stream": (Stream(arrow(pa.array(X[:, 0]))), "y", ["a"], X[:, 0]),
}  # fmt: skip


def test_periods_are_the_times_at_which_they_begin(tmp_path):
    as_times = rows_of(with_column(MONTHS.to_timestamp()), "y", tmp_path / "times")
    names, rows = rows_of(with_column(MONTHS), "y", tmp_path / "periods")
    assert names == as_times[0]
    np.testing.assert_array_equal(rows, as_times[1])


@pytest.mark.parametrize(("source", "target", "names", "x"), TABLES.values(), ids=TABLES)
def test_tables_are_read_whatever_their_names_and_types(tmp_path, source, target, names, x):
    found, rows = rows_of(source, target, tmp_path / "s")
    assert found == names
    np.testing.assert_array_equal(rows, np.asarray(x, "f4").reshape(N, -1))


ARRAYS: dict[str, tuple[Any, Any]] = {
    "a tensor with a gradient": ((TENSOR.clone().requires_grad_(), Y), X),
    "bfloat16": ((TENSOR.bfloat16(), Y), TENSOR.bfloat16().float()),
    "float8": ((TENSOR.to(torch.float8_e4m3fn), Y), TENSOR.to(torch.float8_e4m3fn).float()),
    "a sparse tensor": ((TENSOR.to_sparse(), Y), X),
    "a negated view": ((torch._neg_view(TENSOR), Y), -X),
    "an expanded tensor": ((TENSOR[:1].expand(N, 3), Y), np.tile(X[:1], (N, 1))),
    "csr": ((scipy.sparse.csr_matrix(X), Y), X),
    "coo": ((scipy.sparse.coo_array(X), Y), X),
    "a sparse y": ((X, scipy.sparse.csc_array(Y[:, None])), X),
    "a matrix": ((np.matrix(X), Y), X),
    "backwards": ((X[::-1], Y), X[::-1]),
    "big-endian": ((X.astype(">f8"), Y), X),
    "longdouble": ((X.astype(np.longdouble), Y), X),
    "images": ((X.reshape(N, 1, 3, 1), Y), X),
    "a DataFrame and a Series": ((FRAME, pd.Series(Y)), X),
    "a DataFrame of Float32": ((FRAME.astype("Float32"), Y), X),
    "ragged batches": (lambda: iter([(X[:0], Y[:0]), (X[:7], Y[:7]), (X[7:9], Y[7:9]), (X[9:], Y[9:])]), X),
    "batches of other types": ([(X[:5], Y[:5]), (X[5:].astype("f8"), Y[5:].astype("f4"))], X),
    "batches of lists": ([(X.tolist(), Y.tolist())], X),
    "batches of sparse rows": ([(scipy.sparse.csr_array(X), torch.tensor(Y).bfloat16())], X),
}  # fmt: skip


@pytest.mark.parametrize(("source", "x"), ARRAYS.values(), ids=ARRAYS)
def test_arrays_and_batches_are_read_whatever_holds_them(tmp_path, source, x):
    np.testing.assert_array_equal(
        rows_of(source, None, tmp_path / "s")[1], np.asarray(x, "f4").reshape(N, -1)
    )


def failing() -> Any:
    yield X[:20], Y[:20]
    raise KeyError("of the caller's own")


REFUSED: dict[str, tuple[Any, str | None, str]] = {
    "names twice": (FRAME.set_axis(["a", "a", "y"], axis=1), "y", "has two columns called 'a'"),
    "names twice as texts": (FRAME.set_axis([1, "1", "y"], axis=1), "y", r"called '1' \(1 and '1'\); rename one"),
    "names twice in Dask": (PARTS.rename(columns={0: 1}), "2", "called '1'"),
    "names twice in a stream": (Stream(pa.Table.from_arrays([pa.array(Y)] * 2, ["a", "a"])), "a", "'a' twice"),
    "numbers and texts": (with_column([1, "u"] * 20), "y", "column 'a' of object cannot be read"),
    "complex": (with_column(np.arange(N) * 1j), "y", "column 'a' of complex128 cannot be read"),
    "bytes": (with_column([b"u"] * N), "y", "column 'a' holds binary"),
    "lists": (with_column([[1, 2]] * N), "y", "column 'a' holds list"),
    "dictionaries": (with_column([{"u": 1}] * N), "y", "column 'a' holds struct"),
    "nothing": (with_column([None] * N), "y", "column 'a' is empty"),
    "no rows": (pd.DataFrame({"a": [], "y": []}), "y", "no rows"),
    "run ends": (arrow(pa.RunEndEncodedArray.from_arrays([N], [1.5])), "y", "holds run_end_encoded"),
    "binary views": (arrow(pa.array([b"u"] * N, pa.binary_view())), "y", "holds binary_view"),
    "maps": (arrow(pa.array([[("u", 1)]] * N, pa.map_(pa.string(), pa.int64()))), "y", "holds map"),
    "a stream that fails": (BrokenStream(), "y", r"cannot be read \(no rows today\)"),
    "batches that fail": (failing, None, "batches: cannot be read .KeyError: .of the caller"),
    "batches of other widths": ([(X, Y), (X[:, :2], Y)], None, "batch 1 has shapes"),
    "ragged rows": ([([[1, 2], [3]], [1.5, 2.5])], None, "x of batch 0: is no array"),
    "batches of three": ([(X, Y, Y)], None, "batch 0 is a tuple; give pairs"),
    "no batch": (lambda: iter([]), None, "there are none with rows"),
    "a tensor without data": ((TENSOR.to("meta"), Y), None, "x: is no array"),
    "a complex tensor": ((TENSOR.to(torch.complex64), Y), None, "x: holds complex64"),
    "a complex sparse matrix": ((scipy.sparse.csr_matrix(X * 1j), Y), None, "x: holds complex64"),
    "dates as x": ((np.zeros((N, 2), "M8[D]"), Y), None, r"holds datetime64\[D\]"),
    "unknown chunks": ((PARTS.values, Y), None, "chunks of unknown length"),
    "blocks that are shorter": ((blocks(X).map_blocks(lambda b: b[:5], dtype="f4"), Y), None, "block 0 has the shape"),
    "blocks of texts": ((blocks(X).map_blocks(lambda b: b.astype(str), dtype="f4"), Y), None, "holds <U32"),
    "blocks that fail": ((blocks(X).map_blocks(lambda b: 1 / 0, dtype="f4", meta=X[:0]), Y), None, "ZeroDivisionError"),
    "partitions that fail": (PARTS.map_partitions(lambda p: p / {}, meta=FRAME), "2", "cannot be read"),
    "partitions of other columns": (PARTS.map_partitions(lambda p: p.iloc[:, :2], meta=FRAME), "2", "cannot be read"),
    "a number": (5, None, "int is neither files, arrays"),
    "an object": (object(), None, "object is neither files, arrays"),
    "one array": (X, None, "batch 0 is a ndarray"),
}  # fmt: skip


@pytest.mark.parametrize(("source", "target", "message"), REFUSED.values(), ids=REFUSED)
def test_what_cannot_be_read_is_refused_in_one_line_and_leaves_nothing(tmp_path, source, target, message):
    with pytest.raises(SourceError, match=message) as caught:
        rows_of(source, target, tmp_path / "s")
    assert "\n" not in str(caught.value)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize("of", [lambda frame: frame, lambda frame: dd.from_pandas(frame, npartitions=2)])
def test_an_index_with_a_name_is_told_to_be_left_out(tmp_path, caplog, of: Callable[[Any], Any]):
    rows_of(of(FRAME.set_index(pd.Index(range(N), name="id"))), "2", tmp_path / "s")
    assert "its index 'id' is left out; reset_index() makes a column of it" in caplog.text
    caplog.clear()
    rows_of(of(FRAME), "2", tmp_path / "t")
    assert "index" not in caplog.text


def test_zoned_times_and_dates_as_objects_are_dates(tmp_path):
    frame = pd.DataFrame(
        {"t": pd.date_range("2020", periods=N, tz="UTC"), "d": [datetime.date(2020, 3, 1)] * N, "y": Y}
    )
    names, rows = rows_of(frame, "y", tmp_path / "s")
    assert [name for name in names if name.startswith("d.")] == [
        "d.days",
        "d.yearday",
        "d.month",
        "d.weekday",
    ]
    assert rows[0][names.index("t.days")] == 18262
    assert rows[0][names.index("d.yearday")] == 61
    assert rows[0][names.index("d.month")] == 2  # The code of March.


def test_an_infinite_category_is_refused_and_leaves_nothing(tmp_path):
    table = pa.table({"k": [1.5, float("inf")], "y": [1.0, 2.0]})
    with pytest.raises(ep3stream.InputError):
        ep3stream.convert(table, tmp_path / "s", ConvertConfig(target="y", category=["k"]))
    assert not list(tmp_path.iterdir())
