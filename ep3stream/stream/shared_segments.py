"""Segments handed from one process to another of the same machine, through memory that both of them see.

A worker of a Dask cluster reads a segment into a file that has no name and no place on a disk (memfd, Linux), and
returns the address of that memory: /proc/PID/fd/NUMBER, which only processes of the same user can open. Rows that Dask
sends through a socket come at a half to a fifth of the rate, for 1.4 times the processor time of both processes (1.3 s
for .93 s, 400 MB in segments of 8 MiB). Nothing is left behind, however a process ends.
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

from ep3stream.store.backend import SegmentLayout

_ALIGNMENT = 64

# Shorter segments go through the socket as fast, and would take a file each.
_LEAST_BYTES = 1 << 20

# Blocks that a worker keeps for its next segments: the first touch of new memory takes as long as reading.
_FREE_BLOCKS = 4

# Blocks of workers that a client keeps mapped.
_MAPPED_BLOCKS = 16

_free_blocks: list[_Block] = []


@lru_cache(maxsize=1)
def this_machine() -> str | None:
    """A text that is equal in processes that can see each other's memory; None where this process cannot share any."""
    try:
        boot = Path("/proc/sys/kernel/random/boot_id").read_text().strip()
        namespace = os.readlink("/proc/self/ns/pid")
    except OSError:
        return None
    return f"{boot} {namespace} {os.getuid()}" if hasattr(os, "memfd_create") else None


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
    """The address of the x and y of a segment in the memory of the process that read it.

    The rows stay as they are while this object lives in the process that made it. Pickled to another process, it is
    only an address. fill_result: what the function that filled the memory returned.
    """

    def __init__(
        self,
        address: tuple[int, int, int],
        layout: SegmentLayout,
        fill_result: Any,
        block: _Block | None = None,
    ) -> None:
        self._address = address  # process, file, inode
        self._layout, self.fill_result, self._block = layout, fill_result, block

    def __reduce__(self) -> tuple[Any, ...]:
        return SharedSegment, (self._address, self._layout, self.fill_result)

    def __del__(self) -> None:
        if self._block is not None and len(_free_blocks) < _FREE_BLOCKS:
            _free_blocks.append(self._block)

    @classmethod
    def filled(cls, layout: SegmentLayout, fill: Callable[..., Any]) -> SharedSegment | None:
        """Memory of the layout, filled by `fill(x, y)`.

        Returns None for a segment below 1 MiB, and where the system has no more such memory.
        """
        n_bytes = _starts(layout)[-1]
        block = _block(n_bytes) if n_bytes >= _LEAST_BYTES else None
        if block is None:
            return None
        fill_result = fill(*_arrays(block.memory, layout))
        return cls((os.getpid(), block.file, block.inode), layout, fill_result, block)

    def rows(self, mapped: dict[int, mmap.mmap]) -> tuple[NDArray[Any], NDArray[Any]]:
        """The x and y in the memory of the process that made this object.

        mapped: keeps that memory mapped from one call to the next. Raises OSError where the process is gone, or may
        not be looked into.
        """
        if self._block is not None:
            return _arrays(self._block.memory, self._layout)
        process, file, inode = self._address
        if inode not in mapped:
            while len(mapped) >= _MAPPED_BLOCKS:
                del mapped[next(iter(mapped))]
            mapped[inode] = _map_memory(process, file, inode)
        return _arrays(mapped[inode], self._layout)


def _block(n_bytes: int) -> _Block | None:
    """A free block of at least so many bytes, or a new one; None where the system gives none."""
    for block in list(_free_blocks):
        if len(block.memory) >= n_bytes:
            with suppress(ValueError):  # Another thread was faster.
                _free_blocks.remove(block)
                return block
    try:
        return _Block(n_bytes)
    except OSError:
        return None


def _map_memory(process: int, file: int, inode: int) -> mmap.mmap:
    descriptor = os.open(f"/proc/{process}/fd/{file}", os.O_RDONLY | os.O_CLOEXEC)
    try:
        if os.fstat(descriptor).st_ino != inode:
            raise OSError(f"file {file} of process {process} is another one by now")
        return mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ)
    finally:
        os.close(descriptor)


def _starts(layout: SegmentLayout) -> list[int]:
    """The first byte of each array, and the end of the last one."""
    starts = [0]
    for shape, dtype in layout:
        n_bytes = int(np.prod(shape, dtype=np.int64)) * np.dtype(dtype).itemsize
        starts.append(-(-(starts[-1] + n_bytes) // _ALIGNMENT) * _ALIGNMENT)
    return starts


def _arrays(memory: mmap.mmap, layout: SegmentLayout) -> tuple[NDArray[Any], NDArray[Any]]:
    (x_shape, x_dtype), (y_shape, y_dtype) = layout
    starts = _starts(layout)
    x = np.ndarray(x_shape, x_dtype, memory, starts[0])
    return x, np.ndarray(y_shape, y_dtype, memory, starts[1])
