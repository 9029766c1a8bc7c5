"""What becomes of missing values, labels, codes and rounding on the way into rows, and how the encoder resumes."""

from __future__ import annotations

import json
import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoding import Encoded, encode, learn_means, write
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.config import ConvertConfig
from ep3stream.conversion.categories import CategoryCodes, DistinctValues
from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.expand import Expansion
from ep3stream.conversion.numbers import ColumnMeans, fill, missing_cells
from ep3stream.conversion.table_source import open_tables
from ep3stream.errors import SourceError
from ep3stream.formats.source import START, BatchOrigin, FeatureColumn, RowSource, SourceBatch, TargetColumns

GAPS = "n,color,m,y\n1,red,5,10\n,blue,6,20\n3,,nan,30\n5,red,7,\n"


def test_rows_with_missing_values_are_dropped_and_counted_by_column(tmp_path: Path) -> None:
    found = encode(tmp_path / "t", GAPS, missing="drop")
    assert found.names == ["n", "color=red", "m"]  # blue is in dropped rows alone
    assert (found.x.tolist(), found.y.tolist()) == ([[1, 1, 5]], [[10]])
    assert found.encoder.report() == {"dropped_rows": 3, "missing": {"color": 1, "m": 1, "n": 1, "y": 1}}


def test_missing_numbers_become_the_mean_and_missing_texts_a_category_of_their_own(tmp_path: Path) -> None:
    found = encode(tmp_path / "t", GAPS.replace("7,\n", "7,40\n"), missing="mean")
    assert found.names == [
        *("n", "n (missing)", "color=blue", "color=red", "color=(missing)", "m", "m (missing)")
    ]
    np.testing.assert_array_equal(found.x[:, :2], [[1, 0], [3, 1], [3, 0], [5, 0]])
    np.testing.assert_array_equal(found.x[:, 5:], [[5, 0], [6, 0], [6, 1], [7, 0]])
    assert found.x[:, 4].tolist() == [0, 0, 1, 0]
    report = found.encoder.report()
    assert report == {"missing": {"color": 1, "m": 1, "n": 1}, "fills": {"m": 6, "n": 3}}
    fills = {column["name"]: column.get("fill") for column in found.columns["columns"]}
    assert fills == {"n": 3, "n (missing)": None, "color": None, "m": 6, "m (missing)": None}


def test_the_mean_is_that_of_the_first_split_and_filled_cells_are_counted_by_feature(tmp_path: Path) -> None:
    source = open_tables(
        [write(tmp_path / "t", "n,c,y\n1,a,0\n,a,0\n9,b,0\n")], ConvertConfig(target="y", categories="onehot")
    )
    encoder = RowEncoder.build(source, ConvertConfig(missing="mean"))
    (rows,) = map(encoder.encode, source.batches(1 << 20))
    assert not encoder.is_complete
    learn_means(encoder, [rows[:2]])
    x, _, filled = Expansion.build(source, encoder).expand(rows)
    assert x[:, :2].tolist() == [[1, 0], [1, 1], [9, 0]]
    assert filled is not None
    assert filled.sum(0).tolist() == [1, 0, 0, 0]


@pytest.mark.parametrize(
    ("table", "missing", "message"),
    [
        (
            GAPS,
            "error",
            "column 'n', row 2: the value is missing; fill it in, or take --missing auto or drop",
        ),
        ("n,y\n1,a\n2,\n", "error", "column 'y', row 2: the label is missing; .*--missing drop"),
        ("n,y\n1,2\n2,\n", "error", "column 'y', row 2: the value is missing; .*--missing drop"),
        ("n,c,y\n1,a,1\n2,,2\n", "error", "column 'c', row 2: the text is missing"),
        ("n,y\n1,2\n,3\ninf,4\n", "drop", r"column 'n', row 3: the value is not finite \(inf\)"),
        ("n,y\n,2\n-inf,3\n", "mean", r"column 'n', row 2: the value is not finite \(-inf\)"),
        ("n,m,y\n,1,2\n1,,3\n", "drop", "none of the 2 rows is left"),
        (
            {"n": [None, float("nan")], "y": [1.0, 2]},
            "mean",
            "'n' has no value in any row of the first split",
        ),
        ("n,y\n1,a\n2,a\n", "error", "every row has the label 'a'"),
        ("n,y\n1,b\n2,a\n,c\n1,\n", {"y": "error"}, "'y', row 4: the label is missing"),
    ],
)
def test_what_cannot_be_filled_or_dropped_is_refused_by_name(
    tmp_path: Path, table: Any, missing: Any, message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        encode(tmp_path / "t", table, missing=missing)
    assert "\n" not in str(caught.value)


def test_an_empty_text_counts_as_missing_in_typed_files_too(tmp_path: Path) -> None:
    found = encode(tmp_path / "t", {"c": ["a", "", None], "y": [1.0, 2.0, 3.0]}, missing="drop")
    assert found.y.tolist() == [[1]]
    assert found.encoder.report()["missing"] == {"c": 2}


@pytest.mark.parametrize("encoding", ["onehot", "codes"])
def test_numbers_and_booleans_can_be_categories_in_the_order_of_their_values(
    tmp_path: Path, encoding: str
) -> None:
    table = {"zip": [10, 9, 10], "ok": [True, False, True], "x": [0.5, -1.5, 2.0], "y": [1.0, 2, 3]}
    found = encode(tmp_path / "t", table, category=["zip", "ok", "x"], categories=encoding)
    values = [column["values"] for column in found.columns["columns"]]
    assert values == [[9, 10], ["false", "true"], [-1.5, 0.5, 2.0]]
    if encoding == "codes":
        assert found.names == ["zip", "ok", "x"]
        assert found.x.tolist() == [[1, 1, 1], [0, 0, 0], [1, 1, 2]]
    else:
        assert found.names[:3] == ["zip=9", "zip=10", "ok=false"]
        np.testing.assert_array_equal(found.x.argmax(axis=1), [1, 0, 1])


def test_codes_that_float16_cannot_hold_are_refused(tmp_path: Path) -> None:
    table = {"c": [f"u{i}" for i in range(2049)], "y": np.zeros(2049)}
    assert encode(tmp_path / "t", table, categories="codes").x.max() == 2048
    with pytest.raises(SourceError, match="column 'c' has more than 2048"):
        encode(tmp_path / "t", table, categories="codes", dtype="float16")
    with pytest.raises(SourceError, match=r"'c' has more than 1000 .*identifier"):
        encode(tmp_path / "t", table)


@pytest.mark.parametrize(
    ("labels", "names"),
    [
        ([2**31, -(2**40), 7], ["-1099511627776", "7", "2147483648"]),
        ([2**53 + 1, 2**53, 2**62 + 1], [str(2**53), str(2**53 + 1), str(2**62 + 1)]),
        (np.array([2**64 - 1, 1, 2**64 - 2], np.uint64), ["1", str(2**64 - 2), str(2**64 - 1)]),
        ([1.0, -3.0, 2.0], ["-3", "1", "2"]),
    ],
)
def test_integer_labels_of_any_size_are_classes_of_their_own(
    tmp_path: Path, labels: Any, names: list[str]
) -> None:
    found = encode(tmp_path / "t", {"n": [0.0, 1.0, 2.0], "y": labels}, task="classification")
    assert list(found.expansion.class_names or ()) == names
    assert [int(names[label]) for label in found.y] == [int(label) for label in labels]


def test_large_labels_of_csv_stay_apart_beside_a_missing_one(tmp_path: Path) -> None:
    text = f"n,y\n1,{2**53}\n2,{2**53 + 1}\n3,\n"
    found = encode(tmp_path / "t", text, task="classification", missing="drop")
    assert found.expansion.class_names == (str(2**53), str(2**53 + 1))


@pytest.mark.parametrize("label", [0.5, 2.0**53, float("inf")])
def test_labels_that_are_no_exact_whole_numbers_are_refused(tmp_path: Path, label: float) -> None:
    with pytest.raises(SourceError, match="column 'y', row 2: the label is no whole number below"):
        encode(tmp_path / "t", {"n": [1.0, 2.0], "y": [1.0, label]}, task="classification")


def test_too_many_classes_are_refused_with_the_remedy(tmp_path: Path) -> None:
    table = {"n": np.zeros(10_001), "y": np.arange(10_001)}
    with pytest.raises(SourceError, match=r"more than 10000 .*--task regression"):
        encode(tmp_path / "t", table, task="classification")


def test_the_rounding_of_float16_is_measured_and_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    rng = np.random.default_rng(0)
    fine, offset = rng.standard_normal(1000), 1000 + 0.1 * rng.standard_normal(1000)
    fine[:3] = 1e-9
    with caplog.at_level(logging.WARNING):
        found = encode(tmp_path / "t", {"fine": fine, "offset": offset, "y": fine}, dtype="float16")
        report = found.encoder.report()["rounding"]
    stored = found.x.astype(float)
    sizes = np.abs(np.column_stack([fine, offset]))
    relative = np.where(stored != 0, np.abs(stored - np.column_stack([fine, offset])) / sizes, 0)
    assert report["max_relative_error"] == pytest.approx(relative.max(), rel=1e-12)
    assert report["column"] == ["fine", "offset"][int(relative.max(axis=0).argmax())]
    assert report["underflows"] == 3
    assert "column 'offset': rounding to float16" in caplog.text
    assert "'fine'" not in caplog.text
    assert "rounding" not in encode(tmp_path / "t", {"fine": fine, "y": fine}).encoder.report()


@pytest.mark.parametrize("dtype", ["float32", "float16"])
@pytest.mark.parametrize("bad", [np.nan, np.inf, -np.inf])
@settings(max_examples=25)
@given(data=st.data())
def test_one_bad_number_anywhere_is_noticed(data: st.DataObject, bad: float, dtype: str) -> None:
    n_rows, n_columns = data.draw(st.integers(1, 3000)), data.draw(st.integers(1, 70))
    columns = [np.full(n_rows, 7.0) for _ in range(n_columns)]
    out = np.empty((n_rows, n_columns), dtype)
    assert fill(out, columns)
    assert (out == 7).all()
    columns[data.draw(st.integers(0, n_columns - 1))][data.draw(st.integers(0, n_rows - 1))] = bad
    assert not fill(out, columns)


@settings(max_examples=30)
@given(cuts=st.lists(st.integers(0, 5000), max_size=5), n_columns=st.integers(1, 3))
def test_means_have_the_same_bits_wherever_batches_end(cuts: list[int], n_columns: int) -> None:
    rng = np.random.default_rng(1)
    # So wide a range that the order of the additions shows.
    x = (rng.standard_normal((5000, n_columns)) * 10 ** rng.uniform(-9, 9, (5000, 1))).astype(np.float32)
    x[::7, 0] = np.nan
    whole, cut = ColumnMeans(n_columns), ColumnMeans(n_columns)
    whole.add(x)
    for piece in np.split(x, sorted(cuts)):
        cut.add(piece)
        state, cut = json.loads(json.dumps(cut.state())), ColumnMeans(n_columns)
        cut.restore(state)
    np.testing.assert_array_equal(whole.means(), cut.means())
    np.testing.assert_allclose(whole.means(), np.nanmean(x.astype(float), axis=0), rtol=1e-9)


def test_every_kind_of_nan_becomes_the_same() -> None:
    out = np.array([[np.nan], [-np.nan], [1]], np.float32)
    assert missing_cells(out, [out[:, 0]], ["n"], BatchOrigin("t", 0)).tolist() == [[True], [True], [False]]
    assert len(np.unique(out.view(np.uint32)[:2])) == 1


def read(source: RowSource, config: ConvertConfig, stops: Sequence[int]) -> Encoded:
    """As an interrupted conversion does: after the batches `stops` all is begun again from the saved state."""
    encoder, position, parts = RowEncoder.build(source, config), START, []
    for stop in (*stops, 10**9):
        state, encoder = json.loads(json.dumps(encoder.state())), RowEncoder.build(source, config)
        encoder.restore(state)
        batches = source.batches(64, position)
        for _, batch in zip(range(stop), batches, strict=False):
            parts.append(encoder.encode(batch))
            position = batch.next
    learn_means(encoder, parts)
    expansion = Expansion.build(source, encoder)
    x = np.concatenate([expansion.expand(rows)[0] for rows in parts])
    return Encoded(expansion, encoder, source, x, np.concatenate([rows.y for rows in parts]))


@pytest.mark.parametrize("missing", ["mean", "drop"])
@pytest.mark.parametrize("dtype", ["float32", "float16"])
def test_an_encoder_restored_from_its_state_goes_on_as_if_never_stopped(
    tmp_path: Path, missing: str, dtype: str
) -> None:
    rng = np.random.default_rng(2)
    table = {
        "n": pa.array(rng.standard_normal(200), mask=rng.random(200) < 0.1),
        "c": pa.array([f"c{i}" for i in rng.integers(0, 9, 200)], mask=rng.random(200) < 0.1),
        "y": np.arange(200.0),
    }
    config = ConvertConfig(target="y", missing=missing, dtype=dtype)  # type: ignore[arg-type]
    source = open_tables([write(tmp_path / "t", table)], config)
    whole, stopped = read(source, config, []), read(source, config, [3, 1, 11])
    np.testing.assert_array_equal(whole.x, stopped.x)
    np.testing.assert_array_equal(whole.y, stopped.y)
    assert whole.columns == stopped.columns
    assert whole.encoder.report() == stopped.encoder.report()
    assert whole.encoder.state() == stopped.encoder.state()


def test_words_tell_missing_values_alike_and_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    found = []
    for order in ([0, 1, 2, 3], [3, 1, 0, 2]):
        lines = ["1,red,0", ",blue,1", "-0.0,,2", "0,red,3"]
        text = "n,c,y\n" + "".join(lines[i] + "\n" for i in order)
        source = open_tables([write(tmp_path / "t", text)], ConvertConfig(target="y"))
        encoder = RowEncoder.build(source, ConvertConfig(missing="mean"))
        (rows,) = map(encoder.encode, source.batches(1 << 20))
        found.append(encoder.words(rows)[np.argsort(order)])
    np.testing.assert_array_equal(found[0], found[1])
    assert found[0][2, 0] == found[0][3, 0] == 0


def test_values_come_in_the_order_of_the_rows_whatever_that_of_their_dictionary() -> None:
    cells = pa.DictionaryArray.from_arrays(pa.array([2, 0, None, 2, 1, 0]), ["a", "b", "c", "d"])
    distinct = DistinctValues.of(cells)
    assert list(distinct.present()) == [(-1, "(missing)"), (2, "c"), (0, "a"), (1, "b")]


def test_each_batch_may_have_a_dictionary_of_its_own_and_new_values() -> None:
    codes, where = CategoryCodes("c", 10, "none"), BatchOrigin("t", 0)
    found = []
    for indices, dictionary in [
        ([1, 0, 1], ["a", "b", "unused"]),
        ([0, 1, None], ["a", "b"]),
        ([0, 1, 2], ["b", "unused", "a"]),
        ([2, 0, None], ["a", "b", "unused"]),
    ]:
        cells = pa.DictionaryArray.from_arrays(pa.array(indices, pa.int32()), dictionary)
        found.append(codes.encode(DistinctValues.of(cells), where).tolist())
    assert codes.state() == ["b", "a", "(missing)", "unused"]
    assert found == [[0, 1, 0], [1, 0, 2], [0, 3, 1], [3, 1, 2]]


def test_a_known_value_that_is_called_like_a_gap_is_told_in_any_batch(
    caplog: pytest.LogCaptureFixture,
) -> None:
    codes, told = CategoryCodes("c", 10, "none"), []
    for number, values in enumerate((["a", None], ["a", "a"], ["a", "(missing)"], ["(missing)", "a"])):
        cells = DistinctValues.of(pa.array(values).dictionary_encode())
        assert codes.encode(cells, BatchOrigin("t", 10 * number)).tolist() == [
            int(value == "a") for value in values
        ]
        told.append(len(caplog.records))
    assert told == [0, 0, 1, 1]
    assert "row 22: '(missing)': the text is what the gaps" in caplog.text


def test_values_no_row_has_are_not_categories() -> None:
    cells = pa.DictionaryArray.from_arrays(pa.array([0, None, 2], pa.int8()), ["a", "b", ""])
    distinct = DistinctValues.of(cells)
    assert distinct.indices.tolist() == [0, -1, -1]
    batch = SourceBatch("t", "t", 0, 0, 3, 0, START, (), (cells,), np.zeros(3))

    class Texts:
        name, columns, target, files, label_values = (
            "t",
            (FeatureColumn("c", "category"),),
            TargetColumns(("y",), "number"),
            (),
            None,
        )

    source: RowSource = Texts()  # type: ignore[assignment]
    encoder = RowEncoder.build(source, ConvertConfig(missing="mean"))
    encoder.encode(batch)
    assert encoder.categories[0].sorted_values() == ["a", "(missing)"]
