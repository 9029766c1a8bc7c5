"""Tables whose rows are known, drawn with hypothesis, for tools/fuzz_tables.py, which writes and converts them.

A drawn table has 1 to 200 rows. Hypothesis draws the shape and the distinct values of each column; a generator that
is seeded by hypothesis repeats them over the rows, which takes a tenth of the time.
"""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any, Literal

import numpy as np
from hypothesis import strategies as st

Kind = Literal["number", "boolean", "category", "date", "timestamp", "zoned", "time", "duration"]

EPOCH = dt.datetime(1970, 1, 1)

NAMES = (
    "a", "A", "b", "n", "k", "x 1", "col.1", "Größe", "日付", "a=b", "0", "17", "w[1]", "a_1", "when", "é", "#", "%",
    "index", "key", "None", "nan", "x0", "my-column", "weight (kg)", "l" * 80, "c,omma",
    'q"uote', "semi;colon", "two\nlines", "(missing)",
)  # fmt: skip
TARGET_NAMES = ("y", "y", "y", "target", "Ziel 1", "1", "label")

WORDS = (
    "red", "green", "blue", "ä", "日本", "a b", " lead", "trail ", "O'Neil", 'say "x"', '"', "a,b", "x;y", "p|q", "x=y",
    "t\tb", "two\nlines", "cr\r\nlf", "=sum", "@x", "#five", "percent%", "back\\slash", "//", "e\u0301", "\u00e9", "x",
    "\uff21", "a" * 700, "ab" * 900, "y", "yes", "no", "Total", "N.A.", "🙂", "\u00a0nbsp", "a\u2028b", "'quoted'",
    "null-ish", "(missing", "unknown",
)  # fmt: skip

# Texts that readers like to take for something else.
ODD_TEXTS = (
    "NA", "N/A", "null", "NULL", "nan", "NaN", "None", "none", "inf", "-inf", "Infinity", "true", "True", "FALSE", "-",
    "1", "01", "1.0", "1.10", "1.1", "1e3", "1000", "+1", "-1", "0x1F", "31", "12345678901234567890", "007", "7", "?",
    "12345678901234567891", "2026-01-01", "10:30", "2026-01-01 00:00:00", "0", "-0", "1_000", "1,5", "٣", "(missing)",
    "(unknown)", "#N/A", "9007199254740993", "9007199254740992", "0.1", ".1", "1.", "n/a", "<NA>", "nil", "T", "F",
)  # fmt: skip


@dataclass(frozen=True)
class Column:
    """A column and its value in every row; None is a gap.

    is_stated: whether the settings name its kind (--category, --number).
    flavour: what the values were drawn as, for reports.
    """

    name: str
    kind: Kind
    values: tuple[Any, ...]
    is_stated: bool = False
    flavour: str = ""

    @property
    def gaps(self) -> np.ndarray:
        """Which rows have no value."""
        return np.array([value is None for value in self.values], bool)

    def rows(self, kept: np.ndarray) -> Column:
        """These rows alone."""
        return replace(self, values=tuple(self.values[int(row)] for row in kept))


@dataclass(frozen=True)
class Table:
    """Features and targets of equally many rows.

    dtype, y_dtype: of tables for array formats, which hold numbers alone.
    """

    features: tuple[Column, ...]
    targets: tuple[Column, ...]
    is_classification: bool = False
    dtype: str | None = None
    y_dtype: str | None = None

    @property
    def columns(self) -> tuple[Column, ...]:
        """Features and targets."""
        return self.features + self.targets

    @property
    def n_rows(self) -> int:
        """The number of rows."""
        return len(self.targets[0].values)

    def rows(self, kept: np.ndarray) -> Table:
        """These rows alone."""
        return replace(
            self,
            features=tuple(column.rows(kept) for column in self.features),
            targets=tuple(column.rows(kept) for column in self.targets),
        )

    def stated_as_categories(self) -> Table:
        """With the features that are numbers, but that --category names, as what they become."""

        def change(column: Column) -> Column:
            is_category = column.is_stated and column.kind == "number" and column in self.features
            return replace(column, kind="category") if is_category else column

        return self.changed(change)

    def changed(self, change: Callable[[Column], Column]) -> Table:
        """With every column changed."""
        return replace(
            self, features=tuple(map(change, self.features)), targets=tuple(map(change, self.targets))
        )


# -- distinct values, by kind


def _around(base: float | int, span: int) -> st.SearchStrategy[Any]:
    return st.integers(-span, span).map(lambda step: base + step)


NUMBERS: dict[str, st.SearchStrategy[Any]] = {
    "digit": st.integers(-9, 9),
    "int32": st.integers(-(2**31), 2**31 - 1),
    "eighths": st.integers(-(10**4), 10**4).map(lambda n: n / 8),
    "decimal": st.integers(-(10**6), 10**6).map(lambda n: n / 1000),
    "double": st.floats(-1e6, 1e6, allow_subnormal=False),
    "epoch": _around(1_700_000_000, 4000),
    "epoch ms": _around(1_700_000_000_000, 10**6),
    "yyyymmdd": st.dates(dt.date(1990, 1, 1), dt.date(2040, 1, 1)).map(lambda d: int(f"{d:%Y%m%d}")),
    "metres": st.integers(0, 4000).map(lambda n: 5_500_000 + n / 8),
    "float24": _around(2**24, 6),
    "int53": _around(2**53, 6),
    "int63": st.integers(2**62, 2**63 - 1),
    "uint64": st.integers(2**63, 2**64 - 1),
    "tiny": st.floats(1e-37, 1e-30),
    "vanishing": st.floats(1e-60, 1e-46),
    "huge": st.floats(1e30, 3e38),
    "any scale": st.sampled_from((1e-30, -1e30, 1.0, 0.0, -0.0, 123456789.0, 0.1, 1e-3, -2.5e8)),
    "one value": st.just(42),
}
# Flavours that are whole numbers, and fit in int64.
WHOLE = {"digit", "int32", "epoch", "epoch ms", "yyyymmdd", "float24", "int53", "int63", "one value"}
COMMON = ("digit", "int32", "eighths", "decimal", "double", "epoch", "metres", "yyyymmdd")

_odd_words = st.text(st.characters(codec="utf-8", exclude_characters="\0"), min_size=1, max_size=6)
plain_words = st.one_of(
    st.sampled_from(WORDS), st.sampled_from(WORDS[:3]), _odd_words.map(lambda text: f"w{text}")
)
any_texts = st.one_of(st.sampled_from(ODD_TEXTS), st.sampled_from(WORDS), _odd_words)

_seconds = st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2100, 1, 1)).map(
    lambda moment: moment.replace(microsecond=0)
)
_micros = st.datetimes(dt.datetime(1900, 1, 1), dt.datetime(2100, 1, 1))
_nearby = st.integers(0, 3600).map(lambda s: dt.datetime(2026, 3, 1) + dt.timedelta(seconds=s))
_moments = st.one_of(_seconds, _micros, _nearby)
_times = st.times().map(lambda time: time.replace(microsecond=0))

POOLS: dict[Kind, st.SearchStrategy[Any]] = {
    "boolean": st.booleans(),
    "date": st.dates(dt.date(1900, 1, 1), dt.date(2100, 1, 1)),
    "timestamp": _moments,
    "zoned": _moments,
    "time": _times,
    "duration": st.integers(-(10**11), 10**11).map(lambda n: dt.timedelta(microseconds=n)),
}
TABLE_KINDS: tuple[Kind, ...] = (
    "number", "number", "number", "category", "category", "boolean", "date", "timestamp", "zoned", "time", "duration",
)  # fmt: skip
TEXT_KINDS = tuple(kind for kind in TABLE_KINDS if kind != "duration")


def _filled(rng: random.Random, pool: list[Any], n_rows: int, gap_share: float) -> tuple[Any, ...]:
    """Values of the pool over the rows, with gaps; at least one row has a value."""
    values = [None if rng.random() < gap_share else rng.choice(pool) for _ in range(n_rows)]
    if all(value is None for value in values):
        values[rng.randrange(n_rows)] = rng.choice(pool)
    return tuple(values)


_sizes = st.sampled_from((1, 2, 3, 5, 8, 13, 20, 30, 40, 60, 60, 200))
_gap_shares = st.sampled_from((0.0, 0.0, 0.0, 0.0, 0.1, 0.5))
_seeds = st.integers(0, 2**32 - 1)


@st.composite
def _columns(draw: Any, name: str, kind: Kind, n_rows: int, gap_share: float, is_text_format: bool) -> Column:
    rng = random.Random(draw(_seeds))
    size = draw(st.sampled_from((1, 2, 3, 6)))
    is_stated, flavour = False, kind
    if kind == "number":
        flavour = draw(st.one_of(st.sampled_from(COMMON), st.sampled_from(tuple(NUMBERS))))
        pool = draw(st.lists(NUMBERS[flavour], min_size=size, max_size=size))
        # Whole numbers may be categories.
        is_stated = not is_text_format and flavour in {*WHOLE, "uint64"} and draw(st.integers(0, 4)) == 0
    elif kind == "category":
        is_stated = draw(st.booleans())
        # Only a stated category may be of texts that look like numbers where the file does not state types.
        free = is_stated or not is_text_format
        flavour = "any text" if free else "words"
        pool = draw(st.lists(any_texts if free else plain_words, min_size=size, max_size=size))
        if not free and draw(st.booleans()):  # Among words of a text column, words for nothing are words.
            pool = [*pool, *pool, draw(st.sampled_from(("NA", "null", "nan", "N/A", "None", "NULL", "-")))]
    else:
        pool = draw(st.lists(POOLS[kind], min_size=size, max_size=size))
        if kind != "boolean":
            pool = pool[: max(1, size)]
    values = _filled(rng, pool, n_rows, gap_share)
    if flavour == "words":  # The first word shows that the column is of texts.
        values = (pool[0], *values[1:])
    return Column(name, kind, values, is_stated, flavour)


@st.composite
def tables(draw: Any, is_text_format: bool) -> Table:
    """A table of columns of any kind, for formats that hold those."""
    n_rows = draw(_sizes)
    n_features = draw(st.sampled_from((1, 2, 3, 4, 6)))
    names = draw(st.permutations(NAMES))[:n_features]
    kinds = TEXT_KINDS if is_text_format else TABLE_KINDS
    features = tuple(
        draw(_columns(name, draw(st.sampled_from(kinds)), n_rows, draw(_gap_shares), is_text_format))
        for name in names
    )
    target_name = draw(st.sampled_from([name for name in TARGET_NAMES if name not in names]))
    gap_share = draw(st.sampled_from((0.0, 0.0, 0.0, 0.0, 0.1)))
    of_classes = ("words", "labels", "boolean") if n_rows > 5 else ()
    what = draw(st.sampled_from(("number", "number", "number", "two numbers", *of_classes)))
    if what in ("number", "two numbers"):
        wanted = [target_name] if what == "number" else [target_name, "second target"]
        targets = [draw(_columns(name, "number", n_rows, gap_share, True)) for name in wanted]
        return Table(features, tuple(targets))
    if what == "boolean":
        return Table(features, (draw(_columns(target_name, "boolean", n_rows, gap_share, True)),), True)
    rng = random.Random(draw(_seeds))
    if what == "labels":
        pool = draw(st.lists(st.integers(-3, 2000), min_size=2, max_size=5, unique=True))
        values = _filled(rng, pool, n_rows, gap_share)
        return Table(features, (Column(target_name, "number", values, True, "labels"),), True)
    stated = is_text_format and draw(st.booleans())
    texts = any_texts if stated or not is_text_format else plain_words
    pool = draw(st.lists(texts, min_size=2, max_size=5, unique=True))
    target = Column(target_name, "category", _filled(rng, pool, n_rows, gap_share), stated, "label texts")
    return Table(features, (target,), True)


# -- numbers alone, for formats of arrays

DTYPES = ("f4", "f4", "f8", "f8", "f2", "i1", "i2", "i4", "i8", "u1", "u2", "u4", "u8", "b1")


def _fitting(dtype: np.dtype[Any], flavour: st.SearchStrategy[Any]) -> st.SearchStrategy[Any]:
    """Values of the dtype, as Python's numbers."""
    if dtype.kind == "b":
        return st.sampled_from((0, 1))
    if dtype.kind in "iu":
        limits = np.iinfo(dtype)
        return st.one_of(
            st.integers(0, min(100, int(limits.max))), st.integers(int(limits.min), int(limits.max))
        )
    if dtype == np.float16:
        return st.integers(-2048, 2048).map(lambda n: n / 8)
    return flavour.map(lambda value: float(dtype.type(value)))


@st.composite
def array_tables(draw: Any, may_lack: bool = False, may_have_two: bool = True) -> Table:
    """Numbers of one dtype in x, and one or several y; gaps only in floats, or in any if they may lack values."""
    n_rows = draw(_sizes)
    n_features = draw(st.sampled_from((1, 2, 3, 4, 6, 12)))
    dtype = np.dtype(draw(st.sampled_from(DTYPES)))
    rng = random.Random(draw(_seeds))

    def column(name: str, dtype: np.dtype[Any], gap_share: float) -> Column:
        flavour = draw(st.one_of(st.sampled_from(COMMON), st.sampled_from(tuple(NUMBERS))))
        pool = draw(st.lists(_fitting(dtype, NUMBERS[flavour]), min_size=1, max_size=4))
        gap_share = gap_share if dtype.kind == "f" or may_lack else 0
        return Column(name, "number", _filled(rng, pool, n_rows, gap_share), False, f"{dtype} {flavour}")

    features = tuple(column(f"x{j}", dtype, draw(_gap_shares)) for j in range(n_features))
    y_dtype = np.dtype(
        draw(st.sampled_from(("f4", "f8", "f8", *(("i4", "i8", "u1", "b1") if n_rows > 5 else ()))))
    )
    if y_dtype.kind == "f":
        names = draw(st.sampled_from((("y",), ("y",), ("y0", "y1") if may_have_two else ("y",))))
        targets = tuple(column(name, y_dtype, draw(st.sampled_from((0, 0, 0, 0.2)))) for name in names)
        return Table(features, targets, False, dtype.str, y_dtype.str)
    pool = (
        [0, 1]
        if y_dtype.kind == "b"
        else draw(st.lists(st.integers(0, 100), min_size=2, max_size=4, unique=True))
    )
    target = Column("y", "number", _filled(rng, pool, n_rows, 0), True, f"{y_dtype} labels")
    if y_dtype.kind == "b":
        values = tuple(None if value is None else bool(value) for value in target.values)
        target = replace(target, kind="boolean", values=values)
    return Table(features, (target,), True, dtype.str, y_dtype.str)
