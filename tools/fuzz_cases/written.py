"""What a way of writing returns, and what all ways share."""

from __future__ import annotations

import random
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from itertools import pairwise
from pathlib import Path
from typing import Any

from hypothesis import strategies as st

from fuzz_cases.known_tables import Table


@dataclass(frozen=True)
class Written:
    """A table as it lies on the disk or in Python.

    source: makes what `convert` takes, anew for each call. truth: the rows in the order of the source.
    options: settings that the way of writing needs. may_refuse: patterns of refusals that are no faults.
    strays: column, row, word of texts in columns of numbers or dates. fills_are_means: whether gaps are filled with
    the means of these rows. later: rows in a file that becomes a split of its own, by --split-file.
    """

    source: Callable[[], Any]
    truth: Table
    options: dict[str, Any] = field(default_factory=dict)
    call: dict[str, Any] = field(default_factory=dict)
    may_refuse: tuple[str, ...] = ()
    strays: tuple[tuple[str, int, str], ...] = ()
    fills_are_means: bool = True
    later: Written | None = None


def cut(n_rows: int, n_parts: int, rng: random.Random) -> list[slice]:
    """Bounds of n parts of at least one row each, as far as there are rows."""
    n_parts = min(n_parts, n_rows)
    places = [0, *sorted(rng.sample(range(1, n_rows), n_parts - 1)), n_rows]
    return [slice(a, b) for a, b in pairwise(places)]


SOURCE_KINDS = ("list", "directory", "pattern", "link")


def as_source(kind: str, folder: Path, files: list[Path]) -> Any:
    """The files as a list, as the directory that holds them, as a pattern, or as a link to the directory."""
    if kind == "directory":
        return folder
    if kind == "pattern":
        return str(folder / "*")
    if kind == "link":
        link = folder.with_name(folder.name + "-link")
        link.symlink_to(folder, target_is_directory=True)
        return link
    return files


def choice(*values: Any) -> Any:
    """One of the values; the first one, which is plain, in half of the cases."""
    return st.one_of(st.just(values[0]), st.sampled_from(values))


seeds = st.integers(0, 2**32 - 1)


def folders(root: Path) -> Iterator[Path]:
    """A new directory below `root`, again and again."""
    number = 0
    while True:
        made = root / str(number)
        made.mkdir()
        yield made
        number += 1
