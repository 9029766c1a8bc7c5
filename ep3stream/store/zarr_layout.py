"""The files of a store in Zarr v3: which must exist and how large each must be, and the rows of one chunk.

    SPLIT/ARRAY/c/NUMBER[/0]     one chunk (a segment), or a shard: its chunks, then its index

A chunk is the bytes of its rows, packed by Blosc or not, and their crc32c. The index of a shard has a pair (offset,
bytes) of 64-bit numbers, little-endian, for each of its chunks, both 2^64 - 1 for an absent chunk, and then the crc32c
of the pairs. Sizes are checked without reading a row.

Rows are not read by zarr itself: it takes twice the processor time (64 MiB in 16 chunks from memory: 45 ms for 27
without a codec, 82 ms for 40 with lz4), because it passes each chunk through an event loop and copies the rows, and it
fills in the rows of a missing file without an error. Nor does it know which files a group must have, or their sizes.
"""

from __future__ import annotations

import json
import stat
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import PurePosixPath
from typing import Any

import google_crc32c
import numcodecs
import numpy as np
from numpy.typing import NDArray

from ep3stream.store.backend import ARRAYS, SplitLayout
from ep3stream.store.files import StoreFiles
from ep3stream.store.manifest import MANIFEST_NAME, Manifest, SplitInfo

METADATA = "zarr.json"
CHECKSUM_BYTES = 4
_BLOSC_HEADER_BYTES = 16

# A zarr.json of our stores has some 1,500 bytes.
_MAX_METADATA_BYTES = 1 << 16

# The codecs of our stores.
_CODECS = ("bytes", "blosc", "crc32c", "sharding_indexed")
_ABSENT = np.iinfo(np.uint64).max

Bytes = NDArray[np.uint8]


@dataclass(frozen=True, slots=True)
class ChunkFile:
    """A file of an array, as the manifest promises it: `name` inside the store, with `n_chunks` chunks of `array`."""

    name: str
    layout: SplitLayout
    array: str
    n_chunks: int

    @classmethod
    def of(cls, manifest: Manifest, info: SplitInfo, array: str, number: int) -> ChunkFile:
        """File `number` of an array of a split."""
        layout, per_file = SplitLayout.of(manifest, info), info.segments_per_file
        name = "/".join([info.name, array, "c", str(number), *["0"] * len(layout.rows[array])])
        return cls(name, layout, array, min(per_file, info.n_segments - number * per_file))


def metadata_files(manifest: Manifest) -> Iterator[str]:
    """Yield the names of the manifest and of the zarr.json of every group and array."""
    yield from (MANIFEST_NAME, METADATA)
    for split in manifest.splits:
        yield f"{split}/{METADATA}"
        yield from (f"{split}/{name}/{METADATA}" for name in ARRAYS)


def unknown_keys(raw: Any, understood: Any) -> Iterator[str]:
    """Yield each key of the JSON `raw`, at any depth, that has a value but does not appear in `understood`."""
    if isinstance(raw, dict) and isinstance(understood, Mapping):
        for key, value in raw.items():
            if key in understood:
                yield from unknown_keys(value, understood[key])
            elif value is not None:
                yield key
    elif isinstance(raw, list) and isinstance(understood, list | tuple):
        for value, other in zip(raw, understood, strict=False):
            yield from unknown_keys(value, other)


def file_problems(files: StoreFiles, manifest: Manifest) -> dict[str, str]:
    """File -> problem, for files that are missing, of a wrong size, of a wrong kind, or foreign to the store."""
    found = dict(files.walk())
    chunks = {
        file.name: file
        for info in manifest.splits.values()
        for array in ARRAYS
        for number in range(-(-info.n_segments // info.segments_per_file))
        for file in [ChunkFile.of(manifest, info, array, number)]
    }
    expected = {*metadata_files(manifest), *chunks}
    folders = {str(folder) for name in expected for folder in PurePosixPath(name).parents}
    problems = dict.fromkeys(sorted(expected - set(found)), "is missing")
    for name, mode in sorted(found.items()):
        if name not in expected and name not in folders:
            problems[name] = "does not belong to the store"
        elif stat.S_ISREG(mode) and name in chunks:
            if problem := _chunk_problem(files, chunks[name]):
                problems[name] = problem
        elif stat.S_ISLNK(mode) or stat.S_ISREG(mode) != (name in expected):
            problems[name] = "is a link, or not the kind of file it must be; put the file itself there"
    return problems


def require_stored(files: StoreFiles, chunk: ChunkFile) -> None:
    """Raise FileNotFoundError or ValueError unless the file exists with the size that it must have.

    That size follows from the manifest, the header of a compressed chunk, and the index of a shard.
    """
    try:
        problem = _chunk_problem(files, chunk)
    except FileNotFoundError:  # Zarr would fill the rows in, silently.
        raise FileNotFoundError(f"{chunk.name} is missing") from None
    if problem:
        raise ValueError(f"{chunk.name} {problem}")


def read_metadata(files: StoreFiles, name: str) -> tuple[bytes, Any]:
    """The bytes of a zarr.json and the JSON in it; raises ValueError or OSError for one that no store of ours holds.

    Checked before zarr sees it: zarr reads a file of any size, and looks for an unknown codec in every package that is
    installed.
    """
    data = files.read_small(name, _MAX_METADATA_BYTES)
    content = json.loads(data)
    if isinstance(content, dict) and content.get("consolidated_metadata") is not None:
        raise ValueError(f"{name} has consolidated metadata, which are not ours")
    for codec in _codecs(content):
        if codec not in _CODECS:
            raise ValueError(f"{name} has the codec {codec!r:.80}, which is not one of {', '.join(_CODECS)}")
    return data, content


def _codecs(content: Any) -> Iterator[Any]:
    """Yield the names of the codecs of an array, and of those inside its shards."""
    if not isinstance(content, Mapping):
        return
    for key in ("codecs", "index_codecs", "storage_transformers"):
        codecs = content.get(key) or ()
        if not isinstance(codecs, list | tuple):
            raise ValueError(f"{key} is {codecs!r:.80}, which is not a list")
        for codec in codecs:
            yield codec.get("name") if isinstance(codec, Mapping) else codec
            if isinstance(codec, Mapping):
                yield from _codecs(codec.get("configuration"))


def _chunk_problem(files: StoreFiles, chunk: ChunkFile) -> str | None:
    name, layout, size = chunk.name, chunk.layout, files.size(chunk.name)
    n_decoded = layout.chunk_bytes(chunk.array)
    stored_bytes = n_decoded + CHECKSUM_BYTES if layout.codec == "none" else None
    if layout.chunks_per_file > 1:
        return _shard_problem(files, name, size, layout.chunks_per_file, chunk.n_chunks, stored_bytes)
    expected = _blosc_bytes(files, name, size, n_decoded) if stored_bytes is None else stored_bytes
    if expected is None:
        return f"has {size} bytes, which do not begin a compressed chunk"
    return None if size == expected else f"has {size} bytes; it must have {expected}"


def _blosc_bytes(files: StoreFiles, name: str, size: int, n_decoded: int) -> int | None:
    """The size of a file by the header of its compressed chunk; None where that is no header of our stores."""
    if size < _BLOSC_HEADER_BYTES:
        return None
    header = np.empty(_BLOSC_HEADER_BYTES, np.uint8)
    files.read_into(name, 0, header.data)
    told, _, n_encoded = header[4:].view("<u4").tolist()
    return n_encoded + CHECKSUM_BYTES if told == n_decoded else None


def _shard_problem(
    files: StoreFiles, name: str, size: int, n_places: int, n_chunks: int, stored_bytes: int | None
) -> str | None:
    index_bytes = 16 * n_places + CHECKSUM_BYTES
    if size < index_bytes:
        return f"has {size} bytes; its index alone has {index_bytes}"
    index, _ = read_index(files, name, size, n_places)
    present = index[(index != _ABSENT).any(axis=1)]
    absent = [str(chunk) for chunk in np.flatnonzero((index[:n_chunks] == _ABSENT).all(axis=1))]
    if absent:
        return f"lacks chunk {', '.join(absent[:9])}"
    if not _fills(present, size - index_bytes) or (
        stored_bytes is not None and bool((present[:, 1] != stored_bytes).any())
    ):
        return f"has {size} bytes, which its index does not account for"
    return None


def read_index(files: StoreFiles, name: str, size: int, n_places: int) -> tuple[NDArray[np.uint64], bytes]:
    """The offset and the bytes of each chunk of a shard, (n_places, 2), and the checksum behind them."""
    data = np.empty(16 * n_places + CHECKSUM_BYTES, np.uint8)
    files.read_into(name, size - len(data), data.data)
    return data[:-CHECKSUM_BYTES].view("<u8").reshape(n_places, 2), data[-CHECKSUM_BYTES:].tobytes()


def _fills(places: NDArray[np.uint64], n_bytes: int) -> bool:
    """Whether the chunks lie one behind the other, in any order, from the first byte to byte `n_bytes`."""
    ends = 0
    for offset, length in sorted(places.tolist()):  # Python's numbers: a damaged index overflows 64 bits.
        if offset != ends:
            return False
        ends += length
    return ends == n_bytes


class ChunkReader:
    """Reads chunks of one store's files. Keeps memory for the packed bytes of as many chunks as are read at once."""

    def __init__(self, files: StoreFiles) -> None:
        self._files = files
        self._free_buffers: list[Bytes] = []

    def read(self, file: str, layout: SplitLayout, array: str, place: int, rows: NDArray[Any]) -> float:
        """Fill `rows` with the first rows of chunk number `place` of `file`, whose size has been checked.

        Returns the seconds that it took to get the stored bytes. Raises ValueError where their checksum is wrong.
        """
        out = rows.reshape(-1).view(np.uint8)
        start, stored = self._place(file, layout, place)
        if layout.codec == "none":
            rest = np.empty(stored - len(out), np.uint8)  # The rows that fill the chunk up, and the checksum.
            read_s = self._read(file, start, out, rest)
            checksum = google_crc32c.extend(google_crc32c.value(out), rest[:-CHECKSUM_BYTES])
            _require_checksum(checksum, rest[-CHECKSUM_BYTES:].tobytes())
            return read_s
        with self._buffer(stored) as packed:
            read_s = self._read(file, start, packed)
            data, checksum_bytes = packed[:-CHECKSUM_BYTES], packed[-CHECKSUM_BYTES:].tobytes()
            _require_checksum(google_crc32c.value(data), checksum_bytes)
            # A last chunk has more rows than `out`, which Blosc can only unpack all at once.
            n_decoded = layout.chunk_bytes(array)
            whole = out if len(out) == n_decoded else np.empty(n_decoded, np.uint8)
            numcodecs.Blosc().decode(data, out=whole)
            if whole is not out:
                out[:] = whole[: len(out)]
        return read_s

    def _place(self, file: str, layout: SplitLayout, place: int) -> tuple[int, int]:
        """The first byte and the number of bytes of a chunk, with its checksum."""
        size = self._files.size(file)
        if layout.chunks_per_file == 1:
            return 0, size
        index, checksum = read_index(self._files, file, size, layout.chunks_per_file)
        _require_checksum(google_crc32c.value(index.reshape(-1).view(np.uint8)), checksum)
        start, stored = index[place].tolist()
        return start, stored

    def _read(self, file: str, start: int, *outs: Bytes) -> float:
        began = time.perf_counter()
        self._files.read_into(file, start, *(out.data for out in outs))
        return time.perf_counter() - began

    @contextmanager
    def _buffer(self, n_bytes: int) -> Iterator[Bytes]:
        # Used again, because the first touch of new memory takes as long as unpacking.
        buffer = self._free_buffers.pop() if self._free_buffers else np.empty(0, np.uint8)
        if len(buffer) < n_bytes:
            buffer = np.empty(n_bytes, np.uint8)
        try:
            yield buffer[:n_bytes]
        finally:
            self._free_buffers.append(buffer)


def _require_checksum(found: int, stored: bytes) -> None:
    if found.to_bytes(CHECKSUM_BYTES, "little") != stored:
        raise ValueError(f"its checksum is {found:08x}, not {int.from_bytes(stored, 'little'):08x} as stored")
