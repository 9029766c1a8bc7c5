"""Files that are splits by themselves: one store of a training file, a validation file and a test file.

The rows of the first source are dealt to the splits of `--split`; those of each `--split-file` are a split of their
own. All are read as one source, one behind the other. The first one decides: its columns, kinds of values, categories,
labels and means hold for the later ones, which are read as `--like` reads a later file.
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

from ep3stream.config import ConvertConfig
from ep3stream.conversion.missing_values import policies_of
from ep3stream.conversion.open_source import open_source
from ep3stream.conversion.recorded_columns import RecordedColumns, describe_columns
from ep3stream.formats.arrays import is_array_file
from ep3stream.formats.source import RestartPosition, RowSource, SourceBatch, known_total

_LOGGER = logging.getLogger(__name__)

# Files that a message names.
_MAX_NAMED = 5


@dataclass(frozen=True, slots=True)
class SourcePart:
    """One of the sources that a store is made of.

    split: the split of all of its rows; None for the first source, whose rows are dealt.
    first_place: files of the parts before it as restart positions count them. first_file: as digests count them.
    """

    source: RowSource
    split: str | None = None
    first_place: int = 0
    first_file: int = 0

    @property
    def n_places(self) -> int:
        """How many values of `RestartPosition.file` are this part's; one for an object of Python."""
        return max(1, len(self.source.files))

    def batches(self, block_bytes: int, start: RestartPosition) -> Iterator[SourceBatch]:
        """The part's rows behind `start`, a position among all parts, as is the `next` of each batch."""
        if start.file < self.first_place:
            start = RestartPosition(self.first_place)
        batches = self.source.batches(block_bytes, replace(start, file=start.file - self.first_place))
        if not self.first_place:
            yield from batches
            return
        for batch in batches:
            yield replace(batch, next=replace(batch.next, file=batch.next.file + self.first_place))


@dataclass(frozen=True, slots=True)
class SplitSources:
    """The sources of a store, in the order in which they are read."""

    parts: tuple[SourcePart, ...]

    @classmethod
    def open(cls, first: RowSource, config: ConvertConfig, like: RecordedColumns | None) -> SplitSources:
        """The first source and those of `split_files`, opened like it, or like the store that all follow.

        Raises SourceError, which names what does not fit the first source.
        """
        parts = [SourcePart(first)]
        settings = config
        if like is None and config.split_files:
            like = columns_learned(first, config)
            settings = ConvertConfig(task=first.target.task, partitions=config.partitions)
        for split, paths in config.split_files.items():
            last = parts[-1]
            source = open_source(paths, settings, like=like)
            parts.append(
                SourcePart(
                    source,
                    split,
                    last.first_place + last.n_places,
                    last.first_file + len(last.source.files),
                )
            )
        _tell_shared_files(parts, next(iter(config.splits)))
        return cls(tuple(parts))

    @property
    def first(self) -> RowSource:
        """The source that decides about the columns."""
        return self.parts[0].source

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, in order."""
        return tuple(file for part in self.parts for file in part.source.files)

    @property
    def expected_rows(self) -> int | None:
        """The number of rows, if all formats state it."""
        return known_total(part.source.expected_rows for part in self.parts)

    @property
    def expected_bytes(self) -> int:
        """About how many bytes the rows will take as float32."""
        return sum(part.source.expected_bytes for part in self.parts)

    @property
    def fingerprint(self) -> list[Mapping[str, Any]]:
        """JSON that changes if a source changes, or the split of one."""
        return [entry for part in self.parts for entry in _of_split(part, part.source.fingerprint)]

    def described(self, files: Sequence[Mapping[str, Any]]) -> tuple[Mapping[str, Any], ...]:
        """What the manifest says of the sources, given the digests of all files, in order."""
        described: list[Mapping[str, Any]] = []
        for part in self.parts:
            own = files[part.first_file : part.first_file + len(part.source.files)]
            described += _of_split(part, own or part.source.described)
        return tuple(described)

    def later_batches(
        self,
        block_bytes: int,
        start: RestartPosition,
        look_ahead: Callable[[Iterator[SourceBatch]], Iterator[SourceBatch]],
    ) -> Iterator[tuple[SourcePart, SourceBatch]]:
        """The rows of all parts but the first behind `start`; of a part from its first row on, `look_ahead` of them."""
        for part in self.parts[1:]:
            if start.file < part.first_place + part.n_places:
                batches = part.batches(block_bytes, start)
                is_whole = (start.file, start.row) <= (part.first_place, 0)
                for batch in look_ahead(batches) if is_whole else batches:
                    yield part, batch


def columns_learned(source: RowSource, config: ConvertConfig) -> RecordedColumns:
    """The columns of an opened source as a store's record would have them, without values, which come with its rows."""
    record = describe_columns(
        source.columns,
        source.target,
        {column.name: () for column in source.columns if column.kind == "category"},
        {},
        policies_of(source, config.missing),
        (),
        source.recorded,
        {},
    )
    class_names = None if source.target.task == "regression" else ()
    columns = {"columns": record, "x_dtype": config.dtype or "float32"}
    learned = RecordedColumns.read(Path(source.name), columns, source.target.names, class_names)
    return replace(learned, left_out=("*",) if config.columns else tuple(config.drop))


def _of_split(part: SourcePart, entries: Sequence[Mapping[str, Any]]) -> list[Mapping[str, Any]]:
    return [*entries] if part.split is None else [{**entry, "split": part.split} for entry in entries]


def _tell_shared_files(parts: Sequence[SourcePart], first_split: str) -> None:
    """Warns of a file that is in two splits."""
    splits: dict[Path, str] = {}
    for part in parts:
        split = part.split or first_split
        names = [str(file) for file in part.source.files]
        # Of a file of several arrays, each may be another split.
        own = names if part.source.name in names else [part.source.name] * bool(names)
        for file in dict.fromkeys(Path(name).resolve() for name in own):
            if file in splits:
                _LOGGER.warning(
                    "%s is in split %s and in split %s: both have its rows", file, splits[file], split
                )
            splits.setdefault(file, split)


def tell_same_content(parts: SplitSources, files: Sequence[Mapping[str, Any]], first_split: str) -> None:
    """Warns of two files with the same digest, given the digests of all files, in order."""
    again: list[str] = []
    seen: dict[Any, tuple[Path, str]] = {}
    owners = [(part.split or first_split, file) for part in parts.parts for file in part.source.files]
    for (split, path), entry in zip(owners, files, strict=True):
        if (digest := entry.get("digest")) is None:
            continue
        other, its_split = seen.setdefault(digest, (path, split))
        if its_split != split and other.resolve() != path.resolve():
            _LOGGER.warning(
                "%s of split %s has the same bytes as %s of split %s", path, split, other, its_split
            )
        elif other.resolve() != path.resolve() and not is_array_file(path):  # x and y may be alike.
            again.append(f"{path} (like {other})")
    if again:
        more = f" and {len(again) - _MAX_NAMED} more" if len(again) > _MAX_NAMED else ""
        _LOGGER.warning(
            "files with the same bytes as another one, so that their rows are there twice: %s%s",
            ", ".join(again[:_MAX_NAMED]),
            more,
        )
