"""What a storage format must offer: arrays written and read a segment at a time, and a manifest written last.

A backend only moves bytes. Digests, statistics, the cut into segments and the error messages are the same for all
formats, and lie in reader.py and conversion/writer.py. A backend raises any error that fits (OSError, ValueError); its
caller adds the store, the split and the segment.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ep3stream.store.files import Location
from ep3stream.store.manifest import Codec, Manifest, SplitInfo

ARRAYS = ("x", "y")

# Shape and type of the x and of the y of a segment.
SegmentLayout = tuple[tuple[tuple[int, ...], str], tuple[tuple[int, ...], str]]


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """How the arrays of one split lie in storage.

    chunk_rows: rows of a chunk, which holds one segment. chunks_per_file: more than 1 for a Zarr shard. rows[a]: the
    shape of one row of array `a` of ARRAYS; dtypes[a]: its type.
    """

    name: str
    chunk_rows: int
    chunks_per_file: int
    rows: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    codec: Codec

    @classmethod
    def of(cls, manifest: Manifest, info: SplitInfo) -> SplitLayout:
        """The layout that a manifest promises. A split with a single, shorter segment has a chunk of its rows."""
        return cls(
            name=info.name,
            chunk_rows=min(info.segment_rows, info.n_rows),
            chunks_per_file=info.segments_per_file,
            rows={"x": (manifest.n_features,), "y": y_row(manifest.task, manifest.n_outputs)},
            dtypes={"x": manifest.x_dtype, "y": manifest.y_dtype},
            codec=manifest.codec,
        )

    def chunk_bytes(self, array: str) -> int:
        """The bytes of a decoded chunk. The last chunk of a split is filled up to the length of the others."""
        n_values = self.chunk_rows * math.prod(self.rows[array])
        return n_values * np.dtype(self.dtypes[array]).itemsize


def y_row(task: str, n_outputs: int) -> tuple[int, ...]:
    """The shape of one row of y: () for a class id, (c,) for c targets."""
    return (n_outputs,) if task == "regression" else ()


def row_bytes(manifest: Manifest) -> int:
    """The bytes of one row, x and y, in memory."""
    n_y = math.prod(y_row(manifest.task, manifest.n_outputs))
    x_bytes = manifest.n_features * np.dtype(manifest.x_dtype).itemsize
    return x_bytes + n_y * np.dtype(manifest.y_dtype).itemsize


@dataclass(slots=True)
class ReadTimes:
    """Seconds that reads took: to get the stored bytes, and to decode these and check the digest."""

    read_s: float = 0.0
    decode_s: float = 0.0


class WritingBackend(Protocol):
    """A store that is being written. `write` is called from several threads, for different rows.

    writes_in_order: whether `write` must be called in the order of the rows for the same rows to become the same bytes.
    """

    writes_in_order: ClassVar[bool]

    def create_split(self, layout: SplitLayout) -> None:
        """Make the empty arrays of one split."""

    def write(self, split: str, start: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Write rows start to start + len(x): one whole file of chunks, or the last rows of the split."""

    def finish(self, manifest: bytes) -> None:
        """Sync all rows to the disk, then write the manifest and sync it; nothing can be written afterwards."""

    def close(self) -> None:
        """Close every open file; the store may be unfinished. May be called twice."""


class ReadingBackend(Protocol):
    """A finished store. `check` and `read` are called from several threads.

    n_readers: how many segments are worth reading at once.
    """

    n_readers: int

    def check(self, info: SplitInfo, index: int) -> None:
        """Raise unless the files or chunks of segment `index` exist with the sizes that the manifest declares."""

    def read(self, info: SplitInfo, index: int, x: NDArray[Any], y: NDArray[Any]) -> float:
        """Fill x and y, C-contiguous with exactly the rows of a checked segment; the digest is not checked.

        Returns the seconds that it took to get the stored bytes, without decoding them.
        """

    def pieces(self, info: SplitInfo, index: int) -> tuple[str, ...]:
        """The names of the pieces of storage (files or chunks) that hold segment `index`, for messages."""

    def inventory(self) -> dict[str, str]:
        """Piece of storage -> its problem, as far as presence, sizes and metadata tell; no row is read."""


class SegmentReader(Protocol):
    """The segments of one split, checked; `SplitReader` is one."""

    @property
    def path(self) -> Location:
        """The path or URL of the store."""

    @property
    def info(self) -> SplitInfo:
        """The manifest's entry of the split."""

    @property
    def read_timeout_s(self) -> float:
        """How long to wait for a segment; infinity for ever."""

    def read_segment(self, index: int) -> tuple[NDArray[Any], NDArray[Any]]:
        """The x and y of segment `index`."""
