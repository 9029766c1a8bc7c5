"""What every source format is read into: columns, a target, and batches of rows."""

from __future__ import annotations

import csv
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal, Protocol
from zipfile import BadZipFile

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import Categories, DatePart, Task
from ep3stream.errors import SourceError

MAX_CATEGORIES = 1000

MAX_LABELS = 10_000

Family = Literal[
    "number", "integer", "boolean", "text", "date", "timestamp", "zoned timestamp", "time of day", "duration"
]

# RuntimeError is what zipfile raises for an encrypted member or an unknown compression.
_READ_ERRORS = (
    OSError,
    EOFError,
    BadZipFile,
    zlib.error,
    csv.Error,
    pa.ArrowException,
    ValueError,
    RuntimeError,
)


@dataclass(frozen=True, slots=True)
class FeatureColumn:
    """A feature column: one number per row, or a category that becomes one-hot features or a code.

    name: in the store; source: in the files; family: of the type read there (see column_types);
    part: what of a date or time it is; encoding: of a category.
    """

    name: str
    kind: Literal["numeric", "category"]
    source: str = ""
    family: Family | None = None
    part: DatePart | None = None
    encoding: Categories = "onehot"


@dataclass(frozen=True, slots=True)
class TargetColumns:
    """What is learned: c numbers per row, or one label per row given as an integer or a text.

    names: in the store; sources and families: of each in the files.
    """

    names: tuple[str, ...]
    kind: Literal["number", "integer", "text"]
    sources: tuple[str, ...] = ()
    families: tuple[Family, ...] = ()

    @property
    def task(self) -> Task:
        """Numbers are regressed, labels are classified."""
        return "regression" if self.kind == "number" else "classification"


@dataclass(frozen=True, slots=True)
class RestartPosition:
    """A place between two rows of a source, where reading can start again.

    `row` rows of file `file` lie before it, the last of them ending at byte `byte` of the unpacked text where
    the format is text (0 where rows are found by number).
    """

    file: int = 0
    row: int = 0
    byte: int = 0


START = RestartPosition()


@dataclass(frozen=True, slots=True)
class SourceBatch:
    """Consecutive rows of one file, in the order of the source's columns.

    numeric: arrays (b,) or (b, k) that fill the numeric columns from left to right;
    texts: one arrow dictionary array (b,) for each category column, of texts or numbers;
    target: numbers (b,) or (b, c), integer labels (b,), or an arrow dictionary array of labels.
    NaN and null are missing values.
    """

    file: Path | str  # a name where it is no file, for messages
    target_file: Path | str
    file_index: int
    first_row: int
    n_rows: int
    end_byte: int  # how far the file has been read, for progress and digests
    next: RestartPosition  # behind the last of these rows
    numeric: tuple[NDArray[Any], ...]
    texts: tuple[pa.DictionaryArray, ...]
    target: NDArray[Any] | pa.DictionaryArray
    raw: memoryview | None = None  # the last bytes of the file before `end_byte`, where they are at hand


class RowSource(Protocol):
    """Files of one format, read from front to back."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, in order."""

    @property
    def columns(self) -> tuple[FeatureColumn, ...]:
        """The feature columns."""

    @property
    def target(self) -> TargetColumns:
        """What is learned."""

    @property
    def label_values(self) -> tuple[int, ...] | None:
        """All integer labels, sorted, where they could be listed without reading the rows."""

    @property
    def expected_rows(self) -> int | None:
        """The number of rows, where the format states it."""

    @property
    def expected_bytes(self) -> int:
        """About how many bytes the rows will take as float32."""

    @property
    def name(self) -> str:
        """What messages about the whole source call it."""

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells as JSON whether it is the same source as before: stamps of files, shapes, columns."""

    def described(self) -> tuple[dict[str, Any], ...]:
        """What the manifest says of a source without files."""

    def batches(self, block_bytes: int, start: RestartPosition = START) -> Iterator[SourceBatch]:
        """All rows from `start` on in order, about `block_bytes` at a time; raises SourceError naming file and row.

        `start` is the source's beginning, START, or the `next` of an earlier batch: the rows that follow
        are then the same, wherever batches begin and end.
        """


@contextmanager
def reading(path: object) -> Iterator[None]:
    """Turn whatever a reader raises about `path` into a SourceError that names it."""
    try:
        yield
    except SourceError:
        raise
    except FileNotFoundError:
        raise SourceError(f"{path}: there is no such file; check the name") from None
    except PermissionError:
        raise SourceError(f"{path}: may not be read; change its permissions") from None
    except _READ_ERRORS as error:
        reason = " ".join(str(error).split())[:300]
        raise SourceError(
            f"{path}: cannot be read ({reason}); the file is damaged or of another kind"
        ) from error


def first_true(mask: NDArray[np.bool_]) -> int:
    """Index of the first True of a (b,) mask that has one."""
    return int(np.argmax(mask))
