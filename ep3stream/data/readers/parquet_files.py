"""Reads Parquet files, row group by row group, with the columns that their directories name."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from pathlib import Path
from urllib.parse import unquote

import pyarrow as pa
import pyarrow.parquet as pq

_VALUE_BYTES = 8
# A row group of up to this many packed bytes is fetched in one go, a larger one in steps of _STEP_BYTES.
_FETCHED_BYTES = 64 << 20
_STEP_BYTES = 1 << 20
# Decoded at a time at least: smaller pieces decode a third slower.
_DECODED_BYTES = 32 << 20
_MISSING_PARTITION = "__HIVE_DEFAULT_PARTITION__"


def parquet_schema(file: Path) -> pa.Schema:
    """Names and types of the columns in the file, then of those in its path."""
    schema = pq.read_schema(file)
    for name, value in _partition_values(file, schema.names).items():
        schema = schema.append(pa.field(name, value.type))
    return schema.remove_metadata()


def parquet_rows(file: Path) -> int:
    """The number of rows, which the file states."""
    return int(pq.read_metadata(file).num_rows)


def parquet_records(
    file: Path, names: Sequence[str], block_bytes: int, start_row: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The rows from `start_row` on with the columns `names`, and how far the file was read, by its rows.

    Whole row groups before `start_row` are not read.
    """
    metadata = pq.read_metadata(file)
    partitions = _partition_values(file, metadata.schema.to_arrow_schema().names)
    stored = [name for name in names if name not in partitions]
    n_bytes = file.stat().st_size
    row_bytes = _VALUE_BYTES * len(names)
    block_rows = max(1, block_bytes // row_bytes)
    decoded_rows = max(block_rows, _DECODED_BYTES // row_bytes)
    with pq.ParquetFile(
        file,
        metadata=metadata,
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
            for rows in table.iter_batches(decoded_rows, row_groups=[group], columns=stored):
                for begin in range(max(0, start_row - row), rows.num_rows, block_rows):
                    block = _with_partitions(rows.slice(begin, block_rows), partitions, names)
                    yield block, n_bytes * (row + begin + block.num_rows) // metadata.num_rows
                row += rows.num_rows


def _largest_group(metadata: pq.FileMetaData) -> int:
    """Packed bytes of the largest row group."""
    groups = [metadata.row_group(index) for index in range(metadata.num_row_groups)]
    packed = [
        sum(group.column(column).total_compressed_size for column in range(group.num_columns))
        for group in groups
    ]
    return max(packed, default=0)


def _partition_values(file: Path, stored: Sequence[str]) -> dict[str, pa.Scalar]:
    """The columns that the directories right above the file name, as in year=2020/month=1/part.parquet.

    Whole numbers are int64, all else is text; a column of that name in the file itself goes first.
    """
    values: dict[str, pa.Scalar] = {}
    for directory in file.absolute().parents:
        name, equals, text = directory.name.partition("=")
        if not equals:
            break
        if name not in stored:
            values[unquote(name)] = _partition_value(unquote(text))
    return dict(reversed(values.items()))


def _partition_value(text: str) -> pa.Scalar:
    if text == _MISSING_PARTITION:
        return pa.scalar(None, pa.string())
    if text.removeprefix("-").isdecimal() and abs(int(text)) < 1 << 63:
        return pa.scalar(int(text), pa.int64())
    return pa.scalar(text)


def _with_partitions(
    rows: pa.RecordBatch, partitions: dict[str, pa.Scalar], names: Sequence[str]
) -> pa.RecordBatch:
    if not partitions:
        return rows.select(names)
    columns = [
        pa.repeat(partitions[name], rows.num_rows) if name in partitions else rows.column(name)
        for name in names
    ]
    return pa.record_batch(columns, names=list(names))
