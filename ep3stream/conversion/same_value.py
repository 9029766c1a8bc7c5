"""Whether two cells say the same category or label, though they are written in other ways.

A later file may have 1.0 where the store has 1, or the text `1` for the number: pandas makes floats of integers
with gaps, and CSV has texts alone. The exact text decides first. Otherwise it is the one known value that is the
same number, or the same date; if two known values are, as with `1` and `01`, the cell is none of them.
"""

from __future__ import annotations

import datetime as dt
import re
from collections import defaultdict
from collections.abc import Hashable, Iterable, Iterator
from decimal import Decimal
from typing import Any

import numpy as np

_NUMBER = re.compile(r"[-+]?(\d+\.?\d*|\.\d+)([eE][-+]?\d{1,4})?")
_DATE = re.compile(r"\d{4}-\d\d-\d\d([ T]\d\d:\d\d(:\d\d(\.\d{1,6}0*)?)?(Z|[-+]\d\d:?\d\d)?)?")
_FLAGS = {"true": Decimal(1), "false": Decimal(0)}


class KnownValues:
    """The values of a closed column, found by what they say."""

    def __init__(self, values: Iterable[Any]) -> None:
        self._by_text: dict[str, Any] = {}
        self._by_meaning: defaultdict[Hashable, list[Any]] = defaultdict(list)
        for value in values:
            self._by_text[str(value)] = value
            for meaning in set(_meanings(value)):
                self._by_meaning[meaning].append(value)

    def find(self, value: Any) -> Any | None:
        """The known value that the cell says; None if it is none of them, or may be several."""
        text = str(value)
        if text in self._by_text:
            return self._by_text[text]
        found = {
            id(known): known for meaning in _meanings(value) for known in self._by_meaning.get(meaning, ())
        }
        return next(iter(found.values())) if len(found) == 1 else None


def _meanings(value: Any) -> Iterator[Hashable]:
    """The numbers and the instant that a cell may stand for."""
    if isinstance(value, str):
        text = value.strip()
        if _NUMBER.fullmatch(text):
            yield Decimal(text)
        elif text.lower() in _FLAGS:
            yield _FLAGS[text.lower()]
        elif _DATE.fullmatch(text):
            yield from _instant(text)
    elif isinstance(value, bool | int | Decimal):
        yield Decimal(value)
    elif isinstance(value, float) and np.isfinite(value):
        yield Decimal(repr(value))
        # A float32, which has fewer digits where it is written as text.
        short = np.float32(value) if abs(value) < np.finfo(np.float32).max else np.float32(0)
        if float(short) == value:
            yield Decimal(str(short))


def _instant(text: str) -> Iterator[Hashable]:
    fraction = re.sub(r"(\.\d{6})0+", r"\1", text)
    try:
        instant = dt.datetime.fromisoformat(fraction)
    except ValueError:
        return
    yield instant if instant.tzinfo is None else instant.astimezone(dt.UTC)
