"""The types of table columns, and how their cells become numbers, parts of dates, or categories."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ep3stream.config import DatePart
from ep3stream.data.conversion.batch import Family
from ep3stream.errors import SourceError

# What a date or time gives unless --dates says otherwise; `days` are days since 1970-01-01 with their fraction.
DEFAULT_PARTS: tuple[DatePart, ...] = ("days", "month", "weekday", "hour")
_PARTS: dict[Family, tuple[DatePart, ...]] = {
    "date": ("days", "month", "day", "weekday"),
    "timestamp": ("days", "month", "day", "weekday", "hour"),
    "zoned timestamp": ("days", "month", "day", "weekday", "hour"),
    "time of day": ("hour",),
}
_READ_TYPES: dict[Family, pa.DataType] = {
    "number": pa.float64(),
    "integer": pa.int64(),
    "boolean": pa.bool_(),
    "text": pa.string(),
    "date": pa.date32(),
    "timestamp": pa.timestamp("us"),
    "zoned timestamp": pa.timestamp("us", "UTC"),
    "time of day": pa.time64("us"),
    "duration": pa.duration("us"),
}
_TESTS: tuple[tuple[Callable[[pa.DataType], bool], Family], ...] = (
    (pa.types.is_boolean, "boolean"),
    (pa.types.is_integer, "integer"),
    (pa.types.is_floating, "number"),
    (pa.types.is_decimal, "number"),
    (pa.types.is_string, "text"),
    (pa.types.is_large_string, "text"),
    (lambda dtype: bool(dtype == pa.string_view()), "text"),
    (pa.types.is_date, "date"),
    (pa.types.is_time, "time of day"),
    (pa.types.is_duration, "duration"),
    (lambda dtype: pa.types.is_timestamp(dtype) and dtype.tz is None, "timestamp"),
    (pa.types.is_timestamp, "zoned timestamp"),
)
_SECOND = 10**6  # in microseconds
_HOUR = 3600 * _SECOND
_DAY = 24 * _HOUR
_WEEKDAY_OF_DAY_0 = 3  # 1970-01-01 was a Thursday; Monday is 0.


def family_of(dtype: pa.DataType, where: str) -> Family:
    """What kind of values the type holds; `where` names file and column in the SourceError for any other."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if pa.types.is_null(dtype):
        raise SourceError(f"{where} is empty from row 1 on; fill it in or leave it out with --drop")
    for test, family in _TESTS:
        if test(dtype):
            return family
    raise SourceError(
        f"{where} holds {dtype}, neither numbers nor UTF-8 text; convert it, or leave it out with --drop"
    )


def read_type(family: Family, dtype: pa.DataType | None = None) -> pa.DataType:
    """The type that columns of the family are read as where the file states none, `dtype` being inferred."""
    if dtype is not None and (
        dtype == pa.uint64() or dtype == pa.timestamp("ns", getattr(dtype, "tz", None))
    ):
        return dtype  # Beyond int64, or with more digits than microseconds have.
    return _READ_TYPES[family]


def parts_of(family: Family, wanted: Sequence[DatePart]) -> tuple[DatePart, ...]:
    """The features of a date or time among those wanted that its family has; none for other families."""
    fitting = _PARTS.get(family, ())
    return tuple(part for part in wanted or DEFAULT_PARTS if part in fitting)


def numbers(values: pa.Array) -> NDArray[Any]:
    """The values with their own precision, durations in seconds, (b,); missing ones become NaN."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    elif pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
    elif pa.types.is_duration(values.type):
        return _microseconds(values, pa.duration("us")) / _SECOND
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def date_part(values: pa.Array, part: DatePart) -> NDArray[np.float64]:
    """One number per date or time, (b,), NaN where it is missing; instants with a zone count in UTC.

    days: since 1970-01-01, with the fraction; month: 1-12; day: 1-31; weekday: 0 (Monday) to 6;
    hour: 0 to 24, with the fraction.
    """
    if pa.types.is_time(values.type):
        return _microseconds(values, pa.time64("us")) / _HOUR
    instants = _microseconds(values, pa.timestamp("us", getattr(values.type, "tz", None)))
    if part == "days":
        return instants / _DAY
    days: NDArray[np.float64] = np.floor_divide(instants, _DAY)
    if part == "hour":
        return (instants - days * _DAY) / _HOUR
    if part == "weekday":
        return np.mod(days + _WEEKDAY_OF_DAY_0, 7)
    known = ~np.isnan(days)
    dates = np.where(known, days, 0).astype("datetime64[D]")
    months = dates.astype("datetime64[M]")
    found = months.astype(np.int64) % 12 + 1 if part == "month" else (dates - months).astype(np.int64) + 1
    return np.where(known, found, np.nan)


def categories(values: pa.Array, dtype: pa.DataType) -> pa.DictionaryArray:
    """The distinct values, numbers as `dtype` and all others as its text, and each row's place among them."""
    if pa.types.is_dictionary(values.type):
        values = values.dictionary_decode()
    values = values.cast(dtype)
    is_number = pa.types.is_integer(dtype) or pa.types.is_floating(dtype)
    return (values if is_number else values.cast(pa.string())).dictionary_encode()


def _microseconds(values: pa.Array, dtype: pa.DataType) -> NDArray[np.float64]:
    """Of times of any unit, (b,), exact to 2^53 us = 285 years from 1970 and to 1 ms for any date."""
    counts = pc.cast(values, dtype, safe=False) if _is_finer(values.type) else values.cast(dtype)
    array: NDArray[Any] = counts.view(pa.int64()).to_numpy(zero_copy_only=False)
    return array.astype(np.float64)


def _is_finer(dtype: pa.DataType) -> bool:
    """Whether casting to microseconds drops digits, which arrow must be told is meant."""
    return getattr(dtype, "unit", None) == "ns"
