"""Counts of the values that a file had and the store that it was converted like had not, as a manifest records them."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ep3stream.config import Unknown

# Unseen values named per column; the others are counted as one, so that a column of identifiers takes no memory.
_MAX_NAMED = 20
_OTHERS = "(others)"

# Unseen values per column in a message.
_MAX_SHOWN = 3

_CONSEQUENCE: Mapping[Unknown, str] = {
    "error": "",
    "ignore": "they count as none of the known ones",
    "drop": "those rows are left out",
}


class UnseenValues:
    """How many rows have each unseen category or class, by column.

    A value is unseen if a later file has it and the store that the file is converted like has not.
    """

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = {}

    @classmethod
    def of(cls, content: Any) -> UnseenValues:
        """From the JSON of `to_json`; anything else that a manifest may hold counts as no unseen values."""
        made = cls()
        for column, values in content.items() if isinstance(content, Mapping) else ():
            counts = values.items() if isinstance(values, Mapping) else ()
            made._rows[column] = Counter({value: n for value, n in counts if type(n) is int and n > 0})
        return made

    def __bool__(self) -> bool:
        return bool(self._rows)

    def add(self, column: str, value: Any, n_rows: int) -> None:
        """Count n more rows with this unseen value in the column."""
        if not n_rows:
            return
        values = self._rows.setdefault(column, Counter())
        name = str(value)
        values[name if name in values or len(values) < _MAX_NAMED else _OTHERS] += n_rows

    def to_json(self) -> dict[str, dict[str, int]]:
        """The numbers of rows as JSON, by column and value."""
        return {column: dict(values) for column, values in self._rows.items()}

    def sentence(self, unknown: Unknown, store: object) -> str:
        """The counts in words, and what becomes of the values under this setting of `unknown`."""
        return f"values that {store} does not have: {self}; {_CONSEQUENCE[unknown]}"

    def __str__(self) -> str:
        """The most frequent values of each column."""
        columns = []
        for column, values in self._rows.items():
            named = [f"{value!r} {n}" for value, n in values.most_common(_MAX_SHOWN)]
            more = ", ..." * (len(values) > _MAX_SHOWN)
            columns.append(f"{column!r} in {values.total()} rows ({', '.join(named)}{more})")
        return "; ".join(columns)
