"""Tables (CSV, TSV, Parquet) as one stream of batches, whose columns and types the first file fixes."""

from __future__ import annotations

import difflib
from collections import Counter
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
from numpy.typing import NDArray

from ep3stream.config import Task
from ep3stream.data.batch import Batch, Column, Target, reading
from ep3stream.data.csv_text import csv_header, csv_records, csv_schema
from ep3stream.errors import SourceError

TABLE_SUFFIXES = (".csv", ".tsv", ".csv.gz", ".tsv.gz", ".zip", ".parquet")
# Bytes of text, plain or deflated, for a byte of float32. High on purpose: a refusal for want of space must
# be right, while a disk that fills up later is reported all the same.
_TEXT_RATIO = 4
_DEFLATED_RATIO = 1


@dataclass(frozen=True, slots=True)
class TableSource:
    """One or several tables with the same columns; the first file's order and types hold for all.

    types: the arrow type each column is read as, in the first file's order.
    """

    files: tuple[Path, ...]
    types: dict[str, pa.DataType]
    columns: tuple[Column, ...]
    target: Target
    expected_rows: int | None
    expected_bytes: int

    @classmethod
    def open(cls, files: Sequence[Path], target: str | None, task: Task | None) -> TableSource:
        """Check every file's columns and choose how each is read; raises SourceError."""
        types = _fixed_types(files[0])
        for file in files[1:]:
            _require_same_columns(file, types, files[0])
        if target is None or target not in types:
            raise SourceError(f"{files[0]}: {_which_target(target, list(types))}")
        features = {name: dtype for name, dtype in types.items() if name != target}
        if not features:
            raise SourceError(f"{files[0]}: has no column beside the target {target!r}; add the features")
        n_rows = _parquet_rows(files)
        n_bytes = 4 * n_rows * len(types) if n_rows is not None else sum(map(_float32_bytes, files))
        return cls(
            files=tuple(files),
            types=types,
            columns=tuple(
                Column(name, "category" if pa.types.is_string(dtype) else "numeric")
                for name, dtype in features.items()
            ),
            target=_choose_target(files[0], target, types[target], task),
            expected_rows=n_rows,
            expected_bytes=n_bytes,
        )

    @property
    def label_values(self) -> None:
        """Tables are read once, so their labels are known at the end only."""
        return

    def batches(self, block_bytes: int) -> Iterator[Batch]:
        """All rows in order, in the blocks of the CSV reader or about `block_bytes` at a time."""
        for index, file in enumerate(self.files):
            records = self._parquet(file, block_bytes) if _is_parquet(file) else csv_records(file, self.types)
            row = 0
            with reading(file):
                for record, end_byte in records:
                    if record.num_rows:
                        yield self._to_batch(record, file, index, row, end_byte)
                    row += record.num_rows
            if row == 0:
                raise SourceError(f"{file}: has a header but no rows; leave it out or give a file with data")

    def _parquet(self, file: Path, block_bytes: int) -> Iterator[tuple[pa.RecordBatch, int]]:
        with pq.ParquetFile(file) as table:
            n_rows, n_bytes = max(1, table.metadata.num_rows), file.stat().st_size
            block_rows = max(1, block_bytes // (8 * len(self.types)))
            row = 0
            for record in table.iter_batches(block_rows, columns=list(self.types)):
                row += record.num_rows
                yield record, n_bytes * row // n_rows

    def _to_batch(self, record: pa.RecordBatch, file: Path, index: int, row: int, end_byte: int) -> Batch:
        target = record.column(self.target.names[0])
        texts = [column.name for column in self.columns if column.kind == "category"]
        numeric = [column.name for column in self.columns if column.kind == "numeric"]
        return Batch(
            file=file,
            target_file=file,
            file_index=index,
            first_row=row,
            n_rows=record.num_rows,
            end_byte=end_byte,
            numeric=tuple(_numbers(record.column(name)) for name in numeric),
            texts=tuple(_texts(record.column(name)) for name in texts),
            target=_texts(target) if self.target.kind == "text" else _numbers(target),
        )


def _texts(values: pa.Array) -> pa.DictionaryArray:
    """The distinct texts and their places; booleans become `false` and `true`."""
    return values.cast(pa.string()).dictionary_encode()


def _numbers(values: pa.Array) -> NDArray[Any]:
    """The values with their own precision; missing ones become NaN, which the encoder reports by row."""
    if pa.types.is_boolean(values.type):
        values = values.cast(pa.uint8())
    elif pa.types.is_decimal(values.type):
        values = values.cast(pa.float64())
    array: NDArray[Any] = values.to_numpy(zero_copy_only=False)
    return array


def _is_parquet(file: Path) -> bool:
    return file.name.lower().endswith(".parquet")


def _float32_bytes(file: Path) -> int:
    deflated = _is_parquet(file) or file.suffix.lower() in (".gz", ".zip")
    return file.stat().st_size // (_DEFLATED_RATIO if deflated else _TEXT_RATIO)


def _parquet_rows(files: Sequence[Path]) -> int | None:
    if not all(map(_is_parquet, files)):
        return None
    return sum(int(pq.read_metadata(file).num_rows) for file in files)


def _fixed_types(file: Path) -> dict[str, pa.DataType]:
    """The type each column of the first file is read as, by name; raises SourceError."""
    with reading(file):
        schema = pq.read_schema(file) if _is_parquet(file) else csv_schema(file)
    _require_unique(file, schema.names)
    return {field.name: _read_type(file, field.name, field.type) for field in schema}


def _require_unique(file: Path, names: list[str]) -> None:
    for name, count in Counter(names).items():
        if count > 1:
            raise SourceError(f"{file}: has {name!r} twice among its columns; rename one")


def _read_type(file: Path, name: str, dtype: pa.DataType) -> pa.DataType:
    """float64 for numbers (the first block's integers may go on as fractions), bool, or string."""
    if pa.types.is_dictionary(dtype):
        dtype = dtype.value_type
    if pa.types.is_boolean(dtype):
        return pa.bool_()
    if pa.types.is_integer(dtype) or pa.types.is_floating(dtype) or pa.types.is_decimal(dtype):
        return pa.float64()
    if pa.types.is_string(dtype) or pa.types.is_large_string(dtype) or dtype == pa.string_view():
        return pa.string()
    if pa.types.is_null(dtype):
        raise SourceError(f"{file}: column {name!r} is empty from row 1 on; fill it in or remove it")
    if pa.types.is_temporal(dtype):
        raise SourceError(
            f"{file}: column {name!r} holds {dtype}; turn it into numbers or text, or remove it"
        )
    raise SourceError(
        f"{file}: column {name!r} holds {dtype}, neither numbers nor UTF-8 text; convert or remove it"
    )


def _require_same_columns(file: Path, types: dict[str, pa.DataType], first: Path) -> None:
    """Names for CSV, whose types only show while it is read; names and types for Parquet."""
    with reading(file):
        names = [] if _is_parquet(file) else csv_header(file)
        _require_unique(file, names)
        found = _fixed_types(file) if _is_parquet(file) else dict.fromkeys(names)
    for name in [*types, *found]:
        if name not in found or name not in types:
            difference = f"only {first if name in types else file} has {name!r}"
        elif found[name] is not None and found[name] != types[name]:
            difference = f"{name!r} is {found[name]} but {types[name]} there"
        else:
            continue
        raise SourceError(
            f"{file}: its columns differ from those of {first}: {difference}; convert it separately"
        )


def _which_target(target: str | None, names: list[str]) -> str:
    if target is None:
        shown = ", ".join(names[-5:])
        return f"no target column was chosen; give --target NAME, one of {'..., ' * (len(names) > 5)}{shown}"
    close = difflib.get_close_matches(target, names, n=3, cutoff=0.4) or names[-5:]
    return f"there is no column {target!r} for --target; did you mean {' or '.join(close)}?"


def _choose_target(file: Path, name: str, dtype: pa.DataType, task: Task | None) -> Target:
    if pa.types.is_string(dtype):
        if task == "regression":
            raise SourceError(
                f"{file}: target {name!r} is text; regression needs numbers, or --task classification"
            )
        return Target((name,), "text")
    if pa.types.is_boolean(dtype) and task != "regression":
        return Target((name,), "text")
    return Target((name,), "integer" if task == "classification" else "number")
