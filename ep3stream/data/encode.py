"""Turns batches into compact rows (numbers and category codes), and compact rows into the store's x and y."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from ep3stream.config import XDtype
from ep3stream.data.batch import MAX_CATEGORIES, MAX_LABELS, Batch, Source, first_true
from ep3stream.errors import SourceError

COLUMNS_VERSION = 1

Rows = NDArray[np.void]


class Codebook:
    """The distinct values of one column, numbered in order of appearance: one pass will do."""

    def __init__(self, column: str, limit: int, remedy: str) -> None:
        self.column = column
        self._limit, self._remedy = limit, remedy
        self._codes: dict[Any, int] = {}

    def __len__(self) -> int:
        return len(self._codes)

    def codes(self, distinct: Sequence[Any], file: Path) -> NDArray[np.int32]:
        """The code of each value, new ones being added; raises SourceError naming `file` beyond the limit."""
        codes = [self._codes.setdefault(value, len(self._codes)) for value in distinct[: self._limit + 1]]
        if len(self._codes) > self._limit:
            raise SourceError(
                f"{file}: column {self.column!r} has more than {self._limit} different values; {self._remedy}"
            )
        return np.asarray(codes, np.int32)

    def sorted_values(self) -> list[Any]:
        """The values in their own order: integers by size, texts by letters."""
        return sorted(self._codes)

    def ranks(self) -> NDArray[np.int32]:
        """Place of each code's value among the sorted values, (len,)."""
        ranks = np.empty(len(self), np.int32)
        ranks[[self._codes[value] for value in self.sorted_values()]] = np.arange(len(self), dtype=np.int32)
        return ranks

    def hashes(self) -> NDArray[np.uint32]:
        """A hash of each code's text, which unlike the code is the same in any order of the rows; (len,)."""
        return np.array([xxhash.xxh32_intdigest(str(value).encode()) for value in self._codes], np.uint32)


@dataclass(frozen=True, slots=True)
class RowEncoder:
    """Encodes the batches of one source as records of `dtype`: key, x (numeric columns), codes, y.

    y is the label's code (int32) in classification and (c,) float32 in regression; key is left to the caller.
    """

    names: tuple[str, ...]
    target_names: tuple[str, ...]
    dtype: np.dtype[np.void]
    books: tuple[Codebook, ...]
    labels: Codebook | None

    @classmethod
    def build(cls, source: Source, x_dtype: XDtype) -> RowEncoder:
        """The record layout and empty codebooks for the source's columns."""
        texts = [column.name for column in source.columns if column.kind == "category"]
        n_numeric = len(source.columns) - len(texts)
        target, labels = source.target, None
        if target.kind != "number":
            labels = Codebook(target.names[0], MAX_LABELS, "take --task regression if they are amounts")
            labels.codes(source.label_values or (), source.files[-1])
        y_dtype: tuple[Any, ...] = ("y", "<i4") if labels is not None else ("y", "<f4", (len(target.names),))
        fields = [("key", "<u8"), ("x", x_dtype, (n_numeric,)), ("codes", "<i4", (len(texts),)), y_dtype]
        remedy = "it looks like an identifier: leave it out, or store it as numbers"
        return cls(
            names=tuple(column.name for column in source.columns if column.kind == "numeric"),
            target_names=target.names,
            dtype=np.dtype(fields),
            books=tuple(Codebook(name, MAX_CATEGORIES, remedy) for name in texts),
            labels=labels,
        )

    def encode(self, batch: Batch) -> Rows:
        """The batch as b records; raises SourceError naming file, column and row of an impossible value."""
        rows = np.empty(batch.n_rows, self.dtype)
        where = _Place(batch.file, batch.first_row)
        _fill(rows["x"], batch.numeric, self.names, where)
        for j, (book, text) in enumerate(zip(self.books, batch.texts, strict=True)):
            rows["codes"][:, j] = _text_codes(book, text, where)
        where = _Place(batch.target_file, batch.first_row)
        if self.labels is None:
            _fill(rows["y"], (batch.target,), self.target_names, where)
        elif isinstance(batch.target, pa.DictionaryArray):
            rows["y"] = _text_codes(self.labels, batch.target, where)
        else:
            rows["y"] = _integer_codes(self.labels, batch.target, where)
        return rows

    @property
    def is_complete(self) -> bool:
        """Whether all categories and labels are known before the rows were read."""
        return not self.books and (self.labels is None or len(self.labels) > 0)

    @property
    def word_names(self) -> tuple[str, ...]:
        """What each word of a row stands for."""
        targets = (f"target {name}" for name in self.target_names)
        return (*self.names, *(book.column for book in self.books), *targets)

    def words(self, rows: Rows) -> NDArray[np.uint32]:
        """Each row's content as 32-bit words, (b, width): equal rows have equal words wherever they are."""
        codes = [book.hashes()[rows["codes"][:, j], None] for j, book in enumerate(self.books)]
        y = _float_words(rows["y"]) if self.labels is None else self.labels.hashes()[rows["y"], None]
        return np.concatenate([_float_words(rows["x"]), *codes, y], axis=1)


@dataclass(frozen=True, slots=True)
class Expansion:
    """How compact rows become the store's x and y, once every category and label is known.

    numeric: the features filled by the numeric columns; offsets and ranks: for each category column its first
    feature and the place of each code among the sorted categories; label_ranks: the same for class ids.
    """

    feature_names: tuple[str, ...]
    class_names: tuple[str, ...] | None
    columns: Mapping[str, Any]
    numeric: NDArray[np.intp]
    offsets: tuple[int, ...]
    ranks: tuple[NDArray[np.int32], ...]
    label_ranks: NDArray[np.int32] | None

    @classmethod
    def build(cls, source: Source, encoder: RowEncoder) -> Expansion:
        """Lay out the features in the source's order, each category as `column=value`."""
        names: list[str] = []
        described: list[dict[str, Any]] = []
        numeric: list[int] = []
        offsets: list[int] = []
        books = iter(encoder.books)
        for column in source.columns:
            described.append({"name": column.name, "kind": column.kind})
            if column.kind == "numeric":
                numeric.append(len(names))
                names.append(column.name)
            else:
                values = next(books).sorted_values()
                described[-1]["values"] = values
                offsets.append(len(names))
                names.extend(f"{column.name}={value}" for value in values)
        labels, target = encoder.labels, source.target.names
        return cls(
            feature_names=tuple(names),
            class_names=tuple(str(value) for value in labels.sorted_values()) if labels is not None else None,
            columns={
                "version": COLUMNS_VERSION,
                "target": target[0] if len(target) == 1 else list(target),
                "columns": described,
            },
            numeric=np.asarray(numeric, np.intp),
            offsets=tuple(offsets),
            ranks=tuple(book.ranks() for book in encoder.books),
            label_ranks=labels.ranks() if labels is not None else None,
        )

    @property
    def n_features(self) -> int:
        """Columns of x."""
        return len(self.feature_names)

    def expand(self, rows: Rows) -> tuple[NDArray[Any], NDArray[Any]]:
        """The store's x (b, d) with one 1 for each category, and y as class ids (b,) or numbers (b, c)."""
        y = rows["y"] if self.label_ranks is None else self.label_ranks[rows["y"]]
        if not self.ranks:
            return rows["x"], y
        x = np.zeros((len(rows), self.n_features), rows["x"].dtype)
        x[:, self.numeric] = rows["x"]
        each = np.arange(len(rows))
        for j, (offset, ranks) in enumerate(zip(self.offsets, self.ranks, strict=True)):
            x[each, offset + ranks[rows["codes"][:, j]]] = 1
        return x, y


@dataclass(frozen=True, slots=True)
class _Place:
    """Where a batch starts, for messages."""

    file: Path
    first_row: int

    def of(self, column: str, index: int) -> str:
        """File, column and data row, counted from 1 without the header."""
        return f"{self.file}: column {column!r}, row {self.first_row + index + 1}"


def _fill(out: NDArray[Any], pieces: tuple[NDArray[Any], ...], names: tuple[str, ...], where: _Place) -> None:
    """Cast pieces, (b,) or (b, k) each, into the columns of out, left to right; all must be finite."""
    start = 0
    for piece in pieces:
        columns = piece.reshape(len(out), -1)
        filled = out[:, start : start + columns.shape[1]]
        with np.errstate(over="ignore", under="ignore"):  # an overflow becomes inf, and is reported as such
            filled[...] = columns
        finite = np.isfinite(filled)
        if not finite.all():
            row, column = np.argwhere(~finite)[0]
            raise SourceError(
                _not_finite(where.of(names[start + column], row), columns[row, column], out.dtype)
            )
        start += columns.shape[1]


def _not_finite(place: str, value: Any, dtype: np.dtype[Any]) -> str:
    if np.isfinite(value):
        remedy = "use --dtype float32 or scale the column" if dtype == np.float16 else "scale the column"
        return f"{place}: {value} is beyond {np.finfo(dtype).max}, the largest {dtype}; {remedy}"
    return f"{place}: the value is missing or not finite ({value}); fill it in or leave the row out"


def _text_codes(book: Codebook, texts: pa.DictionaryArray, where: _Place) -> NDArray[np.int32]:
    if texts.null_count:
        index = first_true(texts.is_null().to_numpy(zero_copy_only=False))
        raise SourceError(
            f"{where.of(book.column, index)}: the text is missing; fill it in or leave the row out"
        )
    table = book.codes(texts.dictionary.to_pylist(), where.file)
    codes: NDArray[np.int32] = table[texts.indices.to_numpy()]
    return codes


def _integer_codes(book: Codebook, labels: NDArray[Any], where: _Place) -> NDArray[np.int32]:
    distinct, places = np.unique(labels, return_inverse=True)
    whole = np.isfinite(distinct) & (distinct == np.rint(distinct))
    if not whole.all():
        index = first_true(~whole[places])
        raise SourceError(
            f"{where.of(book.column, index)}: the label is missing or no whole number "
            f"({labels[index]}); correct it, or take --task regression"
        )
    return book.codes([int(value) for value in distinct], where.file)[places]


def _float_words(values: NDArray[Any]) -> NDArray[np.uint32]:
    """The float32 bits of (b, k) values, with -0 as 0."""
    return (values.astype(np.float32) + np.float32(0)).view(np.uint32)
