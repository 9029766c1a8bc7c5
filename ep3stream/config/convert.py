"""The settings of a conversion."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Literal, get_args

from ep3stream.config.parse import (
    MIB,
    parse_bytes,
    parse_date_formats,
    parse_missing,
    parse_names,
    parse_renames,
    parse_split_file,
    parse_splits,
)
from ep3stream.config.settings import at_least, check_settings, require, require_distinct, setting

Task = Literal["regression", "classification"]

Format = Literal["zarr", "hdf5"]

XDtype = Literal["float32", "float16"]

Codec = Literal["auto", "none", "lz4", "zstd"]

Categories = Literal["onehot", "codes"]

Missing = Literal["auto", "error", "mean", "drop"]

Unknown = Literal["error", "ignore", "drop"]

Invalid = Literal["error", "drop"]

DatePart = Literal["days", "yearday", "minute", "month", "day", "weekday", "hour"]

DateParts = Literal["codes", "numbers"]

# `predict` has these options as well.
PARTITIONS_HELP = (
    "key=value folders above named files and directories become columns, as those below a directory always do"
)
UNKNOWN_HELP = (
    "a category that the store does not have: error stops; ignore takes the code -1, which is like none of the "
    "column's, or sets none of its 0/1 features; drop leaves the row out, as it does a row of an unknown class"
)
RENAME_LIKE_HELP = "what this file calls a column = what the store calls it"


@dataclass(frozen=True, slots=True)
class ConvertConfig:
    """How `convert` reads a source and lays out the store; docs/settings.md tells each setting.

    Where dtype, categories or missing is None, the store of `like` decides, or else the default.
    """

    target: str | Sequence[str] | None = setting(
        None, "column to predict, or several of numbers", metavar="COL,...", parse=parse_names
    )
    task: Task | None = setting(
        None, "whether the target is a number or a class", default_means="by the type of the target"
    )
    columns: Sequence[str] = setting(
        (),
        "the features, in this order: names, or patterns like px_*",
        default_means="all but the target",
        metavar="COL,...",
        parse=parse_names,
    )
    drop: Sequence[str] = setting(
        (), "columns to leave out; patterns too", default_means="none", metavar="COL,...", parse=parse_names
    )
    rename: Mapping[str, str] = setting(
        dict,
        f"new names of columns in the store; with --like: {RENAME_LIKE_HELP}",
        default_means="none",
        metavar="OLD=NEW,...",
        parse=parse_renames,
    )
    categories: Categories | None = setting(
        None,
        "how texts are stored: as codes, one whole number for each category, or as 0/1 features",
        default_means="codes",
    )
    category: Sequence[str] = setting(
        (),
        "columns whose values are categories, or classes for the target: in CSV the texts of the file, so that 01234 "
        "is not 1234",
        default_means="those of texts",
        metavar="COL,...",
        parse=parse_names,
    )
    number: Sequence[str] = setting(
        (),
        "columns of numbers, whatever the first rows of a CSV suggest; texts of other tables too",
        default_means="those of numbers",
        metavar="COL,...",
        parse=parse_names,
    )
    date: Mapping[str, str] = setting(
        dict,
        "how columns of dates are written, in the letters of strptime: due=%d.%m.%Y",
        default_means="ISO 8601, or the one common format that fits the first rows",
        metavar="COL=FORMAT,...",
        parse=parse_date_formats,
    )
    dates: Sequence[DatePart] = setting(
        (),
        "features of a date or time: days, yearday, minute (of the day), month, day, weekday, hour",
        default_means="all but day",
        metavar="PART,...",
        parse=parse_names,
    )
    date_parts: DateParts | None = setting(
        None,
        "what month, weekday and hour become: categories, or numbers, which with days are the default parts then",
        default_means="codes; with --categories onehot numbers",
    )
    missing: Missing | Mapping[str, Missing] | None = setting(
        None,
        "an empty cell or NaN: auto and mean put the column's mean and add a 0/1 feature `COL (missing)`, make a text "
        "the category (missing), and leave out a row without a target; drop leaves the row out; error stops",
        default_means="auto",
        metavar="POLICY|COL=POLICY,...",
        parse=parse_missing,
    )
    missing_words: Sequence[str] = setting(
        (),
        "texts that are gaps in every column, like ? or -",
        default_means="in columns of numbers and dates NA, N/A, null, nan and the like; in columns of texts none",
        metavar="WORD,...",
        parse=parse_names,
    )
    invalid: Invalid | None = setting(
        None,
        "a text in a column of numbers or dates: error names its row and the text, drop leaves the row out",
        default_means="error; with --like that of the store",
    )
    like: Path | str | None = setting(
        None,
        "take over that store's columns, mappings and dtype, so that a model fits both",
        metavar="STORE",
        parse=Path,
    )
    partitions: bool = setting(False, PARTITIONS_HELP)
    unknown: Unknown | None = setting(
        None,
        f"with --like or --split-file, {UNKNOWN_HELP}",
        default_means="error; for a --split-file ignore",
    )
    features: int | None = setting(
        None,
        "number of features of svmlight files",
        limit=at_least(1),
        default_means="counted in a first pass; with --like those of the store",
    )
    index_base: Literal[0, 1] | None = setting(
        None, "index of the first feature of svmlight files", default_means="1; with --like that of the store"
    )
    splits: Mapping[str, float] = setting(
        lambda: {"train": 1.0},
        "splits of the store, and each one's share of the rows",
        option="split",
        metavar="NAME=FRACTION,...",
        parse=parse_splits,
    )
    split_files: Mapping[str, Path | str | Sequence[Path | str]] = setting(
        dict,
        "a further split and its own file, directory or pattern, with the columns and categories of the first source; "
        "may be given again",
        option="split-file",
        default_means="none",
        metavar="NAME=PATH",
        parse=parse_split_file,
        repeats=True,
    )
    format: Format | None = setting(
        None, "format of the store", default_means="hdf5 for .h5 and .hdf5, else zarr"
    )
    dtype: XDtype | None = setting(None, "type of the stored inputs", default_means="float32")
    codec: Codec = setting(
        "auto",
        "compression of a zarr store; auto is lz4 where it shrinks a sample of the rows by a fifth or more, else none",
    )
    shuffle: bool | None = setting(
        None,
        "put the rows in random order",
        # A later file is there to be predicted, and its predictions are to stand beside its rows.
        default_means="yes; with --like and one split no",
    )
    seed: int = setting(0, "seed of splits and shuffle", limit=at_least(0, "0 or more"))
    memory_bytes: int = setting(
        1024 * MIB,
        "bytes that the rows on their way may take",
        option="memory",
        metavar="BYTES",
        parse=parse_bytes,
        on_resume="free",
    )
    segment_bytes: int = setting(
        16 * MIB,
        "size of a segment: the rows that are read and checked together",
        limit=at_least(4096, "at least 4KiB"),
        metavar="BYTES",
        parse=parse_bytes,
    )

    def __post_init__(self) -> None:
        check_settings(self)
        require_distinct("rename", list(self.rename.values()))
        stated = {"category": self.category, "number": self.number, "date": tuple(self.date)}
        for one, other in (("number", "category"), ("date", "category"), ("date", "number")):
            both = [name for name in stated[one] if name in stated[other]]
            require(
                not both,
                f"{both and both[0]!r} is in {one} and in {other}; leave it out of one of the two",
            )
        require(all(self.rename.values()), "rename has an empty new name; use one of a letter at least")
        for column, policy in self.missing.items() if isinstance(self.missing, Mapping) else ():
            require(
                policy in get_args(Missing),
                f"missing of {column!r} is {policy!r:.80}; choose one of {', '.join(get_args(Missing))}",
            )
        require(
            self.unknown is None or self.like is not None or bool(self.split_files),
            f"unknown is {self.unknown}, but without like every category is learned; leave it out",
        )
        require(
            self.memory_bytes >= 4 * self.segment_bytes,
            f"memory is {self.memory_bytes} bytes but segments have {self.segment_bytes}; "
            "use at least 4 segments of memory, or smaller segments",
        )
        for name in (*self.splits, *self.split_files):
            require(
                re.fullmatch(r"[A-Za-z0-9_][A-Za-z0-9_-]{0,63}", name) is not None,
                f"split name {name!r} is not allowed; use up to 64 letters, digits, _ and -",
            )
        for name, paths in self.split_files.items():
            require(
                name not in self.splits,
                f"split_files has {name!r}, but that is a split of the source itself; give it another name",
            )
            given = [paths] if isinstance(paths, str | Path) else paths
            require(
                isinstance(given, Sequence) and all(isinstance(each, str | Path) for each in given),
                f"split_files of {name!r} is a {type(paths).__name__}; name files, and save first what is in memory",
            )
            require(
                bool(given) and all(str(each) for each in given),
                f"split_files has no file for {name!r}; name one",
            )
        for name, fraction in self.splits.items():
            require(0 < fraction <= 1, f"split {name} has the fraction {fraction}; use one in (0, 1]")
        total = math.fsum(self.splits.values())
        require(abs(total - 1) < 1e-6, f"split fractions sum to {total:g}; they must sum to 1")

    @property
    def split_names(self) -> tuple[str, ...]:
        """The splits of the store: those of the source, then those with files of their own."""
        return (*self.splits, *self.split_files)

    @property
    def targets(self) -> tuple[str, ...]:
        """The columns to predict; none when none was chosen."""
        return (self.target,) if isinstance(self.target, str) else tuple(self.target or ())
