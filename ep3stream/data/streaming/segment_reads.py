"""Reads of segments under way: by a few threads of this process, or by the workers of a Dask cluster.

Both begin a read into the caller's memory and return at once, with a function that waits for the rows to be
there, returns the seconds it took to read and to decode them, and raises what went wrong. Both are context
managers, and `stop`, called from any thread, ends all waiting.
"""

from __future__ import annotations

import logging
import socket
import threading
import time
from collections.abc import Callable
from concurrent.futures import Executor, ThreadPoolExecutor
from contextlib import ExitStack
from functools import lru_cache
from typing import Any

from numpy.typing import NDArray

from ep3stream.data.backend import ReadTimes
from ep3stream.data.location import Location
from ep3stream.data.store import SplitReader
from ep3stream.errors import ConfigError, DamagedDataError, Ep3streamError

_log = logging.getLogger(__name__)

_LOCAL_THREADS = 2
_PAUSES_S = (0.1, 0.5)
_CONNECT_TIMEOUT_S = 10

Finish = Callable[[], ReadTimes]


class LocalReads:
    """Reads by threads of this process."""

    def __init__(self, reader: SplitReader) -> None:
        self._reader = reader
        self._pool = ThreadPoolExecutor(_LOCAL_THREADS, "ep3stream-read")

    def __enter__(self) -> LocalReads:
        return self

    def __exit__(self, *_: object) -> None:
        self.stop()

    def begin(self, segment: int, x: NDArray[Any], y: NDArray[Any]) -> Finish:
        """Begin to read a segment into x and y, which must stay untouched until the returned function ends."""
        return self._pool.submit(self._read, segment, x, y).result

    def _read(self, segment: int, x: NDArray[Any], y: NDArray[Any]) -> ReadTimes:
        return read_patiently(self._reader, segment, x, y)[2]

    def stop(self) -> None:
        """Cancel the reads that wait for a thread, and wait for the few under way; none begins any more."""
        self._pool.shutdown(cancel_futures=True)


class DaskReads:
    """Reads by the workers of the Dask scheduler at `address`, who see the store under the same path.

    `with` raises ConfigError when no scheduler answers at the address.
    """

    def __init__(self, reader: SplitReader, address: str) -> None:
        self._address = address
        self._store = (reader.path, reader.info.name, reader.manifest.fingerprint)
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
        # Another worker may be able to read what one cannot.
        self._executor = client.get_executor(pure=False, retries=2)
        return self

    def __exit__(self, *_: object) -> None:
        self._resources.close()

    def begin(self, segment: int, x: NDArray[Any], y: NDArray[Any]) -> Finish:
        """Begin to have a segment read; the returned function puts its rows into x and y."""
        with self._lock:
            if self._executor is None:
                raise RuntimeError("no reads begin outside the with block or after stop")
            future = self._executor.submit(_read_on_worker, *self._store, segment)

        def finish() -> ReadTimes:
            try:
                x_rows, y_rows, times = future.result()
            except Ep3streamError:
                raise
            except Exception as error:  # Lost workers and schedulers make themselves felt in many ways.
                path, split, _ = self._store
                raise Ep3streamError(
                    f"{path}: split {split}, segment {segment} was not read by the Dask cluster at "
                    f"{self._address} ({error!r:.300}); see its workers' logs, then resume"
                ) from error
            x[: len(x_rows)], y[: len(y_rows)] = x_rows, y_rows
            return times

        return finish

    def stop(self) -> None:
        """Cancel all reads without waiting for any; none begins any more."""
        with self._lock:
            executor, self._executor = self._executor, None
        if executor is not None:
            executor.shutdown(wait=False)


SegmentReads = LocalReads | DaskReads


def _check_address(address: str) -> None:
    """Raises OSError or ValueError where nobody listens: a client that cannot connect leaves a thread behind."""
    from distributed.comm.addressing import get_address_host_port

    if not address.startswith("inproc://"):
        socket.create_connection(get_address_host_port(address), _CONNECT_TIMEOUT_S).close()


def read_patiently(
    reader: SplitReader, segment: int, x: NDArray[Any] | None = None, y: NDArray[Any] | None = None
) -> tuple[NDArray[Any], NDArray[Any], ReadTimes]:
    """`reader.read_segment` and what it took; an input/output error is met by two more attempts."""
    times, began = ReadTimes(), time.perf_counter()
    for pause_s in (*_PAUSES_S, None):
        try:
            rows = reader.read_segment(segment, x, y, times)
            break
        except (OSError, DamagedDataError) as error:
            if pause_s is None or not (isinstance(error, OSError) or isinstance(error.__cause__, OSError)):
                raise
            _log.warning("trying again in %g s: %s", pause_s, error)
            time.sleep(pause_s)
    # What failed, and the pauses, are the storage's.
    times.read_s = time.perf_counter() - began - times.decode_s
    return *rows, times


@lru_cache(maxsize=4)
def _reader_on_worker(path: Location, split: str, fingerprint: str) -> SplitReader:
    """One reader for all tasks of a worker: to open a store is to parse the digests of all its segments."""
    return SplitReader(path, split, fingerprint)


def _read_on_worker(
    path: Location, split: str, fingerprint: str, segment: int
) -> tuple[NDArray[Any], NDArray[Any], ReadTimes]:
    return read_patiently(_reader_on_worker(path, split, fingerprint), segment)
