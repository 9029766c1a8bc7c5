"""Reading a store: every segment is checked against the manifest's digest before anybody sees its rows."""

from __future__ import annotations

import os
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from itertools import pairwise
from pathlib import Path
from typing import TYPE_CHECKING, Any, NoReturn

import numpy as np
from numpy.typing import NDArray

from ep3stream.errors import DamagedDataError, InputError
from ep3stream.store import hdf5_store as hdf5_backend
from ep3stream.store import zarr_store as zarr_backend
from ep3stream.store.backend import ReadingBackend, ReadTimes, y_row
from ep3stream.store.files import LocalFiles, Location, ObjectUrl, StoreFiles, location, path_kind
from ep3stream.store.manifest import (
    MANIFEST_NAME,
    Manifest,
    SplitInfo,
    segment_digest,
)
from ep3stream.store.object_files import ObjectFiles
from ep3stream.store.verify import VerifyProgress, damaged_segments

if TYPE_CHECKING:
    from ep3stream.stream.torch_dataset import StoreDataset


def open_store(place: str | Path | ObjectUrl) -> RowStore:
    """Open the store at `place`: a directory is Zarr, a file HDF5, and s3://bucket/key Zarr in a bucket.

    Raises InputError when there is nothing, or nothing that was committed, or where a bucket cannot be reached;
    DamagedDataError when the manifest cannot be trusted.
    """
    path = location(place)
    if isinstance(path, ObjectUrl):
        return _open_in_bucket(path)
    if path.is_dir():
        return _open_zarr(path, LocalFiles(path))
    if path.is_file():
        data = _manifest_bytes(lambda: hdf5_backend.read_manifest(path), path)
        manifest = Manifest.from_json(data, f"{path}: {MANIFEST_NAME}")
        return RowStore(path, manifest, hdf5_backend.Hdf5Reader(path, manifest))
    if os.path.lexists(path):
        raise InputError(
            f"{path} is a link that leads nowhere or in a circle, or neither file nor directory; correct the path"
        )
    raise InputError(f"{path} does not exist; convert the data first or correct the path")


def _open_in_bucket(url: ObjectUrl) -> RowStore:
    files = ObjectFiles(url)
    try:
        if not files.listing(limit=1):
            raise InputError(f"{url} does not exist; convert the data first or correct the path")
        return _open_zarr(url, files)
    except OSError as error:
        raise InputError(
            f"{url} cannot be reached ({error}); correct the network or the AWS_... variables"
        ) from error


def _open_zarr(path: Location, files: StoreFiles) -> RowStore:
    data = _manifest_bytes(lambda: zarr_backend.read_manifest(files), path)
    manifest = Manifest.from_json(data, f"{path}/{MANIFEST_NAME}")
    return RowStore(path, manifest, zarr_backend.ZarrReader(files, manifest))


def _remedy(error: Exception, path: Location) -> str:
    """For a segment that cannot be read: what lies behind a wall need not be damaged."""
    if isinstance(error, PermissionError):
        return "correct its permissions"
    is_there = isinstance(error, OSError) and not isinstance(error, FileNotFoundError)
    if isinstance(path, ObjectUrl) and is_there:
        return "see to the server and the network"
    return "restore it or convert again"


def _manifest_bytes(read: Callable[[], bytes | None], path: Location) -> bytes:
    try:
        data = read()
    except InputError:
        raise
    except PermissionError as error:
        raise InputError(f"{path} may not be read ({error}); correct its permissions") from error
    except Exception as error:  # HDF5 meets damage with errors of many types.
        if isinstance(path, ObjectUrl) and isinstance(error, OSError):
            raise  # Of the network, which is not damage.
        raise DamagedDataError(
            f"{path} cannot be read ({error!r:.300}); restore it or convert again"
        ) from error
    if data is None:
        raise InputError(_no_store(path))
    return data


def _no_store(path: Location) -> str:
    found = path_kind(path) if isinstance(path, Path) else ""
    if found == "a file":
        return f"{path} is a file, but no store; turn it into one: ep3stream convert FILE STORE"
    if found == "an empty directory":
        return f"{path} is an empty directory, not a store; convert the data first or correct the path"
    if found == "the RUN of a fit":
        return f"{path} is the RUN of a fit, not a store; give the store that `ep3stream convert` made"
    return f"{path} is not a finished store: it has no {MANIFEST_NAME}; convert the data again"


class RowStore:
    """A finished store. A context manager; holds no file open between reads, so it may be used by threads."""

    def __init__(self, path: Location, manifest: Manifest, backend: ReadingBackend) -> None:
        self.path = path
        self.manifest = manifest
        self._backend = backend
        self._open = True

    def __enter__(self) -> RowStore:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def close(self) -> None:
        """Make further reads an InputError."""
        self._open = False

    def split(self, name: str) -> SplitReader:
        """The reader of one split; raises InputError with the names there are."""
        if name not in self.manifest.splits:
            raise InputError(
                f"{self.path} has no split {name!r}; it has {', '.join(sorted(self.manifest.splits))}"
            )
        return SplitReader(self.path, name, self.manifest.fingerprint, self)

    def to_torch(self, split: str = "train", batch_size: int = 1024, **settings: Any) -> StoreDataset:
        """A split as a PyTorch data set of batches, with further settings of `StoreDataset` (shuffle, seed, rank ...).

        Read once over all workers, resumable in mid-epoch; for `DataLoader(..., batch_size=None)`.
        """
        from ep3stream.stream.torch_dataset import StoreDataset

        return StoreDataset(self.split(split), batch_size, **settings)

    def verify(
        self, *, quick: bool = False, progress: Callable[[VerifyProgress], None] | None = None
    ) -> list[str]:
        """Read everything: a sentence for each damaged, missing or foreign piece; empty for a sound store.

        quick: presence, sizes and metadata only, so that a changed byte in a row is not seen.
        O(bytes of the store) time, two segments of memory.
        """
        readers = [] if quick else [self.split(name) for name in self.manifest.splits]
        damaged = damaged_segments(readers, progress)
        named = {
            piece
            for segment in damaged
            for piece in self._backend.pieces(self.manifest.splits[segment.split], segment.index)
            if piece in segment.message
        }
        problems = [segment.message for segment in damaged]
        try:
            found = self._backend.inventory()
        except Exception as error:  # As in _read.
            return [*problems, f"{self.path}: its pieces cannot be listed ({error!r:.300})"]
        return problems + [
            f"{self.path}: {piece} {what}" for piece, what in found.items() if piece not in named
        ]

    def _check(self, split: str, index: int) -> None:
        """Before memory is taken for a segment: whether as much is stored as the manifest declares."""
        if not self._open:
            raise InputError(f"{self.path} is closed; open it again")
        with self._naming(split, index):
            self._backend.check(self.manifest.splits[split], index)

    def _read(self, split: str, index: int, x: NDArray[Any], y: NDArray[Any], times: ReadTimes) -> None:
        info, began = self.manifest.splits[split], time.perf_counter()
        with self._naming(split, index):
            read_s = self._backend.read(info, index, x, y)
        digest = segment_digest(x, y)
        times.read_s += read_s
        times.decode_s += time.perf_counter() - began - read_s
        if digest != info.digests[index]:
            raise DamagedDataError(
                f"{self.path}: split {split}, segment {index} ({', '.join(self._backend.pieces(info, index))}) has "
                f"digest {digest} but the manifest says {info.digests[index]}; restore it or convert again"
            )

    @contextmanager
    def _naming(self, split: str, index: int) -> Iterator[None]:
        """Makes whatever goes wrong a DamagedDataError that names the segment."""
        try:
            yield
        except MemoryError:
            raise
        except Exception as error:  # Codecs and HDF5 meet damaged bytes with errors of many types.
            raise DamagedDataError(
                f"{self.path}: split {split}, segment {index} cannot be read ({error!r:.300}); "
                f"{_remedy(error, self.path)}"
            ) from error


class SplitReader:
    """The rows of one split. Different segments may be read by several threads at once.

    It is pickled as a path and a name, and opens the store again at the first use in another process.
    """

    def __init__(self, path: Location, name: str, fingerprint: str, store: RowStore | None = None) -> None:
        self.path = path
        self._name = name
        self._fingerprint = fingerprint
        self._store = store

    def __array__(self, *_: object, **__: object) -> NoReturn:
        """Asked for by who takes a split for an array, such as scikit-learn's searches, which choose rows by number."""
        raise TypeError(
            f"{self.path}, split {self._name}, is a store, not an array: read its rows by `read_rows`, or search with "
            "`ep3stream tune`"
        )

    def __reduce__(self) -> tuple[Any, ...]:
        return SplitReader, (self.path, self._name, self._fingerprint)

    @property
    def manifest(self) -> Manifest:
        """The store's manifest."""
        return self._opened().manifest

    @property
    def n_readers(self) -> int:
        """How many segments are worth reading at once."""
        return self._opened()._backend.n_readers

    @property
    def info(self) -> SplitInfo:
        """What the manifest says about this split."""
        return self.manifest.splits[self._name]

    def layout(self, index: int) -> tuple[tuple[tuple[int, ...], str], tuple[tuple[int, ...], str]]:
        """Shape and type of the x and of the y of a segment; raises InputError for one that does not exist."""
        n_rows, manifest = self.info.rows_of_segment(index), self.manifest
        x_row, y_rows = _row_shapes(manifest)
        return ((n_rows, *x_row), manifest.x_dtype), ((n_rows, *y_rows), manifest.y_dtype)

    def read_segment(
        self,
        index: int,
        x_out: NDArray[Any] | None = None,
        y_out: NDArray[Any] | None = None,
        times: ReadTimes | None = None,
    ) -> tuple[NDArray[Any], NDArray[Any]]:
        """The checked rows of segment `index`: x (rows, d), and y (rows,) or (rows, c).

        They are views of x_out and y_out where these are given (C-contiguous, of the store's dtypes, with at
        least the segment's rows); what the read took is added to `times`. Raises InputError for an index or
        memory that does not fit, DamagedDataError for rows that are not those written.
        """
        n_rows = self.info.rows_of_segment(index)
        self._opened()._check(self._name, index)
        x_row, y_rows = _row_shapes(self.manifest)
        x = _target("x_out", x_out, n_rows, x_row, self.manifest.x_dtype)
        y = _target("y_out", y_out, n_rows, y_rows, self.manifest.y_dtype)
        self._opened()._read(self._name, index, x, y, ReadTimes() if times is None else times)
        return x, y

    def read_rows(self, rows: NDArray[np.int64]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The x (m, d) and y of any m rows of the split, in the order asked for, repeats allowed.

        Each segment that holds one of them is read once, the next two while one is looked at, and again where a
        read fails or hangs: O(m + three segments) memory.
        """
        from ep3stream.stream.scan import scan

        info = self.info
        rows = np.asarray(rows, dtype=np.int64)
        if rows.size and not (rows.min() >= 0 and rows.max() < info.n_rows):
            raise InputError(
                f"rows {rows.min()} to {rows.max()} of split {info.name}: use 0 to {info.n_rows - 1}"
            )
        x, y = _empty_rows(self.manifest, len(rows))
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
            store = open_store(self.path)
            if store.manifest.fingerprint != self._fingerprint:
                raise InputError(f"{self.path} is another store than the one opened first; restore that one")
            self._store = store
        return self._store


def _row_shapes(manifest: Manifest) -> tuple[tuple[int, ...], tuple[int, ...]]:
    return (manifest.n_features,), y_row(manifest.task, manifest.n_outputs)


def _empty_rows(manifest: Manifest, n_rows: int) -> tuple[NDArray[Any], NDArray[Any]]:
    x_row, y_rows = _row_shapes(manifest)
    return np.empty((n_rows, *x_row), manifest.x_dtype), np.empty((n_rows, *y_rows), manifest.y_dtype)


def _target(
    name: str, out: NDArray[Any] | None, n_rows: int, row: tuple[int, ...], dtype: str
) -> NDArray[Any]:
    if out is None:
        return np.empty((n_rows, *row), dtype)
    if out.dtype != dtype or out.shape[1:] != row or len(out) < n_rows or not out.flags.c_contiguous:
        raise InputError(
            f"{name} is {out.dtype} {out.shape}; use C-contiguous {dtype} {(n_rows, *row)} or more rows"
        )
    return out[:n_rows]
