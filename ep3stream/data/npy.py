"""Reads a pair of .npy files, x (n, d) and y (n,) or (n, c), through memory maps of one block at a time."""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import Task
from ep3stream.data.batch import MAX_LABELS, Batch, Column, Target, reading
from ep3stream.errors import SourceError

_SCAN_ROWS = 1 << 20


def open_array(path: Path) -> NDArray[Any]:
    """The file as a read-only memory map; raises SourceError for objects, pickles and truncated files.

    Open it anew for each block: pages of a map that was dropped do not stay in the process.
    """
    with reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise SourceError(f"{path}: holds several arrays; save x and y as one .npy file each")
    if array.dtype.kind not in "biuf":
        raise SourceError(f"{path}: holds {array.dtype}, not numbers; save it as numbers")
    return array


@dataclass(frozen=True, slots=True)
class ArraySource:
    """Two arrays of the same length; features are called x0, x1, ... and targets y, or y0, y1, ..."""

    x_file: Path
    y_file: Path
    n_rows: int
    columns: tuple[Column, ...]
    target: Target
    label_values: tuple[int, ...] | None

    @classmethod
    def open(cls, x_file: Path, y_file: Path, task: Task | None) -> ArraySource:
        """Check both headers and, for integer labels, list the classes; raises SourceError."""
        x, y = open_array(x_file), open_array(y_file)
        if x.ndim != 2 or x.shape[1] == 0:
            raise SourceError(f"{x_file}: has shape {x.shape}; x must be (rows, features): reshape it")
        if y.ndim not in (1, 2) or 0 in y.shape[1:]:
            raise SourceError(
                f"{y_file}: has shape {y.shape}; y must be (rows,) or (rows, outputs): reshape it"
            )
        if len(x) != len(y):
            raise SourceError(f"{x_file} has {len(x)} rows but {y_file} has {len(y)}; give a matching pair")
        if len(x) == 0:
            raise SourceError(f"{x_file}: has no rows; give a file with data")
        target = _target(y, y_file, task)
        return cls(
            x_file=x_file,
            y_file=y_file,
            n_rows=len(x),
            columns=tuple(Column(f"x{j}", "numeric") for j in range(x.shape[1])),
            target=target,
            label_values=_labels(y) if target.kind == "integer" else None,
        )

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, in order."""
        return (self.x_file, self.y_file)

    @property
    def expected_rows(self) -> int:
        """The number of rows."""
        return self.n_rows

    @property
    def expected_bytes(self) -> int:
        """Bytes of all rows as float32."""
        return 4 * self.n_rows * (len(self.columns) + len(self.target.names))

    def batches(self, block_bytes: int) -> Iterator[Batch]:
        """All rows in order, about `block_bytes` of x at a time."""
        x, row = open_array(self.x_file), 0
        offset, row_bytes = self.x_file.stat().st_size - x.nbytes, x.nbytes // len(x)
        block_rows = max(1, block_bytes // row_bytes)
        for row in range(0, self.n_rows, block_rows):
            x = open_array(self.x_file)[row : row + block_rows]
            yield Batch(
                file=self.x_file,
                target_file=self.y_file,
                file_index=0,
                first_row=row,
                n_rows=len(x),
                end_byte=offset + (row + len(x)) * row_bytes,
                numeric=(x,),
                texts=(),
                target=self._targets(row, len(x)),
            )

    def _targets(self, row: int, n_rows: int) -> NDArray[Any] | pa.DictionaryArray:
        y = open_array(self.y_file)[row : row + n_rows]
        if self.target.kind == "number":
            return y.reshape(n_rows, -1)
        y = y.reshape(n_rows)
        return pa.array(y).cast(pa.string()).dictionary_encode() if self.target.kind == "text" else y


def _target(y: NDArray[Any], y_file: Path, task: Task | None) -> Target:
    n_outputs = 1 if y.ndim == 1 else y.shape[1]
    names = ("y",) if n_outputs == 1 else tuple(f"y{j}" for j in range(n_outputs))
    if task is None:
        task = "classification" if y.dtype.kind in "biu" and n_outputs == 1 else "regression"
    if task == "regression":
        return Target(names, "number")
    if n_outputs > 1:
        raise SourceError(
            f"{y_file}: has {n_outputs} columns; classification needs one column of labels, "
            "or take --task regression"
        )
    return Target(names, "text" if y.dtype.kind == "b" else "integer")


def _labels(y: NDArray[Any]) -> tuple[int, ...] | None:
    """The distinct integer labels, sorted, in one pass over y; None when there are too many."""
    distinct = np.empty(0, y.dtype)
    for row in range(0, len(y), _SCAN_ROWS):
        distinct = np.union1d(distinct, y[row : row + _SCAN_ROWS])
        if len(distinct) > MAX_LABELS or y.dtype.kind not in "iu":
            return None  # the encoder finds the row and says what is wrong with it
    return tuple(int(value) for value in distinct)
