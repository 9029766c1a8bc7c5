"""Sources with chosen columns: tables, of files or of Python, and arrays under the column options.

`open_tables` reads one or several tables as one stream of batches; the first one fixes the columns and their
types. `choose_columns` picks and renames columns of arrays, whose features x0, x1, ... have no names in a file.
"""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

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
    same_family,
)
from ep3stream.conversion.recorded_columns import RecordedColumns, plan_like
from ep3stream.errors import ConfigError, SourceError
from ep3stream.formats.source import FeatureColumn, RestartPosition, RowSource, SourceBatch, reading
from ep3stream.formats.tables import (
    TableInput,
    float32_bytes,
    has_types,
    stated_rows,
    table_fingerprint,
    table_header,
    table_records,
    table_schema,
)


def open_tables(tables: Sequence[TableInput], config: ConvertConfig) -> RowSource:
    """The tables as one source, with the columns that the config asks for; under `like` those of that store.

    The columns of every table are checked here, but for the types of CSV, which show while it is read. Raises
    SourceError or ConfigError.
    """
    if config.like is not None:
        return open_tables_like(tables, RecordedColumns.of(Path(config.like)), config.rename)
    schema = _schema(tables[0])
    plan = plan_columns(str(tables[0]), schema, config)
    return _planned(tables, plan, None if config.columns else set(schema))


def open_tables_like(
    tables: Sequence[TableInput], recorded: RecordedColumns, rename: Mapping[str, str] | None = None
) -> RowSource:
    """The tables read as those of a store were; columns that the store does not have are left out.

    rename: the name of a column in these tables -> its name in the store. Raises SourceError, which names a
    column that does not match.
    """
    first = tables[0]
    plan = plan_like(str(first), _schema(first), has_types(first), recorded, rename)
    return _planned(tables, plan, None)


def _planned(tables: Sequence[TableInput], plan: ColumnPlan, allowed: set[str] | None) -> RowSource:
    for table in tables[1:]:
        _require_columns(table, plan, tables[0], allowed)
    counts = [stated_rows(table) for table in tables]
    known = [count for count in counts if count is not None]
    n_rows = sum(known) if len(known) == len(counts) else None
    return RowSource(
        name=str(tables[-1]),
        columns=plan.columns,
        target=plan.target,
        read=lambda block_bytes, start: _batches(tables, plan, block_bytes, start),
        fingerprint=tuple(map(table_fingerprint, tables)),
        files=tuple(table for table in tables if isinstance(table, Path)),
        expected_rows=n_rows,
        expected_bytes=4 * n_rows * len(plan.types)
        if n_rows is not None
        else sum(map(float32_bytes, tables)),
        described=tuple(
            {"name": str(table), "rows": count} for table, count in zip(tables, counts, strict=True)
        ),
    )


def _batches(
    tables: Sequence[TableInput], plan: ColumnPlan, block_bytes: int, start: RestartPosition
) -> Iterator[SourceBatch]:
    """All rows from `start` on, in the blocks of the reader or about `block_bytes` at a time."""
    for index, table in list(enumerate(tables))[start.file :]:
        begin = start if index == start.file else RestartPosition(index)
        file = table if isinstance(table, Path) else str(table)
        row = begin.row
        with reading(table):
            for record in table_records(table, plan.types, block_bytes, begin):
                row += record.rows.num_rows
                if not record.rows.num_rows:
                    continue
                numeric, texts, target = plan.cells(record.rows, str(file))
                yield SourceBatch(
                    file=file,
                    target_file=file,
                    file_index=index,
                    first_row=record.first_row,
                    n_rows=record.rows.num_rows,
                    end_byte=record.end_byte,
                    next=RestartPosition(index, row, record.next_byte),
                    numeric=numeric,
                    texts=texts,
                    target=target,
                )
        if row == 0:
            raise SourceError(f"{table}: has a header but no rows; leave it out or give a file with data")


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
    """Raises SourceError if a planned column is missing, has another type, or stands beside one not allowed.

    `allowed` None allows all other columns. Types are compared only if the table states them.
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


def choose_columns(source: RowSource, config: ConvertConfig) -> RowSource:
    """A source of arrays under the options of the config; raises SourceError or ConfigError.

    `columns`, `drop` and `rename` work as for tables; `category` and `dates` are refused. Under `like` the
    features must be those of the store, or as many if the store was made of a table; they get its names.
    """
    # For later files: which of as many features are meant, where only some are kept.
    source = replace(source, recorded={**source.recorded, "source_features": len(source.columns)})
    for name in ("category", "dates"):
        if getattr(config, name):
            raise ConfigError(f"{name} was given for arrays, which hold numbers alone; leave {name} out")
    if config.like is not None:
        if config.rename:
            raise ConfigError(
                "rename was given for arrays, whose columns have no names of their own; leave it out"
            )
        return _choose_like(source, RecordedColumns.of(Path(config.like)))
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
    return _with_columns(replace(source, target=target), columns, _indices(kept, names))


def _choose_like(source: RowSource, like: RecordedColumns) -> RowSource:
    where, names = source.name, [column.name for column in source.columns]
    for column in like.columns:
        if column.kind != "numeric" or column.part is not None:
            raise SourceError(
                f"{where}: holds numbers, but {column.name!r} of {like.store} was made of "
                f"{column.family or 'text'}; convert a table"
            )
    wanted = [column.source for column in like.columns]
    # Some of an array's columns can be found again by their numbers; else there must be as many.
    by_name = set(wanted) <= set(names) and (
        len(names) == like.n_source_features or set(wanted) != set(names[: len(wanted)])
    )
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
    indices = _indices(wanted, names) if set(wanted) <= set(names) else None
    return _with_columns(
        replace(source, target=replace(target, names=like.target.names)), like.columns, indices
    )


def _indices(wanted: Sequence[str], names: Sequence[str]) -> NDArray[np.intp] | None:
    """The index of each wanted column among the names; None if these are all columns, in order."""
    index = {name: j for j, name in enumerate(names)}
    return None if list(wanted) == list(names) else np.array([index[name] for name in wanted], np.intp)


def _with_columns(
    source: RowSource, columns: tuple[FeatureColumn, ...], indices: NDArray[np.intp] | None
) -> RowSource:
    """A source of arrays with its columns at `indices` only, called `columns`; None keeps all columns."""

    def read(block_bytes: int, start: RestartPosition) -> Iterator[SourceBatch]:
        for batch in source.batches(block_bytes, start):
            if indices is None:
                yield batch
            else:
                x = np.hstack([piece.reshape(batch.n_rows, -1) for piece in batch.numeric])
                yield replace(batch, numeric=(x[:, indices],))

    n_targets = len(source.target.names)
    n_bytes = source.expected_bytes * (len(columns) + n_targets) // (len(source.columns) + n_targets)
    return replace(source, columns=columns, read=read, expected_bytes=n_bytes)
