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

from ep3stream.config import Task
from ep3stream.errors import SourceError

MAX_CATEGORIES = 1000
MAX_LABELS = 10_000

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
class Column:
    """A feature column: one number per row, or a text that becomes one-hot features."""

    name: str
    kind: Literal["numeric", "category"]


@dataclass(frozen=True, slots=True)
class Target:
    """What is learned: c numbers per row, or one label per row given as an integer or a text."""

    names: tuple[str, ...]
    kind: Literal["number", "integer", "text"]

    @property
    def task(self) -> Task:
        """Numbers are regressed, labels are classified."""
        return "regression" if self.kind == "number" else "classification"


@dataclass(frozen=True, slots=True)
class Batch:
    """Consecutive rows of one file, in the order of the source's columns.

    numeric: arrays (b,) or (b, k) that fill the numeric columns from left to right;
    texts: one arrow dictionary array (b,) for each category column;
    target: numbers (b,) or (b, c), integer labels (b,), or an arrow dictionary array of text labels.
    """

    file: Path
    target_file: Path
    file_index: int
    first_row: int
    n_rows: int
    end_byte: int  # how far the file has been read, for progress and digests
    numeric: tuple[NDArray[Any], ...]
    texts: tuple[pa.DictionaryArray, ...]
    target: NDArray[Any] | pa.DictionaryArray


class Source(Protocol):
    """Files of one format, read once from front to back."""

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, in order."""

    @property
    def columns(self) -> tuple[Column, ...]:
        """The feature columns."""

    @property
    def target(self) -> Target:
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

    def batches(self, block_bytes: int) -> Iterator[Batch]:
        """All rows in order, about `block_bytes` at a time; raises SourceError naming file and row."""


@contextmanager
def reading(path: Path) -> Iterator[None]:
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
