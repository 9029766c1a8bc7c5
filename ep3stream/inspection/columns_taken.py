"""What a conversion took the columns of a table for, in one line."""

from __future__ import annotations

import re
from collections.abc import Iterable, Mapping, Sequence
from typing import Any

_MAX_NAMES = 6
_MAX_CLASSES = 3
_NAME_WIDTH = 20


def columns_taken(record: Mapping[str, Any], class_names: Sequence[str] | None) -> str:
    """`12 numbers, 2 categories (carrier 16, origin 3), 1 date (when -> days, month); target delay: number`.

    record: the columns as the manifest has them. Empty for arrays, whose columns have no names, and for predictions.
    """
    columns = [one for one in record.get("columns", ()) if one["kind"] != "indicator"]
    if all(re.fullmatch(r"x\d+", one.get("source", one["name"])) for one in columns):
        return ""
    n_numbers = sum(one["kind"] == "numeric" and "part" not in one for one in columns)
    categories = [
        f"{_short(one['name'])} {len(one['values']):,}"
        for one in columns
        if one["kind"] == "category" and "part" not in one
    ]
    pieces = [
        _counted(n_numbers, "number", "numbers", ()),
        _counted(len(categories), "category", "categories", categories),
        _counted(*_dates(columns, record.get("date_formats", {}))),
    ]
    target = record.get("target", "")
    names = [target] if isinstance(target, str) else target
    what = "number" if len(names) == 1 else "numbers"
    if class_names is not None:
        what = _counted(len(class_names), "class", "classes", list(map(_short, class_names)), _MAX_CLASSES)
    return f"columns: {', '.join(filter(None, pieces))}; target {_listed(map(_short, names))}: {what}"


def _dates(
    columns: Iterable[Mapping[str, Any]], formats: Mapping[str, str]
) -> tuple[int, str, str, Sequence[str]]:
    """The arguments of `_counted` for the dates: each with its parts, and its format where it has one."""
    parts: dict[str, list[str]] = {}
    for one in columns:
        if "part" in one:
            parts.setdefault(one["source"], []).append(one["part"])
    shown = [
        f"{_short(name)}{f' as {formats[name]}' if name in formats else ''} -> {', '.join(of_name)}"
        for name, of_name in parts.items()
    ]
    return len(shown), "date", "dates", shown


def _counted(count: int, one: str, many: str, shown: Sequence[str], most: int = _MAX_NAMES) -> str:
    if not count:
        return ""
    return f"{count:,} {one if count == 1 else many}" + (f" ({_listed(shown, most)})" if shown else "")


def _listed(texts: Iterable[str], most: int = _MAX_NAMES) -> str:
    every = list(texts)
    more = [f"and {len(every) - most:,} more"] if len(every) > most else []
    return ", ".join([*every[:most], *more])


def _short(name: str) -> str:
    return name if len(name) <= _NAME_WIDTH else f"{name[: _NAME_WIDTH - 3]}..."
