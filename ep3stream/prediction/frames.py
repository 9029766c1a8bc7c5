"""DataFrames and other tables of Python as the inputs of a model: columns are found by their names.

A table with the columns that the files of the store had (a text, a date) is read as these were. One with the
model's features as its columns is put into their order. Only a table without names goes by position. `encoded_frame`
makes rows of the first table of a model, where there is no store.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig, Unknown
from ep3stream.conversion.columns import close_to, numbers
from ep3stream.conversion.conform import family_or_none
from ep3stream.conversion.expand import EncodedTable, FeatureRows
from ep3stream.conversion.recorded_columns import RecordedColumns, unreadable_columns
from ep3stream.conversion.table_source import open_tables, open_tables_like
from ep3stream.errors import InputError
from ep3stream.formats.python_objects import PythonTable

_BLOCK_BYTES = 4 << 20

# Names that say no more than the position, as the features of arrays have.
_POSITION = re.compile(r"x?\d+")
_LOGGER = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class FrameReader:
    """Makes x of tables for a model.

    feature_names, target_names, class_names: the model's. run: where it lies. record: `columns_of` its store; None if
    that is not known, so that tables must have the features themselves. unknown: what becomes of unseen categories, as
    in `ConvertConfig`.
    """

    feature_names: tuple[str, ...]
    target_names: tuple[str, ...] = ()
    class_names: tuple[str, ...] | None = None
    run: Path = Path()
    record: Mapping[str, Any] | None = None
    unknown: Unknown = "error"

    @property
    def columns(self) -> Mapping[str, Any]:
        """The record of the columns, as a manifest has it; empty where there is none."""
        return {} if self.record is None else self.record["columns"]

    def __call__(self, x: Any) -> tuple[NDArray[Any], bool] | None:
        """x, (n, d), of a table, and whether it is less the model's offsets already; None if x is no table.

        Raises InputError, which names a column that is missing or of another type.
        """
        if not is_table(x):
            return None
        recorded = self._recorded()
        sources = [] if recorded is None else [column.source for column in recorded.columns]
        if _is_without_names(x) and {str(name) for name in x.columns} != set(sources):
            return np.asarray(x), False
        table = PythonTable.of(x)
        if table is None:
            return None
        names = list(table.schema.names)
        if recorded is not None and set(sources) <= set(names):
            self._tell_others(names, {*sources, *recorded.target.sources})
            return self._encoded(table, recorded), True
        if missing := [name for name in self.feature_names if name not in names]:
            if self._goes_by_position(names):
                return _columns(table, names), False
            # By the names of the files where they are fewer: color, and not each color=red.
            wanted = [name for name in dict.fromkeys(sources) if name not in names] or missing
            shown = ", ".join(map(repr, wanted[:5])) + ", ..." * (len(wanted) > 5)
            raise InputError(
                f"{table.name}: has no column {shown} of the model; {close_to(wanted[0], names)}"
            )
        self._tell_others(names, {*self.feature_names, *self.target_names})
        return _columns(table, self.feature_names), False

    def _recorded(self) -> RecordedColumns | None:
        if self.record is None or unreadable_columns(self.record["columns"]) is not None:
            return None
        try:
            return RecordedColumns.read(self.run, self.record, self.target_names, self.class_names)
        except (KeyError, TypeError, AttributeError):
            return None

    def _encoded(self, table: PythonTable, recorded: RecordedColumns) -> NDArray[Any]:
        like = recorded.without_target()
        empty = np.empty((0, len(self.feature_names)), np.float32)
        if table.n_rows == 0:
            return empty
        features = FeatureRows.open(open_tables_like([table], like), like, self.unknown)
        if features.feature_names != self.feature_names:
            raise InputError(
                f"{self.run} has a model of other features than the columns it records; fit again"
            )
        parts = [empty]
        for rows, usable in features.batches():
            x = np.full((len(usable), rows.shape[1]), np.nan, np.float32)
            x[usable] = rows
            parts.append(x)
        return np.concatenate(parts)

    def _goes_by_position(self, names: Sequence[str]) -> bool:
        """Whether the model knows its features by their position alone, and the table has as many columns."""
        known = set(self.feature_names)
        is_unnamed = all(map(_POSITION.fullmatch, self.feature_names)) and not known & set(names)
        return is_unnamed and len(names) == len(known)

    def _tell_others(self, names: Sequence[str], used: set[str]) -> None:
        if others := [name for name in names if name not in used]:
            _LOGGER.warning("the model has no column %s, so left out", ", ".join(map(repr, others)))


def is_table(x: Any) -> bool:
    """Whether x is a DataFrame or another table, with rows and columns, which a Series and a column of arrow lack."""
    is_read = hasattr(x, "iloc") or hasattr(x, "__arrow_c_stream__")
    return is_read and (hasattr(x, "columns") or hasattr(x, "schema") or hasattr(x, "column_names"))


def encoded_frame(x: Any) -> EncodedTable | None:
    """The rows of a DataFrame as a conversion without options would store them, pandas' categories as categories.

    None for what is no table in memory, and for a table of numbers alone that has no gap: it is the rows themselves.
    Raises SourceError for a value or a column that no conversion takes.
    """
    if not is_table(x) or hasattr(x, "npartitions") or _is_plain_frame(x):
        return None
    table = PythonTable.of(x)
    if table is None or _is_plain(table):
        return None
    if table.reads_once:  # A stream of arrow, as polars gives it, of which the look at its values was all.
        table = PythonTable.of(x) or table
    categories = [field.name for field in table.schema if pa.types.is_dictionary(field.type)]
    return EncodedTable.of(open_tables([table], ConvertConfig(category=categories), has_target=False))


def _is_plain_frame(x: Any) -> bool:
    """Whether the types of pandas say so: numbers and truth values alone, and none is missing."""
    if not hasattr(x, "iloc"):
        return False
    are_numbers = all(getattr(dtype, "kind", "O") in "biufc" for dtype in x.dtypes)
    return are_numbers and not x.isna().to_numpy().any()


def _is_plain(table: PythonTable) -> bool:
    """Whether all columns are of numbers or truth values, and no value is missing."""
    for field in table.schema:
        is_number = family_or_none(field.type, table.name) in ("number", "integer", "boolean")
        if not is_number or pa.types.is_dictionary(field.type):
            return False
    names = table.schema.names
    blocks = table.records(names, _BLOCK_BYTES, 0)
    return not any(np.isnan(numbers(column)).any() for rows in blocks for column in rows.columns)


def _is_without_names(x: Any) -> bool:
    """Whether a DataFrame numbers its columns, as one does that was made of an array."""
    return hasattr(x, "iloc") and list(x.columns) == list(range(len(x.columns)))


def _columns(table: PythonTable, names: Sequence[str]) -> NDArray[Any]:
    """Columns of numbers as they are, (n, d); raises InputError for a column of anything else."""
    parts = [np.empty((0, len(names)))]
    for rows in table.records(list(names), _BLOCK_BYTES, 0):
        columns = [numbers(rows.column(name)) for name in names]
        for name, column in zip(names, columns, strict=True):
            if column.dtype.kind not in "biuf":
                raise InputError(
                    f"{table.name}: column {name!r} holds {rows.column(name).type}, no numbers; convert it"
                )
        parts.append(np.column_stack([column.astype(np.float64, copy=False) for column in columns]))
    return np.concatenate(parts)
