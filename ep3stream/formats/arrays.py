"""Arrays in files, read as rows from front to back: NPY, NPZ, idx (the MNIST family), HDF5 and Zarr.

NumPy parses the headers; the rows are read here. For 98 MiB, measured in processor time and growth of memory:
NPY 0.01 s and 3 MiB, as NumPy's memory map 0.01 s and 100 MiB, which stay in the process; NPZ 0.01 s and
3 MiB, while np.load reads the whole array, 0.08 s and 100 MiB. NumPy does not read idx. Pickles are refused.
"""

from __future__ import annotations

import math
import re
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

import h5py
import numpy as np
import zarr
from numpy.typing import NDArray

from ep3stream.errors import SourceError
from ep3stream.formats.source import reading
from ep3stream.formats.text_blocks import open_unpacked

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf")

# A file with the array's name behind it: f.npz:name, f.h5:/group/x.
_FILE_AND_NAME = re.compile(r"(.+(?:\.npz|\.h5|\.hdf5|\.hdf)):(.+)", re.IGNORECASE)

# QMNIST calls its labels ...-idx2-int.gz.
_IDX_NAME = re.compile(r"[.-]idx\d?(-(u?byte|short|int|float|double))?(\.gz)?$", re.IGNORECASE)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}
_ZARR_FILES = ("zarr.json", ".zarray", ".zgroup")

# Chunks up to this size are read once and whole, even if the reader asks for less at a time.
_CHUNK_BYTES = 256 << 20

# Rows, and how many bytes of the file have been read to get them.
RowBlocks = Iterator[tuple[NDArray[Any], int]]

# Opens an unpacked stream, with a function that says how many bytes of the packed file have been read.
OpenStream = Callable[[], AbstractContextManager[tuple[Any, Callable[[], int]]]]


@dataclass(frozen=True, slots=True, eq=False)
class RowArray:
    """An array whose rows can be read in order, any number of times.

    name: what messages call it. files: the files read; directories for Zarr, none for an array of Python.
    blocks(block_rows, start_row): the rows from `start_row` on, about `block_rows` at a time.
    is_costly: whether a second reading should be avoided.
    is_raw: whether the bytes of a block are those of the file.
    """

    name: str
    files: tuple[Path, ...]
    shape: tuple[int, ...]
    dtype: np.dtype[Any]
    blocks: Callable[[int, int], RowBlocks]
    is_costly: bool = False
    is_raw: bool = False

    def __len__(self) -> int:
        return self.shape[0] if self.shape else 0

    @property
    def row_bytes(self) -> int:
        """The size of one row in the array's own type."""
        return math.prod(self.shape[1:]) * self.dtype.itemsize


def is_array_file(path: Path) -> bool:
    """Whether `open_row_array` reads the path: by its name or, for Zarr, by what the directory holds."""
    file, _ = _file_and_name(path)
    name = file.name.lower()
    return name.endswith((".npy", ".npz", *HDF5_SUFFIXES)) or bool(_IDX_NAME.search(name)) or _is_zarr(path)


def can_hold_x_and_y(path: Path) -> bool:
    """Whether the path is of a format that holds several arrays, so that x and y can lie in it together."""
    return _file_and_name(path)[0].name.lower().endswith((".npz", *HDF5_SUFFIXES)) or _is_zarr(path)


def open_array(path: Path) -> NDArray[Any]:
    """A .npy file as a read-only memory map; raises SourceError for objects, pickles and truncated files."""
    with reading(path):
        array = np.load(path, mmap_mode="r", allow_pickle=False)
        if not isinstance(array, np.ndarray):
            raise SourceError(f"{path}: holds several arrays; save x and y as one .npy file each")
    if array.dtype.kind not in "biuf":
        raise SourceError(f"{path}: holds {array.dtype}, not numbers; save it as numbers")
    return array


def open_row_array(path: Path, default: str) -> RowArray:
    """The array in a file: `x.npy`, `f.npz:name`, `f.h5:/group/x`, `store.zarr/train/x`, `images-idx3-ubyte.gz`.

    `default` is the array's name if `path` names a file or a group that holds several. Raises SourceError if
    the array is damaged, missing or pickled, or holds no numbers.
    """
    file, member = _file_and_name(path)
    name = file.name.lower()
    with reading(file):
        if _is_zarr(file):
            array = _open_zarr(file, default)
        elif name.endswith(HDF5_SUFFIXES):
            array = _open_hdf5(file, member or "/", default)
        elif name.endswith(".npz"):
            array = _open_npz(file, member or default)
        elif name.endswith(".npy"):
            array = _open_npy(file)
        elif _IDX_NAME.search(name):
            array = _open_idx(file)
        else:
            with file.open("rb"):  # a missing file is named as such first
                raise SourceError(f"{path}: is no .npy, .npz, .h5, Zarr or idx file; give one of those")
    if array.dtype.kind not in "biuf":
        raise SourceError(f"{array.name}: holds {array.dtype}, not numbers; save it as numbers")
    return array


def _file_and_name(path: Path) -> tuple[Path, str | None]:
    found = _FILE_AND_NAME.fullmatch(str(path))
    return (Path(found[1]), found[2]) if found else (path, None)


def _is_zarr(path: Path) -> bool:
    return any((path / name).is_file() for name in _ZARR_FILES)


# -- three ways to read rows: from the plain bytes of a file, from a packed stream, from chunks


def _plain_array(
    name: str, file: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], order: str
) -> RowArray:
    """An array that lies unpacked in the file from byte `offset` on."""
    row_bytes, n_bytes = math.prod(shape[1:]) * dtype.itemsize, math.prod(shape) * dtype.itemsize
    if file.stat().st_size < offset + n_bytes:
        raise SourceError(
            f"{name}: cannot be read (it has {file.stat().st_size} bytes, its header says {offset + n_bytes}); "
            "it is truncated"
        )

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        for row in range(start_row, shape[0], block_rows):
            stop = min(row + block_rows, shape[0])
            if order == "C":
                rows = np.empty((stop - row, *shape[1:]), dtype)
                _read_into(rows, file, offset + row * row_bytes, name)
            else:
                # Mapped anew for each block: pages of a map that was dropped do not stay in the process.
                rows = np.memmap(file, dtype, "r", offset, shape, "F")[row:stop]
            yield rows, offset + stop * row_bytes

    return RowArray(name, (file,), shape, dtype, blocks, is_raw=order == "C")


def _read_into(rows: NDArray[Any], file: Path, offset: int, name: str) -> None:
    data = rows.reshape(-1).view(np.uint8).data if rows.size else memoryview(b"")
    with file.open("rb", buffering=0) as stream:
        stream.seek(offset)
        while data:
            n_bytes = stream.readinto(data)
            if not n_bytes:
                raise SourceError(f"{name}: became shorter while it was read; convert it when it is complete")
            data = data[n_bytes:]


def _packed_array(
    name: str, file: Path, opened: OpenStream, header_bytes: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> RowArray:
    """An array that must be unpacked from its beginning; the rows before a restart are skipped."""
    row_bytes = math.prod(shape[1:]) * dtype.itemsize

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        with reading(file), opened() as (stream, position):
            left = header_bytes + start_row * row_bytes
            while left:
                left -= len(_read_exactly(stream, min(left, 1 << 20), name))
            for row in range(start_row, shape[0], block_rows):
                n_rows = min(block_rows, shape[0] - row)
                data = _read_exactly(stream, n_rows * row_bytes, name)
                if row + n_rows == shape[0] and stream.read(1):
                    raise SourceError(f"{name}: holds more than its header says; it is damaged")
                yield np.frombuffer(data, dtype).reshape(n_rows, *shape[1:]), position()

    return RowArray(name, (file,), shape, dtype, blocks)


def _read_exactly(stream: Any, n_bytes: int, name: str) -> bytes:
    pieces: list[bytes] = []
    while n_bytes:
        piece = stream.read(n_bytes)
        if not piece:
            raise SourceError(f"{name}: cannot be read (it ends {n_bytes} bytes early); it is truncated")
        pieces.append(piece)
        n_bytes -= len(piece)
    return pieces[0] if len(pieces) == 1 else b"".join(pieces)


def _chunked_array(
    name: str, file: Path, shape: tuple[int, ...], dtype: np.dtype[Any], chunk_rows: int,
    opened: Callable[[], AbstractContextManager[Any]],
) -> RowArray:  # fmt: skip
    """An array in chunks of rows, each of which is read once; `opened()` gives an array to slice by rows."""
    row_bytes = max(1, math.prod(shape[1:]) * dtype.itemsize)
    n_bytes = 0 if file.is_dir() else file.stat().st_size

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        whole = chunk_rows if chunk_rows * row_bytes <= _CHUNK_BYTES else 1
        step = max(1, block_rows // whole) * whole
        with reading(file), opened() as array:
            row = start_row
            while row < shape[0]:
                end = min((row // step + 1) * step, shape[0])
                read = np.asarray(array[row:end])
                for at in range(0, len(read), block_rows):
                    yield read[at : at + block_rows], n_bytes * end // shape[0]
                row = end

    return RowArray(name, (file,), shape, dtype, blocks)


# -- the formats


def _open_npy(file: Path) -> RowArray:
    with file.open("rb") as stream:
        shape, order, dtype = _npy_header(stream)
        return _plain_array(str(file), file, stream.tell(), dtype, shape, order)


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], str, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    return shape, "F" if is_fortran else "C", dtype


def _open_npz(file: Path, member: str) -> RowArray:
    """A member of a .npz: read in place if it is stored as it is, else unpacked from front to back."""
    name = f"{file}:{member}"
    with file.open("rb") as raw, zipfile.ZipFile(raw) as archive:
        held = [found.removesuffix(".npy") for found in archive.namelist()]
        if member not in held:
            raise SourceError(f"{file}: has no array {member!r}; name one of {', '.join(held[:10])}")
        info = archive.getinfo(archive.namelist()[held.index(member)])
        with archive.open(info) as stream:
            shape, order, dtype = _npy_header(stream)
            header_bytes = stream.tell()
        if info.compress_type == zipfile.ZIP_STORED:
            # The local header is 30 bytes, then name and extra field, whose lengths are its last 4 bytes.
            raw.seek(info.header_offset + 26)
            lengths = np.frombuffer(raw.read(4), "<u2")
            offset = info.header_offset + 30 + int(lengths.sum()) + header_bytes
            return _plain_array(name, file, offset, dtype, shape, order)
    if order == "F" and len(shape) > 1:
        raise SourceError(f"{name}: is deflated column by column; save it with np.ascontiguousarray")

    @contextmanager
    def opened() -> Iterator[tuple[Any, Callable[[], int]]]:
        with file.open("rb") as raw, zipfile.ZipFile(raw) as archive, archive.open(info) as stream:
            yield stream, raw.tell

    return _packed_array(name, file, opened, header_bytes, dtype, shape)


def _open_idx(file: Path) -> RowArray:
    """The format of the MNIST family: two zeros, a type, the number of dimensions and each as big-endian int32."""
    name = str(file)
    with open_unpacked(file) as (stream, _):
        magic = _read_exactly(stream, 4, name)
        if magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not magic[3]:
            raise SourceError(f"{name}: is no idx file, by its first bytes; give one, or rename it")
        sizes = np.frombuffer(_read_exactly(stream, 4 * magic[3], name), ">i4")
    shape, dtype = tuple(int(size) for size in sizes), np.dtype(_IDX_TYPES[magic[2]])
    header_bytes = 4 + 4 * magic[3]
    if file.suffix.lower() == ".gz":
        return _packed_array(name, file, lambda: open_unpacked(file), header_bytes, dtype, shape)
    return _plain_array(name, file, header_bytes, dtype, shape, "C")


def _open_hdf5(file: Path, member: str, default: str) -> RowArray:
    with h5py.File(file, "r") as opened_file:
        found = _member(file, opened_file, member, default, h5py.Group)
        path, shape, dtype = str(found.name), found.shape, found.dtype
        chunk_rows = found.chunks[0] if found.chunks else 1
        _require_all_chunks(file, found)

    @contextmanager
    def opened() -> Iterator[Any]:
        with h5py.File(file, "r") as opened_file:
            yield opened_file[path]

    return _chunked_array(f"{file}:{path}", file, shape, dtype, chunk_rows, opened)


def _require_all_chunks(file: Path, found: h5py.Dataset) -> None:
    """Raises SourceError if chunks are missing, for HDF5 gives zeros for rows that lie in no chunk.

    Rows lie in no chunk if they were never written, or if the index of chunks was damaged.
    """
    if not found.chunks or 0 in found.shape:
        return
    expected = math.prod(-(-size // chunk) for size, chunk in zip(found.shape, found.chunks, strict=True))
    stored: set[tuple[int, ...]] = set()

    def add(chunk: Any) -> None:
        if chunk.filter_mask == 0:  # else a filter was left out, perhaps the one that checks
            stored.add(chunk.chunk_offset)

    def is_in_grid(offset: tuple[int, ...]) -> bool:
        axes = zip(offset, found.chunks, found.shape, strict=True)
        return all(at % chunk == 0 and at < size for at, chunk, size in axes)

    found.id.chunk_iter(add)
    if len(stored) != expected or not all(map(is_in_grid, stored)):
        raise SourceError(
            f"{file}: {found.name} lacks some of its {expected} chunks, which were never written or are "
            "damaged; write all rows"
        )


def _open_zarr(path: Path, default: str) -> RowArray:
    found: Any = zarr.open(path, mode="r")
    if isinstance(found, zarr.Group):
        found = _member(path, found, "", default, zarr.Group)
        path = path / default
    shards = getattr(found, "shards", None) or found.chunks

    @contextmanager
    def opened() -> Iterator[Any]:
        yield zarr.open_array(path, mode="r")

    return _chunked_array(str(path), path, found.shape, found.dtype, shards[0] if shards else 1, opened)


def _member(file: Path, group: Any, member: str, default: str, group_type: type) -> Any:
    """The array `member`, or `default` in the group `member`; raises SourceError, which names the arrays."""
    found = group.get(member) if member.strip("/") else group
    if isinstance(found, group_type):
        group, member = found, default
        found = group.get(default)
    if found is None or isinstance(found, group_type):
        raise SourceError(f"{file}: has no array {member!r}; name one of {', '.join(list(group)[:10])}")
    return found
