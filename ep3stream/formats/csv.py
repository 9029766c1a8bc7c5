"""What the beginning of a CSV file tells: the columns' names, what stands between fields, where the rows begin.

Reads CSV and TSV files, plain, .gz, .zst or .zip, in blocks of whole rows that two threads parse.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Iterator, Mapping
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from ep3stream.errors import SourceError
from ep3stream.formats.text_blocks import PACKED_SUFFIXES, TextBlock, TextFault, text_blocks, unpacked_name

_LOGGER = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 16

# What a spreadsheet writes where the comma is taken, by decimals or by a habit. Not the blank: names have it too.
_OTHER_DELIMITERS = ";\t|"

_COMMA_NUMBER = re.compile(rb'(?:^|;)\s*"?[-+]?\d+,\d+(?:[eE][-+]?\d+)?"?\s*(?=;|\r?$)', re.MULTILINE)

_POINT_NUMBER = re.compile(rb'(?:^|;)\s*"?[-+]?\d*\.\d+(?:[eE][-+]?\d+)?"?\s*(?=;|\r?$)', re.MULTILINE)

_KINDS = {
    b"\x1f\x8b": "it is packed by gzip; call it .csv.gz",
    b"\x28\xb5\x2f\xfd": "it is packed by zstd; call it .csv.zst",
    b"PK\x03\x04": "it is a zip archive, or a spreadsheet; call it .zip, or save the sheet as CSV",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
}


@dataclass(frozen=True, slots=True)
class CsvLayout:
    """names: of all columns, `(unnamed N)` for those whose header is empty; delimiter: `,` unless the header is one
    name without it and has another; decimal_point: `,` where fields are parted by `;` and numbers are written so;
    first_byte: of the rows, in the unpacked text.
    """

    file: Path
    delimiter: str
    decimal_point: str
    names: tuple[str, ...]
    unnamed: frozenset[str]
    first_byte: int

    @classmethod
    def of(cls, file: Path) -> CsvLayout:
        """Read the header; raises SourceError when there is none."""
        _require_text(file)
        delimiter = "\t" if unpacked_name(file).endswith(".tsv") else ","
        names, text, first_byte = _header(file, delimiter)
        if len(names) == 1 and any(other in names[0] for other in _OTHER_DELIMITERS):
            delimiter = max(_OTHER_DELIMITERS, key=names[0].count)
            names, text, first_byte = _header(file, delimiter)
        names = [name.strip() for name in names]
        for name, count in Counter(filter(None, names)).items():
            if count > 1:
                remedy = ", or put the columns' names above the first row" if _is_number(name) else ""
                raise SourceError(f"{file}: has {name!r} twice among its columns; rename one{remedy}")
        named = [name or f"(unnamed {number})" for number, name in enumerate(names, 1)]
        unnamed = frozenset(filled for filled, name in zip(named, names, strict=True) if not name)
        has_commas = delimiter == ";" and _COMMA_NUMBER.search(text) and not _POINT_NUMBER.search(text)
        return cls(file, delimiter, "," if has_commas else ".", tuple(named), unnamed, first_byte)

    @property
    def columns(self) -> list[str]:
        """Those that have a name: row numbers beside a table have none, nor what a delimiter behind each row makes."""
        return [name for name in self.names if name not in self.unnamed]

    def tell(self) -> None:
        """Says what was not taken as plain CSV has it."""
        if self.delimiter in ";|" or (
            self.delimiter == "\t" and not unpacked_name(self.file).endswith(".tsv")
        ):
            decimals = ", decimal commas in its numbers" if self.decimal_point == "," else ""
            _LOGGER.info("%s: has %r between its fields%s", self.file, self.delimiter, decimals)
        for number, name in enumerate(self.names, 1):
            if name in self.unnamed:
                _LOGGER.warning(
                    "%s: column %d has no name in the header, so it is left out; give it one if it is needed",
                    self.file,
                    number,
                )


def _header(file: Path, delimiter: str) -> tuple[list[str], bytes, int]:
    """The fields of the first line that is not empty, the text behind it in the first block, and its first byte."""
    # Decimal commas are looked for in many rows: the first may hold whole numbers.
    n_bytes = _HEADER_BYTES if delimiter != ";" else 64 * _HEADER_BYTES
    try:
        block = next(text_blocks(file, n_bytes, 0, delimiter), None)
        text = block.text if block else b""
        lines = io.BytesIO(text)
        # It takes no more lines than the header has, so that `lines` stands behind it.
        rows = csv.reader((line.decode() for line in iter(lines.readline, b"")), delimiter=delimiter)
        names = next(filter(None, rows), [])
    except (TextFault, csv.Error, UnicodeDecodeError) as error:
        raise SourceError(
            f"{file}: the header cannot be read ({_reason(error)}); give a CSV file in UTF-8"
        ) from error
    if block is None or not names:
        raise SourceError(f"{file}: is empty; leave it out or give a file with data")
    return names, text[lines.tell() :], block.next_byte - len(text) + lines.tell()


def _reason(error: Exception) -> str:
    if isinstance(error, UnicodeDecodeError):
        return "it is not UTF-8"
    if "new-line character" in str(error):
        return "its lines end in carriage returns alone"
    return str(error)


def _require_text(file: Path) -> None:
    """Raises SourceError for a file of another kind under the name of a plain one."""
    if file.name.lower().endswith(PACKED_SUFFIXES) or not file.is_file():
        return
    with file.open("rb") as opened:
        first = opened.read(4)
    for mark, words in _KINDS.items():
        if first.startswith(mark):
            raise SourceError(f"{file}: holds no text as its name says: {words}")


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return False
    return True


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
