"""Encoded rows on their way from the source to the store: one array for each part of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RowLayout:
    """The shape and dtype of each part of one encoded row, by the name of the part; see `EncodedRows`."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @classmethod
    def of(
        cls, n_numeric: int, n_codes: int, y_shape: tuple[int, ...], x_dtype: str, y_dtype: str
    ) -> RowLayout:
        """The layout of rows with so many numeric columns and text columns, and a y of this shape and dtype."""
        return cls(
            {"key": (), "x": (n_numeric,), "codes": (n_codes,), "y": y_shape},
            {"key": "uint64", "x": x_dtype, "codes": "int32", "y": y_dtype},
        )

    @property
    def row_bytes(self) -> int:
        """Bytes of one row."""
        return sum(
            int(np.prod(self.shapes[name])) * np.dtype(self.dtypes[name]).itemsize for name in self.shapes
        )

    def empty(self, n_rows: int) -> EncodedRows:
        """Returns uninitialized memory for n rows."""
        return self.with_parts({}, n_rows)

    def with_parts(self, parts: Mapping[str, NDArray[Any]], n_rows: int) -> EncodedRows:
        """Returns n rows that consist of the given parts, and of uninitialized memory for the other parts."""
        return EncodedRows(
            {
                name: parts[name] if name in parts else np.empty((n_rows, *shape), self.dtypes[name])
                for name, shape in self.shapes.items()
            }
        )


@dataclass(frozen=True, slots=True)
class EncodedRows:
    """m encoded rows.

    parts: key (m,), x (m, k) in the store's dtype, codes (m, t), and y: (m,) label codes or (m, c) targets. Rows that
    are in order have no key.
    """

    parts: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.parts["y"])

    def __getitem__(self, rows: slice) -> EncodedRows:
        return EncodedRows({name: part[rows] for name, part in self.parts.items()})

    @property
    def key(self) -> NDArray[np.uint64]:
        """The sort keys: sorting by key puts the rows into splits and into order."""
        return self.parts["key"]

    @property
    def x(self) -> NDArray[Any]:
        """The numeric columns."""
        return self.parts["x"]

    @property
    def codes(self) -> NDArray[np.int32]:
        """The category codes, one for each text column."""
        return self.parts["codes"]

    @property
    def y(self) -> NDArray[Any]:
        """The targets, or the codes of the labels."""
        return self.parts["y"]

    def without_key(self) -> EncodedRows:
        """The same rows but for the key."""
        return EncodedRows({name: part for name, part in self.parts.items() if name != "key"})

    def take(self, places: NDArray[np.intp], out: EncodedRows | None = None) -> EncodedRows:
        """Returns the rows at `places`, in that order; writes them into the first rows of `out` if given."""
        taken = {}
        for name, part in self.parts.items():
            # Only with mode "clip" does numpy write into `out` without a temporary copy; no place is out of range.
            target = None if out is None else out.parts[name][: len(places)]
            taken[name] = np.take(part, places, axis=0, out=target, mode="clip")
        return EncodedRows(taken)

    def copy_from(self, start: int, rows: EncodedRows) -> None:
        """Overwrites the rows from `start` on by `rows`, unless these are the same memory."""
        for name, part in rows.parts.items():
            target = self.parts[name][start : start + len(part)]
            if target.ctypes.data != part.ctypes.data:
                target[:] = part
