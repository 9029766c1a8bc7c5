"""Reads of segments under way: by a few threads of this process, or by the workers of a Dask cluster.

Both classes are context managers with the same two methods. `begin` begins one read into the caller's memory and
returns at once, with a function that waits for the rows, returns the seconds that it took to read and to decode them,
and raises what went wrong: Hung after the time-out. Nothing is repeated here (`finish_read` of store/retries.py does
that). `stop`, called from any thread, ends all waiting.
"""

from __future__ import annotations

import asyncio
import logging
import math
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, Future, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from ep3stream.errors import ConfigError, DamagedDataError, Ep3streamError
from ep3stream.store.backend import ReadTimes
from ep3stream.store.files import Location
from ep3stream.store.read_threads import ReadThreads
from ep3stream.store.reader import SplitReader
from ep3stream.store.retries import Hung
from ep3stream.stream.shared_segments import MappedBlock, SharedSegment, this_machine

_log = logging.getLogger(__name__)

_CONNECT_TIMEOUT_S, _WORKER_TIMEOUT_S = 10, 5

Finish = Callable[[], ReadTimes]

_Rows = tuple[NDArray[Any], NDArray[Any], ReadTimes]


class LocalReads:
    """Reads by threads of this process, as many as are worth it for the reader's storage."""

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self._threads = ReadThreads(reader.n_readers, reader.read_timeout_s, "ep3stream-read")

    def __enter__(self) -> LocalReads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def begin(self, segment: int, x: NDArray[Any], y: NDArray[Any]) -> Finish:
        """Begin to read a segment into x and y, which must stay untouched until the returned function ends.

        When that function raises Hung, x and y must never be used again.
        """
        return self._threads.submit(lambda: _read(self._reader, segment, x, y)[2]).result

    def stop(self) -> None:
        """Cancel the reads that wait for a thread, and wait for the few under way; none begins afterwards."""
        self._threads.stop()


class DaskReads:
    """Reads by the workers of the Dask scheduler at `address`, who see the store under the same path.

    Workers on this machine share the memory of the rows they have read, other workers send the rows.
    `with` raises ConfigError when no scheduler answers at the address.
    """

    def __init__(self, reader: SplitReader, address: str) -> None:
        timeout_s = reader.read_timeout_s
        self._address, self._timeout_s = address, timeout_s if math.isfinite(timeout_s) else None
        self._store = (reader.path, reader.info.name, reader.manifest.fingerprint)
        self._mapped: dict[int, MappedBlock] = {}
        self._is_told = False
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
        self._executor = client.get_executor(pure=False)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def begin(self, segment: int, x: NDArray[Any], y: NDArray[Any]) -> Finish:
        """Begin to have a segment read; the returned function puts its rows into x and y."""
        future = self._submit(segment, this_machine())

        def finish() -> ReadTimes:
            result = self._result(segment, future)
            if isinstance(result, SharedSegment):
                try:
                    result.copy(x, y, self._mapped)
                    times: ReadTimes = result.fill_result
                    return times
                except (
                    OSError
                ) as error:  # The worker was killed, has let go of the rows, or is another user's.
                    level = logging.DEBUG if self._is_told else logging.WARNING
                    message = f"segment {segment} is read again: it cannot be had from its worker ({error})"
                    _log.log(level, message)
                    self._is_told = True
                    result = self._result(segment, self._submit(segment, None))
            assert not isinstance(result, SharedSegment)  # Where no machine is named, nothing is shared.
            x_rows, y_rows, times = result
            x[: len(x_rows)], y[: len(y_rows)] = x_rows, y_rows
            return times

        return finish

    def _submit(self, segment: int, machine: str | None) -> Future[_Rows | SharedSegment]:
        with self._lock:
            if self._executor is None:
                raise RuntimeError("no reads begin outside the with block or after stop")
            return self._executor.submit(_read_on_worker, *self._store, segment, machine)

    def _result(self, segment: int, future: Future[_Rows | SharedSegment]) -> _Rows | SharedSegment:
        try:
            return future.result(self._timeout_s)
        except (Ep3streamError, MemoryError):  # Too little memory, here or on a worker, is no damage.
            raise
        except TimeoutError:
            future.cancel()
            raise Hung from None
        except Exception as error:  # Lost workers and schedulers raise errors of many types.
            path, split, _ = self._store
            raise DamagedDataError(
                f"{path}: split {split}, segment {segment} was not read by the Dask cluster at "
                f"{self._address} ({error!r:.300}); see its workers' logs, then resume"
            ) from error

    def stop(self) -> None:
        """Cancel all reads without waiting for any; none begins afterwards."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)


SegmentReads = LocalReads | DaskReads


def _check_address(address: str) -> None:
    """Raise OSError or ValueError where no scheduler answers.

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

    with ThreadPoolExecutor(1) as thread:  # In a notebook, this thread runs an event loop already.
        try:
            thread.submit(asyncio.run, greet()).result()
        except TimeoutError:
            raise OSError(f"what listens there said nothing for {_CONNECT_TIMEOUT_S} s") from None
        except MemoryError:  # The first bytes of an HTTP answer, taken for a size.
            raise ValueError("what answers is something else: is it the port of the dashboard?") from None


def _read(
    reader: SplitReader, segment: int, x: NDArray[Any] | None = None, y: NDArray[Any] | None = None
) -> _Rows:
    """`reader.read_segment` and its times; all seconds but those of decoding count as those of the storage."""
    times, began = ReadTimes(), time.perf_counter()
    rows = reader.read_segment(segment, x, y, times)
    times.read_s = time.perf_counter() - began - times.decode_s
    return *rows, times


@lru_cache(maxsize=4)
def _reader_on_worker(path: Location, split: str, fingerprint: str) -> SplitReader:
    """One reader for all tasks of a worker: to open a store is to parse the digests of all its segments."""
    return SplitReader(path, split, fingerprint)


def _read_on_worker(
    path: Location, split: str, fingerprint: str, segment: int, machine: str | None
) -> _Rows | SharedSegment:
    """The rows of a segment; for a client on the same `machine`, in memory that this worker shares if it can."""
    reader = _reader_on_worker(path, split, fingerprint)
    if machine is None or machine != this_machine():
        return _read(reader, segment)
    shared = SharedSegment.filled(reader.layout(segment), lambda x, y: _read(reader, segment, x, y)[2])
    return shared or _read(reader, segment)
