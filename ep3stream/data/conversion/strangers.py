"""Values of categories and classes that a later file has and the store it is converted like has not, counted."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping
from typing import Any

from ep3stream.config import Unknown

# By column; what comes after is counted as one, so that a column of identifiers takes no memory.
_MAX_NAMED = 20
_OTHERS = "(others)"
_MAX_TOLD = 3
_CONSEQUENCE: Mapping[Unknown, str] = {
    "error": "",
    "ignore": "none of its features is set there",
    "drop": "those rows are left out",
}


class Strangers:
    """How many rows have each such value, by column."""

    def __init__(self) -> None:
        self._rows: dict[str, Counter[str]] = {}

    @classmethod
    def of(cls, content: Any) -> Strangers:
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
