"""Which reads are repeated after a failure or a time-out, and how the log tells of failures.

    what is read               repeated by                 when                            how often
    a segment from a disk      finish_read                 it fails, or does not come      3 attempts
    a segment from a bucket    finish_read                 it does not come                3 attempts
    a request to a bucket      ObjectFiles (object_files)  it fails, or does not come      for 30 s

A segment from a bucket that failed is not begun again: each of its requests has been repeated already. (To begin a
segment of many requests anew because one of them was refused would rarely succeed at a busy server.) Whoever reads for
`finish_read`, a thread of this process or a worker of a Dask cluster, reads once and repeats nothing.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from typing import TypeVar

from ep3stream.errors import DamagedDataError
from ep3stream.store.backend import SegmentReader
from ep3stream.store.files import ObjectUrl

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# The pauses behind attempts at a segment that failed. Behind one that hung there is none: its time-out was long enough.
PAUSES_S = (0.1, 0.5)
ATTEMPTS = 1 + len(PAUSES_S)


# Between two lines of the same kind: a disk that fails now and then must not fill the log.
_QUIET_S = 60.0


class Hung(Exception):
    """A read did not end in time; it may still write to the memory that it was given."""


def finish_read(
    reader: SegmentReader,
    segment: int,
    read: Callable[[], _T],
    begin_again: Callable[[], Callable[[], _T]],
) -> _T:
    """The result of `read`, which waits for a segment; where that fails or hangs, the result of another read.

    read: raises Hung when the segment has not come within the reader's `read_timeout_s`. begin_again: begins another
    read of the segment and returns the function that waits for it; it must not use the memory of the reads before,
    which may hang.
    Raises the last read's error; a DamagedDataError that names the segment in place of Hung.
    """
    with outage_of(reader.path).reading() as failed:
        for pause_s in PAUSES_S:
            try:
                return read()
            except Hung:
                seconds = reader.read_timeout_s
                _log.warning("segment %d did not come within %g s, trying again", segment, seconds)
            except (OSError, DamagedDataError) as error:
                is_passing = isinstance(error, OSError) or isinstance(error.__cause__, OSError)
                if not is_passing or isinstance(reader.path, ObjectUrl):
                    raise
                failed(error)
                time.sleep(pause_s)
            read = begin_again()
        try:
            return read()
        except Hung:
            raise DamagedDataError(
                f"{reader.path}: split {reader.info.name}, segment {segment} did not come within "
                f"{reader.read_timeout_s:g} s, {ATTEMPTS} times; see to its disk, server or cluster, or allow more by "
                "--read-timeout, and resume"
            ) from None


class Outage:
    """The failed reads of one store, counted by all threads of this process.

    The log tells of the first failure at once, and of the number of failures when no read fails any longer.
    """

    def __init__(self, place: object) -> None:
        self._place, self._lock = place, threading.Lock()
        self._n_failing = self._n_untold = 0
        self._began_at = self._ended_at = -math.inf

    @contextmanager
    def reading(self) -> Iterator[Callable[[Exception], None]]:
        """Encloses all attempts of one read; yields the function to call with each error after which it is repeated."""
        n_failed = 0

        def failed(error: Exception) -> None:
            nonlocal n_failed
            n_failed += 1
            self._count(error, is_first=n_failed == 1)

        is_over = False
        try:
            yield failed
            is_over = True
        finally:
            if n_failed:
                self._leave(is_over)

    def _count(self, error: Exception, is_first: bool) -> None:
        now = time.monotonic()
        with self._lock:
            self._n_failing += is_first
            self._n_untold += 1
            is_told = now - self._began_at >= _QUIET_S
            self._began_at = now if is_told else self._began_at
        if is_told:
            _log.warning("%s: a read failed, trying again: %s", self._place, error)

    def _leave(self, is_over: bool) -> None:
        """A read that had failed has succeeded (is_over), or has been given up, of which its error tells."""
        now = time.monotonic()
        with self._lock:
            self._n_failing -= 1
            n_failed = self._n_untold
            is_told = is_over and not self._n_failing and now - self._ended_at >= _QUIET_S
            if is_told:
                self._n_untold, self._ended_at = 0, now
        if is_told:
            _log.warning("%s: reads go on; %d had failed", self._place, n_failed)


_OUTAGES: dict[str, Outage] = {}
_LOCK = threading.Lock()


def outage_of(place: object) -> Outage:
    """The one Outage of a store, by its path or URL."""
    with _LOCK:
        return _OUTAGES.setdefault(str(place), Outage(place))
