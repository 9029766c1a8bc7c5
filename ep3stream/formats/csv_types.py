"""What each column of a CSV file holds, decided once from its first rows: numbers, dates, truth values or texts.

pyarrow infers the types of the first block, of further blocks for columns that are empty there. A column that it
calls text is looked at again, one distinct text at a time: where nearly all are numbers, or all but two words
beside ten numbers, it is a column of numbers all the same, and the others are strays, wherever in the file they
lie. So are dates, read by the one format that fits them. What is stated of a column goes before all of this.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from ep3stream.errors import SourceError
from ep3stream.formats.csv import BLOCK_BYTES, CsvLayout
from ep3stream.formats.text_blocks import TextBlock, TextFault
from ep3stream.formats.text_cells import (
    TextRules,
    booleans_from,
    has_leading_zeros,
    known_texts,
    looks_like_amount,
    numbers_from,
    option_name,
    stated_types,
    trimmed_numbers,
    without_words,
)
from ep3stream.formats.text_dates import DateReader, fitting_formats

# Types are inferred from the first block; a column that is empty there may have a value further on.
_INFERENCE_BYTES = 64 << 20

# How far numbers are looked at as they are written.
_PEEK_BYTES = 1 << 18

# From which share of the values on, or beside how few other words and how many values, a column is of one kind.
_NEARLY_ALL = 0.9
_FEW_WORDS = 2
_MANY_VALUES = 10
_FEW_FRACTIONS = 2

# From which share on it is told that a column of categories has numbers in it.
_MOST = 0.5
_FIRST_TEXTS = 1000

_HEXADECIMAL_BYTES = re.compile(rb"0[xX]")
_HEXADECIMAL = r"^[-+]?0[xX]"
_LONG_NUMBER = r"^[-+]?0*[1-9]\d{15,}$"
_MAX_EXACT = 1 << 53
_DATE_LENGTH = len("2026-03-01")

# Any number with leading zeros or many digits before the point, so that others need not be looked for by column.
_ODD_NUMBER = re.compile(rb"(?<![\d.eE])0\d|(?<![\d.])\d{16}|[.,]\d{0,6}0\b|\d[eE]\+?\d")
# Of how many different texts a column may be one of codes or versions, rather than of measurements.
_FEW_TEXTS = 50

# Whether so many of a column's texts could be read, null being those that could not.
_Test = Callable[[pa.Array], bool]


@dataclass(frozen=True, slots=True)
class ColumnTypes:
    """What the columns of a table hold, as it states it or its first rows say.

    schema: names and types; null for a column that is empty. formats: how columns of dates are written.
    notes: what should be told of a column, in words. amounts: for a column of texts such as 5 kg or 1,234,
    which are no numbers as they are written, or of as many numbers as other texts, one of them.
    """

    schema: pa.Schema
    formats: Mapping[str, str]
    notes: Mapping[str, str] = field(default_factory=dict)
    amounts: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class _Decision:
    dtype: pa.DataType
    text_format: str | None = None
    amount: str | None = None
    mixed: str | None = None


def csv_types(file: Path, rules: TextRules) -> ColumnTypes:
    """The types of the columns, by what is stated of them and by the first rows.

    Raises SourceError, which names the row, if the first rows cannot be read.
    """
    layout = CsvLayout.of(file, rules.texts)
    layout.log_peculiarities()
    names = layout.columns
    found = {name: _Decision(dtype) for name, dtype in stated_types(rules).items() if name in names}
    n_rows = 0
    try:
        for block in layout.blocks(BLOCK_BYTES):
            open_names = [name for name in names if name not in found]
            if open_names:
                n_rows += _infer(layout, block, open_names, rules, found)
            else:
                n_rows += 1
            if len(found) == len(names) or block.next_byte > _INFERENCE_BYTES:
                break
        notes = _notes(layout, rules, found)
    except (TextFault, pa.ArrowInvalid) as error:
        raise layout.fault(n_rows, error) from error
    if n_rows == 0:
        raise SourceError(f"{file}: has a header but no rows; leave it out or give a file with data")
    formats = {name: each.text_format for name, each in found.items() if each.text_format is not None}
    return ColumnTypes(
        schema=pa.schema([(name, found[name].dtype if name in found else pa.null()) for name in names]),
        formats={**formats, **{name: text for name, text in rules.formats.items() if name in names}},
        notes=notes,
        amounts={name: each.amount for name, each in found.items() if each.amount is not None},
    )


def _infer(
    layout: CsvLayout, block: TextBlock, names: list[str], rules: TextRules, found: dict[str, _Decision]
) -> int:
    """Decide the columns that have a value in the block; returns its number of rows."""
    rows = layout.parse(block.text, dict.fromkeys(names), rules.gap_words)
    for name, values in zip(rows.schema.names, rows.columns, strict=True):
        if pa.types.is_binary(values.type):  # inferred for what is not UTF-8: have the row named
            layout.parse(block.text, {name: pa.string()})
        if pa.types.is_string(values.type):
            decision = _decide(values, rules, layout.decimal_point)
            if decision is not None:
                found[name] = decision
        elif not pa.types.is_null(values.type):
            found[name] = _Decision(values.type)
    whole = [name for name in names if name in found and pa.types.is_integer(found[name].dtype)]
    if whole and _HEXADECIMAL_BYTES.search(block.text, 0, _PEEK_BYTES):
        texts = layout.parse(block.text, dict.fromkeys(whole, pa.string()))
        for name, values in zip(whole, texts.columns, strict=True):
            if pc.any(pc.match_substring_regex(pc.utf8_ltrim_whitespace(values), _HEXADECIMAL)).as_py():
                found[name] = _decide(values, rules, layout.decimal_point) or _Decision(pa.string())
    return int(rows.num_rows)


def _decide(texts: pa.Array, rules: TextRules, decimal_point: str) -> _Decision | None:
    """What a column that pyarrow calls text holds; None if it has nothing but gaps."""
    encoded = without_words(texts, rules.missing_words).dictionary_encode()
    counts = np.bincount(encoded.indices.drop_null(), minlength=len(encoded.dictionary))
    known = known_texts(encoded.dictionary, rules.gap_words)
    is_known = pc.is_valid(known).to_numpy(zero_copy_only=False)
    if not is_known.any():
        # NA alone may be the text NA, or a gap among numbers that come later.
        return None

    def is_kind(values: pa.Array) -> bool:
        is_read = pc.is_valid(values).to_numpy(zero_copy_only=False)
        return _is_enough(int(counts[is_read].sum()), int(counts[is_known].sum())) or _is_but_few(
            int(is_read.sum()), int(is_known.sum())
        )

    numbers = numbers_from(known, decimal_point)
    if is_kind(numbers) or _are_fractions(numbers, counts, int(is_known.sum())):
        return _Decision(pa.float64())
    if is_kind(booleans_from(known)):
        return _Decision(pa.bool_())
    iso = _iso_type(known, is_kind)
    if iso is not None:
        return _Decision(iso)
    formats = fitting_formats(
        known, lambda n_read, n_texts: _is_enough(n_read, n_texts) or _is_but_few(n_read, n_texts)
    )
    if len(formats) == 1:
        ((text_format, values),) = formats
        return _Decision(values.type, text_format)
    amounts = pc.or_(looks_like_amount(known), pc.is_valid(numbers)).fill_null(False)
    is_amount = amounts.to_numpy(zero_copy_only=False)
    if _is_enough(int(is_amount.sum()), int(is_known.sum())):
        shown = known.filter(pc.and_(looks_like_amount(known), pc.is_null(numbers)).fill_null(False))
        amount = shown[0].as_py() if len(shown) else None
        return _Decision(pa.string(), amount=amount, mixed=_mixture(known, numbers, counts))
    is_number = pc.is_valid(numbers).to_numpy(zero_copy_only=False)
    amount = None
    if int(counts[is_number].sum()) >= _MOST * int(counts[is_known].sum()):
        # A target of which most rows are numbers is one of numbers with strays, or of classes that have to be stated.
        amount = known.filter(pc.and_(pc.is_valid(known), pc.is_null(numbers)))[0].as_py()
    return _Decision(pa.string(), amount=amount, mixed=_mixture(known, numbers, counts))


def _mixture(known: pa.Array, numbers: pa.Array, counts: NDArray[np.int64]) -> str | None:
    """In words, that most of the distinct texts, (k,), which stand so often in the column, are numbers or dates."""
    readers = [_iso(dtype) for dtype in (pa.timestamp("us"), pa.timestamp("us", "UTC"), pa.time64("us"))]
    # Where the first texts are no dates, most are none.
    first = known.slice(0, _FIRST_TEXTS)
    has_dates = any(reader.read(first).null_count < len(first) for reader in readers)
    dates = [reader.read(known) for reader in readers if has_dates]
    is_known, is_number, *are_dates = (
        pc.is_valid(values).to_numpy(zero_copy_only=False) for values in (known, numbers, *dates)
    )
    for what, remedy, is_kind in (
        ("number", "--number {}", is_number),
        ("date", "--date {}=FORMAT", np.logical_or.reduce([np.zeros_like(is_known), *are_dates])),
    ):
        n_good, n_all = int(counts[is_kind].sum()), int(counts[is_known].sum())
        if n_good >= _MOST * n_all and (is_known & ~is_kind).any():
            other = known[int(np.flatnonzero(is_known & ~is_kind)[0])].as_py()
            shown = f"{other!r:.60}".replace("{", "{{").replace("}", "}}")
            return f"{n_good} of {n_all} texts are {what}s, but {shown} is none; {remedy} says otherwise"
    return None


def _are_fractions(numbers: pa.Array, counts: NDArray[np.int64], n_known: int) -> bool:
    """Whether fractions, which are hardly names of categories, fill most rows, beside at most two other words."""
    is_read = pc.is_valid(numbers).to_numpy(zero_copy_only=False)
    values = numbers.drop_null().to_numpy()
    n_fractions = int(np.count_nonzero(values[np.isfinite(values)] % 1))
    n_rows = int(counts[is_read].sum())
    n_words = n_known - len(values)
    n_word_rows = int(counts.sum()) - n_rows
    return n_fractions >= _FEW_FRACTIONS and n_words <= _FEW_WORDS and n_word_rows < n_rows


def _is_enough(n_good: int, n_all: int) -> bool:
    return n_good > 0 and n_good >= _NEARLY_ALL * n_all


def _is_but_few(n_good: int, n_all: int) -> bool:
    """Whether at most two different words stand beside at least ten different values of a kind."""
    return n_good >= _MANY_VALUES and n_all - n_good <= _FEW_WORDS


def _iso_type(known: pa.Array, is_kind: _Test) -> pa.DataType | None:
    """The type of ISO dates and times, with or without a zone as the first of them; None if they are none."""
    plain, zoned = (_iso(pa.timestamp("us", zone)).read(known) for zone in (None, "UTC"))
    if is_kind(pc.coalesce(plain.view(pa.int64()), zoned.view(pa.int64()))):
        if zoned.null_count < len(known):
            first = pc.index(pc.or_(pc.is_valid(plain), pc.is_valid(zoned)), True).as_py()
            return zoned.type if zoned[first].is_valid else plain.type
        has_time = pc.any(pc.greater(pc.utf8_length(known.filter(pc.is_valid(plain))), _DATE_LENGTH))
        return plain.type if has_time.as_py() else pa.date32()
    times = _iso(pa.time64("us")).read(known)
    return times.type if is_kind(times) else None


def _iso(dtype: pa.DataType) -> DateReader:
    reader = DateReader.iso(dtype)
    assert reader is not None
    return reader


def _notes(layout: CsvLayout, rules: TextRules, found: Mapping[str, _Decision]) -> dict[str, str]:
    """What should be told of columns: leading zeros and digits that numbers lose, and the formats of dates."""
    notes = {
        name: f"column {name!r} is read as dates written {each.text_format}; "
        f"--date {option_name(name)}=FORMAT says otherwise"
        for name, each in found.items()
        if each.text_format is not None
    }
    notes |= {
        name: f"column {name!r} becomes categories: {each.mixed.format(option_name(name))}"
        for name, each in found.items()
        if each.mixed is not None
    }
    is_number = (pa.types.is_integer, pa.types.is_floating)
    numeric = [
        name
        for name, each in found.items()
        if name not in rules.numbers and any(test(each.dtype) for test in is_number)
    ]
    block = next(layout.blocks(_PEEK_BYTES), None)
    categories = [name for name, each in found.items() if pa.types.is_string(each.dtype)]
    if categories and block is not None and layout.has_blanks(block.text):
        texts_of = layout.parse(block.text, dict.fromkeys(categories, pa.string())).columns
        for name, texts in zip(categories, texts_of, strict=True):
            if trimmed_numbers(texts) is not texts:
                notes[name] = (
                    f"column {name!r} has blanks around its numbers, which are left out: categories do not differ in "
                    "those alone"
                )
    if not numeric or block is None or _ODD_NUMBER.search(block.text) is None:
        return notes
    for name, texts in zip(
        numeric, layout.parse(block.text, dict.fromkeys(numeric, pa.string())).columns, strict=True
    ):
        texts = pc.utf8_trim_whitespace(texts)
        if len(zeros := texts.filter(has_leading_zeros(texts))):
            notes[name] = (
                f"column {name!r} is read as numbers, which have no leading zeros: {zeros[0]} becomes "
                f"{_plain(zeros[0].as_py())}; --category {option_name(name)} keeps the texts"
            )
        elif (long := _inexact(texts)) is not None:
            notes[name] = (
                f"column {name!r} is read as numbers, of which those beyond 2^53 lose digits, like {long}; "
                f"--category {option_name(name)} keeps the texts"
            )
        elif (twins := _twins(texts, layout.decimal_point)) is not None:
            notes[name] = (
                f"column {name!r} is read as numbers, of which {twins[0]} and {twins[1]} are the same one; "
                f"--category {option_name(name)} keeps the texts"
            )
    return notes


def _twins(texts: pa.Array, decimal_point: str) -> tuple[str, str] | None:
    """Two texts like 1.1 and 1.10, or 1e3 and 1000, of a column with few values; None if there are none."""
    few = texts.unique()
    if len(few) > _FEW_TEXTS:
        return None
    known: dict[float, str] = {}
    for text, number in zip(few.to_pylist(), numbers_from(few, decimal_point).to_pylist(), strict=True):
        if number is not None and number == number and known.setdefault(number, text) != text:
            return known[number], text
    return None


def _plain(number: str) -> str:
    return f"{float(number.replace(',', '.')):.15g}"


def _inexact(texts: pa.Array) -> str | None:
    """The first whole number among the texts that float64 does not hold."""
    for text in texts.filter(pc.match_substring_regex(texts, _LONG_NUMBER)).unique().to_pylist():
        number = int(text)
        if abs(number) > _MAX_EXACT and int(float(number)) != number:
            return str(text)
    return None
