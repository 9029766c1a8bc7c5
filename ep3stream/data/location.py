"""Where a store lies: a path on a disk, or s3://bucket/key."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

from ep3stream.errors import ConfigError

# What S3 allows, and nothing that would mean something else inside a URL.
_BUCKET = re.compile(r"[A-Za-z0-9][A-Za-z0-9._-]{1,62}")
# pathlib makes one slash of two.
_SCHEME = re.compile(r"s3:/{1,2}(?=[^/])")


@dataclass(frozen=True, slots=True)
class ObjectUrl:
    """A prefix of keys in a bucket, written s3://bucket/key."""

    bucket: str
    key: str

    def __str__(self) -> str:
        return f"s3://{self.bucket}/{self.key}"

    @property
    def name(self) -> str:
        """The last part of the key, as of a path."""
        return self.key.rpartition("/")[2]

    @property
    def suffix(self) -> str:
        """Of the name, as of a path: `.zarr`."""
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
