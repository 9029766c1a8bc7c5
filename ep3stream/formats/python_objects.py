"""Rows that Python code hands over: tables, pairs of arrays, and iterables of batches.

Tables are DataFrames of pandas or Dask, tables of pyarrow, and any object with `__arrow_c_stream__`. Arrays are
those of NumPy, torch or Dask. NaN and null are missing values, as in files.
"""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from itertools import chain
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ep3stream.config import Task
from ep3stream.errors import SourceError
from ep3stream.formats.array_source import ArrayLayout, array_source
from ep3stream.formats.row_array import RowArray, RowBlocks
from ep3stream.formats.source import RestartPosition, RowSource, SourceBatch

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
    """

    name: str
    schema: pa.Schema
    n_rows: int | None
    batches: Callable[[int, int], Iterator[pa.RecordBatch]]

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

    def batches(start_row: int, block_rows: int) -> Iterator[pa.RecordBatch]:
        for row in range(start_row, len(table), block_rows):
            yield _from_pandas(table.iloc[row : row + block_rows], schema)

    return PythonTable(_name(table), schema, len(table), batches)


def _of_dask(table: Any) -> PythonTable:
    schema = _pandas_schema(table._meta)
    if any(pa.types.is_null(dtype) for dtype in schema.types):
        # Objects have no type before some are seen.
        schema = _pandas_schema(table.partitions[0].compute())

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
    reader = pa.RecordBatchReader.from_stream(table)
    name, used = _name(table), False

    def batches(start_row: int, _: int) -> Iterator[pa.RecordBatch]:
        nonlocal used
        if used or start_row:
            raise SourceError(f"{name}: can be read only once and has no way back; give the table it reads")
        used = True
        yield from reader

    return PythonTable(name, reader.schema.remove_metadata(), None, batches)


def _name(table: Any) -> str:
    kind = type(table)
    return f"python: {kind.__module__.partition('.')[0]} {kind.__name__}"


def _pandas_schema(table: Any) -> pa.Schema:
    try:
        return pa.Schema.from_pandas(table, preserve_index=False).remove_metadata()
    except (pa.ArrowException, TypeError) as error:
        raise SourceError(
            f"{_name(table)}: {' '.join(str(error).split())[:200]}; convert the column"
        ) from error


def _from_pandas(table: Any, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pandas(table, schema=schema, preserve_index=False)


def pair_source(x: Any, y: Any, task: Task | None) -> RowSource:
    """Two arrays of NumPy, torch or Dask, or objects that NumPy makes arrays of; raises SourceError.

    Of Dask arrays one block of rows is computed at a time, at most two ahead of the reader; blocks before a
    restart are not computed. A part of the graph that x and y share is computed for each of them.
    """
    return array_source(_row_array("python: x", x), _row_array("python: y", y), task)


def _row_array(name: str, values: Any) -> RowArray:
    if hasattr(values, "dask") and hasattr(values, "chunks"):
        return _dask_array(name, values)
    array = _as_array(name, values)

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        for row in range(start_row, len(array), block_rows):
            yield array[row : row + block_rows], 0

    return RowArray(name, (), array.shape, array.dtype, blocks)


def _dask_array(name: str, array: Any) -> RowArray:
    if any(np.isnan(size) for size in array.shape):
        raise SourceError(f"{name}: has chunks of unknown length; call its compute_chunk_sizes() first")
    if array.ndim > 1:
        array = array.rechunk(dict.fromkeys(range(1, array.ndim), -1))
    lengths = array.chunks[0] if array.ndim else ()

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        ends = np.cumsum(lengths)
        first = int(np.searchsorted(ends, start_row, side="right"))
        row = int(ends[first] - lengths[first]) if first < len(lengths) else 0
        for computed in computed_ahead([array.blocks[index] for index in range(first, len(lengths))]):
            for begin in range(max(0, start_row - row), len(computed), block_rows):
                yield np.asarray(computed[begin : begin + block_rows]), 0
            row += len(computed)

    return RowArray(name, (), array.shape, array.dtype, blocks, is_costly=True)


def _as_array(name: str, values: Any) -> NDArray[Any]:
    """A NumPy array of numbers, without a copy if possible; raises SourceError."""
    if isinstance(values, torch.Tensor):
        values = values.detach().cpu()
        values = values.float() if values.dtype == torch.bfloat16 else values
    try:
        array: NDArray[Any] = np.asarray(values)
    except (ValueError, TypeError) as error:
        raise SourceError(f"{name}: is no array ({str(error)[:100]}); give arrays of numbers") from error
    if array.dtype.kind not in "biuf":
        raise SourceError(f"{name}: holds {array.dtype}, not numbers; convert it to numbers")
    return array


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
                    numeric=(piece.reshape(len(piece), -1),),
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
