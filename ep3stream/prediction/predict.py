"""Predictions for the rows of a store, of a table file, or of a Dask array.

Stores and tables are streamed: memory does not grow with the number of rows.
"""

from __future__ import annotations

import csv
import glob
import io
import os
import shutil
import sys
from collections import deque
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from itertools import chain
from pathlib import Path
from tempfile import TemporaryDirectory
from typing import Any, BinaryIO, Literal

import numpy as np
import pyarrow as pa
import torch
from numpy.typing import NDArray

from ep3stream.config import MIB, READ_TIMEOUT_S, ConvertConfig, Format, Unknown
from ep3stream.conversion.expand import FeatureRows
from ep3stream.conversion.find_files import FOUND_SUFFIXES
from ep3stream.conversion.open_source import open_features
from ep3stream.conversion.spec import StoreSpec
from ep3stream.conversion.writer import create_store
from ep3stream.disk import no_link, replacing
from ep3stream.errors import InputError, SourceError
from ep3stream.mesh import joined
from ep3stream.prediction.evaluate import (
    RANK_TIMEOUT_S,
    OutputBatch,
    default_split,
    output_batches,
    scatter_model,
)
from ep3stream.prediction.models import load, recorded_columns
from ep3stream.run.launch import Job, n_ranks_to_launch, run_on_ranks
from ep3stream.run.state import open_store_of
from ep3stream.solver.gpu import usual_device
from ep3stream.solver.kernels import KernelFunction
from ep3stream.solver.model import Predictor
from ep3stream.store.files import ObjectUrl, location, path_kind
from ep3stream.store.reader import SplitReader
from ep3stream.store.scan import scan
from ep3stream.store.zarr_store import has_splits

STANDARD_STREAM = "-"
_SEGMENT_BYTES = 16 * MIB
_TABLE_ROWS = 8192


def predict(
    run: Path | str,
    store: Any,
    out: Path | str | None = None,
    split: str | None = None,
    kernel: KernelFunction | None = None,
    scores: bool = False,
    devices: int | Literal["auto"] = 1,
    read_timeout_s: float = READ_TIMEOUT_S,
) -> Any:
    """Writes the model's predictions for every row of a split, in the store's order; returns their number.

    split: by default `test`, or the only split of the store. An `out` that ends in .npy becomes an array: targets,
    (n,) or (n, c) float32, or float64 where they have offsets; class ids, (n,) int32; with `scores` the outputs,
    (n, c), from which these follow.
    Any other `out` becomes a store, HDF5 if it ends in .h5 or .hdf5, with the outputs, (n, c), as x and the y of the
    rows as y. devices, read_timeout_s: as in `evaluate`.

    For a Dask array, (n, d), and no `out`, it returns the predictions as a lazy Dask array instead.

    Raises InputError for an `out` that exists or cannot be written, and for a store with other columns than the model.
    """
    if is_dask_array(store) and out is None:
        return predict_lazily(load(run, kernel), store, scores)
    if is_dask_array(store) or out is None:
        raise InputError(
            "predictions of a store go to `out`, those of a Dask array are returned; correct the call"
        )
    place = location(out)
    if isinstance(place, ObjectUrl):
        raise InputError(f"{place} is in a bucket; predictions are written to a disk: give a path")
    if place.exists():
        raise InputError(f"{place} exists; remove it or choose another name")
    if (n_ranks := n_ranks_to_launch(devices)) > 1:
        paths = {"run": str(run), "store": str(store), "out": str(place)}
        job = Job.of("predict", kernel, **paths, split=split, scores=scores, read_timeout_s=read_timeout_s)
        return run_on_ranks(job, n_ranks, max_restarts=0)
    with joined(RANK_TIMEOUT_S) as mesh:
        model = mesh.on_leader(lambda: load(run, kernel))
        with mesh.all_or_raise(lambda: open_store_of(run, store, read_timeout_s)) as rows:
            reader = mesh.all_or_raise(lambda: rows.split(split or default_split(rows)))
            shard = scatter_model(model, reader, mesh, kernel)
            batches = output_batches(shard, lambda: scan(reader))
            if model is None:
                deque(batches, maxlen=0)  # All ranks compute the outputs, and the leader writes them.
            else:
                write = _write_array if place.suffix == ".npy" else _write_store
                write(model, reader, place, scores, batches)
            return reader.info.n_rows


def _write_array(
    model: Predictor, reader: SplitReader, out: Path, scores: bool, batches: Iterator[OutputBatch]
) -> None:
    n_rows, n_outputs = reader.info.n_rows, model.targets.n_outputs
    as_ids = model.class_names is not None and not scores
    is_flat = as_ids or (n_outputs == 1 and not scores)
    dtype = np.dtype(np.int32 if as_ids else model.output_dtype)
    header = {
        "descr": np.lib.format.dtype_to_descr(dtype),
        "fortran_order": False,
        "shape": (n_rows,) if is_flat else (n_rows, n_outputs),
    }
    # Not a memory map: on a full disk, writing to one ends the process by SIGBUS.
    with _new_file(out) as file:
        np.lib.format.write_array_header_1_0(file, header)
        for outputs, _ in batches:
            values = outputs.argmax(1).cpu().numpy() if as_ids else model.with_offsets(outputs.cpu().numpy())
            file.write(values.astype(dtype, order="C", copy=False).data)


def _write_store(
    model: Predictor, reader: SplitReader, out: Path, scores: bool, batches: Iterator[OutputBatch]
) -> None:
    manifest = reader.manifest
    spec = StoreSpec(
        task=manifest.task,
        n_features=manifest.n_outputs,
        n_outputs=manifest.n_outputs,
        x_dtype="float32",
        feature_names=model.class_names or model.target_names,
        target_names=model.target_names,
        class_names=model.class_names,
        columns={"predictions_of": manifest.fingerprint, **_recorded_offsets(model)},
        shuffle_seed=manifest.shuffle_seed,
        source=(),
        segment_bytes=min(max(4096, reader.info.segment_rows * manifest.n_outputs * 4), _SEGMENT_BYTES),
    )
    store_format: Format = "hdf5" if out.suffix in (".h5", ".hdf5") else "zarr"
    with create_store(out, spec, store_format) as writer:
        for outputs, y in batches:
            assert y is not None  # The leader reads the rows.
            writer.append(reader.info.name, outputs.cpu().numpy(), y)
        writer.commit()


def _recorded_offsets(model: Predictor) -> dict[str, Any]:
    """The record of offsets in a store of outputs, whose x and y are both less those of the targets."""
    if model.offsets is None or not model.offsets.y.any():
        return {}
    pairs = zip(model.target_names, model.offsets.y.tolist(), strict=True)
    columns = [{"name": name, "offset": offset} for name, offset in pairs]
    return {"columns": columns, "targets": columns}


@contextmanager
def _new_file(path: Path) -> Iterator[BinaryIO]:
    """A file that takes its name when the block ends; raises InputError if the disk refuses."""
    try:
        with replacing(path) as partial, open(partial, "wb", opener=no_link) as file:
            yield file
    except OSError as error:
        raise InputError(f"{path} cannot be written ({error}); free space or choose another place") from error


# Tables: CSV, Parquet and the like, one line of CSV for each row.


def is_table(path: Path | str) -> bool:
    """Whether `path` stands for tables: `-`, for standard input, a table's name, a pattern, a directory of tables."""
    place = Path(path)
    if str(path) == STANDARD_STREAM or place.name.lower().endswith(FOUND_SUFFIXES):
        return True
    if place.is_dir():
        return path_kind(place) == "a directory of other things" and not has_splits(place)
    return not os.path.lexists(place) and glob.has_magic(str(path))


def predict_tables(
    run: Path | str,
    rows: Path | str | Sequence[Path | str],
    out: Path | str,
    scores: bool = False,
    unknown: Unknown = "error",
    rename: Mapping[str, str] | None = None,
    partitions: bool = False,
) -> int:
    """Writes the predictions for every row of tables as CSV, in order; returns their number.

    rows: files, directories and patterns as for `convert`, or `-` for CSV on standard input. Columns are found by
    name and read as the conversion of the run's store read them; the target and other columns are ignored.
    out: a file ending in .csv, which appears when it is whole, or `-` for standard output. Its header has the names of
    the targets, and is all there is for tables without rows; classes are written by name; with `scores` each class
    has a column. A row that lacks a value, where the conversion would have dropped the row, has empty predictions.
    unknown: for a category that the store does not have, `error` raises, `ignore` sets none of the column's features,
    `drop` writes empty predictions. rename: a column's name in the table -> its name in the store. partitions: as in
    `ConvertConfig`. Memory: a few blocks of 4 MiB, and the model.

    Raises SourceError naming column and row; InputError for a run that does not know its columns, or for `out`.
    """
    model, recorded = load(run), recorded_columns(run)
    config = ConvertConfig(rename=rename or {}, partitions=partitions)
    with _table_paths(rows) as paths:
        source = open_features(paths, recorded, config)
        batches: Iterator[list[pa.Array]] = iter(())
        if source is not None:
            features = FeatureRows.open(source, recorded, unknown)
            if features.feature_names != model.feature_names:
                raise InputError(
                    f"{run} has a model of other features than the columns it records; fit again"
                )
            batches = _predicted_columns(model, features, scores)
        names = (model.class_names if scores else None) or model.target_names
        # The first rows are read before the file is made, so that unreadable rows leave nothing behind.
        first, n_rows = next(batches, None), 0
        with _csv_sink(out) as sink:
            sink.write(_csv([names]))
            for columns in chain([] if first is None else [first], batches):
                sink.write(_csv(zip(*(column.to_pylist() for column in columns), strict=True)))
                n_rows += len(columns[0])
        return n_rows


def _predicted_columns(model: Predictor, features: FeatureRows, scores: bool) -> Iterator[list[pa.Array]]:
    """For each batch of rows, the columns of the output as text, with null for the rows that are not usable."""
    model = model.to(usual_device())
    prepared = model.prepared()
    for x, usable in features.batches():
        rows = torch.from_numpy(np.asarray(x, np.float32)).to(model.centers)
        parts = [model.outputs(part, prepared).cpu().numpy() for part in rows.split(_TABLE_ROWS)]
        outputs = np.concatenate(parts) if parts else np.empty((0, model.targets.n_outputs), np.float32)
        columns: list[NDArray[Any]] = list(model.with_offsets(outputs).T)
        if model.class_names is not None and not scores:
            columns = [np.array(model.class_names, object)[outputs.argmax(1)]]
        places = pa.array(np.cumsum(usable) - 1, mask=~usable)
        yield [pa.array(column).cast(pa.string()).take(places) for column in columns]


def _csv(rows: Iterable[Iterable[str | None]]) -> bytes:
    text = io.StringIO()
    csv.writer(text, lineterminator="\n").writerows(rows)
    return text.getvalue().encode()


@contextmanager
def _table_paths(rows: Path | str | Sequence[Path | str]) -> Iterator[list[Path]]:
    """The paths of tables. Standard input is copied to a file, because it is read twice: for types, and for rows."""
    places = [rows] if isinstance(rows, Path | str) else list(rows)
    if not any(str(place) == STANDARD_STREAM for place in places):
        yield list(map(Path, places))
        return
    if len(places) > 1:
        raise InputError(
            f"{STANDARD_STREAM} is standard input, which is read alone; leave the other tables out"
        )
    with TemporaryDirectory(prefix="ep3stream-") as folder:
        file = Path(folder, "standard input.csv")
        with file.open("wb") as copy:
            shutil.copyfileobj(sys.stdin.buffer, copy, 1 << 20)
        try:
            yield [file]
        except SourceError as error:
            raise SourceError(str(error).replace(str(file), file.stem)) from error


@contextmanager
def _csv_sink(out: Path | str) -> Iterator[BinaryIO]:
    """Standard output, or a new file that takes its name when all is written."""
    if str(out) == STANDARD_STREAM:
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
    with _new_file(path) as file:
        yield file


# Dask arrays.


Block = NDArray[Any]


def is_dask_array(value: object) -> bool:
    """Whether `value` is a Dask array, found out without an import of Dask."""
    kind = type(value)
    return (
        kind.__module__.partition(".")[0] == "dask"
        and hasattr(value, "map_blocks")
        and hasattr(value, "chunks")
    )


def map_rows(
    model: Predictor, x: Any, of_block: Callable[[Predictor, Block], Block], n_columns: int | None, dtype: Any
) -> Any:
    """A lazy Dask array: `of_block(model, rows)` for each block of x, (n, d); of shape (n,), or (n, n_columns).

    The model is one node of the graph, sent to each worker once. A block has all columns: x is rechunked if need be.
    Raises InputError unless x has the model's features.
    """
    import dask.array as da
    from dask.delayed import delayed

    if x.ndim != 2 or x.shape[1] != model.n_features:
        raise InputError(f"x has the shape {x.shape}; the model takes (n, {model.n_features}) features")
    x = x.rechunk({1: -1})
    shape: dict[str, Any] = {"drop_axis": 1} if n_columns is None else {"chunks": (x.chunks[0], (n_columns,))}
    meta = np.empty((0,) if n_columns is None else (0, 0), dtype)
    shared = delayed(model, pure=False)
    return da.map_blocks(_call_on_rows, x, shared, of_block, dtype=dtype, meta=meta, **shape)


def _call_on_rows(rows: Block, model: Predictor, of_block: Callable[[Predictor, Block], Block]) -> Block:
    return of_block(model, rows)


def predict_lazily(model: Predictor, x: Any, scores: bool = False) -> Any:
    """`model.predict` of a Dask array x, (n, d), or with `scores` its `decision_function`, as a lazy Dask array."""
    n_outputs = model.targets.n_outputs
    if scores:
        return map_rows(model, x, Predictor.decision_function, n_outputs, model.output_dtype)
    if model.class_names is not None:
        return map_rows(model, x, Predictor.predict, None, model.labels.dtype)
    return map_rows(model, x, Predictor.predict, None if n_outputs == 1 else n_outputs, model.output_dtype)
