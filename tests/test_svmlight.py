from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.datasets import dump_svmlight_file

from ep3stream.config import ConvertConfig
from ep3stream.conversion.open_source import open_source
from ep3stream.errors import SourceError
from ep3stream.formats.source import START, RestartPosition, RowSource

rng = np.random.default_rng(0)
X = np.where(rng.random((80, 7)) < 0.4, rng.standard_normal((80, 7)).round(6), 0)
Y = rng.integers(-1, 3, 80)


def dump(path: Path, y: np.ndarray = Y, base: int = 1) -> Path:
    dump_svmlight_file(
        X, y, str(path), zero_based=base == 0, comment="two\nlines", query_id=np.arange(80) // 9
    )
    if path.suffix == ".gz":
        path.write_bytes(gzip.compress(path.read_bytes()))
    if path.suffix == ".zst":
        path.write_bytes(pa.Codec("zstd").compress(path.read_bytes(), asbytes=True))
    return path


def rows_of(
    source: RowSource, block_bytes: int = 1 << 20, start: RestartPosition = START
) -> tuple[np.ndarray, np.ndarray]:
    batches = list(source.batches(block_bytes, start))
    return np.concatenate([b.numeric[0] for b in batches]), np.concatenate([b.target for b in batches])


@pytest.mark.parametrize("name", ["t.svm", "t.libsvm.gz", "t.svmlight.zst"])
@settings(max_examples=12)
@given(block_bytes=st.integers(1, 9000), data=st.data())
def test_rows_are_those_that_were_written_from_any_place_on(
    tmp_path: Path, name: str, block_bytes: int, data: st.DataObject
) -> None:
    source = open_source(dump(tmp_path / name), ConvertConfig())
    x, y = rows_of(source, block_bytes)
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)
    batches = list(source.batches(block_bytes))
    start = batches[data.draw(st.integers(0, max(0, len(batches) - 2)))].next
    if start.row < 80:
        np.testing.assert_array_equal(rows_of(source, 777, start)[0], X[start.row :])
    assert (source.target.kind, source.expected_rows) == ("integer", 80)


def test_several_files_follow_each_other_and_features_may_be_stated(tmp_path: Path) -> None:
    dump(tmp_path / "a.svm", Y + 0.5, base=0)
    dump(tmp_path / "b.svm", Y + 0.5, base=0)
    source = open_source(tmp_path, ConvertConfig(features=9, index_base=0, task="regression"))
    x, y = rows_of(source, 500)
    np.testing.assert_array_equal(x, np.pad(np.vstack([X, X]), ((0, 0), (0, 2))))
    np.testing.assert_array_equal(y[:, 0], np.tile(Y + 0.5, 2))
    assert source.expected_rows is None


def test_labels_with_fractions_mean_regression(tmp_path: Path) -> None:
    assert open_source(dump(tmp_path / "t.svm", Y + 0.5), ConvertConfig()).target.kind == "number"


GOOD = "1 1:2 3:4\n\n-1 qid:3 2:0.5 # a comment: with 1:2\n"
BAD = {
    "text": (GOOD + "1 1:x\n", "row 3: 'x' is no number"),
    "several labels": (GOOD + "1,2 1:3\n", "row 3: '1,2' is no number"),
    "no index": (GOOD + "1 5\n", "row 3: is not `label index:value"),
    "two colons": (GOOD + "1 1:2:3 4\n", "row 3: is not `label"),
    "space at the colon": (GOOD + "1 1 :2\n", "row 3: is not `label"),
    "no value": (GOOD + "1 1:\n1 1:2\n", "row 3: is not `label"),
    "a colon alone": (":\n", "row 1: is not `label"),
    "index 0": (GOOD + "1 0:2\n", "row 3: 0 is no index counting from 1; take --index-base 0"),
    "index with a fraction": (GOOD + "1 1.5:2\n", "row 3: 1.5 is no index"),
    "the same index twice": (GOOD + "1 3:1 2:2 3:3\n", "row 3: states the same index twice"),
    "NUL": (GOOD + "1 1:\0\n", "row 3: holds a NUL byte"),
    "nothing": ("# only a comment\n", "states no feature"),
}


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize(("text", "message"), BAD.values(), ids=BAD)
def test_another_form_is_refused_by_row(tmp_path: Path, text: str, message: str, block_bytes: int) -> None:
    (tmp_path / "t.svm").write_text(text)
    with pytest.raises(SourceError, match=message) as caught:
        rows_of(open_source(tmp_path / "t.svm", ConvertConfig()), block_bytes)
    assert str(caught.value).startswith(f"{tmp_path / 't.svm'}: ")


def test_an_index_beyond_the_stated_features_is_named(tmp_path: Path) -> None:
    (tmp_path / "t.svm").write_text(GOOD)
    with pytest.raises(SourceError, match="row 1: index 3 is beyond 2 features; give more --features"):
        rows_of(open_source(tmp_path / "t.svm", ConvertConfig(features=2, task="regression")))


def test_a_truncated_file_is_an_error_and_never_fewer_rows(tmp_path: Path) -> None:
    data = dump(tmp_path / "t.svm.gz").read_bytes()
    for end in np.linspace(1, len(data) - 1, 20).astype(int):
        (tmp_path / "t.svm.gz").write_bytes(data[:end])
        with pytest.raises(SourceError, match=r"t\.svm\.gz"):
            rows_of(open_source(tmp_path / "t.svm.gz", ConvertConfig()))
