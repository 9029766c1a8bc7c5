"""Which columns are read, in which order, under which names, and as what; and the same again `like` a store."""

from __future__ import annotations

import datetime as dt
import json
import logging
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pytest
from encoding import encode, encode_source, pretend_store, write

from ep3stream.config import ConvertConfig, parse_names, parse_renames
from ep3stream.conversion.date_parts import Times
from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.recorded_columns import take_over
from ep3stream.conversion.table_source import choose_columns, open_tables
from ep3stream.errors import ConfigError, SourceError
from ep3stream.formats.python_objects import pair_source
from ep3stream.formats.source import RowSource

TABLE = "px_1,color,px_2,y\n1,red,5,10\n2,blue,6,20\n3,red,7,30\n"


@pytest.mark.parametrize(
    ("settings", "names"),
    [
        ({}, ["px_1", "color=blue", "color=red", "px_2"]),
        ({"columns": ["px_2", "px_1"]}, ["px_2", "px_1"]),
        ({"columns": ["px_*"]}, ["px_1", "px_2"]),
        ({"columns": ["px_2", "*"], "drop": ["color"]}, ["px_2", "px_1"]),
        ({"drop": ["px_?"]}, ["color=blue", "color=red"]),
        ({"rename": {"px_1": "a", "color": "c"}, "drop": ["px_2"]}, ["a", "c=blue", "c=red"]),
        ({"categories": "codes"}, ["px_1", "color", "px_2"]),
        ({"category": ["px_1"], "columns": ["px_1"]}, ["px_1=1", "px_1=2", "px_1=3"]),
    ],
)
def test_columns_are_chosen_ordered_and_named_as_asked(
    tmp_path: Path, settings: dict[str, Any], names: list[str]
) -> None:
    assert encode(tmp_path / "t", TABLE, **settings).names == names


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ["px1"]}, "no column 'px1' for --columns; did you mean px_1"),
        ({"drop": ["colour"]}, "no column 'colour' for --drop; did you mean color"),
        ({"drop": ["q*"]}, r"no column matches 'q\*' of --drop"),
        ({"drop": ["y"]}, "'y' is both a target and dropped"),
        ({"columns": ["y", "px_1"]}, "'y' is both a target and a feature"),
        ({"rename": {"pixel": "a"}}, "no column 'pixel' for --rename"),
        ({"rename": {"px_1": "px_2"}}, "two columns would be called 'px_2'"),
        ({"rename": {"px_1": "color=red"}}, "two features would be called 'color=red'"),
        ({"category": ["z"]}, "no column 'z' for --category"),
        ({"drop": ["px_*", "color"]}, "no column beside the target"),
        ({"target": ("y", "color")}, "target 'color' is text; .*only target"),
        ({"target": ("y", "px_1"), "task": "classification"}, "one column of labels but --target names 2"),
    ],
)
def test_an_impossible_choice_is_refused_by_name(
    tmp_path: Path, settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(SourceError, match=message) as caught:
        encode(tmp_path / "t", TABLE, **settings)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ["a", "a"]}, "columns has 'a' twice"),
        ({"columns": "abc"}, "columns is 'abc'; give a list"),
        ({"target": ("a", "a")}, "target has 'a' twice"),
        ({"rename": {"a": "c", "b": "c"}}, "rename has 'c' twice"),
        ({"dates": ["year"]}, "dates is 'year'"),
        ({"missing": "zero"}, "missing is 'zero'; choose one of auto, error, mean, drop"),
    ],
)
def test_settings_that_cannot_be_are_refused_before_any_file_is_read(
    settings: dict[str, Any], message: str
) -> None:
    with pytest.raises(ConfigError, match=message):
        ConvertConfig(**settings)


def test_names_on_the_command_line_may_hold_commas_in_quotes() -> None:
    assert parse_names('a, "b,c",d') == ("a", "b,c", "d")
    assert parse_names('two\nlines,"a,\nb",c') == ("two\nlines", "a,\nb", "c")
    assert parse_renames("a=b,c=d") == {"a": "b", "c": "d"}
    for text in ("", "a,,b"):
        with pytest.raises(ConfigError, match="empty name"):
            parse_names(text)
    with pytest.raises(ConfigError, match="'a' is not OLD=NEW"):
        parse_renames("a")


def test_several_targets_keep_their_order_and_may_be_renamed(tmp_path: Path) -> None:
    found = encode(tmp_path / "t", TABLE, target=("y", "px_1"), rename={"y": "delay"}, drop=["color"])
    assert found.source.target.names == ("delay", "px_1")
    assert found.y.tolist() == [[10, 1], [20, 2], [30, 3]]
    assert found.names == ["px_2"]


def test_an_unusable_column_does_no_harm_when_it_is_left_out(tmp_path: Path) -> None:
    table = {"a": [1.0, 2.0], "list": [[1], [2]], "none": pa.nulls(2), "y": [1.0, 2.0]}
    assert encode(tmp_path / "t", table, drop=["list", "none"]).names == ["a"]
    with pytest.raises(SourceError, match=r"column 'none' is empty.*--drop"):
        encode(tmp_path / "t", table, drop=["list"])


def test_later_files_need_only_the_chosen_columns(tmp_path: Path) -> None:
    first = write(tmp_path / "1", TABLE)
    second = write(tmp_path / "2", "y,extra,px_1\n40,z,4\n")
    config = ConvertConfig(target="y", columns=["px_1"])
    found = encode_source(open_tables([first, second], config), config)
    assert found.x[:, 0].tolist() == [1, 2, 3, 4]
    with pytest.raises(SourceError, match=r"only .*1\.csv has 'color'"):
        open_tables([first, second], ConvertConfig(target="y"))


MOMENTS = [
    dt.datetime(1969, 12, 31, 18, 30),
    dt.datetime(2024, 2, 29, 6),
    dt.datetime(2100, 12, 31, 23, 59, 59),
]


@pytest.mark.parametrize("unit", ["s", "ms", "us", "ns"])
@pytest.mark.parametrize("zone", [None, "UTC", "America/New_York"])
def test_parts_of_a_timestamp_are_those_of_pythons_datetime(
    tmp_path: Path, unit: str, zone: str | None
) -> None:
    values = pa.array(MOMENTS, pa.timestamp("us")).cast(pa.timestamp(unit))
    values = values if zone is None else values.cast(pa.timestamp(unit, "UTC")).cast(pa.timestamp(unit, zone))
    parts = ("days", "month", "day", "weekday", "hour")
    found = encode(tmp_path / "t", {"t": values, "y": [1.0, 2, 3]}, dates=parts)
    assert found.names == [f"t.{part}" for part in parts]
    epoch = dt.datetime(1970, 1, 1)
    for row, moment in zip(found.x, MOMENTS, strict=True):
        hour = moment.hour + moment.minute / 60 + moment.second / 3600
        days = (moment - epoch) / dt.timedelta(days=1)
        expected = [days, moment.month, moment.day, moment.weekday(), hour]
        np.testing.assert_array_equal(row, np.array(expected, np.float32))


@pytest.mark.parametrize(
    ("values", "names", "row"),
    [
        ("2024-02-29", ["t.days", "t.month", "t.weekday"], [19782, 2, 3]),
        ("2024-02-29 12:00:00", ["t.days", "t.month", "t.weekday", "t.hour"], [19782.5, 2, 3, 12]),
        ("2024-02-29T12:00:00+03:00", ["t.days", "t.month", "t.weekday", "t.hour"], [19782.375, 2, 3, 9]),
        ("06:45:00", ["t.hour"], [6.75]),
    ],
)
def test_dates_and_times_of_csv_become_the_features_that_fit_them(
    tmp_path: Path, values: str, names: list[str], row: list[float]
) -> None:
    found = encode(tmp_path / "t", f"t,y\n{values},1\n")
    assert found.names == names
    assert found.x[0].tolist() == row


@pytest.mark.parametrize(
    ("value", "names", "row"),
    [
        ("2024-12-31", ["t.days", "t.yearday", "t.month", "t.weekday"], [20088, 366, 11, 1]),
        (
            "2024-01-01 12:30:36",
            ["t.days", "t.yearday", "t.minute", "t.month", "t.weekday", "t.hour"],
            [19723 + 45036 / 86400, 1, 750.6, 0, 0, 12],
        ),
        ("06:45:00", ["t.minute", "t.hour"], [405, 6]),
    ],
)
def test_a_date_has_its_day_as_numbers_and_its_weekday_month_and_hour_as_categories(
    tmp_path: Path, value: str, names: list[str], row: list[float]
) -> None:
    found = encode(tmp_path / "t", f"t,y\n{value},1\n", categories="codes")
    assert found.names == names
    np.testing.assert_allclose(found.x[0], row, rtol=1e-6)
    kinds = {one["name"]: (one["kind"], len(one.get("values", ()))) for one in found.columns["columns"]}
    expected = {"t.month": ("category", 12), "t.weekday": ("category", 7), "t.hour": ("category", 24)}
    assert kinds == {name: expected.get(name, ("numeric", 0)) for name in names}
    assert found.columns["version"] == 4
    numbers = encode(tmp_path / "t", f"t,y\n{value},1\n", categories="codes", date_parts="numbers")
    assert not {"t.yearday", "t.minute"} & set(numbers.names)
    assert {one["kind"] for one in numbers.columns["columns"]} == {"numeric"}
    assert numbers.columns["version"] == 3


@pytest.mark.parametrize("n_days", [3, 40_000])
def test_parts_of_dates_far_apart_or_missing_are_those_of_pythons_date(n_days: int) -> None:
    begin, rng = dt.date(1900, 1, 1), np.random.default_rng(0)
    dates = [begin + dt.timedelta(days=int(day)) for day in rng.integers(0, n_days, 500)]
    times = Times.of(pa.array([None, *dates], pa.date32()))
    for part, of in (
        ("month", lambda date: date.month),
        ("day", lambda date: date.day),
        ("weekday", lambda date: date.weekday()),
        ("yearday", lambda date: date.timetuple().tm_yday),
        ("days", lambda date: (date - dt.date(1970, 1, 1)).days),
    ):
        np.testing.assert_array_equal(times.part(part), [np.nan, *map(of, dates)])
    np.testing.assert_array_equal(times.part("month", as_code=True)[1:], [date.month - 1 for date in dates])


def test_a_missing_date_has_the_code_of_none_and_a_later_file_the_same_codes(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    text = "t,y\n2024-01-01,1\n,2\n2024-03-06,3\n"
    first = encode(tmp_path / "1", text, categories="codes")
    assert first.names == ["t.days", "t.yearday", "t.month", "t.weekday", "t (missing)"]
    assert first.x[:, 2:].tolist() == [[0, 0, 0], [-1, -1, 1], [2, 2, 0]]
    like = pretend_store(monkeypatch, first)
    later = encode(tmp_path / "2", "t,y\n2025-12-07,1\n,2\n", target=None, like=like)
    assert later.names == first.names
    assert later.x[:, 2:].tolist() == [[11, 6, 0], [-1, -1, 1]]


def test_dates_durations_and_decimals_of_parquet_are_numbers(tmp_path: Path) -> None:
    table = {
        "date": pa.array([dt.date(2024, 2, 29), dt.date(1970, 1, 1)]),
        "took": pa.array([dt.timedelta(hours=1), dt.timedelta(milliseconds=250)]),
        "price": pa.array([1, 2]).cast(pa.decimal128(30, 2)),
        "y": [1.0, 2.0],
    }
    found = encode(tmp_path / "t", table, dates=["day", "hour"])
    assert found.names == ["date.day", "took", "price"]
    assert found.x.tolist() == [[29, 3600, 1], [1, 0.25, 2]]
    with pytest.raises(SourceError, match="'date' is a date, of which --dates hour says nothing"):
        encode(tmp_path / "t", table, dates=["hour"])
    with pytest.raises(SourceError, match="target 'date' is a date; turn it into a number"):
        encode(tmp_path / "t", table, target="date")


FIRST = "n,color,zip,when,y\n1,red,7,2024-01-01,no\n,blue,10,2024-01-02,yes\n5,,7,2024-01-03,no\n"
SETTINGS: dict[str, Any] = {"category": ["zip"], "missing": "mean", "rename": {"n": "amount"}}


def test_a_later_file_in_another_order_gets_the_features_and_fills_of_the_store(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, caplog: pytest.LogCaptureFixture
) -> None:
    first = encode(tmp_path / "1", FIRST, **SETTINGS)
    like = pretend_store(monkeypatch, first)
    text = "y,extra,when,zip,color,n\nyes,0,2024-01-02,10,blue,\nno,0,2024-01-01,7,red,1\n"
    with caplog.at_level(logging.WARNING):
        later = encode(tmp_path / "2", text, target=None, like=like)
    assert later.names == first.names
    assert later.expansion.class_names == first.expansion.class_names
    assert later.encoder.is_complete
    np.testing.assert_array_equal(later.x, first.x[[1, 0]])
    np.testing.assert_array_equal(later.y, first.y[[1, 0]])
    assert "not in first.zarr, so left out: extra" in caplog.text
    assert later.columns == first.columns


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n,color,zip,y\n1,red,7,no\n", "has no column 'when', which first.zarr has"),
        ("n,color,zip,when,y\n1,pink,7,2024-01-01,no\n", "column 'color', row 1: 'pink' is not among"),
        (
            "n,color,zip,when,y\n1,red,7,2024-01-01,no\n1,red,8,2024-01-01,no\n",
            "'zip', row 2: '8' is not among",
        ),
        ("n,color,zip,when,y\n1,red,7,2024-01-01,maybe\n", "column 'y', row 1: 'maybe' is not among"),
        (
            "n,color,zip,when,y\nx,red,7,2024-01-01,no\n",
            "column 'n', row 1: 'x' is no number; correct it, or leave its row out",
        ),
        (
            {"n": ["a"], "color": ["red"], "zip": [7], "when": ["a"], "y": ["no"]},
            "column 'n', row 1: 'a' is no number; correct it, or leave its row out",
        ),
    ],
)
def test_what_does_not_match_the_store_is_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: Any, message: str
) -> None:
    like = pretend_store(monkeypatch, encode(tmp_path / "1", FIRST, **SETTINGS))
    with pytest.raises(SourceError, match=message):
        encode(tmp_path / "2", text, target=None, like=like)


LATER = (
    "n,color,zip,when,y\n1,pink,7,2024-01-01,no\n2,red,8,2024-01-02,yes\n3,blue,7,2024-01-03,no\n"
    "4,pink,8,2024-01-04,no\n"
)


def test_ignored_unknown_categories_set_none_of_their_features_and_are_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(tmp_path / "1", FIRST, **SETTINGS)
    like = pretend_store(monkeypatch, first)
    later = encode(tmp_path / "2", LATER, target=None, like=like, unknown="ignore")
    assert later.names == first.names
    features = {name: later.x[:, j].tolist() for j, name in enumerate(later.names)}
    assert features["amount"] == [1, 2, 3, 4]
    assert features["color=red"] == [0, 1, 0, 0]
    assert features["color=blue"] == [0, 0, 1, 0]
    assert features["color=(missing)"] == [0, 0, 0, 0]
    assert features["zip=7"] == [1, 0, 1, 0]
    assert features["zip=10"] == [0, 0, 0, 0]
    assert later.encoder.report()["unknown"] == {"color": {"pink": 2}, "zip": {"8": 2}}


def test_rows_with_unknown_categories_or_classes_are_dropped_and_counted(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(tmp_path / "1", FIRST, **SETTINGS)
    like = pretend_store(monkeypatch, first)
    text = LATER + "5,red,7,2024-01-05,perhaps\n6,red,10,2024-01-05,yes\n"
    later = encode(tmp_path / "2", text, target=None, like=like, unknown="drop")
    assert later.x[:, later.names.index("amount")].tolist() == [3, 6]
    assert later.y.tolist() == [0, 1]
    report = later.encoder.report()
    assert report["dropped_rows"] == 4
    assert report["unknown"] == {"color": {"pink": 2}, "zip": {"8": 2}, "y": {"perhaps": 1}}


def test_rows_left_out_for_a_gap_are_not_counted_as_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = pretend_store(
        monkeypatch, encode(tmp_path / "1", "n,color,y\n1,red,1\n2,,2\n3,blue,3\n", missing="drop")
    )
    text = "n,color,y\n1,pink,1\n,pink,1\n3,,1\n4,red,1\n"
    later = encode(tmp_path / "2", text, target=None, like=like, unknown="ignore")
    assert later.x.tolist() == [[1, 0, 0], [4, 0, 1]]
    assert later.encoder.report()["unknown"] == {"color": {"pink": 1}}


def test_a_missing_text_that_the_store_never_met_is_unknown(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = pretend_store(
        monkeypatch, encode(tmp_path / "1", "n,color,y\n1,red,1\n2,blue,2\n", missing="mean")
    )
    text = "n,color,y\n1,,1\n2,red,2\n"
    later = encode(tmp_path / "2", text, target=None, like=like, unknown="ignore")
    assert later.x.tolist() == [[1, 0, 0], [2, 0, 1]]
    with pytest.raises(SourceError, match=r"'\(missing\)' is not among the 2 values"):
        encode(tmp_path / "3", text, target=None, like=like)


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("n,color,y\n1,red,4\n", r"4'? is not among the 2 values .* --unknown drop; "),
    ],
)
def test_classes_cannot_be_ignored(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, text: str, message: str
) -> None:
    first = encode(
        tmp_path / "1", "n,color,y\n1,red,1\n2,blue,2\n", categories="codes", task="classification"
    )
    like = pretend_store(monkeypatch, first)
    with pytest.raises(SourceError, match=message):
        encode(tmp_path / "2", text, target=None, like=like, unknown="ignore")


def test_an_ignored_unknown_category_has_the_code_of_none(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    table = "n,color,y\n1,red,1\n2,blue,2\n"
    first = encode(tmp_path / "1", table, categories="codes", dtype="float16")
    assert first.x.tolist() == [[1, 1], [2, 0]]
    like = pretend_store(monkeypatch, first)
    later = encode(tmp_path / "2", "n,color,y\n1,pink,1\n2,red,1\n", target=None, like=like, unknown="ignore")
    assert later.x.tolist() == [[1, -1], [2, 1]]
    assert later.encoder.report()["unknown"] == {"color": {"pink": 1}}


def test_texts_are_stored_as_codes_unless_asked_otherwise(tmp_path: Path) -> None:
    file = write(tmp_path / "t", TABLE)
    found = encode_source(open_tables([file], ConvertConfig(target="y")), ConvertConfig(target="y"))
    assert found.names == ["px_1", "color", "px_2"]
    assert found.x[:, 1].tolist() == [1, 0, 1]
    (color,) = [one for one in found.columns["columns"] if one["name"] == "color"]
    assert (color["encoding"], color["values"]) == ("codes", ["blue", "red"])


def test_many_unknown_values_are_counted_in_bounded_memory_and_a_resumed_count_goes_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = pretend_store(monkeypatch, encode(tmp_path / "1", "color,y\nred,1\nblue,2\n"))
    text = "color,y\n" + "".join(f"new{i},0\n" for i in range(500)) + "red,1\n"
    later = encode(tmp_path / "2", text, target=None, like=like, unknown="ignore")
    counts = later.encoder.report()["unknown"]["color"]
    assert (len(counts), sum(counts.values()), counts["(others)"]) == (21, 500, 480)
    state = json.loads(json.dumps(later.encoder.state()))
    config = ConvertConfig(like=like, unknown="ignore")
    resumed = RowEncoder.build(later.source, config, take_over(config)[1])
    resumed.restore(state)
    assert resumed.report() == later.encoder.report()


def test_a_later_file_with_other_names_is_renamed_to_the_stores(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(tmp_path / "1", FIRST, **SETTINGS)
    like = pretend_store(monkeypatch, first)
    text = FIRST.replace("n,color,zip,when,y", "menge,farbe,zip,tag,ok")
    # `amount` is the store's own name for what its files called `n`: either will do.
    for amount in ("amount", "n"):
        rename = {"menge": amount, "farbe": "color", "tag": "when", "ok": "y"}
        later = encode(tmp_path / "2", text, target=None, like=like, rename=rename)
        assert later.names == first.names
        np.testing.assert_array_equal(later.x, first.x)
        np.testing.assert_array_equal(later.y, first.y)


def test_two_columns_of_a_later_file_may_change_places(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    like = pretend_store(monkeypatch, encode(tmp_path / "1", "a,b,y\n1,2,3\n"))
    later = encode(tmp_path / "2", "a,b,y\n1,2,3\n", target=None, like=like, rename={"a": "b", "b": "a"})
    assert (later.names, later.x.tolist()) == (["a", "b"], [[2, 1]])
    with pytest.raises(SourceError, match=r"has no column 'a', .*--rename OTHER=a takes another"):
        encode(tmp_path / "3", "b,c,y\n1,2,3\n", target=None, like=like, rename={"c": "b"})
    with pytest.raises(SourceError, match="no column 'c' for --rename"):
        encode(tmp_path / "4", "a,b,y\n1,2,3\n", target=None, like=like, rename={"c": "b"})


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"columns": ["n"]}, "columns contradicts like"),
        ({"dates": ["day"]}, "dates contradicts like"),
        ({"target": "n"}, "target n contradicts like, whose store first.zarr has y"),
        ({"task": "regression"}, "task regression contradicts like"),
        ({"dtype": "float16"}, "dtype float16 contradicts like"),
        ({"missing": "mean"}, "missing mean contradicts like, .* records no means"),
    ],
)
def test_options_that_contradict_the_store_are_refused_by_name(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, settings: dict[str, Any], message: str
) -> None:
    first = encode(tmp_path / "1", "n,y\n1,a\n2,b\n", missing="drop")
    like = pretend_store(monkeypatch, first)
    with pytest.raises(ConfigError, match=message):
        encode(tmp_path / "2", "n,y\n1,a\n2,b\n", **{"target": None, **settings}, like=like)


def test_columns_of_version_1_are_still_followed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    first = encode(tmp_path / "1", "n,color,y\n1,red,5\n2,blue,10\n", task="classification")
    columns = [
        {"name": "n", "kind": "numeric"},
        {"name": "color", "kind": "category", "values": ["blue", "red"]},
    ]
    like = pretend_store(monkeypatch, first, columns={"version": 1, "target": "y", "columns": columns})
    later = encode(tmp_path / "2", "color,y,n\nblue,10,2.5\n", target=None, like=like)
    assert (later.names, later.expansion.class_names) == (first.names, ("5", "10"))
    assert (later.x.tolist(), later.y.tolist()) == ([[2.5, 1, 0]], [1])


@pytest.mark.parametrize(
    ("columns", "message"),
    [({"predictions_of": "x"}, "holds no converted columns"), ({"version": 5}, "columns of version 5")],
)
def test_a_store_without_columns_to_follow_is_refused(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, columns: dict[str, Any], message: str
) -> None:
    like = pretend_store(monkeypatch, encode(tmp_path / "1", TABLE), columns=columns)
    with pytest.raises(ConfigError, match=message):
        encode(tmp_path / "2", TABLE, like=like)


def arrays(x: np.ndarray, y: np.ndarray) -> RowSource:
    return pair_source(x, y, None)


def test_columns_of_arrays_are_chosen_and_renamed_too() -> None:
    x = np.arange(12.0).reshape(3, 4)
    source = arrays(x, np.arange(3.0))
    config = ConvertConfig(columns=["x3", "x*"], drop=["x1"], rename={"x3": "last", "y": "t"})
    found = encode_source(choose_columns(source, config), config, block_bytes=40)
    assert found.names == ["last", "x0", "x2"]
    assert found.source.target.names == ("t",)
    np.testing.assert_array_equal(found.x, x[:, [3, 0, 2]])
    with pytest.raises(ConfigError, match="dates was given for arrays"):
        choose_columns(source, ConvertConfig(dates=["day"]))
    with pytest.raises(SourceError, match="no column 'x9' for --rename"):
        choose_columns(source, ConvertConfig(rename={"x9": "a"}))


def test_arrays_like_a_store_of_a_table_need_its_number_of_features_and_get_its_names(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    first = encode(tmp_path / "1", "a,b,y\n1,2,3\n")
    config = ConvertConfig(like=pretend_store(monkeypatch, first))
    found = encode_source(choose_columns(arrays(np.ones((2, 2)), np.ones(2)), config), config)
    assert found.names == ["a", "b"]
    with pytest.raises(SourceError, match=r"has 3 features but first.zarr has 2"):
        choose_columns(arrays(np.ones((2, 3)), np.ones(2)), config)
    with pytest.raises(SourceError, match=r"has 1 for regression; give the same kind of y"):
        choose_columns(arrays(np.ones((2, 2)), np.ones((2, 2))), config)


def test_arrays_like_a_store_of_some_columns_give_the_same_ones(monkeypatch: pytest.MonkeyPatch) -> None:
    x, y = np.arange(6.0).reshape(2, 3), np.array([7, 8])
    chosen = ConvertConfig(columns=["x2", "x0"])
    first = encode_source(choose_columns(arrays(x, y), chosen), chosen)
    config = ConvertConfig(like=pretend_store(monkeypatch, first))
    later = encode_source(choose_columns(arrays(x[:1], y[:1]), config), config)
    assert (later.x.tolist(), later.y.tolist()) == ([[2, 0]], [0])
    with pytest.raises(SourceError, match=r"column 'y', row 1: 9 is not among the 2 values of first\.zarr"):
        encode_source(choose_columns(arrays(x[:1], y[:1] + 2), config), config)
