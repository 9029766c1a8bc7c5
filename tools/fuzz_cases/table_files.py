"""Tables with types: Parquet and Arrow files, DataFrames, tables and readers of pyarrow."""

from __future__ import annotations

import datetime as dt
import random
from collections.abc import Callable
from dataclasses import dataclass, replace
from decimal import Context, Decimal
from pathlib import Path
from typing import Any
from urllib.parse import quote

import dask.dataframe as dd
import numpy as np
import pandas as pd
import pyarrow as pa
import pyarrow.parquet as pq
from hypothesis import strategies as st

from fuzz_cases.known_tables import WHOLE, Column, Table
from fuzz_cases.written import SOURCE_KINDS, Written, as_source, choice, cut, seeds

_DIGITS = Context(prec=76)

# -- columns of arrow


def arrow_column(column: Column, rng: random.Random, is_plain: bool) -> tuple[pa.Array, tuple[Any, ...]]:
    """The column in one of the types that hold it, and its values as that type holds them."""
    values = list(column.values)
    if column.kind == "number":
        return _arrow_numbers(column, rng, is_plain)
    if column.kind == "category":
        types = [pa.string(), pa.large_string(), pa.string_view(), pa.dictionary(pa.int32(), pa.string())]
        types += [pa.dictionary(pa.int8(), pa.large_string())]
        dtype = types[0] if is_plain else rng.choice(types)
        as_empty = not is_plain and rng.random() < 0.3
        filled = ["" if value is None and as_empty else value for value in values]
        if pa.types.is_dictionary(dtype):
            return _dictionary(filled, dtype, rng), column.values
        return pa.array(filled, dtype), column.values
    if column.kind in ("timestamp", "zoned", "duration"):
        zone = rng.choice(("UTC", "Europe/Berlin", "+05:30")) if column.kind == "zoned" else None
        units = ["us", "ns"]
        if all(value is None or value.microsecond % 1000 == 0 for value in values if hasattr(value, "year")):
            units.append("ms")
        if all(_is_whole(value) for value in values):
            units += ["ms", "s"]
        unit = "us" if is_plain else rng.choice(units)
        if column.kind == "duration":
            unit = rng.choice(("us", "ns")) if unit == "ms" and not all(map(_is_whole, values)) else unit
            return pa.array(values, pa.duration(unit)), column.values
        return pa.array(values, pa.timestamp(unit, zone)), column.values
    dtypes: dict[str, list[pa.DataType]] = {
        "boolean": [pa.bool_()],
        "date": [pa.date32(), pa.date64()],
        "time": [pa.time64("us"), pa.time64("ns"), pa.time32("s"), pa.time32("ms")],
    }
    dtype = dtypes[column.kind][0] if is_plain else rng.choice(dtypes[column.kind])
    return pa.array(values, dtype), column.values


def _is_whole(value: Any) -> bool:
    return value is None or (value.microsecond if hasattr(value, "microsecond") else value.microseconds) == 0


def _dictionary(values: list[Any], dtype: pa.DataType, rng: random.Random) -> pa.Array:
    """With a dictionary in any order, in which some entries are not used."""
    entries = [*dict.fromkeys(value for value in values if value is not None), "unused"]
    entries = list(dict.fromkeys(entries))
    rng.shuffle(entries)
    places = {value: index for index, value in enumerate(entries)}
    indices = pa.array([None if v is None else places[v] for v in values], dtype.index_type)
    return pa.DictionaryArray.from_arrays(indices, pa.array(entries, dtype.value_type))


def _arrow_numbers(column: Column, rng: random.Random, is_plain: bool) -> tuple[pa.Array, tuple[Any, ...]]:
    known = [value for value in column.values if value is not None]
    whole = all(isinstance(value, int) for value in known)
    types: list[pa.DataType] = []
    if whole:
        types = [
            dtype
            for dtype in (
                pa.int64(), pa.int32(), pa.int16(), pa.int8(), pa.uint8(), pa.uint16(), pa.uint32(), pa.uint64(),
            )
            if all(_fits(value, dtype) for value in known)
        ]  # fmt: skip
    if not (column.flavour == "labels" or (column.is_stated and whole)):
        types.append(pa.float64())
        for dtype in (np.float32, np.float16):
            with np.errstate(over="ignore"):
                if all(float(dtype(value)) == value for value in known):
                    types.append(pa.from_numpy_dtype(dtype))
        if all(value == 0 or 1e-6 < abs(value) < 1e15 for value in known):
            types += [pa.decimal128(38, 18), pa.decimal256(60, 20)]
    dtype = types[0] if is_plain else rng.choice(types)
    if pa.types.is_decimal(dtype):
        quantum = Decimal(1).scaleb(-dtype.scale)
        exact = [
            None if v is None else Decimal(repr(v)).quantize(quantum, context=_DIGITS) for v in column.values
        ]
        return pa.array(exact, dtype), tuple(None if v is None else float(v) for v in exact)
    if pa.types.is_floating(dtype):
        as_nan = not is_plain and rng.random() < 0.5
        floats = [(np.nan if as_nan else None) if v is None else float(v) for v in column.values]
        if dtype == pa.float16():
            floats = [None if v is None else np.float16(v) for v in floats]
        truth = tuple(None if v is None else float(v) for v in column.values)
        return pa.array(floats, dtype), truth
    return pa.array(column.values, dtype), column.values


def _fits(value: int, dtype: pa.DataType) -> bool:
    limits = np.iinfo(dtype.to_pandas_dtype())
    return int(limits.min) <= value <= int(limits.max)


def arrow_table(table: Table, rng: random.Random, is_plain: bool) -> tuple[pa.Table, Table]:
    arrays, truth = {}, {}
    for column in table.columns:
        arrays[column.name], truth[column.name] = arrow_column(column, rng, is_plain)
    made = pa.table(list(arrays.values()), names=list(arrays))
    return made, table.changed(lambda column: replace(column, values=truth[column.name]))


def _with_blob(made: pa.Table, options: dict[str, Any], rng: random.Random) -> pa.Table:
    """With a column of a type that nobody can learn from, which --drop leaves out."""
    values = [None if row % 3 else [row] for row in range(made.num_rows)]
    blobs = [
        pa.array([None if value is None else b"\xff" for value in values], pa.binary()),
        pa.array(values, pa.list_(pa.int64())),
        pa.array([None if value is None else {"a": 1} for value in values], pa.struct([("a", pa.int8())])),
        pa.nulls(made.num_rows),
    ]
    options["drop"] = ["blob"]
    return made.append_column("blob", rng.choice(blobs))


def _with_null_type(made: pa.Table, rng: random.Random) -> pa.Table:
    """Columns without any value as columns of the null type, sometimes."""
    for index, name in enumerate(made.column_names):
        if made.column(name).null_count == made.num_rows and rng.random() < 0.5:
            made = made.set_column(index, name, pa.nulls(made.num_rows))
    return made


def _stacked(pieces: list[Table]) -> Table:
    first = pieces[0]

    def together(which: str) -> tuple[Column, ...]:
        columns = zip(*(getattr(piece, which) for piece in pieces), strict=True)
        return tuple(
            replace(parts[0], values=tuple(v for part in parts for v in part.values)) for parts in columns
        )

    return replace(first, features=together("features"), targets=together("targets"))


def table_options(table: Table, rng: random.Random) -> dict[str, Any]:
    """The settings by which a table with types is read: target, and which numbers are labels."""
    options: dict[str, Any] = {"target": [column.name for column in table.targets]}
    if table.is_classification:
        options["task"] = "classification"
    if category := [c.name for c in table.features if c.is_stated]:
        options["category"] = category
    return options


@dataclass(frozen=True)
class ParquetWay:
    """Parquet files: types, row groups, pages, packing; parts of other types, parts without rows, directories."""

    has_odd_types: bool = False
    group_rows: int = 1000
    page_version: str = "1.0"
    version: str = "2.6"
    codec: str = "snappy"
    use_dictionary: bool = True
    checksum: bool = False
    parts: int = 1
    types_differ: bool = False
    has_empty_part: bool = False
    partitioned: bool = False
    source_kind: str = "list"
    has_blob: bool = False
    seed: int = 0

    @classmethod
    def drawn(cls) -> st.SearchStrategy[ParquetWay]:
        """Any of these ways."""
        return st.builds(
            cls,
            has_odd_types=st.booleans(),
            group_rows=choice(1000, 1, 3, 7, 20),
            page_version=choice("1.0", "2.0"),
            version=choice("2.6", "2.4", "1.0"),
            codec=choice("snappy", "none", "gzip", "zstd", "lz4", "brotli"),
            use_dictionary=st.booleans(),
            checksum=choice(False, True),
            parts=choice(1, 1, 2, 3),
            types_differ=choice(False, True),
            has_empty_part=choice(False, False, False, True),
            partitioned=choice(False, False, False, True),
            source_kind=choice(*SOURCE_KINDS),
            has_blob=choice(False, False, True),
            seed=seeds,
        )

    def write(self, table: Table, folder: Path) -> Written:
        """Writes the table below the folder."""
        rng = random.Random(self.seed)
        key = self._key(table) if self.partitioned else None
        if key is not None:
            return self._write_partitions(table, key, folder / "p", rng)
        pieces, files = [], []
        options = table_options(table, rng)
        (folder / "d").mkdir()
        for number, part in enumerate(cut(table.n_rows, self.parts, rng)):
            piece = table.rows(np.arange(table.n_rows)[part])
            types = rng if self.types_differ else random.Random(self.seed)
            made, truth = arrow_table(piece, types, not self.has_odd_types)
            if self.types_differ:
                made = _with_null_type(made, rng)
            if self.has_blob:
                made = _with_blob(made, options, random.Random(self.seed))
            files.append(self._file(made, folder / "d" / f"part-{number}.parquet"))
            pieces.append(truth)
            if self.has_empty_part and number == 0:
                files.append(self._file(made.slice(0, 0), folder / "d" / "part-0a.parquet"))
        source = as_source(self.source_kind, folder / "d", files)
        return Written(lambda: source, _stacked(pieces).stated_as_categories(), options)

    def _key(self, table: Table) -> Column | None:
        """The feature that the directories state: of texts, or of whole numbers."""
        if len(table.features) < 2:
            return None
        for column in table.features:
            known = [value for value in column.values if value is not None]
            if column.kind == "category":
                is_text = column.is_stated or any(v[:1].isalpha() and v not in _SPECIAL for v in known)
                if is_text and all(map(_is_folder_name, known)):
                    return column
            if column.flavour in WHOLE and not column.is_stated and len(set(known)) <= 6:
                return column
        return None

    def _write_partitions(self, table: Table, key: Column, folder: Path, rng: random.Random) -> Written:
        groups: dict[Any, list[int]] = {}
        for row, value in enumerate(key.values):
            groups.setdefault(value, []).append(row)
        rest = replace(table, features=tuple(c for c in table.features if c.name != key.name))
        pieces: dict[Path, tuple[Table, Any, int]] = {}
        for value, rows in groups.items():
            text = "__HIVE_DEFAULT_PARTITION__" if value is None else quote(str(value), safe=" ")
            below = folder / f"{quote(key.name, safe=' ')}={text}"
            below.mkdir(parents=True)
            made, truth = arrow_table(
                rest.rows(np.array(rows)), random.Random(self.seed), not self.has_odd_types
            )
            pieces[self._file(made, below / "part-0.parquet")] = (truth, value, len(rows))
        # Files are read in the order of their names.
        stacked = _stacked([pieces[file][0] for file in sorted(pieces)])
        values = tuple(value for file in sorted(pieces) for value in [pieces[file][1]] * pieces[file][2])
        truth = replace(stacked, features=(*stacked.features, replace(key, values=values)))
        return Written(lambda: folder, truth.stated_as_categories(), table_options(table, rng))

    def _file(self, made: pa.Table, file: Path) -> Path:
        pq.write_table(
            made,
            file,
            row_group_size=self.group_rows,
            data_page_version=self.page_version,
            version=self.version,
            compression=self.codec,
            use_dictionary=self.use_dictionary,
            write_page_checksum=self.checksum,
        )
        return file


_SPECIAL = ("NA", "N/A", "null", "NULL", "nan", "NaN", "None", "none", "inf", "Infinity", "true", "True", "FALSE", "T",
            "F", "nil", "n/a")  # fmt: skip


def _is_folder_name(text: str) -> bool:
    return len(quote(text, safe=" ")) < 200 and "\0" not in text and text == text.strip()


@dataclass(frozen=True)
class ArrowWay:
    """Arrow IPC: files and streams in several batches, packed or not."""

    has_odd_types: bool = False
    suffix: str = ".arrow"
    is_stream: bool = False
    batches: int = 1
    has_empty_batch: bool = False
    codec: str | None = None
    has_blob: bool = False
    seed: int = 0

    @classmethod
    def drawn(cls) -> st.SearchStrategy[ArrowWay]:
        """Any of these ways."""
        return st.builds(
            cls,
            has_odd_types=st.booleans(),
            suffix=choice(".arrow", ".feather", ".ipc"),
            is_stream=st.booleans(),
            batches=choice(1, 2, 5),
            has_empty_batch=choice(False, True),
            codec=choice(None, "lz4", "zstd"),
            has_blob=choice(False, False, True),
            seed=seeds,
        )

    def write(self, table: Table, folder: Path) -> Written:
        """Writes the table below the folder."""
        rng = random.Random(self.seed)
        made, truth = arrow_table(table, rng, not self.has_odd_types)
        file, options = folder / f"t{self.suffix}", table_options(table, rng)
        if self.has_blob:
            made = _with_blob(made, options, rng)
        packing = pa.ipc.IpcWriteOptions(compression=self.codec)
        new = pa.ipc.new_stream if self.is_stream else pa.ipc.new_file
        with new(str(file), made.schema, options=packing) as writer:
            for part in cut(table.n_rows, self.batches, rng):
                for batch in made.slice(part.start, part.stop - part.start).to_batches():
                    writer.write_batch(batch)
                if self.has_empty_batch:
                    writer.write_table(made.slice(0, 0))
                    writer.write_batch(made.combine_chunks().to_batches()[0].slice(0, 0))
        return Written(lambda: [file], truth.stated_as_categories(), options)


# -- tables of Python


@dataclass(frozen=True)
class FrameWay:
    """DataFrames of pandas and Dask, tables and readers of pyarrow."""

    kind: str = "pandas"
    dtypes: str = "numpy"
    index: str = "range"
    integer_names: bool = False
    chunks: int = 1
    seed: int = 0

    @classmethod
    def drawn(cls) -> st.SearchStrategy[FrameWay]:
        """Any of these ways."""
        kinds = ("pandas", "pandas", "pandas", "arrow table", "arrow reader", "record batch", "arrow stream")
        return st.builds(
            cls,
            kind=st.one_of(st.sampled_from(kinds), st.sampled_from((*kinds, "dask"))),
            dtypes=st.sampled_from(("numpy", "nullable", "arrow", "object", "category")),
            index=choice("range", "text", "repeated", "dates", "levels", "named"),
            integer_names=choice(False, False, False, True),
            chunks=choice(1, 2, 4),
            seed=seeds,
        )

    def write(self, table: Table, folder: Path) -> Written:
        """Writes the table below the folder."""
        rng = random.Random(self.seed)
        made, truth = arrow_table(table, rng, self.kind in ("pandas", "dask"))
        options = table_options(table, rng)
        if self.kind in ("pandas", "dask"):
            return self._write_frame(truth, made, options, rng)
        cuts = cut(table.n_rows, self.chunks, rng)
        if self.kind == "record batch":
            batch = made.combine_chunks().to_batches()[0]
            return Written(lambda: batch, truth.stated_as_categories(), options)
        chunked = pa.concat_tables([made.slice(part.start, part.stop - part.start) for part in cuts])
        makers: dict[str, Callable[[], Any]] = {
            "arrow table": lambda: chunked,
            "arrow reader": lambda: chunked.to_reader(),
            "arrow stream": lambda: _Stream(chunked),
        }
        return Written(makers[self.kind], truth.stated_as_categories(), options)

    def _write_frame(
        self, truth: Table, made: pa.Table, options: dict[str, Any], rng: random.Random
    ) -> Written:
        series, columns = {}, {}
        for column in truth.columns:
            series[column.name], values = self._series(column, made, rng)
            columns[column.name] = replace(column, values=values)
        frame = pd.DataFrame(series)
        frame.index = self._index(len(frame))
        truth = truth.changed(lambda column: columns[column.name])
        if self.integer_names:
            frame.columns = range(len(frame.columns))
            names = {name: str(number) for number, name in enumerate(series)}
            truth = truth.changed(lambda column: replace(column, name=names[column.name]))
            for option in ("target", "category"):
                if option in options:
                    options[option] = [names[name] for name in options[option]]
        if self.kind == "dask":
            dask = dd.from_pandas(frame.reset_index(drop=True), npartitions=min(self.chunks, len(frame)))
            return Written(lambda: dask, truth.stated_as_categories(), options)
        # Objects that are whole numbers beyond int64 have no type of arrow's.
        may_refuse = (r"too large to convert",) if self.dtypes == "object" else ()
        return Written(lambda: frame, truth.stated_as_categories(), options, may_refuse=may_refuse)

    def _series(
        self, column: Column, made: pa.Table, rng: random.Random
    ) -> tuple[pd.Series, tuple[Any, ...]]:
        values, has_gap = list(column.values), bool(column.gaps.any())
        array = made.column(column.name)
        # Dask makes texts of columns of objects.
        if self.dtypes == "arrow" or (self.kind == "dask" and column.kind not in ("number", "category")):
            return pd.Series(pd.arrays.ArrowExtensionArray(array)), column.values
        if column.kind == "number":
            return self._numbers(column, has_gap)
        if column.kind == "category" and self.dtypes == "category":
            return pd.Series(
                pd.Categorical(values, [*dict.fromkeys(v for v in values if v), "unused"])
            ), column.values
        if column.kind == "category":
            dtype = {"nullable": "string", "numpy": "str"}.get(self.dtypes, object)
            return pd.Series(values, dtype=dtype), column.values
        if column.kind == "boolean":
            dtype = "boolean" if self.dtypes == "nullable" else (object if has_gap else bool)
            return pd.Series(values, dtype=dtype), column.values
        if column.kind in ("timestamp", "zoned") and self.dtypes != "object":
            stamps = pd.Series(
                pd.to_datetime(pd.Series(values, dtype="datetime64[us]"), utc=column.kind == "zoned")
            )
            if column.kind == "zoned" and rng.random() < 0.5:
                stamps = stamps.dt.tz_convert("Europe/Berlin")
            return stamps, column.values
        if column.kind == "zoned":
            values = [None if v is None else v.replace(tzinfo=dt.UTC) for v in values]
        if column.kind == "duration" and self.dtypes != "object":
            return pd.Series(values, dtype="timedelta64[us]"), column.values
        return pd.Series(values, dtype=object), column.values

    def _numbers(self, column: Column, has_gap: bool) -> tuple[pd.Series, tuple[Any, ...]]:
        values = list(column.values)
        known = [value for value in values if value is not None]
        whole = all(isinstance(value, int) for value in known)
        dtype = "int64" if all(isinstance(v, int) and v < 2**63 for v in known) else "uint64"
        if whole and self.dtypes == "nullable":
            return pd.Series(values, dtype=dtype.replace("i", "I", 1).replace("u", "U", 1)), column.values
        if whole and self.dtypes == "object" and not has_gap and self.kind != "dask":
            return pd.Series(values, dtype=object), column.values
        if whole and not has_gap:
            return pd.Series(values, dtype=dtype), column.values
        floats = tuple(None if value is None else float(value) for value in values)
        if self.dtypes == "nullable":
            return pd.Series(floats, dtype="Float64"), floats
        return pd.Series(floats, dtype="float64"), floats

    def _index(self, n_rows: int) -> pd.Index:
        numbers = list(range(n_rows))
        makers: dict[str, Callable[[], pd.Index]] = {
            "range": lambda: pd.RangeIndex(n_rows),
            "text": lambda: pd.Index([f"r{i}" for i in numbers]),
            "repeated": lambda: pd.Index([0] * n_rows),
            "dates": lambda: pd.date_range("2026-01-01", periods=n_rows),
            "levels": lambda: pd.MultiIndex.from_arrays([numbers, numbers], names=["one", "two"]),
            "named": lambda: pd.Index(numbers[::-1], name="a"),
        }
        return makers[self.index]()


class _Stream:
    """What only knows the Arrow C stream."""

    def __init__(self, table: pa.Table) -> None:
        self._table = table

    def __arrow_c_stream__(self, requested_schema: object = None) -> object:
        return self._table.__arrow_c_stream__(requested_schema)
