"""What the beginning of a CSV file tells: the columns' names, what stands between fields, where the rows begin."""

from __future__ import annotations

import csv
import io
import logging
import re
from collections import Counter
from dataclasses import dataclass
from pathlib import Path

from ep3stream.data.readers.text_blocks import PACKED_SUFFIXES, TextFault, text_blocks, unpacked_name
from ep3stream.errors import SourceError

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
