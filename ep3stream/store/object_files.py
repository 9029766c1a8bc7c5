"""Reads that fail and are tried again, told in a line for all readers of a place and not in one each.

The files of a store in an S3-compatible bucket: ranges of objects, many requests at once.

Address and credentials come from the usual variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_REGION, AWS_ENDPOINT_URL, AWS_SKIP_SIGNATURE and so on. Needs obstore, which repeats a request that failed.
"""

from __future__ import annotations

import asyncio
import logging
import math
import os
import re
import stat
import threading
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from datetime import timedelta
from typing import TYPE_CHECKING, Any, ClassVar, TypeVar

from ep3stream.errors import ConfigError, InputError
from ep3stream.store.files import ObjectUrl

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import S3Store


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


_MIB = 1 << 20

# What one request fetches. With the number of requests it bounds the bytes on their way: 64 MiB, about.
_PART_BYTES = 1 * _MIB

_SHORT_BYTES = 4096

_REQUESTS = 64

_READERS = 16

_CONNECT_S, _REQUEST_S = 5, 30

_RETRIES, _RETRY_S, _BACKOFF_S = 5, 60, 0.1

_PAUSES_S = (0.1, 0.5)

_REFUSED = re.compile(
    r"status code: 40[13]|<Code>(AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken)<"
)

_T = TypeVar("_T")

# First byte, and the memory that it and those behind it are for.
_Part = tuple[int, tuple[memoryview, ...]]


class ObjectFiles:
    """The objects below a prefix. Opens no connection before it is asked for something.

    Besides what every reader of files raises, ConfigError without obstore, InputError for a bucket that is not
    there, PermissionError for credentials that are refused, OSError for what may succeed another time.
    """

    n_readers: ClassVar[int] = _READERS

    def __init__(self, url: ObjectUrl) -> None:
        self._url = url
        self._bucket = _connect(url)
        self._sizes: dict[str, int] = {}
        self._requests = _Budget(_REQUESTS)

    def size(self, name: str) -> int:
        """Of an object; one listing tells those of all that lie beside it."""
        if name not in self._sizes:
            beside = self.listing(name.rpartition("/")[0])
            self._sizes |= {other: size for other, (size, _) in beside.items()}
        if name not in self._sizes:
            raise FileNotFoundError(f"{name} is missing")
        return self._sizes[name]

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        """By requests for parts of at most 1 MiB, side by side."""
        parts = list(_parts(start, outs))
        with self._requests.some(len(parts)) as n_at_once:
            self._patiently(name, lambda: asyncio.run(self._read_parts(name, parts, n_at_once)))

    async def _read_parts(self, name: str, parts: list[_Part], n_at_once: int) -> None:
        import obstore

        queue = iter(parts)

        async def work() -> None:
            for start, outs in queue:
                wanted = sum(map(len, outs))
                data = await obstore.get_range_async(
                    self._bucket, self._key(name), start=start, length=wanted
                )
                if len(data) != wanted:
                    raise OSError(f"{name}: {len(data)} bytes came of the {wanted} asked for")
                rest = memoryview(data)
                for out in outs:
                    out[:], rest = rest[: len(out)], rest[len(out) :]

        # Those that still run when one fails are cancelled with the loop.
        await asyncio.gather(*(work() for _ in range(n_at_once)))

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """The whole object."""
        import obstore

        def get() -> bytes:
            found = obstore.get(self._bucket, self._key(name))
            if found.meta["size"] > max_bytes:
                raise OSError(f"{name} is larger than {max_bytes} bytes")
            return bytes(found.bytes())

        return self._patiently(name, get)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Objects are all there is."""
        for name in self.listing():
            yield name, stat.S_IFREG

    def n_bytes(self) -> int:
        """Of all objects."""
        return sum(size for size, _ in self.listing().values())

    def listing(self, folder: str = "", limit: int | None = None) -> dict[str, tuple[int, str | None]]:
        """Name -> bytes and entity tag of every object below `folder`, or of `limit` objects and some more."""
        import obstore

        prefix, skip = self._key(folder).rstrip("/") + "/", len(self._url.key) + 1

        def pages() -> dict[str, tuple[int, str | None]]:
            found: dict[str, tuple[int, str | None]] = {}
            for page in obstore.list(self._bucket, prefix):
                found |= {item["path"][skip:]: (item["size"], item["e_tag"]) for item in page}
                if limit is not None and len(found) >= limit:
                    break
            return found

        return self._patiently(folder or str(self._url), pages)

    def put(self, name: str, data: Any, *, is_new: bool = False) -> str | None:
        """Write an object, from bytes or a path; its entity tag. is_new: FileExistsError where there is one."""
        import obstore

        with self._naming(name):
            mode: PutMode = "create" if is_new else "overwrite"
            try:
                return obstore.put(self._bucket, self._key(name), data, mode=mode)["e_tag"]
            except obstore.exceptions.GenericError as error:
                # Not every server knows If-None-Match; those that do not are asked before.
                if not is_new or "NotImplemented" not in str(error):
                    raise
        if name in self.listing():
            raise FileExistsError(f"{name} exists")
        return self.put(name, data)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; those that are not there need not be."""
        import obstore

        with self._naming(str(self._url)):
            obstore.delete(self._bucket, [self._key(name) for name in names])

    def _key(self, name: str) -> str:
        return f"{self._url.key}/{name}"

    def _patiently(self, name: str, fetch: Callable[[], _T]) -> _T:
        """What `fetch` gives. obstore repeats what the server refuses, but not what it began and did not end."""
        with outage_of(self._url).reading() as failed:
            for pause_s in _PAUSES_S:
                try:
                    with self._naming(name):
                        return fetch()
                except (FileNotFoundError, PermissionError):
                    raise
                except OSError as error:
                    failed(error)
                time.sleep(pause_s)
            with self._naming(name):
                return fetch()

    @contextmanager
    def _naming(self, name: str) -> Iterator[None]:
        """Makes errors of obstore what readers of files expect."""
        from obstore import exceptions

        try:
            yield
        except exceptions.AlreadyExistsError:
            raise FileExistsError(f"{name} exists") from None
        except (exceptions.BaseError, FileNotFoundError) as error:
            if "NoSuchBucket" in str(error):
                raise InputError(
                    f"bucket {self._url.bucket!r} does not exist; make it, or correct {self._url}"
                ) from None
            if isinstance(error, FileNotFoundError):
                raise FileNotFoundError(f"{name} is missing") from None
            if _REFUSED.search(str(error)):  # A refused listing has no type of its own.
                raise PermissionError(f"access to {name} is refused: {_told(error)}") from None
            raise OSError(f"{name}: {_told(error)}") from None


def _parts(start: int, outs: Sequence[memoryview]) -> Iterator[_Part]:
    """First byte of each request, and the memory for what it brings. A short piece goes with the one before."""
    pending: list[memoryview] = []
    for out in outs:
        for first in range(0, len(out), _PART_BYTES):
            piece = out[first : first + _PART_BYTES]
            if pending and sum(map(len, pending)) + len(piece) > _PART_BYTES + _SHORT_BYTES:
                yield start, tuple(pending)
                start += sum(map(len, pending))
                pending = []
            pending.append(piece)
    if pending:
        yield start, tuple(pending)


class _Budget:
    """A number of requests, which those who read at the same time share."""

    def __init__(self, total: int) -> None:
        self._lock = threading.Lock()
        self._free = total

    @contextmanager
    def some(self, wanted: int) -> Iterator[int]:
        """How many to make at once: up to half of those that are free, for others may come; at least one."""
        with self._lock:
            granted = max(1, min(wanted, self._free // 2))
            self._free -= granted
        try:
            yield granted
        finally:
            with self._lock:
                self._free += granted


def _connect(url: ObjectUrl) -> S3Store:
    try:
        from obstore.exceptions import BaseError
        from obstore.store import S3Store
    except ImportError as error:
        raise ConfigError(f"{url} needs obstore; pip install 'ep3stream[s3]'") from error
    endpoint = os.environ.get("AWS_ENDPOINT_URL_S3") or os.environ.get("AWS_ENDPOINT_URL") or ""
    try:
        return S3Store(
            url.bucket,
            client_options={
                # A user who writes http means it: his own server, most likely on his own network.
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=_CONNECT_S),
                "timeout": timedelta(seconds=_REQUEST_S),
            },
            retry_config={
                "max_retries": _RETRIES,
                "retry_timeout": timedelta(seconds=_RETRY_S),
                "backoff": {"init_backoff": timedelta(seconds=_BACKOFF_S)},
            },
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"{url}: {_told(error)}; correct the AWS_... variables") from error


def _told(error: Exception) -> str:
    """What a server or the network said, out of an error of obstore's, which repeats URLs and inner parts."""
    text = " ".join(str(error).partition("\n\nDebug source:")[0].split())
    if answer := re.search(r"<Code>(.{1,80}?)</Code>(?:.*?<Message>(.{1,200}?)</Message>)?", text):
        return ": ".join(part for part in answer.groups() if part)
    return text.rpartition(" - ")[2][:300]
