"""CSV and TSV files, plain, .gz, .zst or .zip: their header, the types of their columns, and their rows.

`CsvLayout` reads the header: the columns' names, the delimiter, the decimal point, the first byte of the rows.
`csv_records` reads all rows; csv_types.py decides from the first ones what each column holds. An empty cell is
null, or the empty text; so is an empty line of a file of one column. A row with too few or too many fields, or a
text in a column of numbers, is a SourceError that names column and row; text_cells.py reads such a column of a block
cell by cell before that is said.

pyarrow parses; text_blocks.py cuts the text into blocks of whole rows, which two threads parse. pyarrow's own
streaming reader has no place to start again, and counts the header as a row in its errors. Measured on 40 MiB:
0.25 s of processor time and 0.31 s of wall time here, 0.20 s and 0.36 s there.
"""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import Counter, deque
from collections.abc import Callable, Container, Iterator, Mapping, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from contextlib import suppress
from dataclasses import dataclass
from itertools import islice
from pathlib import Path

import pyarrow as pa
import pyarrow.csv as pa_csv

from ep3stream.errors import SourceError
from ep3stream.formats.text_blocks import PACKED_SUFFIXES, TextBlock, TextFault, text_blocks, unpacked_name
from ep3stream.formats.text_cells import GAP_WORDS, StrayCell, TextRules, TypedRows, is_number, typed_rows

_LOGGER = logging.getLogger(__name__)

_HEADER_BYTES = 1 << 16
BLOCK_BYTES = 4 << 20
_PARSERS = 2
_FIRST_ROWS = 20

# What a spreadsheet writes where the comma is taken, by decimals or by a habit. Not the blank: names have it too.
_OTHER_DELIMITERS = ";\t|"

# Fields between semicolons that are numbers with a decimal comma, or with a decimal point.
_COMMA_NUMBER = re.compile(rb'(?:^|;)\s*"?[-+]?\d+,\d+(?:[eE][-+]?\d+)?"?\s*(?=;|\r?$)', re.MULTILINE)
_POINT_NUMBER = re.compile(rb'(?:^|;)\s*"?[-+]?\d*\.\d+(?:[eE][-+]?\d+)?"?\s*(?=;|\r?$)', re.MULTILINE)

_MISFIT = re.compile(r"CSV column #(\d+).*conversion error to (.*?): (.*)", re.DOTALL)

# The first bytes of files that are often misnamed .csv.
_OTHER_KINDS = {
    b"\x1f\x8b": "it is packed by gzip; call it .csv.gz",
    b"\x28\xb5\x2f\xfd": "it is packed by zstd; call it .csv.zst",
    b"PK\x03\x04": "it is a zip archive, or a spreadsheet; call it .zip, or save the sheet as CSV",
    b"\xff\xfe": "it is UTF-16; save it as UTF-8",
    b"\xfe\xff": "it is UTF-16; save it as UTF-8",
}


@dataclass(frozen=True, slots=True)
class CsvLayout:
    """How a CSV file is written, as its first bytes show.

    delimiter: `,` unless the header is one name without a comma that has another delimiter in it.
    decimal_point: `,` if the delimiter is `;` and the numbers are written with decimal commas.
    names: the names of all columns; `(unnamed N)` if the header has none for a column.
    first_byte: where the rows begin in the unpacked text.
    """

    file: Path
    delimiter: str
    decimal_point: str
    names: tuple[str, ...]
    unnamed: frozenset[str]
    first_byte: int

    @classmethod
    def of(cls, file: Path, texts: Container[str] = ()) -> CsvLayout:
        """Read the header, the first line that is not empty; raises SourceError if there is none.

        texts: columns that are no numbers, whose points and commas say nothing about decimals.
        """
        _refuse_other_kinds(file)
        delimiter, (names, text, first_byte) = _delimiter_and_header(file)
        names = [name.strip() for name in names]
        for name, count in Counter(filter(None, names)).items():
            if count > 1:
                remedy = ", or put the columns' names above the first row" if is_number(name) else ""
                raise SourceError(f"{file}: has {name!r} twice among its columns; rename one{remedy}")
        named = [name or f"(unnamed {number})" for number, name in enumerate(names, 1)]
        unnamed = frozenset(filled for filled, name in zip(named, names, strict=True) if not name)
        has_commas = delimiter == ";" and _COMMA_NUMBER.search(text) is not None
        if has_commas and _POINT_NUMBER.search(text):
            text = _without_columns(text, [name in texts for name in named])
            has_commas = _COMMA_NUMBER.search(text) is not None and _POINT_NUMBER.search(text) is None
        return cls(file, delimiter, "," if has_commas else ".", tuple(named), unnamed, first_byte)

    @property
    def columns(self) -> list[str]:
        """The columns that the header names.

        Row numbers beside a table have no name, nor has the empty column that a delimiter at each row's end makes.
        """
        return [name for name in self.names if name not in self.unnamed]

    def log_peculiarities(self) -> None:
        """Log an unusual delimiter or decimal commas, and warn of columns without a name."""
        if self.delimiter in ";|" or (
            self.delimiter == "\t" and not unpacked_name(self.file).endswith(".tsv")
        ):
            decimals = ", decimal commas in its numbers" if self.decimal_point == "," else ""
            _LOGGER.info("%s: has %r between its fields%s", self.file, self.delimiter, decimals)
        named = self.columns
        counted = [[str(number + first) for number in range(len(named))] for first in (0, 1)]
        if len(named) > 1 and all(map(is_number, named)) and named not in counted:
            _LOGGER.warning(
                "%s: the first line has nothing but numbers, and is taken as the names of the columns; if it is a "
                "row, put the names above it",
                self.file,
            )
        for number, name in enumerate(self.names, 1):
            if name in self.unnamed:
                _LOGGER.warning(
                    "%s: column %d has no name in the header, so it is left out; give it one if it is needed",
                    self.file,
                    number,
                )

    def blocks(self, block_bytes: int, start_byte: int = 0) -> Iterator[TextBlock]:
        """The text of the rows from `start_byte` on, or from the first row on, as blocks of whole rows."""
        return text_blocks(self.file, block_bytes, max(start_byte, self.first_byte), self.delimiter)

    def parse(
        self, text: bytes, types: Mapping[str, pa.DataType | None], gap_words: Sequence[str] = GAP_WORDS
    ) -> pa.RecordBatch:
        """The columns of `types` from a text of whole rows; None has the type inferred. Raises ArrowInvalid.

        The words are null in all columns but those of texts.
        """
        table = pa_csv.read_csv(
            pa.BufferReader(text),
            # One thread counts the rows that it names in errors; several blocks are parsed side by side.
            pa_csv.ReadOptions(column_names=self.names, block_size=len(text) + 1, use_threads=False),
            pa_csv.ParseOptions(
                delimiter=self.delimiter,
                newlines_in_values=True,
                ignore_empty_lines=len(self.names) > 1,  # Of a single column an empty line is an empty cell.
            ),
            pa_csv.ConvertOptions(
                column_types={name: dtype for name, dtype in types.items() if dtype is not None},
                include_columns=list(types),
                null_values=list(gap_words),
                strings_can_be_null=False,
                decimal_point=self.decimal_point,
            ),
        )
        columns = [
            column.chunk(0) if column.num_chunks == 1 else column.combine_chunks() for column in table.columns
        ]
        return pa.record_batch(columns, names=table.column_names)

    def read(
        self, text: bytes, types: Mapping[str, pa.DataType], rules: TextRules, as_texts: set[str]
    ) -> TypedRows:
        """The columns of `types` from a text of whole rows; raises ArrowInvalid or StrayCell.

        as_texts: columns that pyarrow did not parse in an earlier block, to be read cell by cell; new ones are added.
        """
        has_blanks = self.has_blanks(text)
        if has_blanks and any(map(is_number, rules.missing_words)):
            # pyarrow does not know a number in blanks as the gap that it stands for.
            as_texts.update(name for name, dtype in types.items() if not pa.types.is_string(dtype))
        while True:
            asked = {name: pa.string() if name in as_texts else dtype for name, dtype in types.items()}
            try:
                rows = self.parse(text, asked, rules.gap_words)
            except pa.ArrowInvalid as error:
                misfit = _MISFIT.search(str(error))
                name = self.names[int(misfit[1])] if misfit else ""
                if not misfit or pa.types.is_string(asked[name]):
                    raise
                as_texts.add(name)
            else:
                return typed_rows(rows, types, rules, self.decimal_point, trims=has_blanks)

    def has_blanks(self, text: bytes) -> bool:
        """Whether a blank is anywhere in the text; only then may blanks stand around fields."""
        return b" " in text or (self.delimiter != "\t" and b"\t" in text)

    def fault(self, n_rows: int, error: Exception) -> SourceError:
        """The error of a block that begins behind `n_rows` rows, in words, with file, column and row."""
        if isinstance(error, TextFault):
            return SourceError(f"{self.file}: row {n_rows + 1}: {error}")
        if isinstance(error, StrayCell):
            where = f"column {error.column!r}, row {n_rows + error.row + 1}"
            return SourceError(f"{self.file}: {where}: {error.in_words()}")
        reason = str(error)
        numbered = re.search(r"Row #(\d+)", reason)
        where = f"row {n_rows + int(numbered[1])}" if numbered else f"a row behind row {n_rows}"
        if ragged := re.search(r"Expected (\d+) columns, got (\d+)", reason):
            said = f"{where} has {ragged[2]} fields but the header {ragged[1]}; correct the row"
            if len(self.names) == 1 and n_rows == 0:
                said += f", or leave out what stands above the columns' names: the header is {self.names[0]!r:.60}"
        elif misfit := _MISFIT.search(reason):
            value = " ".join(misfit[3].split())[:80]
            column = f"column {self.names[int(misfit[1])]!r}, {where}"
            said = f"{column}: {value} for a column read as {misfit[2]}; correct it"
        else:
            said = f"cannot be read at {where} ({' '.join(reason.split())[:200]}); correct the file"
        return SourceError(f"{self.file}: {said}")


@dataclass(frozen=True, slots=True)
class _AllBut:
    """All names but these: those of columns that are not read, too."""

    names: Container[str]

    def __contains__(self, name: object) -> bool:
        return name not in self.names


def csv_records(
    file: Path,
    types: Mapping[str, pa.DataType],
    block_bytes: int,
    start_row: int = 0,
    start_byte: int = 0,
    rules: TextRules | None = None,
) -> Iterator[tuple[TypedRows, TextBlock]]:
    """The rows behind row `start_row`, which ends at `start_byte` of the text, with the columns of `types`.

    Yields parsed rows with the block of text that they come from. Raises SourceError, which names column and
    row, counted from 1 without the header.
    """
    rules = rules or TextRules()
    numbers = {name for name, dtype in types.items() if not pa.types.is_string(dtype)}
    layout, n_rows, as_texts = CsvLayout.of(file, _AllBut(numbers)), start_row, set(rules.formats)
    blocks = layout.blocks(min(block_bytes, BLOCK_BYTES), start_byte)
    try:
        with ThreadPoolExecutor(_PARSERS, "ep3stream-csv") as pool:
            for block, parsing in _parsed_ahead(
                blocks, lambda text: pool.submit(layout.read, text, types, rules, as_texts)
            ):
                typed = parsing.result()
                n_rows += typed.rows.num_rows
                yield typed, block
    except (TextFault, StrayCell, pa.ArrowInvalid) as error:
        raise layout.fault(n_rows, error) from error


def _parsed_ahead(
    blocks: Iterator[TextBlock], submit: Callable[[bytes], Future[TypedRows]]
) -> Iterator[tuple[TextBlock, Future[TypedRows]]]:
    """The blocks in order with their futures, some submitted ahead; a fault comes behind all good blocks."""
    pending: deque[tuple[TextBlock, Future[TypedRows]]] = deque()
    fault = None
    try:
        for block in blocks:
            pending.append((block, submit(block.text)))
            if len(pending) > _PARSERS:
                yield pending.popleft()
    except TextFault as error:
        fault = error
    yield from pending
    if fault is not None:
        raise fault


def _refuse_other_kinds(file: Path) -> None:
    """Raises SourceError for a packed file or another kind of file under the name of a plain one."""
    if file.name.lower().endswith(PACKED_SUFFIXES) or not file.is_file():
        return
    with file.open("rb") as opened:
        first = opened.read(4)
    for mark, words in _OTHER_KINDS.items():
        if first.startswith(mark):
            raise SourceError(f"{file}: holds no text as its name says: {words}")


def _delimiter_and_header(file: Path) -> tuple[str, tuple[list[str], bytes, int]]:
    """What parts the fields, as the header shows, and `_header`; raises SourceError if no delimiter fits."""
    delimiter = "\t" if unpacked_name(file).endswith(".tsv") else ","
    others = [other for other in _OTHER_DELIMITERS if other != delimiter]
    try:
        header = _header(file, delimiter)
    except SourceError:
        # "a";"b" is no row of fields between commas: text follows a closing quote.
        for other in others:
            with suppress(SourceError):
                header = _header(file, other)
                if len(header[0]) > 1:
                    return other, header
        raise
    names = header[0]
    found = [other for other in others if any(other in name for name in names)]
    n_fields = len(names) if found and _is_even(header[1], delimiter, len(names)) else 1
    if n_fields > 1 and delimiter == "\t":
        return delimiter, header
    for other in sorted(found, key=names[0].count, reverse=True):
        # Names may have a comma or another delimiter, numbers too: "Temp, C;y" above "1,5;2".
        with suppress(SourceError):
            by_other = _header(file, other)
            if len(by_other[0]) >= n_fields and _is_even(by_other[1], other, len(by_other[0])):
                return other, by_other
    if len(names) == 1 and found:
        delimiter = max(found, key=names[0].count)
        header = _header(file, delimiter)
    return delimiter, header


def _is_even(text: bytes, delimiter: str, n_fields: int) -> bool:
    """Whether the first rows have as many fields as the header."""
    lines = text.split(b"\n", _FIRST_ROWS)[:_FIRST_ROWS]
    try:
        rows = list(filter(None, csv.reader((line.decode() for line in lines), delimiter=delimiter)))
        return bool(rows) and all(len(row) == n_fields for row in rows)
    except (csv.Error, UnicodeDecodeError):
        return False


def _without_columns(text: bytes, left_out: list[bool]) -> bytes:
    """The rows, of fields between semicolons, without the fields of some columns."""
    if not any(left_out):
        return text
    kept = io.StringIO()
    rows = csv.reader(io.StringIO(text.decode(errors="replace"), newline=""), delimiter=";")
    with suppress(csv.Error):
        for row in rows:
            fields = [field for field, is_out in zip(row, left_out, strict=False) if not is_out]
            kept.write(";".join(fields) + "\n")
    return kept.getvalue().encode()


def _header(file: Path, delimiter: str) -> tuple[list[str], bytes, int]:
    """The fields of the first line that is not empty, the text behind it in the first block, and its first byte."""
    # Decimal commas are looked for in many rows: the first may hold whole numbers.
    n_bytes = _HEADER_BYTES if delimiter != ";" else 64 * _HEADER_BYTES
    try:
        blocks = text_blocks(file, n_bytes, 0, delimiter)
        block = next(blocks, None)
        text = block.text if block else b""
        if len(text) < n_bytes:  # The last line comes by itself if it has no line break.
            with suppress(TextFault):
                text += b"".join(more.text for more in islice(blocks, 1))
        lines = io.BytesIO(text)
        # The reader takes no more lines than the header has, so that `lines` stands behind the header.
        rows = csv.reader((line.decode() for line in iter(lines.readline, b"")), delimiter=delimiter)
        names = next(filter(None, rows), [])
    except (TextFault, csv.Error, UnicodeDecodeError) as error:
        reason = str(error)
        if isinstance(error, UnicodeDecodeError):
            reason = "it is not UTF-8"
        elif "new-line character" in reason:
            reason = "its lines end in carriage returns alone"
        raise SourceError(
            f"{file}: the header cannot be read ({reason}); give a CSV file in UTF-8"
        ) from error
    if block is None or not names:
        raise SourceError(f"{file}: is empty; leave it out or give a file with data")
    return names, text[lines.tell() :], block.next_byte - len(block.text) + lines.tell()
