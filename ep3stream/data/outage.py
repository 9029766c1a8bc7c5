"""Reads that fail and are tried again, told in a line for all readers of a place and not in one each."""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager

_log = logging.getLogger(__name__)

# Between two lines of the same kind: a disk that fails now and then must not fill the log.
_QUIET_S = 60.0


class Outage:
    """The failed reads of one place, counted by all threads of this process.

    The first is told at once, the others as a number when no read fails any longer.
    """

    def __init__(self, place: object) -> None:
        self._place, self._lock = place, threading.Lock()
        self._failing = self._untold = 0
        self._began_at = self._ended_at = -math.inf

    @contextmanager
    def reading(self) -> Iterator[Callable[[Exception], None]]:
        """Around all attempts of one read; gives what is to be called with the error of each that is to be repeated."""
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
            self._failing += is_first
            self._untold += 1
            is_told = now - self._began_at >= _QUIET_S
            self._began_at = now if is_told else self._began_at
        if is_told:
            _log.warning("%s: a read failed, trying again: %s", self._place, error)

    def _leave(self, is_over: bool) -> None:
        """A read that had failed succeeds, or is given up, which its error tells."""
        now = time.monotonic()
        with self._lock:
            self._failing -= 1
            n_failed = self._untold
            is_told = is_over and not self._failing and now - self._ended_at >= _QUIET_S
            if is_told:
                self._untold, self._ended_at = 0, now
        if is_told:
            _log.warning("%s: reads go on; %d had failed", self._place, n_failed)


_OUTAGES: dict[str, Outage] = {}
_LOCK = threading.Lock()


def outage_of(place: object) -> Outage:
    """That of a store, by its path or URL."""
    with _LOCK:
        return _OUTAGES.setdefault(str(place), Outage(place))
