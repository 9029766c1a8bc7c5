"""What every reader yields: a `RowSource`, which knows its columns and gives its rows in batches.

Missing values are not decided here. An empty cell, a null and a NaN all arrive in a `SourceBatch` as NaN or
null; `conversion/encode.py` then refuses them, drops the row or fills them in, as `--missing` says.
"""

from __future__ import annotations

import csv
import lzma
import struct
import traceback
import zlib
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any, Literal
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import Categories, DatePart, Task
from ep3stream.errors import Ep3streamError, SourceError

# One-hot features of one category column, and classes of one target.
MAX_CATEGORIES = 1000
MAX_LABELS = 10_000

# The kind of values that a column of a file holds; conversion/columns.py derives it from the arrow type.
Family = Literal[
    "number", "integer", "boolean", "text", "date", "timestamp", "zoned timestamp", "time of day", "duration"
]

# Errors whose text says enough without their name. RuntimeError is what zipfile raises for an encrypted member.
_READ_ERRORS = (
    OSError,
    EOFError,
    BadZipFile,
    zlib.error,
    lzma.LZMAError,
    csv.Error,
    pa.ArrowException,
    ValueError,
    RuntimeError,
)

# What only a file or its reader can be the cause of, wherever it is raised. A header may ask for any memory.
_DAMAGE = (
    OSError,
    EOFError,
    BadZipFile,
    zlib.error,
    lzma.LZMAError,
    csv.Error,
    struct.error,
    pa.ArrowException,
    UnicodeError,
    MemoryError,
)

# What an object of Python may raise without a frame of its own, being written in C.
_OBJECT_ERRORS = (TypeError, ValueError, OverflowError, BufferError)

# What calls our own code back, or is called by it for anything but reading.
_PASSED_THROUGH = frozenset({"numpy", "contextlib", "functools", "concurrent", "threading", "collections"})
_NUMPY_READERS = ("numpy.lib.", "numpy._core.memmap", "numpy.core.memmap")

_OURS = __name__.partition(".")[0]

# How the names of sources without files begin.
PYTHON = "python: "


@dataclass(frozen=True, slots=True)
class FeatureColumn:
    """A feature column of the store: one number per row, or a category that becomes one-hot features or a code.

    name: the column's name in the store.
    source, family: the name and the kind of values of the file's column that the feature is made of.
    part: which part of a date or time the number is, for example the month.
    encoding: whether a category becomes one-hot features or one code.
    is_stated: whether the settings name the column as a category, so that no warning doubts it.
    is_code: whether the number is a code from 0 on, as of a weekday; the store's record has it as a category.
    """

    name: str
    kind: Literal["numeric", "category"]
    source: str = ""
    family: Family | None = None
    part: DatePart | None = None
    encoding: Categories = "onehot"
    is_stated: bool = False
    is_code: bool = False


@dataclass(frozen=True, slots=True)
class TargetColumns:
    """The columns to learn: c numbers per row, or one label per row, given as an integer or a text.

    names: the columns' names in the store. sources, families: names and kinds of values in the files.
    is_stated: whether the settings ask for classes.
    """

    names: tuple[str, ...]
    kind: Literal["number", "integer", "text"]
    sources: tuple[str, ...] = ()
    families: tuple[Family, ...] = ()
    is_stated: bool = False

    @property
    def task(self) -> Task:
        """Regression for numbers, classification for labels."""
        return "regression" if self.kind == "number" else "classification"


@dataclass(frozen=True, slots=True)
class RestartPosition:
    """A place between two rows of a source, from which reading can start again.

    file: index of the file. row: how many rows of this file lie before the place.
    byte: where the last of these rows ends in the file's unpacked text, for text formats; 0 for formats that
    find rows by their number.
    """

    file: int = 0
    row: int = 0
    byte: int = 0


START = RestartPosition()


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """b consecutive rows of one file. NaN and null are missing values.

    file, target_file: where features and target come from, for messages; a name if the source has no files.
    end_byte: how many bytes of the file have been read, for progress and digests.
    next: the position behind the last of these rows.
    numeric: arrays (b,) or (b, k), which fill the numeric columns from left to right.
    texts: for each category column one arrow dictionary array (b,), of texts or numbers.
    target: numbers (b,) or (b, c), integer labels (b,), or an arrow dictionary array (b,) of labels.
    raw: the last bytes of the file before `end_byte`, if the reader still has them in memory.
    strays: by column, which rows (b,) have a text that is no value of its type; such rows are to be left out.
    """

    file: Path | str
    target_file: Path | str
    file_index: int
    first_row: int
    n_rows: int
    end_byte: int
    next: RestartPosition
    numeric: tuple[NDArray[Any], ...]
    texts: tuple[pa.DictionaryArray, ...]
    target: NDArray[Any] | pa.DictionaryArray
    raw: memoryview | None = None
    strays: Mapping[str, NDArray[np.bool_]] = field(default_factory=dict)

    def without_strays(self) -> tuple[SourceBatch, NDArray[np.intp] | None]:
        """The batch of the rows without a stray, and their indices within this one; None if these are all rows."""
        if not self.strays:
            return self, None
        kept = np.flatnonzero(~np.logical_or.reduce(list(self.strays.values())))
        places = pa.array(kept)
        target = self.target
        return replace(
            self,
            n_rows=len(kept),
            numeric=tuple(piece[kept] for piece in self.numeric),
            texts=tuple(cells.take(places) for cells in self.texts),
            target=target.take(places) if isinstance(target, pa.DictionaryArray) else target[kept],
            strays={},
        ), kept


@dataclass(frozen=True, slots=True)
class BatchOrigin:
    """The file and row where a batch starts, to name its cells in messages.

    rows: the number of each row behind the first row, if some rows between them were left out.
    """

    file: Path | str
    first_row: int
    rows: NDArray[np.intp] | None = None

    def cell(self, column: str, index: int) -> str:
        """File, column and row of the batch's row `index`; rows count from 1 without the header."""
        place = index if self.rows is None else int(self.rows[index])
        return f"{self.file}: column {column!r}, row {self.first_row + place + 1}"


@dataclass(frozen=True, slots=True, eq=False)
class RowSource:
    """Files of one format, or an object of Python, whose rows are read from front to back.

    name: what messages about the whole source call it.
    columns, target: the features and what is to be learned.
    read(block_bytes, start): the rows from `start` on, see `batches`.
    fingerprint: JSON that changes if the source changes: stamps of files, shapes, columns.
    files: every file that is read, in order; none for an object of Python.
    label_values: all integer labels, sorted, if they are known before the rows are read.
    expected_rows: the number of rows, if the format states it.
    expected_bytes: about how many bytes the rows will take as float32; 0 if unknown.
    described: what the manifest says of a source without files.
    recorded: what the record of the columns says of the source as a whole, for later files that are read like it.
    reads_once: whether the rows cannot be read a second time, as those of an iterator.
    """

    name: str
    columns: tuple[FeatureColumn, ...]
    target: TargetColumns
    read: Callable[[int, RestartPosition], Iterator[SourceBatch]]
    fingerprint: tuple[dict[str, Any], ...]
    files: tuple[Path, ...] = ()
    label_values: tuple[int, ...] | None = None
    expected_rows: int | None = None
    expected_bytes: int = 0
    described: tuple[dict[str, Any], ...] = ()
    recorded: Mapping[str, Any] = field(default_factory=dict)
    reads_once: bool = False

    def batches(self, block_bytes: int, start: RestartPosition = START) -> Iterator[SourceBatch]:
        """All rows from `start` on, in order, about `block_bytes` at a time.

        `start` is START or the `next` of an earlier batch. The rows that follow are the same wherever batches
        begin and end. Raises SourceError, which names the file and the row of a fault.
        """
        with reading(self.name):
            yield from self.read(block_bytes, start)


def known_total(counts: Iterable[int | None]) -> int | None:
    """The sum of the counts; None if one of them is not known."""
    total = 0
    for count in counts:
        if count is None:
            return None
        total += count
    return total


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn every error that a reader raises about `path` into a SourceError that names it; an error of ours stays."""
    try:
        yield
    except Ep3streamError:
        raise
    except Exception as error:
        is_file = not str(path).startswith(PYTHON)
        known = _DAMAGE if is_file else (*_DAMAGE, *_OBJECT_ERRORS)
        if not isinstance(error, known) and not _is_of_reader(error):
            raise
        if is_file and isinstance(error, FileNotFoundError):
            raise SourceError(f"{path}: there is no such file; check the name") from None
        if is_file and isinstance(error, PermissionError):
            raise SourceError(f"{path}: may not be read; change its permissions") from None
        if is_file and isinstance(error, UnicodeEncodeError):
            raise SourceError(f"{path}: has a name that is not UTF-8; rename it") from None
        reason = " ".join(str(error).split())[:300]
        if not isinstance(error, _READ_ERRORS) or not reason:
            reason = f"{type(error).__name__}: {reason}" if reason else type(error).__name__
        remedy = (
            "the file is damaged or of another kind"
            if is_file
            else "correct it, or convert it to NumPy first"
        )
        raise SourceError(f"{path}: cannot be read ({reason}); {remedy}") from error


def _is_of_reader(error: Exception) -> bool:
    """Whether an error was raised within a library that reads, or an object of Python, and not by our own code.

    What a library that is written in C raises about our own call is taken for ours.
    """
    frames = [frame for frame, _ in traceback.walk_tb(error.__traceback__)]
    names = [str(frame.f_globals.get("__name__", "")) for frame in frames]
    behind = names[1 + max((at for at, name in enumerate(names) if _root(name) == _OURS), default=-1) :]
    return any(_root(name) not in _PASSED_THROUGH or name.startswith(_NUMPY_READERS) for name in behind)


def _root(module: str) -> str:
    return module.partition(".")[0]
