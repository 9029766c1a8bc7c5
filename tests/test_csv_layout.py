"""CSV as spreadsheets and libraries write it: semicolons, decimal commas, row numbers, blanks; and column warnings."""

from __future__ import annotations

import gzip
from pathlib import Path

import numpy as np
import pytest
from encoding import encode_source

from ep3stream.config import ConvertConfig
from ep3stream.conversion.categories import column_warning
from ep3stream.conversion.table_source import open_tables
from ep3stream.formats.csv import CsvLayout


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
    expected = (["a", "b=w", "b=x, z"], [[1.5, 0, 1, 2], [-2.25, 1, 0, 3]])
    assert read(tmp_path / f"t{suffix}", text.replace("/", delimiter)) == expected
    assert read(tmp_path / "plain.csv", text.replace("/", ",")) == expected


def test_decimal_commas_are_read_where_semicolons_part_fields(tmp_path: Path) -> None:
    whole = "a;b;y\n" + "".join(f"{i};x;{i}\n" for i in range(20_000))
    expected = read(tmp_path / "points.csv", whole + "-0.25;z;1.5e3\n")
    assert expected[1][-1] == [-0.25, 0, 1, 1500]
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
