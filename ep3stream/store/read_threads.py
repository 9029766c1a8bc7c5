"""A few threads that read, of which one that hangs is left behind.

Nothing can stop a thread that waits for a dead disk or server. So it is no longer waited for, another thread takes its
place, and the memory that it may yet write to must not be used again. Threads of `concurrent.futures` would not do:
the interpreter waits for them at its end, and a pool whose threads hang does no more work.
"""

from __future__ import annotations

import logging
import math
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Future, InvalidStateError, wait
from contextlib import suppress
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from ep3stream.store.retries import Hung

_T = TypeVar("_T")
_log = logging.getLogger(__name__)

# How long to wait, in all, for reads that are under way when nobody wants them any more.
_STOP_S = 10.0


class Read(Generic[_T]):
    """One piece of work for the threads, and its result."""

    def __init__(self, threads: ReadThreads, work: Callable[[], _T]) -> None:
        self._threads, self._work = threads, work
        self._future: Future[_T] = Future()
        self._began_at: float | None = None

    def run(self) -> None:
        """Do the work, in the calling thread, unless it was cancelled."""
        if not self._future.set_running_or_notify_cancel():
            return
        self._began_at = time.monotonic()
        # Where the read has been given up, its future has ended already.
        with suppress(InvalidStateError):
            try:
                self._future.set_result(self._work())
            except InvalidStateError:
                raise
            except BaseException as error:
                self._future.set_exception(error)

    def cancel(self) -> None:
        """Keep the work from beginning; where it has begun, keep `result` from waiting for it."""
        if self._future.cancel():
            self._future.set_running_or_notify_cancel()  # Wakes whoever waits in `result`.
        else:
            with suppress(InvalidStateError):
                self._future.set_exception(CancelledError())

    def result(self) -> _T:
        """Wait for the work and return its result.

        Raises what the work raised, Hung once it has run for the threads' time-out, CancelledError after `cancel`.

        """
        while not self._future.done():
            left_s = self._threads.leave_hung()
            if self.left_s() <= 0:
                raise Hung
            wait([self._future], None if math.isinf(left_s) else left_s)
        return self._future.result()

    def left_s(self) -> float:
        """Seconds until the work has run for the threads' time-out; the whole time-out where it does not run."""
        timeout_s = self._threads.timeout_s
        if self._began_at is None or self._future.done():
            return timeout_s
        return self._began_at + timeout_s - time.monotonic()


class ReadThreads:
    """`n_threads` threads that do the submitted work, in order. A context manager.

    timeout_s: how long one piece of work may run before `Read.result` raises Hung; infinity for ever.
    """

    def __init__(self, n_threads: int, timeout_s: float, name: str) -> None:
        self.timeout_s = timeout_s
        self._n_threads, self._name = n_threads, name
        self._work: SimpleQueue[Read[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._is_stopped = False
        self._threads: dict[threading.Thread, Read[Any] | None] = {}

    def __enter__(self) -> ReadThreads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, work: Callable[[], _T]) -> Read[_T]:
        """Have one of the threads do the work, after all work submitted before has begun."""
        read = Read(self, work)
        with self._lock:
            if self._is_stopped:
                raise RuntimeError("no reads begin after stop")
            self._work.put(read)
            if len(self._threads) < self._n_threads:
                self._start()
        return read

    def leave_hung(self) -> float:
        """Forget the threads whose read has run out of time, and have others do the remaining work.

        All of them, whoever asks: a read that has not begun may wait for a thread behind reads that hang and for which
        nobody waits. Returns the seconds until the next one runs out of time, at most the time-out.
        """
        left_s = self.timeout_s
        with self._lock:
            for thread, read in list(self._threads.items()):
                if read is not None and read.left_s() <= 0:
                    del self._threads[thread]
                    if not self._is_stopped:
                        self._start()
                elif read is not None:
                    left_s = min(left_s, read.left_s())
        return max(left_s, 0.0)

    def stop(self) -> None:
        """Cancel the work that has not begun and wait for the rest, ten seconds at most; no work begins afterwards."""
        with self._lock:
            self._is_stopped = True
            threads = list(self._threads)
            while not self._work.empty():
                if (read := self._work.get_nowait()) is not None:
                    read.cancel()
            for _ in threads:
                self._work.put(None)
        deadline = time.monotonic() + _STOP_S
        for thread in threads:
            thread.join(max(0.0, deadline - time.monotonic()))
        with self._lock:
            hung = [read for thread, read in self._threads.items() if thread.is_alive() and read is not None]
            for read in hung:
                read.cancel()
        if hung:
            _log.warning("%d of the reads do not end: their threads are left behind", len(hung))

    def _start(self) -> None:
        # Daemons: a read that hangs would keep the process from ending.
        thread = threading.Thread(target=self._run, name=self._name, daemon=True)
        thread.start()
        self._threads[thread] = None

    def _run(self) -> None:
        me = threading.current_thread()
        while (read := self._work.get()) is not None:
            with self._lock:
                self._threads[me] = read
            read.run()
            with self._lock:
                if me not in self._threads:
                    return  # Left behind, and replaced.
                self._threads[me] = None
            del read  # Or this thread would hold the read's result until the next work comes.
