"""What is done to the disk when a bundle or a small file is written, one operation a function.

`bundle.py` and `checkpoint.py` call them by these names, as `disk.rename(...)`, and change nothing on the disk besides:
whoever replaces `OPERATIONS` in this module, by some that kill the process or find the disk full, sees every moment at
which that can happen.
"""

from __future__ import annotations

import errno
import os
import shutil
from collections.abc import Iterable
from contextlib import suppress
from pathlib import Path

from ep3stream.data.backend import fsync
from ep3stream.data.small_files import no_link

OPERATIONS = ("require_space", "make_directory", "write", "sync", "rename", "remove")

_SPARE_BYTES = 1 << 20  # Manifests, directories and the file system's own.


def require_space(directory: Path, n_bytes: int) -> None:
    """Raises OSError unless the disk has `n_bytes` for this user, and a little more."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.1f} MB are free")


def make_directory(path: Path) -> None:
    """With those above it, unless it is there."""
    path.mkdir(parents=True, exist_ok=True)


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Makes the file, or empties it, and fills it."""
    with open(path, "wb", opener=no_link) as file:
        for piece in pieces:
            file.write(piece)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's names, are on the disk."""
    fsync(path)


def rename(source: Path, target: Path) -> None:
    """Over a file of that name, if any; raises OSError for a directory that is not empty."""
    source.replace(target)


def remove(path: Path) -> None:
    """A file or a tree, as far as it can be removed; nothing depends on that."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()
