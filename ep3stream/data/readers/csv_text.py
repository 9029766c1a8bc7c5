"""Reads CSV and TSV files, plain, .gz, .zst or .zip, in blocks of whole rows that two threads parse."""

from __future__ import annotations

import re
from collections import deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from ep3stream.data.readers.csv_layout import CsvLayout
from ep3stream.data.readers.text_blocks import TextBlock, TextFault, text_blocks
from ep3stream.errors import SourceError

# Types are inferred from the first block; a column without any value there may have one further on.
_BLOCK_BYTES = 4 << 20
_INFERENCE_BYTES = 64 << 20
_PARSERS = 2


@dataclass(frozen=True, slots=True)
class CsvRows:
    """Parsed rows; where the unpacked text goes on behind them; how far the file itself was read."""

    rows: pa.RecordBatch
    next_byte: int
    end_byte: int


@dataclass(frozen=True, slots=True)
class _Rows:
    """The rows of a file, read and parsed as its layout says."""

    layout: CsvLayout

    @classmethod
    def of(cls, file: Path) -> _Rows:
        """Of a file whose header can be read; raises SourceError."""
        return cls(CsvLayout.of(file))

    def blocks(self, block_bytes: int, start_byte: int) -> Iterator[TextBlock]:
        """The rows' text from `start_byte` on, or from the first row on."""
        layout = self.layout
        return text_blocks(layout.file, block_bytes, max(start_byte, layout.first_byte), layout.delimiter)

    def parse(self, text: bytes, types: Mapping[str, pa.DataType | None]) -> pa.RecordBatch:
        """The rows of whole lines with the columns of `types`, None being inferred; raises ArrowInvalid."""
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            # One thread counts the rows that it names in errors; several blocks are parsed side by side.
            pa_csv.ReadOptions(column_names=self.layout.names, block_size=len(text) + 1, use_threads=False),
            pa_csv.ParseOptions(delimiter=self.layout.delimiter, newlines_in_values=True),
            pa_csv.ConvertOptions(
                column_types={name: dtype for name, dtype in types.items() if dtype is not None},
                include_columns=list(types),
                strings_can_be_null=True,
                decimal_point=self.layout.decimal_point,
            ),
        )
        columns = [
            column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in table.columns
        ]
        return pa.record_batch(columns, names=table.column_names)

    def fault(self, row: int, error: Exception) -> SourceError:
        """What is wrong, in words, with the rows behind the first `row` ones."""
        if isinstance(error, TextFault):
            return SourceError(f"{self.layout.file}: row {row + 1}: {error}")
        found = re.search(r"Row #(\d+)", str(error))
        where = f"row {row + int(found[1])}" if found else f"a row behind row {row}"
        return SourceError(f"{self.layout.file}: {self._explain(where, str(error))}")

    def _explain(self, where: str, reason: str) -> str:
        if ragged := re.search(r"Expected (\d+) columns, got (\d+)", reason):
            return f"{where} has {ragged[2]} fields but the header {ragged[1]}; correct the row"
        if misfit := re.search(r"CSV column #(\d+).*conversion error to (.*?): (.*)", reason, re.DOTALL):
            value = " ".join(misfit[3].split())[:80]
            column = f"column {self.layout.names[int(misfit[1])]!r}, {where}"
            return f"{column}: {value} for a column read as {misfit[2]}; correct it"
        return f"cannot be read at {where} ({' '.join(reason.split())[:200]}); correct the file"


def csv_header(file: Path) -> list[str]:
    """The names in the first line that is not empty; raises SourceError when there is none."""
    return CsvLayout.of(file).columns


def csv_schema(file: Path) -> pa.Schema:
    """Names and types as the first block suggests them; null for a column without a value in 64 MiB.

    Raises SourceError, naming the row of what cannot be read there.
    """
    source = _Rows.of(file)
    source.layout.tell()
    names = source.layout.columns
    types: dict[str, pa.DataType] = {}
    row = 0
    try:
        for block in source.blocks(_BLOCK_BYTES, 0):
            rows = source.parse(block.text, {name: None for name in names if name not in types})
            for field in rows.schema:
                if pa.types.is_binary(field.type):  # inferred for what is not UTF-8: have the row named
                    source.parse(block.text, {field.name: pa.string()})
                if not pa.types.is_null(field.type):
                    types[field.name] = field.type
            row += rows.num_rows
            if len(types) == len(names) or block.next_byte > _INFERENCE_BYTES:
                break
    except (TextFault, pa.ArrowInvalid) as error:
        raise source.fault(row, error) from error
    if row == 0:
        raise SourceError(f"{file}: has a header but no rows; leave it out or give a file with data")
    return pa.schema([(name, types.get(name, pa.null())) for name in names])


def csv_records(
    file: Path, types: Mapping[str, pa.DataType], block_bytes: int, start_row: int = 0, start_byte: int = 0
) -> Iterator[CsvRows]:
    """The rows behind row `start_row`, which ends at `start_byte` of the text, with the columns of `types`.

    Raises SourceError naming column and row, counted from 1 without the header.
    """
    source = _Rows.of(file)
    blocks = source.blocks(min(block_bytes, _BLOCK_BYTES), start_byte)
    row = start_row
    try:
        with ThreadPoolExecutor(_PARSERS, "ep3stream-csv") as pool:
            for block, parsing in _ahead(blocks, lambda block: pool.submit(source.parse, block.text, types)):
                rows = parsing.result()
                row += rows.num_rows
                yield CsvRows(rows, block.next_byte, block.end_byte)
    except (TextFault, pa.ArrowInvalid) as error:
        raise source.fault(row, error) from error


_Parsing = Future[pa.RecordBatch]


def _ahead(
    blocks: Iterator[TextBlock], submit: Callable[[TextBlock], _Parsing]
) -> Iterator[tuple[TextBlock, _Parsing]]:
    """The blocks in order with their futures, some submitted ahead; a fault comes behind all good blocks."""
    pending: deque[tuple[TextBlock, _Parsing]] = deque()
    fault = None
    try:
        for block in blocks:
            pending.append((block, submit(block)))
            if len(pending) > _PARSERS:
                yield pending.popleft()
    except TextFault as error:
        fault = error
    yield from pending
    if fault is not None:
        raise fault
