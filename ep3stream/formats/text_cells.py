"""Columns of texts turned into numbers, dates or truth values, cell by cell: what pyarrow's parser refuses.

A `TextRules` says what is stated of the columns. `from_texts` turns one column into another type; it looks at
each distinct text once. Blanks around a value do not count. The empty text, and words such as NA and null, are
gaps there; in a column that stays text only the words that were stated are. Any other text is a stray: a
`StrayCell`, which names row and value, or, where strays are to be dropped, a marked row.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, NamedTuple

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.csv as pa_csv
from numpy.typing import NDArray

from ep3stream.formats.text_dates import DateReader

# What is written for no number or date; in a column of texts they are texts like any other.
GAP_WORDS: tuple[str, ...] = (*pa_csv.ConvertOptions().null_values, "None", "NaT", "<NA>")

NUMBER = r"^[-+]?(?:\d+\.?\d*|\.\d+)(?:[eE][-+]?\d+)?$"
_NO_FINITE = r"(?i)^[-+]?(?:inf|infinity|nan)$"
_NUMBER_IN_BLANKS = (
    r"^(?:\s+(?:[-+]?[\d.,]*\d[\d.]*(?:[eE][-+]?\d+)?|(?i:true|false))\s*|"
    r"(?:[-+]?[\d.,]*\d[\d.]*(?:[eE][-+]?\d+)?|(?i:true|false))\s+)$"
)
_WHOLE = r"^[-+]?\d{1,18}(?:\.0*)?$"
_LEADING_ZEROS = r"^[-+]?0\d"

# 1,234 or 1 234.5 or 1'234, 40%, $5, (12), 5 kg, 1.5D+02, 0,5: amounts, but not as numbers are written here.
_GROUPED = r"\d{1,3}(?:[, .'\x{2019}\x{a0}\x{202f}\x{2009}]\d{3})+(?:[.,]\d+)?"
_DIGITS = rf"(?:{_GROUPED}|\d+(?:[.,]\d*)?|[.,]\d+)"
_UNIT = (
    r"(?:\s*[%\x{2030}\x{b0}$\x{20ac}\x{a3}\x{a5}]|\s+[A-Za-z\x{b5}%/\x{b0}\x{b2}\x{b3}]{1,12}|"
    r"(?:[kKMm]?(?:g|m|l|W|Wh|Hz|B|V|bp|mol)|cm|mm|km|kn|lbs?|oz|ft|mph|kmh|km/h|min|hrs?|[kKMG]?i?[bB]|USD|EUR|"
    r"[kKMBbn]|[CF]))"
)
_CURRENCY = r"(?:[$\x{20ac}\x{a3}\x{a5}]|USD|EUR|GBP|CHF)"
_AMOUNT = (
    rf"^(?:[-+\x{{2212}}]?\s*{_CURRENCY}?\s*[-+]?{_DIGITS}{_UNIT}?|\(\s*{_CURRENCY}?{_DIGITS}\s*%?\)|"
    r"[-+]?\d*\.?\d+\.?[dD][-+]?\d+|[-+]?\d[\d_]*_\d+|[-+]?\d+(?:[.,]\d+)?-|0[xX][0-9a-fA-F]+)$"
)
_BLANK = ord(" ")


@dataclass(frozen=True, slots=True)
class TextRules:
    """What is stated of the columns of a table, by their names in its files.

    texts: columns whose texts stay as they are. numbers: columns of numbers, whatever the first rows suggest.
    formats: how columns of dates are written, see text_dates.py.
    missing_words: texts that are gaps in every column. drops_strays: whether a row with a stray text is dropped.
    is_recorded: whether an earlier file has fixed all this.
    """

    texts: frozenset[str] = frozenset()
    numbers: frozenset[str] = frozenset()
    formats: Mapping[str, str] = field(default_factory=dict)
    missing_words: tuple[str, ...] = ()
    drops_strays: bool = False
    is_recorded: bool = False

    @classmethod
    def of_json(cls, document: Mapping[str, Any]) -> TextRules:
        """From a record of columns that `to_json` is part of; raises TypeError for anything else."""
        formats: Any = document.get("date_formats", {})
        lists: list[Any] = [document.get(name, []) for name in ("numbers", "missing_words")]
        if not isinstance(formats, Mapping) or not all(isinstance(each, list) for each in lists):
            raise TypeError("date_formats, numbers or missing_words are of another kind")
        if not all(isinstance(text, str) for text in (*formats.values(), *lists[0], *lists[1])):
            raise TypeError("date_formats, numbers or missing_words are no texts")
        return cls(
            numbers=frozenset(lists[0]),
            formats=dict(formats),
            missing_words=tuple(lists[1]),
            drops_strays=document.get("invalid") == "drop",
            is_recorded=True,
        )

    def renamed(self, names: Mapping[str, str]) -> TextRules:
        """The same for a file with other names; `names` has the new name by the old one."""
        return replace(
            self,
            numbers=frozenset(names.get(name, name) for name in self.numbers),
            formats={names.get(name, name): text for name, text in self.formats.items()},
        )

    def to_json(self) -> dict[str, Any]:
        """What later files are read by, for the record of the columns."""
        record: dict[str, Any] = {}
        if self.numbers:
            record["numbers"] = sorted(self.numbers)
        if self.formats:
            record["date_formats"] = dict(self.formats)
        if self.missing_words:
            record["missing_words"] = list(self.missing_words)
        if self.drops_strays:
            record["invalid"] = "drop"
        return record

    @property
    def gap_words(self) -> list[str]:
        """The texts that are gaps in columns of numbers, dates and truth values."""
        return [*GAP_WORDS, *self.missing_words]


class StrayCell(Exception):
    """A text that is no value of its column's type. row: its place in the batch, from 0."""

    def __init__(self, column: str, row: int, text: str, dtype: pa.DataType, rules: TextRules) -> None:
        super().__init__(column, row, text)
        self.column, self.row, self.text, self.dtype, self.rules = column, row, text, dtype, rules

    def in_words(self) -> str:
        """What the text should be, and every remedy."""
        name, text_format = option_name(self.column), self.rules.formats.get(self.column)
        if text_format is not None:
            missed = f"no date like {text_format}"
        elif (zone := self._other_zone()) is not None:
            return f"{self.text!r} {zone}; write all times alike, or leave the column out with --drop {name}"
        else:
            missed = _missed(self.dtype)
        if self.rules.is_recorded:
            return f"{self.text!r} is {missed}; correct it, or leave its row out"
        return (
            f"{self.text!r} is {missed}; correct it, leave its row out with --invalid drop, take --missing-words "
            f"{self.text!r:.40} if it is a gap, or --category {name} if all its values are categories"
        )

    def _other_zone(self) -> str | None:
        """What to say of a time with a zone among times without, or the other way round; None for other texts."""
        if not pa.types.is_timestamp(self.dtype):
            return None
        other = DateReader.iso(pa.timestamp("us", None if self.dtype.tz else "UTC"))
        if other is None or other.read(known_texts(pa.array([self.text]), ())).null_count:
            return None
        return (
            "has no time zone, but others have one"
            if self.dtype.tz
            else "has a time zone, but others have none"
        )


class TypedRows(NamedTuple):
    """A batch whose columns have the types asked for, and which of its rows have a stray text, by column."""

    rows: pa.RecordBatch
    strays: Mapping[str, NDArray[np.bool_]]


def option_name(column: str) -> str:
    """The name as an option takes it; in quotes if it has blanks or letters that cannot be printed."""
    return column if column.isprintable() and " " not in column else repr(column)


def stated_types(rules: TextRules) -> dict[str, pa.DataType]:
    """The type of each column of which one is stated."""
    stated: dict[str, pa.DataType] = dict.fromkeys(rules.texts, pa.string())
    stated |= dict.fromkeys(rules.numbers, pa.float64())
    return stated | {name: DateReader.of(text).dtype for name, text in rules.formats.items()}


def typed_rows(
    rows: pa.RecordBatch,
    types: Mapping[str, pa.DataType],
    rules: TextRules,
    decimal_point: str = ".",
    trims: bool = False,
) -> TypedRows:
    """The batch with each column of texts that has another type in `types` turned into that type.

    trims: whether blanks around numbers are left out in columns of texts.
    A row with a stray has null there. Raises StrayCell for the first row with a stray, unless strays are dropped.
    """
    columns = dict(zip(rows.schema.names, rows.columns, strict=True))
    strays: dict[str, NDArray[np.bool_]] = {}
    first: StrayCell | None = None
    for name, dtype in types.items():
        values, text_format = columns[name], rules.formats.get(name)
        # A format makes dates of whole numbers too, like 20260301.
        if not (is_text(values.type) or (text_format is not None and pa.types.is_integer(values.type))):
            continue
        if pa.types.is_string(dtype):
            if trims:
                columns[name] = values = trimmed_numbers(values)
            if rules.missing_words and is_text(values.type):
                columns[name] = without_words(values.cast(pa.string()), rules.missing_words)
            continue
        texts = values.cast(pa.string())
        columns[name], stray = from_texts(texts, dtype, rules.gap_words, text_format, decimal_point)
        if stray is None:
            continue
        strays[name] = stray
        row = int(np.argmax(stray))
        if first is None or row < first.row:
            first = StrayCell(name, row, texts[row].as_py(), dtype, rules)
    if first is not None and not rules.drops_strays:
        raise first
    return TypedRows(pa.record_batch(list(columns.values()), names=list(columns)), strays)


def from_texts(
    texts: pa.Array,
    dtype: pa.DataType,
    gap_words: Sequence[str],
    text_format: str | None = None,
    decimal_point: str = ".",
) -> tuple[pa.Array, NDArray[np.bool_] | None]:
    """The texts as values of the type, (b,), and which rows are strays, (b,); None if there is none."""
    encoded = texts.dictionary_encode()
    known = known_texts(encoded.dictionary, gap_words)
    values = _values(known, dtype, text_format, decimal_point)
    stray = pc.and_(pc.is_valid(known), pc.is_null(values))
    if not pc.any(stray).as_py():
        return values.take(encoded.indices), None
    rows = stray.take(encoded.indices).fill_null(False).to_numpy(zero_copy_only=False)
    return values.take(encoded.indices), rows if rows.any() else None


def known_texts(texts: pa.Array, gap_words: Sequence[str]) -> pa.Array:
    """The texts without the blanks around them; null for gaps."""
    trimmed = pc.utf8_trim_whitespace(texts)
    words = pa.array([*gap_words, ""], pa.string())
    is_gap = pc.or_(pc.is_in(trimmed, words), pc.is_in(texts, words))
    return pc.if_else(is_gap, pa.scalar(None, pa.string()), trimmed)


def without_words(texts: pa.Array, words: Sequence[str]) -> pa.Array:
    """The texts with null for each of these words, with blanks around it or without."""
    if not words:
        return texts
    known = pa.array(words, texts.type)
    is_word = pc.is_in(texts, known)
    if _any_ends_blank(texts):
        is_word = pc.or_(is_word, pc.is_in(pc.utf8_trim_whitespace(texts), known))
    return pc.if_else(is_word, pa.scalar(None, texts.type), texts)


def trimmed_numbers(texts: pa.Array) -> pa.Array:
    """The texts without the blanks around numbers and truth values; other texts as they are."""
    if not _any_ends_blank(texts):
        return texts
    has_blanks = pc.match_substring_regex(texts, _NUMBER_IN_BLANKS)
    if not pc.any(has_blanks).as_py():
        return texts
    return pc.if_else(has_blanks, pc.utf8_trim_whitespace(texts), texts)


def _any_ends_blank(texts: pa.StringArray) -> bool:
    """Whether any text begins or ends with a blank, found by its first and last byte: 20 times as fast as a regex."""
    _, offset_bytes, letter_bytes = texts.buffers()
    if letter_bytes is None or not len(texts):
        return False
    offsets = np.frombuffer(offset_bytes, np.int32)[texts.offset : texts.offset + len(texts) + 1]
    letters = np.frombuffer(letter_bytes, np.uint8)
    begins, ends = offsets[:-1], offsets[1:]
    is_full = ends > begins
    first, last = letters[begins[is_full]], letters[ends[is_full] - 1]
    return bool((first <= _BLANK).any() or (last <= _BLANK).any())


def numbers_from(texts: pa.Array, decimal_point: str = ".") -> pa.Array:
    """The texts as float64; null for null and for a text that is no decimal number, inf or nan."""
    if decimal_point != ".":
        swapped = pc.replace_substring(texts, ".", "\0")  # A point is no part of a number there.
        texts = pc.replace_substring(swapped, decimal_point, ".")
    is_number = pc.or_(pc.match_substring_regex(texts, NUMBER), pc.match_substring_regex(texts, _NO_FINITE))
    kept = pc.if_else(is_number, texts, pa.scalar(None, pa.string()))
    return pc.replace_substring_regex(kept, r"^\+", "").cast(pa.float64())


def is_number(text: str) -> bool:
    """Whether Python reads the text as a number."""
    try:
        float(text)
    except ValueError:
        return False
    return True


def booleans_from(texts: pa.Array) -> pa.Array:
    """The texts as truth values; null for null and for any other text."""
    # Made here: the first array of a process imports pandas, which takes .4 s.
    words = pa_csv.ConvertOptions()
    is_true, is_false = (pc.is_in(texts, pa.array(some)) for some in (words.true_values, words.false_values))
    return pc.if_else(pc.or_(is_true, is_false), is_true, pa.scalar(None, pa.bool_()))


def looks_like_amount(texts: pa.Array) -> pa.Array:
    """Which texts are amounts in some notation: plain numbers too, and 5 kg, 1,234, 40%, $5, 1.5D+02."""
    return pc.match_substring_regex(texts, _AMOUNT)


def has_leading_zeros(texts: pa.Array) -> pa.Array:
    """Which texts are numbers like 007 or 01.5, which as numbers lose their zeros."""
    return pc.match_substring_regex(texts, _LEADING_ZEROS)


def is_text(dtype: pa.DataType) -> bool:
    """Whether a column of this type holds texts, as themselves or as the entries of a dictionary."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    return bool(pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or dtype == pa.string_view())


def _values(known: pa.Array, dtype: pa.DataType, text_format: str | None, decimal_point: str) -> pa.Array:
    if text_format is not None:
        return DateReader.of(text_format).read(known)
    if pa.types.is_floating(dtype):
        return numbers_from(known, decimal_point)
    if pa.types.is_integer(dtype):
        is_whole = pc.match_substring_regex(known, _WHOLE)
        kept = pc.if_else(is_whole, known, pa.scalar(None, pa.string()))
        return pc.replace_substring_regex(kept, r"^\+|\.0*$", "").cast(dtype)
    if pa.types.is_boolean(dtype):
        return booleans_from(known)
    reader = DateReader.iso(dtype)
    assert reader is not None, dtype
    return reader.read(known)


def _missed(dtype: pa.DataType) -> str:
    """What a stray in a column of this type is not."""
    if pa.types.is_boolean(dtype):
        return "neither true nor false"
    if pa.types.is_date(dtype):
        return "no date like 2026-03-01"
    if pa.types.is_time(dtype):
        return "no time like 10:30:15"
    if pa.types.is_timestamp(dtype):
        return "no date and time like 2026-03-01 10:30:15"
    return "no whole number" if pa.types.is_integer(dtype) else "no number"
