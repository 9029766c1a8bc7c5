"""Texts of dates and times: read by a format of strptime, or as ISO 8601, all distinct texts of a column at once.

A format knows %Y %y %m %d %j %b %B %a %A %H %I %M %S %f %p %z and %%, and must match the whole text. Month and day
may have one digit where a separator stands beside them; a `.%f` or `,%f` may be absent, and has up to 9 digits, of
which 6 count. A month's name is English, short or long. A text without a day is the first of its month; %y is 1969
to 2068. `fitting_formats` says which of the common formats fit the texts of a column.

Own code, because pyarrow's strptime knows neither %f nor the end of the text, and Python's takes 8 us a text.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from functools import cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ep3stream.errors import ConfigError

_FIELDS: dict[str, tuple[str, str]] = {
    "Y": ("year", r"\d{4}"),
    "y": ("short_year", r"\d{2}"),
    "m": ("month", r"\d{1,2}"),
    "d": ("day", r"\d{1,2}"),
    "j": ("day_of_year", r"\d{1,3}"),
    "b": ("month_name", r"[A-Za-z]{3,9}\.?"),
    "B": ("month_name", r"[A-Za-z]{3,9}\.?"),
    "H": ("hour", r"\d{1,2}"),
    "I": ("hour_of_half", r"\d{1,2}"),
    "M": ("minute", r"\d{2}"),
    "S": ("second", r"\d{2}"),
    "f": ("fraction", r"\d{1,9}"),
    "p": ("half", r"[AaPp]\.?[Mm]\.?"),
    "z": ("zone", r"Z|[+-]\d{2}(?::?\d{2})?"),
}
_WEEKDAY = r"[A-Za-z]{3,9}\.?"
_NUMERIC = frozenset("YymdjHIMSf")
# Digits where another number follows or precedes without a separator.
_WIDTHS = {"m": r"\d{2}", "d": r"\d{2}", "j": r"\d{3}", "H": r"\d{2}", "I": r"\d{2}"}

_MONTHS = (
    "january", "february", "march", "april", "may", "june",
    "july", "august", "september", "october", "november", "december",
)  # fmt: skip
_NAMES = (*_MONTHS, *(name[:3] for name in _MONTHS), "sept")
_NAME_MONTHS = np.array([*range(1, 13), *range(1, 13), 9])

_ISO_TIME = r"(?P<hour>\d{2})(?::?(?P<minute>\d{2})(?::?(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?)?"
_ISO = (
    r"(?P<year>\d{4})-(?P<month>\d{2})-(?P<day>\d{2})"
    rf"(?:[ T]{_ISO_TIME} ?(?P<zone>Z|[+-]\d{{2}}(?::?\d{{2}})?)?)?"
)

_CLOCK = r"(?P<hour>\d{2}):(?P<minute>\d{2})(?::(?P<second>\d{2})(?:[.,](?P<fraction>\d{1,9}))?)?"

_MICROSECOND = 10**6
_DAY = 86400 * _MICROSECOND

# The formats that `fitting_formats` tries: dates, each alone and before each time.
_DATES = (
    "%Y-%m-%d", "%Y/%m/%d", "%Y.%m.%d", "%d.%m.%Y", "%d. %m. %Y", "%d/%m/%Y", "%m/%d/%Y", "%d-%m-%Y", "%m-%d-%Y",
    "%d/%m/%y", "%m/%d/%y", "%y/%m/%d", "%d-%m-%y", "%m-%d-%y", "%y-%m-%d",
    "%d-%b-%Y", "%d-%b-%y", "%d %b %Y", "%d %b %y", "%d. %b %Y", "%d %b, %Y", "%d/%b/%Y", "%d.%b.%Y", "%d%b%Y",
    "%b %d, %Y", "%b %d %Y", "%b-%d-%Y", "%Y-%b-%d", "%Y %b %d", "%a, %d %b %Y", "%a %d %b %Y", "%a, %b %d, %Y",
    "%a %b %d %Y", "%d.%m.%y",
)  # fmt: skip
_MONTHS_ALONE = ("%Y-%m", "%Y/%m", "%m/%Y", "%b %Y", "%b-%Y", "%Y-%b", "%b, %Y")
_TIMES = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%H:%M:%S,%f", "%I:%M %p", "%I:%M:%S %p", "%I:%M%p")
_JOINTS = (" ", "T", ", ")
_TIMES_ALONE = ("%H:%M", "%H:%M:%S", "%H:%M:%S.%f", "%H:%M:%S,%f", "%I:%M %p", "%I:%M:%S %p", "%I:%M%p")
_OTHER = (
    "%Y%m%dT%H%M%S", "%Y%m%dT%H%M%S%z", "%Y%m%d %H:%M", "%Y%m%d %H:%M:%S", "%Y-%m-%d %H:%M:%S UTC",
    "%Y-%m-%d %H:%M:%S.%f UTC", "%d%b%Y:%H:%M:%S", "%d%b%Y:%H:%M:%S.%f",
    "%d-%b-%y %I.%M.%S.%f %p", "%d-%b-%y %H.%M.%S.%f",
    "%a %b %d %H:%M:%S %Y", "%d/%b/%Y:%H:%M:%S %z", "%a, %d %b %Y %H:%M:%S %z", "%Y/%m/%d %H:%M:%S %z",
)  # fmt: skip
# A year of four digits alone does not make a date of 1203-11, the number of a part.
_PLAUSIBLE_YEARS = (1700, 2200)
_TRIED_TEXTS = 20
_LONGEST_DATE = 48
# What every common format has: three digits, and two numbers, or one beside the name of a month or half of a day.
_LEAST_DIGITS = 3
_HINT = re.compile(r"\d\D{1,5}\d|[A-Za-z]{3}\D{0,3}\d|\d\D{0,3}[A-Za-z]{3}|\d ?[APap]\.?[Mm]")


@dataclass(frozen=True, slots=True)
class DateReader:
    """Reads texts of one format as dates, times, or times of a day, by a regular expression with named fields.

    dtype: date32, timestamp[us], timestamp[us, UTC] where the format has a zone, or time64[us].
    """

    pattern: str
    dtype: pa.DataType

    @classmethod
    def of(cls, text: str) -> DateReader:
        """By a format of strptime; raises ConfigError for one that is unknown, or is neither date nor time."""
        pattern, letters = _pattern(text)
        has_time = bool(letters & set("HI"))
        has_date = bool(letters & set("Yy")) and bool(letters & set("mbBj"))
        problem = ""
        if has_time and letters & set("YymbBdj") and not has_date:
            problem = "has only a part of a date; add the year and the month"
        elif not has_time and not has_date:
            problem = "has neither a date (%Y and %m) nor a time (%H)"
        elif ("I" in letters) != ("p" in letters):
            problem = "has one of %I and %p; both belong together"
        if problem:
            raise ConfigError(f"the format {text!r} of a date {problem}; write it like %d.%m.%Y or %H:%M:%S")
        if not has_date:
            return cls(pattern, pa.time64("us"))
        if not has_time:
            return cls(pattern, pa.date32())
        return cls(pattern, pa.timestamp("us", "UTC" if "z" in letters else None))

    @classmethod
    def iso(cls, dtype: pa.DataType) -> DateReader | None:
        """ISO 8601 for columns of this type, like 2026-03-01T10:30:15.25Z; None if it is no date or time."""
        if pa.types.is_time(dtype):
            return cls(f"^{_CLOCK}$", pa.time64("us"))
        if pa.types.is_date(dtype):
            return cls(f"^{_ISO}$", pa.date32())
        if pa.types.is_timestamp(dtype):
            return cls(f"^{_ISO}$", pa.timestamp("us", "UTC" if dtype.tz else None))
        return None

    def read(self, texts: pa.Array) -> pa.Array:
        """The texts as values of `dtype`, null for null and for a text that is no such date, (b,)."""
        found = pc.extract_regex(texts, self.pattern)
        fields = {field.name: found.field(field.name) for field in found.type}
        good = pc.is_valid(found).to_numpy(zero_copy_only=False)
        numbers, good = _numbers(fields, good)
        days, good = _days(numbers, good) if "year" in numbers else (np.zeros(len(texts), np.int64), good)
        none = np.zeros(len(texts), np.int64)
        hour, minute, second = (numbers.get(name, none) for name in ("hour", "minute", "second"))
        good = good & (hour < 24) & (minute < 60) & (second < 60)
        micros = ((hour * 60 + minute) * 60 + second) * _MICROSECOND + numbers.get("fraction", none)
        if pa.types.is_time(self.dtype):
            return _array(micros, good, pa.time64("us"))
        has_zone = pa.types.is_timestamp(self.dtype) and self.dtype.tz is not None
        if "zone" in fields:
            offset, is_stated = _zone(fields["zone"])
            good = good & (is_stated == has_zone)
            micros = micros - offset
        if pa.types.is_date(self.dtype):  # Midnight is a date too, as in 2026-03-01 00:00:00.
            return _array(days.astype(np.int32), good & (micros == 0), pa.date32())
        return _array(days * _DAY + micros, good, self.dtype)


def fitting_formats(texts: pa.Array, is_enough: Callable[[int, int], bool]) -> list[tuple[str, pa.Array]]:
    """The common formats that fit the distinct texts (k,), with the values read; the best alone if it is the best.

    is_enough(n_read, k) says whether so many texts read are enough for a format. Formats that differ in whether
    digits follow the seconds count as one; several in the answer mean that the texts alone do not tell.
    """
    tried = [text for text in texts[:_TRIED_TEXTS].to_pylist() if text is not None]

    def fits(matches: Callable[[str], Any]) -> bool:
        return is_enough(sum(matches(text) is not None for text in tried), len(tried))

    if not fits(_hint):
        return []
    n_texts = len(texts) - texts.null_count
    found: dict[str, tuple[int, str, pa.Array]] = {}
    for text_format in _common_formats(lambda date: fits(_matcher(date, is_whole=False))):
        if not fits(_matcher(text_format)):
            continue
        values = DateReader.of(text_format).read(texts)
        n_read = len(values) - values.null_count
        if is_enough(n_read, n_texts) and _is_plausible(text_format, values, texts):
            plain = re.sub(r"[.,]%f", "", text_format)
            if plain not in found or n_read > found[plain][0]:
                found[plain] = (n_read, text_format, values)
    most = max((n_read for n_read, *_ in found.values()), default=0)
    return [(text_format, values) for n_read, text_format, values in found.values() if n_read == most]


def _is_plausible(text_format: str, values: pa.Array, texts: pa.Array) -> bool:
    if text_format.startswith("%d.%m.%y"):  # 1.2.10 is rather a version.
        return (
            pc.all(pc.match_substring_regex(texts.filter(pc.is_valid(values)), r"^\d\d\.\d\d\.")).as_py()
            is True
        )
    if text_format not in _MONTHS_ALONE:
        return True
    years = pc.min_max(pc.year(values)).as_py()
    return bool(_PLAUSIBLE_YEARS[0] <= years["min"] and years["max"] <= _PLAUSIBLE_YEARS[1])


def _hint(text: str) -> re.Match[str] | None:
    is_long_enough = sum(map(str.isdecimal, text)) >= _LEAST_DIGITS
    return _HINT.search(text) if is_long_enough and len(text) <= _LONGEST_DATE else None


def _common_formats(may_begin: Callable[[str], bool]) -> Iterator[str]:
    """The common formats but for those with a date of which `may_begin` says that no text begins with one."""
    for date in filter(may_begin, _DATES):
        yield date
        for joint in _JOINTS:
            yield from (f"{date}{joint}{time}" for time in _TIMES)
    yield from (*_MONTHS_ALONE, *_TIMES_ALONE, *_OTHER)


@cache
def _matcher(text_format: str, *, is_whole: bool = True) -> Callable[[str], re.Match[str] | None]:
    """What matches a text of this format, or with is_whole=False one that begins so; to compile it takes a ms."""
    pattern = _pattern(text_format)[0]
    return re.compile(pattern if is_whole else pattern.removesuffix("$")).match


@cache
def _pattern(text: str) -> tuple[str, frozenset[str]]:
    """A format as a regular expression, and the letters of its fields; raises ConfigError."""
    parts = re.findall(r"%.|[^%]+|%$", text, re.DOTALL)
    letters = [part[1:] for part in parts if part.startswith("%") and part != "%%"]
    for letter in letters:
        if letter not in _FIELDS and letter not in ("a", "A"):
            known = " ".join(f"%{name}" for name in (*_FIELDS, "a", "A"))
            raise ConfigError(f"the format {text!r} has %{letter}, which is none of {known}; correct it")
    names = [_FIELDS[letter][0] for letter in letters if letter in _FIELDS]
    if len(set(names)) < len(names) or {"year", "short_year"} <= set(names):
        raise ConfigError(f"the format {text!r} has a part twice; name each once")
    pattern = ""
    for place, part in enumerate(parts):
        letter = part[1:] if part.startswith("%") and part != "%%" else ""
        if not letter:
            pattern += r"\s+" if part == " " else re.escape(part.replace("%%", "%")).replace(r"\ ", r"\s+")
        elif letter in ("a", "A"):
            pattern += _WEEKDAY
        else:
            name, digits = _FIELDS[letter]
            beside = (parts[place - 1] if place else "", parts[place + 1] if place + 1 < len(parts) else "")
            if any(part.startswith("%") and part[1:] in _NUMERIC for part in beside):
                digits = _WIDTHS.get(letter, digits)
            pattern += f"(?P<{name}>{digits})"
    # The fraction of a second is left out where it is 0, by Python's str of a datetime among others.
    pattern = re.sub(r"(\\?[.,])(\(\?P<fraction>.*?\))", r"(?:\1\2)?", pattern)
    return f"^{pattern}$", frozenset(letters)


def _numbers(
    fields: dict[str, pa.Array], good: NDArray[np.bool_]
) -> tuple[dict[str, NDArray[np.int64]], NDArray[np.bool_]]:
    """The fields as numbers, 0 where there is none: year, month, day, hour, minute, second, fraction in us."""
    numbers: dict[str, NDArray[np.int64]] = {}
    for name, texts in fields.items():
        if name in ("zone", "half", "month_name"):
            continue
        digits = pc.utf8_slice_codeunits(pc.utf8_rpad(texts, 6, "0"), 0, 6) if name == "fraction" else texts
        empty = pc.or_kleene(pc.equal(texts, ""), pc.is_null(texts))
        numbers[name] = pc.if_else(empty, "0", digits).cast(pa.int64()).to_numpy(zero_copy_only=False)
    if "short_year" in numbers:
        short = numbers.pop("short_year")
        numbers["year"] = short + np.where(short < 69, 2000, 1900)
    if "month_name" in fields:
        names = pc.utf8_lower(pc.utf8_rtrim(fields["month_name"], "."))
        places = pc.index_in(names, pa.array(_NAMES)).fill_null(-1).to_numpy(zero_copy_only=False)
        good = good & (places >= 0)
        numbers["month"] = _NAME_MONTHS[places]
    if "hour_of_half" in numbers:
        hour = numbers.pop("hour_of_half")
        good = good & (hour >= 1) & (hour <= 12)
        is_pm = pc.starts_with(pc.utf8_lower(fields["half"]), "p").fill_null(False)
        numbers["hour"] = hour % 12 + 12 * is_pm.to_numpy(zero_copy_only=False)
    return numbers, good


def _days(
    numbers: dict[str, NDArray[np.int64]], good: NDArray[np.bool_]
) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Days since 1970-01-01 of the dates that exist, (b,), and which do."""
    year = numbers["year"]
    if "day_of_year" in numbers:
        first = (year - 1970).astype("datetime64[Y]")
        dates = first.astype("datetime64[D]") + (numbers["day_of_year"] - 1)
        good = good & (dates.astype("datetime64[Y]") == first)
        return dates.astype(np.int64), good
    month, day = numbers["month"], numbers.get("day", np.ones_like(year))
    first_of_month = ((year - 1970) * 12 + month - 1).astype("datetime64[M]")
    dates = first_of_month.astype("datetime64[D]") + (day - 1)
    good = good & (month >= 1) & (month <= 12) & (dates.astype("datetime64[M]") == first_of_month)
    return dates.astype(np.int64), good


def _zone(zone: pa.Array) -> tuple[NDArray[np.int64], NDArray[np.bool_]]:
    """Microseconds east of UTC, and whether a zone is stated, (b,)."""
    texts = zone.dictionary_encode()
    offsets = np.array([*map(_zone_offset, texts.dictionary.to_pylist()), 0], np.int64)
    stated = np.array([*map(bool, texts.dictionary.to_pylist()), False])
    places = texts.indices.fill_null(-1).to_numpy(zero_copy_only=False)
    return offsets[places], stated[places]


def _zone_offset(text: str) -> int:
    if text in ("", "Z"):
        return 0
    digits = text[1:].replace(":", "").ljust(4, "0")
    minutes = int(digits[:2]) * 60 + int(digits[2:])
    return (-minutes if text[0] == "-" else minutes) * 60 * _MICROSECOND


def _array(values: NDArray[Any], good: NDArray[np.bool_], dtype: pa.DataType) -> pa.Array:
    return pa.array(values, mask=~good).view(dtype)
