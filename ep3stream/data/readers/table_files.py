"""The tables that are converted, files of every format or Python's own, as arrow record batches."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa

from ep3stream.data.conversion.batch import Position
from ep3stream.data.readers.arrow_files import arrow_records, arrow_schema
from ep3stream.data.readers.csv_text import csv_header, csv_records, csv_schema
from ep3stream.data.readers.digests import stamps_of
from ep3stream.data.readers.parquet_files import parquet_records, parquet_rows, parquet_schema
from ep3stream.data.readers.python_tables import PythonTable
from ep3stream.data.readers.text_blocks import PACKED_SUFFIXES

PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
TABLE_SUFFIXES = (
    ".csv", ".tsv", ".csv.gz", ".tsv.gz", ".csv.zst", ".tsv.zst", ".zip",
    *PARQUET_SUFFIXES, *ARROW_SUFFIXES,
)  # fmt: skip
# Bytes of text, plain or packed, for a byte of float32. High on purpose: a refusal for want of space must
# be right, while a disk that fills up later is reported all the same.
_TEXT_RATIO = 4

Table = Path | PythonTable


@dataclass(frozen=True, slots=True)
class Record:
    """Consecutive rows of a table. end_byte: how far the (packed) file has been read, for progress and digests.

    next_byte: where the unpacked text goes on behind these rows, for formats that start again there; else 0.
    """

    rows: pa.RecordBatch
    first_row: int
    end_byte: int
    next_byte: int = 0


def table_header(table: Table) -> list[str]:
    """The column names, cheaply."""
    return list(table_schema(table).names) if has_types(table) else csv_header(_path(table))


def table_schema(table: Table) -> pa.Schema:
    """Names and types, for CSV as the first rows suggest them; raises SourceError or what pyarrow raises."""
    if isinstance(table, PythonTable):
        return table.schema
    if _is(table, PARQUET_SUFFIXES):
        return parquet_schema(table)
    return arrow_schema(table) if _is(table, ARROW_SUFFIXES) else csv_schema(table)


def has_types(table: Table) -> bool:
    """Whether the table states its columns' types, as CSV does not."""
    return isinstance(table, PythonTable) or _is(table, (*PARQUET_SUFFIXES, *ARROW_SUFFIXES))


def stated_rows(table: Table) -> int | None:
    """The number of rows, where it is stated."""
    if isinstance(table, PythonTable):
        return table.n_rows
    return parquet_rows(table) if _is(table, PARQUET_SUFFIXES) else None


def float32_bytes(table: Table) -> int:
    """About how many bytes the rows take as float32, by the file's size; 0 for Python's tables."""
    if isinstance(table, PythonTable):
        return 0
    is_packed = has_types(table) or _is(table, PACKED_SUFFIXES)
    return table.stat().st_size // (1 if is_packed else _TEXT_RATIO)


def table_fingerprint(table: Table) -> dict[str, object]:
    """What tells as JSON whether it is the same table as before: stamps of a file, columns of Python's."""
    if isinstance(table, PythonTable):
        columns = {field.name: str(field.type) for field in table.schema}
        return {"name": table.name, "columns": columns, "rows": table.n_rows}
    return stamps_of([table])[0]


def table_records(
    table: Table, types: Mapping[str, pa.DataType], block_bytes: int, start: Position
) -> Iterator[Record]:
    """The rows from `start` on (its `file` is the caller's affair) with the columns of `types`, in order.

    CSV is read as `types` says; what states types of its own comes with those.
    """
    row, names = start.row, list(types)
    if not has_types(table):
        for parsed in csv_records(_path(table), types, block_bytes, start.row, start.byte):
            yield Record(parsed.rows, row, parsed.end_byte, parsed.next_byte)
            row += parsed.rows.num_rows
        return
    records: Iterator[tuple[pa.RecordBatch, int]]
    if isinstance(table, PythonTable):
        records = ((rows, 0) for rows in table.records(names, block_bytes, start.row))
    elif _is(table, PARQUET_SUFFIXES):
        records = parquet_records(table, names, block_bytes, start.row)
    else:
        records = arrow_records(table, names, block_bytes, start.row)
    for rows, end_byte in records:
        yield Record(rows, row, end_byte)
        row += rows.num_rows


def _path(table: Table) -> Path:
    assert isinstance(table, Path)
    return table


def _is(table: Path, suffixes: tuple[str, ...]) -> bool:
    return table.name.lower().endswith(suffixes)
