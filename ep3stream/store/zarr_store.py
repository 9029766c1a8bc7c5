"""A store as a Zarr v3 group: a directory with a group for each split, whose arrays' files hold one or more segments.

Zarr writes the metadata, packed rows and shards. Whole plain chunks are written here, and all rows are read by
zarr_layout.py.
"""

from __future__ import annotations

import os
import threading
from collections.abc import Mapping
from contextlib import suppress
from pathlib import Path
from typing import Any, ClassVar

import google_crc32c
import numpy as np
import zarr
from numpy.typing import NDArray
from zarr.abc.codec import BytesBytesCodec
from zarr.buffer.cpu import Buffer
from zarr.codecs import BloscCodec, Crc32cCodec
from zarr.storage import MemoryStore

from ep3stream.disk import delete, read_small_file, sync
from ep3stream.store.backend import ARRAYS, SplitLayout
from ep3stream.store.files import StoreFiles
from ep3stream.store.manifest import MANIFEST_NAME, MAX_MANIFEST_BYTES, Codec, Manifest, SplitInfo
from ep3stream.store.zarr_layout import (
    METADATA,
    ChunkFile,
    ChunkReader,
    file_problems,
    metadata_files,
    read_metadata,
    require_stored,
    unknown_keys,
)

_DECODING_THREADS = 2


def _compressors(codec: Codec) -> tuple[BytesBytesCodec, ...]:
    # Without a checksum codec, a flipped bit would be wrong data and no error for other readers of Zarr.
    if codec == "none":
        return (Crc32cCodec(),)
    # Level 1: higher levels take twice the time and more, and near-random floats shrink no further.
    return (BloscCodec(cname=codec, clevel=1, shuffle="bitshuffle"), Crc32cCodec())


class ZarrWriter:
    """Writes the arrays of a group that is no store yet."""

    writes_in_order: ClassVar[bool] = False

    def __init__(self, path: Path, root: zarr.Group) -> None:
        self._path = path
        self._root = root
        self._arrays: dict[str, dict[str, zarr.Array[Any]]] = {}
        self._layouts: dict[str, SplitLayout] = {}
        self._growing = threading.Lock()
        _bound_threads()

    @classmethod
    def create(cls, path: Path) -> ZarrWriter:
        """A new group at `path`, which must not exist."""
        return cls(path, zarr.create_group(str(path), zarr_format=3))

    @classmethod
    def reopen(cls, path: Path, layouts: Mapping[str, tuple[SplitLayout, int]]) -> ZarrWriter:
        """Go on in the group that an earlier writer left at `path`.

        layouts: for each split, its layout and the number of rows to keep, which fill whole files. The files of those
        rows stay as they are; everything else is deleted, and the metadata are written anew.
        """
        for item in path.iterdir():
            if item.name not in layouts:
                delete(item)
        writer = cls.create(path)
        for split, (layout, n_rows) in layouts.items():
            n_files = -(-n_rows // (layout.chunk_rows * layout.chunks_per_file))
            for item in (path / split).iterdir():
                if item.name not in ARRAYS:
                    delete(item)
            for name in ARRAYS:
                for item in (path / split / name).iterdir():
                    if item.name != "c":  # Metadata, and files with which zarr was about to replace them.
                        delete(item)
                for item in (path / split / name / "c").iterdir():
                    if not (item.name.isdecimal() and int(item.name) < n_files):
                        delete(item)
            writer.create_split(layout)
            for array in writer._arrays[split].values():
                array.resize((n_rows, *array.shape[1:]))
        return writer

    def read_back(self, split: str, start: int, stop: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The rows start to stop of x and y, as written."""
        arrays = self._arrays[split]
        return np.asarray(arrays["x"][start:stop]), np.asarray(arrays["y"][start:stop])

    def create_split(self, layout: SplitLayout) -> None:
        """Make the empty arrays of one split."""
        group = self._root.create_group(layout.name)
        self._arrays[layout.name] = {name: _create_array(group, name, layout) for name in ARRAYS}
        self._layouts[layout.name] = layout
        for name in ARRAYS:
            (self._path / layout.name / name / "c").mkdir(exist_ok=True)

    def write(self, split: str, start: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Write rows start to start + len(x): whole files, so that no file is read to be written again."""
        layout, stop = self._layouts[split], start + len(x)
        is_plain = layout.codec == "none" and layout.chunks_per_file == 1 and len(x) == layout.chunk_rows
        for name, rows in (("x", x), ("y", y)):
            array = self._arrays[split][name]
            with self._growing:
                if array.shape[0] < stop:
                    array.resize((stop, *array.shape[1:]))
            if is_plain:
                number = [str(start // layout.chunk_rows), *"0" * (rows.ndim - 1)]
                _write_chunk(self._path.joinpath(split, name, "c", *number), rows)
            else:
                array[start:stop] = rows

    def finish(self, manifest: bytes) -> None:
        """Sync every file and directory (zarr never does), then write the manifest and sync it."""
        for folder, _, names in os.walk(self._path):
            for name in names:
                sync(Path(folder, name))
            sync(Path(folder))
        (self._path / MANIFEST_NAME).write_bytes(manifest)
        sync(self._path / MANIFEST_NAME)
        sync(self._path)

    def close(self) -> None:
        """Do nothing: no file is open between writes."""


def _write_chunk(file: Path, rows: NDArray[Any]) -> None:
    """Write a whole chunk with no codec but crc32c: its bytes, then their checksum (Zarr v3, crc32c codec 1.0).

    Zarr copies the rows three times: a conversion of NPY rows in order runs at 0.65 GB/s by zarr, at 0.94 so.
    """
    data = rows.reshape(-1).view(np.uint8)
    file.parent.mkdir(exist_ok=True)
    with file.open("wb", buffering=0) as stream:
        rest = data.data
        while rest:
            rest = rest[stream.write(rest) :]
        stream.write(google_crc32c.value(data).to_bytes(4, "little"))


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
        # The value of rows whose file is lost, for readers without the manifest: never a plausible one.
        fill_value=np.nan if dtype.kind == "f" else -1,
        config={"write_empty_chunks": True},
    )


def _bound_threads() -> None:
    """Let zarr encode and decode on two threads, unless the user has set a number.

    Each of its threads keeps the memory of the largest segment that it has worked on: with the default of cores + 4
    threads the peak grows with the number of segments, up to 70 MiB.
    """
    if zarr.config.get("threading.max_workers", None) is None:
        zarr.config.set({"threading.max_workers": _DECODING_THREADS})


class ZarrReader:
    """Reads the segments of a finished group; no file stays open."""

    def __init__(self, files: StoreFiles, manifest: Manifest) -> None:
        self._files = files
        self._manifest = manifest
        self._chunks = ChunkReader(files)
        self._checked: set[str] = set()
        self.n_readers = files.n_readers

    def check(self, info: SplitInfo, index: int) -> None:
        """Raise unless the files that hold the segment exist with the right sizes."""
        for array in ARRAYS:
            file = ChunkFile.of(self._manifest, info, array, index // info.segments_per_file)
            require_stored(self._files, file)

    def read(self, info: SplitInfo, index: int, x: NDArray[Any], y: NDArray[Any]) -> float:
        """Fill x and y with one checked segment; returns the seconds that it took to get the stored bytes."""
        layout = SplitLayout.of(self._manifest, info)
        if info.name not in self._checked:
            for name in ARRAYS:
                _require_array(self._files, name, layout, info.n_rows)
            self._checked.add(info.name)
        place, read_s = index % info.segments_per_file, 0.0
        for name, file, target in zip(ARRAYS, self.pieces(info, index), (x, y), strict=True):
            try:
                read_s += self._chunks.read(file, layout, name, place, target)
            except (OSError, MemoryError):  # No damage of the file.
                raise
            except Exception as error:  # Codecs meet damaged bytes with errors of many types.
                raise ValueError(f"{file} does not decode: {error}") from error
        return read_s

    def inventory(self) -> dict[str, str]:
        """File -> problem: missing, of a wrong size or kind, foreign, or metadata not as written."""
        problems = file_problems(self._files, self._manifest)
        for name in sorted(set(metadata_files(self._manifest)) - {MANIFEST_NAME} - set(problems)):
            if problem := _metadata_problem(self._files, self._manifest, name):
                problems[name] = problem
        return problems

    def pieces(self, info: SplitInfo, index: int) -> tuple[str, ...]:
        """The files that hold segment `index`."""
        number = index // info.segments_per_file
        return tuple(ChunkFile.of(self._manifest, info, array, number).name for array in ARRAYS)


def _metadata_problem(files: StoreFiles, manifest: Manifest, name: str) -> str | None:
    """The problem of a zarr.json, compared as zarr reads it with one made for the same layout; None for a sound one."""
    _, split, array = ("", *Path(name).parent.parts, "", "")[:3]
    group = zarr.create_group(MemoryStore(), zarr_format=3)
    expected: dict[str, Any] = dict(group.metadata.to_dict())
    try:
        data, raw = read_metadata(files, name)
        if not array:
            found = zarr.open_group(_alone(data), mode="r", zarr_format=3).metadata.to_dict()
        else:
            info = manifest.splits[split]
            made = _create_array(group, array, SplitLayout.of(manifest, info))
            expected = {**made.metadata.to_dict(), "shape": (info.n_rows, *made.shape[1:])}
            found = zarr.open_array(_alone(data), mode="r", zarr_format=3).metadata.to_dict()
    except MemoryError:
        raise
    except Exception as error:  # Whatever zarr makes of damaged metadata.
        return f"is damaged ({error!r:.200})"
    for key in unknown_keys(raw, found):  # Zarr passes over a name it does not know, and takes its default.
        return f"has the unknown key {key!r:.80}"
    changed = [key for key in expected | found if expected.get(key) != found.get(key)]
    if not changed:
        return None
    key = changed[0]
    return f"has {key} {found.get(key)!r:.80}; it must be {expected.get(key)!r:.80}"


def _alone(metadata: bytes) -> MemoryStore:
    """A store that holds nothing but this zarr.json."""
    return MemoryStore({METADATA: Buffer.from_bytes(metadata)})


def _require_array(files: StoreFiles, name: str, layout: SplitLayout, n_rows: int) -> None:
    """Raise ValueError unless an array's metadata promise what the manifest promises."""
    path = f"{layout.name}/{name}/{METADATA}"
    array = zarr.open_array(_alone(read_metadata(files, path)[0]), mode="r", zarr_format=3)
    found = (
        array.shape,
        str(array.dtype),
        array.chunks,
        array.shards,
        [type(codec) for codec in array.compressors],
    )
    row = layout.rows[name]
    promised = (
        (n_rows, *row),
        layout.dtypes[name],
        (layout.chunk_rows, *row),
        (layout.chunk_rows * layout.chunks_per_file, *row) if layout.chunks_per_file > 1 else None,
        [type(codec) for codec in _compressors(layout.codec)],
    )
    if found != promised:
        raise ValueError(f"{path} declares {found} but the manifest {promised}")


def read_manifest(files: StoreFiles) -> bytes | None:
    """The manifest's bytes, or None where there is no manifest."""
    try:
        return files.read_small(MANIFEST_NAME, MAX_MANIFEST_BYTES)
    except FileNotFoundError:
        return None


def has_splits(path: Path) -> bool:
    """Whether a directory holds x and y of a split as this module writes them, and as users of Zarr hardly do."""
    for described in path.glob("*/x/zarr.json"):
        if (described.parent.parent / "y" / "zarr.json").is_file():
            with suppress(OSError):
                text = read_small_file(described, MAX_MANIFEST_BYTES).decode(errors="replace")
                if '"crc32c"' in text and '"NaN"' in text:
                    return True
    return False
