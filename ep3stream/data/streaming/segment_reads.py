"""Reads of segments under way: by a few threads of this process, or by the workers of a Dask cluster.

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
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from ep3stream.data.backend import ReadTimes
from ep3stream.data.location import Location
from ep3stream.data.outage import outage_of
from ep3stream.data.store import SplitReader
from ep3stream.data.streaming.lent_rows import LentRows, this_machine
from ep3stream.data.streaming.read_threads import ReadThreads
from ep3stream.errors import ConfigError, DamagedDataError, Ep3streamError

_log = logging.getLogger(__name__)

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

    def _submit(self, segment: int, machine: str | None) -> Future[_Rows | LentRows]:
        with self._lock:
            if self._executor is None:
                raise RuntimeError("no reads begin outside the with block or after stop")
            return self._executor.submit(_read_on_worker, *self._store, segment, machine)

    def _result(self, segment: int, future: Future[_Rows | LentRows]) -> _Rows | LentRows:
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
) -> _Rows | LentRows:
    """The rows; where the asker is on the same `machine`, only where it finds them."""
    reader = _reader_on_worker(path, split, fingerprint)
    if machine is None or machine != this_machine():
        return read_patiently(reader, segment)
    lent = LentRows.filled(reader.layout(segment), lambda x, y: read_patiently(reader, segment, x, y)[2])
    return lent or read_patiently(reader, segment)


def _taken(found: _Rows | LentRows, seen: dict[int, mmap.mmap]) -> _Rows:
    return (*found.rows(seen), found.told) if isinstance(found, LentRows) else found
