"""Texts that are probably not meant as categories: numbers and dates in a notation of their own, identifiers."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ep3stream.data.conversion.codebook import MISSING_CATEGORY

_NUMBER = re.compile(r"[-+($€£¥]*\s*[\d.,']*\d[\d.,']*\s*[)%€$£¥]?")
_DATE = re.compile(r"\d{1,4}[./-]\d{1,2}[./-]\d{1,4}([ T]\d{1,2}:\d{2}.*)?")
_LEAST_VALUES = 10
_LEAST_IDENTIFIERS = 50


def doubt_about(column: str, values: Sequence[Any], n_rows: int) -> str | None:
    """What to tell of a category column with these values in n rows, if it looks like something else; None if not."""
    texts = [value for value in values if isinstance(value, str) and value != MISSING_CATEGORY]
    if len(texts) < _LEAST_VALUES:
        return None
    begin = f"column {column!r} is taken as {len(texts)} categories, but"
    dates, other = _parted(_DATE, texts)
    if dates:
        return f"{begin} {_shown(dates, other)} look like dates; write them like 2024-12-31"
    numbers, other = _parted(_NUMBER, texts)
    if numbers:
        return f"{begin} {_shown(numbers, other)} look like numbers; write them like 1234.5"
    if len(texts) >= _LEAST_IDENTIFIERS and 2 * len(texts) > n_rows:
        return (
            f"{begin} there are only {n_rows} rows; if it is an identifier, leave it out with --drop {column}"
        )
    return None


def _parted(pattern: re.Pattern[str], texts: Sequence[str]) -> tuple[list[str], list[str]]:
    """Those that match and those that do not, if nearly all do; nothing else."""
    other = [text for text in texts if pattern.fullmatch(text.strip()) is None]
    if 10 * len(other) > len(texts):
        return [], []
    return [text for text in texts if text not in set(other)], other


def _shown(matching: Sequence[str], other: Sequence[str]) -> str:
    but = f" (not {', '.join(map(repr, other[:3]))})" if other else ""
    return f"values such as {matching[0]!r}{but}"
