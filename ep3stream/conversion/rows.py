"""Encoded rows on their way to the store, and where they may be kept: one array for each part of a row."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray


@dataclass(frozen=True, slots=True)
class RowLayout:
    """Shape and type of each part of one row, by name; `key` is always there."""

    shapes: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]

    @classmethod
    def of(
        cls, n_numeric: int, n_codes: int, y_shape: tuple[int, ...], x_dtype: str, y_dtype: str
    ) -> RowLayout:
        """key: order and split; x: the numeric columns; codes: one for each text column; y: targets or label."""
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

    def empty(self, n_rows: int) -> Rows:
        """Memory for n rows."""
        return self.around({}, n_rows)

    def around(self, parts: Mapping[str, NDArray[Any]], n_rows: int) -> Rows:
        """Rows of which some parts are there already, with memory for the others."""
        return Rows(
            {
                name: parts[name] if name in parts else np.empty((n_rows, *shape), self.dtypes[name])
                for name, shape in self.shapes.items()
            }
        )


@dataclass(frozen=True, slots=True)
class Rows:
    """m rows, part by part: key (m,), x (m, k) as the store's dtype, codes (m, t), y (m,) label codes or (m, c)."""

    parts: Mapping[str, NDArray[Any]]

    def __len__(self) -> int:
        return len(self.parts["key"])

    def __getitem__(self, rows: slice) -> Rows:
        return Rows({name: part[rows] for name, part in self.parts.items()})

    @property
    def key(self) -> NDArray[np.uint64]:
        """Sorting by it puts the rows into splits and into order."""
        return self.parts["key"]

    @property
    def x(self) -> NDArray[Any]:
        """The numeric columns."""
        return self.parts["x"]

    @property
    def codes(self) -> NDArray[np.int32]:
        """Of the text columns."""
        return self.parts["codes"]

    @property
    def y(self) -> NDArray[Any]:
        """Targets, or the label's code."""
        return self.parts["y"]

    def take(self, places: NDArray[np.intp], out: Rows | None = None) -> Rows:
        """The rows at `places`, in that order; written into the first of `out` where given."""
        taken = {}
        for name, part in self.parts.items():
            # `clip` alone writes into `out` without a copy of its own; the places are all inside.
            target = None if out is None else out.parts[name][: len(places)]
            taken[name] = np.take(part, places, axis=0, out=target, mode="clip")
        return Rows(taken)

    def copy_from(self, start: int, rows: Rows) -> None:
        """Overwrite the rows from `start` on."""
        for name, part in rows.parts.items():
            self.parts[name][start : start + len(part)] = part
