"""The parts of dates and times, such as month and hour, as numbers or codes, and durations as seconds."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ep3stream.config import DatePart

# The parts that may be stored as codes, and the value that each code stands for.
CODED_PARTS: dict[DatePart, tuple[int, ...]] = {
    "month": tuple(range(1, 13)),
    "weekday": tuple(range(7)),
    "hour": tuple(range(24)),
}

# In microseconds.
_SECOND = 10**6
_MINUTE = 60 * _SECOND
_HOUR = 60 * _MINUTE
_DAY = 24 * _HOUR
_WEEKDAY_OF_DAY_0 = 3  # 1970-01-01 was a Thursday; Monday is 0.

# Below this float64 holds every whole number.
_FLOAT64_WHOLE = 2**53


@dataclass(frozen=True, slots=True)
class Times:
    """The dates or times of a column, (b,), taken apart once for all of its parts.

    instants: microseconds since 1970-01-01, or since midnight for times of day; 0 where one is missing. days: the whole
    days among them. within: the microseconds since midnight. missing: which are missing, None if none is.
    """

    instants: NDArray[Any]
    days: NDArray[Any]
    within: NDArray[Any]
    missing: NDArray[np.bool_] | None

    @classmethod
    def of(cls, values: pa.Array) -> Times:
        """By an array of dates, instants (those with a time zone count in UTC) or times of day."""
        if pa.types.is_time(values.type):
            within, missing = _microseconds(values, pa.time64("us"))
            return cls(within, np.zeros_like(within), within, missing)
        instants, missing = _microseconds(values, pa.timestamp("us", getattr(values.type, "tz", None)))
        days = instants // _DAY
        return cls(instants, days, instants - days * _DAY, missing)

    def part(self, part: DatePart, *, as_code: bool = False) -> NDArray[Any]:
        """One number per date or time, (b,), as float32 if it is whole, else float64; NaN if it is missing.

        days: since 1970-01-01, with the fraction; yearday: 1-366; month: 1-12; day: 1-31; weekday: 0 (Monday) to 6;
        hour: 0 to 24, minute: 0 to 1440, of the day, both with the fraction. as_code: the code of a part of
        CODED_PARTS instead, from 0 on.
        """
        found: NDArray[Any]
        if part == "days":
            found = self.instants / _DAY
        elif part == "minute":
            found = self.within / _MINUTE
        elif part == "hour":
            found = (self.within // _HOUR).astype(np.float32) if as_code else self.within / _HOUR
        else:
            found = self._of_calendar(part)
            if as_code:
                found -= CODED_PARTS[part][0]
        if self.missing is not None:
            found[self.missing] = np.nan
        return found

    def _of_calendar(self, part: DatePart) -> NDArray[np.float32]:
        """The part, (b,), looked up in a table of all days between the first and the last where that is shorter."""
        if not len(self.days):
            return np.empty(0, np.float32)
        first, last = int(self.days.min()), int(self.days.max())
        if last - first >= len(self.days):
            return _calendar(self.days, part)
        table = _calendar(np.arange(first, last + 1), part)
        return table.take((self.days - first).astype(np.intp, copy=False))


def seconds(durations: pa.Array) -> NDArray[np.float64]:
    """Durations of any unit in seconds, (b,), NaN where one is missing."""
    counts, missing = _microseconds(durations, pa.duration("us"))
    found: NDArray[np.float64] = counts / _SECOND
    if missing is not None:
        found[missing] = np.nan
    return found


def _calendar(days: NDArray[Any], part: DatePart) -> NDArray[np.float32]:
    """A part of the dates that are so many days after 1970-01-01, (k,)."""
    dates = days.astype("datetime64[D]")
    months = dates.astype("datetime64[M]")
    numbers: NDArray[Any]
    if part == "weekday":
        numbers = np.mod(days + _WEEKDAY_OF_DAY_0, 7)
    elif part == "month":
        numbers = months.astype(np.int64) % 12 + 1
    else:
        begin = dates.astype("datetime64[Y]") if part == "yearday" else months
        numbers = (dates - begin).astype(np.int64) + 1
    return numbers.astype(np.float32)


def _microseconds(values: pa.Array, dtype: pa.DataType) -> tuple[NDArray[Any], NDArray[np.bool_] | None]:
    """Times of any unit in microseconds, (b,), 0 where one is missing, and which are missing.

    They are whole numbers up to 2^53 us = 285 years, and beyond float64, exact to 1 ms.
    """
    # Nanoseconds lose digits, which arrow must be told is meant.
    counts = pc.cast(values, dtype, safe=getattr(values.type, "unit", None) != "ns").view(pa.int64())
    missing = None
    if counts.null_count:
        missing = counts.is_null().to_numpy(zero_copy_only=False)
        counts = counts.fill_null(0)
    array: NDArray[Any] = counts.to_numpy()
    if len(array) and max(-int(array.min()), int(array.max())) > _FLOAT64_WHOLE:
        array = array.astype(np.float64)
    return array, missing
