"""A few threads that read, of which one that hangs is left behind.

Nothing can stop a thread that waits for a dead disk or server: it is no longer waited for, another takes its place,
and the memory it may yet write to must not be used again.

Reads of segments under way: by a few threads of this process, or by the workers of a Dask cluster.

Both begin a read into the caller's memory and return at once, with a function that waits for the rows to be
there, returns the seconds it took to read and to decode them, and raises what went wrong. Both are context
managers, and `stop`, called from any thread, ends all waiting.
"""

from __future__ import annotations

import asyncio
import logging
import math
import mmap
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import CancelledError, Executor, Future, InvalidStateError, ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from functools import lru_cache
from queue import SimpleQueue
from typing import Any, Generic, TypeVar

from numpy.typing import NDArray

from ep3stream.errors import ConfigError, DamagedDataError, Ep3streamError
from ep3stream.store.backend import ReadTimes
from ep3stream.store.files import Location
from ep3stream.store.object_files import outage_of
from ep3stream.store.reader import SplitReader
from ep3stream.stream.shared_segments import SharedSegment, this_machine

_T = TypeVar("_T")

_log = logging.getLogger(__name__)

# How long to wait, in all, for reads that are under way when nobody wants them any more.
_STOP_S = 10.0


class Hung(Exception):
    """A read that did not end in time; it may still write to the memory it was given."""


class Read(Generic[_T]):
    """One piece of work for the threads, and what becomes of it."""

    def __init__(self, threads: ReadThreads, work: Callable[[], _T]) -> None:
        self._threads, self._work = threads, work
        self._future: Future[_T] = Future()
        self._began_at: float | None = None

    def run(self) -> None:
        """In a thread: does the work, unless it was cancelled."""
        if not self._future.set_running_or_notify_cancel():
            return
        self._began_at = time.monotonic()
        # Who has given it up has ended the future already.
        with suppress(InvalidStateError):
            try:
                self._future.set_result(self._work())
            except InvalidStateError:
                raise
            except BaseException as error:
                self._future.set_exception(error)

    def cancel(self) -> None:
        """It never begins, or is no longer waited for."""
        if self._future.cancel():
            self._future.set_running_or_notify_cancel()  # Or whoever waits for it goes on waiting.
        else:
            with suppress(InvalidStateError):
                self._future.set_exception(CancelledError())

    def result(self) -> _T:
        """Waits for the work; raises what it raised, or Hung when it has run for the timeout of its threads."""
        timeout_s = self._threads.timeout_s
        while not self._future.done():
            began_at = self._began_at
            left_s = timeout_s if began_at is None else began_at + timeout_s - time.monotonic()
            if left_s <= 0:
                self._threads.leave(self)
                raise Hung
            wait([self._future], None if math.isinf(left_s) else left_s)
        return self._future.result()


class ReadThreads:
    """`n_threads` threads that do what is submitted, in order. A context manager.

    timeout_s: how long one piece of work may run before `Read.result` raises Hung; infinity for ever.
    """

    def __init__(self, n_threads: int, timeout_s: float, name: str) -> None:
        self.timeout_s = timeout_s
        self._n_threads, self._name = n_threads, name
        self._work: SimpleQueue[Read[Any] | None] = SimpleQueue()
        self._lock = threading.Lock()
        self._stopped = False
        self._threads: dict[threading.Thread, Read[Any] | None] = {}

    def __enter__(self) -> ReadThreads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def submit(self, work: Callable[[], _T]) -> Read[_T]:
        """Has one of the threads do the work when those before it have begun."""
        read = Read(self, work)
        with self._lock:
            if self._stopped:
                raise RuntimeError("no reads begin after stop")
            self._work.put(read)
            if len(self._threads) < self._n_threads:
                self._start()
        return read

    def leave(self, read: Read[Any]) -> None:
        """The thread of `read` hangs: forget it, and have another do the rest."""
        with self._lock:
            for thread in [thread for thread, current in self._threads.items() if current is read]:
                del self._threads[thread]
                if not self._stopped:
                    self._start()

    def stop(self) -> None:
        """Cancel what has not begun and wait for what has, ten seconds at most; nothing begins any more."""
        with self._lock:
            self._stopped = True
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
            del read  # Its result belongs to whoever waits for it.


# How often a segment that does not come is asked for.
ATTEMPTS = 3

_PAUSES_S = (0.1, 0.5)

_CONNECT_TIMEOUT_S, _WORKER_TIMEOUT_S = 10, 5

Finish = Callable[[], ReadTimes]

_Rows = tuple[NDArray[Any], NDArray[Any], ReadTimes]


class LocalReads:
    """Reads by threads of this process, as many as the reader's storage is worth."""

    def __init__(self, reader: SplitReader, timeout_s: float) -> None:
        self._reader = reader
        self._threads = ReadThreads(reader.n_readers, timeout_s, "ep3stream-read")

    def __enter__(self) -> LocalReads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def begin(self, segment: int, x: NDArray[Any], y: NDArray[Any]) -> Finish:
        """Begin to read a segment into x and y, which must stay untouched until the returned function ends.

        When that raises Hung, they must never be used again.
        """
        return self._threads.submit(lambda: read_patiently(self._reader, segment, x, y)[2]).result

    def stop(self) -> None:
        """Cancel the reads that wait for a thread, and wait for the few under way; none begins any more."""
        self._threads.stop()


class DaskReads:
    """Reads by the workers of the Dask scheduler at `address`, who see the store under the same path.

    Workers on this machine lend the rows they have read, others send them.
    timeout_s: how long to wait for one segment before another task is begun for it. `with` raises ConfigError
    when no scheduler answers at the address.
    """

    def __init__(self, reader: SplitReader, address: str, timeout_s: float) -> None:
        self._address, self._timeout_s = address, timeout_s if math.isfinite(timeout_s) else None
        self._reader = reader
        self._store = (reader.path, reader.info.name, reader.manifest.fingerprint)
        self._lent: dict[int, mmap.mmap] = {}
        self._lock = threading.Lock()
        self._executor: Executor | None = None
        self._resources = ExitStack()

    def __enter__(self) -> DaskReads:
        from distributed import Client  # A second to import, and only for those with a cluster.

        try:
            _check_address(self._address)
            client = Client(
                self._address, timeout=_CONNECT_TIMEOUT_S, direct_to_workers=True, set_as_default=False
            )
        except (OSError, ValueError) as error:
            raise ConfigError(
                f"dask is {self._address!r} but no scheduler answers there ({error}); "
                "start it or correct the address"
            ) from error
        self._resources.enter_context(client)
        # Rows on a worker that was killed are looked for this long before another worker is asked to read them.
        client.rpc.timeout = _WORKER_TIMEOUT_S
        # Another worker may be able to read what one cannot.
        self._executor = client.get_executor(pure=False, retries=2)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def begin(self, segment: int, x: NDArray[Any], y: NDArray[Any]) -> Finish:
        """Begin to have a segment read; the returned function puts its rows into x and y."""
        first = self._submit(segment, this_machine())

        def finish() -> ReadTimes:
            found = self._result(segment, first)
            try:
                x_rows, y_rows, times = _taken(found, self._lent)
            except OSError as error:  # The worker was killed meanwhile, or is another user's.
                _log.warning("segment %d was lent by a worker, but cannot be looked at (%s)", segment, error)
                x_rows, y_rows, times = _taken(self._result(segment, self._submit(segment, None)), {})
            x[: len(x_rows)], y[: len(y_rows)] = x_rows, y_rows
            return times

        return finish

    def _submit(self, segment: int, machine: str | None) -> Future[_Rows | SharedSegment]:
        with self._lock:
            if self._executor is None:
                raise RuntimeError("no reads begin outside the with block or after stop")
            return self._executor.submit(_read_on_worker, *self._store, segment, machine)

    def _result(self, segment: int, future: Future[_Rows | SharedSegment]) -> _Rows | SharedSegment:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return future.result(self._timeout_s)
            except Ep3streamError:
                raise
            except TimeoutError:
                future.cancel()
                if attempt < ATTEMPTS:
                    _log.warning("segment %d did not come from the cluster, trying again", segment)
                    future = self._submit(segment, this_machine())
            except Exception as error:  # Lost workers and schedulers make themselves felt in many ways.
                path, split, _ = self._store
                raise DamagedDataError(
                    f"{path}: split {split}, segment {segment} was not read by the Dask cluster at "
                    f"{self._address} ({error!r:.300}); see its workers' logs, then resume"
                ) from error
        raise hung_error(self._reader, segment, self._timeout_s or 0)

    def stop(self) -> None:
        """Cancel all reads without waiting for any; none begins any more."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)


SegmentReads = LocalReads | DaskReads


def hung_error(reader: SplitReader, segment: int, timeout_s: float) -> DamagedDataError:
    """For a segment that did not come, however often it was asked for."""
    return DamagedDataError(
        f"{reader.path}: split {reader.info.name}, segment {segment} did not come within {timeout_s:g} s, "
        f"{ATTEMPTS} times; see to its disk, server or cluster, or allow more by --read-timeout, and resume"
    )


def _check_address(address: str) -> None:
    """Raises OSError or ValueError where no scheduler answers.

    A client that cannot connect leaves a thread behind, and one whose server says nothing waits for minutes.
    """
    from distributed.comm.addressing import get_address_host_port
    from distributed.comm.core import connect
    from distributed.security import Security

    if address.startswith("inproc://"):
        return
    socket.create_connection(get_address_host_port(address), _CONNECT_TIMEOUT_S).close()
    arguments = Security().get_connection_args("client")

    async def greet() -> None:
        async with asyncio.timeout(_CONNECT_TIMEOUT_S):
            comm = await connect(address, timeout=_CONNECT_TIMEOUT_S, **arguments)
        await comm.close()

    with ThreadPoolExecutor(1) as thread:  # In a notebook this one has a loop of its own.
        try:
            thread.submit(asyncio.run, greet()).result()
        except TimeoutError:
            raise OSError(f"what listens there said nothing for {_CONNECT_TIMEOUT_S} s") from None
        except MemoryError:  # The first bytes of an HTTP answer, taken for a size.
            raise ValueError("what answers is something else: is it the port of the dashboard?") from None


def read_patiently(
    reader: SplitReader, segment: int, x: NDArray[Any] | None = None, y: NDArray[Any] | None = None
) -> _Rows:
    """`reader.read_segment` and what it took; an input/output error is met by two more attempts."""
    times, began = ReadTimes(), time.perf_counter()
    with outage_of(reader.path).reading() as failed:
        for pause_s in (*_PAUSES_S, None):
            try:
                rows = reader.read_segment(segment, x, y, times)
                break
            except (OSError, DamagedDataError) as error:
                if pause_s is None or not (
                    isinstance(error, OSError) or isinstance(error.__cause__, OSError)
                ):
                    raise
                failed(error)
                time.sleep(pause_s)
    # What failed, and the pauses, are the storage's.
    times.read_s = time.perf_counter() - began - times.decode_s
    return *rows, times


@lru_cache(maxsize=4)
def _reader_on_worker(path: Location, split: str, fingerprint: str) -> SplitReader:
    """One reader for all tasks of a worker: to open a store is to parse the digests of all its segments."""
    return SplitReader(path, split, fingerprint)


def _read_on_worker(
    path: Location, split: str, fingerprint: str, segment: int, machine: str | None
) -> _Rows | SharedSegment:
    """The rows; where the asker is on the same `machine`, only where it finds them."""
    reader = _reader_on_worker(path, split, fingerprint)
    if machine is None or machine != this_machine():
        return read_patiently(reader, segment)
    lent = SharedSegment.filled(reader.layout(segment), lambda x, y: read_patiently(reader, segment, x, y)[2])
    return lent or read_patiently(reader, segment)


def _taken(found: _Rows | SharedSegment, seen: dict[int, mmap.mmap]) -> _Rows:
    return (*found.rows(seen), found.told) if isinstance(found, SharedSegment) else found
