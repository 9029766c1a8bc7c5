"""A later file is read like the files that a store was made of, in whatever format and notation it comes."""

from __future__ import annotations

import datetime as dt
import decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.feather as feather
import pyarrow.parquet as pq
import pytest

import ep3stream
from ep3stream import ConfigError, ConvertConfig, SourceError

N = 12
EACH = np.arange(N)
MARCH = dt.datetime(2026, 3, 1)
DAYS = [MARCH + dt.timedelta(days=int(i) % 5) for i in EACH]
TIMES = [MARCH + dt.timedelta(hours=7 * int(i), microseconds=123456) for i in EACH]
NANOSECONDS = (np.datetime64("2026-03-01T00:00:00.123456789") + EACH * np.timedelta64(3600, "s")).astype(
    "M8[ns]"
)
ZONED = [time.replace(tzinfo=dt.UTC) for time in TIMES]

# Columns of every kind: the values, and the settings of the first conversion.
KINDS: dict[str, tuple[pa.Array, dict[str, Any]]] = {
    "nanoseconds": (pa.array(NANOSECONDS), {}),
    "uint64 category": (pa.array(np.uint64(2**63) + (EACH % 3).astype("u8")), {"category": ["k"]}),
    "int64 category": (pa.array(EACH % 3 - 1), {"category": ["k"]}),
    "int8 category": (pa.array((EACH % 3).astype("i1")), {"category": ["k"]}),
    "float category": (pa.array((EACH % 3) / 2 + 0.1), {"category": ["k"]}),
    "float32 category": (pa.array(((EACH % 3) / 2 + 0.1).astype("f4")), {"category": ["k"]}),
    "category of gapped whole numbers": (pa.array([None, 1, 2, 3] * 3), {"category": ["k"], "missing": "mean"}),
    "booleans": (pa.array([True, False, True] * 4), {}),
    "boolean category": (pa.array([True, False, True] * 4), {"category": ["k"]}),
    "date category": (pa.array([day.date() for day in DAYS]), {"category": ["k"]}),
    "decimals": (pa.array([decimal.Decimal(f"{i}.25") for i in EACH]), {}),
    "dictionary": (pa.array(["a", "b", "c"] * 4).dictionary_encode(), {}),
    "texts": (pa.array(["a", "b c", 'say "c"'] * 4), {}),
    "texts of numbers": (pa.array(["01", "1", "1.0"] * 4), {"category": ["k"]}),
    "codes": (pa.array(["a", "b", "c"] * 4), {"categories": "codes"}),
    "dates": (pa.array([day.date() for day in DAYS]), {}),
    "dates of 64 bits": (pa.array([day.date() for day in DAYS], pa.date64()), {}),
    "midnights": (pa.array(DAYS, pa.timestamp("ms")), {"dates": ["days", "weekday"]}),
    "microseconds": (pa.array(TIMES, pa.timestamp("us")), {}),
    "zoned times": (pa.array(ZONED, pa.timestamp("us", "UTC")), {}),
    "times in Oslo": (pa.array(ZONED, pa.timestamp("us", "Europe/Oslo")), {}),
    "times of day": (pa.array([time.time() for time in TIMES]), {}),
    "small whole numbers": (pa.array(EACH.astype("i2")), {}),
    "large whole numbers": (pa.array(np.uint64(2**63) + EACH.astype("u8") * np.uint64(2**40)), {}),
    "float32": (pa.array((EACH / 7).astype("f4")), {}),
    "gapped whole numbers": (pa.array([None, 1, 2, 3] * 3), {"missing": "mean"}),
    "large strings": (pa.array(["a", "b", "c"] * 4, pa.large_string()), {}),
}  # fmt: skip


# Kinds with the same settings are columns of one table.
TOGETHER: dict[str, list[str]] = {}
for _kind, (_, _settings) in KINDS.items():
    TOGETHER.setdefault(" and ".join(_settings) or "no settings", []).append(_kind)


def table_of(values: pa.Array) -> pa.Table:
    return table_of_columns({"k": values})


def table_of_columns(columns: dict[str, pa.Array]) -> pa.Table:
    return pa.table(columns | {"n": pa.array(EACH * 0.5), "y": pa.array(EACH * 1.0)})


def as_source(table: pa.Table, form: str, folder: Path) -> Any:
    """The table as a file or an object of Python."""
    folder.mkdir(exist_ok=True)
    if form == "pandas":
        return table.to_pandas()
    if form == "arrow table":
        return table
    path = folder / f"rows.{form}"
    if form == "csv":
        plain = [
            c.combine_chunks().dictionary_decode() if pa.types.is_dictionary(c.type) else c
            for c in table.columns
        ]
        pa_csv.write_csv(pa.table(plain, names=table.column_names), path)
    elif form == "parquet":
        pq.write_table(table, path)
    else:
        feather.write_feather(table, path)
    return path


def rows(store: Path) -> np.ndarray:
    """x of the only split, with the offsets of the store added."""
    with ep3stream.open_store(store) as opened:
        (name,) = opened.manifest.splits
        reader = opened.split(name)
        x = reader.read_rows(np.arange(reader.info.n_rows))[0]
        return np.asarray(x, np.float64) + opened.manifest.offsets.x


def convert(source: Any, store: Path, **settings: Any) -> np.ndarray:
    ep3stream.convert(source, store, ConvertConfig(shuffle=False, **settings))
    return rows(store)


FORMS = ("csv", "parquet", "pandas")


@pytest.mark.parametrize("first", FORMS)
@pytest.mark.parametrize("together", TOGETHER)
def test_rows_in_any_format_are_read_like_the_store_made_of_them_in_another(together, first, tmp_path):
    kinds = TOGETHER[together]
    table = table_of_columns({kind: KINDS[kind][0] for kind in kinds})
    settings = KINDS[kinds[0]][1]
    if "category" in settings:
        settings = settings | {"category": kinds}
    made = convert(as_source(table, first, tmp_path / "1"), tmp_path / "s.zarr", target="y", **settings)
    for second in FORMS:
        source = as_source(table, second, tmp_path / "2")
        again = convert(source, tmp_path / f"{second}.zarr", like=tmp_path / "s.zarr")
        np.testing.assert_allclose(again, made, atol=1e-6, err_msg=f"{first} then {second}")


def test_durations_are_read_again_where_a_format_has_them(tmp_path):
    table = table_of(pa.array([dt.timedelta(seconds=int(i)) for i in EACH]))
    made = convert(as_source(table, "parquet", tmp_path), tmp_path / "s.zarr", target="y")
    assert made[:, 0].tolist() == EACH.tolist()
    for form in ("pandas", "feather"):
        again = convert(as_source(table, form, tmp_path), tmp_path / f"{form}.zarr", like=tmp_path / "s.zarr")
        np.testing.assert_array_equal(again, made)
    (tmp_path / "t.csv").write_text("k,n,y\n1 days 00:00:00,1,2\n")
    with pytest.raises(SourceError, match=r"'k' was a duration .*give a Parquet or Arrow file"):
        convert(tmp_path / "t.csv", tmp_path / "no.zarr", like=tmp_path / "s.zarr")


# What a later file may write for the values of the store, and what then is the same.
SPELLINGS: dict[str, tuple[list[Any], list[Any]]] = {
    "1.0 for 1": ([1, 2, 3], [1.0, 2.0, 3.0]),
    "texts for whole numbers": ([1, 2, 3], ["1", "2", "3"]),
    "texts of fractions for whole numbers": ([1, 2, 3], ["1.0", "2.0", "3.0"]),
    "whole numbers for texts": (["1", "2", "x"], [1, 2, 1]),
    "floats for texts": (["1", "2", "x"], [1.0, 2.0, 1.0]),
    "1e3 for 1000": (["1000", "2000", "x"], ["1e3", "2E+3", "x"]),
    "truth for 0 and 1": ([0, 1, 1], [False, True, True]),
    "0 and 1 for truth": ([True, False, True], [1, 0, 1]),
    "True for true": ([True, False, True], ["True", "False", "TRUE"]),
    "midnights for dates": (
        [dt.date(2026, 3, 1), dt.date(2026, 3, 2), dt.date(2026, 3, 2)],
        [dt.datetime(2026, 3, 1), dt.datetime(2026, 3, 2), dt.datetime(2026, 3, 2)],
    ),
    "texts for dates": (
        [dt.date(2026, 3, 1), dt.date(2026, 3, 2), dt.date(2026, 3, 2)],
        ["2026-03-01", "2026-03-02", "2026-03-02"],
    ),
    "digits beyond 2^53": ([2**62 + 1, 2**62 + 2, 2**62 + 3], [str(2**62 + 1), str(2**62 + 2), str(2**62 + 3)]),
}  # fmt: skip


@pytest.mark.parametrize("spelling", SPELLINGS)
def test_a_category_may_be_written_in_another_way(spelling, tmp_path):
    first, second = SPELLINGS[spelling]
    columns = {"n": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}
    made = tmp_path / "s.zarr"
    convert(pa.table({"k": first, **columns}), made, target="y", category=["k"], categories="onehot")
    again = convert(pa.table({"k": second, **columns}), tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    names = list(map(str, ep3stream.open_store(tmp_path / "s.zarr").manifest.feature_names))
    said = [names[int(row.argmax())] for row in again[:, : len(set(first))]]
    expected = [str(value).lower() if isinstance(value, bool) else str(value) for value in first]
    if spelling in ("whole numbers for texts", "floats for texts"):
        expected[2] = "1"
    assert said == [f"k={value}" for value in expected]


@pytest.mark.parametrize("spelling", [name for name in SPELLINGS if "date" not in name])
def test_a_label_may_be_written_in_another_way(spelling, tmp_path):
    first, second = SPELLINGS[spelling]
    table = pa.table({"n": [1.0, 2.0, 3.0], "y": first})
    made = ep3stream.convert(
        table, tmp_path / "s.zarr", ConvertConfig(target="y", task="classification", shuffle=False)
    )
    later = pa.table({"n": [1.0, 2.0, 3.0], "y": second})
    ep3stream.convert(later, tmp_path / "again.zarr", ConvertConfig(like=tmp_path / "s.zarr"))
    ids = ep3stream.open_store(tmp_path / "again.zarr").split("train").read_rows(np.arange(3))[1]
    expected = [str(value).lower() if isinstance(value, bool) else str(value) for value in first]
    if spelling in ("whole numbers for texts", "floats for texts"):
        expected[2] = "1"
    assert [made.class_names[i] for i in ids] == expected


def test_a_number_that_may_be_two_categories_is_none_of_them(tmp_path):
    columns = {"n": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}
    convert(pa.table({"k": ["1", "1.0", "2"], **columns}), tmp_path / "s.zarr", target="y")
    again = convert(
        pa.table({"k": ["1.0", "1", "2.0"], **columns}), tmp_path / "a.zarr", like=tmp_path / "s.zarr"
    )
    assert again[:, 0].tolist() == [1, 0, 2]
    with pytest.raises(SourceError, match=r"'k', row 1: '1.00' is not among"):
        convert(pa.table({"k": ["1.00", "1", "2"], **columns}), tmp_path / "b.zarr", like=tmp_path / "s.zarr")


# A column of the first type, read from a later file of the second: the values are the same.
@pytest.mark.parametrize(
    ("first", "second"),
    [
        (pa.array([0, 1, 1]), pa.array([False, True, True])),
        (pa.array([False, True, True]), pa.array([0, 1, 1])),
        (pa.array([False, True, True]), pa.array([0.0, 1.0, 1.0])),
        (pa.array(DAYS[:3], pa.timestamp("us")), pa.array([day.date() for day in DAYS[:3]])),
        (pa.array([day.date() for day in DAYS[:3]]), pa.array(DAYS[:3], pa.timestamp("ns"))),
        (pa.array(DAYS[:3], pa.timestamp("us")), pa.array([f"{day:%Y-%m-%d}" for day in DAYS[:3]])),
        (pa.array([day.date() for day in DAYS[:3]]), pa.array([f"{day:%Y-%m-%d}" for day in DAYS[:3]])),
        (pa.array([time.time() for time in TIMES[:3]]), pa.array([str(time.time()) for time in TIMES[:3]])),
        (pa.array(ZONED[:3]), pa.array([time.isoformat() for time in ZONED[:3]])),
        (pa.array([1.5, 2.5, 3.0]), pa.array(["1.5", "2.5", "3"])),
        (pa.array([1, 2, 3], pa.int8()), pa.array([1, 2, 3], pa.uint64())),
    ],
    ids=str,
)
def test_a_column_may_have_another_type_with_the_same_values(first, second, tmp_path):
    columns = {"n": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}
    made = convert(pa.table({"k": first, **columns}), tmp_path / "s.zarr", target="y", dates=["days", "hour"])
    again = convert(pa.table({"k": second, **columns}), tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    np.testing.assert_array_equal(again, made)


@pytest.mark.parametrize(
    ("first", "second", "message"),
    [
        (
            pa.array([day.date() for day in DAYS[:3]]),
            pa.array(TIMES[:3]),
            "'k', row 1: .*is no midnight, but a date",
        ),
        (
            pa.array([day.date() for day in DAYS[:3]]),
            pa.array([0, 1, 2], pa.timestamp("ns")),
            "'k', row 2: 1970-01-01 00:00:00 is no midnight, but a date",
        ),
        (
            pa.array([True, False, True]),
            pa.array([1, 0, 2]),
            "'k', row 3: 2 is neither 0 nor 1, but true or false",
        ),
        (pa.array([True, False, True]), pa.array([1, 0.5, 1]), "'k', row 2: 0.5 is neither 0 nor 1"),
        (pa.array(TIMES[:3]), pa.array(ZONED[:3]), "'k' holds times with a time zone but has those without"),
        (pa.array(ZONED[:3]), pa.array(TIMES[:3]), "'k' holds times without a time zone but has those with"),
        (pa.array([1, 2, 3]), pa.array(DAYS[:3]), "'k' holds timestamp.* but was number"),
        (pa.array([1, 2, 3]), pa.array([[1], [2], [3]]), "'k' holds list.*; convert it$"),
    ],
    ids=str,
)
def test_other_values_of_another_type_are_refused_with_the_remedy(first, second, message, tmp_path):
    columns = {"n": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]}
    convert(pa.table({"k": first, **columns}), tmp_path / "s.zarr", target="y")
    with pytest.raises(SourceError, match=message):
        convert(pa.table({"k": second, **columns}), tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    assert not (tmp_path / "again.zarr").exists()


def write_parts(folder: Path, form: str, parts: list[pa.Table]) -> Path:
    folder.mkdir()
    for number, part in enumerate(parts):
        as_source(part, form, folder / "one").rename(folder / f"part-{number}.{form}")
    (folder / "one").rmdir()
    return folder


@pytest.mark.parametrize("form", ["csv", "parquet", "feather"])
@pytest.mark.parametrize("place", [0, 2])
@pytest.mark.parametrize(
    "kind", ["texts", "dates", "booleans", "small whole numbers", "zoned times", "times of day"]
)
def test_a_column_of_nulls_alone_in_one_part_has_the_type_of_the_others(kind, place, form, tmp_path):
    table = table_of(KINDS[kind][0])
    nulls = table.set_column(0, "k", pa.nulls(N))
    parts = [nulls if number == place else table for number in range(3)]
    folder = write_parts(tmp_path / "d", form, parts)
    made = convert(folder, tmp_path / "s.zarr", target="y", missing="mean")
    whole = convert(table, tmp_path / "t.zarr", target="y")
    assert made.shape[0] == 3 * N
    known = np.arange(3 * N) // N != place
    n_columns = whole.shape[1] - 1  # Without the column that is behind those of k, and marks of gaps.
    np.testing.assert_allclose(made[known][:N, :n_columns], whole[:, :n_columns], atol=1e-6)


def test_a_column_of_nulls_in_all_parts_is_refused_in_a_line(tmp_path):
    table = table_of(pa.nulls(N))
    folder = write_parts(tmp_path / "d", "parquet", [table, table])
    with pytest.raises(
        SourceError, match="column 'k' is empty from row 1 on; fill it in or leave it out with --drop"
    ):
        convert(folder, tmp_path / "s.zarr", target="y")
    assert convert(folder, tmp_path / "s.zarr", target="y", drop=["k"]).shape == (2 * N, 1)


def test_columns_that_nobody_reads_may_be_dropped_from_all_parts(tmp_path):
    parts = [table_of(pa.array([[1]] * N)), table_of(pa.array([b"x"] * N, pa.binary()))]
    folder = write_parts(tmp_path / "d", "parquet", parts)
    assert convert(folder, tmp_path / "s.zarr", target="y", drop=["k"]).shape == (2 * N, 1)


@pytest.mark.parametrize("form", ["csv", "parquet", "feather"])
@pytest.mark.parametrize("places", [(0,), (1,), (2,), (0, 2)])
def test_parts_without_rows_are_passed_over_and_told(places, form, tmp_path, caplog):
    caplog.set_level("INFO")
    table = table_of(KINDS["texts"][0])
    parts = [table.slice(0, 0) if number in places else table for number in range(3)]
    folder = write_parts(tmp_path / "d", form, parts)
    made = convert(folder, tmp_path / "s.zarr", target="y")
    assert len(made) == (3 - len(places)) * N
    assert f"{len(places)} part(s) without rows are passed over" in caplog.text
    again = convert(folder, tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    np.testing.assert_array_equal(again, made)


@pytest.mark.parametrize(
    ("name", "content"),
    [
        ("part-1.csv", b""),
        ("part-1.csv", b"\n\n"),
        ("part-1.csv", b"\xef\xbb\xbf"),
        ("part-1.csv", b"k,n,y"),
    ],
)
def test_parts_without_a_byte_or_a_header_are_passed_over(name, content, tmp_path):
    folder = write_parts(tmp_path / "d", "csv", [table_of(KINDS["texts"][0])])
    (folder / name).write_bytes(content)
    assert len(convert(folder, tmp_path / "s.zarr", target="y")) == N


@pytest.mark.parametrize("name", ["part-1.csv.gz", "part-1.csv.xz", "part-1.parquet", "part-1.arrow"])
def test_parts_of_no_byte_whose_format_has_a_header_were_emptied_and_are_refused(name, tmp_path):
    folder = write_parts(tmp_path / "d", "csv", [table_of(KINDS["texts"][0])])
    (folder / name).write_bytes(b"")
    with pytest.raises(SourceError, match=name):
        convert(folder, tmp_path / "s.zarr", target="y")


def test_a_source_without_any_row_is_refused(tmp_path):
    empty = table_of(KINDS["texts"][0]).slice(0, 0)
    folder = write_parts(tmp_path / "d", "parquet", [empty, empty])
    with pytest.raises(SourceError, match="has no rows, nor has any of the other 1 files"):
        convert(folder, tmp_path / "s.zarr", target="y")
    for number in (0, 1):
        (tmp_path / f"{number}.svm").write_text("# nothing\n")
    with pytest.raises(SourceError, match=r"(states no feature|has no rows)"):
        convert([tmp_path / "0.svm", tmp_path / "1.svm"], tmp_path / "s.zarr")


def test_parts_may_state_dates_and_midnights_or_whole_and_broken_numbers(tmp_path):
    dates, midnights = table_of(KINDS["dates"][0]), table_of(pa.array(DAYS, pa.timestamp("us")))
    for number, parts in enumerate(([dates, midnights], [midnights, dates])):
        made = convert(
            write_parts(tmp_path / f"d{number}", "parquet", parts), tmp_path / f"{number}.zarr", target="y"
        )
        np.testing.assert_array_equal(made[:N], made[N:])
    names = ep3stream.open_store(tmp_path / "0.zarr").manifest.feature_names
    assert "k.hour" in names
    numbers = [table_of(pa.array(EACH)), table_of(pa.array(EACH + 0.5)), table_of(pa.array(EACH % 2 == 0))]
    made = convert(write_parts(tmp_path / "n", "feather", numbers), tmp_path / "n.zarr", target="y")
    assert made[:, 0].tolist() == [*EACH, *(EACH + 0.5), *(EACH % 2 == 0)]


@pytest.mark.parametrize(
    "types", [("i1", "i4", "i8"), ("u8", "i4", "i8"), ("i8", "u8", "f8"), ("f4", "i2", "u1")]
)
@pytest.mark.parametrize("role", ["category", "label"])
def test_parts_may_hold_whole_numbers_of_other_widths(role, types, tmp_path):
    values = {
        "i1": [-1, 2, 3],
        "i4": [-1, 100_000, 3],
        "i8": [-1, 2**40, 2],
        "u8": [2**63 + 1, 3, 2],
        "f8": [2, 3, 4],
    }
    values |= {"f4": [2, 3, 4], "i2": [2, -1, 3], "u1": [2, 3, 255]}
    is_label = role == "label" and "u8" not in types
    parts = [
        pa.table({"k": pa.array(np.array(values[dtype], dtype)), "n": [1.0, 2.0, 3.0], "y": [1.0, 2.0, 3.0]})
        for dtype in types
    ]
    folder = write_parts(tmp_path / "d", "parquet", parts)
    settings = (
        {"target": "k", "task": "classification"}
        if is_label
        else {"target": "y", "category": ["k"], "categories": "onehot"}
    )
    made = convert(folder, tmp_path / "s.zarr", **settings)
    manifest = ep3stream.open_store(tmp_path / "s.zarr").manifest
    known = sorted({value for dtype in types for value in values[dtype]})
    names = list(manifest.class_names or ()) or [
        name[2:] for name in manifest.feature_names if name.startswith("k=")
    ]
    assert [decimal.Decimal(name) for name in names] == known
    again = convert(folder, tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    np.testing.assert_array_equal(again, made)


# -- svmlight


def write_sparse(path: Path, x: np.ndarray, base: int) -> Path:
    lines = (
        f"{row.sum():.3f} " + " ".join(f"{j + base}:{value}" for j, value in enumerate(row) if value)
        for row in x
    )
    path.write_text("\n".join(lines) + "\n")
    return path


SPARSE = np.round(np.random.default_rng(0).normal(size=(20, 5)), 3)


def with_zeros(*columns: int) -> np.ndarray:
    x = SPARSE.copy()
    x[:, list(columns)] = 0
    return x


@pytest.mark.parametrize("base", [0, 1])
@pytest.mark.parametrize("absent", [(), (0,), (4,), (3, 4), (0, 4)], ids=str)
def test_svmlight_files_keep_base_and_number_of_features(base, absent, tmp_path):
    convert(write_sparse(tmp_path / "1.svm", SPARSE, base), tmp_path / "s.zarr", index_base=base)
    later = write_sparse(tmp_path / "2.svm", with_zeros(*absent), base)
    again = convert(later, tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    np.testing.assert_allclose(again, with_zeros(*absent), atol=1e-6)


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"index_base": 1}, "index_base 1 contradicts like, whose store .* has 0; leave index_base out"),
        ({"features": 4}, "features 4 contradicts like, whose store .* has 5; leave features out"),
    ],
)
def test_what_contradicts_the_store_of_svmlight_files_is_refused(settings, message, tmp_path):
    convert(write_sparse(tmp_path / "1.svm", SPARSE, 0), tmp_path / "s.zarr", index_base=0)
    with pytest.raises(ConfigError, match=message):
        convert(tmp_path / "1.svm", tmp_path / "again.zarr", like=tmp_path / "s.zarr", **settings)


def test_an_index_beyond_those_of_the_store_is_refused_by_row(tmp_path):
    convert(write_sparse(tmp_path / "1.svm", SPARSE, 1), tmp_path / "s.zarr")
    (tmp_path / "2.svm").write_text("1.5 1:1\n2.5 6:1\n")
    with pytest.raises(
        SourceError, match=r"2.svm: row 2: index 6 is beyond 5 features; so many has .*s.zarr"
    ):
        convert(tmp_path / "2.svm", tmp_path / "again.zarr", like=tmp_path / "s.zarr")


def test_chosen_columns_of_arrays_and_svmlight_are_chosen_again(tmp_path):
    convert(
        write_sparse(tmp_path / "1.svm", SPARSE, 0), tmp_path / "s.zarr", index_base=0, columns=["x3", "x0"]
    )
    again = convert(tmp_path / "1.svm", tmp_path / "again.zarr", like=tmp_path / "s.zarr")
    np.testing.assert_allclose(again, SPARSE[:, [3, 0]], atol=1e-6)
    convert((SPARSE, SPARSE.sum(1)), tmp_path / "t.zarr", columns=["x0", "x1"])
    again = convert((SPARSE, SPARSE.sum(1)), tmp_path / "two.zarr", like=tmp_path / "t.zarr")
    np.testing.assert_allclose(again, SPARSE[:, :2], atol=1e-6)
    again = convert((SPARSE[:, :2], SPARSE.sum(1)), tmp_path / "three.zarr", like=tmp_path / "t.zarr")
    np.testing.assert_allclose(again, SPARSE[:, :2], atol=1e-6)
