"""Reads CSV and TSV files, plain, .gz or .zip, block by block through pyarrow's reader threads."""

from __future__ import annotations

import csv
import io
import re
import zipfile
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import IO, Any

import pyarrow as pa
import pyarrow.csv as pa_csv

from ep3stream.data.batch import reading
from ep3stream.errors import SourceError

# Types are inferred from the first block alone, and a row must fit into one block.
_BLOCK_BYTES = 4 << 20


def csv_header(file: Path) -> list[str]:
    """The names in the first line that is not empty; none when there is no such line."""
    with _open_text(file) as (text, _):
        lines = io.TextIOWrapper(text, encoding="utf-8-sig", newline="")
        return next((row for row in csv.reader(lines, delimiter=_delimiter(file)) if row), [])


def csv_schema(file: Path) -> pa.Schema:
    """Names and types as the first block suggests them; raises SourceError."""
    with _csv_errors(file, {}), _open_text(file) as (text, _):
        return _csv_reader(text, file, {}).schema


def csv_records(file: Path, types: dict[str, pa.DataType]) -> Iterator[tuple[pa.RecordBatch, int]]:
    """All rows with the columns of `types`, and how many bytes of the file were read; raises SourceError."""
    with _csv_errors(file, types), _open_text(file) as (text, raw):
        for record in _csv_reader(text, file, types):
            yield record, raw.tell()


def _delimiter(file: Path) -> str:
    name = _zip_member(file) if file.suffix.lower() == ".zip" else file.name
    return "\t" if name.lower().removesuffix(".gz").endswith(".tsv") else ","


def _zip_member(file: Path) -> str:
    with reading(file), zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".csv", ".tsv"))]
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise SourceError(f"{file}: holds {len(names)} tables; make it one .csv or .tsv per .zip")
    return names[0]


@contextmanager
def _open_text(file: Path) -> Iterator[tuple[Any, IO[bytes]]]:
    """The unpacked bytes as a stream, and the packed file whose position tells how far it was read."""
    with ExitStack() as stack:
        raw = stack.enter_context(file.open("rb"))
        if file.suffix.lower() == ".gz":
            yield stack.enter_context(pa.CompressedInputStream(pa.PythonFile(raw), "gzip")), raw
        elif file.suffix.lower() == ".zip":
            archive = stack.enter_context(zipfile.ZipFile(raw))
            yield stack.enter_context(archive.open(_zip_member(file))), raw
        else:
            yield raw, raw


def _csv_reader(text: Any, file: Path, types: dict[str, pa.DataType], threads: bool = True) -> Any:
    return pa_csv.open_csv(
        text,
        read_options=pa_csv.ReadOptions(block_size=_BLOCK_BYTES, use_threads=threads),
        parse_options=pa_csv.ParseOptions(delimiter=_delimiter(file), newlines_in_values=True),
        convert_options=pa_csv.ConvertOptions(
            column_types=types, include_columns=list(types), strings_can_be_null=True
        ),
    )


@contextmanager
def _csv_errors(file: Path, types: dict[str, pa.DataType]) -> Iterator[None]:
    """Say what pyarrow says by column name and data row; `types` are those the file was being read as."""
    try:
        yield
    except pa.ArrowInvalid as error:
        raise SourceError(f"{file}: {_explain(file, _reason_with_row(file, types, error))}") from error


def _reason_with_row(file: Path, types: dict[str, pa.DataType], error: pa.ArrowInvalid) -> str:
    """The reader's message. Its threads do not count rows, so without a row read once more without them."""
    if "Row #" not in str(error):
        try:
            with _open_text(file) as (text, _):
                for _ in _csv_reader(text, file, types, threads=False):
                    pass
        except pa.ArrowInvalid as repeated:
            return str(repeated)
    return str(error)


def _explain(file: Path, reason: str) -> str:
    row = re.search(r"Row #(\d+)", reason)
    where = f"row {int(row[1]) - 1}" if row else "some row"  # pyarrow counts the header too
    if ragged := re.search(r"Expected (\d+) columns, got (\d+)", reason):
        return f"{where} has {ragged[2]} fields but the header {ragged[1]}; correct the row"
    if misfit := re.search(r"CSV column #(\d+).*conversion error to (\w+): (.*)", reason, re.DOTALL):
        column = csv_header(file)[int(misfit[1])]
        value = " ".join(misfit[3].split())[:80]
        return f"column {column!r}, {where}: {value} for a column read as {misfit[2]}; correct it"
    if "Empty CSV" in reason:
        return "is empty; leave it out or give a file with data"
    if "straddling" in reason:
        return f"a row is longer than {_BLOCK_BYTES} bytes, or a quote is never closed; correct it"
    return f"cannot be read ({' '.join(reason.split())[:200]}); correct the file"
