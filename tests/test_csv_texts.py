"""CSV texts: strays among numbers and dates, texts like numbers, words for nothing, dates in many notations."""

from __future__ import annotations

import logging
import random
import re
from pathlib import Path
from typing import Any

import numpy as np
import pytest
from encoding import Encoded, encode_source, pretend_store

from ep3stream.config import ConvertConfig
from ep3stream.conversion.expand import FeatureRows
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.table_source import open_tables, open_tables_like
from ep3stream.errors import ConfigError, InputError, SourceError
from ep3stream.formats.text_cells import GAP_WORDS
from ep3stream.inspection.columns_taken import columns_taken


def encoded(tmp_path: Path, cells: list[str], name: str = "t.csv", **settings: Any) -> Encoded:
    """A table of the column v with these cells and a number y, converted."""
    text = "v,y\n" + "".join(f"{cell},{i}.5\n" for i, cell in enumerate(cells))
    return of_text(tmp_path / name, text, **settings)


def of_text(file: Path, text: str, block_bytes: int = 1 << 20, **settings: Any) -> Encoded:
    file.parent.mkdir(exist_ok=True)
    file.write_bytes(text.encode())
    config = ConvertConfig(
        **{"target": "y", **({} if "like" in settings else {"categories": "onehot"}), **settings}
    )
    return encode_source(open_tables([file], config), config, block_bytes)


def column(found: Encoded, name: str = "v") -> list[float]:
    return found.x[:, found.names.index(name)].tolist()


NUMBERS = [f"{i}.25" for i in range(40)]
DAYS = [f"2026-{1 + i % 12:02}-{1 + i % 28:02}" for i in range(40)]
STRAYS = {
    "a question mark": (NUMBERS, "?", "no number"),
    "a dash": (NUMBERS, "-", "no number"),
    "a word": (NUMBERS, "Total", "no number"),
    "a limit": (NUMBERS, "<0.1", "no number"),
    "thousands": (NUMBERS, '"1,234"', "no number"),
    "an underscore": (NUMBERS, "1_000", "no number"),
    "hexadecimal": (NUMBERS, "0x1F", "no number"),
    "a unit": (NUMBERS, "5 kg", "no number"),
    "a decimal comma": (NUMBERS, '"0,5"', "no number"),
    "Fortran": (NUMBERS, "1.5D+02", "no number"),
    "two numbers": (NUMBERS, "1 2", "no number"),
    "a number in brackets": (NUMBERS, "(5)", "no number"),
    "whole numbers": ([str(i) for i in range(40)], "x", "no number"),
    "truth": (["true", "false"] * 20, "yes", "neither true nor false"),
    "a word among days": (DAYS, "soon", "no date like"),
    "a thirteenth month": (DAYS, "2026-13-01", "no date like"),
    "a 30th of February": (DAYS, "2026-02-30", "no date like"),
    "another notation": (DAYS, "3/1/2026", "no date like"),
    "a leap second": ([f"{day} 10:30:15" for day in DAYS], "2026-06-30 23:59:60", "no date and time"),
    "24 o'clock": ([f"{day} 10:30:15" for day in DAYS], "2026-06-30 24:00:00", "no date and time"),
    "a zone": ([f"{day} 10:30:15" for day in DAYS], "2026-06-30 10:00:00Z", "a time zone, but others have none"),
    "no zone": ([f"{day}T10:30:15+02:00" for day in DAYS], "2026-06-30T10:00:00", "no time zone, but others"),
    "a word among times": ([f"10:{i:02}:00" for i in range(40)], "noon", "no time like"),
    "a word among written dates": ([f'"Mar {1 + i % 28}, 2026"' for i in range(40)], "n.a.", "no date like %b %d, %Y"),
    "a month that is none": ([f"{1 + i % 28}-Mar-26" for i in range(40)], "1-Mrz-26", "no date like %d-%b-%y"),
}  # fmt: skip


@pytest.mark.parametrize("place", [0, 20, 40])
@pytest.mark.parametrize("block_bytes", [64, 1 << 20])
@pytest.mark.parametrize(("cells", "stray", "words"), STRAYS.values(), ids=STRAYS)
def test_a_stray_is_refused_by_row_and_value_wherever_it_lies(
    tmp_path: Path, cells: list[str], stray: str, words: str, place: int, block_bytes: int
) -> None:
    if place == 0 and "time zone" in words:
        pytest.skip("the first time says whether there is a zone")
    rows = [*cells[:place], stray, *cells[place:]]
    text = "v,y\n" + "".join(f"{cell},{i}.5\n" for i, cell in enumerate(rows))
    value = stray.strip('"')
    with pytest.raises(SourceError) as caught:
        of_text(tmp_path / "t.csv", text, block_bytes)
    assert f"t.csv: column 'v', row {place + 1}: {value!r} " in str(caught.value)
    assert words in str(caught.value)


@pytest.mark.parametrize("block_bytes", [1, 64, 1 << 20])
@pytest.mark.parametrize("name", STRAYS)
def test_strays_are_dropped_and_counted_if_asked_and_all_other_values_stay(
    tmp_path: Path, name: str, block_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    cells, stray, _ = STRAYS[name]
    rows = [*cells[:20], stray, *cells[20:]]
    text = "v,y\n" + "".join(f"{cell},{i}.5\n" for i, cell in enumerate(rows))
    clean = "v,y\n" + "".join(f"{cell},{i}.5\n" for i, cell in enumerate(rows) if i != 20)
    found = of_text(tmp_path / "t.csv", text, block_bytes, invalid="drop")
    expected = of_text(tmp_path / "clean.csv", clean, block_bytes)
    assert found.names == expected.names
    np.testing.assert_array_equal(found.x, expected.x)
    np.testing.assert_array_equal(found.y, expected.y)
    report = found.encoder.report()
    assert (report["invalid"], report["dropped_rows"]) == ({"v": 1}, 1)
    assert "column 'v': 1 rows were left out" in caplog.text
    if block_bytes == 64:
        assert found.expansion.columns()["invalid"] == "drop"


def test_a_stray_late_in_a_numeric_target_never_makes_classes(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i % 89}.5\n" for i in range(3000))
    for text, row in ((f"n,y\n1,?\n{rows}", 1), (f"n,y\n{rows}1,?\n", 3001)):
        with pytest.raises(SourceError, match=rf"column 'y', row {row}: '\?' is no number"):
            of_text(tmp_path / "t.csv", text)
    assert (
        of_text(tmp_path / "t.csv", f"n,y\n{rows}1,?\n", task="classification").source.target.kind == "text"
    )
    assert of_text(tmp_path / "t.csv", f"n,y\n{rows}1,?\n", category=("y",)).encoder.labels is not None


@pytest.mark.parametrize(
    "shown", ["5%", "$5", "5 kg", '"1,005"', "1 005", "5.5D+02", "(5)", '"0,5"', "5 years", "5e"]
)
def test_a_target_of_amounts_is_refused_unless_they_are_said_to_be_classes(
    tmp_path: Path, shown: str
) -> None:
    text = "n,y\n" + "".join(f"{i},{shown.replace('5', str(5 + i % 3))}\n" for i in range(20))
    if shown == "5e":
        assert of_text(tmp_path / "t.csv", text).source.target.kind == "text"
        return
    with pytest.raises(
        SourceError, match=r"target 'y' holds texts like .* look like numbers; .*--task class"
    ):
        of_text(tmp_path / "t.csv", text)
    labels = of_text(tmp_path / "t.csv", text, task="classification").encoder.labels
    assert labels is not None
    assert len(labels) == 3


def test_few_numbers_beside_many_words_stay_categories_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    found = encoded(tmp_path, [*"1234", "a", "b", "c"] * 4)
    assert "'1' (not 'a', 'b', 'c') are numbers; correct or empty" in caplog.text
    assert found.names == [f"v={value}" for value in "1234abc"]
    cells = [*(str(i) for i in range(20)), *"abcdef"] * 2
    assert len(encoded(tmp_path, cells).names) == 26
    assert (
        "column 'v' is taken as 26 categories, but values such as '0' (not 'a', 'b', 'c') are numbers"
        in caplog.text
    )


@pytest.mark.parametrize(
    "cells",
    [
        [*"12?"] * 10,
        [*"23456", "Total"],
        ["kg", *"234"],
        [*"23", "y", *"45"],
        [*"1122", "other", "none", "x"],
        ["0.5", "?", "-", "x", "1.5", "2.5"],
    ],
    ids=["few values", "totals line", "units line", "header again", "half", "three words"],
)
def test_a_target_of_which_most_rows_are_numbers_is_no_target_of_classes_unless_stated(
    tmp_path: Path, cells: list[str]
) -> None:
    text = "n,y\n" + "".join(f"{i},{cell}\n" for i, cell in enumerate(cells))
    with pytest.raises(SourceError, match=r"'y'.*(holds numbers and texts like|is no number)"):
        of_text(tmp_path / "t.csv", text)
    assert of_text(tmp_path / "s.csv", text, task="classification").expansion.class_names


def test_what_is_stated_goes_before_what_the_rows_suggest(tmp_path: Path) -> None:
    cells = [*"1234", "a", "b", "c"] * 4
    with pytest.raises(SourceError, match="row 5: 'a' is no number"):
        encoded(tmp_path, cells, number=("v",))
    found = encoded(tmp_path, cells, number=("v",), invalid="drop")
    assert column(found) == [1, 2, 3, 4] * 4
    assert encoded(tmp_path, NUMBERS, category=("v",)).names[:2] == ["v=0.25", "v=1.25"]
    with pytest.raises(ConfigError, match="'v' is in number and in category"):
        encoded(tmp_path, cells, number=("v",), category=("v",))
    with pytest.raises(SourceError, match="no column 'w' for --number"):
        encoded(tmp_path, cells, number=("w",))


LOOK_ALIKES = {
    "versions": ["1.1", "1.10", "1.2"],
    "zip codes": ["01234", "1234", "00501"],
    "quoted zip codes": ['"01234"', '"1234"', '"00501"'],
    "20 digits": ["12345678901234567890", "12345678901234567891"],
    "long decimals": ["7100.12345678901234567", "7100.12345678901234568"],
    "exponents": ["1e3", "1000", "1E3", "1000.0"],
    "hexadecimal": ["0x1F", "31", "0x1f"],
    "signs": ["+1", "1", "-0", "0"],
    "infinities": ["inf", "Infinity", "1e400"],
    "tiny": ["1e-400", "0", "0.0"],
    "points": ["1.", "1", ".5", "0.5"],
    "blanks around words": ["a", " a", "a "],
    "truth": ["true", "True", "1", "TRUE"],
    "dates": ["2026-03-01", "2026-3-1", "2026-03-01 00:00"],
    "zones": ["2026-03-01T10:00Z", "2026-03-01T10:00+00:00"],
    "decimals": ["1.50", "1.5", "1.500"],
    "words for nothing": ["NA", "nan", "null"],
}


@pytest.mark.parametrize("texts", LOOK_ALIKES.values(), ids=LOOK_ALIKES)
def test_categories_and_labels_are_the_texts_of_the_file(
    tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    plain = {text.strip('"') for text in texts}
    found = encoded(tmp_path, texts * 20, category=("v",))
    assert {name.removeprefix("v=") for name in found.names} == plain
    assert (found.x.sum(1) == 1).all()
    assert "look like" not in caplog.text
    labels = of_text(
        tmp_path / "l.csv",
        "n,y\n" + "".join(f"{i},{text}\n" for i, text in enumerate(texts * 20)),
        task="classification",
    )
    assert set(labels.expansion.class_names or ()) == plain
    assert (np.bincount(labels.y.ravel()) == 20).all()


def test_texts_that_are_the_same_number_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoded(tmp_path, ["1", "1.0", "2"], category=("v",))
    assert "column 'v' has the categories '1' and '1.0', which are the same number" in caplog.text


def test_whole_numbers_as_texts_are_in_the_order_of_numbers(tmp_path: Path) -> None:
    assert encoded(tmp_path, ["10", "9", "-3"], category=("v",)).names == ["v=-3", "v=9", "v=10"]
    assert encoded(tmp_path, ["10", "9", "03"], category=("v",)).names == ["v=03", "v=10", "v=9"]
    text = "n,y\n" + "".join(f"{i},{i % 12}\n" for i in range(24))
    found = of_text(tmp_path / "t.csv", text, task="classification")
    assert found.expansion.class_names == tuple(map(str, range(12)))
    assert found.expansion.columns()["kind"] == "integer"
    mixed = of_text(tmp_path / "m.csv", text + "9,01\n", task="classification")
    assert mixed.expansion.columns()["kind"] == "text"


@pytest.mark.parametrize("word", [*sorted(GAP_WORDS), "?", "-", " ", "missing"])
def test_words_for_nothing_are_texts_among_texts(tmp_path: Path, word: str) -> None:
    if word == "":
        pytest.skip("the empty cell is a gap everywhere")
    found = encoded(tmp_path, [word, f'"{word}"', "DE", "FR"])
    assert f"v={word}" in found.names
    assert column(found, f"v={word}") == [1, 1, 0, 0]
    labels = of_text(tmp_path / "l.csv", f"n,y\n1,{word}\n2,EU\n3,AS\n", missing="drop")
    assert set(labels.expansion.class_names or ()) == {word, "EU", "AS"}


@pytest.mark.parametrize("word", [*sorted(GAP_WORDS), " ", '"NA"', " NA "])
@pytest.mark.parametrize("cells", [NUMBERS, DAYS, ["true", "false"] * 5], ids=["numbers", "dates", "truth"])
def test_words_for_nothing_are_counted_gaps_among_numbers_and_dates(
    tmp_path: Path, word: str, cells: list[str]
) -> None:
    found = encoded(tmp_path, [*cells, word, word], missing="drop")
    assert len(found.x) == len(cells)
    assert set(found.encoder.tally.missing.values()) == {2}
    with pytest.raises(SourceError, match=f"row {len(cells) + 1}: the value is missing"):
        encoded(tmp_path, [*cells, word, word], missing="error")


def test_stated_words_are_gaps_in_every_column(tmp_path: Path) -> None:
    text = "c,n,d,y\n" + "a,1,2026-01-01,1\n?,?,?,2\nb,2,2026-01-02,3\nNA,3,2026-01-03,4\n"
    found = of_text(tmp_path / "t.csv", text, missing_words=("?",), missing="drop")
    assert [name for name in found.names if name.startswith("c=")] == ["c=NA", "c=a", "c=b"]
    assert found.y.ravel().tolist() == [1, 3, 4]
    missing = found.encoder.tally.missing
    assert (missing["c"], missing["n"], missing["d"]) == (1, 1, 1)


def days_since_1970(day: str) -> int:
    return int(np.datetime64(day, "D").astype(int))


# How a moment is written, and what of it the format keeps: days, and hours where it has a time.
NOTATIONS = {
    "%b %d, %Y": '"{b} {d}, {Y}"',
    "%d-%b-%y": "{d}-{b}-{y}",
    "%d-%b-%Y": "{d:02}-{b}-{Y}",
    "%d %b %Y": "{d} {B} {Y}",
    "%Y/%m/%d": "{Y}/{m:02}/{d:02}",
    "%Y.%m.%d": "{Y}.{m:02}.{d:02}",
    "%d.%m.%Y": "{d:02}.{m:02}.{Y}",
    "%d/%m/%Y": "{d:02}/{m:02}/{Y}",
    "%m/%d/%Y": "{m}/{d}/{Y}",
    "%m/%d/%y": "{m}/{d}/{y}",
    "%d-%m-%Y": "{d:02}-{m:02}-{Y}",
    "%d.%m.%Y %H:%M": "{d:02}.{m:02}.{Y} {H:02}:{M:02}",
    "%Y-%m-%d %H:%M:%S,%f": '"{Y}-{m:02}-{d:02} {H:02}:{M:02}:15,250"',
    "%m/%d/%Y %I:%M:%S %p": "{m}/{d}/{Y} {I}:{M:02}:15 {p}",
    "%b %d %Y %I:%M%p": "{b} {d} {Y} {I}:{M:02}{p}",
    "%a %b %d %H:%M:%S %Y": "{a} {b} {d} {H:02}:{M:02}:15 {Y}",
    "%a, %d %b %Y %H:%M:%S %z": '"{a}, {d} {b} {Y} {H:02}:{M:02}:15 +0000"',
    "%d/%b/%Y:%H:%M:%S %z": "{d:02}/{b}/{Y}:{H:02}:{M:02}:15 +0000",
    "%Y/%m/%d %H:%M:%S": "{Y}/{m:02}/{d:02} {H:02}:{M:02}:15",
}
_NAMES = (
    "January", "February", "March", "April", "May", "June", "July", "August", "September", "October", "November",
    "December",
)  # fmt: skip


def written(pattern: str, i: int) -> tuple[str, float, float]:
    """The moment number i, written so, with its days since 1970 and its hour."""
    year, month, day, hour, minute = 2020 + i % 7, 1 + i % 12, 1 + (5 * i) % 28, i % 24, (7 * i) % 60
    whole = days_since_1970(f"{year}-{month:02}-{day:02}")
    weekday = ["Thu", "Fri", "Sat", "Sun", "Mon", "Tue", "Wed"][whole % 7]
    text = pattern.format(
        Y=year, y=f"{year % 100:02}", m=month, d=day, b=_NAMES[month - 1][:3], B=_NAMES[month - 1], a=weekday,
        H=hour, I=hour % 12 or 12, M=minute, p="AM" if hour < 12 else "PM",
    )  # fmt: skip
    has_time = "{M" in pattern
    seconds = (15.25 if "250" in pattern else 15) if ":15" in pattern else 0
    return text, whole, (hour + minute / 60 + seconds / 3600) if has_time else 0.0


@pytest.mark.parametrize("block_bytes", [200, 1 << 20])
@pytest.mark.parametrize(("text_format", "pattern"), NOTATIONS.items(), ids=NOTATIONS)
def test_dates_in_the_one_format_that_fits_are_read_and_told(
    tmp_path: Path, text_format: str, pattern: str, block_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    moments = [written(pattern, i) for i in range(60)]
    text = "v,y\n" + "".join(f"{cell},{i}\n" for i, (cell, *_) in enumerate(moments))
    for settings in ({}, {"date": {"v": text_format}}):
        caplog.clear()
        found = of_text(tmp_path / "t.csv", text, block_bytes, **settings)
        expected = [days + hour / 24 for _, days, hour in moments]
        np.testing.assert_allclose(column(found, "v.days"), expected, rtol=0, atol=2e-3)
        if any(hour for *_, hour in moments):
            np.testing.assert_allclose(column(found, "v.hour"), [hour for *_, hour in moments], atol=1e-5)
        told = f"column 'v' is read as dates written {text_format};"
        is_iso = text_format.startswith("%Y-%m-%d")  # ISO 8601 allows a comma before the fraction.
        assert (told in caplog.text) == (not settings and not is_iso)
        if settings or not is_iso:
            assert found.expansion.columns()["date_formats"] == {"v": text_format}


def test_months_alone_are_their_first_days(tmp_path: Path) -> None:
    found = encoded(tmp_path, ["2026-03", "2026-04", "2026-12"])
    assert column(found, "v.days") == [days_since_1970(f"2026-{month}-01") for month in ("03", "04", "12")]
    assert encoded(tmp_path, ["1203-11", "9999-02", "4711-12"]).names[0] == "v=1203-11"


@pytest.mark.parametrize(
    ("cells", "formats"),
    [
        (["03/04/2026", "05/06/2026"], ["%d/%m/%Y", "%m/%d/%Y"]),
        (["01-02-2026", "03-04-2026"], ["%d-%m-%Y", "%m-%d-%Y"]),
        (["01/02/03", "04/05/06"], ["%d/%m/%y", "%m/%d/%y", "%y/%m/%d"]),
        (["01/01/2026", "02/02/2026"], ["%d/%m/%Y", "%m/%d/%Y"]),
    ],
)
def test_dates_that_may_be_either_stay_texts_and_the_formats_are_named(
    tmp_path: Path, cells: list[str], formats: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    assert encoded(tmp_path, cells * 5).names == [f"v={cell}" for cell in cells]
    assert " or ".join(f"--date v={text_format}" for text_format in formats) in caplog.text
    found = encoded(tmp_path, cells, date={"v": formats[0]})
    assert "v.days" in found.names


@pytest.mark.parametrize("block_bytes", [100, 1 << 20])
@pytest.mark.parametrize(
    "late",
    [
        "2026-03-01 10:30:15.1234567",
        "2026-03-01T10:30:15.123456789",
        "2026-03-01 10:30:15.5",
        "2500-01-01 00:00:00.1234567",
    ],
)
@pytest.mark.parametrize("first", [True, False])
def test_times_with_many_decimals_are_read_wherever_they_come(
    tmp_path: Path, late: str, first: bool, block_bytes: int
) -> None:
    plain = [f"2026-03-01 {i % 24:02}:00:00" for i in range(30)]
    cells = [late, *plain] if first else [*plain, late]
    text = "v,y\n" + "".join(f"{cell},{i}\n" for i, cell in enumerate(cells))
    found = of_text(tmp_path / "t.csv", text, block_bytes)
    instant = np.datetime64(late.replace(" ", "T")[:26], "us")
    days = instant.astype("datetime64[D]").astype(int)
    hour = (instant - instant.astype("datetime64[D]")).astype(int) / 3.6e9
    place = 0 if first else -1
    assert column(found, "v.days")[place] == pytest.approx(days + hour / 24, abs=2e-3)
    assert column(found, "v.hour")[place] == pytest.approx(hour, abs=1e-6)
    assert column(found, "v.hour")[1] == (0 if first else 1)


@pytest.mark.parametrize(
    ("cells", "values"),
    [
        ([" 1", "2 ", '" 3 "', "4"], [1, 2, 3, 4]),
        (['"1"', '"2.5"', "3"], [1, 2.5, 3]),
        (["+1", "-0", "1.", ".5", "1e3", "25E-2"], [1, 0, 1, 0.5, 1000, 0.25]),
        ([" true", "false ", "TRUE"], [1, 0, 1]),
        (["1", "2", "3", "4", "5", "6", "7", "8", "9", "10", "NA", "\t11"], None),
        (["007", "01.50"], [7, 1.5]),
    ],
)
def test_blanks_quotes_and_signs_do_not_change_a_number(
    tmp_path: Path, cells: list[str], values: list[float] | None
) -> None:
    found = encoded(tmp_path, cells, missing="drop")
    assert column(found) == (values or [1, 2, 3, 4, 5, 6, 7, 8, 9, 10, 11])


def test_blanks_around_dates_and_times_do_not_make_categories_of_them(tmp_path: Path) -> None:
    text = "d, t, y\n 2026-01-01, 10:30, 1\n2026-01-02 ,11:00 , 2\n"
    found = of_text(tmp_path / "t.csv", text)
    assert column(found, "d.days") == [days_since_1970("2026-01-01"), days_since_1970("2026-01-02")]
    assert column(found, "t.hour") == [10.5, 11]


@pytest.mark.parametrize("value", ["inf", "-Infinity", "1e400"])
def test_numbers_that_are_not_finite_are_refused_by_row(tmp_path: Path, value: str) -> None:
    with pytest.raises(SourceError, match="column 'v', row 3: the value is not finite"):
        encoded(tmp_path, ["1", "2", value])


def test_what_numbers_lose_of_their_texts_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoded(tmp_path, ["01234", "1234"])
    assert "leading zeros: 01234 becomes 1234; --category v keeps the texts" in caplog.text
    encoded(tmp_path, ["9007199254740993", "5"])
    assert "beyond 2^53 lose digits, like 9007199254740993" in caplog.text
    caplog.clear()
    encoded(tmp_path, ["0", "0.5", "-0.25", "10"])
    assert not [record for record in caplog.records if record.levelno >= logging.WARNING]


def test_columns_of_hexadecimal_numbers_stay_texts_and_are_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert encoded(tmp_path, ["0x1F", "0x20", "0x1F"]).names == ["v=0x1F", "v=0x20"]
    assert "'0x1F' look like numbers" in caplog.text


def test_midnight_is_a_date_among_dates(tmp_path: Path) -> None:
    found = encoded(tmp_path, [*DAYS, "2026-03-01 00:00:00", "2026-03-02T00:00"])
    assert column(found, "v.days")[-2:] == [days_since_1970("2026-03-01"), days_since_1970("2026-03-02")]
    text = "v,y\n" + "".join(f"{day},1\n" for day in [*DAYS, "?"])
    (tmp_path / "t.csv").write_text(text)
    assert [c.name for c in open_tables([tmp_path / "t.csv"], ConvertConfig(target="y")).columns] == [
        "v.days",
        "v.yearday",
        "v.month",
        "v.weekday",
    ]


@pytest.mark.parametrize("delimiter", [";", "\t", "|"])
def test_all_fields_may_be_quoted_whatever_parts_them(tmp_path: Path, delimiter: str) -> None:
    rows = [["a", "y"], ["1.5", "2"], ["2.5", "3"]]
    text = "".join(delimiter.join(f'"{cell}"' for cell in row) + "\n" for row in rows)
    assert column(of_text(tmp_path / "t.csv", text), "a") == [1.5, 2.5]
    comma = text.replace(".", ",") if delimiter == ";" else text
    assert column(of_text(tmp_path / "c.csv", comma), "a") == [1.5, 2.5]


def test_decimal_commas_beside_a_stray_are_read(tmp_path: Path) -> None:
    text = "v;y\n" + "".join(f"{i},5;{i}\n" for i in range(30))
    assert column(of_text(tmp_path / "t.csv", text + " +7,5 ;NA\nNA;7\n", missing="drop"))[-1] == 29.5
    with pytest.raises(SourceError, match=r"row 31: '1\.007,5' is no number"):
        of_text(tmp_path / "t.csv", text + "1.007,5;1\n")


def test_a_later_file_is_read_by_the_words_and_formats_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "c,d,n,y\n" + "".join(f"{'ab'[i % 2]},{1 + i % 28}.03.2026,{i},{i}\n" for i in range(30))
    settings = {"missing_words": ("?",), "missing": "drop", "invalid": "drop"}
    first = of_text(tmp_path / "1.csv", text, **settings)
    like = pretend_store(monkeypatch, first)
    text = "c,d,n,y\na,01.02.2026,1,2\n?,3.4.2026,?,1\nb,?,3,4\na,4.4.2026,x,1\n"
    later = of_text(tmp_path / "2.csv", text, like=like, target=None)
    assert later.names == first.names
    assert column(later, "d.month") == [2]
    assert later.encoder.tally.invalid == {"n": 1}
    assert later.expansion.columns() == first.expansion.columns()
    recorded = RecordedColumns.of(Path(like)).without_target()
    file = tmp_path / "2.csv"
    rows = FeatureRows.open(open_tables_like([file], recorded), recorded)
    ((_, usable),) = rows.batches()
    assert usable.tolist() == [True, False, False, False]
    renamed = tmp_path / "3.csv"
    renamed.write_text("c,when,n\na,01.02.2026,1\n")
    plan = open_tables_like([renamed], recorded, {"when": "d"})
    assert [batch.numeric[1].tolist() for batch in plan.batches(99)] == [[2.0]]


def test_a_format_that_is_none_is_refused(tmp_path: Path) -> None:
    for text_format, words in (
        ("%Q", "has %Q"),
        ("%H %d", "a part of a date"),
        ("%Y", "neither"),
        ("x", "neither"),
    ):
        with pytest.raises(InputError, match=words):
            encoded(tmp_path, DAYS, date={"v": text_format})


def test_dates_and_numbers_as_texts_of_parquet_are_read_if_stated(tmp_path: Path) -> None:
    pa = pytest.importorskip("pyarrow")
    table = pa.table({"v": ["1", "2", "x"], "d": [20260301, 20260302, 20260303], "y": [1.0, 2, 3]})
    config = ConvertConfig(target="y", number=("v",), date={"d": "%Y%m%d"}, invalid="drop")
    from ep3stream.formats.python_objects import PythonTable

    source = PythonTable.of(table)
    assert source is not None
    found = encode_source(open_tables([source], config), config)
    assert column(found) == [1, 2]
    assert column(found, "d.days") == [days_since_1970("2026-03-01"), days_since_1970("2026-03-02")]


def test_decisions_do_not_depend_on_the_size_of_blocks(tmp_path: Path) -> None:
    draw = random.Random(0)
    cells = [draw.choice(["1", "+2", " 3", "NA", "4.5", "x y"]) for _ in range(400)]
    text = "v,w,y\n" + "".join(
        f"{cell},{draw.choice(DAYS)} 10:0{i % 10},{i}\n" for i, cell in enumerate(cells)
    )
    settings = {"number": ("v",), "invalid": "drop", "missing": "drop"}
    whole = of_text(tmp_path / "t.csv", text, **settings)
    for block_bytes in (30, 100, 1000):
        parts = of_text(tmp_path / "t.csv", text, block_bytes, **settings)
        np.testing.assert_array_equal(parts.x, whole.x)
        assert parts.encoder.report() == whole.encoder.report()


def test_another_delimiter_within_a_quoted_name_is_a_letter_like_any_other(tmp_path: Path) -> None:
    found = of_text(tmp_path / "t.csv", '"semi;colon","b",y\n"1.5","2",3\n')
    assert found.names == ["semi;colon", "b"]


@pytest.mark.parametrize(
    ("text", "values"),
    [
        ("Temp, C;y\n1.5;2\n2.5;3\n", [1.5, 2.5]),
        ("Temp, C;y\n1,5;2\n2,5;3\n", [1.5, 2.5]),
        ('"Temp, C"\t"y"\n1.5\t2\n2.5\t3\n', [1.5, 2.5]),
        ("Temp, C|y\n1.5|2\n2.5|3\n", [1.5, 2.5]),
        ('"Temp, C",y\n1.5,2\n2.5,3\n', [1.5, 2.5]),
    ],
)
def test_a_comma_within_a_name_does_not_hide_what_parts_the_fields(
    tmp_path: Path, text: str, values: list[float]
) -> None:
    assert column(of_text(tmp_path / "t.csv", text), "Temp, C") == values


def test_points_in_columns_of_categories_say_nothing_about_decimal_commas(tmp_path: Path) -> None:
    text = "v;n;y\n1.10;3,5;1,5\n1.2;4,5;2,5\n"
    found = of_text(tmp_path / "t.csv", text, category=("v",))
    assert found.names == ["v=1.10", "v=1.2", "n"]
    assert column(found, "n") == [3.5, 4.5]
    assert found.y.ravel().tolist() == [1.5, 2.5]


def test_what_two_categories_share_is_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoded(tmp_path, ["red", " red", "blue"])
    assert "column 'v' has the categories ' red' and 'red', which differ in blanks alone" in caplog.text
    encoded(tmp_path, ["(missing)", "", "blue"])
    assert "column 'v', row 1: '(missing)': the text is what the gaps" in caplog.text


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_blanks_around_numbers_and_truth_values_are_no_part_of_a_label_or_category(
    tmp_path: Path, block_bytes: int, caplog: pytest.LogCaptureFixture
) -> None:
    text = "c,y\n1.50, 1936\n 1.50,1936\n1.5 , 7 \ntrue,7\n true , 7\na b, 7\n"
    found = of_text(tmp_path / "l.csv", text, block_bytes, task="classification", category=("c",))
    assert found.expansion.class_names == ("7", "1936")
    assert found.names == ["c=1.5", "c=1.50", "c=a b", "c=true"]
    assert "column 'y' has blanks around its numbers, which are left out" in caplog.text


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize("word", ["?", "NA", "n. a."])
def test_a_stated_word_may_have_blanks_around_it(tmp_path: Path, word: str, block_bytes: int) -> None:
    rows = [("State-gov", "13"), (word, "12"), ("Private", word), (f"{word} ", "11")] * 12
    text = "work, num, y\n" + "".join(f"{work}, {num}, {i}\n" for i, (work, num) in enumerate(rows))
    found = of_text(tmp_path / "t.csv", text, block_bytes, missing_words=(word,))
    assert found.encoder.tally.missing == {"work": 24, "num": 12}
    assert [name for name in found.names if "=" in name] == [
        "work=Private",
        "work=State-gov",
        "work=(missing)",
    ]


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
def test_a_number_that_stands_for_a_gap_may_have_blanks_around_it(tmp_path: Path, block_bytes: int) -> None:
    text = "a,b,y\n1, -999,1\n-999 ,2,2\n -999 , 3 ,3\n4,-999,4\n5,5,-99\n"
    found = of_text(tmp_path / "t.csv", text, block_bytes, missing_words=("-999",))
    assert found.encoder.tally.missing == {"a": 2, "b": 2}
    assert found.y.ravel().tolist() == [1, 2, 3, 4, -99]


def test_names_that_no_option_can_take_are_quoted_in_remedies(tmp_path: Path) -> None:
    rows = "".join(f"{i},{i}\n" for i in range(30))
    with pytest.raises(SourceError, match=r"--category 'two\\nlines' if"):
        of_text(tmp_path / "t.csv", f'"two\nlines",y\n{rows}?,1\n')


@pytest.mark.parametrize(
    "text", ["semi;colon|y\n1.5|2\n2.5|3\n", "semi;colon;x|y\n1.5|2\n2.5|3", "semi;colon|y\n1.5|2"]
)
def test_the_delimiter_is_the_one_that_the_first_rows_have_too(tmp_path: Path, text: str) -> None:
    found = of_text(tmp_path / "t.csv", text)
    assert column(found, text.partition("|")[0])[0] == 1.5


def test_decimal_commas_of_a_last_row_without_a_line_break_are_seen(tmp_path: Path) -> None:
    found = of_text(tmp_path / "t.csv", "a;y\n1;-2,5e+08")
    assert found.y.ravel().tolist() == [-2.5e8]


def test_dates_beside_words_are_told(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    encoded(tmp_path, [*DAYS[:3], "soon", "?"] * 3)
    assert "values such as '2026-01-01' (not 'soon', '?') look like dates" in caplog.text


def test_a_typed_twin_of_a_table_with_stated_dates_is_read_like_it(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    import pyarrow as pa

    from ep3stream.formats.python_objects import PythonTable

    first = encoded(tmp_path, ["01.02.2026", "03.04.2026"], date={"v": "%d.%m.%Y"})
    recorded = RecordedColumns.of(Path(pretend_store(monkeypatch, first)))
    days = pa.array([days_since_1970("2026-02-01"), days_since_1970("2026-04-03")], pa.int32())
    for values in (days.cast(pa.date32()), days.cast(pa.date32()).cast(pa.timestamp("ns"))):
        twin = PythonTable.of(pa.table({"v": values, "y": [0.5, 1.5]}))
        assert twin is not None
        (batch,) = open_tables_like([twin], recorded).batches(99)
        assert [piece.tolist() for piece in batch.numeric[:2]] == [days.to_pylist(), [2, 4]]


def test_what_the_columns_were_taken_for_is_told_in_a_line(tmp_path: Path) -> None:
    text = "when,carrier,n,m,y\n" + "".join(
        f"{1 + i % 28}.03.2026,{'abc'[i % 3]},{i},{i}.5,{i}\n" for i in range(30)
    )
    found = of_text(tmp_path / "t.csv", text)
    assert columns_taken(found.expansion.columns(), None) == (
        "columns: 2 numbers, 1 category (carrier 3), 1 date (when as %d.%m.%Y -> days, month, weekday); "
        "target y: number"
    )
    classes = of_text(tmp_path / "t.csv", text, target="carrier", drop=("when",))
    names = classes.expansion.class_names
    assert (
        columns_taken(classes.expansion.columns(), names)
        == "columns: 3 numbers; target carrier: 3 classes (a, b, c)"
    )
    assert columns_taken({"predictions_of": "x"}, None) == ""


@pytest.mark.parametrize("place", [0, 1, 3])
@pytest.mark.parametrize("stray", ["?", "-", "[degC]", "Total", "1.007.5"])
def test_a_stray_among_a_few_fractions_is_refused_too(tmp_path: Path, stray: str, place: int) -> None:
    cells = ["2.5", "4.25", "2.5"]
    cells.insert(place, stray)
    with pytest.raises(SourceError, match=rf"'y', row {place + 1}: '{re.escape(stray)}' is no number"):
        of_text(tmp_path / "t.csv", "n,y\n" + "".join(f"1,{cell}\n" for cell in cells))
    found = encoded(tmp_path, cells, missing_words=(stray,))
    assert found.names == ["v", "v (missing)"]


def test_a_target_of_numbers_and_many_other_texts_is_refused_unless_they_are_classes(tmp_path: Path) -> None:
    text = "n,y\n" + "".join(f"{i},{f'err{i}' if i % 3 == 0 else i}\n" for i in range(60))
    with pytest.raises(
        SourceError, match=r"'y' holds numbers and texts like 'err0'.*--number y --invalid drop.*--task class"
    ):
        of_text(tmp_path / "t.csv", text)
    assert len(of_text(tmp_path / "t.csv", text, number=("y",), invalid="drop").y) == 40
    labels = of_text(tmp_path / "t.csv", text, task="classification").encoder.labels
    assert labels is not None
    assert len(labels) == 60


MORE_NOTATIONS = {
    "20260301T103015": "%Y%m%dT%H%M%S",
    "20260301T103015Z": "%Y%m%dT%H%M%S%z",
    "20260301 10:30": "%Y%m%d %H:%M",
    "20260301 10:30:15": "%Y%m%d %H:%M:%S",
    "2026-03-01 10:30:15 UTC": "%Y-%m-%d %H:%M:%S UTC",
    "01MAR2026:10:30:15": "%d%b%Y:%H:%M:%S",
    "01-MAR-26 10.30.15.000000 AM": "%d-%b-%y %I.%M.%S.%f %p",
    "01.03.26 10:30": "%d.%m.%y %H:%M",
}


@pytest.mark.parametrize(("written", "text_format"), MORE_NOTATIONS.items())
def test_dates_of_databases_and_programs_are_read_and_told(
    tmp_path: Path, written: str, text_format: str, caplog: pytest.LogCaptureFixture
) -> None:
    found = encoded(tmp_path, [written] * 3)
    assert column(found, "v.month") == [3] * 3
    assert [int(hour * 2) for hour in column(found, "v.hour")] == [21] * 3
    assert f"column 'v' is read as dates written {text_format};" in caplog.text


def test_times_of_a_day_without_seconds_and_versions(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    assert column(encoded(tmp_path, ["9:05", "10:30", "0:15"]), "v.hour") == pytest.approx(
        [9 + 1 / 12, 10.5, 0.25]
    )
    assert "column 'v' is read as dates written %H:%M;" in caplog.text
    assert encoded(tmp_path, ["1.2.10", "1.3.11"]).names == ["v=1.2.10", "v=1.3.11"]
    assert encoded(tmp_path, ["01.02.10", "31.03.11"]).names[0] == "v.days"


@pytest.mark.parametrize(
    "pattern",
    [
        "2026-W{n:02}", "2026W{n:02}-3", "{y}Q1", "Q2 {y}", "2026-1{n}", "{n}. Dezember 2026", "{n} févr. 2026",
        "{n}th March 2026", '"March {n}th, 2026"', "Mar {n} 10:30:15", "Fri Aug {n} 2026 12:25:00 GMT+0000 (UTC)",
        "{n} days 01:02:03", "PT{n}M", "P{n}DT2H", "2026-03-{n} 10:30:15 EST", "2026-03-{n}t10:30:15z",
        "2026년 3월 {n}일", "2026年3月{n}日", "{n}.3.", "{n}.3.2026.", "1{n}:30:15",
    ],
)  # fmt: skip
def test_what_looks_like_dates_or_times_and_is_not_read_is_told(
    tmp_path: Path, pattern: str, caplog: pytest.LogCaptureFixture
) -> None:
    cells = [pattern.format(n=n, y=1990 + n) for n in range(10, 29)]
    found = encoded(tmp_path, cells)
    assert len(found.names) == len(set(cells))
    assert "look like dates or times; write them like 2024-12-31" in caplog.text
    caplog.clear()
    encoded(tmp_path, cells, category=("v",))
    assert "look like" not in caplog.text


@pytest.mark.parametrize(
    "texts", [["A", "Mar", "P", "10 Main"], ["room 10", "room 11"], ["PX1", "P2"], ["1:2", "3:4"]]
)
def test_other_texts_are_not_taken_for_dates(
    tmp_path: Path, texts: list[str], caplog: pytest.LogCaptureFixture
) -> None:
    encoded(tmp_path, [f"{text}{i}" for text in texts for i in range(6)])
    assert "look like dates" not in caplog.text


def test_a_word_for_nothing_beside_numeric_labels_is_told(
    tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    text = "n,y\n1,0\n2,1\n3,NA\n"
    found = of_text(tmp_path / "t.csv", text, task="classification")
    assert found.expansion.class_names == ("0", "1", "NA")
    assert (
        "'y' has 'NA' as a category beside numbers alone; if it stands for a gap, take --missing-words 'NA'"
        in (caplog.text)
    )
    caplog.clear()
    found = of_text(tmp_path / "t.csv", text, task="classification", missing_words=("NA",))
    assert (found.expansion.class_names, len(found.y)) == (("0", "1"), 2)
    of_text(tmp_path / "t.csv", "n,y\n1,DE\n2,FR\n3,NA\n")
    assert "has 'NA'" not in caplog.text


def test_lines_above_the_header_are_named(tmp_path: Path) -> None:
    with pytest.raises(SourceError, match=r"leave out what stands above .*the header is '# made by X'"):
        of_text(tmp_path / "t.csv", "# made by X\n# v 2\nt,p,y\n1,2,3\n")


@pytest.mark.parametrize(
    ("cells", "told"),
    [
        (["1.1", "1.10", "1.2"], "1.1 and 1.10"),
        (["1e3", "1000", "7"], "1e3 and 1000"),
        (["2.0", "3.0", "2"], "2.0 and 2"),
        (["1.5", "1.50", "NA"], "1.5 and 1.50"),
        ([f"{i}.0" for i in range(60)] + ["1"], None),
        (["1.10", "1.20", "10"], None),
    ],
)
def test_numbers_written_in_two_ways_in_a_column_of_few_values_are_told(
    tmp_path: Path, cells: list[str], told: str | None, caplog: pytest.LogCaptureFixture
) -> None:
    encoded(tmp_path, cells)
    assert ("--category v keeps the texts" in caplog.text) == (told is not None)
    if told is not None:
        assert f"column 'v' is read as numbers, of which {told} are the same one;" in caplog.text
    caplog.clear()
    encoded(tmp_path, cells, number=("v",))
    assert "are the same one" not in caplog.text


@pytest.mark.parametrize(
    ("header", "is_told"), [("39,7.5,13", True), ("0,1,2", False), ("1,2,3", False), ("2024,2025,y", False)]
)
def test_a_first_line_of_numbers_is_told(
    tmp_path: Path, header: str, is_told: bool, caplog: pytest.LogCaptureFixture
) -> None:
    of_text(tmp_path / "t.csv", f"{header}\n50,8.5,13\n38,2.5,9\n", target=header.rpartition(",")[2])
    assert ("the first line has nothing but numbers" in caplog.text) == is_told
