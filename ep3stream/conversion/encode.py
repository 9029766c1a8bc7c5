"""Turns batches into encoded rows: numbers, category codes, a target or label."""

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
from ep3stream.conversion.categories import BatchOrigin, CategoryCodes, DistinctValues, UnseenValues
from ep3stream.conversion.columns import column_warning
from ep3stream.conversion.numbers import ColumnMeans, Rounding, all_finite, fill, missing_cells
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.rows import EncodedRows, RowLayout
from ep3stream.errors import SourceError
from ep3stream.formats.source import (
    MAX_CATEGORIES,
    MAX_LABELS,
    FeatureColumn,
    RowSource,
    SourceBatch,
    TargetColumns,
)

# A code must come out of the store's dtype as it went in: float16 holds whole numbers up to 2^11.
_MAX_CODES: Mapping[XDtype, int] = {"float32": 10_000, "float16": 2048}

_TOLD_ERROR_PER_STD = 0.01

_LOGGER = logging.getLogger(__name__)


@dataclass(slots=True)
class _Tally:
    """Rows kept and left out, missing cells by column, and values that the other store does not have."""

    kept: int = 0
    dropped: int = 0
    missing: Counter[str] = field(default_factory=Counter)
    unseen: UnseenValues = field(default_factory=UnseenValues)


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Encodes the batches of one source as rows of `layout`: key, x (numeric columns), codes, y.

    y is the label's code (int32) in classification and (c,) float32 in regression; key is left to the caller.
    names: of the numeric columns; books: of the category columns; means: of numeric columns, under `mean`;
    fills: means that were taken over from another store, `like`; rounding: of float16.
    """

    names: tuple[str, ...]
    target: TargetColumns
    layout: RowLayout
    books: tuple[CategoryCodes, ...]
    labels: CategoryCodes | None
    missing: Missing
    unknown: Unknown
    means: ColumnMeans | None
    fills: NDArray[np.float64] | None
    rounding: Rounding | None
    like: Path | None
    tally: _Tally

    @classmethod
    def build(
        cls, source: RowSource, config: ConvertConfig, like: RecordedColumns | None = None
    ) -> RowEncoder:
        """The row layout and codebooks for the source's columns, those of `like` with its values.

        Of the config, as `take_over` left it, dtype, missing and unknown count.
        """
        x_dtype, missing = config.dtype or "float32", config.missing or "error"
        unknown = config.unknown or "error"
        names = tuple(column.name for column in source.columns if column.kind == "numeric")
        books = tuple(_book(c, x_dtype, like, unknown) for c in source.columns if c.kind == "category")
        labels = _labels(source, like)
        y_shape, y_dtype = ((), "int32") if labels is not None else ((len(source.target.names),), "float32")
        fills = None
        if missing == "mean" and like is not None:
            fills = np.array([like.fills[name] for name in names], np.float64)
        return cls(
            names=names,
            target=source.target,
            layout=RowLayout.of(len(names), len(books), y_shape, x_dtype, y_dtype),
            books=books,
            labels=labels,
            missing=missing,
            unknown=unknown,
            means=ColumnMeans(len(names)) if missing == "mean" and fills is None else None,
            fills=fills,
            rounding=Rounding(len(names)) if x_dtype == "float16" and names else None,
            like=None if like is None else like.store,
            tally=_Tally(),
        )

    def encode(self, batch: SourceBatch) -> EncodedRows:
        """The batch as at most b rows; raises SourceError naming file, column and row of an impossible value.

        Under `drop` rows with a missing, or unknown, value are left out; under `mean` x holds NaN for it, and missing
        texts are a category of their own.
        """
        return self.encode_kept(batch)[0]

    def encode_kept(self, batch: SourceBatch) -> tuple[EncodedRows, NDArray[np.intp] | None]:
        """The same, and the numbers within the batch of the rows that were kept; None for all."""
        ready = self._ready(batch)
        rows = self.layout.with_parts(ready, batch.n_rows)
        where, target_where = (
            BatchOrigin(batch.file, batch.first_row),
            BatchOrigin(batch.target_file, batch.first_row),
        )
        texts = [DistinctValues.of(cells) for cells in batch.texts]
        lost = {} if ready else self._numbers(rows.x, batch.numeric, self.names, where)
        for book, cells in zip(self.books, texts, strict=True):
            lost |= self._gaps([book.column], cells.missing, "text", where)
        label = None
        if self.labels is None:
            lost |= self._numbers(rows.y, (batch.target,), self.target.names, target_where)
        else:
            label = DistinctValues.of(batch.target)
            lost |= self._gaps([self.labels.column], label.missing, "label", target_where)
            if self.target.kind == "integer":
                label = label.as_integers(self.labels.column, target_where)
        if self.rounding is not None:
            self.rounding.add(batch.numeric, rows.x)
        leave = [*lost.values()] if self.missing == "drop" else []
        leave += self._unseen([*zip(self.books, texts, strict=True), (self.labels, label)], leave)
        kept = None
        if leave:
            kept = np.flatnonzero(~np.logical_or.reduce(leave))
            rows, texts = rows.take(kept), [cells.only(kept) for cells in texts]
            label = label and label.only(kept)
        for j, (book, cells) in enumerate(zip(self.books, texts, strict=True)):
            rows.codes[:, j] = book.encode(cells, where)
        if self.labels is not None and label is not None:
            rows.y[:] = self.labels.encode(label, target_where)
        self.tally.kept += len(rows)
        self.tally.dropped += batch.n_rows - len(rows)
        return rows, kept

    def _unseen(
        self,
        columns: Sequence[tuple[CategoryCodes | None, DistinctValues | None]],
        leave: Sequence[NDArray[np.bool_]],
    ) -> list[NDArray[np.bool_]]:
        """Counts the values that closed books do not have, but in rows that `leave` anyway; which rows go, if any."""
        if self.unknown == "error":
            return []
        gone = np.logical_or.reduce(leave) if leave else None
        going = []
        for book, cells in columns:
            if book is None or cells is None or not book.is_closed or not (met := book.unseen(cells)):
                continue
            if self.unknown == "ignore" and not book.may_ignore:
                continue  # `encode` refuses it.
            for place, value in met.items():
                rows = cells.indices == place
                self.tally.unseen.add(
                    book.column, value, int(np.count_nonzero(rows if gone is None else rows & ~gone))
                )
            going.append(np.isin(cells.indices, list(met)))
        return going if self.unknown == "drop" else []

    def _ready(self, batch: SourceBatch) -> dict[str, NDArray[Any]]:
        """The batch's own numbers where they are x as it will be stored: no copy is made then."""
        if len(batch.numeric) != 1 or batch.numeric[0].dtype != self.layout.dtypes["x"]:
            return {}
        (x,) = batch.numeric
        return {"x": x} if x.ndim == 2 and x.flags.c_contiguous and all_finite(x) else {}

    def observe(self, rows: EncodedRows, split_ids: NDArray[np.intp]) -> None:
        """Take the means of the first split's rows into account; nothing to do unless they fill what is missing."""
        if self.means is not None:
            first = split_ids == 0
            self.means.add(rows.x if first.all() else rows.x[first])

    @property
    def target_names(self) -> tuple[str, ...]:
        """Of the store."""
        return self.target.names

    @property
    def is_complete(self) -> bool:
        """Whether all categories, labels and fills are known before the rows are read."""
        books = [*self.books, *([self.labels] if self.labels is not None else [])]
        return self.means is None and all(book.is_closed for book in books)

    @property
    def word_names(self) -> tuple[str, ...]:
        """What each word of a row stands for."""
        targets = (f"target {name}" for name in self.target_names)
        return (*self.names, *(book.column for book in self.books), *targets)

    def words(self, rows: EncodedRows) -> NDArray[np.uint32]:
        """Each row's content as 32-bit words, (b, width): equal rows have equal words wherever they are."""
        words = np.empty((len(rows), len(self.word_names)), np.uint32)
        n_numeric, n_texts = len(self.names), len(self.books)
        _put_float_words(words[:, :n_numeric], rows.x)
        for j, book in enumerate(self.books):
            words[:, n_numeric + j] = book.hashes()[rows.codes[:, j]]
        if self.labels is None:
            _put_float_words(words[:, n_numeric + n_texts :], rows.y)
        else:
            words[:, -1] = self.labels.hashes()[rows.y]
        return words

    def require_usable(self, file: Path | str) -> None:
        """After the last batch: there must be rows, and two classes; raises SourceError naming `file`.

        Warns of columns of text that are probably not meant as categories.
        """
        if self.tally.kept == 0:
            raise SourceError(
                f"{file}: every row has a missing value, so none of the {self.tally.dropped} rows is left; "
                "fill some in, leave the emptiest columns out with --drop, or take --missing mean"
            )
        for book in self.books:
            if not book.is_closed and (doubt := column_warning(book.column, book.state(), self.tally.kept)):
                _LOGGER.warning("%s", doubt)
        if self.labels is not None and len(self.labels) < 2:
            raise SourceError(
                f"{file}: every row has the label {self.labels.sorted_values()[0]!r} in "
                f"{self.labels.column!r}; classification needs at least two classes"
            )

    def fill_values(self) -> dict[str, float]:
        """The number each numeric column's missing values become, by column, under `mean`; raises SourceError."""
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
        """What was left out, filled and rounded, for the manifest; warns of columns that float16 spoils."""
        report: dict[str, Any] = {}
        if self.tally.dropped:
            report["dropped_rows"] = self.tally.dropped
        if self.tally.missing:
            report["missing"] = dict(sorted(self.tally.missing.items()))
            fills = self.fill_values()
            filled = {name: fills[name] for name in report["missing"] if name in fills}
            report |= {"fills": filled} if filled else {}
        if self.tally.unseen:
            report["unknown"] = self.tally.unseen.to_json()
            self.report_unseen()
        if self.rounding is not None:
            report["rounding"] = self.rounding.report(self.names)
            for name, share in zip(self.names, self.rounding.error_per_std(), strict=True):
                if share > _TOLD_ERROR_PER_STD:
                    _LOGGER.warning(
                        "column %r: rounding to float16 moves values by %.2g of their standard deviation; "
                        "use --dtype float32, or subtract its mean first",
                        name,
                        share,
                    )
        return report

    def report_unseen(self) -> None:
        """Warns of the values that the other store does not have, if there were any."""
        if self.tally.unseen:
            _LOGGER.warning("%s", self.tally.unseen.told(self.unknown, self.like))

    def state(self) -> dict[str, Any]:
        """Everything learned from the batches so far, as JSON can hold it exactly, for `restore`."""
        return {
            "books": [book.state() for book in self.books],
            "labels": None if self.labels is None else self.labels.state(),
            "kept": self.tally.kept,
            "dropped": self.tally.dropped,
            "missing": dict(self.tally.missing),
            "strangers": self.tally.unseen.to_json(),
            "means": None if self.means is None else self.means.state(),
            "rounding": None if self.rounding is None else self.rounding.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Go on from the `state` of an encoder built alike."""
        for book, values in zip(self.books, state["books"], strict=True):
            book.restore(values)
        if self.labels is not None:
            self.labels.restore(state["labels"])
        self.tally.kept, self.tally.dropped = state["kept"], state["dropped"]
        self.tally.missing = Counter(state["missing"])
        self.tally.unseen = UnseenValues.of(state.get("strangers", {}))
        if self.means is not None:
            self.means.restore(state["means"])
        if self.rounding is not None:
            self.rounding.restore(state["rounding"])

    def _numbers(
        self, out: NDArray[Any], pieces: Sequence[Any], names: Sequence[str], where: BatchOrigin
    ) -> dict[str, NDArray[np.bool_]]:
        """Fill `out` with the pieces; the rows with a missing value by the column's name."""
        if fill(out, pieces):
            return {}
        missing = missing_cells(out, pieces, names, where)
        return self._gaps(names, missing, "value", where) if missing.any() else {}

    def _gaps(
        self, names: Sequence[str], missing: NDArray[np.bool_] | None, what: str, where: BatchOrigin
    ) -> dict[str, NDArray[np.bool_]]:
        """Count the missing cells, (b,) or (b, k), of these columns; raises SourceError unless they may be."""
        if missing is None:
            return {}
        missing = missing.reshape(len(missing), -1)
        is_target = names[0] in self.target_names
        if self.missing == "error" or (self.missing == "mean" and is_target):
            row, column = (int(place) for place in np.argwhere(missing)[0])
            remedy = "--missing drop" if is_target else "--missing mean or drop"
            raise SourceError(
                f"{where.cell(names[column], row)}: the {what} is missing; fill it in, or take {remedy}"
            )
        counts = np.count_nonzero(missing, axis=0)
        found = {name: missing[:, j] for j, name in enumerate(names) if counts[j]}
        self.tally.missing.update({name: int(counts[j]) for j, name in enumerate(names) if counts[j]})
        return found


def _book(
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
    """The labels of classification, known where `like` or the source lists them."""
    target = source.target
    if target.kind == "number":
        return None
    known: tuple[int | str, ...] = source.label_values or ()
    store: Path | str | None = (source.files or ("the source",))[-1] if known else None
    if like is not None:
        known, store = like.classes(target.kind) or (), like.store
    return CategoryCodes(
        target.names[0], MAX_LABELS, "take --task regression if they are amounts", known, store
    )


def _put_float_words(words: NDArray[np.uint32], values: NDArray[Any]) -> None:
    """The float32 bits of (b, k) values, with -0 as 0, in one pass."""
    np.add(values, np.float32(0), out=words.view(np.float32), casting="same_kind")
