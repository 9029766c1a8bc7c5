"""What a storage format must offer: arrays written and read a segment at a time, and a manifest kept last.

Digests, statistics, cutting into segments and error messages live once, in store.py and writer.py; a backend
only moves bytes. It raises whatever fits (OSError, ValueError) and its caller adds store, split and segment.
"""

from __future__ import annotations

import math
import os
import shutil
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any, ClassVar, Protocol

import numpy as np
from numpy.typing import NDArray

from ep3stream.store.manifest import Codec, Manifest, SplitInfo

ARRAYS = ("x", "y")


@dataclass(frozen=True, slots=True)
class SplitLayout:
    """How the arrays of one split lie in storage: rows of a chunk (one segment), chunks of a Zarr file.

    rows[a] is the shape of one row of array a in "xy", dtypes[a] its type.
    """

    name: str
    chunk_rows: int
    chunks_per_file: int
    rows: Mapping[str, tuple[int, ...]]
    dtypes: Mapping[str, str]
    codec: Codec

    @classmethod
    def of(cls, manifest: Manifest, info: SplitInfo) -> SplitLayout:
        """The layout that a manifest promises. A split of a single short segment has a chunk as short."""
        return cls(
            name=info.name,
            chunk_rows=min(info.segment_rows, info.n_rows),
            chunks_per_file=info.segments_per_file,
            rows={"x": (manifest.n_features,), "y": y_row(manifest.task, manifest.n_outputs)},
            dtypes={"x": manifest.x_dtype, "y": manifest.y_dtype},
            codec=manifest.codec,
        )


def y_row(task: str, n_outputs: int) -> tuple[int, ...]:
    """Shape of one row of y: () for a class id, (c,) for c targets."""
    return (n_outputs,) if task == "regression" else ()


def row_bytes(manifest: Manifest) -> int:
    """Bytes of one row, x and y, as it lies in memory."""
    n_y = math.prod(y_row(manifest.task, manifest.n_outputs))
    x_bytes = manifest.n_features * np.dtype(manifest.x_dtype).itemsize
    return x_bytes + n_y * np.dtype(manifest.y_dtype).itemsize


@dataclass(slots=True)
class ReadTimes:
    """Seconds that reads took: to get the stored bytes, and to make checked rows of them (decode, digest)."""

    read_s: float = 0.0
    decode_s: float = 0.0


class WritingBackend(Protocol):
    """A store being made where nobody looks. `write` is called from several threads, for different rows.

    writes_in_order: `write` must be called in the order of the rows, or the same rows become other bytes.
    """

    writes_in_order: ClassVar[bool]

    def create_split(self, layout: SplitLayout) -> None:
        """Make the empty arrays of one split."""

    def write(self, split: str, start: int, x: NDArray[Any], y: NDArray[Any]) -> None:
        """Write rows start to start + len(x): one whole file of chunks, or the split's last rows."""

    def finish(self, manifest: bytes) -> None:
        """Bring all rows to the disk, then the manifest; nothing can be written after."""

    def close(self) -> None:
        """Let go of every handle; the store may be unfinished. May be called twice."""


class ReadingBackend(Protocol):
    """A finished store. `check` and `read` are called from several threads.

    n_readers: how many segments are worth reading at once.
    """

    n_readers: int

    def check(self, info: SplitInfo, index: int) -> None:
        """Raises unless what holds segment `index` is there and of the size that the manifest declares."""

    def read(self, info: SplitInfo, index: int, x: NDArray[Any], y: NDArray[Any]) -> float:
        """Fill x and y (C-contiguous, exactly the rows of a checked segment); the digest is not checked.

        Returns the seconds of it that were spent getting stored bytes, not decoding them.
        """

    def pieces(self, info: SplitInfo, index: int) -> tuple[str, ...]:
        """Names of the pieces of storage that hold segment `index`, for messages."""

    def inventory(self) -> dict[str, str]:
        """Piece -> what is wrong with it, as far as presence, sizes and metadata tell; no row is read."""


def remove(path: Path) -> bool:
    """Remove a file or a tree; whether there was one."""
    if not os.path.lexists(path):
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    return True
