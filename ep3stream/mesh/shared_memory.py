"""Memory that the ranks of one machine share: a file that each of them maps."""

from __future__ import annotations

import os
import tempfile
from pathlib import Path

from ep3stream.errors import DiskError


def new_map(n_bytes: int) -> Path:
    """A file of this size in memory, or on the disk where there is no room there.

    All of it is reserved now: a write to a map beyond what there is room for would end the process by SIGBUS.
    """
    for directory in ("/dev/shm", tempfile.gettempdir()):
        if not os.access(directory, os.W_OK):
            continue
        handle, name = tempfile.mkstemp(prefix="ep3stream-", dir=directory)
        try:
            os.posix_fallocate(handle, 0, n_bytes)
        except OSError:
            Path(name).unlink()
        else:
            return Path(name)
        finally:
            os.close(handle)
    raise DiskError(
        f"there is no room for {n_bytes / 1e6:.1f} MB that the ranks of a machine share, neither in /dev/shm nor in "
        f"{tempfile.gettempdir()}; free some, or set TMPDIR"
    )
