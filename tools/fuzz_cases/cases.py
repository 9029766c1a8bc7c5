"""A case, drawn as a function of (seed, number): a known table, a way to write it, settings of the conversion."""

from __future__ import annotations

import random
import zlib
from collections.abc import Callable
from dataclasses import dataclass, fields, replace
from typing import Any

from hypothesis import HealthCheck, Phase, given
from hypothesis import settings as hypothesis_settings
from hypothesis import strategies as st

from ep3stream.config import ConvertConfig
from fuzz_cases.array_files import ArrayWay, PairWay
from fuzz_cases.known_tables import Column, Table, array_tables, tables
from fuzz_cases.table_files import ArrowWay, FrameWay, ParquetWay
from fuzz_cases.text_files import CsvWay, SvmlightWay

SMALL_MEMORY, SEGMENT_BYTES = 16384, 4096
INPUT_BYTES = 1 << 14


@dataclass(frozen=True)
class Settings:
    """How a table is converted; the defaults are the plainest way.

    missing: a policy, or a mixture of policies `by column`.
    kill_at: the conversion is cut off at this report of its progress, and begun again. like: the way in which the
    same rows are written once more, to be converted like the first store.
    """

    missing: str | None = None
    invalid: str | None = None
    shuffle: bool = False
    splits: int = 1
    small_memory: bool = False
    format: str = "zarr"
    categories: str | None = None
    dates: tuple[str, ...] = ()
    split_file: bool = False
    kill_at: int = 0
    like: Any = None

    @classmethod
    def drawn(cls, likes: st.SearchStrategy[Any]) -> st.SearchStrategy[Settings]:
        """Any settings."""
        return st.builds(
            cls,
            missing=st.sampled_from((*[None] * 6, "auto", "drop", "mean", "error", "by column", "by column")),
            invalid=st.sampled_from((None, "drop")),
            shuffle=st.sampled_from((False, False, False, True)),
            splits=st.sampled_from((1, 1, 1, 2)),
            small_memory=st.booleans(),
            format=st.sampled_from(("zarr", "zarr", "zarr", "zarr", "hdf5")),
            categories=st.sampled_from((None, None, "codes", "onehot")),
            dates=st.sampled_from((*[()] * 8, ("month", "hour", "days"), ("weekday", "day", "hour"))),
            split_file=st.sampled_from((False, False, False, False, False, True)),
            kill_at=st.sampled_from((*[0] * 20, 1, 2, 3, 5)),
            like=st.one_of(st.none(), st.none(), st.none(), likes),
        )

    def policies(self, table: Table) -> dict[str, str]:
        """What becomes of the gaps of each column."""
        if self.missing != "by column":
            return dict.fromkeys((column.name for column in table.columns), self.missing or "auto")
        names = [column.name for column in table.features]
        policies = {
            name: ("drop", "auto", "mean", "error", "auto")[zlib.crc32(name.encode()) % 5] for name in names
        }
        return policies | {column.name: "auto" for column in table.targets}

    def config(self, table: Table, options: dict[str, Any], **more: Any) -> ConvertConfig:
        """The settings for `convert`, with `options` besides."""
        splits = {"train": 1.0} if self.splits == 1 else {"train": 0.7, "test": 0.3}
        memory = SMALL_MEMORY if self.small_memory else 64 << 20
        missing = self.policies(table) if self.missing == "by column" else self.missing
        wanted = {
            "missing": missing,
            "invalid": self.invalid,
            "categories": self.categories,
            "dates": self.dates or None,
        }
        stated = {name: value for name, value in wanted.items() if value is not None}
        return ConvertConfig(
            shuffle=self.shuffle,
            splits=splits,
            memory_bytes=memory,
            segment_bytes=SEGMENT_BYTES,
            **(stated | options | more),
        )


@dataclass(frozen=True)
class Case:
    """One input."""

    table: Table
    way: Any
    settings: Settings


def _tables_with(way: st.SearchStrategy[Any], is_text: bool, likes: st.SearchStrategy[Any]) -> Any:
    return st.builds(Case, tables(is_text), way, Settings.drawn(likes))


def _arrays_with(way: st.SearchStrategy[Any]) -> st.SearchStrategy[Case]:
    return way.flatmap(
        lambda drawn: st.builds(
            Case,
            array_tables(getattr(drawn, "kind", "") == "masked", not isinstance(drawn, SvmlightWay)),
            st.just(drawn),
            Settings.drawn(st.none()).map(lambda settings: replace(settings, dates=(), invalid=None)),
        )
    )


_typed = st.one_of(ParquetWay.drawn(), ArrowWay.drawn(), FrameWay.drawn())
FORMATS: dict[str, tuple[int, st.SearchStrategy[Case]]] = {
    "csv": (8, _tables_with(CsvWay.drawn(), True, st.one_of(CsvWay.drawn(), _typed))),
    "parquet": (4, _tables_with(ParquetWay.drawn(), False, _typed)),
    "arrow": (2, _tables_with(ArrowWay.drawn(), False, _typed)),
    "python tables": (3, _tables_with(FrameWay.drawn(), False, _typed)),
    "npy": (1, _arrays_with(ArrayWay.drawn("npy"))),
    "npz": (1, _arrays_with(ArrayWay.drawn("npz"))),
    "hdf5": (1, _arrays_with(ArrayWay.drawn("hdf5"))),
    "zarr": (1, _arrays_with(ArrayWay.drawn("zarr"))),
    "python arrays": (2, _arrays_with(PairWay.drawn())),
    "svmlight": (2, _arrays_with(SvmlightWay.drawn())),
}
_ORDER = [name for name, (weight, _) in FORMATS.items() for _ in range(weight)]


def format_of(number: int) -> str:
    return _ORDER[number * 7 % len(_ORDER)]


def _drawer(strategy: st.SearchStrategy[Case]) -> Callable[[bytes], Case | None]:
    """A function that makes a case of bytes; None if they do not suffice."""
    drawn: list[Case] = []

    @hypothesis_settings(
        database=None, deadline=None, suppress_health_check=list(HealthCheck), phases=[Phase.generate]
    )
    @given(strategy)
    def keep(case: Case) -> None:
        drawn.append(case)

    def draw(data: bytes) -> Case | None:
        drawn.clear()
        keep.hypothesis.fuzz_one_input(data)
        return drawn[0] if drawn else None

    return draw


_DRAWERS: dict[str, Callable[[bytes], Case | None]] = {}


def case_of(seed: int, number: int, without: frozenset[str] = frozenset()) -> Case:
    """The input of this number: a function of (seed, number).

    without: fields of ways and settings that keep their defaults; `gaps` for tables without gaps.
    """
    name = format_of(number)
    draw = _DRAWERS.setdefault(name, _drawer(FORMATS[name][1]))
    generator = random.Random(f"{seed}:tables:{number}")
    for attempt in range(10):
        case = draw(generator.randbytes(INPUT_BYTES << attempt // 3))
        if case is not None:
            n_rows = case.table.n_rows
            settings = case.settings
            if settings.splits > 1 and n_rows < 40:
                settings = replace(settings, splits=1)
            if n_rows < 8 or not isinstance(case.way, CsvWay | ParquetWay | ArrowWay) or settings.like:
                settings = replace(settings, split_file=False)
            return _plainer(replace(case, settings=settings), without)
    raise AssertionError(f"no table for number {number}")


def _plainer(case: Case, without: frozenset[str]) -> Case:
    """The case with the defaults in these fields."""
    if not without:
        return case

    def plain(held: Any) -> Any:
        defaults = {one.name: one.default for one in fields(held) if one.name in without}
        return replace(held, **defaults) if defaults else held

    settings = plain(case.settings)
    if settings.like is not None:
        settings = replace(settings, like=plain(settings.like))
    table = case.table.changed(_filled_up) if "gaps" in without else case.table
    return Case(table, plain(case.way), settings)


def _filled_up(column: Column) -> Column:
    """The column with its first value in place of gaps."""
    first = next(value for value in column.values if value is not None)
    return replace(column, values=tuple(first if value is None else value for value in column.values))
