"""What a new store will hold, and the check that rows fit."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import MIB, Codec, Task, XDtype
from ep3stream.conversion.numbers import all_finite
from ep3stream.errors import InputError
from ep3stream.store.backend import y_row
from ep3stream.store.json_files import canonical_json
from ep3stream.store.manifest import MAX_SEGMENT_BYTES, YDtype, naming_problems

# More files in a directory would be slow to copy and list; larger files would cost the writer memory.
_MAX_FILES = 4096
_MAX_FILE_BYTES = 256 * MIB
_MAX_Y_BYTES = 64 * MIB  # Of the y of a segment, unless the segment's x is larger.


@dataclass(frozen=True, slots=True)
class StoreSpec:
    """What a new store will hold; raises InputError for a combination that no store can have.

    n_outputs: the number of classes or of targets. target_names: the name of the label in classification, and of each
    target in regression. segment_bytes: about how large the x of a segment becomes. expected_rows: the rows of all
    splits; if given, a Zarr store puts several segments into one file of up to 256 MiB, so that an array has about
    4096 files at most. The writer then holds the rows of one file for each split, and of 3 files on their way to the
    disk.
    """

    task: Task
    n_features: int
    n_outputs: int
    x_dtype: XDtype
    feature_names: tuple[str, ...]
    target_names: tuple[str, ...]
    class_names: tuple[str, ...] | None
    columns: Mapping[str, Any]
    shuffle_seed: int | None
    source: tuple[Mapping[str, Any], ...]
    segment_bytes: int
    codec: Codec = "auto"
    expected_rows: int | None = None

    def __post_init__(self) -> None:
        for name in ("n_features", "n_outputs", "segment_bytes"):
            if getattr(self, name) < 1:
                raise InputError(f"{name} is {getattr(self, name)}; use 1 or more")
        if self.segment_bytes > MAX_SEGMENT_BYTES:
            raise InputError(f"segment_bytes is {self.segment_bytes}; use less than 4 GiB")
        for problem in naming_problems(
            self.task,
            self.n_features,
            self.n_outputs,
            self.feature_names,
            self.target_names,
            self.class_names,
        ):
            raise InputError(problem)
        try:
            canonical_json([self.columns, self.source])
        except (TypeError, ValueError) as error:
            raise InputError(f"columns and source must be what JSON can hold: {error}") from error

    @property
    def y_dtype(self) -> YDtype:
        """The dtype of y: int32 for class ids, float32 for targets."""
        return "int32" if self.task == "classification" else "float32"

    @property
    def segment_rows(self) -> int:
        """Rows of a segment, in every split; fewer than `segment_bytes` says if the targets are far wider than x."""
        y_values = 1 if self.task == "classification" else self.n_outputs
        widest_y = max(self.segment_bytes, _MAX_Y_BYTES) // (4 * y_values)
        return max(1, min(self.segment_bytes // self._row_bytes, widest_y))

    @property
    def segments_per_file(self) -> int:
        """Segments in one file of a Zarr array; fewer if the split is shorter."""
        segment_bytes = self.segment_rows * self._row_bytes
        wanted = -(-(self.expected_rows or 0) // (self.segment_rows * _MAX_FILES))
        return max(1, min(wanted, _MAX_FILE_BYTES // segment_bytes))

    @property
    def _row_bytes(self) -> int:
        return self.n_features * np.dtype(self.x_dtype).itemsize


def checked_rows(
    spec: StoreSpec, split: str, first_row: int, x: NDArray[Any], y: NDArray[Any]
) -> tuple[NDArray[Any], NDArray[Any]]:
    """Returns x (m, d) and y (m, ...) in the store's dtypes, with every value finite and every class id known.

    first_row: which row of the split x[0] becomes, for messages. Raises InputError naming the split, row and column.
    """
    where = f"split {split}"
    x, y = np.asarray(x), np.asarray(y)
    if spec.task == "regression" and y.ndim == 1:
        y = y[:, None]
    y_shape = (len(x) if x.ndim else 0, *y_row(spec.task, spec.n_outputs))
    if x.ndim != 2 or x.shape[1] != spec.n_features or y.shape != y_shape:
        raise InputError(
            f"{where}: x has shape {x.shape} and y {y.shape}; use {(len(x), spec.n_features)} and {y_shape}"
        )
    x = _finite(x, spec.x_dtype, where, first_row, spec.feature_names)
    if spec.task == "regression":
        return x, _finite(y, spec.y_dtype, where, first_row, spec.target_names)
    return x, _class_ids(y, spec.n_outputs, where, first_row)


def _finite(
    rows: NDArray[Any], dtype: str, where: str, first_row: int, names: tuple[str, ...]
) -> NDArray[Any]:
    if rows.dtype.kind not in "fiub":
        raise InputError(f"{where}: rows have dtype {rows.dtype}; convert them to numbers first")
    with np.errstate(over="ignore"):  # An overflow becomes inf, and is refused by name below.
        cast = rows.astype(dtype, copy=False)
    if not all_finite(cast):
        row, column = np.argwhere(~np.isfinite(cast))[0]
        raise InputError(
            f"{where}: row {first_row + row} has {rows[row, column]} in column {names[column]!r}, "
            f"which is not finite in {dtype}; fill it in, scale it or leave the row out"
        )
    return cast


def _class_ids(y: NDArray[Any], n_classes: int, where: str, first_row: int) -> NDArray[Any]:
    if y.dtype.kind not in "iub":
        raise InputError(f"{where}: y has dtype {y.dtype}; class ids must be integers")
    unknown = (y < 0) | (y >= n_classes)
    if unknown.any():
        row = int(np.argmax(unknown))
        raise InputError(f"{where}: row {first_row + row} has class id {y[row]}; use 0 to {n_classes - 1}")
    return y.astype(np.int32, copy=False)
