"""Finds out which kind of source was given, files or objects of Python, and opens it as one `RowSource`.

A new source format is added here, in `open_source`, and as a module of `formats` that makes a `RowSource`.
"""

from __future__ import annotations

import glob
import os
import re
from collections.abc import Iterator, Sequence
from pathlib import Path
from typing import Any

from ep3stream.config import ConvertConfig
from ep3stream.conversion.recorded_columns import RecordedColumns
from ep3stream.conversion.table_source import choose_columns, open_tables
from ep3stream.errors import SourceError
from ep3stream.formats.array_source import array_source
from ep3stream.formats.arrays import can_hold_x_and_y, is_array_file, open_row_array
from ep3stream.formats.python_objects import PythonTable, batches_source, pair_source
from ep3stream.formats.source import RowSource, reading
from ep3stream.formats.svmlight import SVMLIGHT_SUFFIXES, svmlight_source
from ep3stream.formats.tables import TABLE_SUFFIXES

_FOUND_SUFFIXES = (*TABLE_SUFFIXES, *SVMLIGHT_SUFFIXES)

# A URL in which `Path` has made one slash of two.
_URL = re.compile(r"([a-z0-9]{2,}):/+")


def open_source(
    source: Any, config: ConvertConfig, x: Path | str | None = None, y: Path | str | None = None
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
    """
    if x is not None or y is not None:
        return _open_files_of_arrays(source, config, x, y)
    if (paths := _paths(source)) is not None:
        return _open_paths(paths, config)
    if (table := PythonTable.of(source)) is not None:
        return open_tables([table], config)
    if isinstance(source, tuple) and len(source) == 2 and all(hasattr(part, "shape") for part in source):
        return _of_arrays(pair_source(*source, config.task), config)
    return _of_arrays(batches_source(source, config.task), config)


def find_files(paths: Sequence[Path]) -> list[Path]:
    """Every file that is named, lies below a named directory or matches a pattern, sorted within each."""
    files = [file for path in paths for file in _expand(path)]
    if not files:
        raise SourceError("nothing to convert; name tables or directories of them, or give --x and --y")
    for file in files:
        if not file.name.lower().endswith(_FOUND_SUFFIXES):
            is_array = is_array_file(file)
            remedy = "give arrays as --x and --y" if is_array else "convert it first"
            raise SourceError(f"{file}: is none of {', '.join(_FOUND_SUFFIXES)}; {remedy}")
        with reading(file), file.open("rb") as stream:
            if not stream.read(1):
                raise SourceError(f"{file}: is empty; leave it out or give a file with data")
    return files


def _paths(source: Any) -> list[Path] | None:
    """The paths that were given; None if the source is something else."""
    if source is None:
        return []
    if isinstance(source, str | Path):
        return [Path(source)]
    if isinstance(source, list | tuple) and all(isinstance(path, str | Path) for path in source):
        return [Path(path) for path in source]
    return None


def _open_files_of_arrays(
    source: Any, config: ConvertConfig, x: Path | str | None, y: Path | str | None
) -> RowSource:
    if x is None or y is None:
        raise SourceError("one of --x and --y is missing; give both files of arrays")
    paths = _paths(source)
    if paths is None or paths:
        given = paths[0] if paths else type(source).__name__
        raise SourceError(f"{given} was given beside --x and --y; convert them separately")
    arrays = open_row_array(Path(x), "x"), open_row_array(Path(y), "y")
    return _of_arrays(array_source(*arrays, config.task), config)


def _open_paths(paths: list[Path], config: ConvertConfig) -> RowSource:
    if len(paths) == 1 and can_hold_x_and_y(paths[0]):
        x, y = (open_row_array(paths[0], name) for name in "xy")
        return _of_arrays(array_source(x, y, config.task), config)
    files = find_files(paths)
    sparse = [file for file in files if file.name.lower().endswith(SVMLIGHT_SUFFIXES)]
    if not sparse:
        return open_tables(files, config)
    if len(sparse) < len(files):
        table = next(file for file in files if file not in sparse)
        raise SourceError(
            f"{table}: is a table beside {sparse[0]}, which is svmlight; convert them separately"
        )
    like = None if config.like is None else RecordedColumns.of(Path(config.like)).sparse_layout
    return _of_arrays(svmlight_source(files, config, like), config)


def _of_arrays(source: RowSource, config: ConvertConfig) -> RowSource:
    """A source of arrays with the columns that the config asks for."""
    if config.targets and config.like is None:
        raise SourceError(
            f"--target {config.targets[0]} names a column, but y of {source.name} is given by itself; leave it out"
        )
    return choose_columns(source, config)


def _expand(path: Path) -> Iterator[Path]:
    if path.is_dir():
        found = list(_files_below(path))
        if not found:
            raise SourceError(
                f"{path}: holds no table ({', '.join(_FOUND_SUFFIXES)}); name another directory"
            )
    elif not path.exists() and glob.has_magic(str(path)):
        found = [Path(name) for name in glob.glob(str(path), recursive=True) if not Path(name).is_dir()]
        if not found:
            raise SourceError(f"{path}: matches no file; check the pattern")
    elif not path.exists():
        if url := _URL.match(str(path)):
            address = f"{url[1]}://{str(path)[url.end() :]}"
            raise SourceError(
                f"{address}: sources are files on a disk, not URLs; fetch it first, then convert it"
            )
        raise SourceError(f"{path}: there is no such file; check the name")
    else:
        found = [path]
    return iter(sorted(found))


def _files_below(directory: Path) -> Iterator[Path]:
    """Tables in and below a directory, without names that begin with . or _, such as `_metadata`."""
    for parent, directories, names in os.walk(directory):
        directories[:] = [name for name in directories if not name.startswith((".", "_"))]
        for name in names:
            if name.lower().endswith(_FOUND_SUFFIXES) and not name.startswith((".", "_")):
                yield Path(parent, name)
