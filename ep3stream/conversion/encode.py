"""Turns batches into encoded rows: numbers, category codes, a target or label. Missing values are found here.

What becomes of them, `missing_values.py` says by column: under `error` a missing value is a SourceError that names
file, column and row, under `drop` its row is left out and counted, and else it stays NaN in a numeric column and is
the category `(missing)` in another one. A row without a target is left out. Infinite numbers are always an error.

An unseen category, which the store of `--like` does not have, or the first source before a `--split-file`, is an
error under `--unknown error`. Under `ignore` its code is -1, and none of its one-hot features is set; under `drop` its
row is left out.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig, Missing, Unknown, XDtype
from ep3stream.conversion.categories import (
    MISSING_CATEGORY,
    UNKNOWN,
    CategoryCodes,
    DistinctValues,
    column_warning,
    same_value_warning,
)
from ep3stream.conversion.missing_values import (
    is_filled,
    policies_of,
    told_drops,
    told_fills,
    told_targets,
    whole_name,
)
from ep3stream.conversion.numbers import Rounding, all_finite, fill, missing_cells
from ep3stream.conversion.offsets import ColumnOffsets, without_offsets
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.row_tally import RowTally
from ep3stream.conversion.rows import EncodedRows, RowLayout
from ep3stream.errors import ConfigError, SourceError
from ep3stream.formats.source import (
    MAX_CATEGORIES,
    MAX_LABELS,
    BatchOrigin,
    FeatureColumn,
    RowSource,
    SourceBatch,
    TargetColumns,
    reading,
)
from ep3stream.store.unseen_values import UnseenValues

_LOGGER = logging.getLogger(__name__)

# Gives uninitialized memory for n rows.
Room = Callable[[int], EncodedRows]

# A code must come out of the store's dtype as it went in: float16 holds whole numbers up to 2^11.
_MAX_CODES: Mapping[XDtype, int] = {"float32": 10_000, "float16": 2048}

# From this share of a column's standard deviation on, a warning of the rounding to float16 is given.
_MAX_ERROR_PER_STD = 0.01


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Encodes the batches of one source as rows of `layout`: key, x (numeric columns), codes, y.

    y is the label's code (int32) in classification and (c,) float32 in regression. The caller sets the key.

    columns: the numeric columns. categories, labels: the values of the category columns and of the label.
    policies: what becomes of a missing value, by column and target; a date's parts are one column.
    offsets: what is subtracted from numbers first.
    rounding: the errors of float16, if x is stored so. like: the store whose columns are followed.
    origin: what messages call the source. split, split_unknown: of the rows of a `--split-file`, their split, and what
    becomes of their unseen categories.
    """

    columns: tuple[FeatureColumn, ...]
    target: TargetColumns
    layout: RowLayout
    categories: tuple[CategoryCodes, ...]
    labels: CategoryCodes | None
    policies: Mapping[str, Missing]
    unknown: Unknown
    offsets: ColumnOffsets
    rounding: Rounding | None
    like: RecordedColumns | None
    tally: RowTally
    origin: str
    split_unknown: Unknown
    split: str | None = None

    @classmethod
    def build(
        cls, source: RowSource, config: ConvertConfig, like: RecordedColumns | None = None
    ) -> RowEncoder:
        """An encoder for the source's columns; under `like` with the values and fills of that store.

        Of the config, which `take_over` has completed, dtype, missing and unknown are used. Raises SourceError or
        ConfigError if `missing` does not fit the columns.
        """
        x_dtype = config.dtype or "float32"
        unknown: Unknown = "error" if like is None else config.unknown or "error"
        numeric = tuple(column for column in source.columns if column.kind == "numeric")
        categories = tuple(
            _category(c, x_dtype, like, unknown) for c in source.columns if c.kind == "category"
        )
        labels = _labels(source, like)
        y_shape, y_dtype = ((), "int32") if labels is not None else ((len(source.target.names),), "float32")
        policies = policies_of(source, config.missing, None if like is None else like.policies)
        if like is not None:
            _require_means(numeric, policies, like)
        offsets = ColumnOffsets(
            [column.name for column in numeric], source.target.names if labels is None else (), x_dtype
        )
        if like is not None:
            offsets.take_over(like.offsets)
        return cls(
            columns=numeric,
            target=source.target,
            layout=RowLayout.of(len(numeric), len(categories), y_shape, x_dtype, y_dtype),
            categories=categories,
            labels=labels,
            policies=policies,
            unknown=unknown,
            offsets=offsets,
            rounding=Rounding(len(numeric)) if x_dtype == "float16" and numeric else None,
            like=like,
            tally=RowTally(),
            origin=source.name,
            split_unknown=config.unknown or "ignore",
        )

    def following(self, split: str) -> RowEncoder:
        """An encoder of the rows of a later file, all of one split, which share what this one has learned.

        Nothing more is learned of categories and labels, and gaps get no indicators but those of the first source.
        """
        for values in self._learned:
            values.close(self.origin, may_ignore=self.split_unknown == "ignore")
        if self.tally.marked is None:
            self.tally.marked = self.indicators
        return replace(self, unknown=self.split_unknown, split=split)

    @property
    def _learned(self) -> tuple[CategoryCodes, ...]:
        """The values of all category columns, and of the label."""
        return self.categories if self.labels is None else (*self.categories, self.labels)

    @property
    def names(self) -> tuple[str, ...]:
        """The names of the numeric columns."""
        return tuple(column.name for column in self.columns)

    @property
    def _whole_names(self) -> tuple[str, ...]:
        """The same with the parts of a date under the date's name, as gaps are counted."""
        return tuple(map(whole_name, self.columns))

    def encode(self, batch: SourceBatch, room: Room | None = None) -> EncodedRows:
        """The batch as at most b rows; raises SourceError, which names file, column and row of a bad value.

        Rows that are left out are missing; x holds NaN for a missing number that is to be filled. The rows lie in the
        memory that `room(b)` gives, unless some are left out.
        """
        return self.encode_kept(batch, room)[0]

    def encode_kept(
        self, batch: SourceBatch, room: Room | None = None
    ) -> tuple[EncodedRows, NDArray[np.intp] | None]:
        """The rows of `encode`, and the index within the batch of each row that was kept; None if all were."""
        for column, stray in batch.strays.items():
            self.tally.invalid[column] += int(np.count_nonzero(stray))
        self.tally.dropped += batch.n_rows
        batch, valid = batch.without_strays()
        self.tally.dropped -= batch.n_rows
        rows, kept = self._encode_valid(batch, valid, room or self.layout.empty)
        return rows, kept if valid is None else valid if kept is None else valid[kept]

    def _encode_valid(
        self, batch: SourceBatch, valid: NDArray[np.intp] | None, room: Room
    ) -> tuple[EncodedRows, NDArray[np.intp] | None]:
        """`encode_kept` for the rows that are numbered `valid` in the source's batch; None stands for all rows."""
        ready = self._as_stored(batch)
        rows = self.layout.with_parts(ready, batch.n_rows) if ready else room(batch.n_rows)
        where = BatchOrigin(batch.file, batch.first_row, valid)
        target_where = BatchOrigin(batch.target_file, batch.first_row, valid)
        with reading(batch.file):  # Texts may be no UTF-8.
            cells = [DistinctValues.of(values) for values in batch.texts]
        gaps = (
            {}
            if ready
            else self._fill_numbers(rows.x, batch.numeric, self.offsets.x, self._whole_names, where)
        )
        for category, values in zip(self.categories, cells, strict=True):
            gaps |= self._gaps([category.column], values.missing, "text", where)
        label = None
        if self.labels is None:
            gaps |= self._fill_numbers(
                rows.y, (batch.target,), self.offsets.y, self.target.names, target_where
            )
        else:
            with reading(batch.target_file):
                label = DistinctValues.of(batch.target)
            gaps |= self._gaps([self.labels.column], label.missing, "label", target_where)
            if self.target.kind == "integer":
                label = label.as_integers(self.labels.column, target_where)
        if self.rounding is not None:
            self.rounding.add(without_offsets(batch.numeric, self.offsets.x), rows.x)
        self.offsets.check(batch, rows.x, rows.y)
        left_out = [lacking for name, lacking in gaps.items() if not self._fills(name)]
        left_out += self._count_unseen(
            [*zip(self.categories, cells, strict=True), (self.labels, label)], left_out
        )
        kept = None
        if left_out:
            kept = np.flatnonzero(~np.logical_or.reduce(left_out))
            rows, cells = rows.take(kept), [values.only(kept) for values in cells]
            label = label and label.only(kept)
        self._count_missing(gaps, kept)
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
        numbers, underflows = without_offsets(pieces, offsets), list[str]()
        is_finite = fill(out, numbers, lambda kind, _: underflows.append(kind))
        if underflows:
            self.offsets.count_zeros(names, numbers, out)
        if is_finite:
            return {}
        missing = missing_cells(out, pieces, names, where)
        return self._gaps(names, missing, "value", where) if missing.any() else {}

    def _gaps(
        self, names: Sequence[str], missing: NDArray[np.bool_] | None, what: str, where: BatchOrigin
    ) -> dict[str, NDArray[np.bool_]]:
        """Which rows lack a value, (b,), by column, of the missing cells (b,) or (b, k).

        Raises SourceError if the policy of a column does not allow it.
        """
        if missing is None:
            return {}
        missing = missing.reshape(len(missing), -1)
        refusing = np.array([self.policies[name] == "error" for name in names])
        refused = np.argwhere(missing & refusing)
        if len(refused):
            row, column = map(int, refused[0])
            remedy = "drop" if names[column] in self.target.names else "auto or drop"
            raise SourceError(
                f"{where.cell(names[column], row)}: the {what} is missing; fill it in, or take --missing {remedy}"
            )
        found = np.count_nonzero(missing, axis=0)
        # The parts of a date come one after the other, and lack a value in the same rows.
        return {name: missing[:, j] for j, name in enumerate(names) if found[j]}

    def fills(self, column: FeatureColumn) -> bool:
        """Whether a gap in this column is filled; else its row is left out."""
        return self._fills(whole_name(column))

    def _fills(self, name: str) -> bool:
        """Whether a gap in this column is filled; else its row is left out."""
        return is_filled(self.policies[name]) and name not in self.target.names

    def _count_missing(self, gaps: Mapping[str, NDArray[np.bool_]], kept: NDArray[np.intp] | None) -> None:
        """Count the gaps by column, those that are filled in the rows that are kept alone."""
        dropping = []
        for name, lacking in gaps.items():
            if self._fills(name):
                lacking = lacking if kept is None else lacking[kept]
            elif self.policies[name] == "drop":
                dropping.append(lacking)
            if n_rows := int(np.count_nonzero(lacking)):
                self.tally.missing[name] += n_rows
        if dropping:
            self.tally.without_value += int(np.count_nonzero(np.logical_or.reduce(dropping)))

    def _count_unseen(
        self,
        columns: Sequence[tuple[CategoryCodes | None, DistinctValues | None]],
        left_out: Sequence[NDArray[np.bool_]],
    ) -> list[NDArray[np.bool_]]:
        """Count the unseen values, but for rows that are left out anyway; returns the rows to leave out for them."""
        if self.unknown == "error":
            return []
        gone = np.logical_or.reduce(left_out) if left_out else None
        tally = self.tally.unseen
        if self.split is not None:
            tally = self.tally.split_unseen.setdefault(self.split, UnseenValues())
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
                tally.add(category.column, value, n_rows)
            with_unseen.append(np.isin(cells.indices, list(unseen)))
        return with_unseen if self.unknown == "drop" else []

    @property
    def is_complete(self) -> bool:
        """Whether all categories and labels are known before the rows are read."""
        return all(values.is_closed for values in self._learned)

    @property
    def may_fill(self) -> bool:
        """Whether a number may be missing that becomes a mean which only the rows themselves can tell."""
        return self.like is None and any(map(self.fills, self.columns))

    def unknown_means(self) -> list[int]:
        """The numeric columns, by index, with gaps so far whose means are not known; see `set_means`."""
        if not self.tally.missing or self.like is not None:
            return []
        return [
            j
            for j, column in enumerate(self.columns)
            if self.tally.missing[whole_name(column)]
            and self.fills(column)
            and column.name not in self.tally.means
            and not column.is_code
        ]

    def set_means(self, columns: Sequence[int], means: NDArray[np.float64]) -> None:
        """Say what the gaps of these numeric columns become in the store; raises SourceError for a mean that is NaN."""
        for j, mean in zip(columns, means.tolist(), strict=True):
            if np.isnan(mean):
                raise SourceError(
                    f"column {self.columns[j].name!r} has no value in any row of the first split, so no mean; "
                    "leave it out with --drop"
                )
            self.tally.means[self.columns[j].name] = mean

    @property
    def indicators(self) -> tuple[str, ...]:
        """The columns whose gaps a feature of their own marks: those of the store that is followed, or with gaps."""
        if self.like is not None:
            return self.like.indicators
        if self.tally.marked is not None:
            return self.tally.marked
        named = dict.fromkeys(map(whole_name, self.columns))
        return tuple(name for name in named if self.tally.missing[name] and self._fills(name))

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
                "fill some in, leave the emptiest columns out with --drop, or take --missing auto"
            )
        for category in self._learned:
            if category.is_closed:
                continue
            doubt = None
            if not category.is_stated:
                doubt = column_warning(category.column, category.state(), self.tally.kept)
            for warning in (doubt, same_value_warning(category.column, category.state())):
                if warning is not None:
                    _LOGGER.warning("%s", warning)
        if self.labels is not None and len(self.labels) < 2:
            raise SourceError(
                f"{file}: every row has the label {self.labels.sorted_values()[0]!r} in "
                f"{self.labels.column!r}; classification needs at least two classes"
            )

    def fill_values(self) -> dict[str, float]:
        """The number that a missing value becomes in the store, by numeric column, as far as known and needed."""
        if self.like is None:
            return dict(self.tally.means) | {
                column.name: UNKNOWN for column in self.columns if column.is_code and self.fills(column)
            }
        fills = self.like.fills
        return {column.name: fills[column.name] for column in self.columns if self.fills(column)}

    def _file_fills(self) -> dict[str, float]:
        """`fill_values` in the units of the files, with the offsets added."""
        offsets = self.offsets.by_name
        return {name: value + offsets.get(name, 0.0) for name, value in self.fill_values().items()}

    def report(self) -> dict[str, Any]:
        """The counts of rows left out, cells filled and values rounded, for the manifest; warns of all of them."""
        report = self.tally.report()
        if self.tally.missing:
            fills = self._file_fills()
            filled = {
                column.name: fills[column.name]
                for column in self.columns
                if column.name in fills and self.tally.missing[whole_name(column)]
            }
            report |= {"fills": dict(sorted(filled.items()))} if filled else {}
        self.tell_losses()
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

    def tell_losses(self) -> None:
        """Warn of missing, invalid and unseen values: of what they became, and of rows left out for them."""
        self._tell_missing()
        self.tally.tell_invalid()
        store = self.origin if self.like is None else self.like.store
        self.tally.tell_unseen(self.unknown, self.split_unknown, store)

    def _tell_missing(self) -> None:
        """Warn of the missing values, a line for each column that was filled, and of the rows left out for them."""
        missing, fills = self.tally.missing, self._file_fills()
        features = dict.fromkeys([*map(whole_name, self.columns), *(c.column for c in self.categories)])
        means: dict[str, list[float]] = {}
        for column in self.columns:
            if column.name in fills and not column.is_code:
                means.setdefault(whole_name(column), []).append(fills[column.name])
        # A text whose category is not known is told as an unseen value.
        unknown = {c.column for c in self.categories if c.is_closed and MISSING_CATEGORY not in c}
        filled = {
            name: missing[name]
            for name in features
            if missing[name] and self._fills(name) and name not in unknown
        }
        dropping = [name for name in (*features, *self.target.names) if self.policies[name] == "drop"]
        left = {name: missing[name] for name in self.target.names if missing[name] and name not in dropping}
        lines = [
            *told_fills(filled, self.tally.kept, means, self.indicators),
            *told_targets(left),
            *told_drops(
                {name: missing[name] for name in dropping if missing[name]},
                self.tally.without_value,
                self.tally.kept + self.tally.dropped,
            ),
        ]
        for line in lines:
            _LOGGER.warning("%s", line)

    def state(self) -> dict[str, Any]:
        """Everything learned from the batches so far, as JSON that holds it exactly, for `restore`."""
        return {
            "books": [category.state() for category in self.categories],
            "labels": None if self.labels is None else self.labels.state(),
            **self.tally.state(),
            "rounding": None if self.rounding is None else self.rounding.state(),
            "offsets": self.offsets.state(),
        }

    def restore(self, state: Mapping[str, Any]) -> None:
        """Continue from the `state` of an encoder that was built from the same source and settings."""
        for category, values in zip(self.categories, state["books"], strict=True):
            category.restore(values)
        if self.labels is not None:
            self.labels.restore(state["labels"])
        self.tally.restore(state)
        self.offsets.restore(state["offsets"])
        if self.rounding is not None:
            self.rounding.restore(state["rounding"])


def _require_means(
    columns: Sequence[FeatureColumn], policies: Mapping[str, Missing], like: RecordedColumns
) -> None:
    """Raises ConfigError if a column is to be filled for which the store has no mean."""
    for column in columns:
        policy = policies[whole_name(column)]
        if is_filled(policy) and column.name not in like.fills:
            raise ConfigError(
                f"missing {policy} contradicts like, whose store {like.store} records no means of {column.name!r}; "
                "use drop, or fill the cells in"
            )


def _category(
    column: FeatureColumn, x_dtype: XDtype, like: RecordedColumns | None, unknown: Unknown
) -> CategoryCodes:
    known, store = ((), None) if like is None else (like.values[column.name], like.store)
    if column.encoding == "codes":
        return CategoryCodes(
            column.name,
            _MAX_CODES[x_dtype],
            "leave it out, or store it as numbers",
            known,
            store,
            may_ignore=unknown == "ignore",
            is_stated=column.is_stated,
        )
    remedy = "it looks like an identifier: leave it out, or store it as numbers or with --categories codes"
    return CategoryCodes(
        column.name,
        MAX_CATEGORIES,
        remedy,
        known,
        store,
        may_ignore=unknown == "ignore",
        is_stated=column.is_stated,
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
        target.names[0],
        MAX_LABELS,
        "take --task regression if they are amounts",
        known,
        store,
        is_feature=False,
        is_stated=target.is_stated,
    )


def _put_float_words(words: NDArray[np.uint32], values: NDArray[Any]) -> None:
    """Write the float32 bits of (b, k) values to `words`, -0 as 0, in one pass."""
    np.add(values, np.float32(0), out=words.view(np.float32), casting="same_kind")
