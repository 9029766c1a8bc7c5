"""The files of a store by name, whatever keeps them: a directory here, a bucket in object_files.py."""

from __future__ import annotations

import os
from collections.abc import Iterator
from pathlib import Path
from typing import ClassVar, Protocol

from ep3stream.data.small_files import read_small_file, require_own_file


class StoreFiles(Protocol):
    """Files to read; every method may be called from several threads.

    Names have slashes between their parts. Where there is no such file, FileNotFoundError is raised.
    n_readers: how many segments are worth reading at once.
    """

    n_readers: ClassVar[int]

    def size(self, name: str) -> int:
        """Bytes of a file."""

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        """Fill `outs`, one after the other, with the file's bytes from `start` on.

        Raises EOFError or OSError where it ends sooner.
        """

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """The whole file; OSError where it has more than `max_bytes`."""

    def walk(self) -> Iterator[tuple[str, int]]:
        """Name and mode (as of stat) of every file, link and empty directory; no link is followed."""


class LocalFiles:
    """The files below a directory, which may be reached by a link; inside it a link is a ValueError."""

    n_readers: ClassVar[int] = 2

    def __init__(self, root: Path) -> None:
        self._root = root

    def size(self, name: str) -> int:
        """Of a regular file."""
        return require_own_file(self._inside(name))

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        """Straight into `outs`."""
        with self._inside(name).open("rb", buffering=0) as file:
            file.seek(start)
            for out in outs:
                rest = out
                while rest:  # One call reads at most 2 GiB.
                    n_read = file.readinto(rest)
                    if not n_read:
                        raise EOFError(f"{name} ends {len(rest)} bytes too early")
                    rest = rest[n_read:]

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """Neither from a pipe nor from a device."""
        return read_small_file(self._inside(name), max_bytes)

    def walk(self) -> Iterator[tuple[str, int]]:
        """In no order."""
        for folder, folders, files in os.walk(self._root, onerror=_raise):
            names = [*files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]
            for name in names:
                file = Path(folder, name)
                yield file.relative_to(self._root).as_posix(), file.lstat().st_mode
            if not folders and not files:
                yield Path(folder).relative_to(self._root).as_posix(), os.lstat(folder).st_mode

    def _inside(self, name: str) -> Path:
        path = str(self._root)
        for part in name.split("/"):
            path = os.path.join(path, part)
            if os.path.islink(path):
                raise ValueError(f"{name} is a link or lies behind one; put the file itself in the store")
        return Path(path)


def _raise(error: OSError) -> None:
    raise error
