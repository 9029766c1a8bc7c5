"""A store as a Zarr v3 group: a directory with groups of arrays, whose files hold one or several segments."""

from __future__ import annotations

import os
import threading
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.buffer.cpu import NDBuffer
from zarr.codecs import BloscCodec, Crc32cCodec

from ep3stream.data.backend import ARRAYS, SplitLayout, fsync
from ep3stream.data.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Codec, Manifest, SplitInfo

_METADATA = "zarr.json"
_DECODING_THREADS = 2


def _compressors(codec: Codec) -> tuple[BytesBytesCodec, ...]:
    # Without a checksum codec a flipped bit is wrong data and no error, for every reader of Zarr.
    if codec == "lz4":
        return (BloscCodec(cname="lz4", clevel=1, shuffle="bitshuffle"), Crc32cCodec())
    return (Crc32cCodec(),)


class ZarrWriter:
    """Writes the arrays of a new group at `path`, which must not exist."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._root = zarr.create_group(str(path), zarr_format=3)
        self._arrays: dict[str, dict[str, zarr.Array[Any]]] = {}
        self._growing = threading.Lock()

    def create_split(self, layout: SplitLayout) -> None:
        """Make the empty arrays of one split."""
        group = self._root.create_group(layout.name)
        self._arrays[layout.name] = {name: _create_array(group, name, layout) for name in ARRAYS}

    def write(self, split: str, start: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Write rows start to start + len(x): whole files, so that no file is read to be written again."""
        stop = start + len(x)
        for name, rows in (("x", x), ("y", y)):
            array = self._arrays[split][name]
            with self._growing:
                if array.shape[0] < stop:
                    array.resize((stop, *array.shape[1:]))
            array[start:stop] = rows

    def finish(self, manifest: bytes) -> None:
        """Bring every file and directory to the disk (zarr never does), then the manifest."""
        for folder, _, names in os.walk(self._path):
            for name in names:
                fsync(Path(folder, name))
            fsync(Path(folder))
        (self._path / MANIFEST_NAME).write_bytes(manifest)
        fsync(self._path / MANIFEST_NAME)
        fsync(self._path)

    def close(self) -> None:
        """Nothing is held open between writes."""


def _create_array(group: zarr.Group, name: str, layout: SplitLayout) -> zarr.Array[Any]:
    row, dtype = layout.rows[name], np.dtype(layout.dtypes[name])
    sharded = layout.chunks_per_file > 1
    return group.create_array(
        name,
        shape=(0, *row),
        dtype=dtype,
        chunks=(layout.chunk_rows, *row),
        shards=(layout.chunk_rows * layout.chunks_per_file, *row) if sharded else None,
        compressors=_compressors(layout.codec),
        filters=None,
        # What a lost file reads as, to whoever reads it without the manifest: never a plausible value.
        fill_value=np.nan if dtype.kind == "f" else -1,
        config={"write_empty_chunks": True},
    )


def _bound_threads() -> None:
    """Has zarr decode on at most as many threads as read segments, unless the user has set a number.

    Each of its threads keeps the memory of the largest segment it has decoded: with the default of cores + 4
    the peak grows with the segments read, up to 70 MiB.
    """
    if zarr.config.get("threading.max_workers", None) is None:
        zarr.config.set({"threading.max_workers": _DECODING_THREADS})


class ZarrReader:
    """Reads the segments of a finished group; holds no file open."""

    def __init__(self, path: Path, manifest: Manifest) -> None:
        self._path = path
        self._manifest = manifest
        self._arrays: dict[str, dict[str, zarr.Array[Any]]] = {}
        _bound_threads()

    def read(self, info: SplitInfo, index: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Read one segment into x and y."""
        arrays = self._arrays.get(info.name)
        if arrays is None:
            arrays = self._arrays[info.name] = self._open_split(info)
        start = index * info.segment_rows
        for name, target in (("x", x), ("y", y)):
            file = _chunk_file(info, name, target.ndim, index // info.segments_per_file)
            if not (self._path / file).is_file():  # Zarr would fill the rows in, silently.
                raise FileNotFoundError(f"{file} is missing")
            out = NDBuffer.from_numpy_array(target)
            arrays[name].get_basic_selection(slice(start, start + len(target)), out=out)

    def _open_split(self, info: SplitInfo) -> dict[str, zarr.Array[Any]]:
        layout = SplitLayout.of(self._manifest, info)
        return {name: _open_array(self._path, name, layout, info.n_rows) for name in ARRAYS}

    def inventory(self) -> list[str]:
        """Missing or unreadable group metadata, and files that no part of the store explains."""
        problems = []
        for group in ("", *self._manifest.splits):
            try:
                zarr.open_group(str(self._path / group), mode="r", zarr_format=3)
            except Exception as error:  # Whatever zarr makes of damaged metadata.
                problems.append(f"{Path(group, _METADATA)} is missing or damaged ({error!r:.200})")
        expected = set(self._expected_files())
        for folder, _, names in os.walk(self._path):
            found = {Path(folder, name).relative_to(self._path).as_posix() for name in names}
            problems += [f"{name} does not belong to the store" for name in sorted(found - expected)]
        return problems

    def _expected_files(self) -> Iterator[str]:
        yield from (MANIFEST_NAME, _METADATA)
        for info in self._manifest.splits.values():
            layout = SplitLayout.of(self._manifest, info)
            yield f"{info.name}/{_METADATA}"
            for name in ARRAYS:
                yield f"{info.name}/{name}/{_METADATA}"
                for number in range(-(-info.n_segments // info.segments_per_file)):
                    yield _chunk_file(info, name, 1 + len(layout.rows[name]), number)


def _chunk_file(info: SplitInfo, name: str, n_dimensions: int, number: int) -> str:
    return "/".join([info.name, name, "c", str(number), *["0"] * (n_dimensions - 1)])


def _open_array(path: Path, name: str, layout: SplitLayout, n_rows: int) -> zarr.Array[Any]:
    array = zarr.open_array(str(path / layout.name / name), mode="r", zarr_format=3)
    found = (array.shape, str(array.dtype), array.chunks, [type(codec) for codec in array.compressors])
    row = layout.rows[name]
    promised = (
        (n_rows, *row),
        layout.dtypes[name],
        (layout.chunk_rows, *row),
        [type(codec) for codec in _compressors(layout.codec)],
    )
    if found != promised:
        raise ValueError(f"{layout.name}/{name}/{_METADATA} declares {found} but the manifest {promised}")
    return array


def read_manifest(path: Path) -> bytes | None:
    """The manifest's bytes, or None where there is no manifest."""
    try:
        with (path / MANIFEST_NAME).open("rb") as file:
            return file.read(MAX_MANIFEST_BYTES + 1)
    except FileNotFoundError:
        return None
