"""A run's lock: held by the kernel for as long as the process lives, so that none is ever left behind.

The file's content, JSON, only tells people who holds it; what counts is flock(2). A process that died, whatever has
become of its number, holds nothing. On file systems shared by several machines flock works between them too where the
mount allows it; where it is refused, so is the run.
"""

from __future__ import annotations

import fcntl
import json
import logging
import os
import socket
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from datetime import UTC, datetime
from pathlib import Path
from typing import BinaryIO

from ep3stream.data.small_files import no_link
from ep3stream.errors import InputError

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
