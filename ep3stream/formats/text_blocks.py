"""Text files, plain or packed (.gz, .zst, .bz2, .xz, .lz4, .zip), as blocks of whole lines.

The blocks' places in the text are known: there an interrupted conversion starts again, and by them errors count rows.
"""

from __future__ import annotations

import lzma
import zipfile
from bisect import bisect_right
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.errors import SourceError
from ep3stream.formats.source import reading

MAX_LINE_BYTES = 64 << 20
_BOM = b"\xef\xbb\xbf"
_NEWLINE, _RETURN, _QUOTE = b'\n\r"'
_CODECS = {".gz": "gzip", ".zst": "zstd", ".bz2": "bz2", ".lz4": "lz4"}
STREAM_SUFFIXES = (*_CODECS, ".xz")
PACKED_SUFFIXES = (*STREAM_SUFFIXES, ".zip")


class TextFault(Exception):
    """Says in words why the line behind the lines yielded so far cannot be read."""


@dataclass(frozen=True, slots=True)
class TextBlock:
    """Whole lines of a text.

    next_byte: where the unpacked text goes on behind them. end_byte: how far the (packed) file has been read.
    """

    text: bytes
    next_byte: int
    end_byte: int


def unpacked_name(file: Path) -> str:
    """The name of the text, in lower case: without .gz or the like, or that of the one member of a .zip."""
    name = (zip_member(file) if file.suffix.lower() == ".zip" else file.name).lower()
    return name.removesuffix(next((suffix for suffix in STREAM_SUFFIXES if name.endswith(suffix)), ""))


def zip_member(file: Path) -> str:
    """The name of the one table in a .zip; raises SourceError if the archive holds none or several."""
    with reading(file), zipfile.ZipFile(file) as archive:
        names = [name for name in archive.namelist() if name.lower().endswith((".csv", ".tsv"))]
    names = [name for name in names if not name.startswith("__MACOSX/")]
    if len(names) != 1:
        raise SourceError(f"{file}: holds {len(names)} tables; make it one .csv or .tsv per .zip")
    return names[0]


@contextmanager
def open_unpacked(file: Path, start_byte: int = 0) -> Iterator[tuple[Any, Callable[[], int]]]:
    """The unpacked bytes from `start_byte` on as a stream, and a function that says how far the file was read.

    A plain file is opened at `start_byte` at once; a packed one is unpacked from its beginning.
    """
    suffix = file.suffix.lower()
    with ExitStack() as stack:
        if suffix in _CODECS:
            raw = stack.enter_context(pa.OSFile(str(file)))
            stream = stack.enter_context(pa.CompressedInputStream(raw, _CODECS[suffix]))
        elif suffix == ".xz":
            raw = stack.enter_context(file.open("rb"))
            stream = stack.enter_context(lzma.open(raw))
        elif suffix == ".zip":
            raw = stack.enter_context(file.open("rb"))
            stream = stack.enter_context(stack.enter_context(zipfile.ZipFile(raw)).open(zip_member(file)))
        else:
            stream = raw = stack.enter_context(pa.OSFile(str(file)))
            raw.seek(start_byte)
            start_byte = 0
        while start_byte:
            skipped = len(stream.read(min(start_byte, 1 << 20)))
            if not skipped:
                raise SourceError(f"{file}: became shorter since it was begun; start the conversion again")
            start_byte -= skipped
        yield stream, raw.tell


def text_blocks(
    file: Path, block_bytes: int, start_byte: int = 0, delimiter: str | None = None
) -> Iterator[TextBlock]:
    """The lines from `start_byte` on, about `block_bytes` at a time, without a byte order mark.

    With a `delimiter`, line breaks inside quoted fields do not end a line. The last line may lack its line
    break. Raises TextFault behind the last good line, and any error of the unpacking.
    """
    with open_unpacked(file, start_byte) as (stream, position):
        rest, at = b"", start_byte
        while True:
            read = stream.read(max(block_bytes, len(rest)))
            text = rest + read if rest else read
            if at == 0 and text.startswith(_BOM):
                text, at = text[len(_BOM) :], len(_BOM)
            end, fault = _whole_lines(text, delimiter, is_last=not read)
            if end:
                at += end
                yield TextBlock(text[:end], at, position())
            rest = text[end:]
            if fault is None and len(rest) > MAX_LINE_BYTES:
                fault = f"the line is longer than {MAX_LINE_BYTES} bytes, or a quote in it is never closed"
            if fault is not None:
                raise TextFault(fault)
            if not read:
                return


def _whole_lines(text: bytes, delimiter: str | None, is_last: bool) -> tuple[int, str | None]:
    """Where the last whole line of `text` ends, and in words what is wrong with the line behind it, or None."""
    if (zero := text.find(b"\0")) >= 0:
        end, _ = _whole_lines(text[:zero], delimiter, is_last=False)
        return end, "holds a NUL byte: the file is damaged, or not UTF-8; correct it or save it as UTF-8"
    if delimiter is None or text.find(b'"') < 0:
        return (len(text) if is_last else text.rfind(b"\n") + 1), None
    quotes = np.flatnonzero(np.frombuffer(text, np.uint8) == _QUOTE)
    if not _quotes_enclose_fields(text, quotes, ord(delimiter)):
        return _whole_lines_by_field(text, ord(delimiter), is_last)
    if len(quotes) % 2 == 0 and is_last:
        return len(text), None
    # Every line break behind an even number of quotes ends a line.
    end = len(text)
    while (end := text.rfind(b"\n", 0, end)) >= 0:
        before = int(np.searchsorted(quotes, end))
        if before % 2 == 0:
            break
        end = int(quotes[before - 1])
    return end + 1, "a quote is never closed; close it or double it" if is_last else None


def _quotes_enclose_fields(text: bytes, quotes: NDArray[np.intp], delimiter: int) -> bool:
    """Whether every odd quote stands at the start of a field and every even one at its end.

    If so, counting quotes tells which line breaks are quoted. A doubled quote closes and opens again.
    """
    around = np.frombuffer(text, np.uint8)
    opening, closing = quotes[::2], quotes[1::2]
    before = around[opening[opening > 0] - 1]
    behind = around[closing[closing < len(text) - 1] + 1]
    ends = (_NEWLINE, _RETURN, _QUOTE, delimiter)
    return all(bool(np.logical_or.reduce([side == byte for byte in ends]).all()) for side in (before, behind))


def _whole_lines_by_field(text: bytes, delimiter: int, is_last: bool) -> tuple[int, str | None]:
    """`_whole_lines` for text where quotes also stand within fields; one step for each quote."""
    starts: list[int] = []
    ends: list[int] = []
    fault, at = None, 0
    while fault is None and (quote := text.find(b'"', at)) >= 0:
        at = quote + 1
        if quote and text[quote - 1] not in (_NEWLINE, _RETURN, delimiter):
            continue  # within a field a quote is a letter like any other
        at = _behind_closing_quote(text, at)
        if at > len(text):
            fault = "a quote is never closed; close it or double it"
        elif at < len(text) and text[at] not in (_NEWLINE, _RETURN, delimiter):
            fault = "text follows a closing quote: a quote is not closed, or must be doubled; correct it"
        starts.append(quote)
        ends.append(at)
    if fault is None and is_last:
        return len(text), None
    if fault is not None and at > len(text) and not is_last:
        fault = None  # the quote may be closed further on
    end = len(text) if fault is None else starts[-1]
    while (end := text.rfind(b"\n", 0, end)) >= 0:
        field = bisect_right(starts, end) - 1
        if field < 0 or ends[field] <= end:
            break
        end = starts[field]
    return end + 1, fault


def _behind_closing_quote(text: bytes, at: int) -> int:
    """The place behind the quote that closes the field whose text begins at `at`; len + 1 if there is none."""
    while (at := text.find(b'"', at)) >= 0:
        at += 1
        if text[at : at + 1] != b'"':
            return at
        at += 1
    return len(text) + 1
