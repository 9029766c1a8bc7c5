"""Arrays of Zarr, of format 2 or 3, in directories and zip files, with a count of the chunks that are not there.

Zarr gives the fill value for a chunk that is not there, as most writers leave out chunks of nothing else. So a lost
chunk cannot be told from one of fill values: chunks that are not there are counted, and told or refused. A chunk of
0 bytes reads like one that is not there, but no writer leaves it.
"""

from __future__ import annotations

import logging
import math
import warnings
import zipfile
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from itertools import product
from pathlib import Path
from typing import IO, Any

import numpy as np
import zarr
from zarr.storage import LocalStore, ZipStore

from ep3stream.errors import SourceError
from ep3stream.formats.packed_values import PackedValues
from ep3stream.formats.row_array import RowArray, chunked_array

_logger = logging.getLogger(__name__)

ZARR_ZIP_SUFFIXES = (".zarr.zip",)

_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")

# Offset and length of a chunk that a shard does not have.
_NOT_THERE = (1 << 64) - 1

# The header of Blosc, whose last 4 bytes are the size of the chunk as it is packed.
_BLOSC_HEADER = 16


def is_zarr(path: Path) -> bool:
    """Whether the path is an array or a group of Zarr, by its name or by what its directory holds."""
    if path.name.lower().endswith(ZARR_ZIP_SUFFIXES):
        return True
    return any((path / name).is_file() for name in _ZARR_FILES)


def open_zarr(path: Path, default: str, member: str | None = None) -> RowArray:
    """The array at the path, or `default` in the group there; `member` is a path within a zip file.

    Warns of chunks that are not there. Raises SourceError if there is no array, if it has no fill value for chunks
    that are not there, or if a chunk has 0 bytes.
    """
    is_zip = path.is_file()
    with _opened(path, is_zip) as store:
        # Consolidated metadata may be older than the arrays, and then hide rows.
        found: Any = _found(store, (member or "").strip("/"), path)
        if isinstance(found, zarr.Group):
            group, found = found, found.get(default)
            if not isinstance(found, zarr.Array):
                with warnings.catch_warnings(action="ignore"):  # of what else lies in the directory
                    names = ", ".join(sorted(group.keys())[:10])
                held = f"name one of {names}" if names else "it is empty"
                raise SourceError(f"{path}: has no array {default!r}; {held}")
        inside = found.path
        name = f"{path}:{inside}" if is_zip else str(path / inside)
        packed = PackedValues.of(_attributes(found), found.dtype)
        _Chunks.of(found, name, packed).require_there(
            _Zip(path, inside) if is_zip else _Directory(path / inside)
        )
        shards = getattr(found, "shards", None) or found.chunks
        shape, dtype = found.shape, found.dtype

    @contextmanager
    def opened() -> Iterator[Any]:
        with _opened(path, is_zip) as store:
            yield zarr.open_array(store, mode="r", path=inside)

    files = (path,) if is_zip else (path / inside,)
    array = chunked_array(name, files, shape, dtype, shards[0] if shards else 1, opened)
    return array if packed is None else packed.unpacked(array)


def _found(store: Any, inside: str, path: Path) -> Any:
    """The array or group at a place of the store; raises SourceError, which names what a zip file holds instead."""
    try:
        return zarr.open(store, mode="r", path=inside, use_consolidated=False)
    except FileNotFoundError:
        if not path.is_file():
            raise
    with zipfile.ZipFile(path) as archive:
        held = [name for name in archive.namelist() if name.endswith(_ZARR_FILES)]
    groups = sorted({str(Path(name).parent) for name in held if Path(name).parent != Path()})
    remedy = (
        f"name one of {', '.join(f'{path}:{each}' for each in groups[:3])}" if groups else "zip a Zarr store"
    )
    raise SourceError(f"{path}: has no array or group of Zarr at {inside or 'its top'!r}; {remedy}")


def _attributes(found: Any) -> dict[str, Any]:
    """The array's attributes. In format 2 xarray, which names the axes, keeps `_FillValue` as Zarr's fill value."""
    attributes = dict(found.attrs)
    if found.metadata.zarr_format == 2 and "_ARRAY_DIMENSIONS" in attributes and found.fill_value is not None:
        attributes.setdefault("_FillValue", found.fill_value)
    return attributes


@contextmanager
def _opened(path: Path, is_zip: bool) -> Iterator[Any]:
    if not is_zip:
        yield LocalStore(path, read_only=True)
        return
    store = ZipStore(path, mode="r")
    try:
        yield store
    finally:
        store.close()


@dataclass(frozen=True, slots=True)
class _Directory:
    """The files of an array in a directory."""

    path: Path

    def size(self, key: str) -> int | None:
        """The bytes of a file; None if it is not there."""
        file = self.path / key
        try:
            return file.stat().st_size
        except (FileNotFoundError, NotADirectoryError):
            return None

    @contextmanager
    def open(self, key: str) -> Iterator[IO[bytes]]:
        with (self.path / key).open("rb") as stream:
            yield stream


@dataclass(frozen=True, slots=True)
class _Zip:
    """The members of an array in a zip file."""

    path: Path
    inside: str
    sizes: dict[str, int] = field(default_factory=dict)

    def size(self, key: str) -> int | None:
        """The bytes of a member; None if it is not there."""
        if not self.sizes:
            with zipfile.ZipFile(self.path) as archive:
                self.sizes.update({each.filename: each.file_size for each in archive.infolist()})
        return self.sizes.get(f"{self.inside}/{key}".lstrip("/"))

    @contextmanager
    def open(self, key: str) -> Iterator[IO[bytes]]:
        with (
            zipfile.ZipFile(self.path) as archive,
            archive.open(f"{self.inside}/{key}".lstrip("/")) as stream,
        ):
            yield stream


@dataclass(frozen=True, slots=True)
class _Chunks:
    """The chunks that an array should have.

    files: the grid of files, which are shards if `index` reads them. key: a file's name by its place in the grid.
    is_blosc: whether each chunk begins with its packed size. packed: which stored numbers stand for nothing.
    """

    name: str
    shape: tuple[int, ...]
    chunks: tuple[int, ...]
    shards: tuple[int, ...]
    key: Callable[[tuple[int, ...]], str]
    fill: Any
    index: _ShardIndex | None
    is_blosc: bool
    packed: PackedValues | None

    @classmethod
    def of(cls, found: Any, name: str, packed: PackedValues | None) -> _Chunks:
        shards = getattr(found, "shards", None)
        return cls(
            name,
            found.shape,
            found.chunks,
            shards or found.chunks,
            found.metadata.encode_chunk_key,
            found.metadata.fill_value,
            _ShardIndex.of(found) if shards else None,
            bool(found.compressors) and type(found.compressors[-1]).__name__.startswith("Blosc"),
            packed,
        )

    def require_there(self, files: _Directory | _Zip) -> None:
        """Warns of chunks that are not there; raises SourceError if that cannot be right."""
        if 0 in self.shape:
            return
        grid = [range(-(-size // step)) for size, step in zip(self.shape, self.shards, strict=True)]
        total, lost, first = 0, 0, ""
        for place in product(*grid):
            key = self.key(place)
            n_chunks, n_lost = self._count(files, key, place)
            total, lost = total + n_chunks, lost + n_lost
            first = first or (key if n_lost else "")
        if not lost:
            return
        what = f"{self.name}: {lost} of its {total} chunks are not there (the first {'in ' * bool(self.index)}{first})"
        if self.fill is None:
            raise SourceError(f"{what}, and it has no fill value; copy all of its files")
        is_gap = (isinstance(self.fill, float | np.floating) and math.isnan(self.fill)) or (
            self.packed is not None and self.packed.is_gap(self.fill)
        )
        read_as = "missing values, its fill value" if is_gap else f"{self.fill}, its fill value"
        _logger.warning(
            "%s and are read as %s; if they were written with other values, copy all of its files",
            what,
            read_as,
        )

    def _count(self, files: _Directory | _Zip, key: str, place: tuple[int, ...]) -> tuple[int, int]:
        """How many chunks a file should have, and how many of them it has not."""
        begins = [at * step for at, step in zip(place, self.shards, strict=True)]
        inner = [
            -(-min(shard, size - begin) // chunk)
            for shard, size, begin, chunk in zip(self.shards, self.shape, begins, self.chunks, strict=True)
        ]
        n_chunks, n_bytes = math.prod(inner), files.size(key)
        if n_bytes is None:
            return n_chunks, n_chunks
        if n_bytes == 0:
            raise SourceError(f"{self.name}: {key} has 0 bytes; it is damaged: restore it")
        if self.index is None and not self.is_blosc:
            return n_chunks, 0
        where = f"{self.name}: {key}"
        with files.open(key) as stream:
            if self.index is None:
                _require_blosc(stream, [(0, n_bytes)], where)
                return n_chunks, 0
            entries = self.index.read(stream, n_bytes, where)
            asked = entries.reshape(*self.index.grid, 2)[tuple(slice(0, n) for n in inner)].reshape(-1, 2)
            is_there = (asked != _NOT_THERE).any(axis=1)
            if self.is_blosc:
                _require_blosc(stream, asked[is_there].tolist(), where)
        return n_chunks, int(np.count_nonzero(~is_there))


def _require_blosc(stream: IO[bytes], places: Sequence[tuple[int, int]], name: str) -> None:
    """Raises SourceError for a chunk (offset, bytes) that has not the size its header says."""
    for offset, n_bytes in places:
        stream.seek(offset)
        header = stream.read(_BLOSC_HEADER)
        if len(header) < _BLOSC_HEADER or int.from_bytes(header[-4:], "little") != n_bytes:
            raise SourceError(f"{name} has not the size that its header says; it is damaged: restore it")


@dataclass(frozen=True, slots=True)
class _ShardIndex:
    """Where a shard says which chunks it has: (offset, length) as uint64, with a checksum, at its start or end."""

    grid: tuple[int, ...]
    n_bytes: int
    is_at_end: bool
    dtype: np.dtype[Any]

    @classmethod
    def of(cls, found: Any) -> _ShardIndex:
        grid = tuple(shard // chunk for shard, chunk in zip(found.shards, found.chunks, strict=True))
        codec: Any = next(each for each in found.metadata.codecs if hasattr(each, "index_codecs"))
        names = [each.to_dict()["name"] for each in codec.index_codecs]
        if names not in (["bytes"], ["bytes", "crc32c"]):
            raise SourceError(
                f"shards with an index by {', '.join(names)} are unknown; write it with zarr's default"
            )
        order = codec.index_codecs[0].to_dict().get("configuration", {}).get("endian", "little")
        return cls(
            grid,
            16 * math.prod(grid) + 4 * (len(names) - 1),
            str(getattr(codec.index_location, "value", codec.index_location)) == "end",
            np.dtype(">u8" if order == "big" else "<u8"),
        )

    def read(self, stream: IO[bytes], n_bytes: int, name: str) -> Any:
        """The entries (chunks, 2); raises SourceError for a shard that ends before one of its chunks."""
        if n_bytes >= self.n_bytes:
            stream.seek(n_bytes - self.n_bytes if self.is_at_end else 0)
            entries = np.frombuffer(stream.read(16 * math.prod(self.grid)), self.dtype).reshape(-1, 2)
            held = entries[(entries != _NOT_THERE).any(axis=1)]
            ends = held.sum(axis=1, dtype=np.uint64)
            if not (ends > np.uint64(n_bytes)).any() and not (held > np.uint64(n_bytes)).any():
                return entries
        raise SourceError(f"{name} has {n_bytes} bytes, too few for its chunks; it is damaged: restore it")
