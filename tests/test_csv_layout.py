"""CSV as spreadsheets and libraries write it: semicolons, decimal commas, row numbers, blanks; and column warnings."""

from __future__ import annotations

import gzip
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoding import encode_source

from ep3stream.config import ConvertConfig
from ep3stream.conversion.categories import column_warning
from ep3stream.conversion.table_source import open_tables
from ep3stream.formats.csv import CsvLayout, csv_records


def read(file: Path, text: str) -> tuple[list[str], list[list[float]]]:
    """The features' names, and the rows with y behind them."""
    data = text.encode()
    file.write_bytes(gzip.compress(data) if file.suffix == ".gz" else data)
    config = ConvertConfig(target="y")
    found = encode_source(open_tables([file], config), config)
    return found.names, np.column_stack([found.x, found.y]).tolist()


@pytest.mark.parametrize(
    ("delimiter", "suffix"), [(";", ".csv"), ("|", ".csv"), ("\t", ".csv"), (";", ".csv.gz"), ("\t", ".tsv")]
)
def test_what_parts_fields_is_what_the_header_shows(tmp_path: Path, delimiter: str, suffix: str) -> None:
    text = "a/b/y\n1.5/'x, z'/2\n-2.25/w/3\n".replace("'", '"')
    expected = (["a", "b"], [[1.5, 1, 2], [-2.25, 0, 3]])
    assert read(tmp_path / f"t{suffix}", text.replace("/", delimiter)) == expected
    assert read(tmp_path / "plain.csv", text.replace("/", ",")) == expected


def test_decimal_commas_are_read_where_semicolons_part_fields(tmp_path: Path) -> None:
    whole = "a;b;y\n" + "".join(f"{i};x;{i}\n" for i in range(20_000))
    expected = read(tmp_path / "points.csv", whole + "-0.25;z;1.5e3\n")
    assert expected[1][-1] == [-0.25, 1, 1500]
    assert read(tmp_path / "commas.csv", whole + "-0,25;z;1,5e3\r\n") == expected


def test_a_comma_among_decimal_points_or_between_fields_is_no_decimal_comma(tmp_path: Path) -> None:
    file = tmp_path / "t.csv"
    file.write_text("a;b;y\n1.5;1,000;2.5\n")
    assert (CsvLayout.of(file).delimiter, CsvLayout.of(file).decimal_point) == (";", ".")
    file.write_text("a;x,b,y\n1.5,2,2.5\n")
    assert (CsvLayout.of(file).delimiter, CsvLayout.of(file).decimal_point) == (",", ".")


def test_columns_without_a_name_are_left_out_with_a_warning(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    named = read(tmp_path / "named.csv", "a,b,y\n1,2,3\n4,5,6\n")
    assert not caplog.records
    assert read(tmp_path / "index.csv", ",a,b,y,\n0,1,2,3,\n1,4,5,6,\n") == named
    assert [record.message.partition(": ")[2].partition(",")[0] for record in caplog.records] == [
        "column 1 has no name in the header",
        "column 5 has no name in the header",
    ]


def test_blanks_around_the_names_of_columns_do_not_count(tmp_path: Path) -> None:
    assert read(tmp_path / "t.csv", "a , b, y\n1, 2, 3\n") == (["a", "b"], [[1, 2, 3]])


@pytest.mark.parametrize(
    ("values", "n_rows", "words"),
    [
        ([f"{i}%" for i in range(30)], 10_000, "'0%' look like numbers"),
        (
            ["?", *(str(i) for i in range(30))],
            10_000,
            r"'0' (not '?') are numbers; correct or empty the others",
        ),
        ([f"{i} kg" for i in range(3)], 10_000, "'0 kg' look like numbers"),
        (["1,000", "2,500"], 10_000, "look like numbers"),
        (["1.5D+02", "2.5D+02"], 10_000, "look like numbers"),
        (["10-20", "20-30", "30+"], 10_000, None),
        (["12B", "7A", "3C"], 10_000, None),
        ([f"$ {i},000.00" for i in range(30)], 10_000, "look like numbers"),
        (
            [f"{i + 1}.2.2024" for i in range(30)],
            10_000,
            "'1.2.2024' (not '30.2.2024') look like dates; say how they are written by --date a=%d.%m.%Y",
        ),
        ([f"{i + 1}/2/24 10:15" for i in range(30)], 10_000, "look like dates"),
        ([f"user{i}" for i in range(60)], 100, "60 categories, but there are only 100 rows"),
        ([f"user{i}" for i in range(60)], 1000, None),
        ([f"user{i}" for i in range(40)], 40, None),
        (["1", "2", "3"], 3, None),  # Few numbers may well be classes.
        ([*(str(i) for i in range(20)), *"abcdef"], 10_000, "'0' (not 'a', 'b', 'c') are numbers"),
        ([*range(300)], 300, None),  # Whole numbers of a Parquet file.
    ],
)
def test_texts_that_are_probably_no_categories_are_told_of(
    values: list[str], n_rows: int, words: str | None
) -> None:
    warning = column_warning("a", values, n_rows)
    assert warning is None if words is None else words in str(warning)


# Files of one column, and their cells; None is a gap.
ONE_COLUMN: dict[str, tuple[bytes, list[float | None]]] = {
    "a line within": (b"a\n1\n\n3\n", [1, None, 3]),
    "the first line": (b"a\n\n1\n3", [None, 1, 3]),
    "the last line": (b"a\n1\n3\n\n", [1, 3, None]),
    "several": (b"a\n1\n\n\n\n3\n", [1, None, None, None, 3]),
    "of Windows": (b"a\r\n1\r\n\r\n3\r\n", [1, None, 3]),
    "before the header": (b"\n\na\n1\n\n3\n", [1, None, 3]),
    "blanks": (b"a\n1\n \n3\n", [1, None, 3]),
    "quotes": (b'a\n1\n""\n3\n', [1, None, 3]),
    "a byte order mark": (b"\xef\xbb\xbfa\n1\n\n3", [1, None, 3]),
    "none but the final line break": (b"a\n1\n3\n", [1, 3]),
    "no final line break": (b"a\n1\n3", [1, 3]),
}


@pytest.mark.parametrize("block_bytes", [2, 1 << 20])
@pytest.mark.parametrize("name", ONE_COLUMN)
def test_an_empty_line_of_a_file_of_one_column_is_an_empty_cell(
    tmp_path: Path, name: str, block_bytes: int
) -> None:
    (tmp_path / "t.csv").write_bytes(ONE_COLUMN[name][0])
    blocks = csv_records(tmp_path / "t.csv", {"a": pa.float64()}, block_bytes)
    assert [cell for typed, _ in blocks for cell in typed.rows["a"].to_pylist()] == ONE_COLUMN[name][1]


def test_an_empty_line_between_rows_of_several_fields_is_no_row(tmp_path: Path) -> None:
    assert read(tmp_path / "t.csv", "a,y\n1,2\n\n3,4\n\n")[1] == [[1.0, 2.0], [3.0, 4.0]]


# Headers with another delimiter in a name, and the names as they are meant.
ODD_HEADERS: dict[str, tuple[str, str, tuple[str, ...]]] = {
    "tabs": (".tsv", "semi;colon\tx\ty\nx;y\t1\t2\n", ("semi;colon", "x", "y")),
    "two tabbed columns": (".tsv", "a;b\ty\n1;2\t3\n", ("a;b", "y")),
    "commas": (".csv", "a;b,c,y\n1;2,3,4\n", ("a;b", "c", "y")),
    "semicolons": (".csv", "Temp, C;y\n1,5;2\n", ("Temp, C", "y")),
    "tabs in a csv": (".csv", "a,b\tc\ty\n1,5\t2\t3\n", ("a,b", "c", "y")),
}


@pytest.mark.parametrize("name", ODD_HEADERS)
def test_the_delimiter_is_the_one_that_makes_most_fields(tmp_path: Path, name: str) -> None:
    suffix, text, names = ODD_HEADERS[name]
    (tmp_path / f"t{suffix}").write_text(text)
    assert CsvLayout.of(tmp_path / f"t{suffix}").names == names


@pytest.mark.parametrize(
    ("option", "kind"), [((), "category"), (("number",), "numeric"), (("category",), "category")]
)
def test_numbers_among_many_words_are_told_to_be_categories(
    tmp_path: Path, caplog: pytest.LogCaptureFixture, option: tuple[str, ...], kind: str
) -> None:
    rows = "7,a\n7,a\n7,a\n7,a\n--,b\n"
    (tmp_path / "t.csv").write_text(f"a,y\n{rows}")
    stated: dict[str, Any] = {name: ["a"] for name in option}
    config = ConvertConfig(target="y", task="classification", invalid="drop", **stated)
    source = open_tables([tmp_path / "t.csv"], config)
    assert [column.kind for column in source.columns] == [kind]
    said = "column 'a' becomes categories: 4 of 5 texts are numbers, but '--' is none; --number a"
    assert (said in caplog.text) == (not option)


def test_dates_among_many_words_are_told_to_be_categories(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    days = "".join(f"2026-03-0{day},{day}\n" for day in range(1, 6))
    (tmp_path / "t.csv").write_text(f"when,y\n{days}{{later}},6\n")
    source = open_tables([tmp_path / "t.csv"], ConvertConfig(target="y"))
    assert [column.kind for column in source.columns] == ["category"]
    said = "column 'when' becomes categories: 5 of 6 texts are dates, but '{later}' is none; --date when=FORMAT says"
    assert said in caplog.text


@pytest.mark.filterwarnings("error")
def test_words_for_infinity_are_no_fractions(tmp_path: Path) -> None:
    (tmp_path / "t.csv").write_text("a,y\nInfinity,1\n-inf,2\nInfinity,1\nred,3\nblue,4\n")
    source = open_tables([tmp_path / "t.csv"], ConvertConfig(target="y"))
    assert [column.kind for column in source.columns] == ["category"]


@pytest.mark.parametrize("target", ["1.10", "0.5", "red"])
def test_points_in_a_column_that_is_not_read_turn_off_no_decimal_commas(tmp_path: Path, target: str) -> None:
    (tmp_path / "t.csv").write_text(f"a;y\n1,5;{target}\n2,5;{target}\n")
    blocks = csv_records(tmp_path / "t.csv", {"a": pa.float64()}, 1 << 20)
    assert [cell for typed, _ in blocks for cell in typed.rows["a"].to_pylist()] == [1.5, 2.5]
