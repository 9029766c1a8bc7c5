"""Arrays in files, read as rows from front to back: NPY, NPZ, idx (the MNIST family), HDF5 and Zarr.

NumPy parses the headers; the rows are read here. For 98 MiB, measured in processor time and growth of memory:
NPY 0.01 s and 3 MiB, as NumPy's memory map 0.01 s and 100 MiB, which stay in the process; NPZ 0.01 s and
3 MiB, while np.load reads the whole array, 0.08 s and 100 MiB. NumPy does not read idx. Pickles are refused.
"""

from __future__ import annotations

import math
import re
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO, Any

import numpy as np
from numpy.typing import NDArray

from ep3stream.errors import SourceError
from ep3stream.formats.row_array import (
    OpenStream,
    RowArray,
    RowBlocks,
    StoredSum,
    packed_array,
    plain_array,
    read_exactly,
    require_end,
    skip_bytes,
)
from ep3stream.formats.source import reading
from ep3stream.formats.text_blocks import open_unpacked
from ep3stream.formats.zarr_arrays import is_zarr, open_zarr

HDF5_SUFFIXES = (".h5", ".hdf5", ".hdf", ".nc", ".nc4", ".h5ad")

# A file with the array's name behind it: f.npz:name, f.h5:/group/x.
_FILE_AND_NAME = re.compile(
    rf"(.+(?:\.npz|\.zarr\.zip|{'|'.join(map(re.escape, HDF5_SUFFIXES))})):(.+)", re.IGNORECASE
)

# QMNIST calls its labels ...-idx2-int.gz.
_IDX_NAME = re.compile(r"[.-]idx\d?(-(u?byte|short|int|float|double))?(\.gz)?$", re.IGNORECASE)
_IDX_TYPES = {0x08: ">u1", 0x09: ">i1", 0x0B: ">i2", 0x0C: ">i4", 0x0D: ">f4", 0x0E: ">f8"}

_COPY_BYTES = 1 << 20


def is_array_file(path: Path) -> bool:
    """Whether `open_row_array` reads the path: by its name or, for Zarr, by what the directory holds."""
    file, _ = _file_and_name(path)
    name = file.name.lower()
    return name.endswith((".npy", ".npz", *HDF5_SUFFIXES)) or bool(_IDX_NAME.search(name)) or is_zarr(file)


def can_hold_x_and_y(path: Path) -> bool:
    """Whether the path is of a format that holds several arrays, so that x and y can lie in it together."""
    file = _file_and_name(path)[0]
    return file.name.lower().endswith((".npz", *HDF5_SUFFIXES)) or is_zarr(file)


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
    the array is damaged, missing or pickled, if some of it lies nowhere, or if it holds no numbers.
    """
    file, member = _file_and_name(path)
    name = file.name.lower()
    with reading(file):
        if is_zarr(file):
            array = open_zarr(file, default, member)
        elif name.endswith(HDF5_SUFFIXES):
            from ep3stream.formats.hdf5_arrays import open_hdf5  # Other formats do not wait for h5py.

            array = open_hdf5(file, member or "/", default)
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
        raise SourceError(f"{array.name}: holds {_kind(array.dtype)}, not numbers; save it as numbers")
    return array


def _kind(dtype: np.dtype[Any]) -> str:
    return f"records of {', '.join(list(dtype.fields)[:5])}" if dtype.fields else str(dtype)


def _file_and_name(path: Path) -> tuple[Path, str | None]:
    found = _FILE_AND_NAME.fullmatch(str(path))
    return (Path(found[1]), found[2]) if found else (path, None)


# -- the formats


def _open_npy(file: Path) -> RowArray:
    with file.open("rb") as stream:
        shape, order, dtype = _npy_header(stream)
        header_bytes = stream.tell()
    return _alone(str(file), file, header_bytes, dtype, shape, order)


def _alone(
    name: str, file: Path, offset: int, dtype: np.dtype[Any], shape: tuple[int, ...], order: str
) -> RowArray:
    """An array behind which its file ends."""
    array = plain_array(name, file, offset, dtype, shape, order)
    n_more = file.stat().st_size - offset - math.prod(shape) * dtype.itemsize
    if n_more and not dtype.hasobject:
        raise SourceError(
            f"{name}: has {n_more} bytes more than the {shape} of its header; it is damaged or holds a second array, "
            "which would be left out: save each array in its own file"
        )
    return array


def _npy_header(stream: IO[bytes]) -> tuple[tuple[int, ...], str, np.dtype[Any]]:
    version = np.lib.format.read_magic(stream)
    read = np.lib.format.read_array_header_1_0 if version == (1, 0) else np.lib.format.read_array_header_2_0
    shape, is_fortran, dtype = read(stream)
    return shape, "F" if is_fortran else "C", dtype


def _open_npz(file: Path, member: str) -> RowArray:
    """A member of a .npz: read in place if it is stored as it is, else unpacked from front to back."""
    name = f"{file}:{member}"
    with file.open("rb") as raw, zipfile.ZipFile(raw) as archive:
        infos = [each for each in archive.infolist() if not each.is_dir()]
        held = [each.filename.removesuffix(".npy") for each in infos]
        if member not in held:
            raise SourceError(f"{file}: has no array {member!r}; name one of {', '.join(held[:10])}")
        if held.count(member) > 1:
            raise SourceError(
                f"{file}: has {held.count(member)} arrays called {member!r}; save it again with one"
            )
        info = infos[held.index(member)]
        if info.flag_bits & 1:
            raise SourceError(f"{name}: is encrypted; save it without a password")
        with archive.open(info) as stream:
            shape, order, dtype = _npy_header(stream)
            header_bytes = stream.tell()
        if info.compress_type == zipfile.ZIP_STORED:
            n_more = info.file_size - header_bytes - math.prod(shape) * dtype.itemsize
            if n_more and not dtype.hasobject:
                what = "holds more than its header says" if n_more > 0 else f"ends {-n_more} bytes early"
                raise SourceError(f"{name}: {what}; it is damaged")
            # The local header is 30 bytes, then name and extra field, whose lengths are its last 4 bytes.
            raw.seek(info.header_offset + 26)
            lengths = np.frombuffer(raw.read(4), "<u2")
            first_byte = info.header_offset + 30 + int(lengths.sum())
            stored = StoredSum(info.CRC, first_byte)
            return plain_array(name, file, first_byte + header_bytes, dtype, shape, order, stored)

    @contextmanager
    def opened() -> Iterator[tuple[Any, Callable[[], int]]]:
        with file.open("rb") as raw, zipfile.ZipFile(raw) as archive, archive.open(info) as stream:
            yield stream, raw.tell

    if order == "F" and len(shape) > 1:
        return _unpacked_columns(name, file, opened, header_bytes, dtype, shape)
    return packed_array(name, file, opened, header_bytes, dtype, shape)


def _unpacked_columns(
    name: str, file: Path, opened: OpenStream, header_bytes: int, dtype: np.dtype[Any], shape: tuple[int, ...]
) -> RowArray:
    """A packed array that lies column by column, which a table of pandas becomes.

    Its first row is complete only where its last column begins. So all of it is unpacked into a temporary file of
    the system, which nobody else sees and which is gone when the rows have been read, even after a kill.
    """
    n_bytes = math.prod(shape) * dtype.itemsize

    def blocks(block_rows: int, start_row: int) -> RowBlocks:
        free = shutil.disk_usage(tempfile.gettempdir()).free
        if n_bytes > free:
            raise SourceError(
                f"{name}: lies column by column and takes {n_bytes} bytes unpacked, but {tempfile.gettempdir()} has "
                f"{free} free; set TMPDIR to another disk, or save it with np.ascontiguousarray"
            )
        with reading(name), tempfile.TemporaryFile() as unpacked:
            with opened() as (stream, position):
                skip_bytes(stream, header_bytes, name)
                left = n_bytes
                while left:
                    piece = read_exactly(stream, min(left, _COPY_BYTES), name)
                    unpacked.write(piece)
                    left -= len(piece)
                require_end(stream, name)
                end_byte = position()
            unpacked.flush()
            for row in range(start_row, shape[0], block_rows):
                # Mapped anew for each block: pages of a map that was dropped do not stay in the process.
                columns = np.memmap(unpacked, dtype, "r", 0, shape, "F")
                yield np.array(columns[row : row + block_rows]), end_byte

    return RowArray(name, (file,), shape, dtype, blocks, is_costly=True)


def _open_idx(file: Path) -> RowArray:
    """The format of the MNIST family: two zeros, a type, the number of dimensions and each as big-endian int32."""
    name = str(file)
    with open_unpacked(file) as (stream, _):
        magic = read_exactly(stream, 4, name)
        if magic[:2] != b"\0\0" or magic[2] not in _IDX_TYPES or not magic[3]:
            raise SourceError(f"{name}: is no idx file, by its first bytes; give one, or rename it")
        sizes = np.frombuffer(read_exactly(stream, 4 * magic[3], name), ">i4")
    shape, dtype = tuple(int(size) for size in sizes), np.dtype(_IDX_TYPES[magic[2]])
    header_bytes = 4 + 4 * magic[3]
    if file.suffix.lower() == ".gz":
        return packed_array(name, file, lambda: open_unpacked(file), header_bytes, dtype, shape)
    return _alone(name, file, header_bytes, dtype, shape, "C")
