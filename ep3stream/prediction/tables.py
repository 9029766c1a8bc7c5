"""Predictions for the rows of CSV, Parquet and other tables, written as CSV: one line for each row, in order.

A model's outputs for a Dask array, block by block and not before they are asked for.
"""

from __future__ import annotations

import csv
import io
import shutil
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ep3stream.config import Unknown
from ep3stream.conversion.expand import FeatureRows
from ep3stream.conversion.open_source import find_files
from ep3stream.errors import InputError, SourceError
from ep3stream.formats.tables import TABLE_SUFFIXES
from ep3stream.prediction.models import converted_columns, load
from ep3stream.solver.model import Predictor

STANDARD = "-"

_ROWS = 8192


def is_table(path: Path | str) -> bool:
    """Whether rows are to be read from a table: standard input, or a file of such a name."""
    return str(path) == STANDARD or str(path).lower().endswith(TABLE_SUFFIXES)


def predict_tables(
    run: Path | str,
    rows: Path | str,
    out: Path | str,
    scores: bool = False,
    unknown: Unknown = "error",
    rename: Mapping[str, str] | None = None,
) -> int:
    """Writes the predictions for every row of a table, CSV on standard input for `-`; returns their number.

    out: `-` for standard output, or a file ending in .csv, which appears when it is whole. A header with the
    targets' names; classes by name; with `scores` a column for each class. Columns are read as the run's store had
    them, found by name; others, as the target, are left out. A row that lacks a value and that the store's
    conversion would have dropped has empty predictions. Memory: a few blocks of 4 MiB and the model's.

    unknown: what becomes of a category that the store did not have: `error`; `ignore`, none of its features is
    set; `drop`, empty predictions. rename: what the table calls a column -> what the store does.

    Raises SourceError naming column and row, InputError for a run that does not know its columns, or for `out`.
    """
    model, recorded = load(run), converted_columns(run)
    with _files(rows) as files:
        features = FeatureRows.open(files, recorded, unknown, rename)
        if features.feature_names != model.feature_names:
            raise InputError(f"{run} has a model of other features than the columns it records; fit again")
        names = (model.class_names if scores else None) or model.target_names
        batches = _predictions(model, features, scores)
        # The header waits for the first rows, so that what cannot be read leaves nothing behind.
        first = next(batches)
        with _sink(out) as sink:
            sink.write(_csv([names]))
            return sum(_written(sink, columns) for columns in chain([first], batches))


def _predictions(model: Predictor, features: FeatureRows, scores: bool) -> Iterator[list[pa.Array]]:
    """The columns of the output for each batch of rows, as text."""
    model = model.to(torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    prepared = model.prepared()
    for x, usable in features.batches():
        rows = torch.from_numpy(np.asarray(x, np.float32)).to(model.centers)
        parts = [model.outputs(part, prepared).cpu().numpy() for part in rows.split(_ROWS)]
        outputs = np.concatenate(parts) if parts else np.empty((0, model.targets.n_outputs), np.float32)
        columns: list[NDArray[Any]] = list(outputs.T)
        if model.class_names is not None and not scores:
            columns = [np.array(model.class_names, object)[outputs.argmax(1)]]
        yield [_spread(column, usable) for column in columns]


def _spread(values: NDArray[Any], usable: NDArray[np.bool_]) -> pa.Array:
    """A column as text, with null where a row is not usable."""
    places = np.cumsum(usable) - 1
    return pa.array(values).cast(pa.string()).take(pa.array(places, mask=~usable))


def _written(sink: BinaryIO, columns: list[pa.Array]) -> int:
    sink.write(_csv(zip(*(column.to_pylist() for column in columns), strict=True)))
    return len(columns[0])


def _csv(rows: Iterable[Iterable[str | None]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


@contextmanager
def _files(rows: Path | str) -> Iterator[list[Path]]:
    """The tables; standard input as a file, which is read twice: for its types, and for its rows."""
    if str(rows) != STANDARD:
        yield find_files([Path(rows)])
        return
    with TemporaryDirectory(prefix="ep3stream-") as folder:
        file = Path(folder, "standard input.csv")
        with file.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
        try:
            yield find_files([file])
        except SourceError as error:
            raise SourceError(str(error).replace(str(file), file.stem)) from error


@contextmanager
def _sink(out: Path | str) -> Iterator[BinaryIO]:
    """Standard output, or a file that takes its name when all is written."""
    if str(out) == STANDARD:
        yield sys.stdout.buffer
        sys.stdout.buffer.flush()
        return
    path = Path(out).absolute()
    if path.suffix.lower() != ".csv":
        raise InputError(f"{out} is no place for a table's predictions; give a name ending in .csv, or -")
    if path.exists():
        raise InputError(f"{path} exists; remove it or choose another name")
    if not path.parent.is_dir():
        raise InputError(f"there is no directory {path.parent} for {path.name}; make it, or correct the path")
    partial = path.with_name(f".{path.name}.partial")
    try:
        with partial.open("wb") as file:
            yield file
        partial.replace(path)
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); free space or choose another place") from error
    finally:
        partial.unlink(missing_ok=True)


Block = NDArray[Any]


def is_dask_array(value: object) -> bool:
    """Without importing Dask for those who do not use it."""
    kind = type(value)
    return (
        kind.__module__.partition(".")[0] == "dask"
        and hasattr(value, "map_blocks")
        and hasattr(value, "chunks")
    )


def map_rows(
    model: Predictor, x: Any, of_block: Callable[[Predictor, Block], Block], n_columns: int | None, dtype: Any
) -> Any:
    """A lazy Dask array of what `of_block` makes of each block of x, (n, d): (n,), or (n, n_columns).

    The model is one node of the graph, sent to each worker once; columns in several chunks are joined first.
    Raises InputError unless x has the model's features.
    """
    import dask.array as da
    from dask.delayed import delayed

    if x.ndim != 2 or x.shape[1] != model.n_features:
        raise InputError(f"x has the shape {x.shape}; the model takes (n, {model.n_features}) features")
    x = x.rechunk({1: -1})
    shape: dict[str, Any] = {"drop_axis": 1} if n_columns is None else {"chunks": (x.chunks[0], (n_columns,))}
    shared = delayed(model, pure=False)
    return da.map_blocks(_of_rows, x, shared, of_block, dtype=dtype, meta=_meta(n_columns, dtype), **shape)


def predict_lazily(model: Predictor, x: Any, scores: bool = False) -> Any:
    """`model.predict` of a Dask array x, (n, d), or with `scores` its `decision_function`, as a lazy Dask array."""
    n_outputs = model.targets.n_outputs
    if scores:
        return map_rows(model, x, Predictor.decision_function, n_outputs, np.float32)
    if model.class_names is not None:
        return map_rows(model, x, Predictor.predict, None, np.asarray(model.class_names).dtype)
    return map_rows(model, x, Predictor.predict, None if n_outputs == 1 else n_outputs, np.float32)


def _of_rows(rows: Block, model: Predictor, of_block: Callable[[Predictor, Block], Block]) -> Block:
    return of_block(model, rows)


def _meta(n_columns: int | None, dtype: Any) -> Block:
    return np.empty((0,) if n_columns is None else (0, 0), dtype)
