"""A pair of arrays, x (n, ...) and y (n,) or (n, c), as a `RowSource` with features x0, x1, ...

The arrays come from files of any array format or from Python. NaN in x or y is a missing value.
"""

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
from ep3stream.formats.digests import stamps_of
from ep3stream.formats.row_array import RowArray
from ep3stream.formats.source import (
    MAX_LABELS,
    Family,
    FeatureColumn,
    RestartPosition,
    RowSource,
    SourceBatch,
    TargetColumns,
    reading,
)

_SCAN_ROWS = 1 << 20


@dataclass(frozen=True, slots=True)
class ArrayLayout:
    """Which columns the rows of two arrays have: features x0, x1, ..., and target y, or targets y0, y1, ..."""

    columns: tuple[FeatureColumn, ...]
    target: TargetColumns

    @classmethod
    def of(
        cls, names: tuple[str, str], x_shape: tuple[int, ...], y_shape: tuple[int, ...],
        y_dtype: np.dtype[Any], task: Task | None,
    ) -> ArrayLayout:  # fmt: skip
        """The layout of arrays of these shapes; `names` stand for them in messages.

        Without a task, one column of integers or booleans is taken as labels and everything else as numbers.
        Raises SourceError for shapes that are not rows of features with a target each.
        """
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
            return with_nan(y).reshape(len(y), -1)
        labels = y.reshape(len(y))
        mask = np.ma.getmaskarray(labels) if isinstance(labels, np.ma.MaskedArray) else None
        if self.target.kind == "integer":
            return labels if mask is None else pa.array(labels.data, mask=mask).dictionary_encode()
        return pa.array(np.asarray(labels), mask=mask).cast(pa.string()).dictionary_encode()


def array_source(x: RowArray, y: RowArray, task: Task | None) -> RowSource:
    """Two arrays of the same length as a source.

    Integer labels are listed in one more pass over y. Raises SourceError if the shapes do not fit together.
    """
    layout = ArrayLayout.of((x.name, y.name), x.shape, y.shape, y.dtype, task)
    files = tuple(dict.fromkeys((*x.files, *y.files)))
    shapes = [
        {"name": Path(array.name).name, "shape": list(array.shape), "dtype": str(array.dtype)}
        for array in (x, y)
    ]
    return RowSource(
        name=y.name,
        columns=layout.columns,
        target=layout.target,
        read=lambda block_bytes, start: _batches(x, y, layout, block_bytes, start.row),
        fingerprint=(*stamps_of(files), *shapes),
        files=files,
        label_values=_labels(y) if layout.target.kind == "integer" else None,
        expected_rows=len(x),
        expected_bytes=4 * len(x) * (len(layout.columns) + len(layout.target.names)),
        described=tuple({"name": array.name, "rows": len(array)} for array in (x, y)),
    )


def _batches(
    x: RowArray, y: RowArray, layout: ArrayLayout, block_bytes: int, row: int
) -> Iterator[SourceBatch]:
    block_rows = max(1, block_bytes // x.row_bytes)
    x_file, y_file = (Path(array.name) if array.files else array.name for array in (x, y))
    with reading(x_file):
        targets = _AnyNumberOfRows(y.blocks(block_rows, row), y_file)
        for block, end_byte in x.blocks(block_rows, row):
            yield SourceBatch(
                file=x_file,
                target_file=y_file,
                file_index=0,
                first_row=row,
                n_rows=len(block),
                end_byte=end_byte,
                next=RestartPosition(0, row + len(block)),
                numeric=(with_nan(block).reshape(len(block), -1),),
                texts=(),
                target=layout.targets(targets.take(len(block))),
                raw=block.reshape(-1).view(np.uint8).data if x.is_raw else None,
            )
            row += len(block)


def with_nan(values: NDArray[Any]) -> NDArray[Any]:
    """The values of a masked array with NaN where it is masked; other arrays as they are."""
    if not isinstance(values, np.ma.MaskedArray):
        return values
    filled = np.array(values.data, np.result_type(values.dtype, np.float16))
    filled[np.ma.getmaskarray(values)] = np.nan
    return filled


class _AnyNumberOfRows:
    """Gives as many rows at a time as are asked for, from blocks of other lengths."""

    def __init__(self, blocks: Iterator[tuple[NDArray[Any], int]], file: Path | str) -> None:
        self._blocks, self._file = blocks, file
        self._left: NDArray[Any] | None = None

    def take(self, n_rows: int) -> NDArray[Any]:
        """The next rows. The blocks hold enough of them: both arrays have the same length."""
        pieces: list[NDArray[Any]] = []
        while n_rows:
            if self._left is None or len(self._left) == 0:
                with reading(self._file):
                    self._left, _ = next(self._blocks)
            pieces.append(self._left[:n_rows])
            self._left = self._left[n_rows:]
            n_rows -= len(pieces[-1])
        if len(pieces) == 1:
            return pieces[0]
        is_masked = any(isinstance(piece, np.ma.MaskedArray) for piece in pieces)
        joined: NDArray[Any] = np.ma.concatenate(pieces) if is_masked else np.concatenate(pieces)  # type: ignore[no-untyped-call]
        return joined


def _target(name: str, n_outputs: int, dtype: np.dtype[Any], task: Task | None) -> TargetColumns:
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
    """The distinct integer labels, sorted; None if there are too many, or if reading y twice is costly.

    Also None for labels stored as floats: the encoder finds the row of a label that is no whole number.
    """
    if y.dtype.kind not in "iu" or y.is_costly:
        return None
    distinct = np.empty(0, y.dtype)
    with reading(y.name):
        for block, _ in y.blocks(_SCAN_ROWS, 0):
            values = block.compressed() if isinstance(block, np.ma.MaskedArray) else block
            distinct = np.union1d(distinct, values)
            if len(distinct) > MAX_LABELS:
                return None
    return tuple(int(value) for value in distinct)
