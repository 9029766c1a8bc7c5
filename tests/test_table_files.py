from __future__ import annotations

import contextlib
import csv
import gzip
import io
import zipfile
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.csv as pa_csv
import pyarrow.parquet as pq
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from ep3stream.errors import SourceError
from ep3stream.formats import tables, text_blocks
from ep3stream.formats.source import START, RestartPosition, reading
from ep3stream.formats.tables import TableInput, table_header, table_records, table_schema

N_ROWS = 400


def zstd(data: bytes) -> bytes:
    return pa.Codec("zstd").compress(data, asbytes=True)


def zipped(data: bytes, name: str = "t.csv") -> bytes:
    packed = io.BytesIO()
    with zipfile.ZipFile(packed, "w", zipfile.ZIP_DEFLATED) as archive:
        archive.writestr(name, data)
    return packed.getvalue()


def arrow(table: pa.Table, codec: str | None, new: Callable[..., Any]) -> bytes:
    sink = io.BytesIO()
    with new(sink, table.schema, options=pa.ipc.IpcWriteOptions(compression=codec)) as writer:
        writer.write_table(table, max_chunksize=70)
    return sink.getvalue()


def parquet(table: pa.Table) -> bytes:
    sink = io.BytesIO()
    pq.write_table(table, sink, row_group_size=90, write_page_checksum=True)
    return sink.getvalue()


def table_of(n_rows: int = N_ROWS, seed: int = 0) -> pa.Table:
    rng = np.random.default_rng(seed)
    words = ["", "a", 'quo"te', "com,ma", "line\nbreak", "tab\there", '"', 'é"\r\n']
    return pa.table(
        {
            "i": pa.array(np.arange(n_rows)),
            "f": pa.array(rng.standard_normal(n_rows)),
            "t": pa.array(["w" + words[k] for k in rng.integers(0, len(words), n_rows)]),
        }
    )


def as_text(table: pa.Table, delimiter: str = ",", line_end: str = "\r\n") -> bytes:
    text = io.StringIO(newline="")
    writer = csv.writer(text, delimiter=delimiter, lineterminator=line_end)
    writer.writerow(table.column_names)
    writer.writerows(zip(*(table.column(name).to_pylist() for name in table.column_names), strict=True))
    return text.getvalue().encode()


WRITERS: dict[str, Callable[[pa.Table], bytes]] = {
    "t.csv": as_text,
    "t.tsv": lambda table: b"\xef\xbb\xbf" + as_text(table, "\t", "\n"),
    "t.csv.gz": lambda table: gzip.compress(as_text(table)),
    "t.tsv.zst": lambda table: zstd(as_text(table, "\t")),
    "t.zip": lambda table: zipped(as_text(table)),
    "t.parquet": parquet,
    "t.arrow": lambda table: arrow(table, None, pa.ipc.new_file),
    "t.feather": lambda table: arrow(table, "lz4", pa.ipc.new_file),
    "t.ipc": lambda table: arrow(table, "zstd", pa.ipc.new_stream),
}


def types_of(table: TableInput) -> dict[str, pa.DataType]:
    return {field.name: field.type for field in table_schema(table)}


def read(table: TableInput, block_bytes: int = 1 << 20, start: RestartPosition = START) -> pa.Table:
    with reading(table):  # type: ignore[arg-type]
        types = types_of(table)
        rows = [record.rows for record in table_records(table, types, block_bytes, start)]
    return joined(rows, pa.schema(list(types.items())))


def joined(rows: Iterable[pa.RecordBatch], schema: pa.Schema) -> pa.Table:
    """The rows as columns of the schema's types: texts of Parquet come as dictionaries."""
    return pa.concat_tables(pa.Table.from_batches([batch]).cast(schema) for batch in rows)


def read_as(path: Path, types: dict[str, pa.DataType], block_bytes: int) -> list[pa.RecordBatch]:
    table_schema(path)
    return [record.rows for record in table_records(path, types, block_bytes, START)]


def write(directory: Path, name: str, data: bytes) -> Path:
    path = directory / name
    path.write_bytes(data)
    return path


@pytest.mark.parametrize("name", WRITERS)
def test_every_format_gives_the_rows_that_were_written(tmp_path: Path, name: str) -> None:
    table = table_of()
    path = write(tmp_path, name, WRITERS[name](table))
    assert table_header(path) == table.column_names
    assert read(path).equals(table)


@pytest.mark.parametrize("name", WRITERS)
@settings(max_examples=6)
@given(block_bytes=st.integers(40, 20_000), other_bytes=st.integers(40, 20_000), data=st.data())
def test_any_block_size_and_any_restart_give_the_same_rows(
    tmp_path: Path, name: str, block_bytes: int, other_bytes: int, data: st.DataObject
) -> None:
    table = table_of()
    path = write(tmp_path, name, WRITERS[name](table))
    types = types_of(path)
    records = list(table_records(path, types, block_bytes, START))
    stop = data.draw(st.integers(0, len(records) - 1))
    end = records[stop].first_row + records[stop].rows.num_rows
    start = RestartPosition(0, end, records[stop].next_byte)
    assert [record.first_row for record in records] == [
        0,
        *np.cumsum([record.rows.num_rows for record in records])[:-1],
    ]
    assert [record.end_byte for record in records] == sorted(record.end_byte for record in records)
    assert records[-1].end_byte <= path.stat().st_size
    rest = list(table_records(path, types, other_bytes, start))
    rows = [record.rows for record in (*records[: stop + 1], *rest)]
    assert joined(rows, table.schema).equals(table)
    assert all(record.first_row >= end for record in rest)


@pytest.mark.parametrize("name", [name for name in WRITERS if name not in ("t.csv", "t.tsv")])
def test_a_file_truncated_anywhere_is_an_error_and_never_fewer_rows(tmp_path: Path, name: str) -> None:
    data = WRITERS[name](table_of())
    for end in np.linspace(1, len(data) - 1, 40).astype(int):
        path = write(tmp_path, name, data[:end])
        with pytest.raises(SourceError, match=name):
            read(path)


def test_an_arrow_stream_cut_between_two_record_batches_is_an_error(tmp_path: Path) -> None:
    sink, table = io.BytesIO(), table_of()
    with pa.ipc.new_stream(sink, table.schema) as writer:
        writer.write_table(table.slice(0, 100))
        boundary = sink.tell()
        writer.write_table(table.slice(100))
    with pytest.raises(SourceError, match=r"t\.ipc: is no Arrow file and has no end mark"):
        read(write(tmp_path, "t.ipc", sink.getvalue()[:boundary]))


@pytest.mark.parametrize("name", ["t.csv.gz", "t.tsv.zst", "t.zip", "t.parquet"])
def test_a_flipped_byte_never_changes_a_value_silently(tmp_path: Path, name: str) -> None:
    table = table_of()
    data = bytearray(zstd_checked(table) if name == "t.tsv.zst" else WRITERS[name](table))
    for place in np.linspace(0, len(data) - 1, 60).astype(int):
        data[place] ^= 0x10
        with contextlib.suppress(SourceError):
            assert read(write(tmp_path, name, bytes(data))).equals(table)
        data[place] ^= 0x10


def zstd_checked(table: pa.Table) -> bytes:
    from numcodecs import Zstd

    return bytes(Zstd(level=1, checksum=True).encode(as_text(table, "\t")))


GOOD = "a,y\n1,2\n3,4\n"
FAULTS = {
    "unclosed quote": (GOOD + '5,"6\n7,8\n', "row 3: a quote is never closed"),
    "unclosed quote in the last cell": (GOOD + '5,"6', "row 3: a quote is never closed"),
    "unclosed quote, later cells quoted": (GOOD + '5,"6\n7,"8"\n', "row 3: text follows a closing quote"),
    "unclosed quote beside a stray one": (GOOD + '5,6" in\n7,"8\n', "row 4: a quote is never closed"),
    "text behind a quote": (GOOD + '5,"6"7\n', "row 3: text follows a closing quote"),
    "NUL byte": (GOOD + "5,\0\n", "row 3: holds a NUL byte"),
    "UTF-16": (GOOD.encode("utf-16").decode("latin1"), "UTF-8|header"),
    "ragged row": (GOOD + "\n\n5\n", "row 3 has 1 fields but the header 2"),
    "text among numbers": (GOOD + "5,6\nx,7\n", "column 'a', row 4: 'x' is no number; correct it"),
    "header only": ("a,y\n", "has a header but no rows"),
    "header never closed": ('"a,y\n1,2\n', "header cannot be read"),
    "blank lines only": ("\n\n", "is empty"),
    "twice the same name": ("a,a\n1,2\n", "has 'a' twice"),
}


@pytest.mark.parametrize("block_bytes", [1, 1 << 20])
@pytest.mark.parametrize(("text", "message"), FAULTS.values(), ids=FAULTS)
def test_a_fault_in_a_text_is_named_by_row(tmp_path: Path, text: str, message: str, block_bytes: int) -> None:
    path = write(tmp_path, "t.csv", text.encode("latin1"))
    types = dict.fromkeys("ay", pa.string() if '"' in text else pa.float64())
    with pytest.raises(SourceError, match=message) as caught:
        read_as(path, types, block_bytes)
    assert str(caught.value).startswith(f"{path}: ")


def test_what_is_not_utf_8_is_named_by_column_and_row(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", b"a,y\n1,x\n2,\xff\n")
    with pytest.raises(SourceError, match=r"t\.csv: column 'y', row 2: invalid UTF8"):
        read(path)


def test_rows_far_behind_are_counted_right_in_errors(tmp_path: Path) -> None:
    lines = "".join(f"{i},{i}\n" for i in range(700_000))
    path = write(tmp_path, "t.csv", ("a,y\n" + lines + "5,oops\n").encode())
    with pytest.raises(SourceError, match="column 'y', row 700001: 'oops' is no whole number"):
        list(table_records(path, {"a": pa.int64(), "y": pa.int64()}, 1 << 30, START))


def test_the_column_of_an_error_is_right_where_columns_are_chosen_in_another_order(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", b"a,b,c\n1,2,3\n4,5,x\n")
    with pytest.raises(SourceError, match="column 'c', row 2"):
        list(table_records(path, {"c": pa.float64(), "a": pa.float64()}, 99, START))


def test_a_column_empty_at_first_gets_its_type_from_further_on(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr("ep3stream.formats.csv_types.BLOCK_BYTES", 200)
    path = write(tmp_path, "t.csv", ("a,b,y\n" + ",,1\n" * 200 + "5,,2\n").encode())
    assert types_of(path) == {"a": pa.int64(), "b": pa.null(), "y": pa.int64()}


def test_integers_beyond_2_to_the_53_stay_apart(tmp_path: Path) -> None:
    path = write(tmp_path, "t.csv", b"a,y\n1,9007199254740993\n2,9007199254740992\n")
    assert read(path)["y"].to_pylist() == [2**53 + 1, 2**53]


def test_a_line_that_never_ends_is_refused_in_bounded_memory(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(text_blocks, "MAX_LINE_BYTES", 1000)
    path = write(tmp_path, "t.csv", (GOOD + '5,"' + "6\n" * 5000 + '"\n').encode())
    with pytest.raises(SourceError, match="row 3: the line is longer than 1000 bytes, or a quote"):
        list(table_records(path, dict.fromkeys("ay", pa.string()), 99, START))


FIELDS = st.lists(st.sampled_from(['"', "a", ",", "\n", "\r\n", '""', ' "b']), max_size=6).map("".join)


@settings(max_examples=150)
@given(rows=st.lists(st.tuples(FIELDS, FIELDS), min_size=1), raw=st.booleans(), block=st.integers(1, 40))
def test_whatever_stands_in_the_fields_rows_are_those_of_pyarrow_or_refused(
    tmp_path: Path, rows: list[tuple[str, str]], raw: bool, block: int
) -> None:
    quoted = (lambda text: text) if raw else (lambda text: '"' + text.replace('"', '""') + '"')
    text = "a,b\n" + "".join(f"{quoted(a)},{quoted(b)}\n" for a, b in rows)
    path = write(tmp_path, "t.csv", text.encode())
    types = dict.fromkeys("ab", pa.string())
    try:
        found = [row.rows for row in table_records(path, types, block, START)]
    except SourceError:
        assert raw
        return
    expected = pa_csv.read_csv(
        path,
        parse_options=pa_csv.ParseOptions(newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(column_types=types),
    )
    assert pa.Table.from_batches(found, expected.schema).equals(expected)
    if not raw:
        assert [tuple(row.values()) for row in expected.to_pylist()] == rows


def test_row_groups_before_the_start_are_not_read(tmp_path: Path) -> None:
    data = bytearray(parquet(table_of()))
    data[4:2000] = bytes(1996)  # all of the first row group
    path = write(tmp_path, "t.parquet", bytes(data))
    records = list(table_records(path, types_of(path), 1 << 20, RestartPosition(0, 380)))
    assert [record.rows["i"][0].as_py() for record in records] == [380]
    with pytest.raises(SourceError, match=r"t\.parquet: cannot be read"):
        read(path)


def test_large_row_groups_are_read_in_steps_with_the_same_rows(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setattr(tables, "_FETCHED_BYTES", 0)
    path = write(tmp_path, "t.parquet", parquet(table_of()))
    assert read(path, 500).equals(table_of())


def test_feather_of_version_1_is_refused_by_name(tmp_path: Path) -> None:
    path = write(tmp_path, "t.feather", b"FEA1" + bytes(100) + b"FEA1")
    with pytest.raises(SourceError, match=r"Feather version 1.*write it again with version 2"):
        read(path)
