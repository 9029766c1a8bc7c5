"""Files that are read whole, none of which a stranger can make endless: regular ones, of a size that is bounded."""

from __future__ import annotations

import os
import stat
from pathlib import Path


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
