"""A pair of arrays, x (n, ...) and y (n,) or (n, c), from files of any array format or from Python, as a source."""

from __future__ import annotations

import math
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import Task
from ep3stream.errors import SourceError
from ep3stream.formats.arrays import RowArray
from ep3stream.formats.digests import stamps_of
from ep3stream.formats.source import (
    MAX_LABELS,
    START,
    Family,
    FeatureColumn,
    RestartPosition,
    SourceBatch,
    TargetColumns,
    reading,
)

_SCAN_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """What the rows of two arrays stand for: features x0, x1, ..., and targets y, or y0, y1, ..."""

    columns: tuple[FeatureColumn, ...]
    target: TargetColumns

    @classmethod
    def of(
        cls, names: tuple[str, str], x_shape: tuple[int, ...], y_shape: tuple[int, ...],
        y_dtype: np.dtype[Any], task: Task | None,
    ) -> ArrayLayout:  # fmt: skip
        """For arrays of these names and shapes; raises SourceError for shapes that are no rows."""
        x_name, y_name = names
        if len(x_shape) < 2 or 0 in x_shape[1:]:
            raise SourceError(f"{x_name}: has shape {x_shape}; x must be (rows, features): reshape it")
        if len(y_shape) not in (1, 2) or 0 in y_shape[1:]:
            raise SourceError(
                f"{y_name}: has shape {y_shape}; y must be (rows,) or (rows, outputs): reshape it"
            )
        if x_shape[0] != y_shape[0]:
            raise SourceError(
                f"{x_name} has {x_shape[0]} rows but {y_name} has {y_shape[0]}; give a matching pair"
            )
        if x_shape[0] == 0:
            raise SourceError(f"{x_name}: has no rows; give some")
        features = (f"x{j}" for j in range(math.prod(x_shape[1:])))
        columns = tuple(FeatureColumn(name, "numeric", name, "number") for name in features)
        return cls(columns, _target(y_name, math.prod(y_shape[1:]), y_dtype, task))

    def targets(self, y: NDArray[Any]) -> NDArray[Any] | pa.DictionaryArray:
        """`target` of a SourceBatch: numbers (b, c), labels (b,), or a dictionary of the texts false and true."""
        if self.target.kind == "number":
            return y.reshape(len(y), -1)
        labels = y.reshape(len(y))
        if self.target.kind == "integer":
            return labels
        return pa.array(labels).cast(pa.string()).dictionary_encode()


@dataclass(frozen=True, slots=True)
class ArraySource:
    """Two arrays of the same length; features are called x0, x1, ... and targets y, or y0, y1, ..."""

    x: RowArray
    y: RowArray
    layout: ArrayLayout
    label_values: tuple[int, ...] | None

    @classmethod
    def open(cls, x: RowArray, y: RowArray, task: Task | None) -> ArraySource:
        """Check both shapes and, for integer labels, list the classes; raises SourceError."""
        layout = ArrayLayout.of((x.name, y.name), x.shape, y.shape, y.dtype, task)
        return cls(x, y, layout, _labels(y) if layout.target.kind == "integer" else None)

    @property
    def name(self) -> str:
        """What messages about the whole source call it."""
        return self.y.name

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, x's before y's."""
        return tuple(dict.fromkeys((*self.x.files, *self.y.files)))

    @property
    def columns(self) -> tuple[FeatureColumn, ...]:
        """The feature columns."""
        return self.layout.columns

    @property
    def target(self) -> TargetColumns:
        """What is learned."""
        return self.layout.target

    @property
    def expected_rows(self) -> int:
        """The number of rows."""
        return len(self.x)

    @property
    def expected_bytes(self) -> int:
        """Bytes of all rows as float32."""
        return 4 * len(self.x) * (len(self.columns) + len(self.target.names))

    def fingerprint(self) -> list[dict[str, Any]]:
        """Stamps of the files, and what is read from them."""
        arrays = [
            {"name": Path(array.name).name, "shape": list(array.shape), "dtype": str(array.dtype)}
            for array in (self.x, self.y)
        ]
        return [*stamps_of(self.files), *arrays]

    def described(self) -> tuple[dict[str, Any], ...]:
        """What the manifest says about arrays without files."""
        return tuple({"name": array.name, "rows": len(array)} for array in (self.x, self.y))

    def batches(self, block_bytes: int, start: RestartPosition = START) -> Iterator[SourceBatch]:
        """All rows from `start` on in order, about `block_bytes` of x at a time."""
        row = start.row
        block_rows = max(1, block_bytes // self.x.row_bytes)
        x_file, y_file = _place(self.x), _place(self.y)
        with reading(x_file):
            targets = _Following(self.y.blocks(block_rows, row), y_file)
            for x, end_byte in self.x.blocks(block_rows, row):
                yield SourceBatch(
                    file=x_file,
                    target_file=y_file,
                    file_index=0,
                    first_row=row,
                    n_rows=len(x),
                    end_byte=end_byte,
                    next=RestartPosition(0, row + len(x)),
                    numeric=(x.reshape(len(x), -1),),
                    texts=(),
                    target=self.layout.targets(targets.take(len(x))),
                    raw=x.reshape(-1).view(np.uint8).data if self.x.is_raw else None,
                )
                row += len(x)


class _Following:
    """Takes as many rows at a time as are asked for, whatever blocks they come in."""

    def __init__(self, blocks: Iterator[tuple[NDArray[Any], int]], file: Path | str) -> None:
        self._blocks, self._file = blocks, file
        self._left: NDArray[Any] | None = None

    def take(self, n_rows: int) -> NDArray[Any]:
        """The next rows; there are as many as the shapes said."""
        pieces: list[NDArray[Any]] = []
        while n_rows:
            if self._left is None or len(self._left) == 0:
                with reading(self._file):
                    self._left, _ = next(self._blocks)
            pieces.append(self._left[:n_rows])
            self._left = self._left[n_rows:]
            n_rows -= len(pieces[-1])
        return pieces[0] if len(pieces) == 1 else np.concatenate(pieces)


def _target(name: str, n_outputs: int, dtype: np.dtype[Any], task: Task | None) -> TargetColumns:
    """Integers and booleans are labels unless regression is asked for; numbers the other way round."""
    names = ("y",) if n_outputs == 1 else tuple(f"y{j}" for j in range(n_outputs))
    if task is None:
        task = "classification" if dtype.kind in "biu" and n_outputs == 1 else "regression"
    if task == "regression":
        number: Family = "number"
        return TargetColumns(names, "number", names, (number,) * n_outputs)
    if n_outputs > 1:
        raise SourceError(
            f"{name}: has {n_outputs} columns; classification needs one column of labels, "
            "or take --task regression"
        )
    if dtype.kind == "b":
        return TargetColumns(names, "text", names, ("boolean",))
    return TargetColumns(names, "integer", names, ("integer",))


def _labels(y: RowArray) -> tuple[int, ...] | None:
    """The distinct integer labels, sorted, in one more pass over y; None when there are too many or it costs."""
    if y.dtype.kind not in "iu" or y.is_costly:
        return None  # the encoder finds the row of a label that is no whole number
    distinct = np.empty(0, y.dtype)
    with reading(y.name):
        for block, _ in y.blocks(_SCAN_ROWS, 0):
            distinct = np.union1d(distinct, block)
            if len(distinct) > MAX_LABELS:
                return None
    return tuple(int(value) for value in distinct)


def _place(array: RowArray) -> Path | str:
    return Path(array.name) if array.files else array.name


def memory_array(name: str, array: NDArray[Any]) -> RowArray:
    """An array that Python holds."""
    if array.dtype.kind not in "biuf":
        raise SourceError(f"{name}: holds {array.dtype}, not numbers; convert it to numbers")

    def blocks(block_rows: int, start_row: int) -> Iterator[tuple[NDArray[Any], int]]:
        for row in range(start_row, len(array), block_rows):
            yield array[row : row + block_rows], 0

    return RowArray(name, (), array.shape, array.dtype, blocks)
