"""Turns encoded rows into the x and y of a store, once every category, label and fill is known.

`Expansion` does this for a conversion, `FeatureRows` for tables without a target, whose rows a model predicts, and
`EncodedTable` for a table in memory, from which the categories and fills are learned.
A missing number becomes its column's fill, and its indicator feature is 1; an unseen category that is ignored has the
code -1, or sets none of its features.
"""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig, Unknown
from ep3stream.conversion.categories import UNKNOWN
from ep3stream.conversion.encode import RowEncoder
from ep3stream.conversion.missing_values import indicator_name, whole_name
from ep3stream.conversion.numbers import ColumnMeans, Moments, all_finite
from ep3stream.conversion.recorded_columns import RecordedColumns, describe_columns
from ep3stream.conversion.rows import EncodedRows
from ep3stream.errors import SourceError
from ep3stream.formats.source import RowSource

_BLOCK_BYTES = 4 << 20


@dataclass(frozen=True, slots=True)
class _Category:
    """The features of one category column.

    offset: the first of them. ranks: the index of each code's value among the sorted values, (codes + 1,); behind
    them what an unknown value becomes as a code, or 0. In the type of x, unless one-hot.
    is_onehot: one feature for each value; else a single feature, which holds the index.
    """

    offset: int
    ranks: NDArray[Any]
    is_onehot: bool


@dataclass(frozen=True, slots=True)
class Expansion:
    """How encoded rows become x and y.

    source, encoder: what the features are made of. numeric: the features of the numeric columns. runs: the same as
    runs of neighbouring features, each with the numeric columns that it holds.
    indicators, marked: the features that mark gaps, and the numeric column of each.
    label_ranks: the class id of each label's code. fills: the number that NaN becomes in each numeric column, in the
    dtype of x; NaN where there is none. None if nothing can be missing.
    """

    source: RowSource
    encoder: RowEncoder
    feature_names: tuple[str, ...]
    class_names: tuple[str, ...] | None
    numeric: NDArray[np.intp]
    runs: tuple[tuple[slice, slice], ...]
    indicators: NDArray[np.intp]
    marked: NDArray[np.intp]
    categories: tuple[_Category, ...]
    label_ranks: NDArray[np.int32] | None
    fills: NDArray[Any] | None

    @classmethod
    def build(cls, source: RowSource, encoder: RowEncoder) -> Expansion:
        """Lay out the features in the source's order, each value of a one-hot category as `column=value`.

        The indicator of a column's gaps follows the column, or the last part of a date.
        """
        fills, marked = encoder.fill_values(), encoder.indicators
        codes = {category.column: category for category in encoder.categories}
        names: list[str] = []
        numeric: list[int] = []
        indicators: dict[int, int] = {}
        categories: list[_Category] = []
        for column, following in zip(source.columns, [*source.columns[1:], None], strict=True):
            if column.kind == "numeric":
                numeric.append(len(names))
                names.append(column.name)
                whole = whole_name(column)
                is_last = following is None or whole_name(following) != whole
                if is_last and whole in marked:
                    indicators[len(names)] = len(numeric) - 1
                    names.append(indicator_name(whole))
            else:
                category, is_onehot = codes[column.name], column.encoding == "onehot"
                ranks: NDArray[Any] = category.ranks()
                if not is_onehot:
                    ranks[-1] = UNKNOWN
                    ranks = ranks.astype(encoder.layout.dtypes["x"])
                categories.append(_Category(len(names), ranks, is_onehot))
                features = [f"{column.name}={value}" for value in category.sorted_values()]
                names.extend(features if is_onehot else [column.name])
        _require_distinct(names)
        labels = encoder.labels
        return cls(
            source=source,
            encoder=encoder,
            feature_names=tuple(names),
            class_names=None if labels is None else tuple(map(str, labels.sorted_values())),
            numeric=np.asarray(numeric, np.intp),
            runs=tuple(_runs(numeric)),
            indicators=np.asarray(list(indicators), np.intp),
            marked=np.asarray(list(indicators.values()), np.intp),
            categories=tuple(categories),
            label_ranks=None if labels is None else labels.ranks(),
            fills=np.array([fills.get(name, np.nan) for name in encoder.names], encoder.layout.dtypes["x"])
            if fills
            else None,
        )

    def columns(self, means: NDArray[np.float64] | None = None) -> dict[str, Any]:
        """The record of the columns for the manifest.

        means: the mean of each feature in the first split, (d,). A column that has no gap keeps it, for a later file
        that has some.
        """
        encoder = self.encoder
        fills = encoder.fill_values()
        if means is not None and encoder.may_fill:
            of_columns = zip(encoder.columns, means[self.numeric].tolist(), strict=True)
            fills = {column.name: mean for column, mean in of_columns if encoder.fills(column)} | fills
        target = self.source.target
        if encoder.labels is not None and encoder.labels.are_whole_texts:
            target = replace(target, kind="integer")
        return describe_columns(
            self.source.columns,
            target,
            {category.column: category.sorted_values() for category in encoder.categories},
            fills,
            encoder.policies,
            encoder.indicators,
            self.source.recorded,
            encoder.offsets.by_name,
        )

    @property
    def n_features(self) -> int:
        """The number of columns of x."""
        return len(self.feature_names)

    def expand(self, rows: EncodedRows) -> tuple[NDArray[Any], NDArray[Any], NDArray[np.bool_] | None]:
        """The store's x (b, d), y as class ids (b,) or numbers (b, c), and which cells of x were filled, (b, d).

        The last is None if none was filled. Without categories and indicators x is that of the rows, not a copy, if
        none is missing.
        """
        if not self.categories and not len(self.indicators):
            numbers, missing = self._fill(rows.x)
            return numbers, self._targets(rows), missing
        x = np.empty((len(rows), self.n_features), rows.x.dtype)
        return x, self._targets(rows), self._put(rows, x)

    def expand_into(self, rows: EncodedRows, x: NDArray[Any], y: NDArray[Any]) -> NDArray[np.bool_] | None:
        """Write the same x and y to memory; returns which cells of x were filled, (b, d), or None."""
        y[:] = self._targets(rows)
        return self._put(rows, x)

    def _targets(self, rows: EncodedRows) -> NDArray[Any]:
        return rows.y if self.label_ranks is None else self.label_ranks[rows.y]

    def _put(self, rows: EncodedRows, x: NDArray[Any]) -> NDArray[np.bool_] | None:
        numbers, missing = self._fill(rows.x)
        for features, columns in self.runs:
            x[:, features] = numbers[:, columns]
        if len(self.indicators):
            x[:, self.indicators] = 0 if missing is None else missing[:, self.marked]
        for j, category in enumerate(self.categories):
            codes, first = rows.codes[:, j], category.offset
            if category.is_onehot:
                x[:, first : first + len(category.ranks) - 1] = 0
                x[np.arange(len(rows)), first + category.ranks[codes]] = codes != UNKNOWN
            else:
                x[:, first] = category.ranks.take(codes)  # In a third of the time of ranks[codes].
        if missing is None:
            return None
        filled = np.zeros((len(rows), self.n_features), np.bool_)
        filled[:, self.numeric] = missing
        return filled

    def _fill(self, x: NDArray[Any]) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
        """The numeric columns with fills for NaN, and which of their cells these are; None if none is."""
        if self.fills is None or all_finite(x):
            return x, None
        missing = np.isnan(x)
        return np.where(missing, self.fills, x), missing


def _runs(features: Sequence[int]) -> Iterator[tuple[slice, slice]]:
    """Runs of neighbouring features, and where each lies among all."""
    first = 0
    for end in range(1, len(features) + 1):
        if end == len(features) or features[end] != features[end - 1] + 1:
            yield slice(features[first], features[end - 1] + 1), slice(first, end)
            first = end


def _require_distinct(names: list[str]) -> None:
    seen: set[str] = set()
    for name in names:
        if name in seen:
            raise SourceError(
                f"two features would be called {name!r} in the store; give a column another --rename"
            )
        seen.add(name)


@dataclass(frozen=True, slots=True)
class FeatureRows:
    """The rows of tables as features of a store; no column needs to be the target."""

    source: RowSource
    encoder: RowEncoder
    expansion: Expansion

    @classmethod
    def open(
        cls,
        source: RowSource,
        recorded: RecordedColumns,
        unknown: Unknown = "error",
    ) -> FeatureRows:
        """The features of a source without a target, which was opened like the store of the columns `recorded`.

        unknown: what becomes of unseen categories, as in `ConvertConfig`.
        """
        like = recorded.without_target()
        settings = ConvertConfig(dtype=like.dtype, like=like.store, unknown=unknown)
        encoder = RowEncoder.build(source, settings, like)
        return cls(source, encoder, Expansion.build(source, encoder))

    @property
    def feature_names(self) -> tuple[str, ...]:
        """The names of the columns of x, in order."""
        return self.expansion.feature_names

    def batches(self) -> Iterator[tuple[NDArray[Any], NDArray[np.bool_]]]:
        """For each batch x, (k, d), of its usable rows, and which of its rows are usable, (b,).

        A row with a missing value is unusable if the store's conversion dropped such rows; else the value is
        filled, or a SourceError. `unknown` decides about rows with an unseen category. Warnings behind the last
        row count both.
        """
        for batch in self.source.batches(_BLOCK_BYTES):
            rows, kept = self.encoder.encode_kept(batch)
            usable = np.full(batch.n_rows, kept is None)
            if kept is not None:
                usable[kept] = True
            yield self.expansion.expand(rows)[0], usable
        self.encoder.tell_losses()


@dataclass(frozen=True, slots=True)
class EncodedTable:
    """The rows of a table without a target, as a conversion without options would store them, in memory.

    x: (n, d), float32, less the offsets that are recorded. columns: the record of the columns, as in a manifest.
    """

    x: NDArray[np.float32]
    feature_names: tuple[str, ...]
    columns: dict[str, Any]

    @classmethod
    def of(cls, source: RowSource) -> EncodedTable:
        """Learns categories, means and offsets from all rows, and encodes them; warns as a conversion does.

        O(n d) time and memory. Raises SourceError for a value or a column that no conversion takes.
        """
        encoder = RowEncoder.build(source, ConvertConfig())
        batches = encoder.offsets.read_ahead(source.batches(_BLOCK_BYTES))
        parts = [encoder.encode(batch) for batch in batches]
        encoder.require_usable(source.name)
        if gappy := encoder.unknown_means():
            means = ColumnMeans(len(gappy))
            for rows in parts:
                means.add(rows.x[:, gappy])
            encoder.set_means(gappy, means.means())
        expansion = Expansion.build(source, encoder)
        x, n_rows = np.empty((encoder.tally.kept, expansion.n_features), np.float32), 0
        for rows in parts:
            x[n_rows : n_rows + len(rows)] = expansion.expand(rows)[0]
            n_rows += len(rows)
        encoder.report()
        return cls(x, expansion.feature_names, expansion.columns(Moments.of(x).mean))

    @property
    def record(self) -> dict[str, Any]:
        """What a model keeps of the columns, as `columns_of` a store."""
        return {"columns": self.columns, "x_dtype": "float32"}
