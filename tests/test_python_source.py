from __future__ import annotations

import time

import dask
import dask.array as da
import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.config import ConvertConfig
from ep3stream.conversion.open_source import open_source
from ep3stream.errors import SourceError
from ep3stream.formats.source import START, RestartPosition, RowSource

X = np.random.default_rng(0).standard_normal((53, 4))
Y = np.arange(53) % 5
TABLE = ConvertConfig(target="y")


def batches(sizes: tuple[int, ...] = (10, 0, 30, 13)) -> list[tuple[np.ndarray, np.ndarray]]:
    ends = np.cumsum(sizes)
    return [(X[end - size : end], Y[end - size : end]) for size, end in zip(sizes, ends, strict=True)]


def frame() -> pd.DataFrame:
    words = np.array(["a", "b", "c", "d", "e"])[Y]
    return pd.DataFrame({"a": X[:, 0], "word": words, "y": Y})


def rows_of(source: RowSource, block_bytes: int = 1 << 20, start: RestartPosition = START) -> np.ndarray:
    found = list(source.batches(block_bytes, start))
    assert [b.first_row for b in found] == [b.next.row - b.n_rows for b in found]
    x = [np.hstack([piece.reshape(b.n_rows, -1) for piece in b.numeric]) for b in found]
    y = [np.asarray(b.target).reshape(b.n_rows, 1) for b in found]
    return np.hstack([np.concatenate(x), np.concatenate(y)]) if found else np.empty((0, 0))


SOURCES = {
    "list": lambda: batches(),
    "function": lambda: lambda: iter(batches()),
    "tensors": lambda: [(torch.tensor(x), torch.tensor(y)) for x, y in batches()],
    "pair": lambda: (X, Y),
    "pair of tensors": lambda: (torch.tensor(X, requires_grad=True), torch.tensor(Y)),
    "dask": lambda: (da.from_array(X, chunks=(10, 2)), da.from_array(Y, chunks=7)),
}
TABLES = {
    "pandas": frame,
    "arrow": lambda: pa.Table.from_pandas(frame()),
    "dask": lambda: dd.from_pandas(frame(), npartitions=4),
}


@pytest.mark.parametrize("name", SOURCES)
@settings(max_examples=10)
@given(block_bytes=st.integers(1, 3000), start=st.integers(0, 52))
def test_arrays_and_batches_give_all_rows_from_any_start(name: str, block_bytes: int, start: int) -> None:
    source = open_source(SOURCES[name](), ConvertConfig())
    expected = np.column_stack([X, Y])
    np.testing.assert_array_equal(rows_of(source, block_bytes), expected)
    np.testing.assert_array_equal(rows_of(source, block_bytes, RestartPosition(0, start)), expected[start:])
    assert source.files == ()
    assert source.target.kind == "integer"


@pytest.mark.parametrize("name", TABLES)
@settings(max_examples=5)
@given(block_bytes=st.integers(1, 3000), start=st.integers(0, 52))
def test_tables_give_all_rows_from_any_start(name: str, block_bytes: int, start: int) -> None:
    source = open_source(TABLES[name](), TABLE)
    expected = np.column_stack([X[:, 0], Y])
    np.testing.assert_array_equal(rows_of(source, block_bytes), expected)
    np.testing.assert_array_equal(rows_of(source, block_bytes, RestartPosition(0, start)), expected[start:])
    assert [column.name for column in source.columns] == ["a", "word"]


def test_an_iterator_is_read_once_and_says_so_the_second_time() -> None:
    source = open_source(iter(batches()), ConvertConfig())
    np.testing.assert_array_equal(rows_of(source)[:, -1], Y)
    with pytest.raises(SourceError, match="this iterator has been read; give a list"):
        rows_of(source)


def test_a_reader_of_record_batches_is_read_once() -> None:
    source = open_source(pa.Table.from_pandas(frame()).to_reader(), TABLE)
    assert len(rows_of(source)) == 53
    with pytest.raises(SourceError, match="can be read only once"):
        rows_of(source)


def test_dask_computes_no_block_before_the_start_and_few_ahead() -> None:
    computed = []

    def block(index: int) -> np.ndarray:
        computed.append(index)
        return np.full((10, 2), index)

    x = da.concatenate([da.from_delayed(dask.delayed(block)(k), (10, 2), float) for k in range(9)])
    source = open_source((x, da.zeros(90, chunks=10)), ConvertConfig())
    rows = source.batches(1 << 20, RestartPosition(0, 45))
    assert next(rows).n_rows == 5
    time.sleep(0.3)  # time enough to compute more
    assert set(computed) == {4, 5, 6}
    rows.close()  # type: ignore[attr-defined]
    assert not {0, 1, 2, 3, 8} & set(computed)


@pytest.mark.parametrize(
    ("source", "message"),
    [
        (5, "int is neither files"),
        ([], "nothing to convert"),
        ([(X, Y), (X[:, :2], Y)], r"batch 1 has shapes \(53, 2\) and \(53,\) but the first"),
        ([(X, Y), (X, Y * 0.5)], "batch 1 has y of float64 but the first of int64"),
        ([(X, Y[:5])], "give as many y as x"),
        ([X], r"batch 0 is a ndarray; give pairs \(x, y\)"),
        ([(X[:0], Y[:0])], "there are none with rows"),
        ((X, Y[:5]), "give a matching pair"),
        ((X[:, 0], Y), "x must be"),
        ((X.astype(str), Y), "not numbers"),
        ((X[:0], Y[:0]), "has no rows"),
        (
            (da.from_array(X)[da.from_array(Y) > 2], da.from_array(Y)),
            r"call its compute_chunk_sizes\(\) first",
        ),
    ],
)
def test_what_is_no_source_is_refused_in_one_line(source: object, message: str) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        rows_of(open_source(source, ConvertConfig()))
    assert "\n" not in str(caught.value)


def test_a_fingerprint_tells_other_shapes_apart() -> None:
    prints = [
        open_source(source, ConvertConfig()).fingerprint for source in ((X, Y), (X[:9], Y[:9]), batches())
    ]
    assert prints[0] != prints[1] != prints[2]
    assert open_source(frame(), TABLE).fingerprint != open_source(frame()[["a", "y"]], TABLE).fingerprint
