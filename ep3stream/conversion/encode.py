"""Turns batches into encoded rows: numbers, category codes, a target or label. Missing values are decided here.

A value is missing if it is NaN, null or an empty text. Under `--missing error` it is a SourceError that names
file, column and row. Under `drop` its row is left out and counted. Under `mean` a missing number becomes the
mean of its column in the first split, a missing category the category `(missing)`; a missing target or label is
an error. Infinite numbers are always an error.

An unseen category, which the store of `--like` does not have, is an error under `--unknown error`. Under
`ignore` none of its one-hot features is set; under `drop` its row is left out.
"""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig, Missing, Unknown, XDtype
from ep3stream.conversion.categories import (
    CategoryCodes,
    DistinctValues,
    UnseenValues,
    column_warning,
)
from ep3stream.conversion.numbers import ColumnMeans, Rounding, all_finite, fill, missing_cells
from ep3stream.conversion.offsets import ColumnOffsets, without_offsets
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.rows import EncodedRows, RowLayout
from ep3stream.errors import SourceError
from ep3stream.formats.source import (
    MAX_CATEGORIES,
    MAX_LABELS,
    BatchOrigin,
    FeatureColumn,
    RowSource,
    SourceBatch,
    TargetColumns,
)

_LOGGER = logging.getLogger(__name__)

# A code must come out of the store's dtype as it went in: float16 holds whole numbers up to 2^11.
_MAX_CODES: Mapping[XDtype, int] = {"float32": 10_000, "float16": 2048}

# From this share of a column's standard deviation on, a warning of the rounding to float16 is given.
_MAX_ERROR_PER_STD = 0.01


@dataclass(slots=True)
class _Tally:
    """Counts of rows kept and left out, of missing cells by column, and of unseen values."""

    kept: int = 0
    dropped: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    unseen: UnseenValues = field(default_factory=UnseenValues)


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Encodes the batches of one source as rows of `layout`: key, x (numeric columns), codes, y.

    y is the label's code (int32) in classification and (c,) float32 in regression. The caller sets the key.

    names: the numeric columns. categories, labels: the values of the category columns and of the label.
    means: the means of the numeric columns, computed under `mean`. fills: the means taken over from `like`.
    offsets: what is subtracted from numbers first.
    rounding: the errors of float16, if x is stored so. like: the store whose columns are followed.
    """

    names: tuple[str, ...]
    target: TargetColumns
    layout: RowLayout
    categories: tuple[CategoryCodes, ...]
    labels: CategoryCodes | None
    missing: Missing
    unknown: Unknown
    means: ColumnMeans | None
    fills: NDArray[np.float64] | None
    offsets: ColumnOffsets
    rounding: Rounding | None
    like: Path | None
    tally: _Tally

    @classmethod
    def build(
        cls, source: RowSource, config: ConvertConfig, like: RecordedColumns | None = None
    ) -> RowEncoder:
        """An encoder for the source's columns; under `like` with the values and fills of that store.

        Of the config, which `take_over` has completed, dtype, missing and unknown are used.
        """
        x_dtype, missing = config.dtype or "float32", config.missing or "error"
        unknown = config.unknown or "error"
        names = tuple(column.name for column in source.columns if column.kind == "numeric")
        categories = tuple(
            _category(c, x_dtype, like, unknown) for c in source.columns if c.kind == "category"
        )
        labels = _labels(source, like)
        y_shape, y_dtype = ((), "int32") if labels is not None else ((len(source.target.names),), "float32")
        numeric_targets = source.target.names if labels is None else ()
        offsets = ColumnOffsets(names, numeric_targets, x_dtype)
        if like is not None:
            offsets.take_over(like.offsets)
        fills = None
        if missing == "mean" and like is not None:
            fills = np.array([like.fills[name] for name in names], np.float64)
        return cls(
            names=names,
            target=source.target,
            layout=RowLayout.of(len(names), len(categories), y_shape, x_dtype, y_dtype),
            categories=categories,
            labels=labels,
            missing=missing,
            unknown=unknown,
            means=ColumnMeans(len(names)) if missing == "mean" and fills is None else None,
            fills=fills,
            offsets=offsets,
            rounding=Rounding(len(names)) if x_dtype == "float16" and names else None,
            like=None if like is None else like.store,
            tally=_Tally(),
        )

    def encode(self, batch: SourceBatch) -> EncodedRows:
        """The batch as at most b rows; raises SourceError, which names file, column and row of a bad value.

        Rows that `drop` leaves out are missing; under `mean` x holds NaN for a missing number.
        """
        return self.encode_kept(batch)[0]

    def encode_kept(self, batch: SourceBatch) -> tuple[EncodedRows, NDArray[np.intp] | None]:
        """The rows of `encode`, and the index within the batch of each row that was kept; None if all were."""
        ready = self._as_stored(batch)
        rows = self.layout.with_parts(ready, batch.n_rows)
        where = BatchOrigin(batch.file, batch.first_row)
        target_where = BatchOrigin(batch.target_file, batch.first_row)
        cells = [DistinctValues.of(values) for values in batch.texts]
        gaps = {} if ready else self._fill_numbers(rows.x, batch.numeric, self.offsets.x, self.names, where)
        for category, values in zip(self.categories, cells, strict=True):
            gaps |= self._count_missing([category.column], values.missing, "text", where)
        label = None
        if self.labels is None:
            gaps |= self._fill_numbers(
                rows.y, (batch.target,), self.offsets.y, self.target.names, target_where
            )
        else:
            label = DistinctValues.of(batch.target)
            gaps |= self._count_missing([self.labels.column], label.missing, "label", target_where)
            if self.target.kind == "integer":
                label = label.as_integers(self.labels.column, target_where)
        if self.rounding is not None:
            self.rounding.add(without_offsets(batch.numeric, self.offsets.x), rows.x)
        self.offsets.check(batch, rows.x, rows.y)
        left_out = [*gaps.values()] if self.missing == "drop" else []
        left_out += self._count_unseen(
            [*zip(self.categories, cells, strict=True), (self.labels, label)], left_out
        )
        kept = None
        if left_out:
            kept = np.flatnonzero(~np.logical_or.reduce(left_out))
            rows, cells = rows.take(kept), [values.only(kept) for values in cells]
            label = label and label.only(kept)
        for j, (category, values) in enumerate(zip(self.categories, cells, strict=True)):
            rows.codes[:, j] = category.encode(values, where)
        if self.labels is not None and label is not None:
            rows.y[:] = self.labels.encode(label, target_where)
        self.tally.kept += len(rows)
        self.tally.dropped += batch.n_rows - len(rows)
        return rows, kept

    def _as_stored(self, batch: SourceBatch) -> dict[str, NDArray[Any]]:
        """The batch's own numbers as x if they are as they will be stored, so that no copy is made; else nothing."""
        if (
            self.offsets.x.any()
            or len(batch.numeric) != 1
            or batch.numeric[0].dtype != self.layout.dtypes["x"]
        ):
            return {}
        (x,) = batch.numeric
        return {"x": x} if x.ndim == 2 and x.flags.c_contiguous and all_finite(x) else {}

    def _fill_numbers(
        self,
        out: NDArray[Any],
        pieces: Sequence[Any],
        offsets: NDArray[np.float64],
        names: Sequence[str],
        where: BatchOrigin,
    ) -> dict[str, NDArray[np.bool_]]:
        """Cast the pieces less the offsets into `out`; returns which rows lack a value, (b,), by column."""
        if fill(out, without_offsets(pieces, offsets)):
            return {}
        missing = missing_cells(out, pieces, names, where)
        return self._count_missing(names, missing, "value", where) if missing.any() else {}

    def _count_missing(
        self, names: Sequence[str], missing: NDArray[np.bool_] | None, what: str, where: BatchOrigin
    ) -> dict[str, NDArray[np.bool_]]:
        """Count the missing cells, (b,) or (b, k), of the columns; returns which rows lack a value, by column.

        Raises SourceError if the settings do not allow a missing value there.
        """
        if missing is None:
            return {}
        missing = missing.reshape(len(missing), -1)
        is_target = names[0] in self.target.names
        if self.missing == "error" or (self.missing == "mean" and is_target):
            row, column = map(int, np.argwhere(missing)[0])
            remedy = "--missing drop" if is_target else "--missing mean or drop"
            raise SourceError(
                f"{where.cell(names[column], row)}: the {what} is missing; fill it in, or take {remedy}"
            )
        counts = np.count_nonzero(missing, axis=0)
        self.tally.missing.update({name: int(counts[j]) for j, name in enumerate(names) if counts[j]})
        return {name: missing[:, j] for j, name in enumerate(names) if counts[j]}

    def _count_unseen(
        self,
        columns: Sequence[tuple[CategoryCodes | None, DistinctValues | None]],
        left_out: Sequence[NDArray[np.bool_]],
    ) -> list[NDArray[np.bool_]]:
        """Count the unseen values, but for rows that are left out anyway; returns the rows to leave out for them."""
        if self.unknown == "error":
            return []
        gone = np.logical_or.reduce(left_out) if left_out else None
        with_unseen = []
        for category, cells in columns:
            if category is None or cells is None or not category.is_closed:
                continue
            unseen = category.unseen(cells)
            if not unseen or (self.unknown == "ignore" and not category.may_ignore):
                continue  # `encode` refuses what may not be ignored.
            for index, value in unseen.items():
                rows = cells.indices == index
                n_rows = int(np.count_nonzero(rows if gone is None else rows & ~gone))
                self.tally.unseen.add(category.column, value, n_rows)
            with_unseen.append(np.isin(cells.indices, list(unseen)))
        return with_unseen if self.unknown == "drop" else []

    def observe(self, rows: EncodedRows, split_ids: NDArray[np.intp]) -> None:
        """Add the rows of the first split to the means that missing numbers become, under `mean`."""
        if self.means is not None:
            first = split_ids == 0
            self.means.add(rows.x if first.all() else rows.x[first])

    @property
    def is_complete(self) -> bool:
        """Whether all categories, labels and fills are known before the rows are read."""
        learned = [*self.categories, *([self.labels] if self.labels is not None else [])]
        return self.means is None and all(values.is_closed for values in learned)

    @property
    def word_names(self) -> tuple[str, ...]:
        """The column that each word of `words` stands for."""
        targets = (f"target {name}" for name in self.target.names)
        return (*self.names, *(category.column for category in self.categories), *targets)

    def words(self, rows: EncodedRows) -> NDArray[np.uint32]:
        """Each row's content as 32-bit words, (b, width): equal rows have equal words, whatever their order."""
        words = np.empty((len(rows), len(self.word_names)), np.uint32)
        n_numeric, n_texts = len(self.names), len(self.categories)
        _put_float_words(words[:, :n_numeric], rows.x)
        for j, category in enumerate(self.categories):
            words[:, n_numeric + j] = category.hashes()[rows.codes[:, j]]
        if self.labels is None:
            _put_float_words(words[:, n_numeric + n_texts :], rows.y)
        else:
            words[:, -1] = self.labels.hashes()[rows.y]
        return words

    def require_usable(self, file: Path | str) -> None:
        """To be called behind the last batch: raises SourceError, which names `file`, without rows or two classes.

        Warns of columns of text that are probably not meant as categories.
        """
        if self.tally.kept == 0:
            raise SourceError(
                f"{file}: every row has a missing value, so none of the {self.tally.dropped} rows is left; "
                "fill some in, leave the emptiest columns out with --drop, or take --missing mean"
            )
        for category in self.categories:
            if category.is_closed:
                continue
            warning = column_warning(category.column, category.state(), self.tally.kept)
            if warning is not None:
                _LOGGER.warning("%s", warning)
        if self.labels is not None and len(self.labels) < 2:
            raise SourceError(
                f"{file}: every row has the label {self.labels.sorted_values()[0]!r} in "
                f"{self.labels.column!r}; classification needs at least two classes"
            )

    def fill_values(self) -> dict[str, float]:
        """The number that missing values become, by column, under `mean`; else nothing.

        Raises SourceError for a column without a value in the first split.
        """
        fills = self.fills if self.means is None else self.means.means()
        if fills is None:
            return {}
        for name, value in zip(self.names, fills, strict=True):
            if np.isnan(value):
                raise SourceError(
                    f"column {name!r} has no value in any row of the first split, so no mean; "
                    "leave it out with --drop"
                )
        return dict(zip(self.names, fills.tolist(), strict=True))

    def report(self) -> dict[str, Any]:
        """The counts of rows left out, cells filled and values rounded, for the manifest; warns of spoiled columns."""
        report: dict[str, Any] = {}
        if self.tally.dropped:
            report["dropped_rows"] = self.tally.dropped
        if self.tally.missing:
            report["missing"] = dict(sorted(self.tally.missing.items()))
            fills = self.fill_values()
            offsets = self.offsets.by_name
            filled = {
                name: fills[name] + offsets.get(name, 0.0) for name in report["missing"] if name in fills
            }
            report |= {"fills": filled} if filled else {}
        if self.tally.unseen:
            report["unknown"] = self.tally.unseen.to_json()
            self.report_unseen()
        self.offsets.tell()
        if self.rounding is not None:
            report["rounding"] = self.rounding.report(self.names)
            for name, share in zip(self.names, self.rounding.error_per_std(), strict=True):
                if share > _MAX_ERROR_PER_STD:
                    _LOGGER.warning(
                        "column %r: rounding to float16 moves values by %.2g of their standard deviation; "
                        "use --dtype float32, or subtract its mean first",
                        name,
                        share,
                    )
        return report

    def report_unseen(self) -> None:
        """Warn of the unseen values, if there were any."""
        if self.tally.unseen:
            _LOGGER.warning("%s", self.tally.unseen.sentence(self.unknown, self.like))

    def state(self) -> dict[str, Any]:
        """Everything learned from the batches so far, as JSON that holds it exactly, for `restore`."""
        return {
            "books": [category.state() for category in self.categories],
            "labels": None if self.labels is None else self.labels.state(),
            "kept": self.tally.kept,
            "dropped": self.tally.dropped,
            "missing": dict(self.tally.missing),
            "strangers": self.tally.unseen.to_json(),
            "means": None if self.means is None else self.means.state(),
            "rounding": None if self.rounding is None else self.rounding.state(),
            "offsets": self.offsets.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of an encoder that was built from the same source and settings."""
        for category, values in zip(self.categories, state["books"], strict=True):
            category.restore(values)
        if self.labels is not None:
            self.labels.restore(state["labels"])
        self.tally.kept, self.tally.dropped = state["kept"], state["dropped"]
        self.tally.missing = Counter(state["missing"])
        self.tally.unseen = UnseenValues.of(state.get("strangers", {}))
        if self.means is not None:
            self.means.restore(state["means"])
        self.offsets.restore(state["offsets"])
        if self.rounding is not None:
            self.rounding.restore(state["rounding"])


def _category(
    column: FeatureColumn, x_dtype: XDtype, like: RecordedColumns | None, unknown: Unknown
) -> CategoryCodes:
    known, store = ((), None) if like is None else (like.values[column.name], like.store)
    if column.encoding == "codes":
        return CategoryCodes(
            column.name, _MAX_CODES[x_dtype], "leave it out, or store it as numbers", known, store
        )
    remedy = "it looks like an identifier: leave it out, or store it as numbers or with --categories codes"
    return CategoryCodes(
        column.name, MAX_CATEGORIES, remedy, known, store, is_onehot=True, may_ignore=unknown == "ignore"
    )


def _labels(source: RowSource, like: RecordedColumns | None) -> CategoryCodes | None:
    """The labels of classification, known if `like` or the source lists them; None for regression."""
    target = source.target
    if target.kind == "number":
        return None
    known: tuple[int | str, ...] = source.label_values or ()
    store: Path | str | None = (source.files or ("the source",))[-1] if known else None
    if like is not None:
        known, store = like.labels, like.store
    return CategoryCodes(
        target.names[0], MAX_LABELS, "take --task regression if they are amounts", known, store
    )


def _put_float_words(words: NDArray[np.uint32], values: NDArray[Any]) -> None:
    """Write the float32 bits of (b, k) values to `words`, -0 as 0, in one pass."""
    np.add(values, np.float32(0), out=words.view(np.float32), casting="same_kind")
