from __future__ import annotations

import gzip
import itertools
import zipfile
from collections.abc import Callable
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from ep3stream.config import ConvertConfig, Task
from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.expand import Expansion
from ep3stream.conversion.find_files import find_files
from ep3stream.conversion.open_source import open_source
from ep3stream.errors import SourceError
from ep3stream.formats.source import RowSource

TABLE = "a,color,b,y\n1,red,0.5,10\n2,blue,-1e3,20\n3,red,7,30.5\n"
X = np.array([[1, 0, 1, 0.5], [2, 1, 0, -1000], [3, 0, 1, 7]], np.float32)
Y = np.array([[10], [20], [30.5]], np.float32)


def write_zip(path: Path, *members: tuple[str, str]) -> Path:
    with zipfile.ZipFile(path, "w", zipfile.ZIP_DEFLATED) as archive:
        for name, text in members:
            archive.writestr(name, text)
    return path


def write_text(path: Path, text: str) -> Path:
    path.write_bytes(gzip.compress(text.encode()) if path.suffix == ".gz" else text.encode())
    return path


def write_parquet(path: Path, **columns: object) -> Path:
    pq.write_table(pa.table(columns), path)
    return path


def write_table(path: Path) -> Path:
    """TABLE in the format of the path's suffix."""
    if path.suffix == ".zip":
        return write_zip(path, ("in/table.csv", TABLE), ("notes.txt", "no table"))
    if path.suffix == ".parquet":
        color = pa.array(["red", "blue", "red"]).dictionary_encode()
        return write_parquet(path, a=[1, 2, 3], color=color, b=[0.5, -1e3, 7], y=[10, 20, 30.5])
    return write_text(path, TABLE.replace(",", "\t") if ".tsv" in path.name else TABLE)


def open_tables(*paths: Path, target: str | None = "y", task: Task | None = None) -> RowSource:
    return open_source(paths, ConvertConfig(target=target, task=task, categories="onehot"))


def read_all(source: RowSource, block_bytes: int = 1 << 20) -> tuple[Expansion, np.ndarray, np.ndarray]:
    encoder = RowEncoder.build(source, ConvertConfig(missing="error"))
    parts = [encoder.encode(batch) for batch in source.batches(block_bytes)]
    expansion = Expansion.build(source, encoder)
    expanded = [expansion.expand(rows)[:2] for rows in parts]
    x, y = (np.concatenate(column) for column in zip(*expanded, strict=True))
    return expansion, x, y


@pytest.mark.parametrize("name", ["t.csv", "t.CSV", "t.tsv", "t.csv.gz", "t.tsv.gz", "t.zip", "t.parquet"])
def test_every_table_format_gives_the_same_rows(tmp_path: Path, name: str) -> None:
    expansion, x, y = read_all(open_tables(write_table(tmp_path / name)))
    assert expansion.feature_names == ("a", "color=blue", "color=red", "b")
    np.testing.assert_array_equal(x, X)
    np.testing.assert_array_equal(y, Y)


def test_several_files_follow_each_other_and_may_order_their_columns_differently(tmp_path: Path) -> None:
    first = write_table(tmp_path / "1.csv")
    second = write_text(tmp_path / "2.csv", "y,b,color,a\n40,4,green,-4\n")
    expansion, x, y = read_all(open_tables(first, second, write_table(tmp_path / "3.parquet")))
    assert expansion.feature_names == ("a", "color=blue", "color=green", "color=red", "b")
    assert y[:, 0].tolist() == [10, 20, 30.5, 40, 10, 20, 30.5]
    assert x[3].tolist() == [-4, 0, 1, 0, 4]


def test_a_directory_and_a_pattern_stand_for_their_tables_in_order(tmp_path: Path) -> None:
    for name in ("b.csv", "a.csv", "c.parquet", ".hidden.csv"):
        write_table(tmp_path / name)
    (tmp_path / "notes.txt").write_text("no table")
    names = [file.path.name for file in find_files([tmp_path])]
    names += [file.path.name for file in find_files([tmp_path / "*.csv"])]
    assert names == ["a.csv", "b.csv", "c.parquet", "a.csv", "b.csv"]


def test_integers_that_go_on_as_fractions_stay_numbers(tmp_path: Path) -> None:
    lines = "".join(f"{i},{i}\n" for i in range(600_000))  # more than the block that types are inferred from
    path = write_text(tmp_path / "t.csv", "a,y\n" + lines + "0.25,1\n")
    _, x, _ = read_all(open_tables(path))
    assert len(x) == 600_001
    assert x[-1, 0] == 0.25


def test_booleans_are_0_and_1_as_features_and_classes_as_target(tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.csv", "a,y\ntrue,false\nfalse,true\n")
    expansion, x, y = read_all(open_tables(path))
    assert expansion.class_names == ("false", "true")
    assert (x[:, 0].tolist(), y.tolist()) == ([1, 0], [0, 1])


def test_integer_labels_become_classes_in_numeric_order_when_asked(tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.csv", "a,y\n1,10\n2,9\n3,-1\n4,9\n")
    expansion, _, y = read_all(open_tables(path, task="classification"))
    assert expansion.class_names == ("-1", "9", "10")
    assert y.tolist() == [2, 1, 0, 1]


def test_quoted_delimiters_and_line_breaks_belong_to_the_text_across_blocks_too(tmp_path: Path) -> None:
    path = write_text(tmp_path / "t.csv", "a,y\n" + '"x,\n1",1\n' * 600_000 + "z,2\n")
    expansion, _, y = read_all(open_tables(path))
    assert expansion.feature_names == ("a=x,\n1", "a=z")
    assert len(y) == 600_001


@pytest.mark.parametrize("order", ["C", "F"])
@pytest.mark.parametrize("dtype", ["uint8", "int64", "float16", "float64", "bool", ">f4"])
def test_arrays_of_any_number_type_are_read_exactly(tmp_path: Path, dtype: str, order: str) -> None:
    x = np.asarray(np.arange(60).reshape(20, 3) % 7, dtype, order=order)
    np.save(tmp_path / "x.npy", x)
    np.save(tmp_path / "y.npy", np.arange(40.0).reshape(20, 2))
    _, x_read, y_read = read_all(
        open_source([], ConvertConfig(), tmp_path / "x.npy", tmp_path / "y.npy"), block_bytes=50
    )
    np.testing.assert_array_equal(x_read, x.astype(np.float32))
    np.testing.assert_array_equal(y_read, np.arange(40).reshape(20, 2))


@pytest.mark.parametrize(
    ("y", "names", "ids"),
    [
        (np.array([5, 3, 5], np.uint8), ("3", "5"), [1, 0, 1]),
        (np.array([[5], [30], [5]]), ("5", "30"), [0, 1, 0]),
        (np.array([True, False, True]), ("false", "true"), [1, 0, 1]),
    ],
)
def test_integer_arrays_are_class_labels(
    tmp_path: Path, y: np.ndarray, names: tuple[str, ...], ids: list[int]
) -> None:
    np.save(tmp_path / "x.npy", np.zeros((3, 2)))
    np.save(tmp_path / "y.npy", y)
    expansion, _, read = read_all(open_source([], ConvertConfig(), tmp_path / "x.npy", tmp_path / "y.npy"))
    assert (expansion.class_names, read.tolist()) == (names, ids)


ROWS = "a,y\n1,2\n3,4\n"
BAD_TEXTS = {
    "no such file": ("t.csv", None, "there is no such file"),
    "empty file": ("t.csv", "", "is empty"),
    "blank lines only": ("t.csv", "\n\n", "cannot be read|is empty"),
    "header only": ("t.csv", "a,y\n", "empty|no rows"),
    "ragged row": ("t.csv", ROWS + "5\n", "row 3 has 1 fields but the header 2"),
    "ragged gz row": ("t.csv.gz", ROWS + "5,6,7\n", "row 3 has 3 fields but the header 2"),
    "missing number": ("t.csv", ROWS + ",6\n", "column 'a', row 3: the value is missing"),
    "missing target": ("t.csv", ROWS + "5,\n", "column 'y', row 3: the value is missing"),
    "infinite number": ("t.csv", ROWS + "inf,6\n", r"column 'a', row 3: the value is not finite \(inf\)"),
    "number beyond float32": ("t.csv", ROWS + "1e39,6\n", "column 'a', row 3: 1e\\+39 is beyond 3.4"),
    "missing text": ("t.csv", "a,y\nred,1\n,2\n", "column 'a', row 2: the text is missing"),
    "empty column": ("t.csv", "a,y\n,1\n,2\n", "column 'a' is empty"),
    "duplicate columns": ("t.csv", "a,a,y\n1,2,3\n", "has 'a' twice"),
    "target only": ("t.csv", "y\n1\n", "no column beside the target"),
    "unclosed quote": ("t.csv", 'a,y\n1,2\n"3,4\n', "row 2: a quote is never closed"),
    "not UTF-8": ("t.csv", "a,y\n\udcff,2\n", "column 'a', row 1: invalid UTF8"),
    "identifiers": (
        "t.csv",
        "a,y\n" + "".join(f"u{i},1\n" for i in range(1001)),
        "'a' has more than 1000.*identifier",
    ),
    "wrong suffix": ("t.xlsx", "x", r"is none of .csv"),
    "npy as table": ("t.npy", "x", "give arrays as --x and --y"),
    "not gzip": ("t.zip", "plain text", "not a zip file"),
    "not parquet": ("t.parquet", "plain text, long enough", "t.parquet: cannot be read"),
}


@pytest.mark.parametrize(("name", "text", "message"), BAD_TEXTS.values(), ids=BAD_TEXTS.keys())
def test_a_bad_table_is_refused_by_name(tmp_path: Path, name: str, text: str | None, message: str) -> None:
    if text is not None:
        data = text.encode(errors="surrogateescape")
        (tmp_path / name).write_bytes(gzip.compress(data) if name.endswith(".gz") else data)
    with pytest.raises(SourceError, match=message) as caught:
        read_all(open_tables(tmp_path / name))
    assert name in str(caught.value)
    assert "\n" not in str(caught.value)


def test_text_in_a_numeric_column_is_named_by_column_and_row_beyond_the_first_block(tmp_path: Path) -> None:
    lines = "".join(f"{i},{i}\n" for i in range(600_000))
    path = write_text(tmp_path / "t.csv", "b,y\n" + lines + "oops,1\n")
    with pytest.raises(SourceError, match="column 'b', row 600001: 'oops' is no number"):
        read_all(open_tables(path))


@pytest.mark.parametrize("where", [0.5, 0.9, 0.999])
@pytest.mark.parametrize("name", ["t.csv.gz", "t.zip", "t.parquet"])
def test_a_truncated_file_is_an_error_and_never_fewer_rows(tmp_path: Path, name: str, where: float) -> None:
    path = write_table(tmp_path / name)
    path.write_bytes(path.read_bytes()[: int(path.stat().st_size * where)])
    with pytest.raises(SourceError, match=f"{name}: cannot be read"):
        read_all(open_tables(path))


def test_a_file_that_may_not_be_read_is_named_with_the_remedy(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise PermissionError(13, "Permission denied")

    path = write_table(tmp_path / "t.csv")
    monkeypatch.setattr(Path, "open", refuse)
    with pytest.raises(SourceError, match=r"t\.csv: may not be read; change its permissions"):
        open_tables(path)


def test_a_zip_must_hold_one_table(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match="holds 2 tables"):
        open_tables(write_zip(tmp_path / "t.zip", ("a.csv", TABLE), ("b.csv", TABLE)))


@pytest.mark.parametrize(
    ("other", "message"),
    [
        (("2.csv", {"header": "a,color,y"}), "only .*1.csv has 'b'"),
        (("2.csv", {"header": "a,a,color,b,y"}), "2.csv: has 'a' twice"),
        (("2.csv", {"header": "a,color,b,c,y"}), "only .*2.csv has 'c'"),
    ],
)
def test_files_with_different_columns_are_refused_before_reading(
    tmp_path: Path, other: tuple[str, dict[str, object]], message: str
) -> None:
    first = write_table(tmp_path / "1.csv")
    name, change = other
    if "header" in change:
        second = write_text(tmp_path / name, f"{change['header']}\n1,2,3,4,5\n")
    else:
        second = write_parquet(tmp_path / name, **{"a": [1], "color": ["red"], "y": [1], **change})
    with pytest.raises(SourceError, match=message):
        open_tables(first, second)


def test_a_text_in_a_later_file_is_refused_where_the_first_has_numbers(tmp_path: Path) -> None:
    first = write_table(tmp_path / "1.csv")
    second = write_parquet(tmp_path / "2.parquet", a=[1], color=["red"], b=["x"], y=[1])
    with pytest.raises(SourceError, match=r"2\.parquet: column 'b', row 1: 'x' is no number"):
        read_all(open_tables(first, second))


def test_parquet_columns_of_other_types_are_refused(tmp_path: Path) -> None:
    path = write_parquet(tmp_path / "t.parquet", a=[[1, 2], [3]], y=[1, 2])
    with pytest.raises(SourceError, match="column 'a' holds list"):
        open_tables(path)


def test_decimals_and_missing_integers_in_parquet(tmp_path: Path) -> None:
    decimals = pa.array([1, 2]).cast(pa.decimal128(30, 2))
    assert read_all(open_tables(write_parquet(tmp_path / "a.parquet", a=decimals, y=[1, 2])))[1].tolist() == [
        [1],
        [2],
    ]
    path = write_parquet(tmp_path / "b.parquet", a=pa.array([1, None]), y=[1, 2])
    with pytest.raises(SourceError, match="column 'a', row 2: the value is missing"):
        read_all(open_tables(path))


@pytest.mark.parametrize(
    ("target", "task", "message"),
    [
        (None, None, "give --target NAME, one of a, color, b, y"),
        ("colour", None, "no column 'colour' .*did you mean color"),
        ("color", "regression", "'color' is text"),
    ],
)
def test_an_impossible_target_is_refused(
    tmp_path: Path, target: str | None, task: Task | None, message: str
) -> None:
    with pytest.raises(SourceError, match=message):
        read_all(open_tables(write_table(tmp_path / "t.csv"), target=target, task=task))


def save_pickled(path: Path) -> None:
    np.save(path, np.array([1, "a", None], object), allow_pickle=True)


BAD_ARRAYS: dict[str, tuple[Callable[[Path], object], str]] = {
    "pickled objects": (save_pickled, "holds object, not numbers"),
    "text": (lambda path: np.save(path, np.array([["a"]] * 3)), "holds <U1, not numbers"),
    "complex": (lambda path: np.save(path, np.zeros((3, 1), complex)), "holds complex128"),
    "one dimension": (lambda path: np.save(path, np.zeros(3)), r"shape \(3,\); x must be"),
    "other length": (lambda path: np.save(path, np.zeros((4, 2))), "has 4 rows but .* has 3"),
    "no features": (lambda path: np.save(path, np.zeros((3, 0))), "x must be"),
    "NaN": (
        lambda path: np.save(path, np.array([[0, 0], [0, np.nan], [0, 0]])),
        "column 'x1', row 2: the value is missing",
    ),
    "truncated": (lambda path: path.write_bytes(path.with_name("y.npy").read_bytes()[:-1]), "cannot be read"),
    "missing": (lambda path: None, "no such file"),
}


@pytest.mark.parametrize(("save", "message"), BAD_ARRAYS.values(), ids=BAD_ARRAYS.keys())
def test_a_bad_array_is_refused_by_name(tmp_path: Path, save: Callable[[Path], object], message: str) -> None:
    np.save(tmp_path / "y.npy", np.zeros(3))
    save(tmp_path / "x.npy")
    with pytest.raises(SourceError, match=message) as caught:
        read_all(open_source([], ConvertConfig(), tmp_path / "x.npy", tmp_path / "y.npy"), block_bytes=16)
    assert "x.npy" in str(caught.value)


def test_arguments_that_contradict_each_other_are_refused(tmp_path: Path) -> None:
    x, t = tmp_path / "x.npy", tmp_path / "t.csv"
    np.save(x, np.zeros((3, 1)))
    cases = [([], None, None, None), ([], x, None, None), ([t], x, x, None), ([], x, x, "y")]
    messages = ["nothing to convert", "--x and --y is missing", "beside --x and --y", "leave it out"]
    for (paths, x_file, y_file, target), message in zip(cases, messages, strict=True):
        with pytest.raises(SourceError, match=message):
            open_source(paths, ConvertConfig(target=target), x_file, y_file)


def test_codes_and_hashes_do_not_depend_on_the_order_of_the_rows(tmp_path: Path) -> None:
    lines = ["1,red,a\n", "2,blue,b\n", "3,green,a\n"]
    found = []
    for index, order in enumerate(itertools.permutations(range(3))):
        path = write_text(tmp_path / f"{index}.csv", "n,color,y\n" + "".join(lines[i] for i in order))
        source = open_tables(path)
        encoder = RowEncoder.build(source, ConvertConfig(missing="error"))
        (rows,) = map(encoder.encode, source.batches(1 << 20))
        x, y, _ = Expansion.build(source, encoder).expand(rows)
        found.append(np.column_stack([x, y, encoder.words(rows)])[np.argsort(order)])
    assert all(np.array_equal(found[0], other) for other in found)


def test_zero_and_minus_zero_are_the_same_row_to_the_split(tmp_path: Path) -> None:
    np.save(tmp_path / "x.npy", np.array([[0.0, 1.0], [-0.0, 1.0]]))
    np.save(tmp_path / "y.npy", np.array([-0.0, 0.0]))
    source = open_source([], ConvertConfig(), tmp_path / "x.npy", tmp_path / "y.npy")
    encoder = RowEncoder.build(source, ConvertConfig(dtype="float16"))
    first, second = encoder.words(encoder.encode(next(source.batches(1 << 20))))
    np.testing.assert_array_equal(first, second)
