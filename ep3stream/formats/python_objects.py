"""Rows that Python code hands over: tables, pairs of arrays, and iterables of batches.

Tables are DataFrames of pandas or Dask, tables of pyarrow, and any object with `__arrow_c_stream__`. Arrays are
those of NumPy, torch, Dask and SciPy. NaN, null and what a masked array masks are missing values, as in files.
"""

from __future__ import annotations

import logging
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
from numpy.typing import NDArray

from ep3stream.config import Task
from ep3stream.errors import SourceError
from ep3stream.formats.array_source import ArrayLayout, array_source, with_nan
from ep3stream.formats.row_array import RowArray, RowBlocks
from ep3stream.formats.source import RestartPosition, RowSource, SourceBatch, reading

_logger = logging.getLogger(__name__)

# Collections of Dask that are computed ahead of the reader.
_AHEAD = 2

# About the size of a cell, to turn bytes into rows.
_VALUE_BYTES = 8
_BATCHES = "python: batches"

Pair = tuple[NDArray[Any], NDArray[Any]]


@dataclass(frozen=True, slots=True, eq=False)
class PythonTable:
    """A table without a file.

    name: what messages call it. batches(start_row, block_rows): the rows from `start_row` on, in order.
    reads_once: whether the rows cannot be read a second time.
    """

    name: str
    schema: pa.Schema
    n_rows: int | None
    batches: Callable[[int, int], Iterator[pa.RecordBatch]]
    reads_once: bool = False

    def __str__(self) -> str:
        return self.name

    @classmethod
    def of(cls, table: Any) -> PythonTable | None:
        """The table in an object; None if the object is no table. Raises SourceError for types of no use.

        Whole partitions of a Dask DataFrame are computed, at most two ahead of the reader. On a restart the
        partitions before the start are computed too, for their rows must be counted. A stream of arrow data
        can be read only once, from its beginning.
        """
        if hasattr(table, "npartitions") and hasattr(table, "partitions") and hasattr(table, "_meta"):
            return _of_dask(table)
        if hasattr(table, "iloc") and hasattr(table, "columns"):
            return _of_pandas(table)
        if isinstance(table, pa.RecordBatch):
            table = pa.Table.from_batches([table])
        if isinstance(table, pa.Table):
            return _of_arrow(table)
        if hasattr(table, "__arrow_c_stream__"):
            return _of_stream(table)
        return None

    def records(self, names: Sequence[str], block_bytes: int, start_row: int) -> Iterator[pa.RecordBatch]:
        """The rows from `start_row` on with the columns `names`, about `block_bytes` at a time."""
        block_rows = max(1, block_bytes // (_VALUE_BYTES * len(names)))
        for batch in self.batches(start_row, block_rows):
            for begin in range(0, batch.num_rows, block_rows):
                yield batch.slice(begin, block_rows).select(list(names))


def computed_ahead(blocks: Sequence[Any]) -> Iterator[Any]:
    """Each Dask collection computed, in order; two are computed while the caller works on the one before."""
    with ThreadPoolExecutor(1, "ep3stream-dask") as pool:
        pending: deque[Future[Any]] = deque()
        try:
            for block in blocks:
                pending.append(pool.submit(block.compute))
                if len(pending) > _AHEAD:
                    yield pending.popleft().result()
            while pending:
                yield pending.popleft().result()
        finally:
            for future in pending:
                future.cancel()


def _of_pandas(table: Any) -> PythonTable:
    schema = _pandas_schema(table)

    _tell_index(table)

    def batches(start_row: int, block_rows: int) -> Iterator[pa.RecordBatch]:
        for row in range(start_row, len(table), block_rows):
            yield _from_pandas(table.iloc[row : row + block_rows], schema)

    return PythonTable(_name(table), schema, len(table), batches)


def _of_dask(table: Any) -> PythonTable:
    schema = _pandas_schema(table._meta)
    if any(pa.types.is_null(dtype) for dtype in schema.types):
        # Objects have no type before some are seen.
        schema = _pandas_schema(table.partitions[0].compute())
    _tell_index(table._meta)

    def batches(start_row: int, block_rows: int) -> Iterator[pa.RecordBatch]:
        partitions = [table.partitions[index] for index in range(table.npartitions)]
        row = 0
        for computed in computed_ahead(partitions):
            skipped = min(max(0, start_row - row), len(computed))
            row += len(computed)
            for begin in range(skipped, len(computed), block_rows):
                yield _from_pandas(computed.iloc[begin : begin + block_rows], schema)

    return PythonTable(_name(table), schema, None, batches)


def _of_arrow(table: pa.Table) -> PythonTable:
    def batches(start_row: int, block_rows: int) -> Iterator[pa.RecordBatch]:
        yield from table.slice(start_row).to_batches(max_chunksize=block_rows)

    return PythonTable(_name(table), table.schema.remove_metadata(), table.num_rows, batches)


def _of_stream(table: Any) -> PythonTable:
    name, used = _name(table), False
    with reading(name):
        reader = pa.RecordBatchReader.from_stream(table)

    def batches(start_row: int, _: int) -> Iterator[pa.RecordBatch]:
        nonlocal used
        if used or start_row:
            raise SourceError(f"{name}: can be read only once and has no way back; give the table it reads")
        used = True
        yield from reader

    return PythonTable(name, reader.schema.remove_metadata(), None, batches, reads_once=True)


def _name(table: Any) -> str:
    kind = type(table)
    return f"python: {kind.__module__.partition('.')[0]} {kind.__name__}"


def _pandas_schema(table: Any) -> pa.Schema:
    """The columns by name and type; raises SourceError for types that arrow does not have and for equal names.

    The name of a column is its text: that of the number 0 is '0'.
    """
    texts: dict[str, Any] = {}
    for name in table.columns:
        if str(name) in texts:
            first = texts[str(name)]
            raise SourceError(
                f"{_name(table)}: has two columns called {str(name)!r} ({first!r} and {name!r}); rename one"
            )
        texts[str(name)] = name
    fields = []
    for position, name in enumerate(texts):
        column = _as_arrow_knows(table.iloc[:, [position]]).set_axis([name], axis="columns")
        try:
            fields += list(pa.Schema.from_pandas(column, preserve_index=False).remove_metadata())
        except Exception as error:
            reason = " ".join(str(error).split())[:200]
            raise SourceError(
                f"{_name(table)}: column {name!r} of {table.dtypes.iloc[position]} cannot be read ({reason}); "
                "convert the column"
            ) from error
    return pa.schema(fields)


def _from_pandas(table: Any, schema: pa.Schema) -> pa.RecordBatch:
    named = _as_arrow_knows(table).set_axis(schema.names, axis="columns")
    return pa.RecordBatch.from_pandas(named, schema=schema, preserve_index=False)


def _as_arrow_knows(table: Any) -> Any:
    """The table with what arrow does not do itself: sparse columns are made dense, long floats double, intervals texts,
    and periods the times at which they begin.
    """
    changes = [_change_for_arrow(dtype) for dtype in table.dtypes]
    if not any(changes):
        return table
    columns = [
        table.iloc[:, j] if change is None else change(table.iloc[:, j]) for j, change in enumerate(changes)
    ]
    return type(table)(dict(enumerate(columns)), index=table.index)


def _change_for_arrow(dtype: Any) -> Callable[[Any], Any] | None:
    """What makes a pandas column of this type one that arrow knows; None where it knows it."""
    kind, kind_of_categories = str(dtype), str(getattr(getattr(dtype, "categories", None), "dtype", ""))
    if hasattr(dtype, "subtype") and hasattr(dtype, "fill_value"):
        return lambda column: column.astype(dtype.subtype)
    if dtype == np.longdouble:
        return lambda column: column.astype(np.float64)
    if kind.startswith("interval"):
        return lambda column: column.astype("string")
    if kind.startswith("period"):
        return lambda column: column.dt.to_timestamp()
    if kind_of_categories.startswith(("interval", "period")):
        return lambda column: column.cat.rename_categories([str(value) for value in dtype.categories])
    return None


def _tell_index(table: Any) -> None:
    """Warns of an index that has a name, and so may be meant as a column: it is left out."""
    names = [str(name) for name in table.index.names if name is not None]
    if names:
        _logger.warning(
            "%s: its index %s is left out; reset_index() makes a column of it",
            _name(table),
            ", ".join(map(repr, names)),
        )


def pair_source(x: Any, y: Any, task: Task | None) -> RowSource:
    """Two arrays of NumPy, torch or Dask, or objects that NumPy makes arrays of; raises SourceError.

    Of Dask arrays one block of rows is computed at a time, at most two ahead of the reader; blocks before a
    restart are not computed. A part of the graph that x and y share is computed for each of them.
    """
    return array_source(_row_array("python: x", x), _row_array("python: y", y), task)


def _row_array(name: str, values: Any) -> RowArray:
    if hasattr(values, "dask") and hasattr(values, "chunks"):
        return _dask_array(name, values)
    if hasattr(values, "tocsr") and len(values.shape) == 2:
        return _sparse_array(name, values.tocsr())
    array = _as_array(name, values)

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        for row in range(start_row, len(array), block_rows):
            yield array[row : row + block_rows], 0

    return RowArray(name, (), array.shape, array.dtype, blocks)


def _sparse_array(name: str, rows: Any) -> RowArray:
    """A sparse matrix of SciPy, of which a block of rows at a time is made dense."""
    _require_numbers(name, rows.dtype)

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        for row in range(start_row, rows.shape[0], block_rows):
            yield rows[row : row + block_rows].toarray(), 0

    return RowArray(name, (), rows.shape, rows.dtype, blocks)


def _require_numbers(name: str, dtype: np.dtype[Any]) -> None:
    if dtype.kind not in "biuf":
        raise SourceError(f"{name}: holds {dtype}, not numbers; convert it to numbers")


def _dask_array(name: str, array: Any) -> RowArray:
    if any(np.isnan(size) for size in array.shape):
        raise SourceError(f"{name}: has chunks of unknown length; call its compute_chunk_sizes() first")
    _require_numbers(name, array.dtype)
    if array.ndim > 1:
        array = array.rechunk(dict.fromkeys(range(1, array.ndim), -1))
    lengths = array.chunks[0] if array.ndim else ()

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        ends = np.cumsum(lengths)
        first = int(np.searchsorted(ends, start_row, side="right"))
        row = int(ends[first] - lengths[first]) if first < len(lengths) else 0
        pending = [array.blocks[index] for index in range(first, len(lengths))]
        for index, computed in enumerate(computed_ahead(pending), first):
            rows = _as_array(name, computed)
            if rows.shape[1:] != array.shape[1:] or len(rows) != lengths[index]:
                raise SourceError(
                    f"{name}: its block {index} has the shape {rows.shape}, but {(lengths[index], *array.shape[1:])} "
                    "is what Dask expects of it; correct the function that makes it"
                )
            for begin in range(max(0, start_row - row), len(rows), block_rows):
                yield rows[begin : begin + block_rows], 0
            row += len(rows)

    return RowArray(name, (), array.shape, array.dtype, blocks, is_costly=True)


def _as_array(name: str, values: Any) -> NDArray[Any]:
    """A NumPy array of numbers, without a copy if possible; a masked one if a value is missing. Raises SourceError."""
    try:
        array = _converted(values)
    except Exception as error:
        reason = " ".join(str(error).split())[:100] or type(error).__name__
        raise SourceError(f"{name}: is no array ({reason}); give arrays of numbers") from error
    _require_numbers(name, array.dtype)
    return array


def _converted(values: Any) -> NDArray[Any]:
    torch: Any = sys.modules.get("torch")  # Its import takes seconds, and who has a tensor has made it.
    if torch is not None and isinstance(values, torch.Tensor):
        values = values.detach().cpu().resolve_neg()
        values = values if values.layout == torch.strided else values.to_dense()
        numpy_has_it = (
            values.dtype != torch.bfloat16 and values.dtype.itemsize * values.dtype.is_floating_point != 1
        )
        values = values if numpy_has_it else values.float()
    elif hasattr(values, "tocsr"):
        values = values.toarray()
    elif hasattr(values, "to_numpy") and hasattr(values, "isna"):
        return _of_pandas_values(values)
    elif isinstance(values, list | tuple) and any(isinstance(each, np.ma.MaskedArray) for each in values):
        values = np.ma.stack([np.ma.asarray(each) for each in values])
    if not isinstance(values, np.ma.MaskedArray):
        array: NDArray[Any] = np.asarray(values)
        return array
    return values if np.ma.is_masked(values) else np.asarray(values)


def _of_pandas_values(values: Any) -> NDArray[Any]:
    """A Series or a DataFrame; where a column's type has NA of its own, a masked array."""
    columns = [values] if values.ndim == 1 else [values.iloc[:, j] for j in range(values.shape[1])]
    types = [np.dtype(getattr(column.dtype, "numpy_dtype", "O")) for column in columns]
    if not any(dtype.kind in "biuf" for dtype in types):
        array: NDArray[Any] = np.asarray(values)
        return array
    types = [
        column.dtype if dtype.kind == "O" else dtype for column, dtype in zip(columns, types, strict=True)
    ]
    common = np.result_type(*types)
    pieces = [column.to_numpy(dtype=common, na_value=0) for column in columns]
    missing = np.asarray(values.isna())
    filled: NDArray[Any] = pieces[0] if values.ndim == 1 else np.column_stack(pieces)
    masked: NDArray[Any] = np.ma.masked_array(filled, missing)
    return masked if missing.any() else filled


def batches_source(batches: Callable[[], Iterable[Any]] | Iterable[Any], task: Task | None) -> RowSource:
    """Batches (x, y) of an iterable, or of the iterables that a function returns.

    The first batch is read here; its shapes and types must hold for all. A function or a list can start again:
    rows before the start are made and passed by. An iterator can be read only once, so that a conversion of
    one cannot be resumed. Raises SourceError.
    """
    pairs, (first_x, first_y) = _restartable(batches)
    x_row, y_row, y_dtype = first_x.shape[1:], first_y.shape[1:], first_y.dtype
    layout = ArrayLayout.of((f"{_BATCHES}: x", f"{_BATCHES}: y"), first_x.shape, first_y.shape, y_dtype, task)

    def require_alike(number: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        if (x.shape[1:], y.shape[1:]) != (x_row, y_row):
            first = " and ".join(str(("rows", *row)).replace("'", "") for row in (x_row, y_row))
            raise SourceError(
                f"{_BATCHES}: batch {number} has shapes {x.shape} and {y.shape} but the first {first}; "
                "give all alike"
            )
        if y.dtype.kind != y_dtype.kind:
            raise SourceError(
                f"{_BATCHES}: batch {number} has y of {y.dtype} but the first of {y_dtype}; give all alike"
            )

    def read(block_bytes: int, start: RestartPosition) -> Iterator[SourceBatch]:
        row = 0
        for number, (x, y) in enumerate(pairs()):
            require_alike(number, x, y)
            skipped = min(max(0, start.row - row), len(x))
            block_rows = max(1, block_bytes * len(x) // max(1, x.nbytes))
            for begin in range(skipped, len(x), block_rows):
                piece = x[begin : begin + block_rows]
                yield SourceBatch(
                    file=_BATCHES,
                    target_file=_BATCHES,
                    file_index=0,
                    first_row=row + begin,
                    n_rows=len(piece),
                    end_byte=0,
                    next=RestartPosition(0, row + begin + len(piece)),
                    numeric=(with_nan(piece).reshape(len(piece), -1),),
                    texts=(),
                    target=layout.targets(y[begin : begin + block_rows]),
                )
            row += len(x)

    dtypes = [str(first_x.dtype), str(y_dtype)]
    return RowSource(
        name=_BATCHES,
        columns=layout.columns,
        target=layout.target,
        read=read,
        fingerprint=({"name": _BATCHES, "x": list(x_row), "y": list(y_row), "dtypes": dtypes},),
        described=({"name": _BATCHES},),
        reads_once=isinstance(batches, Iterator),
    )


def _restartable(batches: Any) -> tuple[Callable[[], Iterator[Pair]], Pair]:
    """A function that gives all pairs anew each time, and the first pair that has rows."""
    if isinstance(batches, Iterator):
        rest = _checked_pairs(batches)
        first = _first(rest)
        left = iter([chain([first], rest)])

        def once() -> Iterator[Pair]:
            pairs = next(left, None)
            if pairs is None:
                raise SourceError(
                    f"{_BATCHES}: this iterator has been read; give a list, or a function that makes it"
                )
            return pairs

        return once, first

    def anew() -> Iterator[Pair]:
        return _checked_pairs(batches() if callable(batches) else batches)

    return anew, _first(anew())


def _first(pairs: Iterator[Pair]) -> Pair:
    first = next((pair for pair in pairs if len(pair[0])), None)
    if first is None:
        raise SourceError(f"{_BATCHES}: there are none with rows; give at least one (x, y)")
    return first


def _checked_pairs(batches: Any) -> Iterator[Pair]:
    """Each batch as two arrays of the same length; raises SourceError for anything else."""
    try:
        numbered = enumerate(batches)
    except TypeError:
        raise SourceError(
            f"python: {type(batches).__name__} is neither files, arrays, a table nor batches (x, y); give one of those"
        ) from None
    for number, batch in numbered:
        if not isinstance(batch, tuple | list) or len(batch) != 2:
            raise SourceError(f"{_BATCHES}: batch {number} is a {type(batch).__name__}; give pairs (x, y)")
        x, y = (
            _as_array(f"{_BATCHES}: {name} of batch {number}", values)
            for name, values in zip("xy", batch, strict=True)
        )
        if x.ndim == 0 or y.ndim == 0 or len(x) != len(y):
            raise SourceError(
                f"{_BATCHES}: batch {number} has shapes {x.shape} and {y.shape}; give as many y as x"
            )
        yield x, y
