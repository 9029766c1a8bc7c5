"""The files of a store in an S3-compatible bucket: ranges of objects, many requests at once.

Address and credentials come from the usual variables: AWS_ACCESS_KEY_ID, AWS_SECRET_ACCESS_KEY, AWS_SESSION_TOKEN,
AWS_REGION, AWS_ENDPOINT_URL, AWS_SKIP_SIGNATURE and so on. Needs obstore.

Each request has one time-out and is repeated in one place. Requests that read are repeated here, because obstore does
not repeat an answer that ends too early, and repeats others without a word in the log. Requests that write are
repeated by obstore, which does so for each part of a large upload and knows which of them may be sent twice.

Objects are read in parts, side by side, and not by one request each, as zarr's ObjectStore does: where a window has
few segments, few requests would be on their way. From a server that answers after 30 ms with 80 MB/s on each
connection, 16 MiB come in .05 to .1 s in parts and in .27 s by one request, for the same processor time.
"""

from __future__ import annotations

import asyncio
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
from ep3stream.store.retries import ATTEMPTS, outage_of

if TYPE_CHECKING:
    from obstore import PutMode
    from obstore.store import S3Store

_MIB = 1 << 20

# The bytes that one request fetches. Times the number of requests: about 64 MiB are on their way at most.
_PART_BYTES = 1 * _MIB

# What a request may fetch beyond its part, so that a chunk's checksum needs no request of its own.
_SHORT_BYTES = 4096

# How many requests are under way at once, and how many segments are read at once.
_REQUESTS = 64
_READERS = 16

# The time-outs of a request. They are shorter than that of a segment (120 s), and bound opening and listing too.
_CONNECT_S, _REQUEST_S = 5, 30

# A request that reads: the first pause, which doubles up to the longest one. It is given up after _PATIENCE_S, about
# what a server takes to restart, but not before ATTEMPTS attempts, so that one that hangs is repeated as well.
_FIRST_PAUSE_S, _LONGEST_PAUSE_S, _PATIENCE_S = 0.1, 4.0, 30.0

# A request that writes, as repeated by obstore.
_RETRIES, _RETRY_S, _BACKOFF_S = 5, 60, 0.1

_REFUSED = re.compile(
    r"status code: 40[13]|<Code>(AccessDenied|InvalidAccessKeyId|SignatureDoesNotMatch|ExpiredToken)<"
)

_T = TypeVar("_T")

# The first byte of a request, and the memory that its bytes fill.
_Part = tuple[int, tuple[memoryview, ...]]


class ObjectFiles:
    """The objects below a prefix. No connection is opened before the first request.

    Every method raises ConfigError without obstore, InputError for a bucket that does not exist, FileNotFoundError for
    an object that does not, PermissionError for refused credentials, OSError for anything that may succeed later.
    """

    n_readers: ClassVar[int] = _READERS

    def __init__(self, url: ObjectUrl) -> None:
        self._url = url
        self._reads, self._writes = _connect(url, 0), _connect(url, _RETRIES)
        self._sizes: dict[str, int] = {}
        self._requests = _Budget(_REQUESTS)

    def size(self, name: str) -> int:
        """The bytes of an object; one request lists the sizes of all objects of its folder."""
        if name not in self._sizes:
            beside = self.listing(name.rpartition("/")[0])
            self._sizes |= {other: size for other, (size, _) in beside.items()}
        if name not in self._sizes:
            raise FileNotFoundError(f"{name} is missing")
        return self._sizes[name]

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        """Fill `outs` with the object's bytes from `start` on, by requests of at most 1 MiB side by side."""
        parts = list(_parts(start, outs))
        with self._requests.some(len(parts)) as n_at_once:
            asyncio.run(self._read_parts(name, parts, n_at_once))

    async def _read_parts(self, name: str, parts: list[_Part], n_at_once: int) -> None:
        queue = iter(parts)

        async def work() -> None:
            for start, outs in queue:
                with self._attempts(name) as pause_after:
                    while True:
                        try:
                            await self._read_part(name, start, outs)
                            break
                        except Exception as error:
                            await asyncio.sleep(pause_after(error))

        # Where one request is given up, the others are cancelled with the loop.
        await asyncio.gather(*(work() for _ in range(n_at_once)))

    async def _read_part(self, name: str, start: int, outs: Sequence[memoryview]) -> None:
        import obstore

        wanted = sum(map(len, outs))
        data = await obstore.get_range_async(self._reads, self._key(name), start=start, length=wanted)
        if len(data) != wanted:
            raise OSError(f"{name}: {len(data)} bytes came of the {wanted} asked for")
        rest = memoryview(data)
        for out in outs:
            out[:], rest = rest[: len(out)], rest[len(out) :]

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """The bytes of the whole object; OSError where there are more than `max_bytes`."""
        import obstore

        def get() -> bytes | None:
            answer = obstore.get(self._reads, self._key(name))
            return bytes(answer.bytes()) if answer.meta["size"] <= max_bytes else None

        data = self._patiently(name, get)
        if data is None:
            raise OSError(f"{name} is larger than {max_bytes} bytes")
        return data

    def walk(self) -> Iterator[tuple[str, int]]:
        """Name and mode (st_mode) of every object: all are regular files."""
        for name in self.listing():
            yield name, stat.S_IFREG

    def n_bytes(self) -> int:
        """The bytes of all objects."""
        return sum(size for size, _ in self.listing().values())

    def listing(self, folder: str = "", limit: int | None = None) -> dict[str, tuple[int, str | None]]:
        """Name -> bytes and entity tag of every object below `folder`; `limit`: so many objects are enough."""
        import obstore

        prefix, skip = self._key(folder).rstrip("/") + "/", len(self._url.key) + 1

        def pages() -> dict[str, tuple[int, str | None]]:
            found: dict[str, tuple[int, str | None]] = {}
            for page in obstore.list(self._reads, prefix):
                found |= {item["path"][skip:]: (item["size"], item["e_tag"]) for item in page}
                if limit is not None and len(found) >= limit:
                    break
            return found

        return self._patiently(folder or str(self._url), pages)

    def put(self, name: str, data: Any, *, is_new: bool = False) -> str | None:
        """Write an object, from bytes or a path; returns its entity tag.

        is_new: raise FileExistsError where the object exists already.
        """
        import obstore
        from obstore import exceptions

        mode: PutMode = "create" if is_new else "overwrite"
        try:
            return obstore.put(self._writes, self._key(name), data, mode=mode)["e_tag"]
        except exceptions.AlreadyExistsError:
            raise FileExistsError(f"{name} exists") from None
        except (exceptions.BaseError, OSError) as error:
            # Not every server knows If-None-Match; one that does not is asked before.
            if not is_new or "NotImplemented" not in str(error):
                raise self._explained(name, error) from None
        if name in self.listing():
            raise FileExistsError(f"{name} exists")
        return self.put(name, data)

    def delete(self, names: Sequence[str]) -> None:
        """Delete objects; names without an object are passed over."""
        import obstore
        from obstore import exceptions

        try:
            obstore.delete(self._writes, [self._key(name) for name in names])
        except (exceptions.BaseError, OSError) as error:
            raise self._explained(str(self._url), error) from None

    def _key(self, name: str) -> str:
        return f"{self._url.key}/{name}"

    def _patiently(self, name: str, fetch: Callable[[], _T]) -> _T:
        """The result of `fetch`, a request that reads, repeated while it fails."""
        with self._attempts(name) as pause_after:
            while True:
                try:
                    return fetch()
                except Exception as error:
                    time.sleep(pause_after(error))

    @contextmanager
    def _attempts(self, name: str) -> Iterator[Callable[[Exception], float]]:
        """Encloses all attempts of one request that reads; yields the function to call with the error of an attempt.

        That function returns the seconds to wait before the next attempt, or raises the error where there is none.
        """
        give_up_at, n_failed = time.monotonic() + _PATIENCE_S, 0

        def pause_after(error: Exception) -> float:
            nonlocal n_failed
            pause_s = min(_FIRST_PAUSE_S * 2.0**n_failed, _LONGEST_PAUSE_S)

            n_failed += 1
            explained = self._explained(name, error)
            is_passing = isinstance(explained, OSError) and not isinstance(
                explained, FileNotFoundError | PermissionError
            )
            if not is_passing or (n_failed >= ATTEMPTS and time.monotonic() + pause_s > give_up_at):
                raise explained from None
            failed(explained)
            return pause_s

        with outage_of(self._url).reading() as failed:
            yield pause_after

    def _explained(self, name: str, error: Exception) -> Exception:
        """An error of obstore as one that readers of files expect, with the server's own words; any other as it is."""
        from obstore.exceptions import BaseError

        if not isinstance(error, BaseError | FileNotFoundError):
            return error
        if "NoSuchBucket" in str(error):
            return InputError(f"bucket {self._url.bucket!r} does not exist; make it, or correct {self._url}")
        if isinstance(error, FileNotFoundError):
            return FileNotFoundError(f"{name} is missing")
        if _REFUSED.search(str(error)):  # A refused listing has no type of its own.
            return PermissionError(f"access to {name} is refused: {_told(error)}")
        return OSError(f"{name}: {_told(error)}")


def _parts(start: int, outs: Sequence[memoryview]) -> Iterator[_Part]:
    """The requests for the bytes from `start` on. A piece of memory too short for a request joins the one before."""
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
    """A number of requests, shared by the threads that read at the same time."""

    def __init__(self, total: int) -> None:
        self._lock = threading.Lock()
        self._free = total

    @contextmanager
    def some(self, wanted: int) -> Iterator[int]:
        """How many requests to make at once: at most half of the free ones, as other threads may come; at least 1."""
        with self._lock:
            granted = max(1, min(wanted, self._free // 2))
            self._free -= granted
        try:
            yield granted
        finally:
            with self._lock:
                self._free += granted


def _connect(url: ObjectUrl, n_retries: int) -> S3Store:
    """The bucket of a URL; a request that fails is repeated by obstore `n_retries` times."""
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
                # Whoever writes http means it: an own server, most likely on an own network.
                "allow_http": endpoint.startswith("http://"),
                "connect_timeout": timedelta(seconds=_CONNECT_S),
                "timeout": timedelta(seconds=_REQUEST_S),
            },
            retry_config={
                "max_retries": n_retries,
                "retry_timeout": timedelta(seconds=_RETRY_S),
                "backoff": {"init_backoff": timedelta(seconds=_BACKOFF_S)},
            },
        )
    except (BaseError, ValueError) as error:
        raise ConfigError(f"{url}: {_told(error)}; correct the AWS_... variables") from error


def _told(error: Exception) -> str:
    """The words of a server or the network, out of an error of obstore, which repeats URLs and debugging details."""
    text = " ".join(str(error).partition("\n\nDebug source:")[0].split())
    if answer := re.search(r"<Code>(.{1,80}?)</Code>(?:.*?<Message>(.{1,200}?)</Message>)?", text):
        return ": ".join(part for part in answer.groups() if part)
    return text.rpartition(" - ")[2][:300]
