"""Where a store lies (a path, or s3://bucket/key), what kind of thing lies at a path, and a store's files by name.

`StoreFiles` is what a Zarr store needs of the place that keeps its files: `LocalFiles` for a directory,
`ObjectFiles` (object_files.py) for a bucket.
"""

from __future__ import annotations

import os
import re
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import ClassVar, Protocol

from ep3stream.disk import read_small_file, require_own_file
from ep3stream.errors import ConfigError
from ep3stream.store.manifest import MANIFEST_NAME

# The names that S3 allows; none of their characters has a meaning of its own inside a URL.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")

# One slash or two: a URL that went through pathlib has one.
_SCHEME = re.compile(r"s3:/{1,2}(?=[^/])")

# Every run has this file from its first moment on, so a run that is given for a store is recognised by it.
RUN_MARK = "config.toml"


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """A prefix of keys in a bucket, written s3://bucket/key."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key, like `Path.name`."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """The end of the name, like `Path.suffix`: `.zarr`."""
        return Path(self.name).suffix

    @property
    def parent(self) -> ObjectUrl:
        """The prefix one level up."""
        return ObjectUrl(self.bucket, self.key.rpartition("/")[0])


Location = Path | ObjectUrl


def location(place: str | Path | ObjectUrl) -> Location:
    """The absolute path, or the URL, that a text or a path stands for.

    Raises ConfigError for a URL without bucket or key, or with a key that has empty parts or dots for parts.
    """
    if isinstance(place, ObjectUrl):
        return place
    text = str(place)
    if not re.match(r"s3:/", text):
        return Path(place).absolute()
    bucket, _, key = _SCHEME.sub("", text, count=1).rstrip("/").partition("/")
    if not _SCHEME.match(text) or not _BUCKET.fullmatch(bucket) or {"", ".", ".."} & set(key.split("/")):
        raise ConfigError(f"{text!r:.200} names no object; write it like s3://bucket/flights.zarr")
    return ObjectUrl(bucket, key)


def path_kind(path: Path) -> str:
    """The kind of thing at a path, for messages: `a file`, `an empty directory`, `a store`, `the RUN of a fit` ..."""
    try:
        if path.is_dir():
            names = {item.name for item in path.iterdir()}
            if not names:
                return "an empty directory"
            if MANIFEST_NAME in names:
                return "a store"
            return "the RUN of a fit" if RUN_MARK in names else "a directory of other things"
        if path.is_file():
            return "a store" if _is_hdf5_store(path) else "a file"
    except OSError as error:
        return f"not to be read ({error.strerror})"
    return "a link that leads nowhere" if os.path.lexists(path) else "not there"


def _is_hdf5_store(path: Path) -> bool:
    import h5py  # Half a second, which `status` need not wait for.

    if not h5py.is_hdf5(path):
        return False
    with h5py.File(path, "r") as file:
        return MANIFEST_NAME in file


class StoreFiles(Protocol):
    """The files of a store, for reading; every method may be called from several threads.

    Names have slashes between their parts. A name without a file raises FileNotFoundError.
    n_readers: how many segments are worth reading at once.
    """

    n_readers: ClassVar[int]

    def size(self, name: str) -> int:
        """The number of bytes of a file."""

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        """Fill `outs`, one after the other, with the file's bytes from `start` on.

        Raises EOFError or OSError where the file ends sooner.
        """

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """The bytes of the whole file; OSError where there are more than `max_bytes`."""

    def walk(self) -> Iterator[tuple[str, int]]:
        """Name and mode (st_mode) of every file, link and empty directory; no link is followed."""


class LocalFiles:
    """The files below a directory. The directory itself may be a link; any link below it is a ValueError."""

    n_readers: ClassVar[int] = 2

    def __init__(self, root: Path) -> None:
        self._root = root

    def size(self, name: str) -> int:
        """The number of bytes of a file; OSError for anything but a regular file."""
        return require_own_file(self._inside(name))

    def read_into(self, name: str, start: int, *outs: memoryview) -> None:
        """Fill `outs`, one after the other, with the file's bytes from `start` on; EOFError where it ends sooner."""
        with self._inside(name).open("rb", buffering=0) as file:
            file.seek(start)
            for out in outs:
                rest = out
                while rest:  # One call reads at most 2 GiB.
                    n_read = file.readinto(rest)
                    if not n_read:
                        raise EOFError(f"{name} ends {len(rest)} bytes too early")
                    rest = rest[n_read:]

    def read_small(self, name: str, max_bytes: int) -> bytes:
        """The bytes of the whole file; OSError for more than `max_bytes`, and for a pipe or a device."""
        return read_small_file(self._inside(name), max_bytes)

    def walk(self) -> Iterator[tuple[str, int]]:
        """Name and mode (st_mode) of every file, link and empty directory, in no order; no link is followed."""
        for folder, folders, files in os.walk(self._root, onerror=_raise):
            names = [*files, *(name for name in folders if os.path.islink(os.path.join(folder, name)))]
            for name in names:
                file = Path(folder, name)
                yield file.relative_to(self._root).as_posix(), file.lstat().st_mode
            if not folders and not files:
                yield Path(folder).relative_to(self._root).as_posix(), os.lstat(folder).st_mode

    def _inside(self, name: str) -> Path:
        path = str(self._root)
        for part in name.split("/"):
            path = os.path.join(path, part)
            if os.path.islink(path):
                raise ValueError(f"{name} is a link or lies behind one; put the file itself in the store")
        return Path(path)


def _raise(error: OSError) -> None:
    raise error
