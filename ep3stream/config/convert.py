"""The settings of a conversion."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from ep3stream.config.settings import require, require_choice, require_distinct

Task = Literal["regression", "classification"]

Format = Literal["zarr", "hdf5"]

XDtype = Literal["float32", "float16"]

Codec = Literal["auto", "none", "lz4", "zstd"]

Categories = Literal["onehot", "codes"]

Missing = Literal["error", "mean", "drop"]

Unknown = Literal["error", "ignore", "drop"]

DatePart = Literal["days", "month", "day", "weekday", "hour"]

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    """How `convert` reads a source and lays out the store. Bytes are bytes; fractions sum to 1.

    target: the column to predict, or several of numbers. columns, drop: names or patterns (`px_*`) of the
    features; none chosen means all. rename: name in the source -> name in the store, also under `like`, for a
    later file that calls its columns otherwise.
    categories: how texts are stored, `onehot` unless said. category: further columns to treat like texts.
    dates: the features of a date or time; those that fit its type unless said.
    missing: what becomes of an empty cell or NaN, `error` unless said.
    like: a store whose columns, mappings and dtype are taken over, so that a model fits both.
    unknown: what becomes, under `like`, of a category that the store does not have: `error` unless said; `ignore`
    sets none of its one-hot features, as scikit-learn's OneHotEncoder does; `drop` leaves the row out, as it does
    one with an unknown class.
    dtype, categories, missing: None leaves the choice to `like`, or to the default.
    features, index_base: of svmlight files, how many features there are (None: a first pass counts them) and
    whether the first has the index 1 or 0.
    shuffle: rows in random order. None means yes, but the source's order under `like` with one split: a later file
    is there to be predicted, and its predictions are to stand beside its rows.
    codec: `auto` is lz4 where it shrinks a sample of the rows to four fifths or less, else none.
    """

    target: str | Sequence[str] | None = None
    task: Task | None = None
    columns: Sequence[str] = ()
    drop: Sequence[str] = ()
    rename: Mapping[str, str] = field(default_factory=dict)
    categories: Categories | None = None
    category: Sequence[str] = ()
    dates: Sequence[DatePart] = ()
    missing: Missing | None = None
    like: Path | str | None = None
    unknown: Unknown | None = None
    features: int | None = None
    index_base: int = 1
    splits: Mapping[str, float] = field(default_factory=lambda: {"train": 1.0})
    format: Format | None = None
    dtype: XDtype | None = None
    codec: Codec = "auto"
    shuffle: bool | None = None
    seed: int = 0
    memory_bytes: int = 1024 * MIB
    segment_bytes: int = 16 * MIB

    def __post_init__(self) -> None:
        choices = {
            "task": Task,
            "format": Format,
            "dtype": XDtype,
            "codec": Codec,
            "categories": Categories,
            "missing": Missing,
            "unknown": Unknown,
        }
        for name, allowed in choices.items():
            if getattr(self, name) is not None:
                require_choice(name, getattr(self, name), allowed)
        self._check_columns()
        require(
            self.unknown is None or self.like is not None,
            f"unknown is {self.unknown}, but without like every category is learned; leave it out",
        )
        require(self.features is None or self.features >= 1, f"features is {self.features}; use at least 1")
        require(self.index_base in (0, 1), f"index_base is {self.index_base}; use 0 or 1")
        require(self.seed >= 0, f"seed is {self.seed}; use 0 or more")
        require(self.segment_bytes >= 4096, f"segment_bytes is {self.segment_bytes}; use at least 4KiB")
        require(
            self.memory_bytes >= 4 * self.segment_bytes,
            f"memory is {self.memory_bytes} bytes but segments have {self.segment_bytes}; "
            "use at least 4 segments of memory, or smaller segments",
        )
        for name, fraction in self.splits.items():
            require(
                re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name) is not None,
                f"split name {name!r} is not allowed; use up to 64 letters, digits, _ and -",
            )
            require(0 < fraction <= 1, f"split {name} has the fraction {fraction}; use one in (0, 1]")
        total = math.fsum(self.splits.values())
        require(abs(total - 1) < 1e-6, f"split fractions sum to {total:g}; they must sum to 1")

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict; none when none was chosen."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target or ())

    def _check_columns(self) -> None:
        for name in ("columns", "drop", "category", "dates"):
            given = getattr(self, name)
            require(not isinstance(given, str), f"{name} is {given!r}; give a list of names")
            require_distinct(name, given)
        require_distinct("target", self.targets)
        for part in self.dates:
            require_choice("dates", part, DatePart)
        require_distinct("rename", list(self.rename.values()))
        require(all(self.rename.values()), "rename has an empty new name; use one of a letter at least")
