"""What the package does to a disk, apart from the rows of stores: read small files, replace files, hold a lock.

Reading. A run or a store may come from somebody else. Small files are read only if they are regular files of
bounded size: a pipe, a device or a huge file would keep the reader waiting or fill its memory. Files are written
without following links: through a link, the content would end up in any other file of the user.

Replacing. `replacing` is the package's only way to replace a file all or nothing. It, the bundles and the checkpoints
change the disk by the functions named in `OPERATIONS` and by nothing else, and call them as attributes of this
module. Tests replace those functions by ones that kill the process or report a full disk, and so meet every moment
at which that can happen.

Locking. The kernel holds a lock, flock(2), as long as the process lives, so that a killed process leaves none behind.
The content of the lock file only tells people who holds the lock. The library `filelock` would neither write the
holder into the file nor let `status` ask for the holder without taking the lock, and so does not replace `take_lock`.
"""

from __future__ import annotations

import errno
import fcntl
import json
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import ExitStack, contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from ep3stream.errors import DiskError

OPERATIONS = ("require_space", "make_directory", "write", "sync", "rename", "remove")
_SPARE_BYTES = 1 << 20  # For manifests, directories and what the file system itself needs.
_MAX_LOCK_BYTES = 1000


# Reading.


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """Returns the bytes of a regular file.

    Raises OSError if the file has more than `max_bytes`, or is a pipe or a device, from which a read might never end.
    """
    # Opening a pipe waits for its writer unless O_NONBLOCK is given; for a regular file the flag means nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if found.st_size > max_bytes:
            raise OSError(f"{path.name} is larger than {max_bytes} bytes")
        return file.read(found.st_size)


def require_own_file(path: Path) -> int:
    """Returns the size of a regular file in bytes; raises OSError for a link or anything else. Opens nothing."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path.name} is a link, or not a regular file; put the file itself there")
    return found.st_size


def no_link(name: str, flags: int) -> int:
    """The `opener` for `open` of a file to write: raises OSError if the name is a link."""
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


# The operations of `OPERATIONS`.


def require_space(directory: Path, n_bytes: int) -> None:
    """Raises OSError unless the disk has `n_bytes` for this user, and 1 MiB more."""
    free = shutil.disk_usage(directory).free
    if free < n_bytes + _SPARE_BYTES:
        raise OSError(errno.ENOSPC, f"{os.strerror(errno.ENOSPC)}: {free / 1e6:.1f} MB are free")


def make_directory(path: Path) -> None:
    """Makes a directory and those above it; does nothing if it is there."""
    path.mkdir(parents=True, exist_ok=True)


def write(path: Path, pieces: Iterable[bytes | memoryview]) -> None:
    """Makes the file, or empties it, and writes the pieces one after the other."""
    with open(path, "wb", opener=no_link) as file:
        for piece in pieces:
            file.write(piece)


def sync(path: Path) -> None:
    """Waits until a file's bytes, or a directory's list of names, are on the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def rename(source: Path, target: Path) -> None:
    """Renames; replaces a file named `target`. Raises OSError if `target` is a directory that is not empty."""
    source.replace(target)


def remove(path: Path) -> None:
    """Removes a file or a tree as far as possible; raises nothing. Use it where nothing depends on success."""
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path, ignore_errors=True)
    else:
        with suppress(OSError):
            path.unlink()


def delete(path: Path) -> bool:
    """Removes a file or a tree; returns whether there was one. Raises OSError, unlike `remove`."""
    if not os.path.lexists(path):
        return False
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink()
    return True


# Replacing files.


def partial_path(path: Path) -> Path:
    """Returns where to write what is to become `path`: `.NAME.partial` beside it."""
    return path.with_name(f".{path.name}.partial")


@contextmanager
def replacing(path: Path, is_shared: bool = False, is_synced: bool = True) -> Iterator[Path]:
    """Yields another path; the file or directory that the block writes there becomes `path` when the block ends.

    All bytes are on the disk before the rename, and the rename is before the return: after a kill or a power failure,
    `path` is the old one or the new one and never a part of one. If the block or the disk raises, what the block
    wrote is removed and `path` stays as it was.
    is_shared: other processes may replace `path` at the same time; each of them then writes to a path of its own.
    is_synced: whether to wait for the disk. Otherwise the promise holds for a kill but not for a power failure.
    Raises OSError.
    """
    partial = path.with_name(f".{path.name}.{os.getpid()}") if is_shared else partial_path(path)
    try:
        yield partial
        if is_synced:
            for written in (*partial.rglob("*"), partial):
                sync(written)
        rename(partial, path)
        if is_synced:
            sync(path.parent)
    except BaseException:
        remove(partial)
        raise


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file's content all or nothing; raises DiskError if the disk refuses."""
    try:
        with replacing(path) as partial:
            write(partial, [data])
    except OSError as error:
        raise DiskError(f"{path} cannot be written ({error}); free space or correct permissions") from error


def write_json(path: Path, value: object) -> None:
    """Replaces a file by `value` as indented JSON; raises DiskError."""
    write_file(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


# Locking.


class LockHeldError(Exception):
    """Another process, or another thread of this one, has the lock; `holder` says which, in words."""

    def __init__(self, holder: str) -> None:
        super().__init__(holder)
        self.holder = holder


class Lock:
    """A lock that this process holds until the `with` block ends.

    left_by: in words, the process that held the lock before and ended without letting go of it; empty if none did.
    """

    def __init__(self, file: BinaryIO, left_by: str) -> None:
        self._file = file
        self.left_by = left_by

    def __enter__(self) -> Lock:
        return self

    def __exit__(self, *_: object) -> None:
        with self._file:  # Closing the file gives the lock back.
            self._file.truncate(0)


def take_lock(path: Path) -> Lock:
    """Locks the file `path` and writes into it, as JSON, which process holds it; makes file and directory if needed.

    Returns at once. Raises LockHeldError if the lock is held, and OSError if the file cannot be made or locked (some
    network file systems refuse flock). Across machines the lock works if the file system shares locks between them.
    """
    while True:
        make_directory(path.parent)
        with ExitStack() as closing:
            file = closing.enter_context(open(path, "a+b", opener=no_link))
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            except BlockingIOError:
                raise LockHeldError(_holder(file) or "another process") from None
            # The holder before may have removed the file since it was opened here. A lock on a removed file protects
            # nothing: a third process can make and lock a new file of the same name.
            if os.fstat(file.fileno()).st_nlink == 0:
                continue
            left_by = _holder(file)
            now = datetime.now(UTC).isoformat(timespec="seconds")
            file.truncate(0)
            file.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode())
            file.flush()
            closing.pop_all()
            return Lock(file, left_by)


@dataclass(frozen=True, slots=True)
class Holder:
    """The process that holds a lock, or held it when it died, in words.

    is_alive: whether the process lives; None if it ran on another machine and this one cannot tell.
    """

    words: str
    is_alive: bool | None


def holder_of(path: Path) -> Holder | None:
    """Returns who is named in the lock file `path`; None if nobody is, or the file cannot be read.

    The lock is tried only if the file names a holder, and only as a shared lock, for a moment: a process that holds
    the lock is not disturbed, and one about to take it finds the lock free.
    """
    try:
        with open(path, "rb", opener=no_link) as file:
            words = _holder(file)
            if not words:
                return None
            try:
                fcntl.flock(file, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Holder(words, True)
            is_here = f" on {socket.gethostname()} " in words
            return Holder(words, False if is_here else None)
    except OSError:
        return None


def _holder(file: BinaryIO) -> str:
    """Returns who wrote the content of a lock file, in words; empty if the file is empty."""
    file.seek(0)
    data = file.read(_MAX_LOCK_BYTES)
    try:
        content = json.loads(data)
        words = f"process {content['pid']} on {content['host']} since {content['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        words = data.decode(errors="replace")
    # The content may come from anywhere, and the words go to a terminal.
    return "".join(filter(str.isprintable, words))
