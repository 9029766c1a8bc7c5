"""Values of categories and classes that a later file has and the store it is converted like has not, counted.

The distinct values of category and label columns, numbered while they are met.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import xxhash
from numpy.typing import NDArray

from ep3stream.config import Unknown
from ep3stream.errors import SourceError
from ep3stream.formats.source import first_true

# By column; what comes after is counted as one, so that a column of identifiers takes no memory.
_MAX_NAMED = 20

_OTHERS = "(others)"

_MAX_TOLD = 3

_CONSEQUENCE: Mapping[Unknown, str] = {
    "error": "",
    "ignore": "none of its features is set there",
    "drop": "those rows are left out",
}


class UnseenValues:
    """How many rows have each such value, by column."""

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = {}

    @classmethod
    def of(cls, content: Any) -> UnseenValues:
        """From `to_json`; of what else a manifest may hold, nothing."""
        made = cls()
        for column, values in content.items() if isinstance(content, Mapping) else ():
            counts = values.items() if isinstance(values, Mapping) else ()
            made._rows[column] = Counter({value: n for value, n in counts if type(n) is int and n > 0})
        return made

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, column: str, value: Any, n_rows: int) -> None:
        """So many more rows have this value in that column."""
        if not n_rows:
            return
        values = self._rows.setdefault(column, Counter())
        name = str(value)
        values[name if name in values or len(values) < _MAX_NAMED else _OTHERS] += n_rows

    def to_json(self) -> dict[str, dict[str, int]]:
        """Rows by column and value."""
        return {column: dict(values) for column, values in self._rows.items()}

    def told(self, unknown: Unknown, store: object) -> str:
        """In a sentence, with what becomes of them."""
        return f"values that {store} does not have: {self}; {_CONSEQUENCE[unknown]}"

    def __str__(self) -> str:
        """The most frequent values of each column."""
        columns = []
        for column, values in self._rows.items():
            named = [f"{value!r} {n}" for value, n in values.most_common(_MAX_TOLD)]
            more = ", ..." * (len(values) > _MAX_TOLD)
            columns.append(f"{column!r} in {values.total()} rows ({', '.join(named)}{more})")
        return "; ".join(columns)


MISSING_CATEGORY = "(missing)"

# The code of a value that a closed book does not have: as an index, the last place of `ranks` and `hashes`.
UNKNOWN = -1

_UNKNOWN_HASH = xxhash.xxh32_intdigest(b"(unknown)")

# Beyond it neighbouring whole numbers are the same float64, and different labels would become one.
_MAX_EXACT = 1 << 53


@dataclass(frozen=True, slots=True)
class BatchOrigin:
    """Where a batch starts, for messages."""

    file: Path | str
    first_row: int

    def cell(self, column: str, index: int) -> str:
        """File, column and data row, counted from 1 without the header."""
        return f"{self.file}: column {column!r}, row {self.first_row + index + 1}"


class CategoryCodes:
    """The distinct values of one column, numbered in order of appearance: one pass will do.

    `known` values come first; a book that is closed by `store` takes no others, but ignores them where it `may_ignore`.
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
        is_onehot: bool = False,
    ) -> None:
        self.column = column
        self._limit, self._remedy, self._store = limit, remedy, store
        self.may_ignore, self._is_onehot = may_ignore and is_onehot, is_onehot
        self._codes: dict[Any, int] = {}
        self._hashes = np.empty(0, np.uint32)
        self.restore(known)

    def __len__(self) -> int:
        return len(self._codes)

    @property
    def is_closed(self) -> bool:
        """Whether all values are known before the rows are read."""
        return self._store is not None

    def state(self) -> list[Any]:
        """The values in the order of their codes, for `restore`."""
        return list(self._codes)

    def restore(self, values: Sequence[Any]) -> None:
        """Start again with these values."""
        self._codes = {value: code for code, value in enumerate(values)}
        self._hashes = np.empty(0, np.uint32)

    def encode(self, cells: DistinctValues, where: BatchOrigin) -> NDArray[np.int32]:
        """The code of each row's value, (b,), new values being added; missing ones are a category of their own.

        Raises SourceError beyond the limit, or for a value that a closed book does not have, unless it ignores it: then
        the code is UNKNOWN.
        """
        # One place more, which the index -1 of missing values finds.
        table = np.zeros(len(cells.values) + 1, np.int32)
        for place, value in cells.present():
            if value not in self._codes:
                if self.may_ignore:
                    table[place] = UNKNOWN
                    continue
                if self.is_closed:
                    raise self._unknown(value, where.cell(self.column, cells.first_row(place)))
                self._codes[value] = len(self)
                if len(self) > self._limit:
                    raise SourceError(
                        f"{where.file}: column {self.column!r} has more than {self._limit} different "
                        f"values; {self._remedy_of_many()}"
                    )
            table[place] = self._codes[value]
        return table[cells.indices]

    def unseen(self, cells: DistinctValues) -> dict[int, Any]:
        """The values that the book does not have, by their place among those of the cells."""
        return {place: value for place, value in cells.present() if value not in self._codes}

    def _remedy_of_many(self) -> str:
        """A single text among the first rows makes texts of all the numbers in a column of CSV."""
        first = next(iter(self._codes))
        if isinstance(first, str) and all(map(_is_number, self._codes)):
            return f"they are numbers, like {first}, but among them is a text: correct or empty that cell"
        return self._remedy

    def _unknown(self, value: Any, place: str) -> SourceError:
        return SourceError(
            f"{place}: {value!r} is not among the {len(self)} values of {self._store}; correct it, or take --unknown "
            f"{'ignore or drop' if self._is_onehot else 'drop'}; to learn it, convert both files anew as one store and "
            "fit that"
        )

    def sorted_values(self) -> list[Any]:
        """The values in their own order, numbers by size, texts by letters, `(missing)` last; or as recorded."""
        if self.is_closed:
            return list(self._codes)
        return sorted(self._codes, key=lambda value: (value == MISSING_CATEGORY, value))

    def ranks(self) -> NDArray[np.int32]:
        """Place of each code's value among the sorted values, (len + 1,); 0 for UNKNOWN."""
        ranks = np.zeros(len(self) + 1, np.int32)
        ranks[[self._codes[value] for value in self.sorted_values()]] = np.arange(len(self), dtype=np.int32)
        return ranks

    def hashes(self) -> NDArray[np.uint32]:
        """A hash of each code's text, which unlike the code is the same in any order of the rows; (len + 1,)."""
        if len(self._hashes) <= len(self):
            known = self._hashes[:-1]
            added = [xxhash.xxh32_intdigest(str(value).encode()) for value in list(self._codes)[len(known) :]]
            self._hashes = np.concatenate([known, np.array([*added, _UNKNOWN_HASH], np.uint32)])
        return self._hashes


@dataclass(frozen=True, slots=True)
class DistinctValues:
    """The distinct values of a batch's column and the place of each row's among them, -1 where it is missing.

    rows: the number of each row within its batch, where some were left out.
    """

    values: list[Any]
    indices: NDArray[np.int32]
    rows: NDArray[np.intp] | None = None

    @classmethod
    def of(cls, cells: pa.DictionaryArray | NDArray[Any]) -> DistinctValues:
        """From an arrow dictionary or numbers; null, NaN and the empty text are missing."""
        if not isinstance(cells, pa.DictionaryArray):
            native = np.ascontiguousarray(cells.reshape(len(cells)), cells.dtype.newbyteorder("="))
            cells = pa.array(native).dictionary_encode()
        values = cells.dictionary.to_pylist()
        indices = cells.indices.cast(pa.int32()).fill_null(-1).to_numpy(zero_copy_only=False)
        absent = [
            place for place, value in enumerate(values) if value is None or value == "" or value != value
        ]
        if absent:
            indices = np.where(np.isin(indices, absent), np.int32(-1), indices)
        return cls(values, indices)

    def present(self) -> Iterator[tuple[int, Any]]:
        """Each value that a row has, by its place; a missing one is MISSING_CATEGORY, at -1."""
        counts = np.bincount(self.indices + 1, minlength=len(self.values) + 1)
        for place in (np.flatnonzero(counts) - 1).tolist():
            yield place, self.values[place] if place >= 0 else MISSING_CATEGORY

    @property
    def missing(self) -> NDArray[np.bool_] | None:
        """Which rows have no value, (b,); None when all do."""
        missing: NDArray[np.bool_] = self.indices < 0
        return missing if missing.any() else None

    def only(self, rows: NDArray[np.intp]) -> DistinctValues:
        """Of these rows alone."""
        return DistinctValues(self.values, self.indices[rows], rows)

    def first_row(self, place: int) -> int:
        """The first row of the batch, of those left, whose value is number `place`."""
        row = first_true(self.indices == place)
        return row if self.rows is None else int(self.rows[row])

    def as_integers(self, column: str, where: BatchOrigin) -> DistinctValues:
        """With whole numbers as integers; raises SourceError for any other, naming its row."""
        whole = [_whole(value) for value in self.values]
        for place, value in enumerate(whole):
            if value is None:
                raise SourceError(
                    f"{where.cell(column, self.first_row(place))}: the label is no whole number below 2^53 "
                    f"({self.values[place]}); correct it, or take --task regression"
                )
        return DistinctValues(whole, self.indices, self.rows)


def _is_number(text: str) -> bool:
    try:
        float(text)
    except ValueError:
        return text == MISSING_CATEGORY
    return True


def _whole(value: Any) -> Any:
    """The value as an integer, 0 for one that is missing; None if it is a fraction or may have lost digits."""
    if not isinstance(value, float):
        return value if value is not None else 0
    if value != value:
        return 0
    return int(value) if value.is_integer() and abs(value) < _MAX_EXACT else None
