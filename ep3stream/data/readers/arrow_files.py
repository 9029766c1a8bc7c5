"""Reads Arrow IPC files and streams (.arrow, .feather, .ipc), record batch by record batch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import pyarrow as pa

from ep3stream.errors import SourceError

_VALUE_BYTES = 8
_FILE_MAGIC = b"ARROW1"
_FEATHER_1_MAGIC = b"FEA1"
_STREAM_END = b"\xff\xff\xff\xff\0\0\0\0"


def arrow_schema(file: Path) -> pa.Schema:
    """Names and types of the columns; raises SourceError for a file of Feather version 1."""
    with _open_batches(file, None) as (reader, _):
        return reader.schema.remove_metadata()


def arrow_records(
    file: Path, names: Sequence[str], block_bytes: int, start_row: int
) -> Iterator[tuple[pa.RecordBatch, int]]:
    """The rows from `start_row` on with the columns `names`, and how far the file was read.

    Record batches before `start_row` are read to be counted.
    """
    block_rows = max(1, block_bytes // (_VALUE_BYTES * len(names)))
    schema = arrow_schema(file)
    row = 0
    with _open_batches(file, [schema.get_field_index(name) for name in names]) as (reader, raw):
        for batch, end_byte in _batches(reader, raw):
            skipped = min(max(0, start_row - row), batch.num_rows)
            row += batch.num_rows
            for begin in range(skipped, batch.num_rows, block_rows):
                yield batch.slice(begin, block_rows).select(names), end_byte


@contextmanager
def _open_batches(file: Path, fields: list[int] | None) -> Iterator[tuple[Any, pa.NativeFile]]:
    """The reader of the columns at `fields` (None: all) and the file it reads, whose bytes are not kept."""
    options = pa.ipc.IpcReadOptions(included_fields=fields)
    with pa.OSFile(str(file)) as raw:
        magic = raw.read(len(_FILE_MAGIC))
        if magic.startswith(_FEATHER_1_MAGIC):
            raise SourceError(
                f"{file}: is of Feather version 1, which is no longer read; write it again with version 2"
            )
        is_file = magic == _FILE_MAGIC
        if not is_file:
            _require_stream_end(file, raw)
        raw.seek(0)
        opened = (
            pa.ipc.open_file(raw, options=options) if is_file else pa.ipc.open_stream(raw, options=options)
        )
        with opened as reader:
            yield reader, raw


def _require_stream_end(file: Path, raw: pa.NativeFile) -> None:
    """A stream cut between two record batches would otherwise read as a shorter one."""
    raw.seek(max(0, raw.size() - len(_STREAM_END)))
    if raw.read() != _STREAM_END:
        raise SourceError(
            f"{file}: is no Arrow file and has no end mark of an Arrow stream; it is truncated, "
            "still being written, or of another kind"
        )


def _batches(reader: Any, raw: pa.NativeFile) -> Iterator[tuple[pa.RecordBatch, int]]:
    if isinstance(reader, pa.ipc.RecordBatchFileReader):
        n_batches, n_bytes = reader.num_record_batches, raw.size()
        for index in range(n_batches):
            yield reader.get_batch(index), n_bytes * (index + 1) // n_batches
    else:
        for batch in reader:
            yield batch, raw.tell()
