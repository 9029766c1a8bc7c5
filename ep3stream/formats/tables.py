"""Tables that are converted, files of any table format or objects of Python, read as arrow record batches.

Parquet is read row group by row group, Arrow IPC files and streams (.arrow, .feather, .ipc) record batch by record
batch. csv.py reads text, python_objects.py tables of Python, partitions.py the columns that folders name. An empty
cell, null and NaN are passed on as they are.

A new table format needs its suffixes in TABLE_SUFFIXES, a branch in `table_schema` and one in `table_records`.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ep3stream.errors import SourceError
from ep3stream.formats.csv import CsvLayout, csv_records
from ep3stream.formats.csv_types import ColumnTypes, csv_types
from ep3stream.formats.digests import stamps_of
from ep3stream.formats.partitions import PartitionedFile
from ep3stream.formats.python_objects import PythonTable
from ep3stream.formats.source import RestartPosition
from ep3stream.formats.text_blocks import PACKED_SUFFIXES, STREAM_SUFFIXES, TextFault, text_blocks
from ep3stream.formats.text_cells import StrayCell, TextRules, is_text, stated_types, typed_rows

PARQUET_SUFFIXES = (".parquet", ".pq")
ARROW_SUFFIXES = (".arrow", ".feather", ".ipc")
TABLE_SUFFIXES = (
    *(name + packed for packed in ("", *STREAM_SUFFIXES) for name in (".csv", ".tsv")),
    ".zip",
    *PARQUET_SUFFIXES,
    *ARROW_SUFFIXES,
)

# About the size of a cell, to turn bytes into rows.
_VALUE_BYTES = 8

# Bytes of text, plain or packed, for a byte of float32. High on purpose: a refusal for want of space must
# be right, while a disk that fills up later is reported all the same.
_TEXT_RATIO = 4

# A row group of up to this many packed bytes is fetched in one go, a larger one in steps of _STEP_BYTES.
_FETCHED_BYTES = 64 << 20
_STEP_BYTES = 1 << 20

# Parquet is decoded in pieces of at least this size: smaller pieces decode a third slower.
_DECODED_BYTES = 32 << 20

# Read of a text to see whether a row follows the header.
_PROBED_BYTES = 1 << 12
_ARROW_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"

# A table of Python or a file, and a file with columns that its folders name.
TableInput = Path | PythonTable | PartitionedFile


@dataclass(frozen=True, slots=True)
class TableRows:
    """Consecutive rows of a table.

    end_byte: how far the (packed) file has been read, for progress and digests.
    next_byte: where the unpacked text goes on behind the rows, for text formats; else 0.
    strays: which rows have a text that is none of its column's type, by column, if such rows are dropped.
    """

    rows: pa.RecordBatch
    first_row: int
    end_byte: int
    next_byte: int = 0
    strays: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)


def file_of(table: TableInput) -> Path | None:
    """The file that a table is read from; None for a table of Python."""
    if isinstance(table, PartitionedFile):
        return table.file
    return table if isinstance(table, Path) else None


def table_header(table: TableInput) -> list[str]:
    """The column names, without inferring types."""
    if isinstance(table, PartitionedFile):
        header = table_header(table.file)
        return [*header, *(name for name in table.types if name not in header)]
    if isinstance(table, PythonTable) or has_types(table):
        return list(table_schema(table).names)
    return CsvLayout.of(table).columns


def table_schema(table: TableInput) -> pa.Schema:
    """Names and types of the columns as the table states them, or for CSV as the first rows suggest them.

    Raises SourceError, or any error of pyarrow.
    """
    if isinstance(table, PythonTable):
        return table.schema
    if isinstance(table, PartitionedFile):
        return table.schema(table_schema(table.file))
    if _is_parquet(table):
        return pq.read_schema(table).remove_metadata()
    if _is_arrow(table):
        with _open_arrow(table, None) as (reader, _):
            return reader.schema.remove_metadata()
    return csv_types(table, TextRules()).schema


def lost_parts(metadata: Path) -> list[str]:
    """The files that a `_metadata` of Parquet names and that are not there; none if it cannot be read.

    Dask and others write such a file beside the parts, with what their footers say.
    """
    try:
        found = pq.read_metadata(metadata)
    except (OSError, pa.ArrowInvalid):
        return []
    names = {
        found.row_group(i).column(0).file_path
        for i in range(found.num_row_groups if found.num_columns else 0)
    }
    return sorted(name for name in names if name and not (metadata.parent / name).exists())


def table_types(table: TableInput, rules: TextRules) -> ColumnTypes:
    """The columns' types by what is stated of them, and else by the table, or for CSV by its first rows.

    Raises SourceError, or any error of pyarrow.
    """
    if isinstance(table, PartitionedFile):
        of_file = table_types(table.file, rules)
        return replace(of_file, schema=table.schema(of_file.schema))
    if not isinstance(table, PythonTable) and not has_types(table):
        return csv_types(table, rules)
    schema, stated = table_schema(table), stated_types(rules)
    for index, column in enumerate(schema):
        # A category of numbers is one of their values there, as which they are stored.
        if column.name in stated and not pa.types.is_string(stated[column.name]):
            has_format = column.name in rules.formats
            if is_text(column.type) or (has_format and pa.types.is_integer(column.type)):
                schema = schema.set(index, column.with_type(stated[column.name]))
            elif has_format and not rules.is_recorded:
                raise SourceError(
                    f"{table}: column {column.name!r} is {column.type}, no text that a format of --date "
                    "could read; leave it out there"
                )
    return ColumnTypes(schema, {name: text for name, text in rules.formats.items() if name in schema.names})


def has_types(table: TableInput) -> bool:
    """Whether the table states the types of its columns, as all but CSV do."""
    if isinstance(table, PartitionedFile):
        return has_types(table.file)
    return isinstance(table, PythonTable) or _is_parquet(table) or _is_arrow(table)


def stated_rows(table: TableInput) -> int | None:
    """The number of rows, if the table states it without being read."""
    if isinstance(table, PythonTable):
        return table.n_rows
    if isinstance(table, PartitionedFile):
        return stated_rows(table.file)
    return int(pq.read_metadata(table).num_rows) if _is_parquet(table) else None


def float32_bytes(table: TableInput) -> int:
    """About how many bytes the rows take as float32, by the file's size; 0 for Python's tables."""
    if isinstance(table, PythonTable):
        return 0
    if isinstance(table, PartitionedFile):
        return float32_bytes(table.file)
    is_packed = has_types(table) or table.name.lower().endswith(PACKED_SUFFIXES)
    return table.stat().st_size // (1 if is_packed else _TEXT_RATIO)


def table_fingerprint(table: TableInput) -> dict[str, Any]:
    """JSON that changes if the table changes: the stamp of a file, the columns of a table of Python."""
    if isinstance(table, PythonTable):
        columns = {field.name: str(field.type) for field in table.schema}
        return {"name": table.name, "columns": columns, "rows": table.n_rows}
    if isinstance(table, PartitionedFile):
        return {**table_fingerprint(table.file), "folders": dict(table.texts)}
    return stamps_of([table])[0]


def table_records(
    table: TableInput,
    types: Mapping[str, pa.DataType],
    block_bytes: int,
    start: RestartPosition,
    rules: TextRules | None = None,
) -> Iterator[TableRows]:
    """The rows from `start` on with the columns of `types`, in order; `start.file` is the caller's affair.

    CSV is parsed as `types` and `rules` say; a table that states its types comes with those, but for texts that
    were stated to be numbers or dates. Raises SourceError for a text that is none, unless such rows are dropped.
    """
    if isinstance(table, PartitionedFile):
        yield from _with_folders(table, types, block_bytes, start, rules)
        return
    row, names, rules = start.row, list(types), rules or TextRules()
    if not isinstance(table, PythonTable) and not has_types(table):
        for typed, block in csv_records(table, types, block_bytes, row, start.byte, rules):
            yield TableRows(typed.rows, row, block.end_byte, block.next_byte, typed.strays)
            row += typed.rows.num_rows
        return
    records: Iterator[tuple[pa.RecordBatch, int, int]]
    if isinstance(table, PythonTable):
        records = ((rows, 0, 0) for rows in table.records(names, block_bytes, row))
    elif _is_parquet(table):
        texts = [name for name, dtype in types.items() if pa.types.is_string(dtype)]
        records = _parquet_records(table, names, texts, block_bytes, row)
    else:
        records = _arrow_records(table, names, block_bytes, row)
    for rows, end_byte, next_byte in records:
        try:
            typed = typed_rows(rows, types, rules)
        except StrayCell as stray:
            where = f"{table}: column {stray.column!r}, row {row + stray.row + 1}"
            raise SourceError(f"{where}: {stray.in_words()}") from stray
        yield TableRows(typed.rows, row, end_byte, next_byte, typed.strays)
        row += rows.num_rows


def _with_folders(
    table: PartitionedFile,
    types: Mapping[str, pa.DataType],
    block_bytes: int,
    start: RestartPosition,
    rules: TextRules | None,
) -> Iterator[TableRows]:
    header = table_header(table.file)
    stored = {name: dtype for name, dtype in types.items() if name in header}
    # Rows must be counted even where the folders alone name what is needed.
    read = stored or {header[0]: pa.string()}
    records = ((record.rows, record) for record in table_records(table.file, read, block_bytes, start, rules))
    for rows, record in table.with_folders(records, list(types)):
        yield replace(record, rows=rows)


def has_rows(table: TableInput) -> bool:
    """Whether the table has a row, as far as it can be told without reading much; raises any error of a reader."""
    if isinstance(table, PartitionedFile):
        return has_rows(table.file)
    if isinstance(table, Path) and table.stat().st_size == 0:
        return False
    rows = stated_rows(table)
    if rows is not None or isinstance(table, PythonTable):
        return rows != 0
    if _is_arrow(table):
        with _open_arrow(table, None) as (reader, raw):
            return any(batch.num_rows for batch, _ in _arrow_batches(reader, raw))
    try:
        if not any(block.text.strip() for block in text_blocks(table, _PROBED_BYTES)):
            return False
        layout = CsvLayout.of(table)
        blank_is_row = len(layout.names) == 1
        return any(blank_is_row or block.text.strip() for block in layout.blocks(_PROBED_BYTES))
    except TextFault:
        return True  # The reader will say what is wrong, with the row.


def _is_parquet(table: Path) -> bool:
    return table.name.lower().endswith(PARQUET_SUFFIXES)


def _is_arrow(table: Path) -> bool:
    return table.name.lower().endswith(ARROW_SUFFIXES)


# -- Parquet


def _parquet_records(
    file: Path, names: Sequence[str], texts: Sequence[str], block_bytes: int, start_row: int
) -> Iterator[tuple[pa.RecordBatch, int, int]]:
    """The rows from `start_row` on, how far the file was read by the share of its rows, and 0.

    Columns of `texts` come as dictionaries, as which the file has them already: the distinct texts are decoded once.
    Whole row groups before `start_row` are not read.
    """
    metadata = pq.read_metadata(file)
    schema = metadata.schema.to_arrow_schema()
    encoded = [
        name
        for name in texts
        if pa.types.is_string(schema.field(name).type) or pa.types.is_large_string(schema.field(name).type)
    ]
    n_bytes = file.stat().st_size
    row_bytes = _VALUE_BYTES * len(names)
    block_rows = max(1, block_bytes // row_bytes)
    decoded_rows = max(block_rows, _DECODED_BYTES // row_bytes)
    with pq.ParquetFile(
        file,
        metadata=metadata,
        read_dictionary=encoded,
        pre_buffer=_largest_group(metadata) <= _FETCHED_BYTES,
        buffer_size=_STEP_BYTES,
        page_checksum_verification=True,
    ) as table:
        row = 0
        for group in range(metadata.num_row_groups):
            group_end = row + metadata.row_group(group).num_rows
            if group_end <= start_row:
                row = group_end
                continue
            # One group at a time: fetched bytes are kept until the call for them ends.
            for rows in table.iter_batches(decoded_rows, row_groups=[group], columns=names):
                for begin in range(max(0, start_row - row), rows.num_rows, block_rows):
                    block = rows.slice(begin, block_rows).select(names)
                    yield block, n_bytes * (row + begin + block.num_rows) // metadata.num_rows, 0
                row += rows.num_rows


def _largest_group(metadata: pq.FileMetaData) -> int:
    """Packed bytes of the largest row group."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    packed = [
        sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        for group in groups
    ]
    return max(packed, default=0)


# -- Arrow IPC


def _arrow_records(
    file: Path, names: Sequence[str], block_bytes: int, start_row: int
) -> Iterator[tuple[pa.RecordBatch, int, int]]:
    """The rows from `start_row` on, how far the file was read, and 0.

    Record batches before `start_row` are read only to be counted.
    """
    block_rows = max(1, block_bytes // (_VALUE_BYTES * len(names)))
    schema = table_schema(file)
    row = 0
    with _open_arrow(file, [schema.get_field_index(name) for name in names]) as (reader, raw):
        for batch, end_byte in _arrow_batches(reader, raw):
            skipped = min(max(0, start_row - row), batch.num_rows)
            row += batch.num_rows
            for begin in range(skipped, batch.num_rows, block_rows):
                yield batch.slice(begin, block_rows).select(names), end_byte, 0


@contextmanager
def _open_arrow(file: Path, fields: list[int] | None) -> Iterator[tuple[Any, pa.NativeFile]]:
    """A reader of the columns at `fields` (None: all), and the file that it reads, which is not mapped.

    Raises SourceError for a file of Feather version 1, and for a stream without its end mark: a stream that
    was cut between two record batches would otherwise read as a shorter one.
    """
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    with pa.OSFile(str(file)) as raw:
        magic = raw.read(len(_ARROW_MAGIC))
        if magic.startswith(_FEATHER_1_MAGIC):
            raise SourceError(
                f"{file}: is of Feather version 1, which is no longer read; write it again with version 2"
            )
        is_file = magic == _ARROW_MAGIC
        if not is_file:
            raw.seek(max(0, raw.size() - len(_STREAM_END)))
            if raw.read() != _STREAM_END:
                raise SourceError(
                    f"{file}: is no Arrow file and has no end mark of an Arrow stream; it is truncated, "
                    "still being written, or of another kind"
                )
        raw.seek(0)
        with (pa.ipc.open_file if is_file else pa.ipc.open_stream)(raw, options=options) as reader:
            yield reader, raw


def _arrow_batches(reader: Any, raw: pa.NativeFile) -> Iterator[tuple[pa.RecordBatch, int]]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        n_batches, n_bytes = reader.num_record_batches, raw.size()
        for index in range(n_batches):
            yield reader.get_batch(index), n_bytes * (index + 1) // n_batches
    else:
        for batch in reader:
            yield batch, raw.tell()
