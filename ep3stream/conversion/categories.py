"""The distinct values of category and label columns: numbered, counted if unseen, and looked at for mistakes.

A missing category (null, NaN or an empty text) is the category `(missing)`, if `--missing` lets it through. An
unseen category, which the store that a file is converted `--like` does not have, is a SourceError, or is
ignored or dropped as `--unknown` says; `store.unseen_values` counts them.
"""

from __future__ import annotations

import logging
import math
import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import xxhash
from numpy.typing import NDArray

from ep3stream.conversion.same_value import KnownValues
from ep3stream.errors import SourceError
from ep3stream.formats.source import BatchOrigin
from ep3stream.formats.text_cells import GAP_WORDS, known_texts, looks_like_amount, numbers_from, option_name
from ep3stream.formats.text_dates import fitting_formats

_LOGGER = logging.getLogger(__name__)

MISSING_CATEGORY = "(missing)"

# The code of an unseen category: as an index, the last entry of `ranks` and `hashes`.
UNKNOWN = -1
# Stands for a code while none is known.
_NEW = -2
_UNKNOWN_HASH = xxhash.xxh32_intdigest(b"(unknown)")

# Beyond this number neighbouring whole numbers are the same float64, and different labels would become one.
_MAX_EXACT = 1 << 53

# Values in a message.
_MAX_SHOWN = 3

# Texts that look like dates in no format that is known, or like plain numbers, and from how many categories on a
# warning of those is worth it.
_YEAR = r"(?:1[789]|2[01])\d\d"
_MONTH = r"[^\W\d_]{3,10}\.?"
_DATE = re.compile(
    r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}\.?([ Tt]\d{1,2}:\d{2}.*)?|\d{1,3}:\d{2}(:\d{2}([.,]\d+)?)?|\d{1,2}\.\d{1,2}\.|"
    # 2026-W10, 2026Q1, Q1 2026, 2026-123
    rf"{_YEAR}-?W\d\d(-\d)?|{_YEAR}[- ]?Q[1-4]|Q[1-4][-/ ]?{_YEAR}|{_YEAR}-[0-3]\d\d|"
    # 2nd March 2026, 12. Dezember 2026, March 2nd, 2026, Mar 1 10:30, Fri Aug 21 2026 12:25:00 GMT+0000
    rf"\d{{1,2}}(st|nd|rd|th|\.)?[ -]{_MONTH},?[ -]{_YEAR}(\D.*)?|({_MONTH},? )?{_MONTH} \d{{1,2}}(st|nd|rd|th)?,? "
    rf"({_YEAR}(\D.*)?|\d\d:\d\d.*)|"
    # 1 days 02:03:04, PT5M, P1DT2H, 20260301T103015Z, 2026年3月1日
    r"-?\d+ days?( .*)?|-?P(?=.)(\d+[YMWD])*(T(\d+([.,]\d+)?[HMS])+)?|"
    rf"{_YEAR}[01]\d[0-3]\d[T ]?\d\d:?\d\d.*|{_YEAR}[年년]\s?\d+[月월].*"
)
_LEAST_VALUES = 10
_LEAST_IDENTIFIERS = 50
_WHOLE_TEXT = re.compile(r"0|-?[1-9]\d*")


class CategoryCodes:
    """The distinct values of one column, numbered in order of appearance, so that one pass over the rows is enough.

    limit, remedy: how many values there may be, and what to advise if there are more.
    known: values that come first. store: the store that they come from; then the column is closed: any other
    value is unseen and a SourceError, or gets the code UNKNOWN if `may_ignore` is set, which labels never are.
    is_stated: whether the settings ask for these categories, so that nothing doubts them.
    """

    def __init__(
        self,
        column: str,
        limit: int,
        remedy: str,
        known: Sequence[Any] = (),
        store: Path | str | None = None,
        *,
        may_ignore: bool = False,
        is_feature: bool = True,
        is_stated: bool = False,
    ) -> None:
        self.column, self.is_stated = column, is_stated
        self._limit, self._remedy, self._store = limit, remedy, store
        self.may_ignore, self._is_feature = may_ignore and is_feature, is_feature
        self._codes: dict[Any, int] = {}
        self._same: KnownValues | None = None
        self._hashes = np.empty(0, np.uint32)
        self._last_values: list[Any] = []
        self._table = np.empty(0, np.int32)
        self._is_told = self.is_closed
        self._is_sorted = store is not None
        self._remedy_of_unseen = "to learn it, convert both files anew as one store and fit that"
        self.restore(known)

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def is_closed(self) -> bool:
        """Whether the values are those of a store, so that all are known before the rows are read."""
        return self._store is not None

    def close(self, source: Path | str, *, may_ignore: bool) -> None:
        """Learn no more values: later rows follow those of `source`, unless the column was closed before."""
        self._remedy_of_unseen = f"to learn it, it must stand in {source}"
        self._store = self._store or source
        self.may_ignore = may_ignore and self._is_feature

    def __contains__(self, value: object) -> bool:
        return value in self._codes

    def state(self) -> list[Any]:
        """The values in the order of their codes, as JSON for `restore`."""
        return list(self._codes)

    def restore(self, values: Sequence[Any]) -> None:
        """Replace all values by these, in the order of their codes."""
        self._codes = {value: code for code, value in enumerate(values)}
        self._same = None
        self._hashes = np.empty(0, np.uint32)
        self._last_values, self._table = [], np.full(1, _NEW, np.int32)

    def encode(self, cells: DistinctValues, where: BatchOrigin) -> NDArray[np.int32]:
        """The code of each row's value, (b,); new values are added, missing ones are `(missing)`.

        Raises SourceError if there are more values than the limit, and for an unseen value of a closed column
        unless it is ignored: then its code is UNKNOWN.
        """
        table = self._table_of(cells.values)
        codes: NDArray[np.int32] = table.take(cells.indices)
        if len(codes) and codes.min() >= 0 and (self._is_told or MISSING_CATEGORY not in cells.values):
            return codes
        for index, cell in cells.present():
            value = self._known(cell)
            if value not in self._codes:
                if self.may_ignore:
                    table[index] = UNKNOWN
                    continue
                if self.is_closed:
                    raise self._unseen_error(value, where.cell(self.column, cells.first_row(index)))
                if isinstance(value, float) and math.isinf(value):
                    raise SourceError(
                        f"{where.cell(self.column, cells.first_row(index))}: the value is not finite ({value}); "
                        "correct it or leave the row out"
                    )
                self._codes[value] = len(self)
                if len(self) > self._limit:
                    raise SourceError(
                        f"{where.file}: column {self.column!r} has more than {self._limit} different "
                        f"values; {self._remedy_of_many()}"
                    )
            if value == MISSING_CATEGORY and index >= 0 and not self._is_told:
                self._is_told = True
                _LOGGER.warning(
                    "%s: the text is what the gaps of the column are called, so that both are one category; "
                    "write it otherwise to tell them apart",
                    f"{where.cell(self.column, cells.first_row(index))}: {value!r}",
                )
            table[index] = self._codes[value]
        return table.take(cells.indices)

    def _table_of(self, values: list[Any]) -> NDArray[np.int32]:
        """The code of each value, _NEW without one, and behind them that of missing values, which their index -1 finds.

        Batches that come one after the other often have the same dictionary, and share the table.
        """
        if values != self._last_values:
            cells = (*values, MISSING_CATEGORY)
            self._table = np.array([self._codes.get(cell, _NEW) for cell in cells], np.int32)
            self._last_values = values
        return self._table

    def unseen(self, cells: DistinctValues) -> dict[int, Any]:
        """The unseen values among the cells, by their index among the distinct values of the cells."""
        if all(self._known(value) in self._codes for value in (*cells.values, MISSING_CATEGORY)):
            return {}
        return {index: value for index, value in cells.present() if self._known(value) not in self._codes}

    def _known(self, value: Any) -> Any:
        """The value of a closed column that the cell says in another way, such as 1.0 for 1; else the cell itself."""
        if value in self._codes or not self.is_closed:
            return value
        if self._same is None:
            self._same = KnownValues(self._codes)
        same = self._same.find(value)
        return value if same is None else same

    def _remedy_of_many(self) -> str:
        """The advice for too many values: they may be dates or amounts in a notation that is not read."""
        warning = None if self.is_stated else column_warning(self.column, list(self._codes), 0)
        return self._remedy if warning is None else warning.partition("categories, but ")[2]

    def _unseen_error(self, value: Any, where: str) -> SourceError:
        return SourceError(
            f"{where}: {value!r} is not among the {len(self)} values of {self._store}; correct it, or take --unknown "
            f"{'ignore or drop' if self._is_feature else 'drop'}; {self._remedy_of_unseen}"
        )

    def sorted_values(self) -> list[Any]:
        """Numbers by size, texts by letters, `(missing)` last; the values of a closed column as the store has them.

        Texts are numbers here if all of them are whole numbers, written as Python writes them.
        """
        if self._is_sorted:
            return list(self._codes)
        if self.are_whole_texts:
            return sorted(self._codes, key=lambda value: (value == MISSING_CATEGORY, _whole_or_0(value)))
        return sorted(self._codes, key=lambda value: (value == MISSING_CATEGORY, value))

    @property
    def are_whole_texts(self) -> bool:
        """Whether all values are texts of whole numbers, like 12 and -3, but not 012 or 1.0."""
        values = [value for value in self._codes if value != MISSING_CATEGORY]
        return bool(values) and all(
            isinstance(value, str) and _WHOLE_TEXT.fullmatch(value) for value in values
        )

    def ranks(self) -> NDArray[np.int32]:
        """The index of each code's value among the sorted values, (len + 1,); 0 for UNKNOWN."""
        ranks = np.zeros(len(self) + 1, np.int32)
        ranks[[self._codes[value] for value in self.sorted_values()]] = np.arange(len(self), dtype=np.int32)
        return ranks

    def hashes(self) -> NDArray[np.uint32]:
        """A hash of each code's text, (len + 1,). Unlike the code, it does not depend on the order of the rows."""
        if len(self._hashes) <= len(self):
            known = self._hashes[:-1]
            added = [xxhash.xxh32_intdigest(str(value).encode()) for value in list(self._codes)[len(known) :]]
            self._hashes = np.concatenate([known, np.array([*added, _UNKNOWN_HASH], np.uint32)])
        return self._hashes


@dataclass(frozen=True, slots=True)
class DistinctValues:
    """The distinct values of a batch's column, and the index of each row's value among them, (b,).

    The index is -1 if the value is missing. rows: the number of each row within its batch, if some were left out.
    """

    values: list[Any]
    indices: NDArray[np.int32]
    rows: NDArray[np.intp] | None = None

    @classmethod
    def of(cls, cells: pa.DictionaryArray | NDArray[Any]) -> DistinctValues:
        """The distinct values of an arrow dictionary array or of numbers; null, NaN and the empty text are missing."""
        if not isinstance(cells, pa.DictionaryArray):
            native = np.ascontiguousarray(cells.reshape(len(cells)), cells.dtype.newbyteorder("="))
            cells = pa.array(native).dictionary_encode()
        values = cells.dictionary.to_pylist()
        indices = cells.indices.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False)
        absent = [
            index for index, value in enumerate(values) if value is None or value == "" or value != value
        ]
        if absent:
            indices = np.where(np.isin(indices, absent), np.int32(-1), indices)
        return cls(values, indices)

    def present(self) -> Iterator[tuple[int, Any]]:
        """The index and value of each value that a row has, in the order of the rows.

        Missing values are MISSING_CATEGORY at -1, which comes first.
        """
        first = np.full(len(self.values) + 1, -1)
        # Of the rows with the same value the last one stays, which is the first one in the reversed order.
        first[self.indices[::-1]] = np.arange(len(self.indices))[::-1]
        if first[-1] >= 0:
            yield -1, MISSING_CATEGORY
        found = np.flatnonzero(first[:-1] >= 0)
        for index in found[np.argsort(first[found])].tolist():
            yield index, self.values[index]

    @property
    def missing(self) -> NDArray[np.bool_] | None:
        """Which rows have no value, (b,); None if all rows have one."""
        missing: NDArray[np.bool_] = self.indices < 0
        return missing if missing.any() else None

    def only(self, rows: NDArray[np.intp]) -> DistinctValues:
        """The same for these rows alone."""
        return DistinctValues(self.values, self.indices[rows], rows)

    def first_row(self, index: int) -> int:
        """The first row within the batch whose value has the index `index`."""
        row = int(np.argmax(self.indices == index))
        return row if self.rows is None else int(self.rows[row])

    def as_integers(self, column: str, where: BatchOrigin) -> DistinctValues:
        """The values as integers; raises SourceError, which names the row, for one that is no whole number.

        A text of a whole number becomes that number; any other text stays, as a label of its own.
        """
        whole = [_whole(value) for value in self.values]
        for index, value in enumerate(whole):
            if value is None:
                raise SourceError(
                    f"{where.cell(column, self.first_row(index))}: the label is no whole number below 2^53 "
                    f"({self.values[index]}); correct it, or take --task regression"
                )
        return DistinctValues(whole, self.indices, self.rows)


def _whole_or_0(value: str) -> int:
    return 0 if value == MISSING_CATEGORY else int(value)


def _whole(value: Any) -> Any:
    """The value as an integer, 0 if it is missing; None if it is a fraction or may have lost digits."""
    if isinstance(value, str):
        return int(value) if _WHOLE_TEXT.fullmatch(value) else value
    if not isinstance(value, float):
        return value if value is not None else 0
    if value != value:
        return 0
    return int(value) if value.is_integer() and abs(value) < _MAX_EXACT else None


def column_warning(column: str, values: Sequence[Any], n_rows: int) -> str | None:
    """A warning if a category column with these values in n rows looks like dates, numbers or identifiers.

    Returns None if the values look like categories, or are too few to tell.
    """
    texts = [value for value in values if isinstance(value, str) and value != MISSING_CATEGORY]
    if not texts:
        return None
    option = option_name(column)
    begin = f"column {column!r} is taken as {len(texts)} categories, but"
    array = pa.array(texts)
    known = known_texts(array, GAP_WORDS)
    if formats := fitting_formats(known, _is_half):
        shown = " or ".join(f"--date {option}={text_format}" for text_format, _ in formats[:_MAX_SHOWN])
        is_date = pc.is_valid(formats[0][1]).to_numpy(zero_copy_only=False)
        words = _examples(texts, is_date)
        return f"{begin} {words} look like dates; say how they are written by {shown}"
    is_number = pc.is_valid(numbers_from(known)).to_numpy(zero_copy_only=False)
    is_amount = pc.fill_null(looks_like_amount(known), False).to_numpy(zero_copy_only=False)
    n_numbers, n_amounts = int(is_number.sum()), int((is_amount | is_number).sum())
    if n_amounts > n_numbers and 10 * n_amounts >= 9 * len(texts):
        words = _examples(texts, is_amount | is_number, texts[int(np.argmax(is_amount & ~is_number))])
        return f"{begin} {words} look like numbers; write them like 1234.5"
    if (
        n_numbers > 1
        and len(texts) <= 2 * n_numbers
        and (n_numbers < len(texts) or n_numbers >= _LEAST_VALUES)
    ):
        words = _examples(texts, is_number)
        remedy = f"correct or empty the others, or say so by --number {option} or --category {option}"
        return f"{begin} {words} are numbers; {remedy}"
    if len(texts) < _LEAST_VALUES:
        return None
    is_like_date = np.array([_DATE.fullmatch(text.strip()) is not None for text in texts])
    if 10 * is_like_date.sum() >= 9 * len(texts):
        return (
            f"{begin} {_examples(texts, is_like_date)} look like dates or times; "
            f"write them like 2024-12-31 or 10:30:15, or say so by --category {option}"
        )
    if n_rows and len(texts) >= _LEAST_IDENTIFIERS and 2 * len(texts) > n_rows:
        return (
            f"{begin} there are only {n_rows} rows; if it is an identifier, leave it out with --drop {option}"
        )
    return None


def same_value_warning(column: str, values: Sequence[Any]) -> str | None:
    """A warning that names two texts of a category column that differ in blanks alone, or are the same number.

    Or a word for nothing, such as NA, among texts of whole numbers.
    """
    texts = sorted(value for value in values if isinstance(value, str))
    trimmed: dict[str, str] = {}
    for text in texts:
        if trimmed.setdefault(text.strip(), text) != text:
            return (
                f"column {column!r} has the categories {trimmed[text.strip()]!r} and {text!r}, which differ in blanks "
                "alone; they stay two, so write them alike if they are meant to be one"
            )
    words = [text for text in texts if text.strip() in GAP_WORDS]
    others = [text for text in texts if text not in words and text != MISSING_CATEGORY]
    if words and len(others) > 1 and all(_WHOLE_TEXT.fullmatch(text) for text in others):
        return (
            f"column {column!r} has {words[0]!r} as a category beside numbers alone; if it stands for a gap, take "
            f"--missing-words {words[0]!r}"
        )
    known: dict[float, str] = {}
    for text, number in zip(texts, numbers_from(pa.array(texts, pa.string())).to_pylist(), strict=True):
        if number is not None and number == number and known.setdefault(number, text) != text:
            return (
                f"column {column!r} has the categories {known[number]!r} and {text!r}, which are the same number "
                "written in two ways; they stay two, so write them alike if they are meant to be one"
            )
    return None


def _is_half(n_good: int, n_all: int) -> bool:
    return n_good > 0 and 2 * n_good >= n_all


def _examples(texts: Sequence[str], is_like: NDArray[np.bool_], example: str = "") -> str:
    """One of the texts that are like something, and up to three that are not."""
    other = [text for text, is_one in zip(texts, is_like, strict=True) if not is_one]
    but = f" (not {', '.join(map(repr, other[:3]))})" if other else ""
    return f"values such as {example or texts[int(np.argmax(is_like))]!r}{but}"
