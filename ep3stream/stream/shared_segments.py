"""Rows handed from one process to another of the same machine, by letting it look into the memory they lie in.

A worker of a Dask cluster reads a segment into a file that has no name and no place on a disk (memfd, Linux), and
returns where to find it: /proc/PID/fd/NUMBER, which only processes of the same user can open. Sent through a socket
the rows would come at a fifth of the rate. Nothing is left behind, however a process ends.
"""

from __future__ import annotations

import mmap
import os
from collections.abc import Callable
from contextlib import suppress
from functools import lru_cache
from pathlib import Path
from typing import Any

import numpy as np
from numpy.typing import NDArray

Rows = tuple[NDArray[Any], NDArray[Any]]

# Shape and type of x and of y.
Layout = tuple[tuple[tuple[int, ...], str], tuple[tuple[int, ...], str]]

_ALIGNMENT = 64

# Shorter segments go through the socket as fast, and would take a file each.
_LEAST_BYTES = 1 << 20

# Blocks that a worker keeps for its next segments, the first touch of new memory taking as long as reading; and
# blocks of workers that the one who borrows keeps in sight.
_SPARE_BLOCKS = 4

_SEEN_BLOCKS = 16

_spare: list[_Block] = []


@lru_cache(maxsize=1)
def this_machine() -> str | None:
    """Equal in processes that can look into each other's memory; None where none can."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        return (
            f"{boot} {os.readlink('/proc/self/ns/pid')} {os.getuid()}"
            if hasattr(os, "memfd_create")
            else None
        )
    except OSError:
        return None


class _Block:
    """Memory in a nameless file."""

    def __init__(self, n_bytes: int) -> None:
        self.file = -1
        self.file = os.memfd_create("ep3stream-rows", os.MFD_CLOEXEC)
        os.ftruncate(self.file, n_bytes)
        self.inode = os.fstat(self.file).st_ino
        self.memory = mmap.mmap(self.file, n_bytes)

    def __del__(self) -> None:
        if self.file >= 0:
            os.close(self.file)


class SharedSegment:
    """Where the x and y of a segment lie, and what their reader `told` of them.

    While this object lives in the process that made it, the rows stay as they are. Elsewhere it is only their
    address.
    """

    def __init__(
        self, address: tuple[int, int, int], layout: Layout, told: Any, block: _Block | None = None
    ) -> None:
        self._address = address  # process, file, inode
        self._layout, self.told, self._block = layout, told, block

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedSegment, (self._address, self._layout, self.told)

    def __del__(self) -> None:
        if self._block is not None and len(_spare) < _SPARE_BLOCKS:
            _spare.append(self._block)

    @classmethod
    def filled(cls, layout: Layout, fill: Callable[..., Any]) -> SharedSegment | None:
        """As `fill(x, y)` has filled them; None where they are too few, or the system has no more such memory."""
        n_bytes = _starts(layout)[-1]
        block = _block(n_bytes) if n_bytes >= _LEAST_BYTES else None
        if block is None:
            return None
        told = fill(*_arrays(block.memory, layout))
        return cls((os.getpid(), block.file, block.inode), layout, told, block)

    def rows(self, seen: dict[int, mmap.mmap]) -> Rows:
        """x and y in the lender's memory; `seen` remembers that memory from one call to the next.

        Raises OSError where the lender is gone, or does not let this process look.
        """
        if self._block is not None:
            return _arrays(self._block.memory, self._layout)
        process, file, inode = self._address
        if inode not in seen:
            while len(seen) >= _SEEN_BLOCKS:
                del seen[next(iter(seen))]
            seen[inode] = _mapped(process, file, inode)
        return _arrays(seen[inode], self._layout)


def _block(n_bytes: int) -> _Block | None:
    for block in list(_spare):
        if len(block.memory) >= n_bytes:
            with suppress(ValueError):  # Another thread was faster.
                _spare.remove(block)
                return block
    try:
        return _Block(n_bytes)
    except OSError:
        return None


def _mapped(process: int, file: int, inode: int) -> mmap.mmap:
    descriptor = os.open(f"/proc/{process}/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_ino != inode:
            raise OSError(f"file {file} of process {process} is another one by now")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _starts(layout: Layout) -> list[int]:
    """Of each array, and the end of the last."""
    starts = [0]
    for shape, dtype in layout:
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        starts.append(-(-(starts[-1] + n_bytes) // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _arrays(memory: mmap.mmap, layout: Layout) -> Rows:
    (x_shape, x_dtype), (y_shape, y_dtype) = layout
    starts = _starts(layout)
    x = np.ndarray(x_shape, x_dtype, memory, starts[0])
    return x, np.ndarray(y_shape, y_dtype, memory, starts[1])
