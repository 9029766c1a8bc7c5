"""Sources with chosen columns: tables, of files or of Python, and arrays under the column options.

`open_tables` reads one or several tables as one stream of batches; the first one fixes the columns and their
types. `choose_columns` picks and renames columns of arrays, whose features x0, x1, ... have no names in a file.
"""

from __future__ import annotations

import logging
import re
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
    plan_columns,
    read_type,
    rename_target,
    require_distinct,
    require_known,
    text_rules,
)
from ep3stream.conversion.conform import conformed, family_or_none, fits, wider
from ep3stream.conversion.find_files import FoundFile
from ep3stream.conversion.recorded_columns import RecordedColumns, plan_like
from ep3stream.errors import ConfigError, SourceError
from ep3stream.formats.csv_types import ColumnTypes
from ep3stream.formats.partitions import PartitionedFile, folder_texts, partition_types
from ep3stream.formats.python_objects import PythonTable
from ep3stream.formats.source import (
    BatchOrigin,
    FeatureColumn,
    RestartPosition,
    RowSource,
    SourceBatch,
    known_total,
    reading,
)
from ep3stream.formats.svmlight import passed_over_words
from ep3stream.formats.tables import (
    TableInput,
    file_of,
    float32_bytes,
    has_rows,
    has_types,
    stated_rows,
    table_fingerprint,
    table_header,
    table_records,
    table_types,
)
from ep3stream.formats.text_cells import TextRules, looks_like_amount, option_name

_LOGGER = logging.getLogger(__name__)

# What pandas and Dask call the index of a DataFrame in Parquet and Arrow files, if it has no name.
_INDEX = re.compile(r"__index_level_\d+__|__null_dask_index__")

# Texts that are not packed: no rows may be no bytes. Other formats without rows still have a header.
_BARE_SUFFIXES = (".csv", ".tsv", ".svm", ".svmlight", ".libsvm")


def open_tables(
    tables: Sequence[TableInput],
    config: ConvertConfig,
    like: RecordedColumns | None = None,
    has_target: bool = True,
) -> RowSource:
    """The tables as one source, with the columns that the config asks for; under `like` those of that store.

    has_target: whether the config must choose a target.
    The columns of every table are checked here, but for the types of CSV, which show while it is read. Raises
    SourceError or ConfigError.
    """
    if like is None and config.like is not None:
        like = RecordedColumns.of(Path(config.like))
    if like is not None:
        if config.invalid is not None:
            like = replace(like, rules=replace(like.rules, drops_strays=config.invalid == "drop"))
        return open_tables_like(tables, like, config.rename)
    rules = text_rules(config)
    found = _types_of_all(tables, rules)
    schema = _without_index(tables[0], {field.name: field.type for field in found.schema}, config)
    rules = replace(rules, formats=found.formats)
    plan = plan_columns(str(tables[0]), schema, config, rules, has_target)
    _tell(tables[0], found, plan)
    return _planned(tables, plan, None if config.columns else set(schema))


def _without_index(
    table: TableInput, schema: dict[str, pa.DataType], config: ConvertConfig
) -> dict[str, pa.DataType]:
    """The columns without the index of pandas or Dask that has no name, unless the config names it."""
    stated = {*config.columns, *config.drop, *config.targets, *config.rename}
    stated |= {*config.category, *config.number, *config.date}
    index = [name for name in schema if _INDEX.fullmatch(name) and name not in stated]
    if index:
        _LOGGER.warning(
            "%s: %s is the index of a DataFrame without a name, so it is left out; --columns takes it",
            table,
            " and ".join(map(repr, index)),
        )
    return {name: dtype for name, dtype in schema.items() if name not in index}


def open_tables_like(
    tables: Sequence[TableInput], recorded: RecordedColumns, rename: Mapping[str, str] | None = None
) -> RowSource:
    """The tables read as those of a store were; columns that the store does not have are left out.

    rename: the name of a column in these tables -> its name in the store. Raises SourceError, which names a
    column that does not match.
    """
    first = tables[0]
    schema = _schema(first, recorded.rules)
    plan = plan_like(str(first), schema, has_types(first), recorded, rename)
    return _planned(tables, plan, None)


def require_columns_like(table: TableInput, recorded: RecordedColumns, rename: Mapping[str, str]) -> None:
    """Raises SourceError unless a table without rows has the columns of a store."""
    with reading(table):
        schema = dict(_schema(table)) if has_types(table) else dict.fromkeys(table_header(table), pa.null())
    plan_like(str(table), schema, has_types(table), recorded, rename)


def tables_with_rows(files: Sequence[FoundFile], may_be_empty: bool = False) -> list[FoundFile]:
    """The files without those that have no row, as Spark writes them; raises SourceError if none has one.

    A single file is left to its reader, but with `may_be_empty`: then no file may be left.
    """
    if len(files) == 1:
        _require_bytes(files[0].path)
        if not may_be_empty:
            return list(files)
    empty = []
    for file in files:
        if file.path.suffix.lower() not in _BARE_SUFFIXES:
            _require_bytes(file.path)
        with reading(file.path):
            if not has_rows(file.path):
                empty.append(file)
    if len(empty) == len(files) and not may_be_empty:
        raise SourceError(f"{files[0].path}: has no rows, nor has any of the other {len(files) - 1} files")
    if empty and len(files) > 1:
        _LOGGER.info("%s", passed_over_words([file.path for file in empty]))
    return [file for file in files if file not in empty]


def _require_bytes(file: Path) -> None:
    with reading(file):
        if file.stat().st_size == 0:
            raise SourceError(f"{file}: is empty; leave it out or give a file with data")


def with_folders(
    files: Sequence[FoundFile], config: ConvertConfig, like: RecordedColumns | None = None
) -> list[TableInput]:
    """The files with the columns that key=value folders name: those below a named directory, or with
    `partitions` those above it and above named files too.

    Raises SourceError for files that lie in folders of other keys.
    """
    texts = [folder_texts(file.path, file.below, config.partitions) for file in files]
    for file, found in zip(files, texts, strict=True):
        if found.keys() != texts[0].keys():
            told = [", ".join(keys) or "none" for keys in (texts[0], found)]
            raise SourceError(
                f"{file.path}: lies in folders of {told[1]}, but {files[0].path} in those of {told[0]}; "
                "put all parts at the same depth, or convert them separately"
            )
    if not texts[0]:
        _tell_folders(files, config)
        return [file.path for file in files]
    renamed = {key: config.rename.get(key, key) for key in texts[0]}
    kinds, families = {}, {}
    if like is not None:
        kinds = {column.source: column.kind for column in like.columns}
        families = {column.source: column.family for column in like.columns}
    as_text = [
        key for key, name in renamed.items() if key in config.category or kinds.get(name) == "category"
    ]
    types = partition_types({key: [found[key] for found in texts] for key in texts[0]}, as_text)
    for key, name in renamed.items():
        family = families.get(name)
        if family is None or key in as_text:
            continue
        # Whole numbers stay such where the store has numbers: float64 does not hold those beyond 2^53.
        if family not in ("number", "integer") or not pa.types.is_integer(types[key]):
            types[key] = read_type(family)
    return [PartitionedFile(file.path, found, types) for file, found in zip(files, texts, strict=True)]


def _tell_folders(files: Sequence[FoundFile], config: ConvertConfig) -> None:
    above = {} if config.partitions else folder_texts(files[0].path, files[0].below, with_above=True)
    if above:
        _LOGGER.warning(
            "%s: the folders above it say %s, which are no columns unless --partitions is given",
            files[0].path,
            ", ".join(f"{key}={text}" for key, text in above.items()),
        )


def _planned(tables: Sequence[TableInput], plan: ColumnPlan, allowed: set[str] | None) -> RowSource:
    for table in tables[1:]:
        _require_columns(table, plan, tables[0], allowed)
    counts = [stated_rows(table) for table in tables]
    n_rows = known_total(counts)
    return RowSource(
        name=str(tables[-1]),
        columns=plan.columns,
        target=plan.target,
        read=lambda block_bytes, start: _batches(tables, plan, block_bytes, start),
        fingerprint=tuple(map(table_fingerprint, tables)),
        files=tuple(file for file in map(file_of, tables) if file is not None),
        expected_rows=n_rows,
        expected_bytes=4 * n_rows * len(plan.types)
        if n_rows is not None
        else sum(map(float32_bytes, tables)),
        described=tuple(
            {"name": str(table), "rows": count} for table, count in zip(tables, counts, strict=True)
        ),
        recorded=plan.rules.to_json(),
        reads_once=any(isinstance(table, PythonTable) and table.reads_once for table in tables),
    )


def _batches(
    tables: Sequence[TableInput], plan: ColumnPlan, block_bytes: int, start: RestartPosition
) -> Iterator[SourceBatch]:
    """All rows from `start` on, in the blocks of the reader or about `block_bytes` at a time."""
    families, categories = plan.families, plan.category_sources
    for index, table in list(enumerate(tables))[start.file :]:
        begin = start if index == start.file else RestartPosition(index)
        file = file_of(table) or str(table)
        row = begin.row
        with reading(table):
            for record in table_records(table, plan.types, block_bytes, begin, plan.rules):
                row += record.rows.num_rows
                if not record.rows.num_rows:
                    continue
                where = BatchOrigin(file, record.first_row)
                rows = conformed(record.rows, families, categories, where)
                numeric, texts, target = plan.cells(rows, str(file))
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
                    strays=record.strays,
                )
        if row == 0:
            raise SourceError(f"{table}: has a header but no rows; leave it out or give a file with data")


def _schema(table: TableInput, rules: TextRules | None = None) -> dict[str, pa.DataType]:
    """The type of each column by its name, for CSV as the first rows suggest it; raises SourceError."""
    return {field.name: field.type for field in _types(table, rules or TextRules()).schema}


def _types(table: TableInput, rules: TextRules) -> ColumnTypes:
    with reading(table):
        found = table_types(table, rules)
    _require_unique(table, found.schema.names)
    return found


def _tell(table: TableInput, found: ColumnTypes, plan: ColumnPlan) -> None:
    """Log what is odd about the planned columns; raises SourceError for a target of amounts taken as classes."""
    for name, note in found.notes.items():
        if name in plan.types:
            _LOGGER.warning("%s: %s", table, note)
    for name, amount in found.amounts.items():
        if name in plan.target.sources:
            if not looks_like_amount(pa.array([amount]))[0].as_py():
                raise SourceError(
                    f"{table}: target {name!r} holds numbers and texts like {amount!r}; correct them, leave their rows "
                    f"out with --number {option_name(name)} --invalid drop, or take --task classification if all are "
                    "names of classes"
                )
            raise SourceError(
                f"{table}: target {name!r} holds texts like {amount!r}, which look like numbers; write them like "
                "1234.5, or take --task classification if they are names of classes"
            )


def _types_of_all(tables: Sequence[TableInput], rules: TextRules) -> ColumnTypes:
    """The columns of the first table, with types that the later ones have too, where they state them.

    A column that has no value in the first tables has the type of the first table where it has one.
    """
    first = _types(tables[0], rules)
    schema = {field.name: field.type for field in first.schema}
    formats, notes, amounts = dict(first.formats), dict(first.notes), dict(first.amounts)
    for table in tables[1:]:
        untyped = any(map(pa.types.is_null, schema.values()))
        if not has_types(table) and not untyped:
            continue
        found = _types(table, rules)
        for field in found.schema:
            name = field.name
            is_open = name in schema and pa.types.is_null(schema[name])
            if is_open:
                for mine, theirs in (
                    (formats, found.formats),
                    (notes, found.notes),
                    (amounts, found.amounts),
                ):
                    mine |= {name: theirs[name]} if name in theirs else {}
            if is_open or (name in schema and has_types(table)):
                schema[name] = wider(schema[name], field.type, f"{table}: column {name!r}")
    return ColumnTypes(pa.schema(list(schema.items())), formats, notes, amounts)


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
    found = _schema(table, plan.rules) if has_types(table) else {}
    others = (
        []
        if allowed is None
        else [name for name in names if name not in allowed and not _INDEX.fullmatch(name)]
    )
    for name in [*plan.types, *others]:
        if name not in names or name not in plan.types:
            difference = f"only {first if name in plan.types else table} has {name!r}"
        elif name in found and not fits(
            family_or_none(found[name], f"{table}: column {name!r}"),
            plan.families[name],
            name in plan.category_sources,
        ):
            difference = f"{name!r} is {found[name]} but {plan.types[name]} there"
        else:
            continue
        raise SourceError(
            f"{table}: its columns differ from those of {first}: {difference}; convert it separately"
        )


def choose_columns(
    source: RowSource, config: ConvertConfig, like: RecordedColumns | None = None
) -> RowSource:
    """A source of arrays under the options of the config; raises SourceError or ConfigError.

    `columns`, `drop` and `rename` work as for tables; settings of texts and dates are refused. Under `like` the
    features must be those of the store, or as many if the store was made of a table; they get its names.
    """
    # For later files: which of as many features are meant, where only some are kept.
    source = replace(source, recorded={**source.recorded, "source_features": len(source.columns)})
    for name in ("category", "number", "date", "dates", "missing_words", "invalid"):
        if getattr(config, name):
            raise ConfigError(f"{name} was given for arrays, which hold numbers alone; leave {name} out")
    if like is None and config.like is not None:
        like = RecordedColumns.of(Path(config.like))
    if like is not None:
        if config.rename:
            raise ConfigError(
                "rename was given for arrays, whose columns have no names of their own; leave it out"
            )
        return _choose_like(source, like)
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


def features_of_arrays(source: RowSource, like: RecordedColumns) -> RowSource:
    """A source of arrays with the features of a store and without a target; raises SourceError."""

    def read(block_bytes: int, start: RestartPosition) -> Iterator[SourceBatch]:
        for batch in chosen.batches(block_bytes, start):
            yield replace(batch, target=np.empty((batch.n_rows, 0)))

    chosen = _choose_like(source, like)
    return replace(chosen, target=like.target, read=read)


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
    if outputs and (target.task != like.task or len(target.names) != outputs):
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
