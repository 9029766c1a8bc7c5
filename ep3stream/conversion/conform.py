"""Values of one file as the kind that a column has in the other files, or in the store that is followed.

Parts of a table differ in their types: a column of nulls has none, pandas makes numbers of booleans with gaps, one
writer says date where another says midnight. What is the same value is taken, and anything else is refused.
"""

from __future__ import annotations

from collections.abc import Mapping

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from ep3stream.conversion.columns import family_of, read_type
from ep3stream.errors import SourceError
from ep3stream.formats.source import BatchOrigin, Family

# The kinds that a column may hold beside its own, if `conformed` can tell that the values are the same.
_CONVERTIBLE: Mapping[Family, tuple[Family, ...]] = {
    "number": ("integer", "boolean", "text"),
    "integer": ("number", "boolean", "text"),
    "boolean": ("integer", "number", "text"),
    "date": ("timestamp", "text"),
    "timestamp": ("date", "text"),
    "zoned timestamp": ("text",),
    "time of day": ("text",),
    "duration": (),
    "text": (),
}
_TIMES: tuple[Family, ...] = ("timestamp", "zoned timestamp")


def family_or_none(dtype: pa.DataType, where: str) -> Family | None:
    """The kind of values that an arrow type holds, None for the type of nulls; raises SourceError as `family_of`."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    return None if pa.types.is_null(dtype) else family_of(dtype, where, "convert it")


def fits(found: Family | None, wanted: Family, is_category: bool) -> bool:
    """Whether values of the kind `found` may be read as those of a column of the kind `wanted`; None are nulls.

    A category is compared value by value, so that it may come as any kind.
    """
    return found is None or found == wanted or is_category or found in _CONVERTIBLE[wanted]


def misfit(found: pa.DataType, wanted: Family, where: str) -> str:
    """Why `found` is no type for a column of the kind `wanted`, which `where` says who has, and what to do."""
    if pa.types.is_timestamp(found) and wanted in _TIMES:
        zone = "without" if found.tz is None else "with"
        other = "with" if found.tz is None else "without"
        return (
            f"holds times {zone} a time zone but has those {other} one in {where}; "
            f"{'state the zone' if found.tz is None else 'make them local times'} in the file"
        )
    return f"holds {found} but was {wanted} for {where}; convert it to that type"


def wider(one: pa.DataType, other: pa.DataType, where: str) -> pa.DataType:
    """The type of a column of which one part has the one type and another part the other; `one` if they differ."""
    try:
        first, second = family_or_none(one, where), family_or_none(other, where)
    except SourceError:
        return one  # It is refused later, unless the column is left out.
    if first is None:
        return other
    if second is None or first == second:
        finer = (pa.uint64(), *(pa.timestamp("ns", zone) for zone in {getattr(other, "tz", None)}))
        return other if other in finer and not pa.types.is_dictionary(one) else one
    if {first, second} == {"integer", "number"}:
        return one if first == "number" else other
    return pa.timestamp("us") if (first, second) == ("date", "timestamp") else one


def conformed(
    rows: pa.RecordBatch, wanted: Mapping[str, Family], categories: frozenset[str], where: BatchOrigin
) -> pa.RecordBatch:
    """The rows with each column of `wanted` as values of that kind; raises SourceError, which names column and row.

    categories: the columns that may hold any kind.
    """
    columns = list(rows.columns)
    for name, family in wanted.items():
        index = rows.schema.get_field_index(name)
        found = family_or_none(columns[index].type, name)
        columns[index] = _without_views(columns[index])
        if found is None:
            columns[index] = pa.nulls(rows.num_rows, read_type(family))
        elif name not in categories and found != family and {found, family} != {"integer", "number"}:
            columns[index] = _as_family(columns[index], found, family, name, where)
    return pa.record_batch(columns, names=rows.schema.names)


def _without_views(values: pa.Array) -> pa.Array:
    """A dictionary of string views, as of polars' categories, as one of strings: arrow decodes no other."""
    dtype = values.type
    if pa.types.is_dictionary(dtype) and dtype.value_type == pa.string_view():
        return values.cast(pa.dictionary(dtype.index_type, pa.string()))
    return values


def _as_family(values: pa.Array, found: Family, family: Family, name: str, where: BatchOrigin) -> pa.Array:
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    target = read_type(family)
    if family == "boolean":
        return _as_booleans(values, name, where)
    if found == "text":
        return _parsed(values, target, name, where)
    if (found, family) == ("timestamp", "date"):
        dates = pc.cast(values, target, safe=False)
        _require(pc.equal(dates.cast(values.type), values), values, "is no midnight, but a date", name, where)
        return dates
    # Booleans become numbers, dates midnights.
    return values.cast(pa.uint8()).cast(target) if found == "boolean" else values.cast(target)


def _as_booleans(values: pa.Array, name: str, where: BatchOrigin) -> pa.Array:
    numbers = values.cast(pa.float64())
    if isinstance(numbers, pa.FloatingPointArray):
        numbers = pc.if_else(pc.is_nan(numbers), None, numbers)
    is_flag = pc.or_(pc.equal(numbers, 0.0), pc.equal(numbers, 1.0))
    _require(is_flag, values, "is neither 0 nor 1, but true or false", name, where)
    return pc.equal(numbers, 1.0)


def _parsed(values: pa.Array, dtype: pa.DataType, name: str, where: BatchOrigin) -> pa.Array:
    """Texts as dates or times, with the empty text as null."""
    texts = values.cast(pa.string())
    texts = pc.if_else(pc.equal(texts, ""), None, texts)
    try:
        return texts.cast(dtype)
    except pa.ArrowInvalid:
        read = np.array([_is_read(text, dtype) for text in texts])
        _require(pa.array(read), values, f"is not written as {dtype} is", name, where)
        raise


def _is_read(text: pa.Scalar, dtype: pa.DataType) -> bool:
    try:
        text.cast(dtype)
    except pa.ArrowInvalid:
        return False
    return True


def _require(holds: pa.Array, values: pa.Array, said: str, name: str, where: BatchOrigin) -> None:
    """Raises SourceError, which names the row, where `holds` is false; null holds."""
    wrong = np.flatnonzero(~pc.fill_null(holds, True).to_numpy(zero_copy_only=False))
    if len(wrong):
        row = int(wrong[0])
        value = values[row]
        if pa.types.is_timestamp(value.type):  # Without pandas there are no nanoseconds in Python.
            value = value.cast(pa.timestamp("us", value.type.tz), safe=False)
        raise SourceError(f"{where.cell(name, row)}: {value.as_py()!s:.60} {said} is asked for; correct it")
