"""Column options for arrays, whose features x0, x1, ... and targets are numbers without names in a file.

Tables, of files or of Python, as one stream of batches, whose columns and types the first file fixes.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import ConvertConfig
from ep3stream.conversion.columns import (
    ColumnPlan,
    choose,
    family_of,
    plan_columns,
    rename_target,
    require_distinct,
    require_known,
)
from ep3stream.conversion.recorded_columns import RecordedColumns, plan_like, same_family
from ep3stream.errors import ConfigError, SourceError
from ep3stream.formats.source import (
    START,
    FeatureColumn,
    RestartPosition,
    RowSource,
    SourceBatch,
    TargetColumns,
    reading,
)
from ep3stream.formats.tables import (
    TableInput,
    TableRows,
    float32_bytes,
    has_types,
    stated_rows,
    table_fingerprint,
    table_header,
    table_records,
    table_schema,
)


def choose_columns(source: RowSource, config: ConvertConfig) -> RowSource:
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
        return _like(source, RecordedColumns.of(Path(config.like)))
    if not (config.columns or config.drop or config.rename):
        return source
    where, names = source.name, [column.name for column in source.columns]
    dropped = set(choose(where, config.drop, names, "--drop"))
    chosen = choose(where, config.columns, names, "--columns") if config.columns else names
    kept = [name for name in chosen if name not in dropped]
    if not kept:
        raise SourceError(f"{where}: no feature is left; choose at least one")
    require_known(where, tuple(config.rename), [*kept, *source.target.names], "--rename")
    columns = tuple(FeatureColumn(config.rename.get(name, name), "numeric", name) for name in kept)
    target = rename_target(source.target, config.rename)
    require_distinct(where, columns, target)
    return ChosenColumns(source, columns, target, _places(kept, names))


def _like(source: RowSource, like: RecordedColumns) -> RowSource:
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

    source: RowSource
    columns: tuple[FeatureColumn, ...]
    target: TargetColumns
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

    def batches(self, block_bytes: int, start: RestartPosition = START) -> Iterator[SourceBatch]:
        """The source's batches with the chosen columns alone."""
        for batch in self.source.batches(block_bytes, start):
            if self.places is None:
                yield batch
            else:
                x = np.hstack([piece.reshape(batch.n_rows, -1) for piece in batch.numeric])
                yield replace(batch, numeric=(x[:, self.places],))


@dataclass(frozen=True, slots=True)
class TableSource:
    """One or several tables with the same columns; the first file's order and types hold for all."""

    tables: tuple[TableInput, ...]
    plan: ColumnPlan
    expected_rows: int | None
    expected_bytes: int

    @classmethod
    def open(cls, tables: Sequence[TableInput], config: ConvertConfig) -> TableSource:
        """Check every table's columns and plan how each is read; raises SourceError or ConfigError."""
        if config.like is not None:
            return cls.like(tables, RecordedColumns.of(Path(config.like)), config.rename)
        schema = _schema(tables[0])
        plan = plan_columns(str(tables[0]), schema, config)
        return cls._of(tables, plan, None if config.columns else set(schema))

    @classmethod
    def like(
        cls, tables: Sequence[TableInput], recorded: RecordedColumns, rename: Mapping[str, str] | None = None
    ) -> TableSource:
        """Read as that store's were; other columns are left out. Raises SourceError for what does not match.

        rename: what these tables call a column -> what the store calls it.
        """
        first = tables[0]
        plan = plan_like(str(first), _schema(first), has_types(first), recorded, rename)
        return cls._of(tables, plan, None)

    @classmethod
    def _of(cls, tables: Sequence[TableInput], plan: ColumnPlan, allowed: set[str] | None) -> TableSource:
        for table in tables[1:]:
            _require_columns(table, plan, tables[0], allowed)
        n_rows = _stated_rows(tables)
        n_bytes = 4 * n_rows * len(plan.types) if n_rows is not None else sum(map(float32_bytes, tables))
        return cls(tuple(tables), plan, n_rows, n_bytes)

    @property
    def name(self) -> str:
        """What messages about the whole source call it."""
        return str(self.tables[-1])

    @property
    def files(self) -> tuple[Path, ...]:
        """Every file that is read, in order."""
        return tuple(table for table in self.tables if isinstance(table, Path))

    def fingerprint(self) -> list[dict[str, Any]]:
        """What tells as JSON whether these are the same tables as before."""
        return [table_fingerprint(table) for table in self.tables]

    def described(self) -> tuple[dict[str, Any], ...]:
        """What the manifest says of tables without files."""
        return tuple({"name": str(table), "rows": stated_rows(table)} for table in self.tables)

    @property
    def columns(self) -> tuple[FeatureColumn, ...]:
        """The feature columns."""
        return self.plan.columns

    @property
    def target(self) -> TargetColumns:
        """What is learned."""
        return self.plan.target

    @property
    def label_values(self) -> None:
        """Tables are read once, so their labels are known at the end only."""
        return

    def batches(self, block_bytes: int, start: RestartPosition = START) -> Iterator[SourceBatch]:
        """All rows from `start` on in order, in the blocks of the reader or about `block_bytes` at a time."""
        for index, table in list(enumerate(self.tables))[start.file :]:
            begin = start if index == start.file else RestartPosition(index)
            row = begin.row
            with reading(table):
                for record in table_records(table, self.plan.types, block_bytes, begin):
                    row += record.rows.num_rows
                    if record.rows.num_rows:
                        yield self._to_batch(record, table, index)
            if row == 0:
                raise SourceError(f"{table}: has a header but no rows; leave it out or give a file with data")

    def _to_batch(self, record: TableRows, table: TableInput, index: int) -> SourceBatch:
        rows = record.rows
        file = table if isinstance(table, Path) else str(table)
        numeric, texts, target = self.plan.cells(rows, str(file))
        return SourceBatch(
            file=file,
            target_file=file,
            file_index=index,
            first_row=record.first_row,
            n_rows=rows.num_rows,
            end_byte=record.end_byte,
            next=RestartPosition(index, record.first_row + rows.num_rows, record.next_byte),
            numeric=numeric,
            texts=texts,
            target=target,
        )


def _stated_rows(tables: Sequence[TableInput]) -> int | None:
    stated = [stated_rows(table) for table in tables]
    counts = [count for count in stated if count is not None]
    return sum(counts) if len(counts) == len(stated) else None


def _schema(table: TableInput) -> dict[str, pa.DataType]:
    """The type of each column by its name, for CSV as the first rows suggest it; raises SourceError."""
    with reading(table):
        schema = table_schema(table)
    _require_unique(table, schema.names)
    return {field.name: field.type for field in schema}


def _require_unique(table: TableInput, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise SourceError(f"{table}: has {name!r} twice among its columns; rename one")


def _require_columns(
    table: TableInput, plan: ColumnPlan, first: TableInput, allowed: set[str] | None
) -> None:
    """The planned columns must be there, and beside them none but those `allowed`; None allows all.

    Names for CSV, whose types only show while it is read; names and types for what states them.
    """
    with reading(table):
        names = table_header(table)
    _require_unique(table, names)
    found = _schema(table) if has_types(table) else {}
    others = [] if allowed is None else [name for name in names if name not in allowed]
    for name in [*plan.types, *others]:
        if name not in names or name not in plan.types:
            difference = f"only {first if name in plan.types else table} has {name!r}"
        elif name in found and not same_family(
            family_of(found[name], f"{table}: column {name!r}"), plan.families[name]
        ):
            difference = f"{name!r} is {found[name]} but {plan.types[name]} there"
        else:
            continue
        raise SourceError(
            f"{table}: its columns differ from those of {first}: {difference}; convert it separately"
        )
