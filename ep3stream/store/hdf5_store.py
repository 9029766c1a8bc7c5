"""A store as one HDF5 file: one chunk is one segment, with a checksum; any HDF5 tool can read the file.

Rows are never compressed, so that a chunk's bytes are the rows themselves, with a checksum behind them. A segment is
read from its place in the file into the caller's memory, without h5py, which has one lock for the whole process. h5py
only looks up those places, and its file is closed afterwards, so threads and forked processes are safe.
"""

from __future__ import annotations

import threading
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any, ClassVar

import h5py
import numpy as np
from numpy.typing import NDArray

from ep3stream.disk import sync
from ep3stream.store.backend import ARRAYS, SplitLayout
from ep3stream.store.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Manifest, SplitInfo

# Every structure of this version of the format carries a checksum; older ones hide flipped bits.
_LIBRARY_VERSION = ("v110", "v110")
SIGNATURE = b"\x89HDF\r\n\x1a\n"
_FILTERS = [h5py.h5z.FILTER_FLETCHER32]
_CHECKSUM_BYTES = 4  # Behind the rows of each chunk, by the filter fletcher32.


class _DiskFile:
    """The file through which HDF5 writes. HDF5 never sees a write fail; `check` raises the error of the first failure.

    HDF5 does not survive a full disk: it keeps the rows that it could not write, fails again when the file is closed,
    and later ends the whole process with a segmentation fault.
    """

    def __init__(self, path: Path) -> None:
        self._file = path.open("x+b", buffering=0)
        self._error: OSError | None = None
        self.seek = self._file.seek
        self.tell = self._file.tell
        self.read = self._file.read
        self.readinto = self._file.readinto
        self.flush = self._file.flush
        self.close = self._file.close

    def write(self, data: memoryview) -> int:
        """Write all of `data`, unless a write failed before."""
        with self._remembering():
            rest = data
            while rest and self._error is None:  # One call writes at most 2 GiB.
                rest = rest[self._file.write(rest) :]
        return len(data)

    def truncate(self, size: int) -> int:
        """Set the file's size in bytes."""
        with self._remembering():
            self._file.truncate(size)
        return size

    def check(self) -> None:
        """Raise the first error of a write, if there was one."""
        if self._error is not None:
            raise self._error

    @contextmanager
    def _remembering(self) -> Iterator[None]:
        try:
            yield
        except OSError as error:
            self._error = self._error or error


class Hdf5Writer:
    """Writes the arrays of a new file at `path`, which must not exist."""

    writes_in_order: ClassVar[bool] = True  # A chunk lies where the file ended when it was written.

    def __init__(self, path: Path) -> None:
        self._path = path
        self._disk = _DiskFile(path)
        self._file = h5py.File(self._disk, "w", libver=_LIBRARY_VERSION)
        self._growing = threading.Lock()

    def create_split(self, layout: SplitLayout) -> None:
        """Make the empty arrays of one split."""
        group = self._file.create_group(layout.name)
        for name in ARRAYS:
            row, dtype = layout.rows[name], np.dtype(layout.dtypes[name])
            group.create_dataset(
                name,
                shape=(0, *row),
                maxshape=(None, *row),
                dtype=dtype,
                chunks=(layout.chunk_rows, *row),
                fillvalue=np.nan if dtype.kind == "f" else -1,
                fletcher32=True,
            )

    def write(self, split: str, start: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Write rows start to start + len(x); OSError where the disk refused any write so far."""
        stop = start + len(x)
        for name, rows in (("x", x), ("y", y)):
            dataset = self._file[split][name]
            with self._growing:
                if dataset.shape[0] < stop:
                    dataset.resize(stop, axis=0)
            dataset[start:stop] = rows
        self._disk.check()

    def finish(self, manifest: bytes) -> None:
        """Write the manifest into the file, close the file and sync it."""
        self._file.create_dataset(MANIFEST_NAME, data=np.frombuffer(manifest, np.uint8), fletcher32=True)
        self.close()
        self._disk.check()
        sync(self._path)

    def close(self) -> None:
        """Close the file; this writes the rows that HDF5 still holds in memory."""
        try:
            self._file.close()
        finally:
            self._disk.close()


class Hdf5Reader:
    """Reads the segments of a finished file; opens it for each read and holds nothing open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._places: dict[str, dict[str, NDArray[np.int64]]] = {}
        self.n_readers = 2

    def check(self, info: SplitInfo, index: int) -> None:
        """Raise unless both chunks of the segment have a place in the file, and the file is long enough."""
        places = self._places.get(info.name)
        if places is None:
            places = self._places[info.name] = self._find_chunks(info)
        layout, size = SplitLayout.of(self._manifest, info), self._path.stat().st_size
        for name in ARRAYS:
            place = int(places[name][index])
            if place < 0:  # HDF5 would fill the rows in, silently.
                raise ValueError(f"chunk {index} of {info.name}/{name} is missing")
            if place + layout.chunk_bytes(name) + _CHECKSUM_BYTES > size:
                raise EOFError(f"the file ends inside chunk {index} of {info.name}/{name}")

    def read(self, info: SplitInfo, index: int, x: NDArray[Any], y: NDArray[Any]) -> float:
        """Fill x and y with the bytes of one checked segment, as they are; returns the seconds that it took."""
        places, began = self._places[info.name], time.perf_counter()
        with self._path.open("rb", buffering=0) as file:
            for name, target in (("x", x), ("y", y)):
                file.seek(int(places[name][index]))
                rest = target.reshape(-1).view(np.uint8).data
                while rest:  # One call reads at most 2 GiB.
                    n_read = file.readinto(rest)
                    if not n_read:
                        raise EOFError(f"the file ends inside chunk {index} of {info.name}/{name}")
                    rest = rest[n_read:]
        return time.perf_counter() - began

    def _find_chunks(self, info: SplitInfo) -> dict[str, NDArray[np.int64]]:
        layout = SplitLayout.of(self._manifest, info)
        with h5py.File(self._path, "r") as file:
            return {
                name: _chunk_places(_own(file, f"{info.name}/{name}"), name, layout, info) for name in ARRAYS
            }

    def pieces(self, info: SplitInfo, index: int) -> tuple[str, ...]:
        """The chunks that hold segment `index`."""
        return tuple(f"chunk {index} of {info.name}/{name}" for name in ARRAYS)

    def inventory(self) -> dict[str, str]:
        """Piece -> problem: a file of a wrong size, chunks without a place, links, foreign groups and datasets."""
        size, end = self._path.stat().st_size, _end_of_file(self._path)
        problems = {} if size == end else {"the file": f"has {size} bytes; it must have {end}"}
        for info in self._manifest.splits.values():
            try:
                places = self._find_chunks(info)
            except (OSError, KeyError, ValueError, RuntimeError) as error:
                problems[f"split {info.name}"] = f"is not as written ({error!r:.300})"
                continue
            for index in range(info.n_segments):
                for name, piece in zip(ARRAYS, self.pieces(info, index), strict=True):
                    if places[name][index] < 0:
                        problems[piece] = "is missing"
        expected = {MANIFEST_NAME, *self._manifest.splits}
        expected |= {f"{split}/{name}" for split in self._manifest.splits for name in ARRAYS}
        found: list[str] = []
        with h5py.File(self._path, "r") as file:
            file.visit_links(found.append)
        return problems | dict.fromkeys(sorted(set(found) - expected), "does not belong to the store")


def _own(file: h5py.File, name: str) -> Any:
    """The dataset `name`; ValueError where a link leads to it, which might take the rows from another file."""
    parts = name.split("/")
    for path in ("/".join(parts[: n + 1]) for n in range(len(parts))):
        if not isinstance(file.get(path, getlink=True), h5py.HardLink):
            raise ValueError(f"{path} is a link; put the dataset itself in the store")
    return file[name]


def _end_of_file(path: Path) -> int:
    """The file's size by its superblock; ValueError unless the superblock has version 2 or 3."""
    with path.open("rb") as file:
        head = file.read(36)
    if head[:8] != SIGNATURE or head[8] not in (2, 3):
        raise ValueError("the superblock is not one of version 2 or 3")
    return int.from_bytes(head[28:36], "little")


def _filters(dataset: Any) -> list[int]:
    """The numbers of a dataset's filters. For a number that it does not know, HDF5 would look for a plugin to run."""
    plan = dataset.id.get_create_plist()
    return [plan.get_filter(number)[0] for number in range(plan.get_nfilters())]


def _chunk_places(dataset: Any, name: str, layout: SplitLayout, info: SplitInfo) -> NDArray[np.int64]:
    """The byte offset of each chunk in the file, (n_segments,), -1 for a chunk that has none."""
    row, dtype = layout.rows[name], layout.dtypes[name]
    found = (dataset.shape, str(dataset.dtype), dataset.chunks, _filters(dataset))
    promised = ((info.n_rows, *row), dtype, (layout.chunk_rows, *row), _FILTERS)
    if found != promised:
        raise ValueError(f"{layout.name}/{name} declares {found} but the manifest {promised}")
    n_bytes = layout.chunk_bytes(name) + _CHECKSUM_BYTES
    places = np.full(info.n_segments, -1, np.int64)

    def note(chunk: Any) -> None:
        if chunk.size == n_bytes and not chunk.filter_mask:
            places[chunk.chunk_offset[0] // layout.chunk_rows] = chunk.byte_offset

    dataset.id.chunk_iter(note)
    return places


def read_manifest(path: Path) -> bytes | None:
    """The manifest's bytes, or None where there is no manifest."""
    if not h5py.is_hdf5(path):
        return None
    with h5py.File(path, "r") as file:
        if MANIFEST_NAME not in file:
            return None
        dataset = _own(file, MANIFEST_NAME)
        if dataset.dtype != np.uint8 or dataset.ndim != 1 or dataset.size > MAX_MANIFEST_BYTES:
            raise ValueError(f"{MANIFEST_NAME} is {dataset.dtype} {dataset.shape}")
        # Before HDF5 reads: no bytes of another file, no chunk far larger than the dataset, no plugin that runs.
        chunk_bytes = (dataset.chunks or [0])[0]
        if not 0 < chunk_bytes <= MAX_MANIFEST_BYTES or _filters(dataset) != _FILTERS:
            raise ValueError(f"{MANIFEST_NAME} has chunks of {chunk_bytes} and filters {_filters(dataset)}")
        return bytes(dataset[:])
