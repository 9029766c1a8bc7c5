"""Tables, of files or of Python, as one stream of batches, whose columns and types the first file fixes."""

from __future__ import annotations

from collections import Counter
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa

from ep3stream.config import ConvertConfig
from ep3stream.data.conversion.batch import START, Batch, Column, Position, Target, reading
from ep3stream.data.conversion.column_types import family_of
from ep3stream.data.conversion.columns import ColumnPlan, plan_columns
from ep3stream.data.conversion.recorded import Recorded, plan_like, same_family
from ep3stream.data.readers.table_files import (
    Record,
    Table,
    float32_bytes,
    has_types,
    stated_rows,
    table_fingerprint,
    table_header,
    table_records,
    table_schema,
)
from ep3stream.errors import SourceError


@dataclass(frozen=True, slots=True)
class TableSource:
    """One or several tables with the same columns; the first file's order and types hold for all."""

    tables: tuple[Table, ...]
    plan: ColumnPlan
    expected_rows: int | None
    expected_bytes: int

    @classmethod
    def open(cls, tables: Sequence[Table], config: ConvertConfig) -> TableSource:
        """Check every table's columns and plan how each is read; raises SourceError or ConfigError."""
        if config.like is not None:
            return cls.like(tables, Recorded.of(Path(config.like)), config.rename)
        schema = _schema(tables[0])
        plan = plan_columns(str(tables[0]), schema, config)
        return cls._of(tables, plan, None if config.columns else set(schema))

    @classmethod
    def like(
        cls, tables: Sequence[Table], recorded: Recorded, rename: Mapping[str, str] | None = None
    ) -> TableSource:
        """Read as that store's were; other columns are left out. Raises SourceError for what does not match.

        rename: what these tables call a column -> what the store calls it.
        """
        first = tables[0]
        plan = plan_like(str(first), _schema(first), has_types(first), recorded, rename)
        return cls._of(tables, plan, None)

    @classmethod
    def _of(cls, tables: Sequence[Table], plan: ColumnPlan, allowed: set[str] | None) -> TableSource:
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
    def columns(self) -> tuple[Column, ...]:
        """The feature columns."""
        return self.plan.columns

    @property
    def target(self) -> Target:
        """What is learned."""
        return self.plan.target

    @property
    def label_values(self) -> None:
        """Tables are read once, so their labels are known at the end only."""
        return

    def batches(self, block_bytes: int, start: Position = START) -> Iterator[Batch]:
        """All rows from `start` on in order, in the blocks of the reader or about `block_bytes` at a time."""
        for index, table in list(enumerate(self.tables))[start.file :]:
            begin = start if index == start.file else Position(index)
            row = begin.row
            with reading(table):
                for record in table_records(table, self.plan.types, block_bytes, begin):
                    row += record.rows.num_rows
                    if record.rows.num_rows:
                        yield self._to_batch(record, table, index)
            if row == 0:
                raise SourceError(f"{table}: has a header but no rows; leave it out or give a file with data")

    def _to_batch(self, record: Record, table: Table, index: int) -> Batch:
        rows = record.rows
        file = table if isinstance(table, Path) else str(table)
        numeric, texts, target = self.plan.cells(rows, str(file))
        return Batch(
            file=file,
            target_file=file,
            file_index=index,
            first_row=record.first_row,
            n_rows=rows.num_rows,
            end_byte=record.end_byte,
            next=Position(index, record.first_row + rows.num_rows, record.next_byte),
            numeric=numeric,
            texts=texts,
            target=target,
        )


def _stated_rows(tables: Sequence[Table]) -> int | None:
    stated = [stated_rows(table) for table in tables]
    counts = [count for count in stated if count is not None]
    return sum(counts) if len(counts) == len(stated) else None


def _schema(table: Table) -> dict[str, pa.DataType]:
    """The type of each column by its name, for CSV as the first rows suggest it; raises SourceError."""
    with reading(table):
        schema = table_schema(table)
    _require_unique(table, schema.names)
    return {field.name: field.type for field in schema}


def _require_unique(table: Table, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise SourceError(f"{table}: has {name!r} twice among its columns; rename one")


def _require_columns(table: Table, plan: ColumnPlan, first: Table, allowed: set[str] | None) -> None:
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
