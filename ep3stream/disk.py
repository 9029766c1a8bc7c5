"""Files that are read whole, none of which a stranger can make endless: regular ones, of a size that is bounded.

What is done to the disk when a bundle or a small file is written, one operation a function.

`bundle.py` and `checkpoint.py` call them by these names, as `rename(...)`, and change nothing on the disk besides:
whoever replaces `OPERATIONS` in this module, by some that kill the process or find the disk full, sees every moment at
which that can happen.

Small files that are replaced all or nothing.

A run's lock: held by the kernel for as long as the process lives, so that none is ever left behind.

The file's content, JSON, only tells people who holds it; what counts is flock(2). A process that died, whatever has
become of its number, holds nothing. On file systems shared by several machines flock works between them too where the
mount allows it; where it is refused, so is the run.
"""

from __future__ import annotations

import errno
import fcntl
import json
import logging
import os
import shutil
import socket
import stat
from collections.abc import Iterable, Iterator
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from ep3stream.errors import DiskError, InputError


def read_small_file(path: Path, max_bytes: int) -> bytes:
    """The bytes of a file, `max_bytes` at most.

    Raises OSError where it has more, or is a pipe or a device, which could be waited for or read forever.
    """
    # Opening a pipe waits for its writer unless told not to; for a regular file the flag means nothing.
    descriptor = os.open(path, os.O_RDONLY | os.O_NONBLOCK | os.O_CLOEXEC)
    with open(descriptor, "rb") as file:
        found = os.fstat(descriptor)
        if not stat.S_ISREG(found.st_mode):
            raise OSError(f"{path.name} is not a regular file")
        if found.st_size > max_bytes:
            raise OSError(f"{path.name} is larger than {max_bytes} bytes")
        return file.read(found.st_size)


def no_link(name: str, flags: int) -> int:
    """The `opener` of files to write in a directory that may be a stranger's: OSError where the name is a link.

    Through one, what is meant for that directory would end up in any file of the user's.
    """
    return os.open(name, flags | os.O_NOFOLLOW | os.O_NONBLOCK, 0o666)


def require_own_file(path: Path) -> int:
    """The size of a regular file that is no link; raises OSError for anything else, which it does not open."""
    found = os.lstat(path)
    if not stat.S_ISREG(found.st_mode):
        raise OSError(f"{path.name} is a link, or not a regular file; put the file itself there")
    return found.st_size


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


def write_file(path: Path, data: bytes) -> None:
    """Replaces a file's content all or nothing; DiskError if the disk refuses."""
    partial = partial_path(path)
    try:
        write(partial, [data])
        sync(partial)
        rename(partial, path)
        sync(path.parent)
    except OSError as error:
        remove(partial)
        raise DiskError(f"{path} cannot be written ({error}); free space or correct permissions") from error


def write_json(path: Path, value: object) -> None:
    """Replaces a file by readable JSON."""
    write_file(path, json.dumps(value, indent=1, allow_nan=False).encode() + b"\n")


def partial_path(path: Path) -> Path:
    """Where what is to be `path` is written first."""
    return path.with_name(f".{path.name}.partial")


logger = logging.getLogger(__name__)

_MAX_BYTES = 1000


@dataclass(frozen=True, slots=True)
class Holder:
    """Who holds a lock, or held it when it died; is_alive is None where another machine may."""

    words: str
    is_alive: bool | None


def holder_of(path: Path) -> Holder | None:
    """Who wrote in the lock file `path` and has not let go of it; None where nobody does.

    The lock is only tried where a name stands in it: a fit that holds it is not disturbed by that, and one that is
    about to begin finds none.
    """
    try:
        with open(path, "rb", opener=no_link) as lock:
            words = _holder(lock)
            if not words:
                return None
            try:
                fcntl.flock(lock, fcntl.LOCK_SH | fcntl.LOCK_NB)
            except BlockingIOError:
                return Holder(words, True)
            is_here = f" on {socket.gethostname()} " in words
            return Holder(words, False if is_here else None)
    except OSError:
        return None


@contextmanager
def locked(path: Path, what: Path) -> Iterator[None]:
    """Holds the lock file `path` against a second fit of `what`; empties it and lets go in the end.

    Raises InputError, naming the holder, while another process (or another thread of this one) holds it. What a
    dead process left in it is told in the log.
    """
    try:
        lock = open(path, "a+b", opener=no_link)  # noqa: SIM115
    except OSError as error:
        raise InputError(f"{what} cannot be made or written ({error}); choose another RUN") from error
    with lock:
        _take(lock, what)
        try:
            yield
        finally:
            lock.truncate(0)


def _take(lock: BinaryIO, what: Path) -> None:
    try:
        fcntl.flock(lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        if holder := _holder(lock):
            logger.warning(
                "%s was held by %s, which ended without letting go; going on. (If that is another machine, still at "
                "work on a file system that does not lock between machines: stop one of the two.)",
                what,
                holder,
            )
        lock.truncate(0)
        now = datetime.now(UTC).isoformat(timespec="seconds")
        lock.write(json.dumps({"pid": os.getpid(), "host": socket.gethostname(), "since": now}).encode())
        lock.flush()
    except BlockingIOError:
        raise InputError(
            f"{what} is in use by {_holder(lock) or 'another process'}; wait for it or stop it, or use another RUN"
        ) from None
    except OSError as error:
        raise InputError(f"{what} cannot be locked ({error}); choose another RUN") from error


def _holder(lock: BinaryIO) -> str:
    """Who wrote the lock's content, in words; empty where it has none."""
    lock.seek(0)
    data = lock.read(_MAX_BYTES)
    try:
        content = json.loads(data)
        words = f"process {content['pid']} on {content['host']} since {content['since']}"
    except (ValueError, KeyError, TypeError, RecursionError):
        words = data.decode(errors="replace")
    return "".join(filter(str.isprintable, words))  # It may be a stranger's, and this goes to a terminal.


def fsync(path: Path) -> None:
    """Bring a file, or a directory's list of names, to the disk."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
