"""Column options for arrays, whose features x0, x1, ... and targets are numbers without names in a file."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig
from ep3stream.data.conversion.batch import START, Batch, Column, Position, Source, Target
from ep3stream.data.conversion.columns import choose, rename_target, require_distinct, require_known
from ep3stream.data.conversion.recorded import Recorded
from ep3stream.errors import ConfigError, SourceError


def choose_columns(source: Source, config: ConvertConfig) -> Source:
    """A source of numbers under the options of the config; raises SourceError or ConfigError.

    `columns`, `drop` and `rename` work as for tables; `category` and `dates` are refused. Under `like` the
    features must be those of the store, or as many where it was made of a table; they get its names.
    """
    for name in ("category", "dates"):
        if getattr(config, name):
            raise ConfigError(f"{name} was given for arrays, which hold numbers alone; leave {name} out")
    if config.like is not None:
        if config.rename:
            raise ConfigError(
                "rename was given for arrays, whose columns have no names of their own; leave it out"
            )
        return _like(source, Recorded.of(Path(config.like)))
    if not (config.columns or config.drop or config.rename):
        return source
    where, names = source.name, [column.name for column in source.columns]
    dropped = set(choose(where, config.drop, names, "--drop"))
    chosen = choose(where, config.columns, names, "--columns") if config.columns else names
    kept = [name for name in chosen if name not in dropped]
    if not kept:
        raise SourceError(f"{where}: no feature is left; choose at least one")
    require_known(where, tuple(config.rename), [*kept, *source.target.names], "--rename")
    columns = tuple(Column(config.rename.get(name, name), "numeric", name) for name in kept)
    target = rename_target(source.target, config.rename)
    require_distinct(where, columns, target)
    return ChosenColumns(source, columns, target, _places(kept, names))


def _like(source: Source, like: Recorded) -> Source:
    where, names = source.name, [column.name for column in source.columns]
    for column in like.columns:
        if column.kind != "numeric" or column.part is not None:
            raise SourceError(
                f"{where}: holds numbers, but {column.name!r} of {like.store} was made of "
                f"{column.family or 'text'}; convert a table"
            )
    wanted = [column.source for column in like.columns]
    # Some of an array's columns can be found again by their numbers; else there must be as many.
    by_name = set(wanted) <= set(names) and set(wanted) != set(names[: len(wanted)])
    if not by_name and len(names) != len(wanted):
        raise SourceError(
            f"{where}: has {len(names)} features but {like.store} has {len(wanted)}; "
            "give arrays of the same columns"
        )
    target, outputs = source.target, len(like.target.names)
    if target.task != like.task or len(target.names) != outputs:
        raise SourceError(
            f"{where}: its target is {len(target.names)} column(s) for {target.task}, but {like.store} has "
            f"{outputs} for {like.task}; give the same kind of y"
        )
    places = _places(wanted, names) if set(wanted) <= set(names) else None
    return ChosenColumns(source, like.columns, replace(target, names=like.target.names), places)


def _places(wanted: Sequence[str], names: Sequence[str]) -> NDArray[np.intp] | None:
    """Of the wanted columns among the names; None where they are all, in order."""
    place = {name: index for index, name in enumerate(names)}
    return None if list(wanted) == list(names) else np.array([place[name] for name in wanted], np.intp)


@dataclass(frozen=True, slots=True)
class ChosenColumns:
    """Some columns of a source of numbers, in another order or under other names.

    places: of the columns among those of `source`; None keeps all in their order.
    """

    source: Source
    columns: tuple[Column, ...]
    target: Target
    places: NDArray[np.intp] | None

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, in order."""
        return self.source.files

    @property
    def label_values(self) -> tuple[int, ...] | None:
        """All integer labels, sorted, where they are known."""
        return self.source.label_values

    @property
    def expected_rows(self) -> int | None:
        """The number of rows, where it is stated."""
        return self.source.expected_rows

    @property
    def expected_bytes(self) -> int:
        """About how many bytes the rows will take as float32."""
        n_columns = len(self.columns) + len(self.target.names)
        return self.source.expected_bytes * n_columns // (len(self.source.columns) + len(self.target.names))

    @property
    def name(self) -> str:
        """What messages about the whole source call it."""
        return self.source.name

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells as JSON whether it is the same source as before."""
        return self.source.fingerprint()

    def described(self) -> tuple[dict[str, Any], ...]:
        """What the manifest says of a source without files."""
        return self.source.described()

    def batches(self, block_bytes: int, start: Position = START) -> Iterator[Batch]:
        """The source's batches with the chosen columns alone."""
        for batch in self.source.batches(block_bytes, start):
            if self.places is None:
                yield batch
            else:
                x = np.hstack([piece.reshape(batch.n_rows, -1) for piece in batch.numeric])
                yield replace(batch, numeric=(x[:, self.places],))
