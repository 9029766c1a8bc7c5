"""Reading a store: every segment is checked against the manifest's digest before its rows are returned."""

from __future__ import annotations

import math
import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import Any, NoReturn, Protocol

import numpy as np
from numpy.typing import NDArray

from ep3stream.config import READ_TIMEOUT_S
from ep3stream.errors import ConfigError, DamagedDataError, InputError
from ep3stream.store import zarr_store
from ep3stream.store.backend import ReadingBackend, ReadTimes, SegmentLayout, y_row
from ep3stream.store.files import LocalFiles, Location, ObjectUrl, StoreFiles, location, path_kind
from ep3stream.store.manifest import MANIFEST_NAME, Manifest, SplitInfo, segment_digest
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.read_threads import ReadThreads
from ep3stream.store.retries import Hung
from ep3stream.store.scan import scan

_STORE_SUFFIXES = (".h5", ".hdf5", ".zarr")


def open_store(place: str | Path | ObjectUrl, read_timeout_s: float = READ_TIMEOUT_S) -> RowStore:
    """Open the store at `place`: a directory is Zarr, a file HDF5, and s3://bucket/key Zarr in a bucket.

    read_timeout_s: the longest wait for a segment, by whoever reads from this store, and for the store to be opened; 0
    and infinity to wait for ever. A segment is asked for twice more, as `finish_read` says.

    Raises InputError when there is nothing, or nothing that was committed, or where a disk or a bucket cannot be
    reached; DamagedDataError when the manifest cannot be trusted.
    """
    if not read_timeout_s >= 0:
        raise ConfigError(
            f"read_timeout_s is {read_timeout_s}; use a positive number of seconds, or 0 to wait for ever"
        )
    path, timeout_s = location(place), read_timeout_s or math.inf
    with ReadThreads(1, timeout_s, "ep3stream-open") as threads:
        try:
            path, manifest, backend = threads.submit(lambda: _open(path)).result()
        except Hung:
            raise InputError(
                f"{path} cannot be reached: it did not answer within {timeout_s:g} s; see to its disk or server, or "
                "allow more by --read-timeout"
            ) from None
    return RowStore(path, manifest, backend, timeout_s)


_Opened = tuple[Location, Manifest, ReadingBackend]


def _open(path: Location) -> _Opened:
    if isinstance(path, ObjectUrl):
        return _open_in_bucket(path)
    if path.is_dir():
        return _open_zarr(path, LocalFiles(path))
    if path.is_file():
        from ep3stream.store import hdf5_store  # Stores of Zarr do not wait for h5py.

        data = _manifest_bytes(lambda: hdf5_store.read_manifest(path), path)
        manifest = Manifest.from_json(data, f"{path}: {MANIFEST_NAME}")
        return path, manifest, hdf5_store.Hdf5Reader(path, manifest)
    if os.path.lexists(path):
        raise InputError(
            f"{path} is a link that leads nowhere or in a circle, or neither file nor directory; correct the path"
        )
    raise InputError(f"{path} does not exist; convert the data first or correct the path")


def _open_in_bucket(url: ObjectUrl) -> _Opened:
    files = ObjectFiles(url)
    try:
        if not files.listing(limit=1):
            raise InputError(f"{url} does not exist; convert the data first or correct the path")
        return _open_zarr(url, files)
    except OSError as error:
        raise InputError(
            f"{url} cannot be reached ({error}); correct the network or the AWS_... variables"
        ) from error


def _open_zarr(path: Location, files: StoreFiles) -> _Opened:
    data = _manifest_bytes(lambda: zarr_store.read_manifest(files), path)
    manifest = Manifest.from_json(data, f"{path}/{MANIFEST_NAME}")
    return path, manifest, zarr_store.ZarrReader(files, manifest)


def _manifest_bytes(read: Callable[[], bytes | None], path: Location) -> bytes:
    """The bytes that `read` returns; InputError where it returns None, or a permission is missing.

    Raises DamagedDataError for any other failure, but OSError for one of the network.
    """
    try:
        data = read()
    except (InputError, MemoryError):
        raise
    except PermissionError as error:
        raise InputError(f"{path} may not be read ({error}); correct its permissions") from error
    except Exception as error:  # HDF5 meets damage with errors of many types.
        if isinstance(path, ObjectUrl) and isinstance(error, OSError):
            raise
        raise DamagedDataError(
            f"{path} cannot be read ({error!r:.300}); restore it or convert again"
        ) from error
    if data is None:
        if isinstance(path, Path) and (lost := _lost(path)):
            raise DamagedDataError(f"{path} {lost}; restore it or convert again")
        raise NoStoreError(_no_store(path))
    return data


class NoStoreError(InputError):
    """Something lies at the path, and nothing shows that it was a store."""


def _lost(path: Path) -> str:
    """What is lost of that which was a store, by its name or by what is left of it; empty for anything else."""
    is_named = path.suffix.lower() in _STORE_SUFFIXES
    if path.is_file():
        from ep3stream.store import hdf5_store

        with path.open("rb") as file:
            head = file.read(len(hdf5_store.SIGNATURE))
        if not is_named or head == hdf5_store.SIGNATURE:
            return ""
        begin = "is empty" if not head else "begins with other bytes than HDF5"
        return f"is named like a store but {begin}: what was in it is lost"
    if is_named and not any(path.iterdir()):
        return "is named like a store but empty: all of its files are lost"
    if path.parent.name.endswith(".convert"):  # A conversion that did not end: its manifest comes last.
        return ""
    return f"has the splits of a store but lost its {MANIFEST_NAME}" if zarr_store.has_splits(path) else ""


def _no_store(path: Location) -> str:
    """The message for a path at which something else than a store lies."""
    kind = path_kind(path) if isinstance(path, Path) else ""
    if kind == "a file":
        return f"{path} is a file, but no store; turn it into one: ep3stream convert FILE STORE"
    if kind == "an empty directory":
        return f"{path} is an empty directory, not a store; convert the data first or correct the path"
    if kind == "the RUN of a fit":
        return f"{path} is the RUN of a fit, not a store; give the store that `ep3stream convert` made"
    return f"{path} is not a finished store: it has no {MANIFEST_NAME}; convert the data again"


class RowStore:
    """A finished store. A context manager. No file stays open between reads, so threads may share a store.

    backend: reads the bytes of the store's format, unchecked. read_timeout_s: how long to wait for a segment;
    infinity for ever.
    """

    def __init__(
        self,
        path: Location,
        manifest: Manifest,
        backend: ReadingBackend,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self.path = path
        self.manifest = manifest
        self.backend = backend
        self.read_timeout_s = read_timeout_s
        self._is_open = True

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Make further reads an InputError."""
        self._is_open = False

    def split(self, name: str) -> SplitReader:
        """The reader of one split; InputError with the names of the splits where there is none of this name."""
        if name not in self.manifest.splits:
            raise InputError(
                f"{self.path} has no split {name!r}; it has {', '.join(sorted(self.manifest.splits))}"
            )
        return SplitReader(self.path, name, self.manifest.fingerprint, self, self.read_timeout_s)

    def check_segment(self, split: str, index: int) -> None:
        """Raise unless as many bytes are stored for the segment as the manifest declares.

        Called before memory is taken for a segment, so that damage cannot make a reader take too much.
        """
        if not self._is_open:
            raise InputError(f"{self.path} is closed; open it again")
        with self._naming(split, index):
            self.backend.check(self.manifest.splits[split], index)

    def fill_segment(
        self, split: str, index: int, x: NDArray[Any], y: NDArray[Any], times: ReadTimes
    ) -> None:
        """Read a checked segment into x and y and compare its digest; adds to `times`.

        Raises DamagedDataError for bytes that cannot be read and for rows that are not those written.
        """
        info, began = self.manifest.splits[split], time.perf_counter()
        with self._naming(split, index):
            read_s = self.backend.read(info, index, x, y)
        digest = segment_digest(x, y)
        times.read_s += read_s
        times.decode_s += time.perf_counter() - began - read_s
        if digest != info.digests[index]:
            raise DamagedDataError(
                f"{self.path}: split {split}, segment {index} ({', '.join(self.backend.pieces(info, index))}) has "
                f"digest {digest} but the manifest says {info.digests[index]}; restore it or convert again"
            )

    @contextmanager
    def _naming(self, split: str, index: int) -> Iterator[None]:
        """Turn whatever goes wrong into a DamagedDataError that names the segment and a remedy."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Codecs and HDF5 meet damaged bytes with errors of many types.
            # Rows that cannot be reached need not be damaged.
            is_passing = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
            remedy = "restore it or convert again"
            if isinstance(error, PermissionError):
                remedy = "correct its permissions"
            elif isinstance(self.path, ObjectUrl) and is_passing:
                remedy = "see to the server and the network"
            raise DamagedDataError(
                f"{self.path}: split {split}, segment {index} cannot be read ({error!r:.300}); {remedy}"
            ) from error


class Split(Protocol):
    """Rows with statistics and numbers: a split of a store, or arrays in memory (`online.sources`)."""

    @property
    def info(self) -> SplitInfo:
        """Number of rows, segments, and statistics of features and targets."""
        ...

    @property
    def manifest(self) -> Manifest:
        """Task, names and types of the columns."""
        ...

    def read_rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """x, (m, d), and y of these row numbers, in their order."""
        ...


class SplitReader:
    """The rows of one split. Several threads may read different segments at once.

    A reader is pickled as a path and a name; in another process the first use opens the store again.
    read_timeout_s: as in `open_store`, but that only infinity means for ever.
    """

    def __init__(
        self,
        path: Location,
        name: str,
        fingerprint: str,
        store: RowStore | None = None,
        read_timeout_s: float = READ_TIMEOUT_S,
    ) -> None:
        self.path, self.read_timeout_s = path, read_timeout_s
        self._name = name
        self._fingerprint = fingerprint
        self._store = store

    def __array__(self, *_: object, **__: object) -> NoReturn:
        """Refuse to be taken for an array, as scikit-learn's searches do, which choose rows by number."""
        raise TypeError(
            f"{self.path}, split {self._name}, is a store, not an array: read its rows by `read_rows`, or search with "
            "`ep3stream tune`"
        )

    def beside(self, name: str) -> SplitReader:
        """The reader of another split of the same store. Raises InputError where there is none of this name."""
        return self._opened().split(name)

    def __reduce__(self) -> tuple[Any, ...]:
        return SplitReader, (self.path, self._name, self._fingerprint, None, self.read_timeout_s)

    @property
    def manifest(self) -> Manifest:
        """The manifest of the store, which is opened for it if need be."""
        return self._opened().manifest

    @property
    def n_readers(self) -> int:
        """How many segments are worth reading at once."""
        return self._opened().backend.n_readers

    @property
    def info(self) -> SplitInfo:
        """The manifest's entry of this split."""
        return self.manifest.splits[self._name]

    def layout(self, index: int) -> SegmentLayout:
        """Shape and type of the x and of the y of a segment; raises InputError for one that does not exist."""
        n_rows, manifest = self.info.rows_of_segment(index), self.manifest
        y_shape = (n_rows, *y_row(manifest.task, manifest.n_outputs))
        return ((n_rows, manifest.n_features), manifest.x_dtype), (y_shape, manifest.y_dtype)

    def read_segment(
        self,
        index: int,
        x_out: NDArray[Any] | None = None,
        y_out: NDArray[Any] | None = None,
        times: ReadTimes | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The checked rows of segment `index`: x (rows, d), and y (rows,) or (rows, c).

        They are views of x_out and y_out where these are given (C-contiguous, of the store's types, with at least
        the segment's rows). The seconds that the read took are added to `times`. Raises InputError for an index or
        memory that does not fit, DamagedDataError for rows that cannot be read or are not those written.
        """
        layout, store = self.layout(index), self._opened()
        store.check_segment(self._name, index)
        x = _memory("x_out", x_out, *layout[0])
        y = _memory("y_out", y_out, *layout[1])
        store.fill_segment(self._name, index, x, y, ReadTimes() if times is None else times)
        return x, y

    def read_rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The x (m, d) and y of any m rows of the split, in the order asked for, repeats allowed.

        Both are less the store's offsets, `manifest.offsets`, which added in float64 make the values.
        Each segment that holds one of the rows is read once, by `scan`: two ahead, and again where a read fails or
        hangs. O(m + three segments) memory. Raises InputError for rows that do not exist.
        """
        info, manifest = self.info, self.manifest
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < info.n_rows):
            raise InputError(
                f"rows {rows.min()} to {rows.max()} of split {info.name}: use 0 to {info.n_rows - 1}"
            )
        x = np.empty((len(rows), manifest.n_features), manifest.x_dtype)
        y = np.empty((len(rows), *y_row(manifest.task, manifest.n_outputs)), manifest.y_dtype)
        order = np.argsort(rows, kind="stable")
        segments, starts = np.unique(rows[order] // info.segment_rows, return_index=True)
        bounds = pairwise([*starts.tolist(), len(order)])
        read = scan(self, segments.tolist())
        for index, (start, stop), (x_segment, y_segment) in zip(segments.tolist(), bounds, read, strict=True):
            places = order[start:stop]
            within = rows[places] - index * info.segment_rows
            x[places], y[places] = x_segment[within], y_segment[within]
        return x, y

    def _opened(self) -> RowStore:
        if self._store is None:
            store = open_store(self.path, self.read_timeout_s)
            if store.manifest.fingerprint != self._fingerprint:
                raise InputError(f"{self.path} is another store than the one opened first; restore that one")
            self._store = store
        return self._store


def _memory(name: str, out: NDArray[Any] | None, shape: tuple[int, ...], dtype: str) -> NDArray[Any]:
    """The first rows of `out`, or new memory where it is None; InputError where `out` does not fit the shape."""
    if out is None:
        return np.empty(shape, dtype)
    if out.dtype != dtype or out.shape[1:] != shape[1:] or len(out) < shape[0] or not out.flags.c_contiguous:
        raise InputError(f"{name} is {out.dtype} {out.shape}; use C-contiguous {dtype} {shape} or more rows")
    return out[: shape[0]]
