"""Finds out which kind of source was given, files or objects of Python, and opens it as one `RowSource`.

A new source format is added here, in `open_source`, and as a module of `formats` that makes a `RowSource`.
"""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import Any

from ep3stream.config import ConvertConfig
from ep3stream.conversion.find_files import FoundFile, find_files
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.table_source import (
    choose_columns,
    features_of_arrays,
    open_tables,
    open_tables_like,
    require_columns_like,
    tables_with_rows,
    with_folders,
)
from ep3stream.errors import SourceError
from ep3stream.formats.array_source import array_source
from ep3stream.formats.arrays import can_hold_x_and_y, open_row_array
from ep3stream.formats.python_objects import PythonTable, batches_source, pair_source
from ep3stream.formats.source import PYTHON, RowSource, reading
from ep3stream.formats.svmlight import SVMLIGHT_SUFFIXES, svmlight_source


def open_source(
    source: Any,
    config: ConvertConfig,
    x: Path | str | None = None,
    y: Path | str | None = None,
    like: RecordedColumns | None = None,
) -> RowSource:
    """Open the source of a conversion; raises SourceError, which names the file and the remedy.

    source is one of
      - a path or a list of paths of tables or svmlight files: files, directories with all below them, patterns;
      - the path of one .npz, HDF5 or Zarr group with arrays called x and y;
      - nothing (None or an empty list), when `x` and `y` name a file each as `open_row_array` reads it;
      - a pair (x, y) of arrays of NumPy, torch or Dask;
      - a DataFrame of pandas or Dask, a pyarrow Table or RecordBatchReader, with the target by name;
      - batches (x, y): a list, a function without arguments that returns an iterable, or an iterator; an
        iterator cannot be read again, so that a conversion of one cannot be resumed.
    like: the columns that are followed; by default those of the store that the config names, if it names one.
    """
    if like is None and config.like is not None:
        like = RecordedColumns.of(Path(config.like))
    if x is not None or y is not None:
        return _open_files_of_arrays(source, config, x, y, like)
    if (paths := _paths(source)) is not None:
        # What no path can be, such as the text of a table, is an error of the system here.
        with reading(" ".join(str(paths[0]).split())[:200] if paths else "no path"):
            return _open_paths(paths, config, like)
    with reading(f"{PYTHON}{type(source).__name__}"):
        return _open_object(source, config, like)


def _open_object(source: Any, config: ConvertConfig, like: RecordedColumns | None) -> RowSource:
    if (table := PythonTable.of(source)) is not None:
        return open_tables([table], config, like)
    if isinstance(source, tuple) and len(source) == 2 and all(hasattr(part, "shape") for part in source):
        return _of_arrays(pair_source(*source, config.task), config, like)
    return _of_arrays(batches_source(source, config.task), config, like)


def _paths(source: Any) -> list[Path] | None:
    """The paths that were given; None if the source is something else."""
    if source is None:
        return []
    paths = [source] if isinstance(source, str | Path) else source
    if not isinstance(paths, list | tuple) or not all(isinstance(path, str | Path) for path in paths):
        return None
    if not all(map(str, paths)):
        raise SourceError("a path is empty; name a file")
    return [Path(path) for path in paths]


def _open_files_of_arrays(
    source: Any,
    config: ConvertConfig,
    x: Path | str | None,
    y: Path | str | None,
    like: RecordedColumns | None,
) -> RowSource:
    if x is None or y is None:
        raise SourceError("one of --x and --y is missing; give both files of arrays")
    paths = _paths(source)
    if paths is None or paths:
        given = paths[0] if paths else type(source).__name__
        raise SourceError(f"{given} was given beside --x and --y; convert them separately")
    arrays = open_row_array(Path(x), "x"), open_row_array(Path(y), "y")
    return _of_arrays(array_source(*arrays, config.task), config, like)


def _open_paths(paths: list[Path], config: ConvertConfig, like: RecordedColumns | None) -> RowSource:
    if len(paths) == 1 and can_hold_x_and_y(paths[0]):
        x, y = (open_row_array(paths[0], name) for name in "xy")
        return _of_arrays(array_source(x, y, config.task), config, like)
    found = find_files(paths)
    if sparse := _sparse_files(found):
        layout = None if like is None else like.sparse_layout
        return _of_arrays(svmlight_source(sparse, config, layout), config, like)
    return open_tables(with_folders(tables_with_rows(found), config, like), config, like)


def open_features(paths: Sequence[Path], like: RecordedColumns, config: ConvertConfig) -> RowSource | None:
    """The files that `paths` stand for as a source of features alone, read as those of a store were.

    None if no file has a row, though the columns are right. Of the config, rename and partitions are used. Raises
    SourceError or ConfigError.
    """
    like, found = like.without_target(), find_files(paths)
    if sparse := _sparse_files(found):
        settings = ConvertConfig(task="regression")
        return features_of_arrays(svmlight_source(sparse, settings, like.sparse_layout), like)
    with_rows = tables_with_rows(found, may_be_empty=True)
    if not with_rows:
        require_columns_like(with_folders(found, config, like)[0], like, config.rename)
        return None
    return open_tables_like(with_folders(with_rows, config, like), like, config.rename)


def _sparse_files(found: Sequence[FoundFile]) -> list[Path]:
    """The files if they are svmlight, none if they are tables; raises SourceError for both at once."""
    sparse = [file.path for file in found if file.path.name.lower().endswith(SVMLIGHT_SUFFIXES)]
    if sparse and len(sparse) < len(found):
        table = next(file.path for file in found if file.path not in sparse)
        raise SourceError(
            f"{table}: is a table beside {sparse[0]}, which is svmlight; convert them separately"
        )
    return sparse


def _of_arrays(source: RowSource, config: ConvertConfig, like: RecordedColumns | None) -> RowSource:
    """A source of arrays with the columns that the config asks for, or those of `like`."""
    if config.targets and like is None:
        raise SourceError(
            f"--target {config.targets[0]} names a column, but y of {source.name} is given by itself; leave it out"
        )
    return choose_columns(source, config, like)
