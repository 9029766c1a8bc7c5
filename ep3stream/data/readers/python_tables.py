"""Tables that Python code hands over: pandas and Dask DataFrames, pyarrow Tables, whatever speaks Arrow."""

from __future__ import annotations

from collections import deque
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from typing import Any

import pyarrow as pa

from ep3stream.errors import SourceError

_AHEAD = 2
_VALUE_BYTES = 8


@dataclass(frozen=True, slots=True, eq=False)
class PythonTable:
    """A table without a file. `batches(start_row, block_rows)`: its rows from there on, in order.

    name: what messages call it. A one-shot reader starts at row 0 only, and once.
    """

    name: str
    schema: pa.Schema
    n_rows: int | None
    batches: Callable[[int, int], Iterator[pa.RecordBatch]]

    def __str__(self) -> str:
        return self.name

    @classmethod
    def of(cls, table: Any) -> PythonTable | None:
        """The table that an object is; None when it is no table. Raises SourceError.

        Whole partitions of a Dask DataFrame are computed, at most two ahead of the reader; on a restart
        those before it too, as only so their rows are counted.
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
            return _of_reader(table)
        return None

    def records(self, names: Sequence[str], block_bytes: int, start_row: int) -> Iterator[pa.RecordBatch]:
        """The rows from `start_row` on with the columns `names`, about `block_bytes` at a time."""
        block_rows = max(1, block_bytes // (_VALUE_BYTES * len(names)))
        for batch in self.batches(start_row, block_rows):
            for begin in range(0, batch.num_rows, block_rows):
                yield batch.slice(begin, block_rows).select(list(names))


def computed_ahead(blocks: Sequence[Any]) -> Iterator[Any]:
    """Each Dask collection computed, in order, while the caller works on the one before."""
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


def _name(table: Any) -> str:
    kind = type(table)
    return f"python: {kind.__module__.partition('.')[0]} {kind.__name__}"


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


def _of_reader(table: Any) -> PythonTable:
    reader = pa.RecordBatchReader.from_stream(table)
    name, used = _name(table), False

    def batches(start_row: int, _: int) -> Iterator[pa.RecordBatch]:
        nonlocal used
        if used or start_row:
            raise SourceError(f"{name}: can be read only once and has no way back; give the table it reads")
        used = True
        yield from reader

    return PythonTable(name, reader.schema.remove_metadata(), None, batches)


def _pandas_schema(table: Any) -> pa.Schema:
    try:
        return pa.Schema.from_pandas(table, preserve_index=False).remove_metadata()
    except (pa.ArrowException, TypeError) as error:
        raise SourceError(
            f"{_name(table)}: {' '.join(str(error).split())[:200]}; convert the column"
        ) from error


def _from_pandas(table: Any, schema: pa.Schema) -> pa.RecordBatch:
    return pa.RecordBatch.from_pandas(table, schema=schema, preserve_index=False)
